"""The kernel's interface of loop devices: linux/loop.h and loop(4)."""

import contextlib
import errno
import fcntl
import os
import struct
import threading
import time
from typing import Final

import attrs

from volplugin.errors import NoSpace, Unsupported, from_os_error
from volplugin.host import modules, nodes

_CLR_FD: Final = 0x4C01
_GET_STATUS64: Final = 0x4C05
_SET_CAPACITY: Final = 0x4C07
_CONFIGURE: Final = 0x4C0A
_CONFIGURE_SINCE: Final = (5, 8)  # Linux that has it
_CTL_GET_FREE: Final = 0x4C82

READ_ONLY: Final = 1
AUTOCLEAR: Final = 4
DIRECT_IO: Final = 16

# struct loop_info64: device, inode, rdevice, offset, sizelimit; number, encrypt_type,
# encrypt_key_size, flags; file name, crypt name, key; init.
_INFO: Final = struct.Struct("=5Q4I64s64s32s2Q")
# struct loop_config: descriptor, block size (0: the kernel's choice); info; reserved.
_CONFIG: Final = struct.Struct(f"=II{_INFO.size}s64x")
_NAME_MAX: Final = 63  # LO_NAME_SIZE with its NUL

_TRIES: Final = 200
_PAUSE: Final = 0.01  # seconds

# Another process, or thread, was given the same free device, or it has just gone.
RACES: Final = frozenset({errno.EBUSY, errno.ENXIO, errno.ENODEV, errno.ENOENT})

# Threads of ours need not race each other.
_making = threading.Lock()


@attrs.frozen
class Loop:
    """A loop device that stays as long as ``descriptor``, or a mount, is open."""

    device: str
    descriptor: int


def configure(file: str, flags: int) -> Loop:
    """Make ``file`` a loop device with these flags.

    Not idempotent. Raise `Unsupported` for a kernel without loop devices or before 5.8,
    `NoSpace` when none gets free, `NotFound` for a missing file.
    """
    mode = os.O_RDONLY if flags & READ_ONLY else os.O_RDWR
    try:
        # Not the one of the lock, which would then last as long as the device.
        backing = os.open(file, mode | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise from_os_error(error, f"open {file}") from error
    try:
        for _ in range(_TRIES):
            with _making:
                loop = _try_make(file, backing, flags)
            if loop is not None:
                return loop
            time.sleep(_PAUSE)
    except OSError as error:
        raise from_os_error(error, f"make a loop device of {file}") from error
    finally:
        os.close(backing)
    raise NoSpace(f"make a loop device of {file}: none is free; try again")


def _try_make(file: str, backing: int, flags: int) -> Loop | None:
    device = f"/dev/loop{_free_number()}"
    name = os.fsencode(file)[:_NAME_MAX]
    info = _INFO.pack(*[0] * 8, flags, name, b"", b"", 0, 0)
    try:
        writable = open_device(device, os.O_RDWR)
    except OSError as error:
        if error.errno in RACES:
            return None
        raise
    try:
        fcntl.ioctl(writable, _CONFIGURE, _CONFIG.pack(backing, 0, info))
        # A kernel without BLK_DEV_WRITE_MOUNTED mounts nothing that is open to write.
        return Loop(device, open_device(device))
    except OSError as error:
        if error.errno in RACES:
            return None
        if (
            error.errno in {errno.EINVAL, errno.ENOTTY}
            and modules.kernel_version() < _CONFIGURE_SINCE
        ):
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


def open_device(device: str, flags: int = os.O_RDONLY) -> int:
    """Open ``/dev/loopN``, whose node need not be there; `OSError` as it comes."""
    # Without devtmpfs, as in containers, no one makes the nodes of new devices.
    number = nodes.make(device[5:])
    descriptor = os.open(device, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    if os.fstat(descriptor).st_rdev != number:
        os.close(descriptor)
        numbers = f"{os.major(number)}:{os.minor(number)}"
        raise OSError(errno.ENODEV, f"{device} is not the device {numbers}")
    return descriptor


def backed_by(descriptor: int) -> tuple[int, int] | None:
    """Return device and inode number of the file behind; None if there is none."""
    buffer = bytearray(_INFO.size)
    try:
        fcntl.ioctl(descriptor, _GET_STATUS64, buffer)
    except OSError:  # ENXIO: cleared meanwhile
        return None
    device, inode = _INFO.unpack(buffer)[:2]
    return device, inode


def take_capacity(descriptor: int) -> None:
    """Let the device be as long as its file is now; `OSError` as it comes."""
    fcntl.ioctl(descriptor, _SET_CAPACITY)


def clear(descriptor: int) -> None:
    """Take the device from its file once nobody has it open. Idempotent."""
    with contextlib.suppress(OSError):  # ENXIO: it has no file any more
        fcntl.ioctl(descriptor, _CLR_FD)
