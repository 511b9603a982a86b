"""What is to be known of the file system around a limited directory."""

import os

from volplugin.errors import Unsupported, from_os_error
from volplugin.host import mountinfo, projects
from volplugin.host.mountinfo import Mount

_SWITCHES = {
    "xfs": (
        "mount it with -o pquota, which no remount can do (rootflags=pquota on the "
        "kernel's command line for the root file system)"
    ),
    "ext4": (
        "run `tune2fs -O quota,project` on it while it is unmounted, and mount it with "
        "-o prjquota"
    ),
}


def mount_of(directory: str) -> Mount | None:
    """Return the mount that shows the file system of ``directory`` best.

    Not the one that ``directory`` lies on, which may be a bind mount of a part of it.
    """
    device = _device_of(directory)
    name = f"{os.major(device)}:{os.minor(device)}"
    mounts = mountinfo.read()
    # Btrfs has other numbers in its mounts than in its files.
    return mountinfo.of_file_system(name, mounts) or mountinfo.covering(
        directory, mounts
    )


def shown(mount: Mount | None) -> str:
    """Name a file system for people: type, source and mountpoint."""
    if mount is None:
        return "this file system"
    return f"{mount.kind} ({mount.source} on {mount.mountpoint})"


def remedy(mount: Mount | None, *, counted: bool) -> str | None:
    """Say how project quotas are switched on where they are at most ``counted``.

    None where no way is known.
    """
    kind = mount.kind if mount is not None else ""
    if kind == "ext4" and counted:
        return "mount it with -o prjquota"
    return _SWITCHES.get(kind)


def free(directory: str) -> int:
    """Return the bytes that root's files can still take where ``directory`` is.

    statvfs(3) tells of the project's limit instead, where a directory inherits one
    (XFS, ext4): the parent is asked then, or the mountpoint. Where these inherit too,
    the answer is what the project's limit leaves.
    """
    device = _device_of(directory)
    mount = mount_of(directory)
    around = [os.path.dirname(directory), mount.mountpoint if mount else directory]
    for place in around:
        try:
            is_outside = not projects.of(place).inherits
        except Unsupported:
            is_outside = True
        if is_outside and _device_of(place) == device:
            break
    else:
        place = directory
    try:
        found = os.statvfs(place)
    except OSError as error:
        raise from_os_error(error, f"look at the space around {directory}") from error
    return found.f_bavail * found.f_frsize


def _device_of(path: str) -> int:
    try:
        return os.stat(path).st_dev
    except OSError as error:
        raise from_os_error(error, f"look at {path}") from error
