"""Limits held against what a directory holds, and against what the kernel kept."""

import os

from volplugin.errors import NoSpace
from volplugin.host.quotactl import Quota
from volplugin.quota.mechanism import Limit
from volplugin.sizes import format_size


def require_within(
    path: str, limit: Limit, used: int, inodes: int, at_least: str = ""
) -> None:
    """Raise `NoSpace` with both figures if ``path`` holds more than ``limit``."""
    if limit.size is not None and used > limit.size:
        raise NoSpace(
            f"{path} holds {at_least}{format_size(used)}, more than "
            f"size={format_size(limit.size)}; give a larger size or delete files"
        )
    if limit.inodes is not None and inodes > limit.inodes:
        raise NoSpace(
            f"{path} holds {at_least}{inodes} inodes, more than "
            f"inodes={limit.inodes}; give more or delete files"
        )


def is_kept(path: str, quota: Quota, limit: Limit) -> bool:
    """Tell whether a quota is the limit asked for, rounded up as the kernel does."""
    if (quota.size is None) != (limit.size is None) or quota.inodes != limit.inodes:
        return False
    if quota.size is None or limit.size is None:
        return True
    unit = max(1024, os.statvfs(path).f_bsize)  # quotactl.set_limit
    return 0 <= quota.size - limit.size < unit


def told(limit: Limit) -> str:
    """Return a limit as a user would give it."""
    words = []
    if limit.size is not None:
        words.append(f"size={format_size(limit.size)}")
    if limit.inodes is not None:
        words.append(f"inodes={limit.inodes}")
    return " ".join(words) or "none"
