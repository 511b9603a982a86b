"""Loop devices: files as block devices, after linux/loop.h and loop(4).

A device that we make clears itself with its last user (``LO_FLAGS_AUTOCLEAR``): ours
until the descriptor is closed, then the mount. So the death of this process at any
moment leaves none behind.
"""

import contextlib
import errno
import fcntl
import os
import stat
import struct
import threading
import time
from collections.abc import Iterator
from typing import Final

import attrs

from volplugin.errors import NoSpace, Unavailable, Unsupported, from_os_error

_GET_STATUS64: Final = 0x4C05
_SET_CAPACITY: Final = 0x4C07
_CONFIGURE: Final = 0x4C0A  # since Linux 5.8
_CTL_GET_FREE: Final = 0x4C82

_AUTOCLEAR: Final = 4
_DIRECT_IO: Final = 16

# struct loop_info64: device, inode, rdevice, offset, sizelimit; number, encrypt_type,
# encrypt_key_size, flags; file name, crypt name, key; init.
_INFO: Final = struct.Struct("=5Q4I64s64s32s2Q")
# struct loop_config: descriptor, block size (0: the kernel's choice); info; reserved.
_CONFIG: Final = struct.Struct(f"=II{_INFO.size}s64x")
_NAME_MAX: Final = 63  # LO_NAME_SIZE with its NUL

_TRIES: Final = 200
_PAUSE: Final = 0.01  # seconds
_LOCK_WAIT: Final = 10.0  # seconds

# Another process, or thread, was given the same free device, or it has just gone.
_RACES: Final = frozenset({errno.EBUSY, errno.ENXIO, errno.ENODEV, errno.ENOENT})

# Threads of ours need not race each other.
_making = threading.Lock()


@attrs.frozen
class Loop:
    """A loop device that stays as long as ``descriptor``, or a mount, is open."""

    device: str
    descriptor: int


@contextlib.contextmanager
def attach(file: str) -> Iterator[Loop]:
    """Make ``file`` a loop device for the time of the context, and of its mounts.

    A device that backs the very file already is taken instead of a second one. Direct
    I/O is used where the file's own file system has it; `uses_direct_io` tells.

    Raise `Unsupported` for a kernel without loop devices or before 5.8, `Unavailable`
    while a program works on the file, `NotFound` for a missing file.
    """
    with locked(file):
        loop = _existing(file) or _make(file)
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
        descriptor = _open(device)
        try:
            fcntl.ioctl(descriptor, _SET_CAPACITY)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise from_os_error(error, doing) from error


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
        names = [name for name in os.listdir("/sys/block") if name.startswith("loop")]
    except FileNotFoundError:
        return
    except OSError as error:
        raise from_os_error(error, f"look for loop devices of {file}") from error
    for name in sorted(names):
        # Those without a file are left alone: an open device can't be removed.
        if not os.path.exists(f"/sys/block/{name}/loop/backing_file"):
            continue
        device = f"/dev/{name}"
        try:
            descriptor = _open(device)
        except OSError:  # it has just gone
            continue
        if _backed_by(descriptor) == (found.st_dev, found.st_ino):
            yield descriptor, device
        else:
            os.close(descriptor)


def _backed_by(descriptor: int) -> tuple[int, int] | None:
    buffer = bytearray(_INFO.size)
    try:
        fcntl.ioctl(descriptor, _GET_STATUS64, buffer)
    except OSError:  # ENXIO: cleared meanwhile
        return None
    device, inode = _INFO.unpack(buffer)[:2]
    return device, inode


def _make(file: str) -> Loop:
    try:
        # Not the one of the lock, which would then last as long as the device.
        backing = os.open(file, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise from_os_error(error, f"open {file}") from error
    try:
        for _ in range(_TRIES):
            with _making:
                loop = _try_make(file, backing)
            if loop is not None:
                return loop
            time.sleep(_PAUSE)
    except OSError as error:
        raise from_os_error(error, f"make a loop device of {file}") from error
    finally:
        os.close(backing)
    raise NoSpace(f"make a loop device of {file}: none is free; try again")


def _try_make(file: str, backing: int) -> Loop | None:
    device = f"/dev/loop{_free_number()}"
    name = os.fsencode(file)[:_NAME_MAX]
    flags = _AUTOCLEAR | _DIRECT_IO
    info = _INFO.pack(*[0] * 8, flags, name, b"", b"", 0, 0)
    try:
        writable = _open(device, os.O_RDWR)
    except OSError as error:
        if error.errno in _RACES:
            return None
        raise
    try:
        fcntl.ioctl(writable, _CONFIGURE, _CONFIG.pack(backing, 0, info))
        # A kernel without BLK_DEV_WRITE_MOUNTED mounts nothing that is open to write.
        return Loop(device, _open(device))
    except OSError as error:
        if error.errno in _RACES:
            return None
        if error.errno in {errno.EINVAL, errno.ENOTTY} and _is_before_5_8():
            raise Unsupported(
                f"make a loop device of {file}: the kernel {os.uname().release} is too"
                " old, it takes 5.8"
            ) from error
        raise
    finally:
        os.close(writable)


def _free_number() -> int:
    try:
        control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise Unsupported(
            "there is no /dev/loop-control: load the kernel's module (`modprobe loop`)"
        ) from error
    try:
        return fcntl.ioctl(control, _CTL_GET_FREE)
    finally:
        os.close(control)


def _open(device: str, flags: int = os.O_RDONLY) -> int:
    # Without devtmpfs, as in containers, no one makes the nodes of new devices.
    with open(f"/sys/block/{device[5:]}/dev", encoding="ascii") as file:
        major, minor = (int(number) for number in file.read().split(":"))
    if not os.path.exists(device):
        with contextlib.suppress(FileExistsError):
            os.mknod(device, stat.S_IFBLK | 0o600, os.makedev(major, minor))
    descriptor = os.open(device, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    if os.fstat(descriptor).st_rdev != os.makedev(major, minor):
        os.close(descriptor)
        raise OSError(errno.ENODEV, f"{device} is not the device {major}:{minor}")
    return descriptor


def _is_before_5_8() -> bool:
    numbers = os.uname().release.split(".")
    return (int(numbers[0]), int(numbers[1].partition("-")[0])) < (5, 8)
