"""The operators' verbs, from resize to snapshots; as long as each takes.

An operator waits for the end, not an engine: no verb here has a deadline.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import attrs

from volplugin import accounting, options
from volplugin.backends import Backend
from volplugin.changes import Caller, Changes
from volplugin.core import Core
from volplugin.drivers.driver import (
    Adopts,
    Disowns,
    Held,
    Snapshot,
    Snapshots,
    Spec,
    TakesOver,
)
from volplugin.errors import InvalidArgument, NotFound, Unavailable, Unsupported
from volplugin.manager import require_name
from volplugin.model import State, Volume
from volplugin.parsers import nearest, quote
from volplugin.store.store import PutVolume

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

    async def release(self, name: str, caller: Caller) -> Sequence[str]:
        """Drop all who hold the volume on this host, detach it, and return them.

        Raise `InUse` while a container has it. Success where nobody holds it.
        """
        require_name(name)

        async def change() -> Sequence[str]:
            holders = await self._core.attachments.release_all(self._volume(name))
            return [accounting.describe(holder) for holder in holders]

        return await self._changes.run(name, change, limit=None, caller=caller)

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

    async def adoptable(
        self, driver: str, asked: Mapping[str, str]
    ) -> Mapping[str, str | None]:
        """Return, by name, what ``driver`` could adopt, with the volume that has it."""
        backend, found = await self._held(driver, asked)
        taken = {
            frozenset(volume.facts.items()): volume.name
            for volume in self._core.catalog.volumes()
            if volume.backend == backend.name
        }
        return {h.name: taken.get(frozenset(h.facts.items())) for h in found}

    async def adopt(
        self,
        name: str,
        driver: str,
        asked: Mapping[str, str],
        there: str,
        caller: Caller,
    ) -> None:
        """Make what ``driver`` finds as ``there`` the volume ``name``.

        Success where it is that volume already.
        """
        require_name(name)
        backend, found = await self._held(driver, asked)
        held = next((each for each in found if each.name == there), None)
        if held is None:
            raise NotFound(
                f"there is no volume {quote(there)} to adopt"
                f"{nearest(there, [each.name for each in found])}"
            )
        wanted = {"driver": backend.name, **held.options}

        async def change() -> None:
            known = self._core.catalog.find(name)
            if known is None or not _is(known, backend, held):
                await self._core.create(name, wanted)

        await self._changes.run(name, change, limit=None, caller=caller)

    async def disown(self, name: str, caller: Caller) -> None:
        """Make the volume one that is left where it is when it is removed here.

        As if it had been adopted. Success where it was.
        """
        require_name(name)

        async def change() -> None:
            backend, spec = await self._ready(name)
            driver = backend.driver
            if not isinstance(driver, Disowns):
                raise Unsupported(
                    f"a volume of driver {driver.name} is volplugin's own: nobody "
                    f"else would have it"
                )
            volume = attrs.evolve(spec.volume, options=driver.disowned(spec.volume))
            # First what `recover` finds: a death in between leaves the volume as it is.
            await backend.run(driver.note_again, self._core.catalog.spec(volume))
            await self._core.catalog.store.commit(PutVolume(volume))

        await self._changes.run(name, change, limit=None, caller=caller)

    async def _held(
        self, driver: str, asked: Mapping[str, str]
    ) -> tuple[Backend, Sequence[Held]]:
        backend = self._core.catalog.backends.pick(driver)
        adopting = backend.driver
        if not isinstance(adopting, Adopts):
            raise Unsupported(
                f"driver {backend.driver.name} adopts nothing by list; a volume of a "
                f"directory or an image that is there is made with `docker volume "
                f"create`: see its -o help"
            )
        subject = f"driver {backend.driver.name}"
        parsed: Any = options.parse(backend.driver.Options, asked, subject=subject)
        return backend, await backend.run(adopting.adoptable, parsed)

    async def _of_snapshots(self, name: str) -> tuple[Backend, Snapshots, Spec]:
        backend, spec = await self._ready(name)
        driver: Any = backend.driver
        if not isinstance(driver, Snapshots):
            raise Unsupported(f"volumes of driver {driver.name} have no snapshots")
        return backend, driver, spec

    def _volume(self, name: str) -> Volume:
        volume = self._core.catalog.get(name)
        if volume.state is not State.READY:
            raise Unavailable("it is being removed")
        return volume

    async def _ready(self, name: str) -> tuple[Backend, Spec]:
        volume = self._volume(name)
        return self._core.catalog.backend(volume), self._core.catalog.spec(volume)


def _is(volume: Volume, backend: Backend, held: Held) -> bool:
    """Tell whether the volume is what is held there, however it was made ours."""
    return (
        volume.state is State.READY
        and volume.backend == backend.name
        and volume.facts == held.facts
    )


def _require_snapshot_name(name: str) -> None:
    if not SNAPSHOT_NAME.fullmatch(name):
        raise InvalidArgument(
            f"{name!r:.100} is no name of a snapshot: it is letters, digits, '_', '.' "
            f"and '-', at most 64, the first a letter or a digit"
        )
