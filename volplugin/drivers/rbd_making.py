"""RBD volumes made and removed: their records and images in the cluster.

The record comes first and goes last, so that whatever dies, the cluster tells of what
there is. A volume's state in the record is *ready* only after its file system is whole,
and no host attaches it before.
"""

import contextlib
import datetime as dt
import logging
from collections.abc import Callable
from typing import Final

import attrs

from volplugin.ceph import image_filling, image_snapshots, image_trash
from volplugin.ceph.image_snapshots import Origin as CloneOf
from volplugin.ceph.images import Image, Images, Shape
from volplugin.ceph.registry import Holder, Registry, Shared
from volplugin.drivers import ownership
from volplugin.drivers.driver import Spec
from volplugin.drivers.rbd_notes import Notes, Origin, notes_of
from volplugin.drivers.rbd_options import RbdConfig
from volplugin.drivers.rbd_secrets import secret_of
from volplugin.errors import (
    AlreadyExists,
    InUse,
    NotFound,
    Unavailable,
    VolpluginError,
)
from volplugin.failpoints import hit
from volplugin.host import filesystems
from volplugin.logs import log
from volplugin.model import State, Volume

logger = logging.getLogger(__name__)

# Images are whole blocks of every device that shows them.
_BLOCK: Final = 4096
# How long the making of a volume is left alone that its host may have left.
_LEFT_ALONE: Final = dt.timedelta(minutes=1)


class Maker:
    """Makes and removes the volumes of one backend."""

    def __init__(
        self,
        config: RbdConfig,
        images: Images,
        registry: Registry,
        me: Callable[[], Holder],
    ) -> None:
        self._config = config
        self._images = images
        self._registry = registry
        self._me = me

    def make(self, spec: Spec, scratch: str, mountpoint_of_source: str | None) -> None:
        """Make record and image. Idempotent; on disk at return.

        ``scratch`` is a path for a file meanwhile. ``mountpoint_of_source`` is where
        what is cloned is mounted on this host. Raise `AlreadyExists` when another host
        has made a volume of this name.
        """
        volume = spec.volume
        shared = self._begin(volume)
        if shared.volume.state is State.READY:
            return
        hit("rbd.recorded")
        notes = notes_of(volume)
        match notes.origin:
            case Origin.NEW:
                self._make_new(spec, notes, scratch)
            case Origin.CLONE:
                self._make_clone(spec, notes, mountpoint_of_source)
            case Origin.ADOPTED:
                self._adopt(spec, notes)
        hit("rbd.ready")

        def finish(shared: Shared) -> Shared:
            if shared.volume.state is State.REMOVING:
                raise Unavailable(
                    f"{shared.maker} took its making for left behind, and removed it:"
                    " try again"
                )
            ready = attrs.evolve(shared.volume, state=State.READY)
            return attrs.evolve(shared, volume=ready)

        self._registry.change(volume.name, volume.id, finish)

    def remove(self, volume: Volume) -> None:
        """Take image and record away, or undo a `make`. Idempotent.

        Raise `InUse` naming the hosts that have it, the clients that have its image
        open, or the volumes that are clones of it; it stays as it was then.
        """
        self._remove(volume, None)

    def _remove(self, volume: Volume, only_if: State | None) -> None:
        notes = notes_of(volume)
        is_undo = volume.state is State.CREATING
        if not is_undo and notes.origin is not Origin.ADOPTED:
            self._require_no_clones(notes)
        known = self._mark_removing(volume, only_if)
        hit("rbd.removing")
        try:
            if notes.origin is Origin.ADOPTED:
                self._release(volume, notes)
            elif is_undo:
                self._undo(volume, notes)
            else:
                image_trash.throw_away(self._images, notes.place)
        except VolpluginError:
            if known and not is_undo:
                self._mark_ready_again(volume)
            raise
        hit("rbd.trash")
        self._registry.remove(volume.name, volume.id)
        hit("rbd.forgotten")

    def _begin(self, volume: Volume) -> Shared:
        making = attrs.evolve(volume, state=State.CREATING)
        shared = Shared(volume=making, maker=self._me().host)
        for _ in range(2):
            try:
                self._registry.create(shared)
            except AlreadyExists:
                other = self._registry.read(volume.name)
                if other is not None and not self._settle_left(other):
                    raise
            else:
                return self._registry.read(volume.name) or shared
        raise AlreadyExists(f"other hosts make volumes of the name {volume.name}")

    def _settle_left(self, other: Shared) -> bool:
        """Finish what a host that died left of a volume; False if it did not."""
        volume = other.volume
        if volume.state is State.READY or other.holders:
            return False
        if volume.state is State.CREATING and not self._is_left(volume):
            return False
        log(
            logger,
            logging.WARNING,
            "a volume was left half made or half removed by its host: removed",
            volume=volume.name,
            host=other.maker,
        )
        try:
            self._remove(volume, other.volume.state)
        except InUse:
            return False  # it was finished, and taken, just now
        return True

    def _is_left(self, volume: Volume) -> bool:
        try:
            begun = dt.datetime.fromisoformat(volume.created_at)
        except ValueError:
            return False
        if dt.datetime.now(dt.UTC) - begun < _LEFT_ALONE:
            return False
        # Who fills an image has it open.
        return not self._images.watchers(notes_of(volume).place)

    def _make_new(self, spec: Spec, notes: Notes, scratch: str) -> None:
        secret, shape = secret_of(notes), self._shape(spec, notes)
        contents = image_filling.Contents(
            kind=notes.fs, label=spec.volume.name, options=spec.options.mkfs
        )
        self._afresh(
            notes.place,
            lambda: image_filling.make(
                self._images,
                notes.place,
                shape,
                contents,
                owner=spec.record,
                secret=secret,
                scratch=scratch,
            ),
        )

    def _make_clone(self, spec: Spec, notes: Notes, mountpoint: str | None) -> None:
        if spec.source is None:
            raise Unavailable("the volume that is to be copied is not known any more")
        theirs = notes_of(spec.source)
        snapshot = notes.snapshot
        if not snapshot:
            snapshot = _own_snapshot(spec.volume)
            if mountpoint is not None:
                filesystems.sync(mountpoint)
            with contextlib.suppress(AlreadyExists):  # from an earlier call
                image_snapshots.take(self._images, theirs.place, snapshot)
        hit("rbd.snapshot")
        origin = CloneOf(image=theirs.place, snapshot=snapshot)
        shape = self._shape(spec, notes)
        self._afresh(
            notes.place,
            lambda: image_snapshots.clone(self._images, origin, notes.place, shape),
        )
        hit("rbd.cloned")
        self._images.claim(notes.place, spec.record)
        self._images.grow(notes.place, shape.size, secret_of(notes))

    def _adopt(self, spec: Spec, notes: Notes) -> None:
        found = self._images.describe(notes.place)
        if found is None or found.id != notes.image_id:
            raise Unavailable(f"image {notes.place} was replaced or removed just now")
        if found.owner is not None and found.owner != spec.record:
            owner = ownership.name_in(found.owner)
            raise AlreadyExists(f"image {notes.place} is that of volume {owner!r}")
        self._images.claim(notes.place, spec.record)
        hit("rbd.adopted")

    def _shape(self, spec: Spec, notes: Notes) -> Shape:
        features = spec.options.asked_features
        return Shape(
            size=-(-notes.size // _BLOCK) * _BLOCK,
            features=self._config.features if features is None else features,
            object_size=spec.options.object_size or self._config.object_size,
            data_pool=self._config.data_pool,
        )

    def _afresh(self, image: Image, make: Callable[[], None]) -> None:
        """Make an image of a unique name: what is there is left of an earlier call."""
        try:
            make()
        except AlreadyExists:
            self._clear(image)
            make()

    def _clear(self, image: Image) -> None:
        """Remove what a `make` that was cut short left; the image has a unique name."""
        described = self._images.describe(image)
        # A process of ours that died had it open, or hangs: it must not write again.
        for address in described.watchers if described else ():
            self._images.cluster.blocklist(address)
        origin = image_snapshots.origin_of(self._images, image)
        self._images.remove(image)
        if origin is not None:
            image_snapshots.drop_unneeded(self._images, origin)

    def _undo(self, volume: Volume, notes: Notes) -> None:
        self._clear(notes.place)
        if notes.origin is not Origin.CLONE or notes.snapshot:
            return
        # Its own snapshot of the source may have been all that was made.
        source = self._registry.read(source_of(volume))
        if source is not None:
            image_snapshots.drop_unneeded(
                self._images,
                CloneOf(
                    image=notes_of(source.volume).place,
                    snapshot=_own_snapshot(volume),
                ),
            )

    def _release(self, volume: Volume, notes: Notes) -> None:
        found = self._images.describe(notes.place)
        if found is None or found.owner is None:
            return
        if ownership.id_in(found.owner) == volume.id:
            self._images.disclaim(notes.place)

    def _require_no_clones(self, notes: Notes) -> None:
        clones = image_snapshots.clones_of(self._images, notes.place)
        if clones:
            raise InUse(
                f"copies of it share its data: {', '.join(clones)}; remove them first"
            )

    def _mark_removing(self, volume: Volume, only_if: State | None) -> bool:
        """Write the intent to remove; return whether there is a record to carry it.

        Raise `InUse` where its state is another than ``only_if`` by now, or where this
        is to undo what another host was making, and has made.
        """
        me = self._me()
        stale: list[str] = []

        def begin(shared: Shared) -> Shared:
            others = [each for each in shared.holders if each.identity != me.identity]
            if others:
                raise InUse(_held_by(others))
            is_other = only_if not in {None, shared.volume.state}
            if is_other or shared.was_finished_for(me.host, volume):
                raise InUse(f"another host has made {volume.name}")
            stale.extend(
                address for each in shared.holders for address in each.addresses
            )
            removing = attrs.evolve(shared.volume, state=State.REMOVING)
            return attrs.evolve(shared, volume=removing, holders=(), maker=me.host)

        try:
            self._registry.change(volume.name, volume.id, begin)
        except (NotFound, AlreadyExists):
            return False  # gone already, or another host was first with this name
        for address in dict.fromkeys(stale):
            self._images.cluster.blocklist(address)  # of a mapper of ours that died
        return True

    def _mark_ready_again(self, volume: Volume) -> None:
        def back(shared: Shared) -> Shared:
            ready = attrs.evolve(shared.volume, state=State.READY)
            return attrs.evolve(shared, volume=ready, maker="")

        try:
            self._registry.change(volume.name, volume.id, back)
        except VolpluginError as error:  # the first error is the one to tell
            event = "a removal could not be taken back"
            log(logger, logging.WARNING, event, volume=volume.name, error=str(error))


def source_of(volume: Volume) -> str:
    """Return the name of the volume that one is a copy of, by its user's words."""
    words = volume.options
    return (words.get("from") or words.get("base") or "").partition("@")[0]


def _own_snapshot(volume: Volume) -> str:
    return f"{image_snapshots.OWN_PREFIX}{volume.id[:12]}"


def _held_by(holders: list[Holder]) -> str:
    hosts = ", ".join(
        f"{each.host} ({each.address or 'address unknown'}) since {each.since}"
        for each in holders
    )
    return (
        f"in use on {hosts}: stop its containers there, or, if that host is dead,"
        " `volplugin volume takeover`"
    )
