"""Deleting directory trees that someone else has filled.

The tree may be deeper than a path is long or a process has descriptors, may hold
symbolic links to anywhere, and may change meanwhile. It is walked by descriptors, with
one directory open at a time; the way up is ``..``, checked against what was there on
the way down.

On btrfs a tree may hold subvolumes, which anyone who may write there can make. They
have device numbers of their own but are no mounts, and go with all they hold at once,
unless there are others below them.
"""

import errno
import os
import stat
from collections.abc import Callable
from typing import Final

import attrs

from volplugin import failpoints
from volplugin.errors import InUse, InvalidArgument, NotFound, from_os_error
from volplugin.host import attributes, btrfs, mountinfo, paths, qgroup_removal, qgroups

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE: Final = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC

# Names of subdirectories kept in memory for one directory; more are read again later.
_BATCH: Final = 1000


def delete(path: str, *, stop: Callable[[], bool]) -> bool:
    """Delete the directory ``path`` with all that it contains.

    Idempotent: a missing path is success, and a call that ended early or failed can be
    repeated. No symbolic link is followed and no mount entered; immutable and
    append-only flags are cleared. Subvolumes of btrfs, ``path`` itself or below it, go
    with their qgroups. ``stop`` is asked between entries; when it says so, return False
    with the rest left. Raise `InUse` when something is mounted at or below it, before
    anything is deleted, or when others change the tree meanwhile.
    """
    try:
        with paths.parent(path) as (directory, name):
            walk = _start(path, directory, name)
            if walk is None:
                return True
            try:
                failpoints.hit("local.purge")
                done = walk.run(stop)
            finally:
                walk.close()
            # Afterwards: the kernel leaves a subvolume alone that someone has open.
            if walk.destroyed:
                qgroup_removal.remove_at(directory, stop)
            return done
    except NotFound:  # not even the directory that it would lie in
        return True
    except FileNotFoundError as error:
        raise InUse(f"delete {path}: others change it; end them first") from error
    except OSError as error:
        raise from_os_error(error, f"delete {path}") from error


def require_unmounted(path: str) -> None:
    """Raise `InUse` when something is mounted at ``path`` or below it."""
    for mount in mountinfo.read():
        if mountinfo.is_within(mount.mountpoint, path):
            raise InUse(
                f"{mount.kind} is mounted on {mount.mountpoint}; unmount it first"
            )


def _start(path: str, directory: int, name: str) -> "_Walk | None":
    require_unmounted(path)
    try:
        top = os.open(name, _DIRECTORY, dir_fd=directory)
    except FileNotFoundError:
        return None
    except NotADirectoryError as error:
        raise InvalidArgument(f"delete {path}: it is not a directory") from error
    try:
        return _Walk(
            path, directory, top, mountinfo.mount_id(top), [_Level.of(name, top)]
        )
    except OSError:
        os.close(top)
        raise


@attrs.define
class _Level:
    """A directory on the way from the top to where the walk is."""

    name: str
    device: int
    inode: int
    subvolume: int | None  # its id, at the root of one
    subdirectories: list[str] = attrs.field(factory=list)

    @classmethod
    def of(cls, name: str, descriptor: int) -> "_Level":
        found = os.fstat(descriptor)
        subvolume = None
        if btrfs.is_subvolume(descriptor):
            subvolume = btrfs.subvolume_id(descriptor)
        return cls(name, found.st_dev, found.st_ino, subvolume)


@attrs.define
class _Walk:
    path: str
    above: int  # the directory that the tree lies in
    here: int  # the directory where the walk is, the last level's
    mount: int
    levels: list[_Level]
    destroyed: bool = False  # a subvolume: its qgroup is to go as well

    def run(self, stop: Callable[[], bool]) -> bool:
        if stop():
            return False
        if self._destroyed(self.above, self.levels[0], self.here):
            return True
        while self.levels:
            if stop():
                return False
            level = self.levels[-1]
            if level.subdirectories:
                self._descend(level.subdirectories.pop())
            elif not self._empty(level, stop):
                return False
            elif not level.subdirectories:
                self._remove_and_ascend()
        return True

    def close(self) -> None:
        if self.here != self.above:
            os.close(self.here)

    def _empty(self, level: _Level, stop: Callable[[], bool]) -> bool:
        # Delete what is no directory and note what is one. A file system may leave
        # entries out while others are deleted, so only a pass that finds nothing says
        # that the directory is empty.
        while True:
            seen = False
            with os.scandir(self.here) as entries:
                for entry in entries:
                    seen = True
                    if entry.is_dir(follow_symlinks=False):
                        level.subdirectories.append(entry.name)
                        if len(level.subdirectories) == _BATCH:
                            return True
                    elif stop():
                        return False
                    else:
                        self._unlink(entry.name)
            if level.subdirectories or not seen:
                return True

    def _unlink(self, name: str) -> None:
        try:
            os.unlink(name, dir_fd=self.here)
        except (FileNotFoundError, IsADirectoryError):
            return  # others have changed it; the next pass sees what it is now
        except PermissionError:
            # EPERM also for an immutable or append-only file or directory of it.
            attributes.allow_changes(self.here)
            found = os.stat(name, dir_fd=self.here, follow_symlinks=False)
            if stat.S_ISREG(found.st_mode):
                file = os.open(name, _FILE, dir_fd=self.here)
                try:
                    attributes.allow_changes(file)
                finally:
                    os.close(file)
            os.unlink(name, dir_fd=self.here)

    def _descend(self, name: str) -> None:
        try:
            child = os.open(name, _DIRECTORY, dir_fd=self.here)
        except (FileNotFoundError, NotADirectoryError):
            return  # others have changed it; the next pass sees what it is now
        try:
            level = self._level_of(name, child)
            if not self._destroyed(self.here, level, child):
                self.levels.append(level)
                self.here, child = child, self.here
        except FileNotFoundError:
            return  # as above
        finally:
            os.close(child)

    def _level_of(self, name: str, child: int) -> _Level:
        if mountinfo.mount_id(child) != self.mount:
            raise InUse(
                f"delete {self.path}: {self._shown(name)} is another file system; "
                "unmount it first"
            )
        return _Level.of(name, child)

    def _destroyed(self, parent: int, level: _Level, child: int) -> bool:
        # Delete a subvolume whole; one with others below it is made ready to be walked.
        if level.subvolume is None:
            return False
        require_unmounted(self.path)  # the kernel would detach what is mounted below
        try:
            gone = btrfs.destroy_at(parent, level.name)
        except PermissionError:
            qgroups.lift_limit_at(parent, level.subvolume)
            btrfs.allow_writes(child)
            self._allow_changes(parent, child)
            try:
                gone = btrfs.destroy_at(parent, level.name)
            except PermissionError as error:
                raise InUse(
                    f"delete {self.path}: subvolume {self._shown(level.name)} can't be "
                    "deleted: it is the file system's default, is being sent, or has "
                    "an active swap file; end that first"
                ) from error
        if gone:
            qgroup_removal.note_at(parent, level.subvolume)
            self.destroyed = True
            return True
        # At its limit it has no room for the changes that deleting makes. They count
        # for the subvolume whose descriptor is used: the one above has room by now.
        qgroups.lift_limit_at(parent, level.subvolume)
        btrfs.allow_writes(child)
        return False

    def _remove_and_ascend(self) -> None:
        level = self.levels[-1]
        if len(self.levels) == 1:
            parent = self.above
        else:
            above = self.levels[-2]
            parent = os.open("..", _DIRECTORY, dir_fd=self.here)
            found = os.fstat(parent)
            if (found.st_dev, found.st_ino) != (above.device, above.inode):
                os.close(parent)
                raise InUse(f"delete {self.path}: {self._shown()} was moved meanwhile")
        child, self.here = self.here, parent
        self.levels.pop()
        try:
            if not self._destroyed(parent, level, child):
                self._rmdir(parent, level.name, child)
        finally:
            os.close(child)

    def _rmdir(self, parent: int, name: str, child: int) -> None:
        try:
            os.rmdir(name, dir_fd=parent)
        except FileNotFoundError:
            return
        except PermissionError:
            self._allow_changes(parent, child)
            os.rmdir(name, dir_fd=parent)
        except OSError as error:
            if error.errno in {errno.ENOTEMPTY, errno.ENOTDIR}:
                raise InUse(
                    f"delete {self.path}: others write to {self._shown(name)};"
                    " end them first"
                ) from error
            raise

    def _allow_changes(self, parent: int, child: int) -> None:
        attributes.allow_changes(child)
        if parent != self.above:  # the directory above the tree is not ours to change
            attributes.allow_changes(parent)

    def _shown(self, *names: str) -> str:
        # Below the top, and short: the tree may be deeper than a log line is long.
        below = "/".join([*(level.name for level in self.levels[1:]), *names])
        return f"…{below[-200:]}" if len(below) > 200 else below
