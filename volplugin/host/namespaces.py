"""Mount namespaces: which containers hold a file system, and who sees a mount."""

import errno
import os
from collections.abc import Callable, Collection, Container, Sequence
from functools import cache
from typing import Final

import attrs

from volplugin.errors import Unavailable, from_os_error
from volplugin.host import mountinfo, surroundings
from volplugin.host.mountinfo import Mount

# A process that has ended: no entry, no task, and for a zombie's mount table EINVAL.
_GONE: Final = frozenset({errno.ENOENT, errno.ESRCH, errno.EINVAL})


@attrs.frozen
class Process:
    """A process as the one to name for its mount namespace."""

    pid: int
    program: str


def holders(
    device: str, root: str, places: Collection[tuple[str, str]] = ()
) -> list[Process]:
    """Return one process for each container that has a piece of a file system mounted.

    The piece is what lies at or below ``root`` inside the file system ``device`` (as
    `mountinfo.inside` returns them); ``/`` is all of it. A container is a mount
    namespace other than ours whose root directory is not ours either, nor that of
    process 1: where we are in a container ourselves, that one is the host's.
    Namespaces with such a root directory belong to services of the host (systemd's
    ``PrivateTmp=`` and the like): they have copies of the host's mounts and lose them
    when we unmount, by propagation, so they are left out.

    ``places`` are the directories that the file system is mounted on by us, as
    `mountinfo.place_of` returns them. A mount on one of them is a copy that came along
    with the file system around it, as to a container that was given ``/`` of the
    host to look at: it does not use the volume and is left out too.

    A namespace that no process lives in is not seen. Processes that end meanwhile are
    ignored. Raise `Unavailable` when a process's mounts may not be read: an answer
    without it could pull a volume from under a container.
    """

    def has(mount: Mount, mounts: Sequence[Mount]) -> bool:
        return (
            mount.device == device
            and mountinfo.is_within(mount.root, root)
            and not (places and mountinfo.place_of(mount, mounts) in places)
        )

    return [process for process, _ in showing(has)]


def showing(
    has: Callable[[Mount, Sequence[Mount]], bool],
) -> list[tuple[Process, Mount]]:
    """Return one process, with the mount, for each container that ``has`` one.

    ``has`` is asked for each mount of a container's table. Containers and errors as for
    `holders`.
    """
    found: dict[str, tuple[Process, Mount]] = {}
    hosts = cache(_roots_of_hosts)  # two tables, read where a mount is found alone
    # A table shows what its process can reach: one that is in a chroot inside a
    # container sees less than the others, so each root directory is asked.
    for (namespace, _), pids in _foreign_groups().items():
        if namespace not in found:
            holder = _first_that_mounts(pids, has, hosts)
            if holder is not None:
                found[namespace] = holder
    return list(found.values())


def _roots_of_hosts() -> Container[tuple[str, str] | None]:
    try:
        roots = {surroundings.root_in(mountinfo.read(pid)) for pid in ("self", 1)}
    except OSError as error:
        raise from_os_error(error, "look at the mounts of the host") from error
    return roots - {None}


def besides(found: Sequence[Process], pid: int) -> list[Process]:
    """Return ``found`` without those in the mount namespace of process ``pid``.

    One that ended meanwhile stays: it holds nothing, and the next look tells.
    """
    namespace = _namespace_of(pid)
    return [
        process
        for process in found
        if namespace is None or _namespace_of(process.pid) != namespace
    ]


def _namespace_of(pid: int) -> str | None:
    try:
        return os.readlink(f"/proc/{pid}/ns/mnt")
    except OSError:
        return None


def is_ours(pid: int) -> bool:
    """Tell whether a process has our mount namespace: one readlink.

    True as well where it can't be told, as the process has ended.
    """
    return _namespace_of(pid) in {None, _own_namespace()}


def sees(pid: int, path: str) -> bool:
    """Tell whether ``path`` is the same directory for process ``pid`` as for us.

    So it is in another mount namespace that gets our mounts, shared or as a slave. A
    table has the paths that its process can reach, by its own root directory. Where
    that is not ours, its paths can't be held against ours: an engine on the host that
    we are in a container of has another one for each. There any path counts. True as
    well where it can't be told: the process has ended, or may not be looked at.
    """
    try:
        theirs, ours = mountinfo.read(pid), mountinfo.read()
        where = mountinfo.inside(path, ours)
        if where is None or mountinfo.inside(path, theirs) == where:
            return True
        if _root_of(pid) == _root_of("self"):
            return False
    except OSError:
        return True
    device, root = where
    return any(
        mount.device == device and mountinfo.is_within(root, mount.root)
        for mount in theirs
    )


@cache
def _own_namespace() -> str:
    return os.readlink("/proc/self/ns/mnt")  # a server stays in the one it began in


def _foreign_groups() -> dict[tuple[str, tuple[int, int]], list[int]]:
    # Processes by mount namespace and root directory, without ours; pids ascending.
    try:
        own_namespace = _own_namespace()
        own_root = _root_of("self")
        pids = sorted(int(entry) for entry in os.listdir("/proc") if entry.isdecimal())
    except OSError as error:
        raise from_os_error(error, "list the processes") from error
    groups: dict[tuple[str, tuple[int, int]], list[int]] = {}
    hidden: dict[str, list[int]] = {}
    for pid in pids:
        try:
            namespace = os.readlink(f"/proc/{pid}/ns/mnt")
            if namespace == own_namespace:
                continue
            root = _root_of(pid)
        except PermissionError:
            # A process with a capability that we lack hides its links, not its mounts.
            hidden.setdefault(_view_of(pid), []).append(pid)
            continue
        except OSError as error:
            if error.errno in _GONE:
                continue
            raise _cannot_look(error, pid) from error
        if root != own_root:
            groups.setdefault((namespace, root), []).append(pid)
    for view, viewers in hidden.items():
        if not _is_in_our_namespace(viewers):
            groups[view, (0, 0)] = viewers
    return groups


def _view_of(pid: int) -> str:
    """Return what the mount table begins with: one word for a namespace and a root.

    The ids of mounts are unique on a host. Where nothing is told, the process is alone.
    """
    try:
        with open(f"/proc/{pid}/mountinfo", "rb") as table:
            return os.fsdecode(table.readline()) or f"of process {pid}"
    except OSError as error:
        if error.errno in _GONE:
            return f"of process {pid}"
        raise _cannot_look(error, pid) from error


def _is_in_our_namespace(pids: list[int]) -> bool:
    ours = {mount.mount_id for mount in mountinfo.read()}
    for pid in pids:
        try:
            theirs = mountinfo.read(pid)
        except OSError as error:
            if error.errno in _GONE:
                continue
            raise _cannot_look(error, pid) from error
        return any(mount.mount_id in ours for mount in theirs)
    return True  # all have ended: there is nothing to ask them for


def _root_of(pid: int | str) -> tuple[int, int]:
    found = os.stat(f"/proc/{pid}/root")
    return found.st_dev, found.st_ino


def _first_that_mounts(
    pids: list[int],
    has: Callable[[Mount, Sequence[Mount]], bool],
    hosts: Callable[[], Container[tuple[str, str] | None]],
) -> tuple[Process, Mount] | None:
    # Any process of the group will do; the next ones are for when the first has ended.
    for pid in pids:
        try:
            mounts = mountinfo.read(pid)
        except OSError as error:
            if error.errno in _GONE:
                continue
            raise _cannot_look(error, pid) from error
        mount = next((each for each in mounts if has(each, mounts)), None)
        if mount is None or surroundings.root_in(mounts) in hosts():
            return None
        return Process(pid, _program(pid)), mount
    return None


def _program(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm", "rb") as file:
            return file.read().decode("utf-8", "replace").rstrip("\n")
    except OSError:  # it had the mount a moment ago, which is what counts
        return ""


def _cannot_look(error: OSError, pid: int) -> Unavailable:
    return Unavailable(
        f"look at the mounts of process {pid}: {error.strerror}; it needs root"
    )
