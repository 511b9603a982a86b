"""What is known of RBD volumes without asking: for Status, from the last look."""

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from volplugin.ceph import image_snapshots
from volplugin.ceph.holding import Holding
from volplugin.ceph.images import Images
from volplugin.ceph.registry import Shared
from volplugin.drivers.driver import Spec
from volplugin.drivers.rbd_attaching import Attacher
from volplugin.drivers.rbd_notes import notes_of, size_of
from volplugin.errors import Unavailable, VolpluginError
from volplugin.host import mountinfo
from volplugin.model import Usage, Volume
from volplugin.sizes import format_size


class Overview:
    """The records as they were last read, and figures of what is mounted here."""

    def __init__(
        self,
        images: Images,
        holding: Callable[[], Holding],
        attacher: Attacher,
    ) -> None:
        self._images = images
        self._holding = holding
        self._attacher = attacher
        self._records: dict[str, Shared] = {}
        self._snapshots: dict[str, int] = {}
        self._mappers: dict[str, str] = {}

    def note(self, shared: Shared) -> None:
        """Remember the record as it is now."""
        known = self._records.get(shared.volume.id)
        # Those of a listing have no version, and are as new as can be told.
        if known is None or not shared.version or known.version <= shared.version:
            self._records[shared.volume.id] = shared

    def note_snapshots(self, volume_id: str, count: int) -> None:
        """Remember how many snapshots there are."""
        self._snapshots[volume_id] = count

    def forget(self, volume_id: str) -> None:
        """Remember nothing of the volume any more."""
        for known in (self._records, self._snapshots, self._mappers):
            known.pop(volume_id, None)

    def status(
        self, volume: Volume, options: Any, *, attached: bool
    ) -> Mapping[str, Any]:
        """Return what Status tells, from memory."""
        notes = notes_of(volume)
        status: dict[str, Any] = {
            "size": format_size(size_of(notes, options)),
            "fs": notes.fs,
            "image": str(notes.place),
            "access": notes.access,
            "origin": notes.origin.value,
            "encryption": notes.encryption or "none",
        }
        if volume.id in self._snapshots:
            status["snapshots"] = self._snapshots[volume.id]
        if attached and volume.id in self._mappers:
            status["mapper"] = self._mappers[volume.id]
        shared = self._records.get(volume.id)
        if shared is None:
            return status
        status["holder"] = (
            ", ".join(
                f"{each.host} ({each.address or 'address unknown'}) since {each.since}"
                for each in shared.holders
            )
            or "none"
        )
        lost = self._lost(shared) if attached else None
        dead = self._attacher.dead_mapper(volume) if attached else None
        if lost is not None:
            status["error"] = (
                f"{lost}: what this host has mounted gives errors; stop the containers"
                " that have it here"
            )
        elif dead is not None:
            status["error"] = dead
        return status

    def measure(self, specs: Sequence[Spec]) -> Mapping[str, Usage]:
        """Return what the volumes hold that are mounted here, by id. Blocks."""
        table = mountinfo.read()
        found, is_answering = {}, True
        for spec in specs:
            volume = spec.volume
            mapper = self._attacher.mapper_of(volume, table)
            if mapper is None:
                continue
            self._mappers[volume.id] = mapper.name
            if is_answering:
                try:
                    self._count_snapshots(volume)
                except Unavailable:
                    is_answering = False
                except VolpluginError:
                    pass
            with contextlib.suppress(OSError):  # as of a fenced mount
                found[volume.id] = _usage(spec)
        return found

    def _count_snapshots(self, volume: Volume) -> None:
        known = image_snapshots.snapshots(self._images, notes_of(volume).place)
        self._snapshots[volume.id] = len(known)

    def _lost(self, shared: Shared) -> str | None:
        try:
            return self._holding().lost(shared)
        except VolpluginError:
            return None


def _usage(spec: Spec) -> Usage:
    notes = notes_of(spec.volume)
    size = size_of(notes, spec.options)
    figures = os.statvfs(spec.volume.mountpoint)
    available = figures.f_bavail * figures.f_frsize
    return Usage(
        # The file system's own tables count: what is not available is used.
        used=max(size - available, 0),
        available=available,
        size=size,
        inodes_used=figures.f_files - figures.f_ffree,
        inodes=figures.f_files if notes.fs == "ext4" else None,
    )
