"""The host around this process, where that is in a container of it.

A managed plugin is in one: it has a root directory and mounts of its own, and sees the
host's processes. Process 1 is the host's then, and its mount table tells where on the
host a directory of ours is.
"""

import os
from collections.abc import Sequence

from volplugin.errors import InvalidArgument
from volplugin.host import mountinfo
from volplugin.host.mountinfo import Mount

# What every container has of its own, or of the host's, that is no place for files.
_NO_PLACES = ("/dev", "/etc", "/proc", "/run", "/sys")


def is_contained() -> bool:
    """Tell whether our root directory is another one than that of process 1."""
    try:
        ours, hosts = root_in(mountinfo.read()), root_in(mountinfo.read(1))
    except OSError:  # none to look at: no host has given us its processes
        return False
    return hosts is not None and ours != hosts


def root_in(mounts: Sequence[Mount]) -> tuple[str, str] | None:
    """Return what tells the root directory of a mount table's process from others.

    By its mount: processes with more capabilities than we have hide their directories.
    None for a root directory on which nothing is mounted, as in a chroot.
    """
    root = mountinfo.at("/", mounts)
    return None if root is None else (root.device, root.root)


def path_on_host(path: str) -> str | None:
    """Return the path by which process 1 reaches our ``path``, None if it does not.

    Where the file system is mounted several times on the host, by the mount that shows
    most of it.
    """
    try:
        where = mountinfo.inside(path, mountinfo.read())
        mounts = mountinfo.read(1)
    except OSError:
        return None
    if where is None:
        return None
    device, inner = where
    shown = [each for each in mounts if mountinfo.is_within(inner, each.root)]
    mount = mountinfo.of_file_system(device, shown)
    if mount is None:
        return None
    rest = inner[len(mount.root.rstrip("/")) :].strip("/")
    return os.path.join(mount.mountpoint, rest).rstrip("/") or "/"


def require_kept(path: str, shared: str) -> None:
    """Raise `InvalidArgument` for a directory that would go with our container.

    Such is one, be it still to be made, on the container's own root file system: of the
    host's directories it has only those that were bound into it. Below ``shared`` there
    are mounts for the host and nothing else.
    """
    if not is_contained():
        return
    table = mountinfo.read()
    root = mountinfo.at("/", table)
    mount = mountinfo.covering(path, table)
    if mount not in (None, root) and not mountinfo.is_within(path, shared):
        return
    bound = {
        each.mountpoint
        for each in table
        if root is not None
        and each.parent_id == root.mount_id
        and not any(mountinfo.is_within(each.mountpoint, no) for no in _NO_PLACES)
        and not mountinfo.is_within(each.mountpoint, shared)
    }
    raise InvalidArgument(
        f"{path} is inside the plugin, and would be deleted with it or with its next "
        f"upgrade: of the host's directories it has those at or below "
        f"{' and '.join(sorted(bound)) or '(none)'}"
    )
