"""Volumes of clusters: what other hosts make and remove, taken note of in the store.

The cluster is the truth, the store a copy of it that is there when the cluster is not.
As in `core`, the caller holds the volume's lock and lets no cancellation through.
"""

import asyncio
import logging
import time
from typing import Any, Final

import attrs

from volplugin.backends import Backend
from volplugin.catalog import Catalog
from volplugin.drivers.driver import Shares
from volplugin.errors import InUse
from volplugin.logs import log
from volplugin.model import State, Volume
from volplugin.store.store import DropVolume, PutVolume

logger = logging.getLogger(__name__)

UNFINISHED_LIMIT: Final = 60.0
"""Seconds after which a create of another host that does not move is held for dead.

Longer than any operation of the cluster may take. A host that was only slow fails in
the end, as its volume is not its own any more.
"""

_PAUSE: Final = 0.2  # seconds between looks at a volume that another host makes


class Sharing:
    """What this host knows of shared volumes, brought in step with their clusters."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._store = catalog.store
        self._told: dict[str, str] = {}  # what the log has said of a volume last

    async def look_up(self, backend: Backend, name: str) -> None:
        """Take note of the volume ``name`` if the cluster of ``backend`` has it.

        Where another host is just making it, wait until it has; what a dead one has
        left is taken away. No effect for a backend that is not shared.
        """
        if not is_shared(backend):
            return
        found = await self._find(backend, name)
        begun = time.monotonic()
        while found is not None and found.state is State.CREATING:
            before = found.id
            await asyncio.sleep(_PAUSE)
            found = await self._find(backend, name)
            if found is None or found.id != before or found.state is not State.CREATING:
                begun = time.monotonic()
            elif time.monotonic() - begun > UNFINISHED_LIMIT:
                found = await self._clear_away(backend, found)
        await self._take(backend, name, found)

    async def find_whole(self, backend: Backend, volume: Volume) -> Volume | None:
        """Return the volume as its cluster has it, if it is ready there.

        None where it is gone, half made or half removed, or another's by now.
        """
        found = await self._ask(backend, volume.name)
        if found is None or found.id != volume.id or found.state is not State.READY:
            return None
        return found

    async def _find(self, backend: Backend, name: str) -> Volume | None:
        found = await self._ask(backend, name)
        if found is not None and found.state is State.REMOVING:
            # Until it is gone: if that host dies, any other can finish it.
            return attrs.evolve(found, state=State.READY)
        return found

    async def _ask(self, backend: Backend, name: str) -> Volume | None:
        driver: Any = backend.driver  # a reload may replace it between two looks
        found: Volume | None = await backend.run(driver.find, name)
        return found

    async def _clear_away(self, backend: Backend, volume: Volume) -> Volume | None:
        """Remove what is half made; return the volume if it was finished just now."""
        try:
            await backend.run(backend.driver.remove, self._catalog.spec(volume))
        except InUse:
            return await self._find(backend, volume.name)
        log(
            logger,
            logging.WARNING,
            "a create of another host did not move: taken away",
            volume=volume.name,
            backend=backend.name,
        )
        return None

    async def refresh(self, backend: Backend, name: str) -> None:
        """Make what the store has of ``name`` what the cluster of ``backend`` says.

        What this host is about to make, remove or resize is left to that. A volume that
        is in use here stays on record, whatever became of it.
        """
        if is_shared(backend):
            await self._take(backend, name, await self._find(backend, name))

    async def _take(self, backend: Backend, name: str, found: Volume | None) -> None:
        known = self._store.volumes.get(name)
        if found is not None and found.state is State.CREATING:
            found = None
        if known is None:
            if found is not None:
                await self._store.commit(PutVolume(found))
            return
        if known.backend != backend.name:
            # With the same id, two backends are two ways to one cluster.
            if found is not None and found.id != known.id:
                self._tell(
                    found,
                    f"hidden by the volume of this name that backend "
                    f"{known.backend} has: remove one of the two",
                )
            return
        if known.state is not State.READY or found == known:
            return
        if found is None or found.id != known.id:
            # With it a resize is gone that was cut short: nothing is left to finish.
            await self._replace(known, found)
        elif not known.pending:
            await self._store.commit(PutVolume(found))
            self._catalog.usages.soon(backend.name)

    async def _replace(self, known: Volume, found: Volume | None) -> None:
        name = known.name
        mounts = self._catalog.mounts(name)
        if mounts.attached or mounts.holders:
            self._tell(known, "removed by another host, and in use here")
            return
        if found is None:
            await self._store.commit(DropVolume(name))
        else:
            await self._store.commit(DropVolume(name), PutVolume(found))
        self._catalog.forget(known)
        self._told.pop(known.id, None)

    def _tell(self, volume: Volume, event: str) -> None:
        if self._told.get(volume.id) == event:
            return
        self._told[volume.id] = event
        log(
            logger,
            logging.WARNING,
            "a shared volume is not as the cluster says",
            volume=volume.name,
            reason=event,
        )


def is_shared(backend: Backend) -> bool:
    """Tell whether volumes of this backend are those of a cluster."""
    return isinstance(backend.driver, Shares)
