"""What qemu-storage-daemon is told, and what its words mean."""

import glob
import json
import os
import re
import sysconfig
from collections.abc import Iterator, Mapping
from typing import Any, Final

from volplugin.ceph.cluster import Access
from volplugin.ceph.mappers import Target
from volplugin.errors import (
    Internal,
    InvalidArgument,
    NotFound,
    Unavailable,
    Unsupported,
    VolpluginError,
)
from volplugin.host import commands

PROGRAM: Final = "qemu-storage-daemon"

# Files in the daemon's folder, which is its working directory.
CONF: Final = "conf"
MONITOR: Final = "monitor"
READY: Final = "ready"

# Nodes: what librbd shows, and what is exported.
IMAGE: Final = "image"
DISK: Final = "disk"

# Written and flushed by the kernel above, so nothing is kept back here; what is
# discarded there is discarded in the cluster.
_CACHE: Final = {"discard": "unmap", "cache": {"direct": True, "no-flush": False}}

_LUKS: Final = {"luks1": "luks", "luks2": "luks2"}  # ours, and qemu's name
_DERIVATION: Final = (
    30.0  # seconds for a key to be made of a passphrase, slow by intent
)

_NOT_IN_NAMES: Final = re.compile(r"[^A-Za-z0-9._-]")  # of objects of qemu's

# Its driver is loaded, and then it fails: at once, and without a network.
NO_IMAGE: Final = {
    "driver": "rbd",
    "node-name": "none",
    "pool": "none",
    "image": "none",
    "conf": "/dev/null/conf",
}

# Where distributions have qemu's modules.
_MODULES: Final = (
    f"/usr/lib/{sysconfig.get_config_var('MULTIARCH')}/qemu",
    "/usr/lib/*/qemu",
    "/usr/lib/qemu",
    "/usr/lib64/qemu*",
)
_PROBE: Final = 10.0  # seconds


def problem() -> str | None:
    """Say what is missing on this host; None if nothing is."""
    if commands.find(PROGRAM) is None:
        return (
            f"there is no program {PROGRAM}: install Debian's packages"
            " qemu-system-common and qemu-block-extra"
        )
    if not _has_rbd():
        return "qemu can't read RBD images: install Debian's package qemu-block-extra"
    for device, module in (("/dev/fuse", "fuse"), ("/dev/loop-control", "loop")):
        if not os.path.exists(device):
            return f"there is no {device}: load the kernel's module (modprobe {module})"
    return None


def objection(target: Target) -> str | None:
    """Say what is wrong with the encryption that is asked for; None if nothing is."""
    if target.encryption is None:
        return None
    if target.encryption not in _LUKS:
        return f"there is no encryption {target.encryption!r}; it is luks1 or luks2"
    if target.key_file is None:
        return f"the encryption {target.encryption} takes the name of a key's file"
    return None


def words(target: Target, folder: str) -> list[str]:
    """Return the command that starts a daemon which is to be told of its image.

    Its working directory is ``folder``, so that the monitor's path is short. The names
    of image and folder are there for whoever looks at a list of processes.
    """
    name = "image-" + _NOT_IN_NAMES.sub("-", target.image)
    socket = f"socket,id={name},path={MONITOR},server=on,wait=off"
    told = [PROGRAM, "--chardev", socket, "--monitor", f"chardev={name}"]
    # Written last, when it listens.
    return [*told, "--pidfile", os.path.join(folder, READY)]


def requests(
    target: Target, disk: str, folder: str
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the monitor's commands that export the image at the file ``disk``.

    The files of the daemon are in ``folder``.
    """
    node = image(target, folder, target.encryption)
    if target.encryption is None:
        yield "blockdev-add", {**node, "node-name": DISK}
    else:
        secret = {"qom-type": "secret", "id": "key", "file": target.key_file}
        yield "object-add", secret
        yield "blockdev-add", {**node, "node-name": IMAGE}
        yield "blockdev-add", window(target)
    yield (
        "block-export-add",
        {
            "type": "fuse",
            "id": DISK,
            "node-name": DISK,
            "mountpoint": disk,
            "writable": not target.read_only,
            "growable": False,
            "allow-other": "off",
        },
    )


def limit(target: Target) -> float:
    """Return in how many seconds the image has to be exported."""
    return target.access.timeout + (_DERIVATION if target.encryption else 0)


def image(target: Target, folder: str, encryption: str | None) -> dict[str, Any]:
    """Return the options of a node that is the image, in the clear or as it is."""
    options: dict[str, Any] = {
        "driver": "rbd",
        "pool": target.pool,
        "image": target.image,
        "conf": os.path.join(folder, CONF),
        "user": target.access.user,
        "read-only": target.read_only,
        **_CACHE,
    }
    if target.namespace:
        options["namespace"] = target.namespace
    if encryption is not None:
        options["encrypt"] = {"format": _LUKS[encryption], "key-secret": "key"}
    return options


def window(target: Target, size: int | None = None) -> Mapping[str, Any]:
    """Return the options of the node between an encrypted image and its export.

    It can be told a length, which is the only way to let qemu 7.2 show the new one of
    an encrypted image: without the header, see `growth`.
    """
    length = {} if size is None else {"size": size}
    node = {"driver": "raw", "node-name": DISK, "file": IMAGE, **_CACHE, **length}
    return {**node, "read-only": target.read_only}


def configuration(access: Access) -> str:
    """Return the configuration of the daemon's RADOS client.

    qemu knows no option for a keyring; and the I/O of a file system must never time
    out. A later section of the same name adds to an earlier one and outdoes it.
    """
    try:
        with open(access.conf, encoding="utf-8", errors="surrogateescape") as file:
            given = file.read()
    except OSError as error:
        raise Unavailable(
            f"{access.conf}: {error.strerror}: set conf to the cluster's ceph.conf"
        ) from error
    lines = [
        f"[client.{access.user}]",
        "rados osd op timeout = 0",
        "rados mon op timeout = 0",
        # They would grow with each error of a cluster that is away.
        "log file =",
        "log to stderr = false",
        "err to stderr = false",
    ]
    if access.keyring is not None:
        lines.append(f"keyring = {access.keyring}")
    return "\n".join([given, *lines, ""])


def failure(target: Target, said: str) -> VolpluginError:
    """Return what the daemon's refusal, or its last words, mean."""
    access = target.access
    # qemu puts the whole option in front.
    words = said.rpartition("}: ")[2] or "it said nothing"
    doing = f"map {target}"
    rights = (
        f"client.{access.user} may not: compare its caps (ceph auth get"
        f" client.{access.user}) with the documentation"
    )
    keyring = access.keyring or f"the keyring that {access.conf} names"
    known: dict[str, tuple[type[VolpluginError], str]] = {
        "error connecting: No such file": (
            Unavailable,
            f"{keyring} has no key of client.{access.user}",
        ),
        "error connecting: Permission denied": (
            Unavailable,
            f"the cluster refuses the key of client.{access.user} in {keyring}",
        ),
        "error reading header from": (NotFound, "there is no such image"),
        "error opening pool": (NotFound, f"there is no pool {target.pool}"),
        "does not exist": (NotFound, f"there is no namespace {target.namespace}"),
        "encryption load fail: Operation not permitted": (
            InvalidArgument,
            f"the passphrase in {target.key_file} is wrong",
        ),
        "encryption load fail: Invalid argument": (
            InvalidArgument,
            f"the image is not encrypted as {target.encryption}",
        ),
        "Unable to read": (InvalidArgument, f"{target.key_file} can't be read"),
        "Operation not permitted": (Unavailable, rights),
        "Permission denied": (Unavailable, rights),
        "Unknown driver": (Unsupported, "install Debian's package qemu-block-extra"),
        "timed out": (Unavailable, "the cluster did not answer in time"),
        "does not answer": (Unavailable, "the cluster did not answer in time"),
    }
    for part, (kind, meaning) in known.items():
        if part in words:
            return kind(f"{doing}: {meaning} ({words})")
    return Internal(f"{doing}: {PROGRAM} ended: {words}")


def _has_rbd() -> bool:
    if any(glob.glob(f"{folder}/block-rbd.so") for folder in _MODULES):
        return True
    # It may be in a place of its own, or built in: then it misses the file.
    node = json.dumps(NO_IMAGE)
    told = commands.run(
        [PROGRAM, "--blockdev", node], limit=_PROBE, doing="probe qemu", ok=(0, 1)
    )
    return "error reading conf file" in told
