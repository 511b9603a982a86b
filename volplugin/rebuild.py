"""`volplugin recover`: a new store from what disks and clusters say of volumes."""

import datetime as dt
import os
import shutil
from collections.abc import Iterator

import attrs

from volplugin.backends import build, settings_of
from volplugin.config import Config
from volplugin.discovery import volumes_on_disk
from volplugin.drivers.driver import Shares
from volplugin.errors import StoreCorrupt, VolpluginError
from volplugin.failpoints import hit
from volplugin.host import paths
from volplugin.model import Mounts, Volume
from volplugin.store import records
from volplugin.store.database import UNFINISHED, Database


@attrs.frozen(kw_only=True)
class Outcome:
    """What a rebuild found."""

    kept: str | None  # where the old store now is
    volumes: tuple[Volume, ...]
    faults: tuple[str, ...]  # records that could not be read, names found twice


def rebuild(config: Config, store_path: str) -> Outcome:
    """Set the store aside and write a new one; call it while no server runs.

    Volumes come from their own records on disk, and from the old store if all of it
    can be read. The new store is built beside the old one and takes its place by a
    rename, so a rebuild that dies half way is just begun again.
    """
    fresh = store_path + UNFINISHED
    if not os.path.lexists(store_path) and os.path.lexists(fresh):
        paths.move(fresh, store_path)  # a rebuild died between its two renames
    pairs = _readable(store_path)
    known = {
        volume.name: volume
        for key, value in pairs.items()
        if key.startswith(records.VOLUME_PREFIX)
        for volume in [records.decode(value, Volume)]
    }
    faults: list[str] = []
    for volume in _discover(config, faults):
        other = known.setdefault(volume.name, volume)
        if other.id != volume.id:
            faults.append(
                f"{volume.mountpoint} says that it is volume {volume.name!r}, which "
                f"is at {other.mountpoint} already; left out"
            )
    for volume in known.values():
        pairs[records.volume_key(volume.name)] = records.encode(volume)
    if os.path.lexists(fresh):
        shutil.rmtree(fresh)
    database = Database(fresh)
    database.load()
    database.write(pairs.items(), sync=True)
    database.close()
    kept = None
    if os.path.lexists(store_path):
        stamp = dt.datetime.now(dt.UTC).strftime("%Y%m%dT%H%M%S.%fZ")
        kept = f"{store_path}.broken-{stamp}"
        os.rename(store_path, kept)
    hit("recover.aside")
    paths.move(fresh, store_path)
    hit("recover.rebuild")
    return Outcome(kept=kept, volumes=tuple(known.values()), faults=tuple(faults))


def _readable(path: str) -> dict[bytes, bytes]:
    """Return all pairs of the store, or none if any of it can't be trusted."""
    if not os.path.lexists(path):
        return {}
    try:
        database = Database(path)
        try:
            pairs = database.load()
            for key, value in pairs.items():
                if key.startswith(records.VOLUME_PREFIX):
                    records.decode(value, Volume)
                else:
                    records.decode(value, Mounts)
        finally:
            database.close()
    except (StoreCorrupt, ValueError):
        return {}
    return pairs


def _discover(config: Config, faults: list[str]) -> Iterator[Volume]:
    for name, driver in build(config).items():
        try:
            yield from volumes_on_disk(name, driver, faults)
        except VolpluginError as error:
            # What is in a cluster stays there, and the next start finds it. A backend
            # that nobody has configured has none.
            if settings_of(config, name):
                faults.append(f"backend {name}: {error}; its volumes come later")
        finally:
            if isinstance(driver, Shares):
                driver.close()
