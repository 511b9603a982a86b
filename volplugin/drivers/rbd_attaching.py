"""RBD volumes on this host: held, mapped and mounted, and back.

In this order: the volume is held in its record, the image mapped, the mapping's client
noted in the record (so that others can fence it before it has written anything), the
file system checked and mounted. Detach goes the other way. Each step can be repeated,
and what a death left of a mapping is taken away before there is a new one.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, cast

import attrs

from volplugin.ceph.holding import Conflict, Holding
from volplugin.ceph.images import Images, View
from volplugin.ceph.mappers import Mapper, Target, choose, mappers
from volplugin.ceph.registry import Registry, Shared
from volplugin.drivers import mountpoints, rbd_roots
from volplugin.drivers.driver import Spec
from volplugin.drivers.rbd_notes import Notes, Origin, notes_of
from volplugin.drivers.rbd_options import RbdConfig
from volplugin.drivers.rbd_secrets import secret_of
from volplugin.errors import (
    InUse,
    InvalidArgument,
    NotFound,
    Unavailable,
    VolpluginError,
)
from volplugin.failpoints import hit
from volplugin.host import filesystems, mountinfo, mounts, nodes, superblocks
from volplugin.host.mountinfo import Mount
from volplugin.host.mounts import MountFlag
from volplugin.host.patience import outwait
from volplugin.logs import log
from volplugin.model import State, Volume

logger = logging.getLogger(__name__)

_AUTO: Final = "auto"
_UNMAP_WAIT: Final = 5.0  # seconds for others to let go of a device


class Attacher:
    """Attaches and detaches the volumes of one backend on this host."""

    def __init__(
        self,
        config: RbdConfig,
        images: Images,
        registry: Registry,
        holding: Callable[[], Holding],
        place: str,
    ) -> None:
        self._config = config
        self._images = images
        self._registry = registry
        self._holding = holding
        self._mappers = mappers(place)

    def attach(self, spec: Spec, make_mountpoint: Callable[[], None]) -> Shared:
        """Mount the volume; return its record as it is then. Idempotent.

        ``make_mountpoint`` makes the guarded mountpoint where it is missing. Errors as
        for `Driver.attach`; `InUse` names the host that has the volume.
        """
        volume, notes = spec.volume, notes_of(spec.volume)
        table = mountinfo.read()
        mapper = self.mapper_of(volume, table)
        if mapper is not None:
            return self._require_ours(volume, notes, mapper)
        shared = self._current(volume)
        if not mountpoints.require_ready(spec, table):
            make_mountpoint()
        secret_of(notes)
        target = self.target(volume.id, notes)
        # Before the volume is held: what a death left would pass for a stranger.
        reusable = self._clear(target, shared)
        chosen = reusable or choose(self._mappers, self._wanted(), target)
        try:
            # A program takes as long to start as the cluster to answer.
            with ThreadPoolExecutor(1) as beside:
                ready = None if reusable else beside.submit(chosen.prepare, target)
                with self._opened(notes) as view:
                    shared = self._hold(spec, notes, view)
                    hit("rbd.hold")
                    if ready is not None:
                        ready.result()
                    return self._map_and_mount(spec, notes, chosen, shared, view)
        except BaseException:
            self._take_back(volume, notes)
            raise

    def detach(self, volume: Volume) -> None:
        """Unmount, unmap and release the volume. Idempotent.

        Raise `Unavailable`, with all of it as it was, while the cluster does not answer
        to a volume that is mounted: unmounting would wait for it without limit.
        """
        notes = notes_of(volume)
        hit("rbd.detach")
        while (mapper := self.mapper_of(volume, mountinfo.read())) is not None:
            self._require_answer(volume, notes, mapper)
            mounts.unmount(volume.mountpoint)
        hit("rbd.unmounted")
        self._unmap(self.target(volume.id, notes))
        hit("rbd.unmapped")
        self._release(volume, notes)

    def mapper_of(self, volume: Volume, table: Sequence[Mount]) -> Mapper | None:
        """Return what maps the image that is mounted where the volume is; else None.

        No I/O but a look into the kernel's own tables.
        """
        found = mountinfo.at(volume.mountpoint, table)
        if found is None or found.root != "/":
            return None
        try:
            target = self.target(volume.id, notes_of(volume))
        except Unavailable:
            return None
        for mapper in self._mappers.values():
            if mapper.is_mapped_by(target, found):
                return mapper
        return None

    def dead_mapper(self, volume: Volume) -> str | None:
        """Say that what maps the mounted volume is dead; None if it is not. No I/O."""
        mapper = self.mapper_of(volume, mountinfo.read())
        if mapper is None or mapper.alive(self.target(volume.id, notes_of(volume))):
            return None
        return _dead(mapper)

    def target(self, volume_id: str, notes: Notes) -> Target:
        """Return the volume's image as it is to be mapped."""
        return Target(
            access=self._images.cluster.access,
            pool=notes.pool,
            namespace=self._images.namespace,
            image=notes.image,
            key=volume_id,
            read_only=notes.is_read_only,
            encryption=notes.encryption or None,
            key_file=notes.encryption_key or None,
        )

    def _wanted(self) -> str | None:
        return None if self._config.mapper == _AUTO else self._config.mapper

    def _current(self, volume: Volume) -> Shared:
        shared = self._registry.read(volume.name)
        if shared is None or shared.volume.id != volume.id:
            raise NotFound(
                "the cluster has no such volume any more: another host has removed it"
            )
        if shared.volume.state is not State.READY:
            raise Unavailable(
                f"it is being {_doing(shared.volume)} by {shared.maker or 'a host'}:"
                " try again when that is done"
            )
        return shared

    @contextlib.contextmanager
    def _opened(self, notes: Notes) -> Iterator[View]:
        with contextlib.ExitStack() as stack:
            try:
                view = stack.enter_context(self._images.view(notes.place))
            except NotFound as error:
                raise Unavailable(
                    f"image {notes.place} is missing: restore it from the trash (`rbd"
                    " trash restore`) or a backup, or remove the volume"
                ) from error
            if notes.image_id and view.id != notes.image_id:
                raise Unavailable(
                    f"image {notes.place} is another one than the volume was made of"
                )
            yield view

    def _hold(self, spec: Spec, notes: Notes, view: View) -> Shared:
        volume = spec.volume
        conflict = spec.options.on_conflict or self._config.on_conflict
        shared = self._holding().hold(
            volume.name,
            volume.id,
            access=notes.access,
            conflict=cast(Conflict, conflict),
            watchers=view.watchers,
            limit=self._config.wait_limit,
        )
        if shared.volume.state is not State.READY:
            self._holding().release(volume.name, volume.id)
            self._current(volume)
        return shared

    def _map_and_mount(
        self, spec: Spec, notes: Notes, mapper: Mapper, shared: Shared, view: View
    ) -> Shared:
        volume = spec.volume
        target = self.target(volume.id, notes)
        device = mapper.map(target)
        hit("rbd.mapped")
        shared = self._holding().note_addresses(volume.name, volume.id, view.watchers())
        hit("rbd.noted")
        is_clean = superblocks.is_clean(device, notes.fs)
        if not notes.is_read_only:
            self._check(device, notes, is_clean=is_clean and not shared.unclean)
        hit("rbd.checked")
        self._mount(spec, notes, device, is_clean=is_clean)
        hit("rbd.mounted")
        if self.mapper_of(volume, mountinfo.read()) is None:
            raise Unavailable(
                f"{device} was mounted on {volume.mountpoint} and is not there"
            )
        rbd_roots.set_up(spec, notes)
        if not notes.is_read_only:
            self._fill_device(device, volume, notes)
        if shared.unclean and not notes.is_read_only:
            shared = self._registry.change(volume.name, volume.id, _cleaned)
        return shared

    def _check(self, device: str, notes: Notes, *, is_clean: bool) -> None:
        """Check the file system before it is mounted, where the setting says so.

        XFS replays its log when it is mounted, and is checked in no other way.
        """
        policy = self._config.fsck
        if policy == "never" or (is_clean and policy != "always"):
            return
        said = " ".join(filesystems.check(device, notes.fs).split())
        if said:
            event = "a file system was checked before its mount"
            log(logger, logging.INFO, event, image=str(notes.place), e2fsck=said)

    def _mount(self, spec: Spec, notes: Notes, device: str, *, is_clean: bool) -> None:
        flags, words = MountFlag(0), []
        if notes.fs == "xfs":
            words.append("nouuid")  # a clone has the id of its source
        if notes.is_read_only:
            flags = MountFlag.RDONLY
            if notes.fs == "ext4" and not is_clean:
                words.append("noload")  # its journal can't be replayed
        else:
            words += ["discard"] if spec.options.discard else []
            if notes.fs == "ext4" and notes.origin is Origin.NEW:
                # New images read as zeros; see `quota.image_mounts` for lost+found.
                words.append("noinit_itable")
        path = spec.volume.mountpoint
        try:
            mounts.mount(device, path, notes.fs, flags=flags, data=",".join(words))
        except VolpluginError as error:
            if notes.is_read_only and notes.fs == "xfs":
                words.append("norecovery")
                data = ",".join(words)
                mounts.mount(device, path, notes.fs, flags=flags, data=data)
            elif isinstance(error, InvalidArgument):
                raise Unavailable(
                    f"{error}: the {notes.fs} in {notes.place} is damaged, or this"
                    " kernel lacks a feature of it; `dmesg` says which"
                ) from error
            else:
                raise

    def _fill_device(self, device: str, volume: Volume, notes: Notes) -> None:
        # A clone may be larger than its source, and a resize may wait for this mount.
        path = volume.mountpoint
        try:
            spans = superblocks.size_mounted(device, path, notes.fs)
            length = nodes.size_of(os.path.basename(device))
            if spans + filesystems.DEFAULT_BLOCK * 16 <= length:
                filesystems.grow(device, path, notes.fs)
                hit("rbd.grown")
        except VolpluginError as error:  # smaller than asked for, but there
            event = "a file system could not be grown"
            log(logger, logging.WARNING, event, volume=volume.name, error=str(error))

    def _require_ours(self, volume: Volume, notes: Notes, mapper: Mapper) -> Shared:
        shared = self._current(volume)
        lost = self._holding().lost(shared)
        if lost is not None:
            raise Unavailable(
                f"it is {lost}: what this host has mounted gives errors; stop the"
                " containers that have it here"
            )
        if not mapper.alive(self.target(volume.id, notes)):
            raise Unavailable(_dead(mapper))
        return shared

    def _require_answer(self, volume: Volume, notes: Notes, mapper: Mapper) -> None:
        if not mapper.alive(self.target(volume.id, notes)):
            return  # all I/O fails at once
        try:
            self._registry.read(volume.name)
            self._images.watchers(notes.place)  # the image's pool may be another
        except Unavailable as error:
            raise Unavailable(
                f"it stays mounted until the cluster answers, as what was written"
                f" could not be kept: {error}"
            ) from error

    def _clear(self, target: Target, shared: Shared) -> Mapper | None:
        """Unmap what is left of an earlier attach; return a mapper to be used again.

        That is one whose device a container still has, in a mount namespace of its own,
        under a hold of ours that nobody took.
        """
        for mapper in self._mappers.values():
            try:
                mapper.unmap(target)
            except InUse as error:
                lost = self._holding().lost(shared)
                if lost is None and mapper.alive(target):
                    return mapper
                raise Unavailable(
                    f"containers on this host still have it mounted, and it is"
                    f" {lost or 'cut off from its image'}: stop them"
                ) from error
        return None

    def _unmap(self, target: Target) -> None:
        def unmap() -> None:
            for mapper in self._mappers.values():
                mapper.unmap(target)

        outwait(unmap, _UNMAP_WAIT)

    def _release(self, volume: Volume, notes: Notes) -> None:
        """Be a holder no more, and let no client of ours that died look like one."""
        shared = self._registry.read(volume.name)
        if shared is None or shared.volume.id != volume.id:
            return
        if self._holding().lost(shared) is None and not notes.is_read_only:
            me = self._holding().me(notes.access)
            noted = {
                address
                for each in shared.holders
                if each.is_same(me)
                for address in each.addresses
            }
            for address in noted.intersection(self._images.watchers(notes.place)):
                self._images.cluster.blocklist(address)
        self._holding().release(volume.name, volume.id)

    def _take_back(self, volume: Volume, notes: Notes) -> None:
        """Undo an attach that failed; what can't be undone, `detach` tries again."""
        try:
            while self.mapper_of(volume, mountinfo.read()) is not None:
                mounts.unmount(volume.mountpoint)
            self._unmap(self.target(volume.id, notes))
            self._release(volume, notes)
        except (VolpluginError, OSError) as error:  # the first is the one to tell
            event = "an attach that failed could not be undone"
            log(logger, logging.WARNING, event, volume=volume.name, error=str(error))


def _cleaned(shared: Shared) -> Shared:
    return attrs.evolve(shared, unclean=False)


def _dead(mapper: Mapper) -> str:
    return (
        f"the program that mapped it ({mapper.name}) has died: stop the containers that"
        " have it here, and start them again"
    )


def _doing(volume: Volume) -> str:
    return "made" if volume.state is State.CREATING else "removed"
