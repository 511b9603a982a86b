"""Quotas of btrfs: what its subvolumes refer to, and how much they may.

Terms: a *qgroup* counts what is referred to; each subvolume has one, ``0/ID`` with its
own id, from when it is made or quotas are switched on. *Referenced* bytes are data,
compressed if it is, and metadata that the subvolume reaches, shared with snapshots or
not; so they take no more of the disk than that. All is by the ioctls of linux/btrfs.h
and needs CAP_SYS_ADMIN.

What is read is as the last commit left it: usage lags by what was written since, up to
30 seconds (mount option ``commit``), and `btrfs.sync` brings it up to date. Limits are
read as they were last set.
"""

import contextlib
import ctypes
import errno
import os
import struct
from collections.abc import Iterator, Mapping
from typing import Final

import attrs

from volplugin.errors import (
    NoSpace,
    NotFound,
    Unsupported,
    VolpluginError,
    from_os_error,
)
from volplugin.host import btrfs, mountinfo, paths

# btrfs_tree.h: the tree of quotas, and the types of its items.
_QUOTA_TREE: Final = 8
_STATUS: Final = 240
_INFO: Final = 242
_LIMIT: Final = 244

# struct btrfs_ioctl_search_key, then the size of the buffer that follows.
_KEY: Final = struct.Struct("7Q4I4Q")
_SEARCH: Final = struct.Struct(f"{_KEY.size}sQ")
_SEARCH_V2: Final = 3 << 30 | _SEARCH.size << 16 | 0x94 << 8 | 17
_HEADER: Final = struct.Struct("3Q2I")  # struct btrfs_ioctl_search_header
_BUFFER: Final = 64 << 10
_ALL: Final = 2**64 - 1
_MOST: Final = 2**32 - 1

# Items are little endian on disk: struct btrfs_qgroup_{status,info,limit}_item.
_STATUS_ITEM: Final = struct.Struct("<4Q")
_INFO_ITEM: Final = struct.Struct("<5Q")
_LIMIT_ITEM: Final = struct.Struct("<5Q")
_ON: Final = 1
_RESCAN: Final = 2
_INCONSISTENT: Final = 4

_MAX_RFER: Final = 1  # BTRFS_QGROUP_LIMIT_MAX_RFER
_MAX_EXCL: Final = 2
_LIMIT_ARGS: Final = struct.Struct("6Q")  # struct btrfs_ioctl_qgroup_limit_args

# No such qgroup, or quotas are off (EINVAL on older kernels).
NONE: Final = frozenset({errno.ENOENT, errno.ENOTCONN, errno.EINVAL})


@attrs.frozen
class Qgroup:
    """What a qgroup counts, and its limits, in bytes; None is no limit.

    ``exclusive`` is what no other subvolume refers to.
    """

    referenced: int
    exclusive: int
    size: int | None = None
    exclusive_size: int | None = None


@attrs.frozen(kw_only=True)
class Quotas:
    """The quotas of a file system, by qgroup id.

    Counts can't be trusted, and limits don't hold, while ``is_inconsistent`` or
    ``is_rescanning``. Nothing else is told where quotas are not on.
    """

    is_on: bool
    is_inconsistent: bool = False
    is_rescanning: bool = False
    qgroups: Mapping[int, Qgroup] = attrs.field(factory=dict)


def state(path: str) -> Quotas:
    """Return whether quotas are on where ``path`` is, without any qgroup. No effect.

    Raise `Unsupported` where the file system is not btrfs, or CAP_SYS_ADMIN is missing.
    """
    return _read(path, [(_STATUS, 0, 0)])


def read(path: str) -> Quotas:
    """Return the quotas of the whole file system that ``path`` is on, in one pass.

    Errors as `state`. The figures are those of the last commit, see above.
    """
    return _read(path, [(_STATUS, 0, 0), (_INFO, 0, _ALL), (_LIMIT, 0, _ALL)])


def get(path: str, number: int) -> Qgroup:
    """Return the qgroup ``number`` of the file system that ``path`` is on.

    Raise `NotFound` when there is no such qgroup, `Unsupported` when quotas are off.
    """
    one = (number, number)
    found = _read(path, [(_STATUS, 0, 0), (_INFO, *one), (_LIMIT, *one)])
    if not found.is_on:
        raise Unsupported(f"read qgroup 0/{number} of {path}: quotas are off")
    if number not in found.qgroups:
        raise _missing(path, number)
    return found.qgroups[number]


def referenced_at(descriptor: int, number: int) -> int | None:
    """Return what qgroup ``number`` refers to, as of the last commit; None without it.

    ``descriptor`` is any open file of the file system. Raise `OSError` as it comes.
    """
    try:
        for _, item in _items(descriptor, _INFO, number, number):
            referenced: int = _INFO_ITEM.unpack_from(item)[1]
            return referenced
    except FileNotFoundError:  # no tree of quotas
        pass
    return None


def set_limit(path: str, number: int, size: int | None) -> None:
    """Let qgroup ``number`` refer to ``size`` bytes at most; None is no limit.

    In force at return, on disk with the next commit. Other limits of it stay. A size
    below what it refers to is no error: nothing more is written then. Raise `NotFound`
    when there is no such qgroup, `Unsupported` when quotas are off, `NoSpace` where the
    subvolume is full and ``path`` is the only way into the file system.
    """
    descriptor = paths.open_directory(path)
    try:
        try:
            set_limit_at(descriptor, number, size)
        except OSError as error:
            # The ioctl takes room for its own transaction from the limit of the
            # subvolume that it is called in: a full one can only be helped from others.
            if error.errno != errno.EDQUOT or not _set_from_outside(
                path, descriptor, number, size
            ):
                raise
    except OSError as error:
        if error.errno == errno.ENOENT:
            raise _missing(path, number) from error
        raise _refusal(error, f"limit qgroup 0/{number} of {path}") from error
    finally:
        os.close(descriptor)


def set_limit_at(descriptor: int, number: int, size: int | None) -> None:
    """Do as `set_limit` on the file system of an open file.

    Raise `OSError` as it comes: ENOTCONN says that quotas are off, EDQUOT that the
    subvolume of the open file is itself full; another one's descriptor is wanted then.
    """
    # All bits set take a limit off; 0 would be a limit (btrfs_limit_qgroup).
    most = _ALL if size is None else size
    values = (number, _MAX_RFER, most, 0, 0, 0)
    # BTRFS_IOC_QGROUP_LIMIT, which the header calls a reading one.
    btrfs.ioctl(descriptor, btrfs.READ, 43, _LIMIT_ARGS, *values)


def lift_limit_at(descriptor: int, number: int) -> None:
    """Take the limit off the qgroup ``number``; quotas off, or no such, is success.

    Raise `OSError` as it comes, see `set_limit_at`.
    """
    try:
        set_limit_at(descriptor, number, None)
    except OSError as error:
        if error.errno not in NONE:
            raise


def _read(path: str, wanted: list[tuple[int, int, int]]) -> Quotas:
    flags = 0
    counts: dict[int, tuple[int, int]] = {}
    limits: dict[int, tuple[int | None, int | None]] = {}
    descriptor = paths.open_directory(path)
    try:
        for kind, first, last in wanted:
            for number, item in _items(descriptor, kind, first, last):
                if kind == _STATUS:
                    flags = _STATUS_ITEM.unpack_from(item)[2]
                elif kind == _INFO:
                    _, referenced, _, exclusive, _ = _INFO_ITEM.unpack_from(item)
                    counts[number] = (referenced, exclusive)
                else:
                    set_, most, most_exclusive, *_ = _LIMIT_ITEM.unpack_from(item)
                    limits[number] = (
                        most if set_ & _MAX_RFER else None,
                        most_exclusive if set_ & _MAX_EXCL else None,
                    )
    except FileNotFoundError:  # no tree of quotas
        return Quotas(is_on=False)
    except OSError as error:
        raise _refusal(error, f"read the quotas of {path}") from error
    finally:
        os.close(descriptor)
    if not flags & _ON:
        return Quotas(is_on=False)
    return Quotas(
        is_on=True,
        is_inconsistent=bool(flags & _INCONSISTENT),
        is_rescanning=bool(flags & _RESCAN),
        qgroups={
            number: Qgroup(*count, *limits.get(number, (None, None)))
            for number, count in counts.items()
        },
    )


def _items(
    descriptor: int, kind: int, first: int, last: int
) -> Iterator[tuple[int, bytes]]:
    # Keys are (0, type, qgroup id), in this order; the search goes on behind the last.
    while first <= last:
        place = (_QUOTA_TREE, 0, 0, first, last, 0, _ALL)
        key = _KEY.pack(*place, kind, kind, _MOST, 0, 0, 0, 0, 0)
        head = _SEARCH.pack(key, _BUFFER)
        buffer = ctypes.create_string_buffer(head, _SEARCH.size + _BUFFER)
        btrfs.call(descriptor, _SEARCH_V2, buffer)
        found = memoryview(buffer).cast("B")
        count = _KEY.unpack_from(found)[9]
        if count == 0:
            return
        start = _SEARCH.size
        for _ in range(count):
            _, _, number, _, length = _HEADER.unpack_from(found, start)
            start += _HEADER.size
            yield number, bytes(found[start : start + length])
            start += length
            first = number + 1


def _set_from_outside(
    path: str, descriptor: int, number: int, size: int | None
) -> bool:
    # From the directory above, or any other place where this file system is mounted.
    uuid = btrfs.file_system(descriptor)
    mounts = mountinfo.read()
    around = [mount.mountpoint for mount in mounts if mount.kind == "btrfs"]
    for place in [os.path.dirname(path), *around]:
        with contextlib.suppress(VolpluginError, OSError):
            outside = paths.open_directory(place)
            try:
                if btrfs.file_system(outside) == uuid:
                    set_limit_at(outside, number, size)
                    return True
            finally:
                os.close(outside)
    return False


def _missing(path: str, number: int) -> NotFound:
    return NotFound(
        f"{path} has no qgroup 0/{number}: someone removed it; run `btrfs qgroup "
        f"create 0/{number} {path}` and `btrfs quota rescan {path}`"
    )


def _refusal(error: OSError, doing: str) -> Exception:
    if error.errno in {errno.ENOTTY, errno.EOPNOTSUPP, errno.ENOSYS}:
        return Unsupported(f"{doing}: this file system is not btrfs")
    if error.errno == errno.EPERM:
        return Unsupported(f"{doing}: {error.strerror}: it needs CAP_SYS_ADMIN")
    if error.errno in {errno.ENOTCONN, errno.EINVAL}:
        return Unsupported(f"{doing}: quotas are off")
    if error.errno in {errno.EDQUOT, errno.ENOSPC}:
        return NoSpace(
            f"{doing}: {error.strerror}: there is no room left for the change itself; "
            "delete a file, or mount the file system's top somewhere (-o subvolid=5)"
        )
    return from_os_error(error, doing)
