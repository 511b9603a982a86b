"""The life of a volume: intent, driver, commit; and what undoes each when it fails.

Whoever calls a method that changes a volume holds that volume's lock and lets no
cancellation through. Reads need no lock: they come from the store's memory.
"""

import contextlib
import logging
from collections.abc import Mapping
from typing import Any

import attrs

from volplugin import options
from volplugin.attachments import Attachments
from volplugin.backends import Backend
from volplugin.catalog import Catalog, is_shown
from volplugin.creating import Creator
from volplugin.doors import ANY_DOOR, Door
from volplugin.drivers.driver import Disowns
from volplugin.errors import (
    AlreadyExists,
    InvalidArgument,
    Unavailable,
    VolpluginError,
)
from volplugin.failpoints import hit
from volplugin.logs import log
from volplugin.model import State, Volume
from volplugin.resizing import Resizer
from volplugin.sharing import Sharing, is_shared
from volplugin.store.store import DropVolume, PutVolume

logger = logging.getLogger(__name__)


class Core:
    """Makes and removes volumes, in step with the store and the backends."""

    def __init__(self, catalog: Catalog, attachments: Attachments) -> None:
        self.catalog = catalog
        self.attachments = attachments
        self.creator = Creator(catalog)
        self.resizer = Resizer(catalog)
        self.sharing = Sharing(catalog)
        self._store = catalog.store
        self._backends = catalog.backends

    async def create(
        self, name: str, asked: Mapping[str, str], door: Door = ANY_DOOR
    ) -> bool:
        """Make the volume; return False if it was there with the same options.

        Raise `AlreadyExists` naming each difference if its options are others. What a
        failed create made is undone before the error is raised.
        """
        common = options.split_common(asked)
        if common.help:
            raise InvalidArgument(self._help(common.backend, door))
        backend = self._backends.pick(common.backend, door)
        parsed: Any = options.parse(
            backend.driver.Options,
            common.rest,
            subject=f"driver {backend.driver.name}",
        )
        known = await self._known(backend, name)
        if known is not None:
            self._require_same(known, backend, common.backend, parsed, door)
            return False
        try:
            await self.creator.make(name, backend, common.rest, parsed)
        except AlreadyExists:
            # Another host was first, if the backend is shared: then it is as above.
            await self.sharing.look_up(backend, name)
            known = self._store.volumes.get(name)
            if known is None or known.state is not State.READY:
                raise
            self._require_same(known, backend, common.backend, parsed, door)
            return False
        return True

    async def _known(self, backend: Backend, name: str) -> Volume | None:
        """Return the volume that has the name, here or in the cluster of ``backend``.

        What is unfinished is settled before.
        """
        known = self._store.volumes.get(name)
        if known is not None and known.state is not State.READY:
            await self.settle_unfinished(known)
        elif known is not None:
            # Another host may just have removed it. While the cluster is out of reach
            # what was last known of it holds, as for Get.
            owner = self._backends.get(known.backend)
            if owner is not None:
                with contextlib.suppress(VolpluginError):
                    await self.sharing.refresh(owner, name)
        known = self._store.volumes.get(name)
        if known is None:
            await self.sharing.look_up(backend, name)
            known = self._store.volumes.get(name)
        return known

    def _help(self, backend: str | None, door: Door) -> str:
        driver = self._backends.pick(backend, door).driver
        told = f"options of driver {driver.name}:\n{options.describe(driver.Options)}"
        names = [each.name for each in self._backends.behind(door)]
        if len(names) == 1:
            return told
        return (
            f"{told}\nfor another driver or backend: -o driver=NAME -o help; there are "
            f"{', '.join(names)}"
        )

    def _require_same(
        self,
        known: Volume,
        backend: Backend,
        asked: str | None,
        parsed: Any,
        door: Door,
    ) -> None:
        if not is_shown(known, door):
            raise AlreadyExists(
                f"a volume of backend {known.backend} has this name, which this socket "
                f"does not show: choose another name, or remove that one through a "
                f"socket that serves {known.backend}"
            )
        if known.backend != backend.name:
            raise AlreadyExists(
                f"it exists with other options: driver is {known.backend}, "
                f"{'asked for' if asked else 'the default is'} {backend.name}"
            )
        differences = options.differences(self.catalog.spec(known).options, parsed)
        if differences:
            raise AlreadyExists(
                f"it exists with other options: {'; '.join(differences)}. Remove it "
                f"first, or use another name"
            )

    async def remove(self, name: str, door: Door = ANY_DOOR) -> None:
        """Remove the volume; raise `InUse` naming who holds it.

        A failed removal leaves the volume as it was. Where its cluster does not answer
        any more, nobody knows how far it came: it is settled when that does again.
        """
        volume = self.catalog.get(name, door)
        if volume.state is State.REMOVING:
            await self.finish_removal(volume)
            return
        backend = self.catalog.backend(volume)
        await self.attachments.require_unused(volume)
        try:
            await self.attachments.let_go(volume)
        except Unavailable:
            # Who holds it may be gone for good: whether it can be removed all the same
            # is the driver's to tell.
            if not isinstance(backend.driver, Disowns):
                raise
        removing = attrs.evolve(volume, state=State.REMOVING)
        await self._store.commit(PutVolume(removing))
        hit("core.remove.intent")
        try:
            await backend.run(backend.driver.remove, self.catalog.spec(removing))
        except BaseException as error:
            if not (isinstance(error, Unavailable) and is_shared(backend)):
                await self._store.commit(PutVolume(volume))
            raise
        hit("core.remove.driver")
        await self._forget(removing)

    async def finish_removal(self, volume: Volume) -> None:
        """Carry on a removal whose intent is written."""
        backend = self.catalog.backend(volume)
        await backend.run(backend.driver.remove, self.catalog.spec(volume))
        hit("core.recover.remove")
        await self._forget(volume)

    async def _forget(self, volume: Volume) -> None:
        await self._store.commit(DropVolume(volume.name))
        hit("core.remove.commit")
        self.catalog.forget(volume)
        self.attachments.torn.discard(volume.name)
        self.catalog.backend(volume).purge_soon()

    async def settle_unfinished(self, volume: Volume) -> None:
        """Undo a create or finish a removal that an error left behind.

        Not of a shared volume that is whole in its cluster: other hosts may have
        written to it since. It is then ready here too.
        """
        if volume.state is not State.READY and await self._is_kept(volume):
            return
        if volume.state is State.CREATING:
            await self.creator.undo(volume)
        elif volume.state is State.REMOVING:
            await self.finish_removal(volume)
        elif volume.pending:
            await self.resizer.finish(volume)

    async def _is_kept(self, volume: Volume) -> bool:
        backend = self.catalog.backend(volume)
        if not is_shared(backend):
            return False
        found = await self.sharing.find_whole(backend, volume)
        if found is None:
            return False
        await self._store.commit(PutVolume(found))
        log(
            logger,
            logging.WARNING,
            "kept: other hosts have had it ready since",
            volume=volume.name,
            state=volume.state.value,
        )
        return True

    async def settle(self, name: str) -> None:
        """Finish what `unsettled` named, if it still is."""
        volume = self._store.volumes.get(name)
        if volume is None:
            return
        await self.settle_unfinished(volume)
        if volume.state is not State.READY:
            return
        volume = self._store.volumes[name]
        known = self.catalog.mounts(name)
        mounts = await self.attachments.without_left_behind(volume, known)
        if not mounts.holders:
            self.attachments.torn.discard(name)
        if mounts != known or (mounts.attached and not mounts.holders):
            await self.attachments.release(volume, mounts)
        elif name in self.attachments.torn:
            await self.attachments.restore(volume)

    def unsettled(self) -> list[str]:
        """Name the volumes that `VolumeManager.sweep` should look at again."""
        names = [
            volume.name
            for volume in self._store.volumes.values()
            if volume.state is not State.READY or volume.pending
        ]
        self.attachments.look_for_torn()
        names += self.attachments.doubtful()
        return list(dict.fromkeys([*names, *self.attachments.torn]))
