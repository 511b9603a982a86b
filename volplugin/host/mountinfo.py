"""The mount table of a process, and questions about it.

Reading is apart from asking, so that one read serves many volumes. Paths are absolute,
without ``.``, ``..`` and symbolic links, as the kernel writes them.
"""

import errno
import os
import re
from collections.abc import Sequence

import attrs

# proc_pid_mountinfo(5): blank, tab, newline and backslash are written as octal.
_ESCAPE = re.compile(rb"\\([0-7]{3})")


@attrs.frozen
class Mount:
    """One line of ``/proc/PID/mountinfo``, see proc_pid_mountinfo(5).

    ``device`` is ``major:minor``; ``root`` is the directory of the file system that
    appears at ``mountpoint``; ``options`` are the mount's own, not the file system's;
    ``tags`` are the optional fields such as ``shared:7``; ``kind`` is the type.
    """

    mount_id: int
    parent_id: int
    device: str
    root: str
    mountpoint: str
    options: str
    tags: tuple[str, ...]
    kind: str
    source: str


def read(pid: int | str = "self") -> list[Mount]:
    """Read the mounts that process ``pid`` can reach, in the kernel's order.

    A mount that is there from the beginning to the end of the call is in the list once:
    since Linux 5.8 the kernel keeps a cursor between the reads of one open file.
    Raise `OSError` as it comes, so that the caller can tell a process that has ended
    (ENOENT, ESRCH, EINVAL) from other trouble.
    """
    with open(f"/proc/{pid}/mountinfo", "rb") as table:
        # By newline alone: a carriage return in a name is not escaped.
        return [_parse(line) for line in table.read().split(b"\n") if line]


def mount_id(descriptor: int) -> int:
    """Return the id of the mount that an open file is on, see proc_pid_fdinfo(5).

    A device number tells neither a bind mount, which has that of its origin, nor what
    is no mount: subvolumes of btrfs have their own, and so have the empty directories
    that a snapshot has in the place of subvolumes. Raise `OSError` as it comes.
    """
    table = os.open(f"/proc/self/fdinfo/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        lines = os.read(table, 4096).split(b"\n")
    finally:
        os.close(table)
    for line in lines:
        if line.startswith(b"mnt_id:"):
            return int(line[7:])
    raise OSError(errno.ENOSYS, "/proc tells no mount ids")


def at(path: str, mounts: Sequence[Mount]) -> Mount | None:
    """Return the topmost mount exactly at ``path``.

    A mount that a later one further up the path hides is found as well: it still has
    to be unmounted, though its path leads elsewhere.
    """
    path = _clean(path)
    return _topmost([mount for mount in mounts if mount.mountpoint == path])


def covering(path: str, mounts: Sequence[Mount]) -> Mount | None:
    """Return the mount that ``path`` lies on: the deepest, of equals the topmost."""
    path = _clean(path)
    above = [mount for mount in mounts if _holds(mount.mountpoint, path)]
    if not above:
        return None
    deepest = max(len(mount.mountpoint) for mount in above)
    return _topmost([mount for mount in above if len(mount.mountpoint) == deepest])


def of_file_system(device: str, mounts: Sequence[Mount]) -> Mount | None:
    """Return the mount that shows the whole of the file system ``device`` best.

    That is one of its root, the first and shortest of them; else the one of the most,
    as where a container sees nothing but a directory. None if it is not mounted.
    """
    of_device = [mount for mount in mounts if mount.device == device]
    return min(
        of_device,
        key=lambda mount: (len(_clean(mount.root)), len(mount.mountpoint)),
        default=None,
    )


def below(path: str, mounts: Sequence[Mount]) -> list[Mount]:
    """Return the mounts strictly below ``path``, in the table's order."""
    path = _clean(path)
    return [
        mount
        for mount in mounts
        if mount.mountpoint != path and _holds(path, mount.mountpoint)
    ]


def to_unmount(path: str, mounts: Sequence[Mount]) -> list[str]:
    """Return where to unmount, one after the other, for the mount at ``path`` to end.

    What is stacked there is left for the next look; nothing where nothing is there.
    """
    if at(path, mounts) is None:
        return []
    return [*reversed([mount.mountpoint for mount in below(path, mounts)]), path]


def inside(path: str, mounts: Sequence[Mount]) -> tuple[str, str] | None:
    """Return the device of ``path`` and its path within that file system.

    That pair names the same directory in every mount namespace, whatever its path is
    there.
    """
    path = _clean(path)
    mount = covering(path, mounts)
    if mount is None:
        return None
    prefix = mount.mountpoint.rstrip("/")
    return mount.device, (mount.root.rstrip("/") + path[len(prefix) :]).rstrip(
        "/"
    ) or "/"


def place_of(mount: Mount, mounts: Sequence[Mount]) -> tuple[str, str] | None:
    """Return the directory that ``mount`` is mounted on, as `inside` returns paths.

    None for a mount whose parent is not in the table.
    """
    for parent in mounts:
        if parent.mount_id == mount.parent_id and parent != mount:
            if not _holds(parent.mountpoint, mount.mountpoint):
                return None
            rest = mount.mountpoint.removeprefix(parent.mountpoint).strip("/")
            return parent.device, os.path.join(parent.root, rest).rstrip("/") or "/"
    return None


def is_within(path: str, directory: str) -> bool:
    """Tell whether ``path`` is ``directory`` or lies below it, by whole components."""
    return _holds(_clean(directory), _clean(path))


def _parse(line: bytes) -> Mount:
    # Split at each single blank: a mount's source may be the empty string.
    head, _, tail = line.partition(b" - ")
    mount_id, parent_id, device, root, mountpoint, options, *tags = head.split(b" ")
    kind, source, *_ = tail.split(b" ")
    return Mount(
        int(mount_id),
        int(parent_id),
        device.decode("ascii"),
        _text(root),
        _text(mountpoint),
        _text(options),
        tuple(_text(tag) for tag in tags),
        _text(kind),
        _text(source),
    )


def _text(field: bytes) -> str:
    if b"\\" in field:
        field = _ESCAPE.sub(lambda found: bytes([int(found[1], 8)]), field)
    return field.decode("utf-8", "surrogateescape")


def _clean(path: str) -> str:
    return path.rstrip("/") or "/"


def _holds(directory: str, path: str) -> bool:
    if directory in {"/", path}:
        return True
    return path.startswith(directory) and path[len(directory)] == "/"


def _topmost(stack: list[Mount]) -> Mount | None:
    # Mounts stacked on one mountpoint are each other's parents; the order of the table
    # says nothing certain, as a propagated mount may be put in beneath.
    covered = {mount.parent_id for mount in stack if mount.parent_id != mount.mount_id}
    free = [mount for mount in stack if mount.mount_id not in covered]
    return free[-1] if free else None
