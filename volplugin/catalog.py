"""What this host knows of its volumes, from memory: no lock, thread or backend.

Engines take every failing Get for "no such volume" and forget what they knew of it, so
nothing here may fail for a volume that exists, whatever state its backend is in.
"""

import asyncio
import contextlib
from typing import Any, Final

import attrs

from volplugin import accounting, options
from volplugin.backends import Backend, Backends
from volplugin.doors import ANY_DOOR, Door
from volplugin.drivers import SHARED
from volplugin.drivers.driver import Spec
from volplugin.errors import NotFound, Unavailable, VolpluginError
from volplugin.model import Mounts, State, Volume
from volplugin.store import records
from volplugin.store.store import Store
from volplugin.usage import Usages

_SLICE: Final = 100  # volumes looked at before other tasks have their turn


class Catalog:
    """The store's memory, with each volume's backend and parsed options."""

    def __init__(self, store: Store, backends: Backends, boot_id: str) -> None:
        self.store = store
        self.backends = backends
        self.boot_id = boot_id
        self.usages = Usages(backends.all, self.specs)
        self._specs: dict[str, Spec] = {}

    def find(self, name: str) -> Volume | None:
        """Return the volume, or None; one that is still being made is not there yet.

        Were it shown, dockerd would skip its Create, and the making may yet fail.
        """
        volume = self.store.volumes.get(name)
        return None if volume is None or volume.state is State.CREATING else volume

    def get(self, name: str, door: Door = ANY_DOOR) -> Volume:
        """Return the volume; raise `NotFound`, also where ``door`` does not show it."""
        volume = self.find(name)
        if volume is None or not is_shown(volume, door):
            raise NotFound("no such volume")
        return volume

    def volumes(self, door: Door = ANY_DOOR) -> list[Volume]:
        """Return all volumes that `get` would."""
        return [
            volume
            for volume in self.store.volumes.values()
            if volume.state is not State.CREATING and is_shown(volume, door)
        ]

    def mounts(self, name: str) -> Mounts:
        """Return who holds the volume."""
        return self.store.mounts.get(name) or Mounts(boot_id=self.boot_id)

    def status(self, volume: Volume) -> dict[str, Any]:
        """Return what `docker volume inspect` shows as Status."""
        mounts = self.mounts(volume.name)
        status = self.usages.of(volume)  # what follows goes before it
        status["driver"] = volume.driver
        status["backend"] = volume.backend
        try:
            backend = self.backend(volume)
            driver, attaches = backend.driver, backend.attaches(volume)
            attached = mounts.attached or not attaches
            parsed = self.spec(volume).options
            status.update(driver.status(volume, parsed, attached=attached))
            if attaches:
                status["attached"] = attached
        except VolpluginError as error:
            status["error"] = str(error)
        if volume.state is State.REMOVING:
            status["error"] = "being removed; `docker volume rm` again finishes it"
        holders = mounts.holders.values()
        status["mounts"] = sum(holder.count for holder in holders)
        if holders:
            status["holders"] = [accounting.describe(holder) for holder in holders]
        held = accounting.never_released(volume.name, holders)
        if held is not None:
            status["held"] = held
        return status

    def backend(self, volume: Volume) -> Backend:
        """Return the volume's backend; raise `Unavailable` when it is gone."""
        backend = self.backends.get(volume.backend)
        if backend is None:
            raise Unavailable(
                f"backend {volume.backend!r} is not in the configuration any more: "
                f"add [backend.{volume.backend}] with driver = {volume.driver!r} again"
            )
        return backend

    def spec(self, volume: Volume) -> Spec:
        """Return the volume as its driver gets it.

        Raise `Unavailable` as `backend`, and `InvalidArgument` when the driver does
        not know the stored options any more.
        """
        spec = self._specs.get(volume.id)
        if spec is None or spec.volume is not volume:  # a resize makes another
            driver = self.backend(volume).driver
            parsed: Any = options.parse(
                driver.Options, volume.options, subject=f"driver {driver.name}"
            )
            ready = attrs.evolve(volume, state=State.READY, pending={})
            spec = Spec(volume=volume, options=parsed, record=records.encode(ready))
            if volume.state is State.READY:
                self._specs[volume.id] = spec
        return spec

    async def specs(self, backend: str) -> list[Spec]:
        """Return the volumes of this backend that are ready, as its driver gets them.

        One whose stored options the driver does not know any more is left out. Other
        tasks have their turn while options are parsed: thousands take their time.
        """
        volumes = self.store.volumes
        found = []
        for number, name in enumerate(list(volumes), 1):
            volume = volumes.get(name)
            if (
                volume is not None
                and volume.backend == backend
                and volume.state is State.READY
            ):
                with contextlib.suppress(VolpluginError):
                    found.append(self.spec(volume))
            if number % _SLICE == 0:
                await asyncio.sleep(0)
        return [spec for spec in found if volumes.get(spec.volume.name) is spec.volume]

    def forget(self, volume: Volume) -> None:
        """Drop what was parsed and measured of a volume that is gone."""
        self._specs.pop(volume.id, None)
        self.usages.forget(volume)

    def forget_parsed(self) -> None:
        """Parse all options anew: drivers may have been replaced."""
        self._specs.clear()


def is_shown(volume: Volume, door: Door) -> bool:
    """Tell whether the volume exists for those who come through ``door``.

    By the names in its record: its backend may not be configured any more.
    """
    return door.allows(volume.backend) and (
        volume.driver in SHARED or not door.shared_only
    )
