"""A cluster in memory, a driver that shares it, and hosts with real stores on it."""

import asyncio
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import attrs
import pytest

from volplugin import drivers
from volplugin.attachments import Attachments
from volplugin.backends import Backend, Backends
from volplugin.catalog import Catalog
from volplugin.changes import Caller, Changes
from volplugin.config import BackendConfig, Config, Timeouts
from volplugin.core import Core
from volplugin.doors import ANY_DOOR, Door
from volplugin.drivers.driver import Driver, Plan, Snapshot, Spec
from volplugin.errors import (
    AlreadyExists,
    InUse,
    InvalidArgument,
    NotFound,
    Unavailable,
)
from volplugin.following import Followers
from volplugin.host.mountinfo import Mount
from volplugin.manager import VolumeManager
from volplugin.model import Client, State, Volume
from volplugin.operations import Operations
from volplugin.options import option, text
from volplugin.store.store import Store

LIMIT: Final = 20.0  # seconds after which a test that hangs fails
BOOT: Final = "boot"
ENGINE: Final = Client(program="dockerd", pid=os.getpid(), started=1)


@attrs.frozen(kw_only=True)
class Options:
    """A volume's."""

    size: str | None = option(help="its limit", parse=text, default=None)
    source: str | None = option(help="a copy", name="from", parse=text, default=None)


@attrs.frozen(kw_only=True)
class Settings:
    """A backend's."""

    cluster: str = option(help="which one", parse=text, default="one")
    user: str = option(help="as whom", parse=text, default="admin")


@attrs.define(eq=False)
class Watch:
    """A subscription; ``lost`` is one that the cluster has dropped."""

    cluster: "Cluster"
    changed: Callable[[str | None], None]
    lost: bool = False

    def is_alive(self) -> bool:
        return not self.lost

    def close(self) -> None:
        self.cluster.ask("unfollow")
        with self.cluster.lock:
            self.cluster.watches.remove(self)


class Cluster:
    """Records by name, and who follows them. A test may take it down or hold it up."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.volumes: dict[str, Volume] = {}
        self.holders: dict[str, str] = {}  # volume id to the host that has it
        self.snapshots: defaultdict[str, dict[str, Snapshot]] = defaultdict(dict)
        self.watches: list[Watch] = []
        self.calls: list[tuple[str, str]] = []
        self.down = False
        self.muted = False  # notices are lost
        self.held: dict[str, threading.Event] = {}
        self.begun: defaultdict[str, threading.Event] = defaultdict(threading.Event)
        self.errors: dict[tuple[str, str], Exception] = {}
        self.drivers: list[Shared] = []
        self.faults: list[str] = []

    def ask(self, call: str, name: str = "") -> None:
        """Stand for a round trip: counted, held up, or in vain."""
        with self.lock:
            self.calls.append((call, name))
            held = self.held.get(call)
        self.begun[call].set()
        if held is not None and not held.wait(LIMIT):
            self.faults.append(f"{call} was held up for ever")
        if self.down:
            raise Unavailable("the cluster is down")
        if (call, name) in self.errors:
            raise self.errors[call, name]

    def count(self, call: str, name: str | None = None) -> int:
        """Return how often it was asked."""
        with self.lock:
            return sum(c == call and name in (None, n) for c, n in self.calls)

    @contextmanager
    def holding(self, *calls: str) -> Iterator[None]:
        """Hold these calls up until the block ends."""
        event = threading.Event()
        for call in calls:
            self.begun[call].clear()
            self.held[call] = event
        try:
            yield
        finally:
            event.set()
            for call in calls:
                self.held.pop(call, None)

    def put(self, volume: Volume) -> None:
        """Have it as some host's doing, and tell of it."""
        with self.lock:
            self.volumes[volume.name] = volume
        self.notify(volume.name)

    def drop(self, name: str) -> None:
        """Have it gone, and tell of it."""
        with self.lock:
            self.volumes.pop(name, None)
        self.notify(name)

    def notify(self, name: str | None) -> None:
        """Tell all who follow, in a thread that is not theirs."""
        if self.muted:
            return
        with self.lock:
            watches = list(self.watches)
        for watch in watches:
            if watch.is_alive():
                watch.changed(name)


CLUSTERS: defaultdict[str, Cluster] = defaultdict(Cluster)


class Plain(Driver):
    """A driver of this host alone, that does nothing."""

    name = "plain"
    Options = Options
    Config = Settings

    def __init__(self, config: Any, place: str) -> None:
        self.place = place

    def open(self) -> None:
        pass

    def roots(self) -> Sequence[str]:
        return (self.place,)

    def plan(self, name: str, volume_id: str, options: Any) -> Plan:
        return Plan(mountpoint=f"{self.place}/{name}")

    def create(self, spec: Spec) -> None:
        pass

    def remove(self, spec: Spec) -> None:
        pass

    def attach(self, spec: Spec) -> None:
        pass

    def detach(self, spec: Spec) -> None:
        pass

    def attaches(self, volume: Volume) -> bool:
        return False

    def is_attached(self, volume: Volume, table: Sequence[Mount]) -> bool:
        return False

    def status(
        self, volume: Volume, options: Any, *, attached: bool
    ) -> Mapping[str, Any]:
        return {}


class Shared(Driver):
    """A driver of a `Cluster`. A call of it after its end is a fault of the test."""

    name = "shared"
    Options = Options
    Config = Settings

    def __init__(self, config: Any, place: str) -> None:
        self.cluster = CLUSTERS[config.cluster]
        self.cluster.drivers.append(self)
        self.config = config
        self.place = place
        self.backend = os.path.basename(place)
        self.host = os.path.basename(os.path.dirname(place))
        self.opened = 0
        self.closed = 0
        self._running = 0

    @contextmanager
    def _asking(self, call: str, name: str = "") -> Iterator[None]:
        if self.closed:
            self.cluster.faults.append(f"{call} of a driver that is closed")
        with self.cluster.lock:
            self._running += 1
        try:
            self.cluster.ask(call, name)
            yield
        finally:
            with self.cluster.lock:
                self._running -= 1

    def open(self) -> None:
        self.opened += 1

    def roots(self) -> Sequence[str]:
        return (self.place,)

    def plan(self, name: str, volume_id: str, options: Any) -> Plan:
        return Plan(mountpoint=f"{self.place}/{name}")

    def create(self, spec: Spec) -> None:
        volume = spec.volume
        with self._asking("create", volume.name):
            with self.cluster.lock:
                found = self.cluster.volumes.get(volume.name)
                if found is not None and found.id != volume.id:
                    raise AlreadyExists("another host was first")
                self.cluster.volumes[volume.name] = volume
            self.cluster.notify(volume.name)
            self.cluster.ask("make", volume.name)
            self.cluster.put(attrs.evolve(volume, state=State.READY))

    def remove(self, spec: Spec) -> None:
        volume = spec.volume
        with self._asking("remove", volume.name):
            with self.cluster.lock:
                found = self.cluster.volumes.get(volume.name)
                if found is None or found.id != volume.id:
                    return
                holder = self.cluster.holders.get(volume.id, self.host)
                if holder != self.host:
                    raise InUse(f"host {holder} has it")
                going = attrs.evolve(found, state=State.REMOVING)
            self.cluster.put(going)
            self.cluster.ask("erase", volume.name)
            self.cluster.drop(volume.name)

    def attach(self, spec: Spec) -> None:
        volume = spec.volume
        with self._asking("attach", volume.name):
            with self.cluster.lock:
                found = self.cluster.volumes.get(volume.name)
                if found is None or found.id != volume.id:
                    raise NotFound("the cluster has no such volume")
                holder = self.cluster.holders.setdefault(volume.id, self.host)
            if holder != self.host:
                raise InUse(f"host {holder} has it")

    def detach(self, spec: Spec) -> None:
        with self._asking("detach", spec.volume.name), self.cluster.lock:
            if self.cluster.holders.get(spec.volume.id) == self.host:
                del self.cluster.holders[spec.volume.id]

    def attaches(self, volume: Volume) -> bool:
        return True

    def is_attached(self, volume: Volume, table: Sequence[Mount]) -> bool:
        return self.cluster.holders.get(volume.id) == self.host

    def status(
        self, volume: Volume, options: Any, *, attached: bool
    ) -> Mapping[str, Any]:
        return {"cluster": self.health(), "size": options.size}

    # Resizes

    def plan_resize(self, spec: Spec, options: Any, *, attached: bool) -> None:
        pass

    def resize(self, spec: Spec, *, attached: bool) -> None:
        with self._asking("resize", spec.volume.name):
            if spec.volume.name not in self.cluster.volumes:
                raise NotFound("the cluster has no such volume")
            self.cluster.put(attrs.evolve(spec.volume, state=State.READY, pending={}))

    # Shares

    def find(self, name: str) -> Volume | None:
        with self._asking("find", name):
            found = self.cluster.volumes.get(name)
            return None if found is None else self._ours(found)

    def volumes(self) -> list[Volume]:
        with self._asking("volumes"), self.cluster.lock:
            return [self._ours(volume) for volume in self.cluster.volumes.values()]

    def _ours(self, volume: Volume) -> Volume:
        where = f"{self.place}/{volume.name}"
        return attrs.evolve(volume, backend=self.backend, mountpoint=where)

    def follow(self, changed: Callable[[str | None], None]) -> Watch:
        with self._asking("follow"):
            watch = Watch(self.cluster, changed)
            with self.cluster.lock:
                self.cluster.watches.append(watch)
            return watch

    def health(self) -> str:
        return "down" if self.cluster.down else "ok"

    def close(self) -> None:
        self.closed += 1
        if self.closed > 1 or self._running:
            self.cluster.faults.append(
                f"closed {self.closed} times, {self._running} calls run"
            )

    def purge(self, stop: Callable[[], bool]) -> bool:
        with self._asking("purge"):
            return True

    # Snapshots, Clones, TakesOver

    def snapshots(self, spec: Spec) -> list[Snapshot]:
        with self._asking("snapshots", spec.volume.name):
            return list(self.cluster.snapshots[spec.volume.id].values())

    def take_snapshot(self, spec: Spec, name: str, *, attached: bool) -> None:
        with self._asking("take_snapshot", spec.volume.name):
            snapshots = self.cluster.snapshots[spec.volume.id]
            if name in snapshots:
                raise AlreadyExists(f"there is a snapshot {name}")
            size = 1 if attached else 0
            snapshots[name] = Snapshot(name=name, created_at="now", size=size)

    def drop_snapshot(self, spec: Spec, name: str) -> None:
        with self._asking("drop_snapshot", spec.volume.name):
            if self.cluster.snapshots[spec.volume.id].pop(name, None) is None:
                raise NotFound(f"there is no snapshot {name}")

    def plan_clone(self, source: Spec, snapshot: str | None, options: Any) -> None:
        with self._asking("plan_clone", f"{source.volume.name}@{snapshot}"):
            if snapshot and snapshot not in self.cluster.snapshots[source.volume.id]:
                raise InvalidArgument(f"there is no snapshot {snapshot}")

    def take_over(self, spec: Spec) -> list[str]:
        with self._asking("take_over", spec.volume.name), self.cluster.lock:
            holder = self.cluster.holders.get(spec.volume.id, self.host)
            if holder == self.host:
                return []
            del self.cluster.holders[spec.volume.id]
            return [holder]


class Host:
    """What one server has, without its sockets: a real store, and all above it."""

    def __init__(self, folder: Path, **backends: Mapping[str, object]) -> None:
        self.name = folder.name
        self._folder = folder
        folder.mkdir(exist_ok=True)
        self.store = Store(str(folder / "store"))
        self.backends = Backends(self.config(**backends))
        self.catalog = Catalog(self.store, self.backends, BOOT)
        self.core = Core(self.catalog, Attachments(self.catalog))
        self.changes = Changes()
        self.manager = VolumeManager(self.core, self.changes, Timeouts())
        self.operations = Operations(self.core, self.changes)
        self.followers = Followers(self.core, self.changes)
        self.closed: set[Backend] = set()  # those that a test has closed itself
        self._tasks: list[asyncio.Task[None]] = []

    def config(self, **backends: Mapping[str, object]) -> Config:
        """Return a configuration with these backends beside the drivers' own."""
        backends = {"ceph": {"user": "me"}, **backends}
        found = {
            name: BackendConfig(
                name=name,
                driver=str(settings.get("driver", "shared")),
                settings={k: v for k, v in settings.items() if k != "driver"},
            )
            for name, settings in backends.items()
        }
        folder = str(self._folder)
        return Config(root=folder, default_backend="ceph", backends=found)

    def follow(self, interval: float = LIMIT) -> asyncio.Task[None]:
        """Follow the clusters, as the server does, until the test ends."""
        task = asyncio.create_task(self.followers.keep_following(interval))
        self._tasks.append(task)
        return task

    async def create(self, name: str, door: Door = ANY_DOOR, **asked: str) -> None:
        """Create a volume; ``driver`` and ``from_`` are options too."""
        asked = {key.rstrip("_"): value for key, value in asked.items()}
        await self.manager.create(name, asked, ENGINE, Caller(), door)

    async def remove(self, name: str) -> None:
        """Remove a volume."""
        await self.manager.remove(name, ENGINE, Caller())

    async def mount(self, name: str) -> str:
        """Mount a volume."""
        return await self.manager.mount(name, "id", ENGINE, Caller())

    async def unmount(self, name: str) -> None:
        """Take back `mount`."""
        await self.manager.unmount(name, "id", ENGINE, Caller())

    def id(self, name: str) -> str | None:
        """Return the id of the volume that an engine would see, or None."""
        volume = self.catalog.find(name)
        return None if volume is None else volume.id

    async def close(self) -> None:
        """End it as the server does; nothing of it may be stuck."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        assert await self.changes.drain(LIMIT)
        open_ = set(self.backends.all()) - self.closed
        assert all([await backend.close(5) for backend in open_])
        self.store.close()


class World:
    """Hosts on clusters."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cluster = CLUSTERS["one"]
        self._hosts: list[Host] = []

    def host(self, name: str, **backends: Mapping[str, object]) -> Host:
        """Start a host; one of the same name has the earlier one's store."""
        host = Host(self.folder / name, **backends)
        self._hosts.append(host)
        return host

    async def end(self, host: Host) -> None:
        """End a host before the test does."""
        self._hosts.remove(host)
        await host.close()

    async def close(self) -> None:
        """End all hosts; nobody may have done what the contract forbids."""
        for host in self._hosts:
            await host.close()
        for cluster in CLUSTERS.values():
            assert not cluster.faults, cluster.faults
            assert not cluster.watches, "a subscription was left"
            assert all(driver.closed < 2 for driver in cluster.drivers)


Test = Callable[[World], Coroutine[Any, Any, None]]
Run = Callable[[Test], None]


async def until(true: Callable[[], object]) -> None:
    """Return once it holds, on the loop that makes it so."""
    async with asyncio.timeout(10):
        while not true():  # noqa: ASYNC110  other tasks and threads make it true
            await asyncio.sleep(0.005)


def runner(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return what runs a test on a loop, in a world of its own; it leaves no task."""
    modules = {name: (__name__, name.title()) for name in ("plain", "shared")}
    monkeypatch.setattr(drivers, "_MODULES", modules)
    monkeypatch.setattr(drivers, "NAMES", ("plain",))
    monkeypatch.setattr(drivers, "SHARED", ("shared",))
    monkeypatch.setattr(drivers, "ALIASES", {"krbd": "ceph"})
    monkeypatch.setattr("volplugin.catalog.SHARED", ("shared",))
    CLUSTERS.clear()

    async def checked(test: Test) -> None:
        world = World(folder)
        try:
            await asyncio.wait_for(test(world), LIMIT)
        finally:
            await world.close()
        await asyncio.sleep(0.01)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    def run(test: Test) -> None:
        asyncio.run(checked(test))

    return run
