"""One server for one root: a file that a process locks for as long as it lives."""

import fcntl
import os

from volplugin.errors import InUse, from_os_error


def acquire(path: str) -> int:
    """Lock the file ``path``, made where it is missing, and write our pid into it.

    Return the descriptor to `release`; the kernel releases it when the process ends,
    and no child inherits it over exec. Raise `InUse` with the pid of the process that
    has the lock.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o644)
    except OSError as error:
        raise from_os_error(error, f"open {path}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    except BlockingIOError as error:
        holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
        os.close(descriptor)
        raise InUse(
            f"{path} is locked by process {holder or '(unknown)'}; stop it first"
        ) from error
    except OSError as error:
        os.close(descriptor)
        raise from_os_error(error, f"lock {path}") from error
    return descriptor


def release(fd: int) -> None:
    """Release the lock and close ``fd``; the file stays."""
    try:
        # A forked child may have the descriptor too, so closing ours is not enough.
        fcntl.flock(fd, fcntl.LOCK_UN)
    except OSError as error:
        raise from_os_error(error, "release the lock") from error
    finally:
        os.close(fd)
