"""What volumes of CephFS are to be, and may hold, by their options."""

from typing import Final

from volplugin.ceph.filesystem import Holds, Quota
from volplugin.ceph.fsplaces import Wanted
from volplugin.drivers.cephfs_mounting import ADOPTED
from volplugin.drivers.driver import Spec
from volplugin.errors import NoSpace
from volplugin.model import Volume
from volplugin.sizes import format_size

QUOTA_BEFORE: Final = "quota-before"
"""The fact that keeps the limits which an adopted directory had: bytes,files."""

_MODE: Final = 0o755


def wanted(spec: Spec) -> Wanted:
    """Return what the root of a new volume is to be."""
    options = spec.options
    return Wanted(
        quota=limits_of(spec),
        uid=options.uid or 0,
        gid=options.gid or 0,
        mode=_MODE if options.mode is None else options.mode,
        record=spec.record,
    )


def quota_before(volume: Volume) -> Quota:
    """Return the limits that an adopted directory had."""
    size, inodes = (int(text) or None for text in volume.facts[QUOTA_BEFORE].split(","))
    return Quota(size=size, inodes=inodes)


def limits_of(spec: Spec) -> Quota:
    """Return the limits that a volume's options ask for.

    What was not asked for is no limit, or, for an adopted directory, its own.
    """
    asked = Quota(size=spec.options.size, inodes=spec.options.inodes)
    if ADOPTED not in spec.volume.facts:
        return asked
    before = quota_before(spec.volume)
    return Quota(size=asked.size or before.size, inodes=asked.inodes or before.inodes)


def require_fits(limits: Quota, holds: Holds) -> None:
    """Raise `NoSpace` for limits below what a volume holds."""
    if limits.size is not None and holds.used > limits.size:
        raise NoSpace(
            f"it holds {holds.used} bytes, more than size={format_size(limits.size)}:"
            f" delete files first, or give more"
        )
    if limits.inodes is not None and holds.inodes > limits.inodes:
        raise NoSpace(
            f"it holds {holds.inodes} files and directories, more than"
            f" inodes={limits.inodes}: delete files first, or give more"
        )
