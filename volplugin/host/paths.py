"""Directories by path, with no symbolic link in any component.

A path is walked by descriptors, one component after the other and none of them
followed, so a link that someone puts in between leads nowhere. This is openat2(2) with
``RESOLVE_NO_SYMLINKS`` for every kernel. ``.`` and ``..`` are refused.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from typing import Final

from volplugin.errors import InvalidArgument, NotFound, VolpluginError, from_os_error
from volplugin.host import renaming

_STEP: Final = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NAME_MAX: Final = 255  # limits.h; no Linux file system takes longer names
_READ: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def open_directory(path: str) -> int:
    """Open the directory ``path`` for reading and return the descriptor.

    The caller closes it. Raise `InvalidArgument`, with the component and where it
    points, for a symbolic link, and for what is no directory; `NotFound` for what is
    missing.
    """
    components = _components(path)
    step, depth = _reach(components)
    try:
        if depth < len(components):
            raise NotFound(f"{_joined(components[: depth + 1])} does not exist")
        return os.open(".", _READ, dir_fd=step)
    except OSError as error:
        raise from_os_error(error, f"open directory {path}") from error
    finally:
        os.close(step)


@contextlib.contextmanager
def parent(path: str) -> Iterator[tuple[int, str]]:
    """Open the directory that ``path`` lies in and yield descriptor and last name.

    ``path`` itself need not exist. Errors as for `open_directory`.
    """
    components = _components(path)
    if not components:
        raise InvalidArgument("/ lies in no directory")
    descriptor = open_directory(_joined(components[:-1]))
    try:
        yield descriptor, components[-1]
    finally:
        os.close(descriptor)


def make_directory(path: str, mode: int = 0o755) -> None:
    """Make the directory ``path`` with exactly ``mode`` and sync its parent.

    Idempotent: a directory that exists is left as it is. Raise `AlreadyExists` where
    something else has the name, `NotFound` where the parent is missing.
    """
    with parent(path) as (directory, name):
        try:
            _make(directory, name, mode)
        except OSError as error:
            raise from_os_error(error, f"make directory {path}") from error


def make_directories(path: str, mode: int) -> list[str]:
    """Make ``path`` and the directories above it that are missing.

    Return those that this call made, outermost first; each has exactly ``mode``. When
    one fails, those before it are taken back.
    """
    made: list[str] = []
    try:
        for directory in missing_directories(path):
            with parent(directory) as (above, name):
                try:
                    if _make(above, name, mode):
                        made.append(directory)
                except OSError as error:
                    raise from_os_error(error, f"make directory {directory}") from error
    except VolpluginError:
        for directory in reversed(made):
            # The first error is the one to tell; someone may use the directory by now.
            with contextlib.suppress(VolpluginError):
                remove_directory(directory)
        raise
    return made


def missing_directories(path: str) -> list[str]:
    """Return ``path`` and the directories above it that do not exist, outermost first.

    Errors as for `open_directory`, but for what is missing.
    """
    components = _components(path)
    descriptor, depth = _reach(components)
    os.close(descriptor)
    return [_joined(components[: end + 1]) for end in range(depth, len(components))]


def remove_directory(path: str) -> None:
    """Remove the empty directory ``path`` and sync its parent.

    Idempotent: what is missing is success. Raise `InUse` for one that is not empty or
    is a mountpoint, `InvalidArgument` for what is no directory.
    """
    try:
        with parent(path) as (directory, name):
            os.rmdir(name, dir_fd=directory)
            _sync(directory)
    except (NotFound, FileNotFoundError):
        return
    except NotADirectoryError as error:
        raise InvalidArgument(f"{path} is not a directory") from error
    except OSError as error:
        raise from_os_error(error, f"remove directory {path}") from error


def move(source: str, target: str) -> None:
    """Rename ``source`` to ``target``, which must not exist, and sync where it went.

    A rename is one transaction of a journaling file system: with the new entry the old
    one's absence is on disk too.

    A symbolic link is moved, not followed. Raise `AlreadyExists` when ``target`` is
    there, of any kind; `NotFound` when ``source`` is not; `InvalidArgument` for two
    file systems.
    """
    doing = f"move {source} to {target}"
    with parent(source) as (here, old), parent(target) as (there, new):
        try:
            renaming.rename_unless_there(here, old, there, new)
            _sync(there)
        except OSError as error:
            if error.errno == errno.EXDEV:
                raise InvalidArgument(
                    f"{doing}: they are on different file systems"
                ) from error
            raise from_os_error(error, doing) from error


def sync(path: str) -> None:
    """Bring the directory ``path``, its entries and its attributes onto the disk."""
    descriptor = open_directory(path)
    try:
        _sync(descriptor)
    except OSError as error:
        raise from_os_error(error, f"sync {path}") from error
    finally:
        os.close(descriptor)


def identity(path: str) -> tuple[int, int] | None:
    """Return device and inode number of ``path``, not followed; None if missing."""
    try:
        found = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise from_os_error(error, f"look at {path}") from error
    return found.st_dev, found.st_ino


def device_size(path: str) -> int | None:
    """Return the bytes of the block device that ``path`` is on; None without one.

    Btrfs, NFS, tmpfs and the like have devices of no kind that sysfs(5) knows.
    """
    try:
        device = os.stat(path).st_dev
        place = f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/size"
        with open(place, encoding="ascii") as size:
            return int(size.read()) * 512  # sectors of 512 bytes on every disk
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise from_os_error(error, f"look at the disk of {path}") from error


def _components(path: str) -> list[str]:
    if not path.startswith("/"):
        raise InvalidArgument(f"path {path!r} is not absolute")
    components = [component for component in path.split("/") if component]
    for component in components:
        if component in {".", ".."}:
            raise InvalidArgument(f"path {path!r} has a component {component!r}")
        try:
            encoded = os.fsencode(component)
        except UnicodeEncodeError as error:
            raise InvalidArgument(f"path {path!r} is no file name") from error
        if b"\0" in encoded:
            raise InvalidArgument(f"path {path!r} contains a NUL")
        if len(encoded) > _NAME_MAX:
            raise InvalidArgument(f"path {path!r} has a name over {_NAME_MAX} bytes")
    return components


def _joined(components: list[str]) -> str:
    return "/" + "/".join(components)


def _reach(components: list[str]) -> tuple[int, int]:
    # The deepest directory that exists: its descriptor, and how many components deep.
    descriptor = os.open("/", _STEP)
    for depth, name in enumerate(components):
        try:
            child = os.open(name, _STEP, dir_fd=descriptor)
        except FileNotFoundError:
            return descriptor, depth
        except OSError as error:
            refusal = _refusal(descriptor, components[: depth + 1], error)
            os.close(descriptor)
            raise refusal from error
        os.close(descriptor)
        descriptor = child
    return descriptor, len(components)


def _refusal(directory: int, components: list[str], error: OSError) -> VolpluginError:
    path = _joined(components)
    if error.errno == errno.ENOTDIR:
        try:
            target = os.readlink(components[-1], dir_fd=directory)
        except OSError:
            return InvalidArgument(f"{path} is not a directory")
        return InvalidArgument(
            f"{path} is a symbolic link to {target}; give the path without links"
        )
    return from_os_error(error, f"open directory {path}")


def _make(directory: int, name: str, mode: int) -> bool:
    try:
        os.mkdir(name, mode, dir_fd=directory)
    except FileExistsError:
        found = os.stat(name, dir_fd=directory, follow_symlinks=False)
        if not stat.S_ISDIR(found.st_mode):
            raise
        return False
    child = os.open(name, _READ, dir_fd=directory)
    try:
        # mkdir(2) takes the umask off and may add the parent's set-group-ID bit.
        if stat.S_IMODE(os.fstat(child).st_mode) != mode:
            os.fchmod(child, mode)
            _sync(child)
    finally:
        os.close(child)
    _sync(directory)
    return True


def _sync(directory: int) -> None:
    try:
        os.fsync(directory)
    except OSError as error:
        # fsync(2): EINVAL where the file system cannot sync a directory by itself.
        if error.errno != errno.EINVAL:
            raise
