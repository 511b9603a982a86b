"""Limiting directories by the quotas of btrfs: one subvolume for each volume."""

import contextlib
import logging
import os
from collections.abc import Callable, Mapping
from typing import Final

from volplugin.errors import (
    AlreadyExists,
    Internal,
    InvalidArgument,
    NoSpace,
    NotFound,
    Unsupported,
    VolpluginError,
)
from volplugin.host import btrfs, qgroups
from volplugin.host.btrfs import Subvolume
from volplugin.host.qgroups import Qgroup
from volplugin.logs import log
from volplugin.model import Usage
from volplugin.quota import places
from volplugin.quota.figures import require_within, told
from volplugin.quota.mechanism import Facts, Limit, Limited, Mechanism
from volplugin.sizes import format_size

logger = logging.getLogger(__name__)

# An empty subvolume takes one block of metadata, and making a file in it reserves some
# more: with blocks of 16 KiB, the default, it fails at 64 KiB and works at 128. There
# are blocks of 64 KiB.
_LEAST_SIZE: Final = 1 << 20


class BtrfsQuota(Mechanism):
    """Limits by qgroups, for everyone and root: a write beyond fails with EDQUOT.

    The limit holds what the subvolume refers to, metadata included; the last 32 KiB
    (two blocks of metadata) can't be filled with data. What it does not do:

    - ``df`` inside shows the whole file system; only `usage` tells the limit.
    - Whoever may write in the volume can make subvolumes there, which have a qgroup of
      their own: without a limit, or, snapshots, with the same once more. So it keeps
      honest programs in bounds, not hostile ones.
    - Usage lags by what was written since the last commit, up to 30 seconds, and the
      limit by nothing.
    """

    name = "btrfs"

    def problem(self, directory: str, *, itself: bool = False) -> str | None:
        """Say why not: another file system, quotas off or not counted, no rights."""
        mount = places.mount_of(directory)
        if not btrfs.is_btrfs(directory):
            return f"{places.shown(mount)} is not btrfs"
        try:
            quotas = qgroups.state(directory)
        except VolpluginError as error:
            return str(error)
        place = mount.mountpoint if mount is not None else directory
        if not quotas.is_on:
            return (
                f"quotas are off on this btrfs; `btrfs quota enable {place}` switches "
                "them on"
            )
        if itself:
            return None  # it has its limit, if on figures that may be wrong
        if quotas.is_rescanning:
            return (
                "quotas of this btrfs are still being counted; "
                f"`btrfs quota rescan -w {place}` waits for it"
            )
        if quotas.is_inconsistent:
            return (
                "quotas of this btrfs have lost count, so no limit holds; "
                f"`btrfs quota rescan -w {place}` counts anew"
            )
        return None

    def check(self, limit: Limit) -> None:
        """Refuse less than 1M, and any number of inodes."""
        if limit.inodes is not None:
            raise Unsupported(
                f"inodes={limit.inodes}: btrfs counts no inodes; leave inodes out"
            )
        if limit.size is not None and limit.size < _LEAST_SIZE:
            raise InvalidArgument(
                f"size={format_size(limit.size)} is below the minimum of a btrfs "
                f"quota, {format_size(_LEAST_SIZE)}"
            )

    def reserve(self, directory: str) -> Facts:
        """Return nothing: the subvolume's id is read from its path."""
        return {}

    def keep(self, directory: str, facts: Facts) -> None:
        """Do nothing: it is btrfs that gives ids."""

    def make(self, path: str, facts: Facts) -> None:
        """Make a subvolume; its qgroup comes with it."""
        btrfs.create_subvolume(path, 0o700)

    def require_adoptable(self, path: str, facts: Facts, limit: Limit) -> None:
        """Look at the qgroup as of the last commit."""
        found = _qgroup_of(path)
        _require_unlimited(path, found)
        require_within(path, limit, found.referenced, 0)

    def adopt(self, path: str, facts: Facts, limit: Limit) -> bool:
        """Set the limit; btrfs has counted all along."""
        found = _qgroup_of(path)
        if found.size != limit.size:  # an earlier call may have set ours
            _require_unlimited(path, found)
        self.set_limit(path, facts, limit)
        return True

    def set_limit(self, path: str, facts: Facts, limit: Limit) -> None:
        """Set the limit, read it back, and commit.

        All data of the file system is written first where the count matters: for a
        limit below the one before, or the first one of a subvolume that isn't empty.
        """
        number = _subvolume_at(path).id
        before = qgroups.get(path, number)
        is_counted = _is_no_less(limit.size, before.size) or _is_new(path, before)
        settle = btrfs.commit if is_counted else btrfs.sync
        if not is_counted:
            btrfs.sync(path)
            before = qgroups.get(path, number)
        require_within(path, limit, before.referenced, 0)
        _limit(path, number, limit)
        settle(path)
        try:
            require_within(path, limit, qgroups.get(path, number).referenced, 0)
        except NoSpace:  # filled meanwhile
            qgroups.set_limit(path, number, before.size)
            btrfs.commit(path)
            raise

    def usage(self, path: str, facts: Facts) -> Usage:
        """Return what the qgroup counted at the last commit."""
        return _usage(_qgroup_of(path), path)

    def measure(self, volumes: Mapping[str, Limited]) -> Mapping[str, Usage]:
        """Go through the qgroups of each file system once."""
        disks: dict[bytes, dict[str, int]] = {}
        for volume, limited in volumes.items():
            with contextlib.suppress(VolpluginError, OSError):
                subvolume = _subvolume_at(limited.path)
                disks.setdefault(subvolume.file_system, {})[volume] = subvolume.id
        measured: dict[str, Usage] = {}
        for numbers in disks.values():
            with contextlib.suppress(VolpluginError, OSError):
                found = qgroups.read(volumes[next(iter(numbers))].path).qgroups
                for volume, number in numbers.items():
                    if number in found:
                        path = volumes[volume].path
                        measured[volume] = _usage(found[number], path)
        return measured

    def verify(self, path: str, facts: Facts, limit: Limit) -> str | None:
        """Set a limit that is missing or differs, whatever the volume holds."""
        number = _subvolume_at(path).id
        found = qgroups.get(path, number)
        if found.size == limit.size:
            return None
        _limit(path, number, limit)
        btrfs.commit(path)
        return f"limit {told(Limit(size=found.size))} instead of {told(limit)}"

    def release(self, path: str, facts: Facts) -> None:
        """Take the limit off; what is gone, or is no subvolume, has none."""
        with contextlib.suppress(NotFound):
            subvolume = btrfs.subvolume_at(path)
            if subvolume is None:
                return
            try:
                qgroups.set_limit(path, subvolume.id, None)
            except Unsupported as error:  # quotas are off: it may come back with them
                log(
                    logger,
                    logging.WARNING,
                    "limit not dropped",
                    path=path,
                    subvolume=subvolume.id,
                    error=str(error),
                )
            btrfs.commit(path)

    def forget(self, directory: str, facts: Facts) -> None:
        """Do nothing: `delete` takes the limit with the subvolume."""

    def work(self, stop: Callable[[], bool]) -> bool:
        """Do nothing: nothing was left."""
        return True


def _subvolume_at(path: str) -> Subvolume:
    subvolume = btrfs.subvolume_at(path)
    if subvolume is None:
        raise Unsupported(
            f"{path} is no subvolume, and btrfs limits nothing else: make one with "
            f"`btrfs subvolume create NEW`, fill it with `cp -a --reflink {path}/. NEW`"
            ", and move it into place"
        )
    return subvolume


def _qgroup_of(path: str) -> Qgroup:
    return qgroups.get(path, _subvolume_at(path).id)


def _require_unlimited(path: str, found: Qgroup) -> None:
    limits = ((found.size, "a", ""), (found.exclusive_size, "an exclusive", "-e "))
    for size, what, flag in limits:
        if size is not None:
            raise AlreadyExists(
                f"{path} has {what} limit of {format_size(size)} already, set by "
                f"someone else; `btrfs qgroup limit {flag}none {path}` takes it off"
            )


def _is_no_less(size: int | None, before: int | None) -> bool:
    return size is None or (before is not None and before <= size)


def _is_new(path: str, found: Qgroup) -> bool:
    # Made just now: nobody has had it, so nothing can be on the way to the disk.
    with os.scandir(path) as entries:
        return found.size is None and next(entries, None) is None


def _limit(path: str, number: int, limit: Limit) -> None:
    qgroups.set_limit(path, number, limit.size)
    kept = qgroups.get(path, number)
    if kept.size != limit.size:
        raise Internal(
            f"limit {path} to {told(limit)}: the kernel kept "
            f"{told(Limit(size=kept.size))}"
        )


def _usage(found: Qgroup, path: str) -> Usage:
    disk = os.statvfs(path)
    free = disk.f_bavail * disk.f_frsize
    left = free if found.size is None else found.size - found.referenced
    return Usage(
        used=found.referenced, available=max(0, min(left, free)), size=found.size
    )
