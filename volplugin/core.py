"""The life of a volume: intent, driver, commit; and what undoes each when it fails.

Whoever calls a method that changes a volume holds that volume's lock and lets no
cancellation through. Reads need no lock: they come from the store's memory.
"""

import asyncio
import logging
import uuid
from collections.abc import Mapping
from typing import Any

import attrs

from volplugin import options
from volplugin.attachments import Attachments
from volplugin.backends import Backend
from volplugin.catalog import Catalog, now
from volplugin.drivers.directories import overlap
from volplugin.drivers.driver import Plan
from volplugin.errors import AlreadyExists, InUse, InvalidArgument
from volplugin.failpoints import hit
from volplugin.logs import log
from volplugin.model import State, Volume
from volplugin.resizing import Resizer, require_room
from volplugin.store.store import DropVolume, PutVolume

logger = logging.getLogger(__name__)


class Core:
    """Makes and removes volumes, in step with the store and the backends."""

    def __init__(self, catalog: Catalog, attachments: Attachments) -> None:
        self.catalog = catalog
        self.attachments = attachments
        self.resizer = Resizer(catalog)
        self._store = catalog.store
        self._backends = catalog.backends
        self._choosing = asyncio.Lock()

    # Create

    async def create(self, name: str, asked: Mapping[str, str]) -> bool:
        """Make the volume; return False if it was there with the same options.

        Raise `AlreadyExists` naming each difference if its options are others. What a
        failed create made is undone before the error is raised.
        """
        common = options.split_common(asked)
        if common.help:
            raise InvalidArgument(self._help(common.backend))
        backend = self._backends.pick(common.backend)
        parsed: Any = options.parse(
            backend.driver.Options,
            common.rest,
            subject=f"driver {backend.driver.name}",
        )
        known = self._store.volumes.get(name)
        if known is not None and known.state is not State.READY:
            await self.settle_unfinished(known)
        elif known is not None:
            self._require_same(known, backend, common.backend, parsed)
            return False
        volume_id = uuid.uuid4().hex
        plan = await backend.run(backend.driver.plan, name, volume_id, parsed)
        volume = Volume(
            name=name,
            id=volume_id,
            backend=backend.name,
            driver=backend.driver.name,
            options=common.rest,
            facts=plan.facts,
            mountpoint=plan.mountpoint,
            created_at=now(),
        )
        spec = self.catalog.spec(volume)
        await require_room(self.catalog, backend, spec)
        await self._write_intent(volume, plan)
        hit("core.create.intent")
        ready = attrs.evolve(volume, state=State.READY)
        try:
            await backend.run(backend.driver.create, spec)
            hit("core.create.driver")
            await self._store.commit(PutVolume(ready))
        except BaseException:
            await self._undo_quietly(volume)
            raise
        hit("core.create.commit")
        self.catalog.usages.soon(backend.name)
        if plan.chosen:
            backend.purge_soon()  # a large tree may still have to be counted
        return True

    async def _write_intent(self, volume: Volume, plan: Plan) -> None:
        if not plan.chosen:
            await self._store.commit(PutVolume(volume))
            return
        # Two creates may choose one directory: look and write with none in between.
        async with self._choosing:
            path = plan.mountpoint
            reserved = overlap(path, self._backends.reserved())
            if reserved is not None:
                raise InvalidArgument(
                    f"mount={path}: {reserved} is volplugin's own: choose another "
                    f"directory"
                )
            for other in self._store.volumes.values():
                if overlap(path, [other.mountpoint]) is not None:
                    raise AlreadyExists(
                        f"mount={path}: volume {other.name!r} has {other.mountpoint}; "
                        f"two volumes can't share files: choose another directory"
                    )
            await self._store.commit(PutVolume(volume))

    def _help(self, backend: str | None) -> str:
        driver = self._backends.pick(backend).driver
        return (
            f"options of driver {driver.name}:\n{options.describe(driver.Options)}\n"
            f"for another driver or backend: -o driver=NAME -o help; there are "
            f"{', '.join(sorted(b.name for b in self._backends.all()))}"
        )

    def _require_same(
        self, known: Volume, backend: Backend, asked: str | None, parsed: Any
    ) -> None:
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

    async def undo(self, volume: Volume) -> None:
        """Take away what a create that did not finish has made, then its intent."""
        backend = self.catalog.backend(volume)
        await backend.run(backend.driver.remove, self.catalog.spec(volume))
        hit("core.recover.create")
        await self._store.commit(DropVolume(volume.name))
        backend.purge_soon()

    async def _undo_quietly(self, volume: Volume) -> None:
        try:
            await self.undo(volume)
        except Exception as error:  # noqa: BLE001  the create's own is what is raised
            log(
                logger,
                logging.ERROR,
                "undo failed, to be tried again",
                volume=volume.name,
                error=str(error),
            )

    # Remove

    async def remove(self, name: str) -> None:
        """Remove the volume; raise `InUse` naming who holds it.

        A failed removal leaves the volume as it was.
        """
        volume = self.catalog.get(name)
        if volume.state is State.REMOVING:
            await self.settle_unfinished(volume)
            return
        backend = self.catalog.backend(volume)
        await self.attachments.require_unused(volume)
        mounts = self.catalog.mounts(name)
        if mounts.attached:
            await self.attachments.release(volume, attrs.evolve(mounts, holders={}))
            if self.catalog.mounts(name).attached:
                raise InUse("in use by a container that has just begun; stop it")
        removing = attrs.evolve(volume, state=State.REMOVING)
        await self._store.commit(PutVolume(removing))
        hit("core.remove.intent")
        try:
            await backend.run(backend.driver.remove, self.catalog.spec(removing))
        except BaseException:
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
        self.catalog.backend(volume).purge_soon()

    async def settle_unfinished(self, volume: Volume) -> None:
        """Undo a create or finish a removal that an error left behind."""
        if volume.state is State.CREATING:
            await self.undo(volume)
        elif volume.state is State.REMOVING:
            await self.finish_removal(volume)
        elif volume.pending:
            await self.resizer.finish(volume)

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
        if mounts != known or (mounts.attached and not mounts.holders):
            await self.attachments.release(volume, mounts)

    def unsettled(self) -> list[str]:
        """Name the volumes that `VolumeManager.sweep` should look at again."""
        names = [
            volume.name
            for volume in self._store.volumes.values()
            if volume.state is not State.READY or volume.pending
        ]
        return names + self.attachments.doubtful()
