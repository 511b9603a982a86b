"""Hosts for the tests of the driver ``rbd``: each a driver with a place of its own."""

import contextlib
import itertools
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import attrs
from support import processes
from support.ceph import POOL, Ceph
from support.wait import eventually

from volplugin import options
from volplugin.ceph.registry import Shared
from volplugin.drivers.driver import Spec
from volplugin.drivers.rbd import Rbd
from volplugin.drivers.rbd_options import RbdConfig, RbdOptions
from volplugin.errors import AlreadyExists, InUse
from volplugin.host import mountinfo
from volplugin.model import State, Volume
from volplugin.store import records
from volplugin.times import now

SMALL: Final = {"size": "16M"}
_numbers = itertools.count(1)


@attrs.define(eq=False)
class HostCase:
    """A host that shares the volumes of a namespace with others."""

    name: str
    folder: Path
    ceph: Ceph
    namespace: str
    driver: Rbd

    @classmethod
    def of(
        cls,
        ceph: Ceph,
        namespace: str,
        folder: Path,
        name: str = "a",
        *,
        is_open: bool = True,
        **settings: Any,
    ) -> "HostCase":
        """Open the driver on a host, by the user of least rights.

        Its place is ``FOLDER/NAME``, or ``ceph`` below that where it ``is_open``.
        """
        given = {
            "conf": str(ceph.conf),
            "user": "volplugin",
            "keyring": str(ceph.least()),
            "pool": POOL,
            "namespace": namespace,
            "host-name": f"host-{name}",
            "timeout": 5,
            "mapper": "auto",
            **{key.replace("_", "-"): value for key, value in settings.items()},
        }
        config = options.parse_settings(RbdConfig, given, subject="a test")
        place = folder / name / "ceph" if is_open else folder / name
        driver = Rbd(config, str(place))
        if is_open:
            driver.open()
        return cls(name, folder / name, ceph, namespace, driver)

    def parsed(self, raw: Mapping[str, str]) -> RbdOptions:
        """Return options as the driver takes them."""
        return options.parse(RbdOptions, raw, subject="driver rbd")

    def spec(self, name: str, created_at: str = "", **raw: str) -> Spec:
        """Plan a volume and return it, *creating*."""
        raw = {
            key.rstrip("_").replace("mkfs_", "mkfs.").replace("_", "-"): value
            for key, value in raw.items()
        }
        parsed = self.parsed(raw)
        volume_id = f"{next(_numbers):032x}"[::-1]
        source = None
        if parsed.source is not None:
            origin, _, snapshot = parsed.source.partition("@")
            source = self.driver.find(origin)
        if source is not None:
            self.driver.plan_clone(self.spec_of(source), snapshot or None, parsed)
        plan = self.driver.plan(name, volume_id, parsed)
        volume = Volume(
            name=name,
            id=volume_id,
            backend="ceph",
            driver="rbd",
            options=raw,
            facts=plan.facts,
            mountpoint=plan.mountpoint,
            created_at=created_at or now(),
        )
        return attrs.evolve(self.spec_of(volume), source=source)

    def spec_of(self, volume: Volume) -> Spec:
        """Return a volume as the core gives it to the driver."""
        record = records.encode(attrs.evolve(volume, state=State.READY))
        return Spec(volume=volume, options=self.parsed(volume.options), record=record)

    def make(self, name: str, **raw: str) -> Spec:
        """Make a volume and return it, *ready*."""
        given = {} if set(raw) - {"created_at"} else SMALL
        spec = self.spec(name, **given | raw)
        self.driver.create(spec)
        return self.ready(spec)

    def ready(self, spec: Spec) -> Spec:
        """Return the volume in its state *ready*."""
        return in_state(spec, State.READY)

    def found(self, name: str) -> Spec:
        """Return a volume that another host made."""
        volume = self.driver.find(name)
        assert volume is not None
        return self.spec_of(volume)

    def remove(self, spec: Spec) -> None:
        """Remove the volume, as the core does."""
        self.driver.remove(in_state(spec, State.REMOVING))

    def is_attached(self, spec: Spec) -> bool:
        """Tell whether the volume is attached here."""
        return self.driver.is_attached(spec.volume, mountinfo.read())

    def file(self, spec: Spec, name: str = "file") -> Path:
        """Return a file in the volume."""
        return Path(spec.volume.mountpoint) / name

    def record(self, name: str) -> Shared:
        """Return what the cluster says of a volume."""
        shared = self.driver._registry.read(name)
        assert shared is not None
        return shared

    def kill_mapper(self, spec: Spec) -> int:
        """Kill the program that maps a volume; return its pid."""
        image = spec.volume.facts["image"]
        for pid in filter(str.isdigit, os.listdir("/proc")):
            command = processes.command_of(int(pid))
            if image in command and command.startswith(("qemu", "/usr/bin/qemu")):
                os.kill(int(pid), signal.SIGKILL)
                return int(pid)
        raise AssertionError(f"nothing maps {image}")

    def detach_all(self) -> None:
        """Detach all volumes from this host."""
        for volume in self.driver.volumes():
            spec = self.spec_of(volume)
            if self.is_attached(spec):
                self.driver.detach(spec)

    def clear(self) -> None:
        """Take away all volumes, from this host and the cluster."""
        self.detach_all()
        for _ in range(len(list(self.driver.volumes())) + 1):
            for volume in list(self.driver.volumes()):
                # Copies go before what they are of; a mountpoint may be another's.
                with contextlib.suppress(InUse, AlreadyExists):
                    self.remove(self.spec_of(volume))
        self.driver.purge(lambda: False)

    def wait_until_empty(self) -> None:
        """Wait for what snapshots kept of objects: it goes some time after images."""
        place = ("-p", POOL, "-N", self.namespace)
        eventually(
            lambda: "rbd_data." not in self.ceph.rados(*place, "ls"),
            "the data of deleted images is gone",
            seconds=60,
        )

    def close(self) -> None:
        """End the connection."""
        self.driver.close()


@attrs.define(eq=False)
class Hosts:
    """Hosts that share a namespace, each made by a call with its name.

    One of the same name is the same host with its plugin started again. What is given
    ``is_cleared=False`` can't reach the cluster.
    """

    ceph: Ceph
    namespace: str
    folder: Path
    _made: list[HostCase] = attrs.field(factory=list)
    _clearing: list[HostCase] = attrs.field(factory=list)

    def __call__(
        self, name: str = "a", *, is_cleared: bool = True, **settings: Any
    ) -> HostCase:
        given = {"namespace": self.namespace, **settings}
        namespace = given.pop("namespace")
        host = HostCase.of(self.ceph, namespace, self.folder, name, **given)
        self._made.append(host)
        if is_cleared:
            self._clearing.append(host)
        return host

    def clear(self) -> None:
        """Take away all volumes, from all hosts and the cluster."""
        for host in self._clearing:
            host.detach_all()
        for host in self._clearing[:1]:
            host.clear()

    def finish(self) -> None:
        """Take away all volumes, and wait until all of their data is gone."""
        self.clear()
        for host in self._clearing[:1]:
            host.wait_until_empty()

    def close(self) -> None:
        """End all connections."""
        for host in self._made:
            host.close()


def in_state(spec: Spec, state: State) -> Spec:
    """Return the volume in another state of its life."""
    return attrs.evolve(spec, volume=attrs.evolve(spec.volume, state=state))
