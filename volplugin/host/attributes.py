"""What a directory carries beside its content: a record (xattr) and inode flags."""

import errno
import fcntl
import os
import struct
from typing import Final

import xattr

from volplugin.errors import InvalidArgument, NoSpace, from_os_error

RECORD: Final = b"trusted.volplugin"

# ioctl_iflags(2), as encoded on x86, ARM and RISC-V. The number speaks of a long, the
# kernel reads and writes an int.
_LONG: Final = struct.calcsize("l")
_GET_FLAGS: Final = 2 << 30 | _LONG << 16 | ord("f") << 8 | 1
_SET_FLAGS: Final = 1 << 30 | _LONG << 16 | ord("f") << 8 | 2
_FLAGS: Final = struct.Struct("I")
_IMMUTABLE: Final = 0x10
_APPEND: Final = 0x20

# The file system has no flags, or this process may not change them.
_NO_FLAGS: Final = frozenset(
    {errno.ENOTTY, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM}
)


def read_record(path: str) -> bytes | None:
    """Return the record that ``path`` carries, a symbolic link not followed.

    None where it carries none, the file system has no such xattrs, or the path is
    missing.
    """
    try:
        value: bytes = xattr.get(path, RECORD, nofollow=True)
    except OSError as error:
        if error.errno in {
            errno.ENODATA,
            errno.EOPNOTSUPP,
            errno.ENOENT,
            errno.ENOTDIR,
        }:
            return None
        raise from_os_error(error, f"read the record of {path}") from error
    return value


def are_supported(path: str) -> bool:
    """Tell whether the file system that ``path`` is on has such xattrs. No effect."""
    try:
        xattr.get(path, RECORD, nofollow=True)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            return False
        if error.errno != errno.ENODATA:
            raise from_os_error(error, f"read the record of {path}") from error
    return True


def write_record(path: str, data: bytes) -> bool:
    """Give ``path`` the record ``data``, in place of one that is there.

    Return False when the file system has no such xattrs. It is on disk with the next
    sync of a directory entry that was made after it (`paths.move`), or within the file
    system's own interval. Raise `InvalidArgument` for a record that is too long.
    """
    try:
        xattr.set(path, RECORD, data, nofollow=True)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            return False
        size = f"{len(data)} bytes"
        if error.errno == errno.E2BIG:
            raise InvalidArgument(
                f"write the record of {path}: {size} are too long for the file"
                " system's attributes; use fewer or shorter options"
            ) from error
        # ext4 says ENOSPC for a full disk and for a full attribute block alike.
        if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.ERANGE}:
            raise NoSpace(
                f"write the record of {path}: the disk is full, or {size} do not fit"
                " into the file system's attributes"
            ) from error
        raise from_os_error(error, f"write the record of {path}") from error
    return True


def clear_record(path: str) -> None:
    """Take the record off ``path``; none to take, or no such path, is success."""
    try:
        xattr.remove(path, RECORD, nofollow=True)
    except OSError as error:
        if error.errno not in {
            errno.ENODATA,
            errno.EOPNOTSUPP,
            errno.ENOENT,
            errno.ENOTDIR,
        }:
            raise from_os_error(error, f"clear the record of {path}") from error


def set_immutable(path: str, on: bool) -> bool:
    """Set or clear the immutable flag of ``path``, a directory or a plain file.

    Idempotent. Return False where the file system has no flags or the capability
    (CAP_LINUX_IMMUTABLE) is missing.
    """
    doing = f"change the flags of {path}"
    try:
        descriptor = os.open(
            path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
        )
    except OSError as error:
        raise from_os_error(error, doing) from error
    try:
        return set_immutable_at(descriptor, on)
    except OSError as error:
        raise from_os_error(error, doing) from error
    finally:
        os.close(descriptor)


def set_immutable_at(descriptor: int, on: bool) -> bool:
    """Do as `set_immutable` on an open file; raise `OSError` as it comes."""
    if on:
        return _change_flags(descriptor, add=_IMMUTABLE, remove=0)
    return _change_flags(descriptor, add=0, remove=_IMMUTABLE)


def allow_changes(descriptor: int) -> bool:
    """Clear the immutable and the append-only flag of an open file.

    Return and errors as for `set_immutable_at`.
    """
    return _change_flags(descriptor, add=0, remove=_IMMUTABLE | _APPEND)


def _change_flags(descriptor: int, *, add: int, remove: int) -> bool:
    buffer = bytearray(_LONG)
    try:
        fcntl.ioctl(descriptor, _GET_FLAGS, buffer)
        flags = _FLAGS.unpack_from(buffer)[0]
        wanted = (flags | add) & ~remove
        if wanted != flags:
            _FLAGS.pack_into(buffer, 0, wanted)
            fcntl.ioctl(descriptor, _SET_FLAGS, buffer)
    except OSError as error:
        if error.errno in _NO_FLAGS:
            return False
        raise
    return True
