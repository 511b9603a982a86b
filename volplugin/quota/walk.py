"""Walking directory trees that others use meanwhile.

Like `volplugin.host.trees`, by descriptors, with one directory open at a time: no
symbolic link is followed, no mount entered, and depth costs no descriptors. The way up
is ``..``, checked against what was there on the way down.
"""

import contextlib
import errno
import os
from collections.abc import Callable
from typing import Final, Protocol

import attrs

from volplugin.errors import from_os_error
from volplugin.host import mountinfo, paths

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

# What an entry answers when others have removed it or put something else in its place.
CHANGED: Final = frozenset(
    {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.ENODEV, errno.ESTALE}
)


class Visitor(Protocol):
    """What is done with what a walk meets; `OSError` of either ends the walk."""

    def directory(self, descriptor: int) -> None:
        """Take a directory, the top included, before what it holds is listed."""

    def entry(self, directory: int, entry: "os.DirEntry[str]") -> None:
        """Take what is no directory; ``directory`` is the one it lies in."""


@attrs.frozen
class _Place:
    """Which directory it is, whatever its path."""

    device: int
    inode: int


@attrs.define
class _Level:
    """A directory on the way from the top to where the walk is."""

    name: str
    place: _Place
    subdirectories: list[str]


@attrs.define
class Count:
    """Counts what a walk meets as a project quota would: directories and files.

    ``size`` is bytes on the disk; an inode of many names counts once. ``seen`` counts
    all entries.
    """

    seen: int = 0
    size: int = 0
    inodes: int = 0
    _known: set[int] = attrs.field(factory=set)

    def directory(self, descriptor: int) -> None:
        """Count a directory."""
        self.seen += 1
        self._add(os.fstat(descriptor))

    def entry(self, directory: int, entry: "os.DirEntry[str]") -> None:
        """Count a regular file; the rest can't be given to a project."""
        self.seen += 1
        if not entry.is_file(follow_symlinks=False):
            return
        try:
            found = os.stat(entry.name, dir_fd=directory, follow_symlinks=False)
        except OSError as error:
            if error.errno in CHANGED:
                return
            raise
        if found.st_nlink > 1:
            if found.st_ino in self._known:
                return
            self._known.add(found.st_ino)
        self._add(found)

    def _add(self, found: os.stat_result) -> None:
        self.size += found.st_blocks * 512
        self.inodes += 1


def walk(path: str, visitor: Visitor, stop: Callable[[], bool]) -> bool:
    """Take ``visitor`` through the directory ``path`` and all below it.

    Each directory comes before what it holds. What is mounted below is left out, bind
    mounts too; what vanishes meanwhile is no error, and what is moved may be missed.
    ``stop`` is asked between entries; when it says so, return False. A ``path`` that is
    missing raises `NotFound`.
    """
    top = paths.open_directory(path)
    going = _Walk(path, top, mountinfo.mount_id(top), visitor, stop)
    try:
        return going.run()
    except OSError as error:
        raise from_os_error(error, f"walk through {path}") from error
    finally:
        going.close()


@attrs.define
class _Walk:
    path: str
    top: int
    mount: int
    visitor: Visitor
    stop: Callable[[], bool]
    here: int = -1  # the directory where the walk is, the last level's
    levels: list[_Level] = attrs.field(factory=list)

    def run(self) -> bool:
        self.here = os.dup(self.top)
        if not self._enter(""):
            return False
        while self.levels:
            if self.stop():
                return False
            level = self.levels[-1]
            if not level.subdirectories:
                self._ascend()
            elif not self._descend(level.subdirectories.pop()):
                return False
        return True

    def close(self) -> None:
        os.close(self.top)
        if self.here != -1:
            os.close(self.here)

    def _enter(self, name: str) -> bool:
        # Where the walk is now a directory that it has not seen.
        self.visitor.directory(self.here)
        level = _Level(name, _place(self.here), [])
        self.levels.append(level)
        with os.scandir(self.here) as entries:
            for entry in entries:
                if self.stop():
                    return False
                if entry.is_dir(follow_symlinks=False):
                    level.subdirectories.append(entry.name)
                else:
                    self.visitor.entry(self.here, entry)
        return True

    def _descend(self, name: str) -> bool:
        try:
            child = os.open(name, _DIRECTORY, dir_fd=self.here)
        except OSError as error:
            if error.errno in CHANGED:
                return True
            raise
        if mountinfo.mount_id(child) != self.mount:
            os.close(child)
            return True
        os.close(self.here)
        self.here = child
        return self._enter(name)

    def _ascend(self) -> None:
        self.levels.pop()
        if not self.levels:
            return
        with contextlib.suppress(OSError):
            parent = os.open("..", _DIRECTORY, dir_fd=self.here)
            if _place(parent) == self.levels[-1].place:
                os.close(self.here)
                self.here = parent
                return
            os.close(parent)
        self._return()

    def _return(self) -> None:
        """Go to the last level from the top, where the way up has changed.

        What is no longer where it was is left: it is someone else's by now, or gone.
        """
        os.close(self.here)
        self.here = os.dup(self.top)
        for depth, level in enumerate(self.levels[1:], start=1):
            try:
                child = os.open(level.name, _DIRECTORY, dir_fd=self.here)
            except OSError:
                del self.levels[depth:]
                return
            if _place(child) != level.place:
                os.close(child)
                del self.levels[depth:]
                return
            os.close(self.here)
            self.here = child


def _place(descriptor: int) -> _Place:
    found = os.fstat(descriptor)
    return _Place(found.st_dev, found.st_ino)
