"""Roots and mountpoints of RBD volumes on this host.

A volume that another host made, or removed, has its mountpoint here made at the first
attach, or left here: a guarded directory ``volumes/NAME`` with the record of whose it
is. A *stale* one is that of a volume of ours that is not any more.
"""

import contextlib
import json
import os
from collections.abc import Container

from volplugin.drivers import mountpoints, ownership
from volplugin.drivers.driver import Spec
from volplugin.drivers.rbd_notes import Notes, Origin
from volplugin.errors import Unavailable, VolpluginError, from_os_error
from volplugin.failpoints import hit
from volplugin.host import attributes, guard, mountinfo, paths


class Mountpoints:
    """The mountpoints of one backend, in ``ROOT/volumes``."""

    def __init__(self, root: str, backend: str) -> None:
        self.directory = os.path.join(root, "volumes")
        self._backend = backend

    def open(self) -> None:
        """Make the directory that they are in."""
        paths.make_directories(self.directory, 0o711)

    def of(self, name: str) -> str:
        """Return where the volume ``name`` is."""
        return os.path.join(self.directory, name)

    def require_free(self, spec: Spec) -> None:
        """Raise `AlreadyExists` for what is none of ours; take a stale one away."""
        path = spec.volume.mountpoint
        if ownership.is_of(spec, path):
            return
        self.clear_stale(path, spec.volume.id)
        mountpoints.require_free(path)

    def make(self, spec: Spec) -> None:
        """Make the guarded mountpoint. Idempotent."""
        path = spec.volume.mountpoint
        paths.make_directory(path, 0o700)
        hit("rbd.mountpoint")
        if not ownership.is_of(spec, path):  # else it is guarded, from an earlier call
            attributes.write_record(path, spec.record)
        if mountinfo.at(path, mountinfo.read()) is None:
            guard.guard(path)
        hit("rbd.guard")

    def remove(self, spec: Spec) -> None:
        """Take the mountpoint away. Idempotent; errors as `mountpoints.take_back`."""
        if not mountpoints.is_of_another(spec):
            mountpoints.take_back(spec, [spec.volume.mountpoint])
        hit("rbd.unguard")

    def clear_stale(self, path: str, volume_id: str) -> None:
        """Take the mountpoint ``path`` away if it is another volume's of ours.

        The cluster has one volume of a name, so that one is gone. Anything that is
        mounted on it, or lies in it, stays.
        """
        record = attributes.read_record(path)
        if record is None or not self._is_ours(record):
            return
        if ownership.id_in(record) == volume_id or not _is_bare(path):
            return
        with contextlib.suppress(VolpluginError):
            guard.unguard(path)
            attributes.clear_record(path)
            paths.remove_directory(path)

    def sweep(self, known: Container[str], there: Container[str]) -> None:
        """Take away the mountpoints ``there`` whose volumes' ids aren't ``known``."""
        for name in self.names():
            path = self.of(name)
            if name in there and ownership.owner(path) is not None:
                record = attributes.read_record(path) or b""
                if ownership.id_in(record) not in known:
                    self.clear_stale(path, "")

    def names(self) -> list[str]:
        """Return the names of all mountpoints."""
        try:
            return os.listdir(self.directory)
        except FileNotFoundError:
            return []

    def _is_ours(self, record: bytes) -> bool:
        try:
            fields = json.loads(record)
            return (fields["driver"], fields["backend"]) == ("rbd", self._backend)
        except (ValueError, KeyError, TypeError):
            return False


def set_up(spec: Spec, notes: Notes) -> None:
    """Give the mounted root of a new volume its owner, mode and record. Idempotent.

    An adopted image keeps its root as it is. Raise `Unavailable` for the root of
    another volume.
    """
    path = spec.volume.mountpoint
    if notes.origin is Origin.ADOPTED or notes.is_read_only:
        return
    found = attributes.read_record(path)
    if found == spec.record:
        return
    if not ownership.is_of(spec, path):
        if found is not None and notes.origin is Origin.NEW:
            raise Unavailable(
                f"image {notes.place} holds the files of volume"
                f" {ownership.name_in(found)!r}"
            )
        _give(spec, path, is_new=notes.origin is Origin.NEW)
    attributes.write_record(path, spec.record)


def _give(spec: Spec, path: str, *, is_new: bool) -> None:
    options = spec.options
    uid, gid, mode = options.uid, options.gid, options.mode
    try:
        if is_new:
            # Docker copies an image's files into an empty volume only.
            with contextlib.suppress(FileNotFoundError):
                os.rmdir(os.path.join(path, "lost+found"))
            uid, gid = uid or 0, gid or 0
            mode = 0o755 if mode is None else mode
        if uid is not None or gid is not None:
            os.chown(path, -1 if uid is None else uid, -1 if gid is None else gid)
        if mode is not None:
            os.chmod(path, mode)
    except OSError as error:
        raise from_os_error(error, f"set up the root of {path}") from error


def _is_bare(path: str) -> bool:
    return mountinfo.at(path, mountinfo.read()) is None and not os.listdir(path)
