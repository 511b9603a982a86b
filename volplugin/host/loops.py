"""Loop devices: files as block devices.

A device of `attach` clears itself with its last user (``LO_FLAGS_AUTOCLEAR``): ours
until the descriptor is closed, then the mount. So the death of this process at any
moment leaves none behind. One of `make` stays until `clear`, and is to be found again
by the path of its file, which is in sysfs: nothing has to be asked of a file system
that may be dead.
"""

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from typing import Final

from volplugin.errors import InUse, Unavailable, from_os_error
from volplugin.host import loopctl
from volplugin.host.loopctl import Loop

_PAUSE: Final = 0.01  # seconds
_LOCK_WAIT: Final = 10.0  # seconds
_CLEAR_WAIT: Final = 5.0  # seconds for a program that looks at the device to leave it


@contextlib.contextmanager
def attach(file: str) -> Iterator[Loop]:
    """Make ``file`` a loop device for the time of the context, and of its mounts.

    A device that backs the very file already is taken instead of a second one. Direct
    I/O is used where the file's own file system has it; `uses_direct_io` tells.

    Raise `Unsupported` for a kernel without loop devices or before 5.8, `Unavailable`
    while a program works on the file, `NotFound` for a missing file.
    """
    with locked(file):
        loop = _existing(file) or loopctl.configure(
            file, loopctl.AUTOCLEAR | loopctl.DIRECT_IO
        )
    try:
        yield loop
    finally:
        os.close(loop.descriptor)


def devices_of(file: str) -> list[str]:
    """Return the devices that ``file`` backs, by device and inode number of the file.

    Its path alone could be that of another file in another mount namespace. A missing
    file backs none.
    """
    found = []
    for descriptor, device in _candidates(file):
        os.close(descriptor)
        found.append(device)
    return found


def backing_file(device: str) -> str | None:
    """Return the path of the file behind ``device``, given as ``major:minor``.

    None for what is no loop device. The kernel appends " (deleted)" to the path of a
    file that is.
    """
    try:
        place = f"/sys/dev/block/{device}/loop/backing_file"
        with open(place, "rb") as file:
            return os.fsdecode(file.read().removesuffix(b"\n"))
    except OSError:  # no device, no loop device, or cleared meanwhile
        return None


def uses_direct_io(device: str) -> bool:
    """Tell whether ``device``, given as ``major:minor``, bypasses the page cache."""
    try:
        with open(f"/sys/dev/block/{device}/loop/dio", encoding="ascii") as file:
            return file.read().strip() == "1"
    except OSError:
        return False


def set_capacity(device: str) -> None:
    """Make ``device`` (``/dev/loopN``) as large as its file is now. Idempotent."""
    doing = f"change the size of {device}"
    try:
        descriptor = loopctl.open_device(device)
        try:
            loopctl.take_capacity(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise from_os_error(error, doing) from error


def make(file: str, *, read_only: bool = False) -> str:
    """Make ``file`` a loop device that stays, with direct I/O; return ``/dev/loopN``.

    Not idempotent. Errors as for `attach`.
    """
    loop = loopctl.configure(
        file, loopctl.DIRECT_IO | (loopctl.READ_ONLY if read_only else 0)
    )
    os.close(loop.descriptor)
    return loop.device


def backing_files() -> dict[str, str]:
    """Return the file of each loop device ``/dev/loopN`` that has one, from sysfs.

    The path of a file whose file system was detached is cut short.
    """
    found = {}
    for name in os.listdir("/sys/block"):
        if name.startswith("loop"):
            with contextlib.suppress(OSError):  # it has none, or none any more
                with open(f"/sys/block/{name}/loop/backing_file", "rb") as file:
                    path = os.fsdecode(file.read().removesuffix(b"\n"))
                found[f"/dev/{name}"] = path
    return found


def sequence(device: str) -> str | None:
    """Return a number that ``device`` gets anew with each file, unique in this boot.

    None for a device that is gone, and before Linux 5.15.
    """
    try:
        with open(f"/sys/block/{device[5:]}/diskseq", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return None


def clear(device: str, number: str | None) -> bool:
    """Flush ``device`` and take it from its file, if its `sequence` is ``number``.

    Idempotent. Tell whether it could be flushed; it goes either way. Raise `InUse`
    while it is mounted, or open, anywhere on the host.
    """
    doing = f"clear {device}"
    try:
        descriptor = loopctl.open_device(device, os.O_RDONLY | os.O_EXCL)
    except OSError as error:
        if error.errno in loopctl.RACES - {errno.EBUSY}:
            return True
        if error.errno == errno.EBUSY:
            raise InUse(
                f"{doing}: it is mounted, or a program has it open; `findmnt {device}`"
                f" and `fuser -v {device}` show where"
            ) from error
        raise from_os_error(error, doing) from error
    try:
        if sequence(device) != number:  # another file's by now
            return True
        flushed = _flush(descriptor)
        loopctl.clear(descriptor)
    finally:
        os.close(descriptor)
    end = time.monotonic() + _CLEAR_WAIT
    while device in backing_files() and sequence(device) == number:
        if time.monotonic() > end:
            raise InUse(f"{doing}: a program has it open: `fuser -v {device}` shows it")
        time.sleep(_PAUSE)
    return flushed


@contextlib.contextmanager
def locked(file: str) -> Iterator[int]:
    """Keep others off ``file``; yield the descriptor that does so by flock(2).

    A program that inherits it goes on keeping them off when this process dies. Raise
    `Unavailable` when such a program does not end within some seconds.
    """
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise from_os_error(error, f"open {file}") from error
    try:
        end = time.monotonic() + _LOCK_WAIT
        while not _try_lock(descriptor):
            if time.monotonic() > end:
                raise Unavailable(
                    f"a program works on {file}; `fuser -v {file}` shows it:"
                    " wait for its end"
                )
            time.sleep(_PAUSE)
        yield descriptor
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _existing(file: str) -> Loop | None:
    loop = None
    for descriptor, device in _candidates(file):
        if loop is None:
            loop = Loop(device, descriptor)
        else:
            os.close(descriptor)
    return loop


def _candidates(file: str) -> Iterator[tuple[int, str]]:
    try:
        found = os.stat(file, follow_symlinks=False)
        known = backing_files()
    except FileNotFoundError:
        return
    except OSError as error:
        raise from_os_error(error, f"look for loop devices of {file}") from error
    for device in sorted(known):
        # By path it could be another's, so it is asked. That waits for the file system
        # of its file, which may hang, and so only where the file can have that name.
        name = os.path.basename(known[device])
        if found.st_nlink == 1 and name != os.path.basename(file):
            continue
        try:
            descriptor = loopctl.open_device(device)
        except OSError:  # it has just gone
            continue
        if loopctl.backed_by(descriptor) == (found.st_dev, found.st_ino):
            yield descriptor, device
        else:
            os.close(descriptor)


def _flush(descriptor: int) -> bool:
    try:
        os.fsync(descriptor)
    except OSError:
        return False
    return True
