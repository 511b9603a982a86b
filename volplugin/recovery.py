"""At start, before anyone asks: end what was under way, check all mounts."""

import contextlib
import logging
from typing import Final

import attrs

from volplugin import accounting
from volplugin.backends import Backend
from volplugin.core import Core
from volplugin.discovery import volumes_on_disk
from volplugin.drivers.driver import Lanes, Verifies
from volplugin.errors import StoreCorrupt, VolpluginError
from volplugin.failpoints import hit
from volplugin.host import mountinfo
from volplugin.logs import log
from volplugin.model import Mounts, State, Volume
from volplugin.sharing import is_shared
from volplugin.store.database import REMEDY
from volplugin.store.store import PutVolume

logger = logging.getLogger(__name__)


_OUTCOMES: Final = {
    State.CREATING: "undone",
    State.READY: "resize settled",
    State.REMOVING: "removal finished",
}


async def recover(core: Core) -> None:
    """Bring store, disk and mount table in agreement; run before the sockets listen.

    Every *creating* is undone and every *removing* finished; mounts of an earlier
    boot, and those that were never answered, are dropped. What a backend that is out
    of reach prevents is left for the sweep, and so is all that takes a cluster or
    another plugin. A
    volume on disk that the store does not know is taken over: a damaged end of
    LevelDB's log can read as a short one. Raise `StoreCorrupt` when the store knows
    none at all and there are some: it was lost.
    """
    store = core.catalog.store
    for backend in core.catalog.backends.all():
        await backend.run(backend.driver.open)
    await _take_mounts_back(core)
    for volume in list(store.volumes.values()):
        if _needs_others(core, volume):
            continue
        if volume.state is not State.READY or volume.pending:
            await _settle_unfinished(core, volume)
    await _take_over_unknown(core)
    for backend in core.catalog.backends.all():
        await _verify(core, backend)
    table = mountinfo.read()
    mounted: dict[str, list[mountinfo.Mount]] = {}
    for mount in table:
        mounted.setdefault(mount.mountpoint, []).append(mount)
    for volume in list(store.volumes.values()):
        if volume.state is State.READY:
            own = mounted.get(volume.mountpoint, [])
            # Where a volume is a directory, its file system counts as well.
            shown = mounted.get(core.catalog.backends.path(volume)) not in (None, own)
            await _check_mounts(core, volume, table if shown else own)
    for backend in core.catalog.backends.all():
        backend.start_purge()


async def _take_mounts_back(core: Core) -> None:
    """Have each driver see the mounts that a dead plugin has left to the host."""
    tree = core.catalog.backends.tree
    if tree is None:
        return
    for volume in core.catalog.store.volumes.values():
        backend = core.catalog.backends.get(volume.backend)
        if backend is None or volume.state is State.CREATING:
            continue
        try:
            await backend.run(tree.take_back, volume, backend.driver)
        except VolpluginError as error:
            log(
                logger,
                logging.ERROR,
                "its mount can't be used again",
                volume=volume.name,
                error=str(error),
            )


def _needs_others(core: Core, volume: Volume) -> bool:
    """Tell whether the volume is settled by the sweep, which begins at once.

    A cluster, or another plugin, that does not answer must not keep the sockets of all
    others waiting.
    """
    backend = core.catalog.backends.get(volume.backend)
    return backend is not None and (
        is_shared(backend) or isinstance(backend.driver, Lanes)
    )


async def _verify(core: Core, backend: Backend) -> None:
    if not isinstance(backend.driver, Verifies):
        return
    specs = []
    for volume in core.catalog.store.volumes.values():
        # Those without facts have nothing that could be lost, and may be thousands.
        if volume.backend == backend.name and volume.facts:
            with contextlib.suppress(VolpluginError):  # its Status tells
                specs.append(core.catalog.spec(volume))
    await backend.run(backend.driver.verify, specs)


async def _take_over_unknown(core: Core) -> None:
    store = core.catalog.store
    known = set(store.volumes)
    for backend in core.catalog.backends.all():
        if is_shared(backend):
            continue  # its volumes may well be others'; it is followed
        faults: list[str] = []
        found = await backend.run(_unknown, backend, known, faults)
        if found and not known:
            raise StoreCorrupt(
                f"the store knows no volume but there are {len(found)} of backend "
                f"{backend.name!r} on disk. {REMEDY}"
            )
        for volume in found:
            await store.commit(PutVolume(volume))
            log(
                logger,
                logging.WARNING,
                "taken over: on disk and not in the store",
                volume=volume.name,
                path=volume.mountpoint,
            )
        for fault in faults:
            log(logger, logging.WARNING, "not a volume", reason=fault)


def _unknown(backend: Backend, known: set[str], faults: list[str]) -> list[Volume]:
    return list(volumes_on_disk(backend.name, backend.driver, faults, known))


async def _settle_unfinished(core: Core, volume: Volume) -> None:
    try:
        await core.settle_unfinished(volume)
    except VolpluginError as error:
        log(
            logger,
            logging.ERROR,
            "unfinished, to be tried again",
            volume=volume.name,
            state=volume.state.value,
            error=str(error),
        )
    else:
        is_kept = volume.state is State.CREATING and core.catalog.find(volume.name)
        log(
            logger,
            logging.INFO,
            "create finished" if is_kept else _OUTCOMES[volume.state],
            volume=volume.name,
        )


async def _check_mounts(
    core: Core, volume: Volume, table: list[mountinfo.Mount]
) -> None:
    mounts = core.catalog.mounts(volume.name)
    if mounts.boot_id != core.catalog.boot_id:
        # No mount, and no client, lives longer than the kernel.
        checked = Mounts(boot_id=core.catalog.boot_id)
    else:
        checked = accounting.drop_pending(mounts)
    backend = core.catalog.backends.get(volume.backend)
    if backend is not None and backend.attaches(volume):
        found = backend.is_attached(volume, table)
        is_lost = mounts.attached and checked.holders and not found
        if is_lost and core.catalog.backends.tree is None:  # else it is mounted again
            log(
                logger,
                logging.WARNING,
                "its mount has gone; the next container gets a new one",
                volume=volume.name,
                path=volume.mountpoint,
            )
        # Short of its mount, an attach may have a hold or a device: detach lets go.
        begun = checked.attached and _needs_others(core, volume)
        checked = attrs.evolve(checked, attached=found or begun)
    if checked != mounts or (checked.attached and not checked.holders):
        at_once = not _needs_others(core, volume)
        await core.attachments.put_right(volume, checked, at_once=at_once)
        hit("core.recover.mounts")
