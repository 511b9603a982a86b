"""Directories in CephFS that their users have: taken as they are, never deleted."""

import posixpath
from collections.abc import Callable, Iterable, Mapping

from volplugin.ceph.filesystem import FileSystem
from volplugin.drivers import ownership
from volplugin.drivers.cephfs_limits import QUOTA_BEFORE, limits_of, quota_before
from volplugin.drivers.cephfs_mounting import ADOPTED, ENTRY
from volplugin.drivers.driver import Spec
from volplugin.errors import AlreadyExists, InvalidArgument
from volplugin.failpoints import hit
from volplugin.host import mountinfo
from volplugin.model import Volume


class Adopted:
    """The directories that volumes of one backend were given by ``path=``."""

    def __init__(
        self, files: FileSystem, base: str, volumes: Callable[[], Iterable[Volume]]
    ) -> None:
        self._files = files
        self._base = base
        self._volumes = volumes

    def plan(self, path: str) -> Mapping[str, str]:
        """Return the facts of a volume that is this directory; refuse what can't be."""
        if _overlap(path, self._base):
            raise InvalidArgument(
                f"path={path}: {self._base} is volplugin's own: choose a directory that"
                f" is neither in it nor above it"
            )
        try:
            is_there = self._files.exists(path)
        except NotADirectoryError as error:
            raise InvalidArgument(f"path={path} is not a directory") from error
        if not is_there:
            raise InvalidArgument(
                f"path={path}: the file system has no such directory: make it first, or"
                f" leave path out"
            )
        above = path
        while above != "/":
            self._require_free(above, "")
            above = posixpath.dirname(above)
        for volume in self._volumes():
            if _overlap(path, volume.facts.get(ENTRY, "/")):
                raise AlreadyExists(
                    f"path={path}: volume {volume.name!r} has {volume.facts[ENTRY]};"
                    f" two volumes can't share files: choose another directory"
                )
        before = self._files.quota(path)
        return {
            ENTRY: path,
            ADOPTED: "yes",
            QUOTA_BEFORE: f"{before.size or 0},{before.inodes or 0}",
        }

    def make(self, spec: Spec) -> None:
        """Mark the directory as the volume's, and limit it as was asked."""
        path = spec.volume.facts[ENTRY]
        self._require_free(path, spec.volume.id)
        hit("cephfs.directory")
        self._files.set_quota(path, limits_of(spec))
        hit("cephfs.quota")
        self._files.write_record(path, spec.record)

    def release(self, spec: Spec) -> None:
        """Make the directory what it was. Idempotent; another volume's stays."""
        path = spec.volume.facts[ENTRY]
        found = self._files.record(path)
        if found is not None and ownership.id_in(found) != spec.volume.id:
            return
        if self._files.exists(path):
            self._files.set_quota(path, quota_before(spec.volume))
            hit("cephfs.release")
            self._files.clear_record(path)

    def _require_free(self, path: str, volume_id: str) -> None:
        found = self._files.record(path)
        if found is not None and ownership.id_in(found) != volume_id:
            raise AlreadyExists(
                f"path={path} is the directory of volume {ownership.name_in(found)!r};"
                f" remove that volume first"
            )


def _overlap(one: str, other: str) -> bool:
    return mountinfo.is_within(one, other) or mountinfo.is_within(other, one)
