"""The operators' verbs: resize, take over, snapshots; as long as each takes.

An operator waits for the end, not an engine: no verb here has a deadline.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from volplugin.backends import Backend
from volplugin.changes import Caller, Changes
from volplugin.core import Core
from volplugin.drivers.driver import Snapshot, Snapshots, Spec, TakesOver
from volplugin.errors import InvalidArgument, Unavailable, Unsupported
from volplugin.manager import require_name
from volplugin.model import State, Volume

SNAPSHOT_NAME: Final = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,63}", re.ASCII)


class Operations:
    """What operators do with volumes. All methods raise `VolpluginError` only."""

    def __init__(self, core: Core, changes: Changes) -> None:
        self._core = core
        self._changes = changes

    async def resize(
        self, name: str, changes: Mapping[str, str], caller: Caller
    ) -> tuple[Volume, Volume]:
        """Give the volume other limits; return it before and after."""
        require_name(name)
        return await self._changes.run(
            name,
            lambda: self._core.resizer.resize(name, changes),
            limit=None,
            caller=caller,
        )

    async def take_over(self, name: str, caller: Caller) -> Sequence[str]:
        """Fence all other hosts that have the volume; return their names.

        Success where there are none.
        """
        require_name(name)

        async def change() -> Sequence[str]:
            backend, spec = await self._ready(name)
            driver = backend.driver
            if not isinstance(driver, TakesOver):
                raise Unsupported(
                    f"volumes of driver {driver.name} belong to one host: there is "
                    f"nobody to take it from"
                )
            return await backend.run(driver.take_over, spec)

        return await self._changes.run(name, change, limit=None, caller=caller)

    async def snapshots(self, name: str, caller: Caller) -> Sequence[Snapshot]:
        """Return the snapshots of the volume, oldest first."""
        require_name(name)

        async def look() -> Sequence[Snapshot]:
            backend, driver, spec = await self._of_snapshots(name)
            return await backend.run(driver.snapshots, spec)

        return await self._changes.run(name, look, limit=None, caller=caller)

    async def take_snapshot(self, name: str, snapshot: str, caller: Caller) -> None:
        """Keep the volume as it is now under the name ``snapshot``."""
        require_name(name)
        _require_snapshot_name(snapshot)

        async def change() -> None:
            backend, driver, spec = await self._of_snapshots(name)
            attached = self._core.catalog.mounts(name).attached
            call = driver.take_snapshot
            await backend.run(call, spec, snapshot, attached=attached)
            self._core.catalog.usages.soon(backend.name)

        await self._changes.run(name, change, limit=None, caller=caller)

    async def drop_snapshot(self, name: str, snapshot: str, caller: Caller) -> None:
        """Delete a snapshot of the volume."""
        require_name(name)
        _require_snapshot_name(snapshot)

        async def change() -> None:
            backend, driver, spec = await self._of_snapshots(name)
            await backend.run(driver.drop_snapshot, spec, snapshot)
            self._core.catalog.usages.soon(backend.name)

        await self._changes.run(name, change, limit=None, caller=caller)

    async def _of_snapshots(self, name: str) -> tuple[Backend, Snapshots, Spec]:
        backend, spec = await self._ready(name)
        driver: Any = backend.driver
        if not isinstance(driver, Snapshots):
            raise Unsupported(f"volumes of driver {driver.name} have no snapshots")
        return backend, driver, spec

    async def _ready(self, name: str) -> tuple[Backend, Spec]:
        volume = self._core.catalog.get(name)
        if volume.state is not State.READY:
            raise Unavailable("it is being removed")
        return self._core.catalog.backend(volume), self._core.catalog.spec(volume)


def _require_snapshot_name(name: str) -> None:
    if not SNAPSHOT_NAME.fullmatch(name):
        raise InvalidArgument(
            f"{name!r:.100} is no name of a snapshot: it is letters, digits, '_', '.' "
            f"and '-', at most 64, the first a letter or a digit"
        )
