"""Where volumes are in a file system: directories of ours, subvolumes, users' own.

Terms: the *base* is the directory that a backend's volumes are in. A volume's *entry*
is what is made and removed for it, and its *root* is the directory that containers
see: the entry itself, but for a subvolume, whose root the manager puts inside of it.
"""

import contextlib
import errno
import logging
import posixpath
from collections.abc import Callable
from typing import Final, Protocol

import attrs

from volplugin.ceph import fstrees
from volplugin.ceph.filesystem import FileSystem, Quota
from volplugin.ceph.fsmap import Subvolumes
from volplugin.errors import Unavailable
from volplugin.failpoints import hit
from volplugin.logs import log

logger = logging.getLogger(__name__)

_VOLUMES_MODE: Final = 0o711  # as a local backend's: names can't be listed by users
_SHORT_NAME: Final = 200  # a name has at most 255 bytes, an id of 12 comes behind


@attrs.frozen(kw_only=True)
class Wanted:
    """What a new volume's root is to be."""

    quota: Quota
    uid: int
    gid: int
    mode: int
    record: bytes


class Place(Protocol):
    """Makes and removes entries in one way. All is idempotent."""

    def entry(self, name: str, volume_id: str) -> str:
        """Return where the entry of a new volume will be. No effect."""

    def check(self) -> None:
        """Raise `Unavailable` where the user may not make entries. No effect.

        Before a volume is begun, as what is refused then could not be undone either.
        """

    def make(self, entry: str, wanted: Wanted) -> None:
        """Make the entry with its root."""

    def root(self, entry: str) -> str:
        """Return the root of an entry; raise `Unavailable` where it is missing."""

    def remove(self, entry: str, *, is_finished: bool) -> None:
        """Take the entry away, quickly; what was never finished in full."""

    def purge(self, stop: Callable[[], bool]) -> bool:
        """Delete what `remove` left; return whether all of it is gone."""


def unique(name: str, volume_id: str) -> str:
    """Return what a volume's entry is called: nothing of another volume ever is."""
    return f"{name[:_SHORT_NAME]}.{volume_id[:12]}"


class Directories:
    """Plain directories: ``BASE/volumes/NAME.ID``; ``BASE/trash`` for removed ones."""

    def __init__(self, files: FileSystem, base: str) -> None:
        self._files = files
        self._volumes = f"{base}/volumes"
        self._trash = f"{base}/trash"

    def entry(self, name: str, volume_id: str) -> str:
        """Return ``BASE/volumes/NAME.ID``."""
        return f"{self._volumes}/{unique(name, volume_id)}"

    def check(self) -> None:
        """Begin the session, which takes a right to the file system."""
        self._files.exists(self._volumes)

    def make(self, entry: str, wanted: Wanted) -> None:
        """Make the directory."""
        self._files.make_all(self._volumes, _VOLUMES_MODE)
        self._files.make(entry, 0o700)
        hit("cephfs.directory")
        _fill(self._files, entry, wanted)

    def root(self, entry: str) -> str:
        """Return the directory itself."""
        return entry

    def remove(self, entry: str, *, is_finished: bool) -> None:
        """Move it to the trash; an unfinished one is empty, and just removed."""
        if not is_finished:
            try:
                self._files.remove_empty(entry)
            except OSError as error:
                if error.errno != errno.ENOTEMPTY:
                    raise
            else:
                return
        self._files.make_all(self._trash, 0o700)
        self._files.move(entry, f"{self._trash}/{posixpath.basename(entry)}")
        hit("cephfs.trash")

    def purge(self, stop: Callable[[], bool]) -> bool:
        """Delete what is in the trash, as other hosts may at the same time."""
        done = True
        for name in self._files.names(self._trash):
            path = f"{self._trash}/{name}"
            try:
                done &= fstrees.remove(self._files, path, stop)
            except OSError as error:
                done = False
                log(
                    logger,
                    logging.WARNING,
                    "could not be deleted",
                    path=path,
                    error=str(error),
                )
        return done


class SubvolumeDirectories:
    """Subvolumes of a group: ``/volumes/GROUP/NAME.ID``, with the root inside."""

    def __init__(self, files: FileSystem, subvolumes: Subvolumes, base: str) -> None:
        self._files = files
        self._subvolumes = subvolumes
        self._base = base

    def entry(self, name: str, volume_id: str) -> str:
        """Return ``/volumes/GROUP/NAME.ID``."""
        return f"{self._base}/{unique(name, volume_id)}"

    def check(self) -> None:
        """Begin the session, and ask the manager something."""
        self._files.exists(self._base)
        self._subvolumes.check()

    def make(self, entry: str, wanted: Wanted) -> None:
        """Have the manager make it."""
        name = posixpath.basename(entry)
        self._subvolumes.make(name, uid=wanted.uid, gid=wanted.gid, mode=wanted.mode)
        hit("cephfs.directory")
        root = self._subvolumes.path(name)
        if root is None:
            raise Unavailable(f"subvolume {name} was made and is not there")
        _fill(self._files, root, wanted)

    def root(self, entry: str) -> str:
        """Return the directory in it that carries a record.

        Without the manager, which may be down while volumes are attached.
        """
        for name in self._files.names(entry):
            path = f"{entry}/{name}"
            if not name.startswith(".") and self._files.record(path) is not None:
                return path
        raise Unavailable(
            f"subvolume {entry} is missing, or its root lost its record: look at"
            f" `ceph fs subvolume ls`, or remove the volume"
        )

    def remove(self, entry: str, *, is_finished: bool) -> None:
        """Delete its snapshots, and have the manager delete the rest."""
        del is_finished
        if self._files.exists(entry):
            for kept in self._files.snapshots(entry):
                with contextlib.suppress(FileNotFoundError):
                    self._files.drop_snapshot(entry, kept.name)
        self._subvolumes.remove(posixpath.basename(entry))
        hit("cephfs.trash")

    def purge(self, stop: Callable[[], bool]) -> bool:
        """Leave it to the manager."""
        del stop
        return True


def _fill(files: FileSystem, root: str, wanted: Wanted) -> None:
    files.set_quota(root, wanted.quota)
    hit("cephfs.quota")
    files.write_record(root, wanted.record)
    files.set_root(root, wanted.uid, wanted.gid, wanted.mode)
