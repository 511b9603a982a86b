"""What superblocks of ext4 and XFS say: whether all is clean, and how large it is."""

import fcntl
import os
import struct
from typing import Final

from volplugin.errors import Unavailable, from_os_error
from volplugin.host import paths

# The ext4 superblock, see filesystems/ext4/super.rst of the kernel's documentation.
_SUPER_AT: Final = 1024
_EXT4_MAGIC: Final = 0xEF53
_EXT4_VALID, _EXT4_ERRORS = 1, 2
_EXT4_RECOVER, _EXT4_64BIT = 4, 0x80

_XFS_MAGIC: Final = b"XFSB"
# xfs/xfs_fs.h, as encoded on x86, ARM and RISC-V: block size, and after seven more
# numbers of 32 bits the number of data blocks.
_XFS_GEOMETRY: Final = 2 << 30 | 112 << 16 | ord("X") << 8 | 100


TELLING: Final = 4096
"""The bytes at the begin of a file system that `kind_of` is told by."""


def kind_of(begin: bytes) -> str | None:
    """Return ``ext4`` or ``xfs`` by the first `TELLING` bytes; None for neither."""
    if begin[:4] == _XFS_MAGIC:
        return "xfs"
    magic: int = struct.unpack_from("<H", begin, _SUPER_AT + 0x38)[0]
    return "ext4" if magic == _EXT4_MAGIC else None


def is_clean(image: str, kind: str) -> bool:
    """Tell whether the unmounted file system needs no check before it is mounted.

    By the superblock. XFS always is: its log is replayed by mount.
    """
    if kind != "ext4":
        return True
    block = _read(image, _SUPER_AT, 1024)
    magic, state = struct.unpack_from("<HH", block, 0x38)
    incompatible = struct.unpack_from("<I", block, 0x60)[0]
    return (
        magic == _EXT4_MAGIC
        and state & (_EXT4_VALID | _EXT4_ERRORS) == _EXT4_VALID
        and not incompatible & _EXT4_RECOVER
    )


def size(image: str, kind: str) -> int:
    """Return the bytes that the file system in the file or device ``image`` spans.

    By the superblock. That of a mounted ext4 is right when it is read from the device;
    that of a mounted XFS, or of any that is not clean, may be behind.
    Raise `Unavailable` for what has none.
    """
    if kind == "ext4":
        block = _read(image, _SUPER_AT, 1024)
        low: int = struct.unpack_from("<I", block, 0x4)[0]
        high: int = struct.unpack_from("<I", block, 0x150)[0]
        log_size: int = struct.unpack_from("<I", block, 0x18)[0]
        if not struct.unpack_from("<I", block, 0x60)[0] & _EXT4_64BIT:
            high = 0
        if struct.unpack_from("<H", block, 0x38)[0] == _EXT4_MAGIC and log_size <= 6:
            return (low | high << 32) << (10 + log_size)
    else:
        # struct xfs_dsb: magic, block size, number of data blocks.
        magic, block_size, count = struct.unpack(">4sIQ", _read(image, 0, 16))
        if magic == _XFS_MAGIC:
            return int(block_size * count)
    raise Unavailable(f"there is no {kind} in {image}: restore it from a backup")


def size_mounted(device: str, mountpoint: str, kind: str) -> int:
    """Return the bytes that the file system mounted from ``/dev/loopN`` spans now."""
    if kind == "ext4":
        return size(device, kind)
    buffer = bytearray(112)
    descriptor = paths.open_directory(mountpoint)
    try:
        fcntl.ioctl(descriptor, _XFS_GEOMETRY, buffer)
    except OSError as error:
        raise from_os_error(error, f"ask for the size of {mountpoint}") from error
    finally:
        os.close(descriptor)
    of_block: int = struct.unpack_from("I", buffer)[0]
    blocks: int = struct.unpack_from("Q", buffer, 32)[0]
    return of_block * blocks


def block_size(image: str) -> int:
    """Return the bytes of a block of the ext4 in ``image``."""
    log_size: int = struct.unpack("<I", _read(image, _SUPER_AT + 0x18, 4))[0]
    return 1024 << log_size


def _read(path: str, offset: int, length: int) -> bytes:
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            data = file.read(length)
    except OSError as error:
        raise from_os_error(error, f"read the file system in {path}") from error
    return data.ljust(length, b"\0")
