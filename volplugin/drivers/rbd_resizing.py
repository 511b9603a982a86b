"""RBD volumes made larger, mounted or not. None is ever made smaller.

The image grows first, then, where it is mounted on this host, its device and file
system; elsewhere the next attach lets the file system fill its device. The record comes
last. So a resize that was cut short, or taken back, may leave an image that is larger
than its record says, and the same resize asked for again is done at once.
"""

from collections.abc import Callable
from typing import Any

import attrs

from volplugin.ceph.images import Images
from volplugin.ceph.registry import Holder, Registry, Shared
from volplugin.drivers.driver import Spec
from volplugin.drivers.rbd_attaching import Attacher
from volplugin.drivers.rbd_notes import Origin, notes_of, size_of
from volplugin.drivers.rbd_secrets import NO_GROWTH, secret_of
from volplugin.errors import InUse, InvalidArgument, Unavailable, Unsupported
from volplugin.failpoints import hit
from volplugin.host import attributes, filesystems, mountinfo
from volplugin.model import Volume
from volplugin.sizes import format_size


class Resizer:
    """Resizes the volumes of one backend."""

    def __init__(
        self,
        images: Images,
        registry: Registry,
        attacher: Attacher,
        me: Callable[[], Holder],
    ) -> None:
        self._images = images
        self._registry = registry
        self._attacher = attacher
        self._me = me

    def plan(self, spec: Spec, options: Any) -> None:
        """Refuse what the volume can't become. No effect."""
        notes = notes_of(spec.volume)
        before, after = size_of(notes, spec.options), size_of(notes, options)
        if after < before:
            raise Unsupported(
                f"an RBD volume can't be made smaller, from {format_size(before)} to"
                f" {format_size(after)}: create one of the size you want, and copy"
            )
        if notes.is_read_only:
            raise InvalidArgument("access=ro: its file system can't be grown")
        if after > before and notes.encryption and notes.origin is Origin.CLONE:
            raise Unsupported(
                f"{NO_GROWTH}: create a volume of the size you want, and copy the files"
            )
        self._require_here(spec.volume)

    def resize(self, spec: Spec) -> None:
        """Make image and file system as large as the options say. Idempotent."""
        volume, notes = spec.volume, notes_of(spec.volume)
        self._require_here(volume)
        size = -(-size_of(notes, spec.options) // 4096) * 4096
        self._images.grow(notes.place, size, secret_of(notes))
        hit("rbd.resize")
        mapper = self._attacher.mapper_of(volume, mountinfo.read())
        if mapper is not None:
            target = self._attacher.target(volume.id, notes)
            mapper.grow(target)
            device = mapper.find(target)
            if device is None:
                raise Unavailable(
                    "its device is gone: stop the containers that have it"
                )
            filesystems.grow(device, volume.mountpoint, notes.fs)
            hit("rbd.grown")
            if attributes.read_record(volume.mountpoint) is not None:
                attributes.write_record(volume.mountpoint, spec.record)
        self._images.claim(notes.place, spec.record)
        self._write(volume)

    def _write(self, volume: Volume) -> None:
        def change(shared: Shared) -> Shared:
            self._require_no_other(shared)
            resized = attrs.evolve(shared.volume, options=volume.options)
            return attrs.evolve(shared, volume=resized)

        self._registry.change(volume.name, volume.id, change)

    def _require_here(self, volume: Volume) -> None:
        # The same value back writes nothing; name and id are looked at.
        def look(shared: Shared) -> Shared:
            self._require_no_other(shared)
            return shared

        self._registry.change(volume.name, volume.id, look)

    def _require_no_other(self, shared: Shared) -> None:
        me = self._me()
        others = [each.host for each in shared.holders if not each.is_same(me)]
        if others:
            raise InUse(f"it is attached on {', '.join(others)}: resize it there")
