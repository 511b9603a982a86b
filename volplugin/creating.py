"""Volumes made: plan, intent, driver, commit, and what undoes them when that fails.

As in `core`, the caller holds the volume's lock and lets no cancellation through.
"""

import asyncio
import logging
import uuid
from collections.abc import Mapping
from typing import Any

import attrs

from volplugin.backends import Backend
from volplugin.catalog import Catalog
from volplugin.drivers.directories import overlap
from volplugin.drivers.driver import Clones, Plan, TakesIn
from volplugin.errors import AlreadyExists, InvalidArgument
from volplugin.failpoints import hit
from volplugin.host import surroundings
from volplugin.logs import log
from volplugin.model import State, Volume
from volplugin.options import nearest
from volplugin.resizing import require_room
from volplugin.store.store import DropVolume, PutVolume
from volplugin.times import now

logger = logging.getLogger(__name__)


class Creator:
    """Makes volumes, in step with the store and the backends."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._store = catalog.store
        self._backends = catalog.backends
        self._choosing = asyncio.Lock()

    async def make(
        self,
        name: str,
        backend: Backend,
        asked: Mapping[str, str],
        parsed: Any,
        origin: str | None = None,
    ) -> None:
        """Make a volume of a name that is free; undo what was made when that fails.

        ``asked`` are the user's words, ``parsed`` what they mean to the driver, which
        is a `TakesIn` where ``origin`` is a directory that becomes the volume.
        """
        source = await self._source(backend, parsed)
        volume_id = uuid.uuid4().hex
        plan = await _plan(backend, name, volume_id, parsed, origin)
        volume = Volume(
            name=name,
            id=volume_id,
            backend=backend.name,
            driver=backend.driver.name,
            options=asked,
            facts=plan.facts,
            mountpoint=plan.mountpoint,
            created_at=now(),
        )
        spec = attrs.evolve(self._catalog.spec(volume), source=source)
        await require_room(self._catalog, backend, spec)
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
        self._catalog.usages.soon(backend.name)
        if plan.chosen:
            backend.purge_soon()  # a large tree may still have to be counted

    async def _source(self, backend: Backend, parsed: Any) -> Volume | None:
        """Return the volume that the new one is to be a copy of, if it is to be one."""
        driver = backend.driver
        wanted = parsed.source if isinstance(driver, Clones) else None
        if wanted is None or not isinstance(driver, Clones):
            return None
        name, _, snapshot = wanted.partition("@")
        source = self._catalog.find(name)
        if source is None:
            raise InvalidArgument(
                f"from={wanted}: there is no volume {name!r}"
                f"{nearest(name, self._store.volumes)}"
            )
        if source.backend != backend.name:
            raise InvalidArgument(
                f"from={wanted}: {name} is a volume of backend {source.backend}, and a "
                f"copy can only be made in the same one: create with "
                f"driver={source.backend}"
            )
        if source.state is not State.READY:
            raise InvalidArgument(f"from={wanted}: {name} is being removed")
        spec = self._catalog.spec(source)
        await backend.run(driver.plan_clone, spec, snapshot or None, parsed)
        return source

    async def _write_intent(self, volume: Volume, plan: Plan) -> None:
        if not plan.chosen:
            await self._store.commit(PutVolume(volume))
            return
        # Two creates may choose one directory: look and write with none in between.
        async with self._choosing:
            path = plan.mountpoint
            tree = self._backends.tree
            if tree is not None:
                try:
                    surroundings.require_kept(path, tree.root)
                except InvalidArgument as error:
                    raise InvalidArgument(f"mount={error}") from error
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

    async def undo(self, volume: Volume) -> None:
        """Take away what a create that did not finish has made, then its intent.

        A volume that has its files from elsewhere, all of them, is kept instead.
        """
        backend = self._catalog.backend(volume)
        if await self._is_taken_in(backend, volume):
            ready = attrs.evolve(volume, state=State.READY)
            await self._store.commit(PutVolume(ready))
            log(logger, logging.INFO, "kept: it has its files", volume=volume.name)
            return
        await backend.run(backend.driver.remove, self._catalog.spec(volume))
        hit("core.recover.create")
        await self._store.commit(DropVolume(volume.name))
        backend.purge_soon()

    async def _is_taken_in(self, backend: Backend, volume: Volume) -> bool:
        driver = backend.driver
        if not isinstance(driver, TakesIn):
            return False
        return await backend.run(driver.is_taken_in, self._catalog.spec(volume))

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


async def _plan(
    backend: Backend, name: str, volume_id: str, parsed: Any, origin: str | None
) -> Plan:
    driver = backend.driver
    if origin is not None and isinstance(driver, TakesIn):
        return await backend.run(driver.plan_intake, name, volume_id, parsed, origin)
    return await backend.run(driver.plan, name, volume_id, parsed)
