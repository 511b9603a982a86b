"""Volumes given other limits: intent, driver, commit, and back when that fails.

As in `core`, the caller holds the volume's lock and lets no cancellation through.
"""

import contextlib
import logging
from collections.abc import Mapping
from typing import Any, Final

import attrs

from volplugin.backends import Backend
from volplugin.catalog import Catalog
from volplugin.drivers.driver import Promises, Resizes, Spec
from volplugin.errors import InvalidArgument, Unavailable, Unsupported, VolpluginError
from volplugin.failpoints import hit
from volplugin.logs import log
from volplugin.model import State, Volume
from volplugin.store.store import PutVolume

logger = logging.getLogger(__name__)

KEYS: Final = ("size", "inodes")
"""The options that a resize can change."""


class Resizer:
    """Changes limits, in step with the store and the backends."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._store = catalog.store

    async def resize(
        self, name: str, changes: Mapping[str, str]
    ) -> tuple[Volume, Volume]:
        """Give the volume the options ``changes``; return it before and after.

        What it has already is success. A failed resize leaves the volume as it was.
        """
        volume = self._catalog.get(name)
        if volume.state is not State.READY:
            raise Unavailable("it is being removed")
        if volume.pending:
            await self.finish(volume)
            volume = self._catalog.get(name)
        after = self._changed(volume, changes)
        backend = self._catalog.backend(volume)
        driver = backend.driver
        if not isinstance(driver, Resizes):
            raise Unsupported(f"volumes of driver {driver.name} have a fixed size")
        spec, wanted = self._catalog.spec(volume), self._catalog.spec(after)
        if spec.options == wanted.options:
            return volume, volume
        attached = self._catalog.mounts(name).attached
        await backend.run(driver.plan_resize, spec, wanted.options, attached=attached)
        await require_room(self._catalog, backend, wanted)
        await self._store.commit(PutVolume(attrs.evolve(volume, pending=changes)))
        hit("core.resize.intent")
        try:
            await backend.run(driver.resize, wanted, attached=attached)
            hit("core.resize.driver")
            await self._store.commit(PutVolume(after))
        except BaseException:
            await self._take_back_quietly(backend, driver, spec)
            raise
        hit("core.resize.commit")
        self._catalog.usages.soon(backend.name)
        return volume, after

    def _changed(self, volume: Volume, changes: Mapping[str, str]) -> Volume:
        strange = sorted(set(changes) - set(KEYS))
        if strange or not changes:
            raise InvalidArgument(
                f"a resize changes {' and '.join(KEYS)}, not {strange or 'nothing'}"
            )
        return attrs.evolve(volume, options={**volume.options, **changes}, pending={})

    async def finish(self, volume: Volume) -> None:
        """Carry a resize that was cut short to its end, or back where it can't be."""
        backend = self._catalog.backend(volume)
        driver: Any = backend.driver
        attached = self._catalog.mounts(volume.name).attached
        after = self._changed(volume, volume.pending)
        try:
            await backend.run(
                driver.resize, self._catalog.spec(after), attached=attached
            )
        except VolpluginError as error:
            log(
                logger,
                logging.WARNING,
                "resize taken back",
                volume=volume.name,
                error=str(error),
            )
            after = attrs.evolve(volume, pending={})
            await backend.run(
                driver.resize, self._catalog.spec(after), attached=attached
            )
        hit("core.recover.resize")
        await self._store.commit(PutVolume(after))
        self._catalog.usages.soon(backend.name)

    async def _take_back_quietly(
        self, backend: Backend, driver: Resizes, spec: Spec
    ) -> None:
        attached = self._catalog.mounts(spec.volume.name).attached
        try:
            await backend.run(driver.resize, spec, attached=attached)
            await self._store.commit(PutVolume(spec.volume))
        except Exception as error:  # noqa: BLE001  the resize's own is what is raised
            log(
                logger,
                logging.ERROR,
                "resize not taken back, to be tried again",
                volume=spec.volume.name,
                error=str(error),
            )


async def require_room(catalog: Catalog, backend: Backend, wanted: Spec) -> None:
    """Raise `NoSpace` if the backend may not promise what ``wanted`` asks for."""
    driver = backend.driver
    if not isinstance(driver, Promises) or not driver.promised(wanted):
        return
    total = driver.promised(wanted)
    for volume in catalog.store.volumes.values():
        if volume.backend == backend.name and volume.name != wanted.volume.name:
            with contextlib.suppress(VolpluginError):  # its Status tells
                total += driver.promised(catalog.spec(volume))
    await backend.run(driver.require_room, total)
