"""What a new RBD volume will be: image, size and file system; or why it can't be."""

from typing import Final

import attrs

from volplugin.ceph import image_filling, image_snapshots
from volplugin.ceph.images import Image, Images
from volplugin.ceph.registry import Registry
from volplugin.drivers import ownership
from volplugin.drivers.rbd_notes import Notes, Origin, notes_of, size_of
from volplugin.drivers.rbd_options import DEFAULT_SIZE, RbdConfig, RbdOptions
from volplugin.drivers.rbd_secrets import NO_GROWTH, secret_of
from volplugin.errors import (
    AlreadyExists,
    InUse,
    InvalidArgument,
    Unavailable,
)
from volplugin.model import State, Volume
from volplugin.options import parse
from volplugin.quota import images as loop_images
from volplugin.sizes import format_size

_BEGIN: Final = 64  # characters of a volume's name in that of its image


class Planner:
    """Plans volumes for one backend. Looks at the cluster and changes nothing."""

    def __init__(self, config: RbdConfig, images: Images, registry: Registry) -> None:
        self._config = config
        self._images = images
        self._registry = registry

    def plan(self, name: str, volume_id: str, options: RbdOptions) -> Notes:
        """Decide what the volume will be. Errors as for `Driver.plan`."""
        self._require_backend(options)
        if options.image is not None:
            return self._adopted(options, options.image)
        notes = Notes(
            pool=options.pool or self._config.pool,
            image=f"{name[:_BEGIN]}.{volume_id[:12]}",
            fs=options.fs or self._config.fs,
            size=options.size or DEFAULT_SIZE,
            access=options.access,
        )
        if options.source is not None:
            notes = self._cloned(notes, options, options.source)
        else:
            notes = self._encrypted(notes, options)
            check_file_system(notes, options)
        self._images.require_place(notes.pool)
        if self._config.data_pool is not None:
            with self._images.pool(self._config.data_pool, "look at data-pool"):
                pass
        return notes

    def check_clone(
        self, source: Volume, snapshot: str | None, options: RbdOptions
    ) -> None:
        """Refuse what can't be cloned like this. No effect."""
        theirs = notes_of(source)
        size = size_of(theirs, parse(RbdOptions, source.options, subject="driver rbd"))
        if options.size is not None and options.size < size:
            raise InvalidArgument(
                f"size={format_size(options.size)} is less than its source has,"
                f" {format_size(size)}: give that or more, or leave size out"
            )
        for key, mine, other in (
            ("fs", options.fs, theirs.fs),
            ("encryption", options.encryption, theirs.encryption or "none"),
        ):
            if mine is not None and mine != other:
                raise InvalidArgument(
                    f"{key}={mine}: its source has {other}, and a copy is like it:"
                    f" leave {key} out"
                )
        if theirs.encryption and options.size not in {None, size}:
            raise InvalidArgument(
                f"size={format_size(options.size or 0)}: its source has"
                f" {format_size(size)}, and {NO_GROWTH}: leave size out"
            )
        if snapshot is not None:
            self._check_snapshot(source.name, theirs, snapshot)

    def _check_snapshot(self, name: str, theirs: Notes, snapshot: str) -> None:
        known = image_snapshots.snapshots(self._images, theirs.place)
        found = next((each for each in known if each.name == snapshot), None)
        if found is None:
            names = ", ".join(each.name for each in known) or "none"
            raise InvalidArgument(
                f"volume {name} has no snapshot {snapshot!r}; there are {names}"
            )
        if not theirs.encryption:
            return
        now = self._images.describe(theirs.place)
        if now is not None and now.size != found.size:
            raise InvalidArgument(
                f"snapshot {snapshot!r} was taken before volume {name} grew, and"
                f" {NO_GROWTH}: copy the volume as it is now, by from={name}"
            )

    def _cloned(self, notes: Notes, options: RbdOptions, source: str) -> Notes:
        name, _, snapshot = source.partition("@")
        found = self._registry.read(name)
        if found is None:
            raise InvalidArgument(
                f"there is no volume {name!r} in this backend to copy"
            )
        if found.volume.state is not State.READY:
            raise Unavailable(f"volume {name} is being made or removed: try again")
        theirs = notes_of(found.volume)
        before = parse(RbdOptions, found.volume.options, subject="driver rbd")
        notes = attrs.evolve(
            notes,
            origin=Origin.CLONE,
            fs=theirs.fs,
            size=options.size or size_of(theirs, before),
            snapshot=snapshot,
            encryption=theirs.encryption,
            encryption_key=options.encryption_key or theirs.encryption_key,
        )
        secret_of(notes)  # tells now what an attach would
        return notes

    def _adopted(self, options: RbdOptions, name: str) -> Notes:
        pool = options.pool or self._config.pool
        image = Image(pool=pool, name=name)
        found = self._images.describe(image)
        if found is None:
            raise InvalidArgument(f"image={name}: there is no image {image}")
        if found.owner is not None:
            owner = ownership.name_in(found.owner)
            raise AlreadyExists(f"image={name} is the image of volume {owner!r}")
        if found.watchers:
            raise InUse(
                f"image={name} is open at {', '.join(found.watchers)}: unmap it there"
            )
        notes = Notes(
            pool=pool,
            image=name,
            fs="",
            size=0,
            access=options.access,
            origin=Origin.ADOPTED,
            image_id=found.id,
        )
        notes = self._encrypted(notes, options)
        kind, size = image_filling.inspect(self._images, image, secret_of(notes))
        if kind is None:
            raise InvalidArgument(
                f"image={name} has neither an ext4 nor an XFS in it (on the whole of"
                " it, without partitions), and nothing that is there is formatted"
            )
        if options.fs not in {None, kind}:
            raise InvalidArgument(f"fs={options.fs}: image={name} has {kind}")
        if options.size not in {None, size}:
            raise InvalidArgument(
                f"size={format_size(options.size or 0)}: image={name} has"
                f" {format_size(size)}: leave size out"
            )
        return attrs.evolve(notes, fs=kind, size=size)

    def _encrypted(self, notes: Notes, options: RbdOptions) -> Notes:
        key = options.encryption_key or self._config.encryption_key
        if options.encryption is None:
            if options.encryption_key is not None:
                raise InvalidArgument(
                    "encryption-key is given without encryption=luks1 or luks2"
                )
            return notes
        if key is None:
            raise InvalidArgument(
                f"encryption={options.encryption} needs encryption-key, a file with the"
                " passphrase"
            )
        if self._config.mapper == "krbd":
            raise InvalidArgument(
                f"encryption={options.encryption}: the mapper krbd, which this backend"
                " is set to, knows none: set it to rbd-nbd or qemu, or leave"
                " encryption out"
            )
        notes = attrs.evolve(notes, encryption=options.encryption, encryption_key=key)
        secret_of(notes)
        return notes

    def _require_backend(self, options: RbdOptions) -> None:
        for key, asked, here in (
            ("conf", options.conf, self._config.conf),
            ("key", options.key, self._config.keyring or "where conf says"),
        ):
            if asked is not None and asked != here:
                raise InvalidArgument(
                    f"{key}={asked}: this backend has {here}. A cluster, and a user of"
                    " it, is one backend: write another [backend.NAME] with"
                    ' driver = "rbd", conf, user and keyring into the configuration,'
                    " and give driver=NAME"
                )


def check_file_system(notes: Notes, options: RbdOptions) -> None:
    """Raise `InvalidArgument` for a file system that can't be made. No effect."""
    image = loop_images.Image(
        path="", kind=notes.fs, size=notes.size, mkfs=options.mkfs
    )
    loop_images.check(image)
