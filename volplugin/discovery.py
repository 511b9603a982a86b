"""Volumes that are there without a store: by their own records, or by a cluster."""

import os
from collections.abc import Container, Iterator

import attrs

from volplugin.drivers.driver import Discovers, Driver, Shares
from volplugin.model import State, Volume
from volplugin.store import records


def volumes_on_disk(
    backend: str, driver: Driver, faults: list[str], known: Container[str] = ()
) -> Iterator[Volume]:
    """Yield the volumes of a backend that are not among the names in ``known``.

    What carries a record that can't be its own is added to ``faults`` and left out.
    Raise `VolpluginError` when the cluster of a shared backend can't be asked.
    """
    if isinstance(driver, Shares):
        for volume in driver.volumes():
            if volume.state is State.READY and volume.name not in known:
                yield volume
        return
    if not isinstance(driver, Discovers):
        return
    for found in driver.discover(known):
        try:
            volume = records.decode(found.record, Volume)
        except ValueError as error:
            faults.append(f"{found.path or 'a marker'}: {error}; left out")
            continue
        if found.path is not None:
            if os.path.basename(found.path) != volume.name:
                faults.append(
                    f"{found.path} carries the record of volume {volume.name!r}: a "
                    f"copy? Left out; `setfattr -x trusted.volplugin` on it ends this"
                )
                continue
            volume = attrs.evolve(volume, mountpoint=found.path)
        yield attrs.evolve(volume, backend=backend, state=State.READY)
