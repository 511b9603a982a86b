"""Project ids of directories and files, which project quotas count by.

XFS and ext4 note such an id with each inode; with the *inherit* flag on a directory,
what is made in it gets the directory's id (xfsctl(3), chattr(1) ``+P``).
"""

import errno
import fcntl
import os
import struct
from typing import Final

import attrs

from volplugin.errors import InvalidArgument, NoSpace, Unsupported, from_os_error

# struct fsxattr of linux/fs.h: xflags, extsize, nextents, projid, cowextsize, padding.
_FSXATTR: Final = struct.Struct("5I8s")
# _IOR('X', 31, …) and _IOW('X', 32, …), as encoded on x86, ARM and RISC-V.
_GET: Final = 2 << 30 | _FSXATTR.size << 16 | ord("X") << 8 | 31
_SET: Final = 1 << 30 | _FSXATTR.size << 16 | ord("X") << 8 | 32
_INHERIT: Final = 0x200  # FS_XFLAG_PROJINHERIT

_OPEN: Final = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
_NAMES: Final = "/etc/projid"


@attrs.frozen
class Project:
    """The project of an inode; the id is 0 where it is in none."""

    id: int
    inherits: bool = False


def of(path: str) -> Project:
    """Return the project of ``path``, a directory or a regular file, not followed.

    Raise `Unsupported` where the file system has no such attributes.
    """
    doing = f"read the project of {path}"
    descriptor = _open(path, doing)
    try:
        return of_open(descriptor)
    except OSError as error:
        raise _refusal(error, doing) from error
    finally:
        os.close(descriptor)


def of_open(descriptor: int) -> Project:
    """Do as `of` for an open file; raise `OSError` as it comes."""
    flags, _, _, number, *_ = _FSXATTR.unpack(_read(descriptor))
    return Project(number, bool(flags & _INHERIT))


def put(path: str, project: Project) -> bool:
    """Put ``path``, a directory or a regular file, not followed, into ``project``.

    Idempotent; its other flags stay. Return whether anything changed. Raise
    `Unsupported` where the file system, its features or the rights of this process
    forbid it, `NoSpace` when the project is full.
    """
    doing = f"put {path} into project {project.id}"
    descriptor = _open(path, doing)
    try:
        return put_open(descriptor, project)
    except OSError as error:
        raise _refusal(error, doing) from error
    finally:
        os.close(descriptor)


def put_open(descriptor: int, project: Project) -> bool:
    """Do as `put` for an open file; raise `OSError` as it comes.

    EPERM is an immutable file as well as a missing right. No regular file inherits:
    leave that to directories.
    """
    if of_open(descriptor) == project:
        return False
    _write(descriptor, project)
    return True


def sync(path: str, project: Project) -> None:
    """Put the directory ``path`` into ``project``, on disk at return.

    All that was changed before in the file system's journal, such as a quota, is on
    disk with it: the inode is written even if it is in the project already, so that
    fsync(2) has something to commit.
    """
    doing = f"put {path} into project {project.id}"
    descriptor = _open(path, doing)
    try:
        _write(descriptor, project)
        os.fsync(descriptor)
    except OSError as error:
        raise _refusal(error, doing) from error
    finally:
        os.close(descriptor)


def name_of(number: int) -> str | None:
    """Return the name that projid(5) has for a project id; None without one."""
    try:
        with open(_NAMES, encoding="utf-8", errors="replace") as table:
            for line in table:
                name, _, found = line.strip().partition(":")
                if found == str(number) and not name.startswith("#"):
                    return name
    except OSError:
        return None
    return None


def _open(path: str, doing: str) -> int:
    try:
        return os.open(path, _OPEN)
    except OSError as error:
        if error.errno in {errno.ELOOP, errno.ENXIO}:
            raise InvalidArgument(
                f"{doing}: it is neither a directory nor a regular file"
            ) from error
        raise from_os_error(error, doing) from error


def _read(descriptor: int) -> bytearray:
    buffer = bytearray(_FSXATTR.size)
    fcntl.ioctl(descriptor, _GET, buffer)
    return buffer


def _write(descriptor: int, project: Project) -> None:
    flags, extent, extents, _, copied, padding = _FSXATTR.unpack(_read(descriptor))
    flags = flags | _INHERIT if project.inherits else flags & ~_INHERIT
    wanted = _FSXATTR.pack(flags, extent, extents, project.id, copied, padding)
    fcntl.ioctl(descriptor, _SET, wanted)


def _refusal(error: OSError, doing: str) -> Exception:
    if error.errno in {errno.ENOTTY, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}:
        return Unsupported(f"{doing}: this file system has no project ids")
    if error.errno == errno.EPERM:
        return Unsupported(
            f"{doing}: {error.strerror}: it is immutable, or volplugin lacks the "
            "rights of root outside a user namespace"
        )
    if error.errno in {errno.EDQUOT, errno.ENOSPC}:
        return NoSpace(f"{doing}: {error.strerror}: the project's limit is reached")
    return from_os_error(error, doing)
