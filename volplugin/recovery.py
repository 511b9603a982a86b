"""At start, before anyone asks: end what was under way, check all mounts."""

import logging

import attrs

from volplugin import accounting
from volplugin.core import Core
from volplugin.drivers.driver import Discovers
from volplugin.errors import StoreCorrupt, VolpluginError
from volplugin.failpoints import hit
from volplugin.host import mountinfo
from volplugin.logs import log
from volplugin.model import Mounts, State, Volume

logger = logging.getLogger(__name__)


async def recover(core: Core) -> None:
    """Bring store, disk and mount table in agreement; run before the sockets listen.

    Every *creating* is undone and every *removing* finished; mounts of an earlier
    boot, and those that were never answered, are dropped. What a backend that is out
    of reach prevents is left for the sweep. Raise `StoreCorrupt` when a store
    without volumes finds some on disk: then the old one was lost.
    """
    await _open_backends(core)
    unfinished = [
        v for v in core.catalog.store.volumes.values() if v.state != State.READY
    ]
    for volume in unfinished:
        await _settle_unfinished(core, volume)
    table = mountinfo.read()
    for name, mounts in list(core.catalog.store.mounts.items()):
        known = core.catalog.store.volumes.get(name)
        if known is not None and known.state is State.READY:
            await _check_mounts(core, known, mounts, table)
    for backend in core.catalog.backends.all():
        backend.start_purge()


async def _open_backends(core: Core) -> None:
    for backend in core.catalog.backends.all():
        driver = backend.driver
        await backend.run(driver.open)
        if core.catalog.store.volumes or not isinstance(driver, Discovers):
            continue
        if await backend.run(_has_volumes, driver):
            raise StoreCorrupt(
                f"the store is empty but there are volumes of backend "
                f"{backend.name!r} on disk: run `volplugin recover`, which rebuilds "
                f"the store from them"
            )


def _has_volumes(driver: Discovers) -> bool:
    return next(iter(driver.discover()), None) is not None


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
        log(
            logger,
            logging.INFO,
            "undone" if volume.state is State.CREATING else "removal finished",
            volume=volume.name,
        )


async def _check_mounts(
    core: Core, volume: Volume, mounts: Mounts, table: list[mountinfo.Mount]
) -> None:
    if mounts.boot_id != core.catalog.boot_id:
        # No mount, and no client, lives longer than the kernel.
        checked = Mounts(boot_id=core.catalog.boot_id)
    else:
        checked = accounting.drop_pending(mounts)
    backend = core.catalog.backends.get(volume.backend)
    if backend is not None and backend.driver.attaches:
        found = backend.driver.is_attached(volume, table)
        if mounts.attached and checked.holders and not found:
            log(
                logger,
                logging.WARNING,
                "its mount has gone; the next container gets a new one",
                volume=volume.name,
                path=volume.mountpoint,
            )
        checked = attrs.evolve(checked, attached=found)
    if checked != mounts or (checked.attached and not checked.holders):
        await core.attachments.put_right(volume, checked)
        hit("core.recover.mounts")
