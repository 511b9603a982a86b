"""Project quotas of a file system: limits and usage, by quotactl(2).

The ``Q_X`` commands of linux/dqblk_xfs.h serve XFS and ext4 alike. A file system is
named by any directory on it.
"""

import contextlib
import ctypes
import errno
import os
import stat
import struct
import tempfile
from collections.abc import Generator, Iterator
from typing import Final

import attrs

from volplugin.errors import Unsupported, VolpluginError, from_os_error
from volplugin.host import mountinfo

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.quotactl.argtypes = (
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_int,
    ctypes.c_void_p,
)

_QUOTACTL_FD: Final = 443  # quotactl_fd(2), since Linux 5.14, on every architecture

# QCMD(Q_X…, PRJQUOTA) of linux/quota.h and linux/dqblk_xfs.h.
_GET: Final = (ord("X") << 8 | 3) << 8 | 2
_SET: Final = (ord("X") << 8 | 4) << 8 | 2
_STATE: Final = (ord("X") << 8 | 8) << 8 | 2
_GET_NEXT: Final = (ord("X") << 8 | 9) << 8 | 2

# struct fs_disk_quota: version, flags, fieldmask, id, four limits (blocks hard and
# soft, inodes hard and soft), blocks and inodes used, and what is of no use here.
_QUOTA: Final = struct.Struct("=bbHI6Q56x")
_UNIT: Final = 512  # bytes of its blocks, whatever the file system's
_VERSION: Final = 1  # FS_DQUOT_VERSION
_PROJECT: Final = 2  # FS_PROJ_QUOTA
_LIMITS: Final = 0b1111  # FS_DQ_ISOFT, IHARD, BSOFT and BHARD

# struct fs_quota_statv: version, padding, flags, and what is of no use here.
_STATV: Final = struct.Struct("=bBH156x")
_ACCOUNTING: Final = 1 << 4  # FS_QUOTA_PDQ_ACCT
_ENFORCED: Final = 1 << 5  # FS_QUOTA_PDQ_ENFD

# The file system knows no quotas, no project quotas, or they are not switched on.
_OFF: Final = frozenset(
    {errno.ESRCH, errno.ENOSYS, errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL}
)

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@attrs.frozen(kw_only=True)
class Switches:
    """What a file system does about projects: count them, and stop them."""

    accounting: bool = False
    enforced: bool = False


@attrs.frozen(kw_only=True)
class Quota:
    """What a project holds, and may hold, in bytes and inodes; None is no limit."""

    id: int
    size: int | None = None
    inodes: int | None = None
    used: int = 0
    inodes_used: int = 0

    @property
    def is_empty(self) -> bool:
        """Tell whether there is neither a limit nor anything that counts for it."""
        limited = self.size is not None or self.inodes is not None
        return not (limited or self.used or self.inodes_used)


def state(directory: str) -> Switches:
    """Return whether project quotas are on; both false where there are none.

    Needs no rights. What was set by the mount or by quotaon(8) alike.
    """
    buffer = bytearray(_STATV.size)
    buffer[0] = 1  # FS_QSTATV_VERSION1
    with _opened(directory, f"look at the quotas of {directory}") as descriptor:
        try:
            _call(descriptor, _STATE, 0, buffer)
        except Unsupported:  # no block device, so no such quotas
            return Switches()
        except OSError as error:
            if error.errno in _OFF:
                return Switches()
            raise
    flags = _STATV.unpack(buffer)[2]
    return Switches(
        accounting=bool(flags & _ACCOUNTING), enforced=bool(flags & _ENFORCED)
    )


def get(directory: str, number: int) -> Quota:
    """Return the quota of project ``number``; that of one nobody ever used is empty.

    What is written but not yet on the disk counts. Raise `Unsupported` where project
    quotas are off or CAP_SYS_ADMIN is missing.
    """
    buffer = bytearray(_QUOTA.size)
    with _opened(directory, f"read the quota of project {number}") as descriptor:
        try:
            _call(descriptor, _GET, number, buffer)
        except FileNotFoundError:  # XFS has no record of it
            return Quota(id=number)
    return _quota(buffer)


def set_limit(
    directory: str, number: int, *, size: int | None, inodes: int | None
) -> None:
    """Limit project ``number`` to ``size`` bytes and ``inodes``; None is no limit.

    Idempotent; in force at return, on disk with the next commit of the file system's
    journal. Soft limits are set to the same, so there is no time of grace. The kernel
    rounds bytes up: ext4 to 1024, XFS to its block. Usage is not looked at. Errors as
    for `get`.
    """
    blocks = -(-(size or 0) // _UNIT)
    limits = (blocks, blocks, inodes or 0, inodes or 0)
    buffer = bytearray(_QUOTA.pack(_VERSION, _PROJECT, _LIMITS, number, *limits, 0, 0))
    with _opened(directory, f"limit project {number}") as descriptor:
        _call(descriptor, _SET, number, buffer)


def each(directory: str, first: int) -> Generator[Quota, None, None]:
    """Yield the quotas of the projects from ``first`` on, by rising id.

    One system call each, for those alone that the file system has a record of; the
    record may be empty. Errors as for `get`.
    """
    with _opened(directory, "read the quotas of projects") as descriptor:
        while first < 2**32:
            buffer = bytearray(_QUOTA.size)
            try:
                _call(descriptor, _GET_NEXT, first, buffer)
            except FileNotFoundError:
                return
            quota = _quota(buffer)
            yield quota
            first = quota.id + 1


def _quota(buffer: bytearray) -> Quota:
    _, _, _, number, size, _, inodes, _, used, inodes_used = _QUOTA.unpack(buffer)
    return Quota(
        id=number,
        size=size * _UNIT or None,
        inodes=inodes or None,
        used=used * _UNIT,
        inodes_used=inodes_used,
    )


@contextlib.contextmanager
def _opened(directory: str, doing: str) -> Iterator[int]:
    doing = f"{doing} on the file system of {directory}"
    try:
        descriptor = os.open(directory, _DIRECTORY)
    except OSError as error:
        raise from_os_error(error, doing) from error
    try:
        yield descriptor
    except OSError as error:
        raise _refusal(error, doing) from error
    finally:
        os.close(descriptor)


def _refusal(error: OSError, doing: str) -> VolpluginError:
    if error.errno in _OFF:
        return Unsupported(f"{doing}: project quotas are not on ({error.strerror})")
    if error.errno in {errno.EPERM, errno.EACCES}:
        return Unsupported(f"{doing}: {error.strerror}: it needs CAP_SYS_ADMIN")
    return from_os_error(error, doing)


def _call(descriptor: int, command: int, number: int, buffer: bytearray) -> None:
    try:
        _by_descriptor(descriptor, command, number, buffer)
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
        # No such system call, or no quotas: the older call tells which.
        _by_device(descriptor, command, number, buffer)


def _by_descriptor(
    descriptor: int, command: int, number: int, buffer: bytearray
) -> None:
    result = _libc.syscall(
        ctypes.c_long(_QUOTACTL_FD),
        ctypes.c_uint(descriptor),
        ctypes.c_uint(command),
        ctypes.c_uint(number),
        (ctypes.c_char * len(buffer)).from_buffer(buffer),
    )
    _require_done(result)


def _by_device(descriptor: int, command: int, number: int, buffer: bytearray) -> None:
    with _device_of(descriptor) as device:
        result = _libc.quotactl(
            ctypes.c_int(command),
            os.fsencode(device),
            # The kernel takes the int for the unsigned id that it is.
            ctypes.c_int(number),
            (ctypes.c_char * len(buffer)).from_buffer(buffer),
        )
        _require_done(result)


def _require_done(result: int) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


@contextlib.contextmanager
def _device_of(descriptor: int) -> Iterator[str]:
    """Yield a path of the block device that an open directory is on.

    Looked for each time: a number may be another disk's by now.
    """
    device = os.fstat(descriptor).st_dev
    if os.major(device) == 0:
        raise Unsupported("project quotas need a file system on a block device")
    name = f"{os.major(device)}:{os.minor(device)}"
    sources = [mount.source for mount in mountinfo.read() if mount.device == name]
    for path in (f"/dev/block/{name}", *sources):
        if _is_device(path, device):
            yield path
            return
    # In a container there may be no node of the disk at all.
    with tempfile.TemporaryDirectory(prefix="volplugin-", dir="/dev") as folder:
        node = os.path.join(folder, "device")
        os.mknod(node, 0o600 | stat.S_IFBLK, device)
        yield node


def _is_device(path: str, device: int) -> bool:
    try:
        found = os.stat(path)
    except OSError:
        return False
    return stat.S_ISBLK(found.st_mode) and found.st_rdev == device
