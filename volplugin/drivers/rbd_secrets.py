"""Passphrases of encrypted volumes: files of the host that root alone can read."""

import os
import stat
from typing import Final

from volplugin.ceph.images import Secret
from volplugin.drivers.rbd_notes import Notes
from volplugin.errors import Unavailable

_LONGEST: Final = 64 << 10  # bytes; librbd and QEMU take the file as it is

# Measured with librbd 16: a write behind the source's end fails with EINVAL.
NO_GROWTH: Final = "an encrypted copy can't be larger than its source was"


def secret_of(notes: Notes) -> Secret | None:
    """Return how the volume is encrypted, with the passphrase as it is in the file.

    All bytes count, a newline at the end too. Raise `Unavailable` for a file that is
    missing on this host, empty, or open to others than root.
    """
    if not notes.encryption:
        return None
    return Secret(format=notes.encryption, passphrase=_read(notes.encryption_key))


def _read(path: str) -> bytes:
    what = f"encryption-key={path}"
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise Unavailable(f"{what} is no plain file")
            mode = stat.S_IMODE(status.st_mode)
            if mode & 0o077 or status.st_uid not in {0, os.geteuid()}:
                raise Unavailable(
                    f"{what} has mode {mode:04o} and owner {status.st_uid}: others can"
                    " read or change it; chown it to root and chmod it to 0600"
                )
            passphrase = file.read(_LONGEST + 1)
    except OSError as error:
        raise Unavailable(
            f"{what}: {error.strerror}; copy it to every host that is to have the"
            " volume"
        ) from error
    if not 0 < len(passphrase) <= _LONGEST:
        raise Unavailable(f"{what} must hold 1 to {_LONGEST} bytes")
    return passphrase
