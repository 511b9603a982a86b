"""A cluster that hangs, its daemons ended, a host's helpers killed: what users see."""

import contextlib
import errno
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import attrs
import pytest
from support import processes
from support.ceph import Ceph, Daemon
from support.client import PluginError
from support.wait import eventually
from trouble import Forks, Machine, World

from volplugin.admin.client import AdminClient
from volplugin.errors import VolpluginError

pytestmark = pytest.mark.root

RBD: Final = {"driver": "ceph", "size": "16m"}
CEPHFS: Final = {"driver": "cephfs", "size": "16m"}
OPTIONS: Final = {"rbd": RBD, "cephfs": CEPHFS}
EVERY: Final[tuple[Daemon, ...]] = ("mon", "osd", "mgr", "mds")
STORING: Final[tuple[Daemon, ...]] = ("mon", "osd", "mds")
LIMIT: Final = 20.0  # seconds for each call, as configured here


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    """The servers' fork server."""
    made = Forks()
    yield made
    made.close()


@pytest.fixture(scope="module")
def cluster(temporary_folder: None) -> Iterator[Ceph]:
    """A cluster for these tests alone, which stop its daemons."""
    made = Ceph()
    try:
        made.start()
        yield made
    finally:
        made.close()


@pytest.fixture
def world(cluster: Ceph, forks: Forks, tmp_path: Path) -> Iterator[World]:
    """A place in the cluster, which is to be empty afterwards."""
    made = World(cluster, forks, tmp_path)
    yield made
    for daemon in STORING:
        cluster.resume(daemon)
    made.close()


def knows(machine: Machine, names: set[str]) -> bool:
    """Tell whether a host has heard of these volumes."""
    return names <= set(machine.client.list())


@attrs.define
class Call:
    """A call to a server in a thread: what it answered, and after how many seconds."""

    what: str
    do: Callable[[], object]
    error: str | None = None
    seconds: float | None = None
    _thread: threading.Thread | None = None

    def begin(self) -> None:
        """Call."""
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        begun = time.monotonic()
        try:
            self.do()
        except (PluginError, VolpluginError) as error:
            self.error = str(error)
        self.seconds = time.monotonic() - begun

    def end(self) -> None:
        """Wait for the answer."""
        assert self._thread is not None
        self._thread.join(LIMIT + 30)
        assert self.seconds is not None, f"{self.what}: no answer"


def changes(machine: Machine) -> list[Call]:
    """Return one call of each kind, each on a volume of its own."""
    client, admin = machine.client, AdminClient(str(machine.admin_socket))
    calls = []
    for kind, options in OPTIONS.items():
        calls += [
            Call(f"create {kind}", partial(client.create, f"{kind}-c", options)),
            Call(f"mount {kind}", partial(client.mount, f"{kind}-m", "id")),
            Call(f"unmount {kind}", partial(client.unmount, f"{kind}-u", "id")),
            Call(f"remove {kind}", partial(client.remove, f"{kind}-r")),
            Call(f"resize {kind}", partial(admin.resize, f"{kind}-s", size="32m")),
            Call(f"snap {kind}", partial(admin.take_snapshot, f"{kind}-s2", "one")),
        ]
    return calls


def prepare(machine: Machine) -> None:
    """Make the volumes that `changes` changes."""
    client = machine.client
    for kind, options in OPTIONS.items():
        for which in ("m", "u", "r", "s", "s2"):
            client.create(f"{kind}-{which}", options)
        path = Path(client.mount(f"{kind}-u", "id"))
        write_synced(path / "kept", "kept")


def write_synced(file: Path, text: str) -> None:
    """Write a file such that it is in the cluster."""
    with file.open("w") as opened:
        opened.write(text)
        opened.flush()
        os.fsync(opened.fileno())


def answers(machine: Machine, names: Sequence[str]) -> None:
    """Have the server answer what needs no cluster, and work without it."""
    client = attrs.evolve(machine.client, limit=5)
    begun = time.monotonic()
    assert set(names) <= set(client.list())
    for name in names:
        assert client.get(name)["Name"] == name
    assert time.monotonic() - begun < 3
    for driver in ("local", "tmpfs"):
        client.create(driver, {"driver": driver})
        path = Path(client.mount(driver, "id"))
        (path / "file").write_text("text")
        client.unmount(driver, "id")
        client.remove(driver)
    assert time.monotonic() - begun < 10


def finish(world: World, machine: Machine) -> None:
    """Have all that `changes` began done once more, used and removed."""
    client, admin = machine.client, AdminClient(str(machine.admin_socket))
    world.settled(machine, seconds=40)
    for kind, options in OPTIONS.items():
        client.create(f"{kind}-c", options)
        admin.resize(f"{kind}-s", size="32m")
        assert machine.status(f"{kind}-s")["size"] == "32M"
        with contextlib.suppress(VolpluginError):  # it may be there by now
            admin.take_snapshot(f"{kind}-s2", "one")
        assert [s.name for s in admin.snapshots(f"{kind}-s2").snapshots] == ["one"]
        admin.drop_snapshot(f"{kind}-s2", "one")
        for which in ("c", "m", "u", "r", "s", "s2"):
            name = f"{kind}-{which}"
            if name in client.list():
                path = mounted(machine, name)
                if which == "u":
                    assert (path / "kept").read_text() == "kept"
                (path / "file").write_text("text")
                client.unmount(name, "other")
                client.unmount(name, "id")
                client.remove(name)
    assert client.list() == {}
    world.settled(machine)


def mounted(machine: Machine, name: str) -> Path:
    """Mount a volume; a mapper that died before it was noted is in the way for 30 s."""
    paths = []

    def mount() -> bool:
        with contextlib.suppress(PluginError):
            paths.append(Path(machine.client.mount(name, "other")))
        return bool(paths)

    eventually(mount, f"{name} is mounted", seconds=45)
    return paths[0]


# Where each change hangs for a moment, and the cluster stops meanwhile.
MIDDLES: Final = (
    "rbd.image",
    "rbd.noted",
    "export.end",
    "rbd.removing",
    "rbd.resize",
    "cephfs.directory",
    "cephfs.mountpoint",
    "cephfs.unmounted",
    "cephfs.removal",
    "cephfs.resize",
)


@pytest.mark.parametrize("when", ["before", "middle"])
@pytest.mark.timeout(240)
def test_hang(world: World, cluster: Ceph, when: str) -> None:
    """A hanging cluster lets changes fail in time, and nothing else; then all agree."""
    limits = {"create": LIMIT, "mount": LIMIT, "other": LIMIT}
    machine = world.machine(timeouts=limits, timeout=3)
    machine.start()
    prepare(machine)
    if when == "middle":
        machine.stop()
        points = ";".join(f"{point}=sleep:2*1" for point in MIDDLES)
        machine.start(failpoints=points)
    names = list(machine.client.list())
    calls = changes(machine)
    if when == "before":
        cluster.pause("osd")
    for call in calls:
        call.begin()
    if when == "middle":
        time.sleep(1)  # they are at their points
        cluster.pause("osd")
    time.sleep(0.5)
    answers(machine, names)
    for call in calls:
        call.end()
    answers(machine, names)
    cluster.resume("osd")
    told = {call.what: (call.error, call.seconds) for call in calls}
    for call in calls:
        assert call.seconds is not None
        # A resize, and a snapshot, take as long as they take, within their time-outs.
        assert call.seconds < LIMIT + 15, told
        # The metadata server has much of what it needs in memory; a snapshot is quick.
        if call.what.endswith("rbd") and (when, call.what) != ("middle", "snap rbd"):
            assert call.error is not None, told
    finish(world, machine)


def test_restarts(world: World, cluster: Ceph) -> None:
    """Volumes in use live through the end of each daemon, and hosts are followed."""
    a, b = world.machine("a", follow_interval=300), world.machine("b")
    a.start()
    b.start()
    paths = []
    for kind, options in OPTIONS.items():
        a.client.create(kind, options)
        paths.append(Path(a.client.mount(kind, "id")))
    eventually(partial(knows, b, set(OPTIONS)), "b knows both")
    for daemon in EVERY:
        cluster.restart(daemon)
        for path in paths:
            write_synced(path / daemon, daemon)
        b.client.create(daemon, RBD)
        b.client.create(f"{daemon}-fs", CEPHFS)
        made = {daemon, f"{daemon}-fs"}
        what = f"a learns of volumes after the end of {daemon}"
        eventually(partial(knows, a, made), what, seconds=40)
        for name in made:
            a.client.remove(name)
    for kind, path in zip(OPTIONS, paths, strict=True):
        assert (path / "mon").read_text() == "mon"
        a.client.unmount(kind, "id")
        a.client.remove(kind)
    world.settled(a)


def test_down_at_start(world: World, cluster: Ceph) -> None:
    """Without its cluster a server starts, serves the rest, and all when that is up."""
    machine = world.machine()
    machine.start()
    for kind, options in OPTIONS.items():
        machine.client.create(kind, options)
        path = Path(machine.client.mount(kind, "id"))
        write_synced(path / "kept", kind)
        machine.client.unmount(kind, "id")
    machine.stop()
    for daemon in STORING:
        cluster.pause(daemon)
    begun = time.monotonic()
    machine.start()
    assert time.monotonic() - begun < 10
    answers(machine, list(OPTIONS))
    with pytest.raises(PluginError, match="answer"):
        machine.client.mount("rbd", "id")
    for kind in OPTIONS:
        assert machine.status(kind)["cluster"] != "ok"
    for daemon in STORING:
        cluster.resume(daemon)
    for kind in OPTIONS:

        def mounts(kind: str = kind) -> bool:
            with contextlib.suppress(PluginError):
                path = Path(machine.client.mount(kind, "id"))
                assert (path / "kept").read_text() == kind
                return True
            return False

        eventually(mounts, f"{kind} is mounted again", seconds=60)
        machine.client.unmount(kind, "id")
        machine.client.remove(kind)
    world.settled(machine, seconds=30)


def test_dead_mapper(world: World) -> None:
    """A killed mapper gives errors, keeps what was synced, is told, and replaced."""
    machine = world.machine()
    machine.start()
    client = machine.client
    client.create("v", RBD)
    path = Path(client.mount("v", "id"))
    write_synced(path / "kept", "kept")
    (helper,) = machine.helpers("qemu-storage-daemon")
    os.kill(helper, signal.SIGKILL)
    eventually(lambda: not processes.is_alive(helper), "it ends")
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        write_synced(path / "more", "more")
    assert "has died" in machine.status("v")["error"]
    with pytest.raises(PluginError, match="has died: stop the containers"):
        client.mount("v", "other")
    client.unmount("v", "other")
    client.unmount("v", "id")
    begun = time.monotonic()
    path = Path(client.mount("v", "id"))
    assert (path / "kept").read_text() == "kept"
    write_synced(path / "more", "more")
    assert time.monotonic() - begun < 20, "not held up by what the dead one had locked"
    assert "error" not in machine.status("v")
    client.unmount("v", "id")
    client.remove("v")
    world.settled(machine)


def test_dead_mapper_and_server(world: World) -> None:
    """Where server and mapper die at once, the volume is free again without waiting."""
    machine = world.machine()
    machine.start()
    client = machine.client
    client.create("v", RBD)
    path = Path(client.mount("v", "id"))
    write_synced(path / "kept", "kept")
    (helper,) = machine.helpers("qemu-storage-daemon")
    machine.kill()
    os.kill(helper, signal.SIGKILL)
    subprocess.run(["umount", path], check=True)
    machine.start()
    client.unmount("v", "id")
    begun = time.monotonic()
    path = Path(client.mount("v", "id"))
    assert (path / "kept").read_text() == "kept"
    write_synced(path / "more", "more")
    assert time.monotonic() - begun < 20, "not held up by what the dead one had locked"
    client.unmount("v", "id")
    client.remove("v")
    world.settled(machine)


def test_dead_fuse(world: World) -> None:
    """A killed ceph-fuse gives errors, keeps what was synced, is told, and replaced."""
    machine = world.machine()
    machine.start()
    client = machine.client
    client.create("v", CEPHFS)
    path = Path(client.mount("v", "id"))
    write_synced(path / "kept", "kept")
    (helper,) = machine.helpers("ceph-fuse")
    os.kill(helper, signal.SIGKILL)
    eventually(lambda: not processes.is_alive(helper), "it ends")
    with pytest.raises(OSError, match="connect") as raised:
        write_synced(path / "more", "more")
    assert raised.value.errno in {errno.ENOTCONN, errno.ECONNABORTED}
    assert "dead" in machine.status("v")["mount"]
    path = Path(client.mount("v", "other"))
    assert (path / "kept").read_text() == "kept"
    write_synced(path / "more", "more")
    assert "mount" not in machine.status("v")
    for holder in ("id", "other"):
        client.unmount("v", holder)
    client.remove("v")
    world.settled(machine)


def test_full_disk(world: World) -> None:
    """Without room on the host for the making of a file system nothing is made."""
    machine = world.machine()
    machine.start()
    staging = machine.place("ceph") / "staging"
    words = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(staging)]
    subprocess.run(words, check=True)
    try:
        with pytest.raises(PluginError, match=r"(?i)no space"):
            machine.client.create("v", RBD)
        assert machine.client.list() == {}
        assert world.left() == {}
        assert os.listdir(staging) == []
    finally:
        subprocess.run(["umount", staging], check=True)
    machine.client.create("v", RBD)
    machine.client.remove("v")
    world.settled(machine)
