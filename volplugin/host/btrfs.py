"""Subvolumes of btrfs: trees with an inode table of their own inside a file system.

By the ioctls of linux/btrfs.h. A subvolume's root has inode number 256 and a device
number of its own, and is no mount. Anyone may make one in a directory of his, so what
is said here of a subvolume may be about a container's as well.
"""

import ctypes
import errno
import os
import struct
import threading
from typing import Final

import attrs

from volplugin.errors import AlreadyExists, Unsupported, from_os_error
from volplugin.host import paths

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)
_libc.fstatfs.argtypes = (ctypes.c_int, ctypes.c_void_p)

READ: Final = 2
WRITE: Final = 1

_MAGIC: Final = 0x9123683E  # BTRFS_SUPER_MAGIC of linux/magic.h
_STATFS_SIZE: Final = 256  # more than struct statfs has anywhere; f_type comes first
_FIRST_INODE: Final = 256  # BTRFS_FIRST_FREE_OBJECTID, the root of every subvolume

# struct btrfs_ioctl_vol_args: a descriptor and a name, NUL at the end.
_NAMED: Final = struct.Struct("q4088s")
# struct btrfs_ioctl_ino_lookup_args: the tree (0: that of the descriptor), an inode.
_LOOKUP: Final = struct.Struct("QQ4080s")
# struct btrfs_ioctl_fs_info_args: two numbers, the UUID, and more.
_FS_INFO: Final = struct.Struct("QQ16s992s")
_NUMBER: Final = struct.Struct("Q")
_READ_ONLY: Final = 2  # BTRFS_SUBVOL_RDONLY

_committing: Final[dict[bytes, threading.Lock]] = {}  # by file system


@attrs.frozen
class Subvolume:
    """A subvolume, whatever its path: the UUID of its file system, and its id."""

    file_system: bytes
    id: int


def ioctl(
    descriptor: int, way: int, number: int, layout: struct.Struct, *values: object
) -> bytes:
    """Call a btrfs ioctl with ``layout`` packed from ``values``; return it as it comes.

    ``way`` is `READ`, `WRITE` or both, as the header encodes it. Raise `OSError` as it
    comes. Other threads run meanwhile: `fcntl.ioctl` would stop them for an argument of
    more than 1024 bytes, and most of these may wait for a transaction.
    """
    buffer = ctypes.create_string_buffer(layout.pack(*values), layout.size)
    call(descriptor, way << 30 | layout.size << 16 | 0x94 << 8 | number, buffer)
    return buffer.raw


def call(descriptor: int, request: int, buffer: "ctypes.Array[ctypes.c_char]") -> None:
    """Do as `ioctl` for an encoded ``request``; ``buffer`` is changed in place."""
    if _libc.ioctl(descriptor, request, buffer) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def is_btrfs(path: str) -> bool:
    """Tell whether the directory ``path`` is on btrfs, by statfs(2). No effect."""
    buffer = ctypes.create_string_buffer(_STATFS_SIZE)
    descriptor = paths.open_directory(path)
    try:
        if _libc.fstatfs(descriptor, buffer) < 0:
            number = ctypes.get_errno()
            error = OSError(number, os.strerror(number))
            raise from_os_error(error, f"look at the file system of {path}") from error
    finally:
        os.close(descriptor)
    kind: int = struct.unpack_from("L", buffer)[0]
    return kind & 0xFFFFFFFF == _MAGIC


def file_system(descriptor: int) -> bytes:
    """Return the UUID of the btrfs that an open file is on.

    Raise `OSError` as it comes: ENOTTY where it is on another kind.
    """
    found = ioctl(descriptor, READ, 31, _FS_INFO, 0, 0, b"", b"")  # BTRFS_IOC_FS_INFO
    uuid: bytes = _FS_INFO.unpack(found)[2]
    return uuid


def is_subvolume(descriptor: int) -> bool:
    """Tell whether an open directory is the root of a subvolume. No effect.

    The top of a btrfs is one as well. Raise `OSError` as it comes.
    """
    if os.fstat(descriptor).st_ino != _FIRST_INODE:
        return False
    try:
        _flags(descriptor)
    except OSError as error:
        if error.errno in {errno.ENOTTY, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}:
            return False  # another file system
        raise
    return True


def subvolume_id(descriptor: int) -> int:
    """Return the id of the subvolume that an open directory lies in.

    It never changes. That of a deleted one may be given again after a remount. Raise
    `OSError` as it comes.
    """
    found = ioctl(
        descriptor, READ | WRITE, 18, _LOOKUP, 0, _FIRST_INODE, b""
    )  # BTRFS_IOC_INO_LOOKUP
    number: int = _LOOKUP.unpack(found)[0]
    return number


def subvolume_at(path: str) -> Subvolume | None:
    """Return the subvolume whose root is the directory ``path``; None if it is none.

    Errors as for `paths.open_directory`.
    """
    descriptor = paths.open_directory(path)
    try:
        if not is_subvolume(descriptor):
            return None
        return Subvolume(file_system(descriptor), subvolume_id(descriptor))
    except OSError as error:
        raise from_os_error(error, f"look at subvolume {path}") from error
    finally:
        os.close(descriptor)


def create_subvolume(path: str, mode: int) -> None:
    """Make the empty subvolume ``path`` with exactly ``mode``; on disk at return.

    Idempotent: a subvolume that exists is left as it is. Raise `AlreadyExists` where
    something else has the name, `NotFound` where the parent is missing, `Unsupported`
    where the parent is not on btrfs.
    """
    doing = f"make subvolume {path}"
    with paths.parent(path) as (directory, name):
        try:
            # BTRFS_IOC_SUBVOL_CREATE
            ioctl(directory, WRITE, 14, _NAMED, 0, _named(name))
        except FileExistsError as error:
            if _is_subvolume_in(directory, name):
                return
            raise AlreadyExists(
                f"{doing}: {path} exists and is no subvolume; move it away"
            ) from error
        except OSError as error:
            raise _refusal(error, doing) from error
        try:
            _give_mode(directory, name, mode)
        except OSError as error:
            raise from_os_error(error, doing) from error


def destroy_at(directory: int, name: str) -> bool:
    """Delete the subvolume ``name`` in an open directory, whatever files it has.

    Return False when other subvolumes lie below it. It is gone from sight at once; a
    kernel thread gives its space back. Symbolic links are not followed. Its qgroup
    stays (`qgroup_removal`); the kernel detaches what is mounted below: look first.
    Raise `OSError` as it comes: EINVAL for what is no subvolume; EPERM for one that is
    immutable or lies in such a directory, is the file system's default, is being sent,
    or has an active swap file.
    """
    try:
        ioctl(directory, WRITE, 15, _NAMED, 0, _named(name))  # BTRFS_IOC_SNAP_DESTROY
    except OSError as error:
        if error.errno == errno.ENOTEMPTY:
            return False
        raise
    return True


def allow_writes(descriptor: int) -> None:
    """Make an open subvolume writable; one that is stays so.

    Raise `OSError` as it comes: EPERM while it is being sent.
    """
    flags = _flags(descriptor)
    if flags & _READ_ONLY:
        # BTRFS_IOC_SUBVOL_SETFLAGS
        ioctl(descriptor, WRITE, 26, _NUMBER, flags & ~_READ_ONLY)


def commit(path: str) -> None:
    """Commit the running transaction of the btrfs at ``path`` and wait for it.

    Metadata is on disk with it: subvolumes, limits, names. Data that has not been
    written yet is not, and is not counted by then; see `sync`.
    """
    descriptor = paths.open_directory(path)
    try:
        commit_at(descriptor)
    except OSError as error:
        raise from_os_error(error, f"commit {path}") from error
    finally:
        os.close(descriptor)


def commit_at(descriptor: int) -> None:
    """Do as `commit` for the btrfs of an open file; raise `OSError` as it comes.

    The kernel's thread that gives the space of deleted subvolumes back is woken by it.
    """
    # One at a time: a commit that is asked for while another ends can miss its wake-up
    # and take the file system's commit interval, 30 s (seen with Linux 6.18).
    with _committing.setdefault(file_system(descriptor), threading.Lock()):
        started = ioctl(descriptor, READ, 24, _NUMBER, 0)  # BTRFS_IOC_START_SYNC
        # BTRFS_IOC_WAIT_SYNC
        ioctl(descriptor, WRITE, 22, _NUMBER, *_NUMBER.unpack(started))


def sync(path: str) -> None:
    """Write all data of the btrfs at ``path``, then do as `commit`.

    Takes as long as all of that takes, other users' data included.
    """
    descriptor = paths.open_directory(path)
    try:
        call(descriptor, 0x94 << 8 | 8, ctypes.create_string_buffer(0))  # _IO(…, 8)
    except OSError as error:
        raise from_os_error(error, f"sync {path}") from error
    finally:
        os.close(descriptor)


def _flags(descriptor: int) -> int:
    # BTRFS_IOC_SUBVOL_GETFLAGS
    flags: int = _NUMBER.unpack(ioctl(descriptor, READ, 25, _NUMBER, 0))[0]
    return flags


def _named(name: str) -> bytes:
    return os.fsencode(name)  # 255 bytes at most, see `paths`; struct adds the NULs


def _is_subvolume_in(directory: int, name: str) -> bool:
    try:
        child = os.open(
            name,
            os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC,
            dir_fd=directory,
        )
    except OSError:
        return False
    try:
        return is_subvolume(child)
    finally:
        os.close(child)


def _give_mode(directory: int, name: str, mode: int) -> None:
    child = os.open(
        name,
        os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC,
        dir_fd=directory,
    )
    try:
        # The kernel makes it as 0777 less the umask, and may add the set-group-ID bit.
        os.fchmod(child, mode)
    finally:
        os.close(child)
    # Syncing the parent would leave out the mode, which is another tree's.
    commit_at(directory)


def _refusal(error: OSError, doing: str) -> Exception:
    if error.errno in {errno.ENOTTY, errno.EOPNOTSUPP, errno.ENOSYS}:
        return Unsupported(f"{doing}: this file system is not btrfs")
    return from_os_error(error, doing)
