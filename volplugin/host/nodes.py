"""Block devices: their nodes in /dev, and what uses them."""

import contextlib
import errno
import os
import stat
from collections.abc import Container, Iterator

from volplugin.errors import Unavailable, from_os_error
from volplugin.host import mountinfo


def ensure(name: str) -> str:
    """Return the path of the node of the block device ``name``; make a missing one.

    Without devtmpfs, as in containers, no one else does. Raise `NotFound` when there is
    no such device.
    """
    path = f"/dev/{name}"
    try:
        number = make(name)
        found = os.stat(path).st_rdev
    except OSError as error:
        raise from_os_error(error, f"make {path}") from error
    if found != number:
        raise Unavailable(
            f"{path} is not the device {number_of(name)}: remove the file"
        )
    return path


def make(name: str) -> int:
    """Make the node of the device ``name`` if it is missing; `OSError` as it comes.

    Return its number as of makedev(3): another's may be there instead.
    """
    major, minor = (int(number) for number in number_of(name).split(":"))
    number = os.makedev(major, minor)
    if not os.path.exists(f"/dev/{name}"):
        with contextlib.suppress(FileExistsError):
            os.mknod(f"/dev/{name}", stat.S_IFBLK | 0o600, number)
    return number


def size_of(name: str) -> int:
    """Return the bytes of the block device ``name``; 0 where there is none."""
    try:
        with open(f"/sys/block/{name}/size", encoding="ascii") as file:
            return int(file.read()) * 512  # sectors of 512 bytes on every disk
    except OSError:
        return 0


def number_of(name: str) -> str:
    """Return ``major:minor`` of the block device ``name``; `OSError` as it comes."""
    with open(f"/sys/block/{name}/dev", encoding="ascii") as file:
        return file.read().strip()


def is_unclaimed(name: str) -> bool:
    """Tell whether the device is neither mounted, in any namespace, nor part of one.

    It is opened for that, which may read it: for devices without a server.
    """
    try:
        # See open(2): without O_CREAT it asks for a block device that nobody claims.
        flags = os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC | os.O_NONBLOCK
        os.close(os.open(f"/dev/{name}", flags))
    except OSError as error:
        if error.errno == errno.EBUSY:
            return False
        if error.errno not in {errno.ENXIO, errno.ENOENT, errno.ENODEV}:
            raise from_os_error(error, f"open /dev/{name}") from error
    return True


def users(name: str, *, besides: Container[int] = ()) -> list[str]:
    """Return what has the device mounted or open, for people; [] when nothing has.

    ``besides`` are processes that do not count. Nothing is read from the device, which
    may not answer. What the kernel itself has open, as without a mount, is not seen,
    nor processes that we may not look at.
    """
    try:
        number = number_of(name)
        parts = os.listdir(f"/sys/block/{name}/holders")
        pids = sorted(int(entry) for entry in os.listdir("/proc") if entry.isdecimal())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise from_os_error(error, f"look for users of /dev/{name}") from error
    found = [f"it is part of /dev/{part}" for part in parts]
    found += _mounts(number, pids)
    for pid in pids:
        if pid not in besides and _has_open(pid, f"/dev/{name}"):
            found.append(f"process {pid} ({_program(pid)}) has it open")
    return found


def _mounts(number: str, pids: list[int]) -> Iterator[str]:
    seen = set()
    # Ours first: its mountpoint is the one to name.
    for pid in (os.getpid(), *pids):
        # It has ended, or is not ours to look at.
        with contextlib.suppress(OSError):
            namespace = os.readlink(f"/proc/{pid}/ns/mnt")
            if namespace in seen:
                continue
            for mount in mountinfo.read(pid):
                if mount.device == number:
                    yield f"it is mounted on {mount.mountpoint} (process {pid})"
            seen.add(namespace)


def _has_open(pid: int, path: str) -> bool:
    # By their names alone: to look at an open file may mean to ask a dead server.
    with contextlib.suppress(OSError):
        for entry in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{pid}/fd/{entry}") == path:
                    return True
    return False


def _program(pid: int) -> str:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/comm", "rb") as file:
        return file.read().decode("utf-8", "replace").strip()
    return "?"
