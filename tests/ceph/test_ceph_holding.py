"""Who holds a volume: one writer, and whoever is displaced can write no more."""

import contextlib
import errno
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from support.ceph import POOL, Ceph
from support.plugin import plugin_environment
from support.wait import eventually

from volplugin import failpoints
from volplugin.ceph.bindings import load
from volplugin.ceph.cluster import Cluster
from volplugin.ceph.holding import DEAD_AFTER, DEAD_AFTER_WAIT, Conflict, Holding
from volplugin.ceph.registry import Registry, Shared
from volplugin.errors import InUse, NotFound, Unavailable
from volplugin.model import State, Volume

pytestmark = pytest.mark.root

Connect = Callable[..., Cluster]

IMAGE = "image"
NAME, ID = "db", "1"
BLOCK = 4096

# Has the image open as a mapper's process does, until it is killed.
_CLIENT = """
import sys, time
from volplugin.ceph.bindings import load
rados, rbd = load("rados"), load("rbd")
conf, keyring, pool, namespace, image = sys.argv[1:]
cluster = rados.Rados(
    conffile=conf, name="client.volplugin", conf={"keyring": keyring}
)
cluster.connect()
io = cluster.open_ioctx(pool)
io.set_namespace(namespace)
opened = rbd.Image(io, image)
opened.write(b"x" * 4096, 0)
opened.flush()
print(cluster.get_addrs(), flush=True)
time.sleep(600)
"""


class Host:
    """A host: its plugin's connection, and a client for each mapping it makes."""

    def __init__(
        self,
        connect: Connect,
        namespace: str,
        name: str,
        *,
        identity: str = "",
        boot_id: str = "boot",
    ) -> None:
        self._connect = connect
        self._namespace = namespace
        self._open = contextlib.ExitStack()
        self.name = name
        self.registry = Registry(connect(), POOL, namespace)
        self.holding = Holding(
            self.registry, identity or f"identity-of-{name}", boot_id, name
        )

    def watchers(self) -> list[str]:
        with (
            self.registry.cluster.io(POOL, self._namespace) as io,
            load("rbd").Image(io, IMAGE, read_only=True) as image,
        ):
            return [str(each["addr"]) for each in image.watchers_list()]

    def hold(
        self, conflict: Conflict = "fail", *, access: str = "rw", limit: float = 30
    ) -> Shared:
        return self.holding.hold(
            NAME,
            ID,
            access=access,
            conflict=conflict,
            watchers=self.watchers,
            limit=limit,
        )

    def map(self) -> tuple[Any, str]:
        """Open the image by a client of its own; return it and the client's address."""
        cluster = self._connect()
        io = self._open.enter_context(cluster.io(POOL, self._namespace))
        image = load("rbd").Image(io, IMAGE)
        self._open.callback(_close, image)
        (address,) = cluster.addresses()
        assert address in self.watchers()
        return image, address

    def attach(self, conflict: Conflict = "fail") -> Any:
        """Hold, map and note, as a driver does; return the opened image."""
        self.hold(conflict)
        image, address = self.map()
        self.holding.note_addresses(NAME, ID, [address])
        return image

    def unmap(self) -> None:
        with contextlib.suppress(Unavailable):  # it was fenced
            self._open.close()

    def fence(self) -> list[str]:
        return self.holding.fence(NAME, ID, self.watchers)

    def shared(self) -> Shared:
        found = self.registry.read(NAME)
        assert found is not None
        return found

    def lost(self) -> str | None:
        return self.holding.lost(self.shared())


Hosts = Callable[..., Host]


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    failpoints.arm("")


@pytest.fixture
def hosts(connect: Connect, namespace: str) -> Iterator[Hosts]:
    """Make hosts that share one volume, with an image."""
    made: list[Host] = []

    def host(name: str, **more: str) -> Host:
        made.append(Host(connect, namespace, name, **more))
        return made[-1]

    maker = host("maker")
    volume = Volume(
        name=NAME,
        id=ID,
        backend="ceph",
        driver="rbd",
        mountpoint="/x",
        created_at="2026-01-02T03:04:05.678Z",
        state=State.READY,
    )
    maker.registry.create(Shared(volume=volume))
    rbd = load("rbd")
    with maker.registry.cluster.io(POOL, namespace) as io:
        rbd.RBD().create(io, IMAGE, 16 << 20)
    yield host
    for each in made:
        each.unmap()
    eventually(lambda: not maker.watchers(), "the image has no watchers", seconds=60)
    with maker.registry.cluster.io(POOL, namespace) as io:
        rbd.RBD().remove(io, IMAGE)
    maker.registry.remove(NAME, ID)


def _close(image: Any) -> None:
    with contextlib.suppress(load("rbd").Error):
        image.close()


def writes(image: Any, data: bytes) -> None:
    image.write(data * BLOCK, 0)
    image.flush()


def assert_fenced(image: Any) -> None:
    """Fail unless no write by ``image`` arrives any more."""
    with pytest.raises(load("rbd").Error) as caught:
        writes(image, b"late"[:1])
    assert caught.value.errno in {errno.ESHUTDOWN, errno.EROFS, errno.EIO}


def test_hold_and_release(hosts: Hosts) -> None:
    """A host holds a volume until it lets go of it; each step may be taken again."""
    host = hosts("a")
    assert host.lost() == "not held by this host"
    for _ in range(2):
        held = host.hold()
        assert [each.host for each in held.holders] == ["a"]
    image, address = host.map()
    for _ in range(2):
        noted = host.holding.note_addresses(NAME, ID, [f"v1:{address}"])
        assert noted.holders[0].addresses == (address,)
    assert host.hold().holders == noted.holders  # also while it is mapped
    assert host.lost() is None
    writes(image, b"a")
    host.unmap()
    for _ in range(2):
        host.holding.release(NAME, ID)
    assert host.shared().holders == ()
    assert not host.shared().unclean


def test_holder_is_written_down(hosts: Hosts) -> None:
    """Who holds a volume can be read by people, with its plugin's address."""
    host = hosts("a")
    (holder,) = host.hold().holders
    assert holder.access == "rw"
    assert {holder.address} == host.registry.cluster.addresses()
    assert holder.since.endswith("Z")
    host.holding.release(NAME, ID)


def test_no_volume(hosts: Hosts) -> None:
    """A volume that is gone can't be held, and is let go of without ado."""
    host = hosts("a")
    missing = host.holding
    with pytest.raises(NotFound, match="no record of volume none"):
        missing.hold("none", ID, access="rw", conflict="fail", watchers=list, limit=0)
    missing.release("none", ID)
    missing.release(NAME, "2")


def test_another_writer(hosts: Hosts) -> None:
    """A second writer is refused, and told who it is and what can be done."""
    a, b = hosts("host-a"), hosts("host-b")
    image = a.attach()
    with pytest.raises(InUse) as caught:
        b.hold()
    text = str(caught.value)
    (address,) = a.registry.cluster.addresses()
    assert f"attached on host-a (address {address}) since 20" in text
    assert "stop its container there" in text
    assert "volplugin volume takeover db" in text
    writes(image, b"a")
    assert b.lost() == "held by host-a"
    a.unmap()
    a.holding.release(NAME, ID)
    assert [each.host for each in b.hold().holders] == ["host-b"]


def test_readers(hosts: Hosts) -> None:
    """Readers share a volume with each other, and with no writer."""
    a, b, c = hosts("a"), hosts("b"), hosts("c")
    a.hold(access="ro")
    assert len(b.hold(access="ro").holders) == 2
    with pytest.raises(InUse, match=r"on a .*, read-only, attached on b .*, read-only"):
        c.hold()
    a.holding.release(NAME, ID)
    b.holding.release(NAME, ID)
    c.attach()
    with pytest.raises(InUse, match="on c"):
        a.hold(access="ro")


def test_reader_becomes_writer(hosts: Hosts) -> None:
    """A reader becomes the writer where it is alone."""
    a, b = hosts("a"), hosts("b")
    a.hold(access="ro")
    b.hold(access="ro")
    with pytest.raises(InUse, match="on b"):
        a.hold()
    b.holding.release(NAME, ID)
    (holder,) = a.hold().holders
    assert holder.access == "rw"


def test_raced(hosts: Hosts) -> None:
    """Of hosts that want a volume at once, one has it."""
    rivals = [hosts(f"host-{number}") for number in range(4)]
    keep = hosts("keeper")
    for _ in range(10):
        start = threading.Barrier(len(rivals))

        def race(host: Host, start: threading.Barrier = start) -> bool:
            start.wait()
            try:
                host.attach()
            except InUse:
                return False
            return True

        with ThreadPoolExecutor(len(rivals)) as pool:
            won = list(pool.map(race, rivals))
        assert won.count(True) == 1
        winner = rivals[won.index(True)]
        assert [each.host for each in keep.shared().holders] == [winner.name]
        winner.unmap()
        winner.holding.release(NAME, ID)


def test_dead_writer(hosts: Hosts) -> None:
    """A writer without a watcher is fenced, after it was seen so for a while."""
    a, b = hosts("host-a"), hosts("host-b")
    image = a.attach()
    writes(image, b"a")
    (dead,) = a.shared().holders
    a.unmap()  # and is not heard of again
    began = time.monotonic()
    held = b.hold()
    assert time.monotonic() - began >= DEAD_AFTER
    assert [each.host for each in held.holders] == ["host-b"]
    assert held.unclean
    assert held.taken_by.startswith("host-b at 20")
    assert (a.lost() or "").startswith("taken over by host-b at 20")
    with pytest.raises(Unavailable, match="db is taken over by host-b at 20"):
        a.holding.note_addresses(NAME, ID, dead.addresses)
    a.holding.release(NAME, ID)
    assert b.lost() is None


def test_fenced_before_it_mapped(hosts: Hosts) -> None:
    """A host that was displaced between hold and map is told before it writes."""
    a, b = hosts("a"), hosts("b")
    a.hold()
    b.hold("fence")
    _, address = a.map()
    with pytest.raises(Unavailable, match="taken over by b"):
        a.holding.note_addresses(NAME, ID, [address])


def test_fence(hosts: Hosts) -> None:
    """A live writer that is fenced can write no more; the next one's data is whole."""
    a, b = hosts("host-a"), hosts("host-b")
    theirs = a.attach()
    writes(theirs, b"a")
    ours = b.attach("fence")
    writes(ours, b"b")
    assert_fenced(theirs)
    assert ours.read(0, BLOCK) == b"b" * BLOCK
    # Only the mapping was cut off: the plugin there goes on, and says what happened.
    assert (a.lost() or "").startswith("taken over by host-b")
    with pytest.raises(InUse, match="host-b"):
        a.hold()
    shared = b.shared()
    assert shared.unclean
    assert [each.host for each in shared.holders] == ["host-b"]


def test_takeover(hosts: Hosts) -> None:
    """Taking a volume over tells whom it hit, and leaves it to whoever comes next."""
    a, b, c = hosts("host-a"), hosts("host-b"), hosts("host-c")
    image = a.attach()
    (address,) = a.shared().holders[0].addresses
    assert b.fence() == [f"host-a ({address})"]
    assert b.fence() == []
    assert b.shared().holders == ()
    assert_fenced(image)
    writes(c.attach(), b"c")
    assert c.fence() == []  # it is ours already
    assert c.lost() is None


def test_takeover_of_a_dead_host(hosts: Hosts) -> None:
    """A holder is fenced also when nothing is seen of it: it might come back."""
    a, b = hosts("host-a"), hosts("host-b")
    a.hold()
    a.holding.note_addresses(NAME, ID, ["127.0.0.1:0/123456"])
    assert b.fence() == ["host-a (127.0.0.1:0/123456)"]
    assert b.shared().unclean


def test_takeover_of_readers(hosts: Hosts) -> None:
    """Readers that are displaced leave a file system that is clean."""
    a, b = hosts("host-a"), hosts("host-b")
    a.hold(access="ro")
    assert b.fence() == ["host-a (not mapped yet)"]
    assert not b.shared().unclean


@pytest.mark.parametrize("times", [1, 2])
def test_fence_cut_short(hosts: Hosts, times: int) -> None:
    """A fencing that was cut short is finished by the next one."""
    a, b = hosts("a"), hosts("b")
    image = a.attach()
    failpoints.arm(f"holding.fence=error:{errno.EIO}*{times}")
    for _ in range(times):
        with pytest.raises(OSError, match="failpoint"):
            b.hold("fence")
        assert_fenced(image)
        assert [each.host for each in b.shared().holders] == ["a"]
    writes(b.attach("fence"), b"b")


def test_newcomer_is_fenced(hosts: Hosts) -> None:
    """A client that comes while others are fenced is fenced as well."""
    a, b = hosts("a"), hosts("b")
    a.attach()
    looks: list[Any] = []

    def watchers() -> list[str]:
        if len(looks) == 1:
            looks.append(a.map()[0])
        looks.append(None)
        return b.watchers()

    b.holding.fence(NAME, ID, watchers)
    newcomer = next(each for each in looks if each is not None)
    assert_fenced(newcomer)


def test_stranger(hosts: Hosts) -> None:
    """A client that no host's record tells of is in the way, until it is fenced."""
    a, b = hosts("a"), hosts("b")
    image, address = a.map()
    with pytest.raises(InUse, match=f"clients that no host holds: {address}"):
        b.hold()
    with pytest.raises(InUse, match=address):
        b.hold(access="ro")
    assert b.fence() == [f"client {address}"]
    assert b.shared().unclean
    assert_fenced(image)
    b.attach()


def test_earlier_boot(hosts: Hosts) -> None:
    """What a host held before it was booted again is no obstacle to it."""
    before = hosts("a", boot_id="boot-1")
    image = before.attach()
    after = hosts("a", identity="identity-of-a", boot_id="boot-2")
    held = after.hold()
    assert [each.boot_id for each in held.holders] == ["boot-2"]
    assert held.unclean
    assert_fenced(image)


def test_cloned_host(hosts: Hosts) -> None:
    """A host with the identity of another, its clone, takes nothing from it."""
    original = hosts("a", identity="same", boot_id="boot-1")
    clone = hosts("b", identity="same", boot_id="boot-2")
    image = original.attach()
    with pytest.raises(InUse, match="attached on a"):
        clone.hold()
    writes(image, b"a")


def test_wait_for_release(hosts: Hosts) -> None:
    """A host that waits has the volume once the other lets go of it."""
    a, b = hosts("a"), hosts("b")
    a.attach()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(b.hold, "wait", limit=60)
        time.sleep(1)  # long enough to look twice
        assert not waiting.done()
        a.unmap()
        a.holding.release(NAME, ID)
        held = waiting.result(60)
    assert [each.host for each in held.holders] == ["b"]
    assert not held.unclean


def test_wait_for_the_living(hosts: Hosts) -> None:
    """A host that waits fences nobody who is alive, but gives up."""
    a, b = hosts("a"), hosts("b")
    image = a.attach()
    with pytest.raises(InUse, match="attached on a"):
        b.hold("wait", limit=2)
    writes(image, b"a")


def test_wait_for_the_dead(hosts: Hosts) -> None:
    """A host that waits fences a writer of which nothing is seen for a while."""
    a, b = hosts("a"), hosts("b")
    a.attach()
    a.unmap()
    began = time.monotonic()
    held = b.hold("wait", limit=0)
    assert time.monotonic() - began >= DEAD_AFTER_WAIT
    assert held.unclean


def test_killed_client(hosts: Hosts, ceph: Ceph, namespace: str) -> None:
    """A host that lets go of a volume clears away what its killed client left."""
    a, b = hosts("a"), hosts("b")
    a.hold()
    with _client(ceph, namespace) as client:
        assert client.stdout is not None
        address = client.stdout.readline().strip()
        a.holding.note_addresses(NAME, ID, [address])
        client.kill()
        client.wait(10)
    assert address in a.watchers()  # a dead client's watch lingers
    a.holding.release(NAME, ID, watchers=a.watchers)
    eventually(lambda: a.watchers() == [], "the watch is gone", seconds=10)
    writes(b.attach(), b"b")


def test_killed_host(hosts: Hosts, ceph: Ceph, namespace: str) -> None:
    """The volume of a host that died moves once the cluster has noticed its death."""
    a, b = hosts("a"), hosts("b")
    a.hold()
    with _client(ceph, namespace) as client:
        assert client.stdout is not None
        address = client.stdout.readline().strip()
        a.holding.note_addresses(NAME, ID, [address])
        client.kill()
        client.wait(10)
    with pytest.raises(InUse, match="on a"):
        b.hold()
    held = b.hold("wait", limit=60)
    assert held.unclean
    image, _ = b.map()
    writes(image, b"b")


def _client(ceph: Ceph, namespace: str) -> "subprocess.Popen[str]":
    words = (ceph.conf, ceph.least(), POOL, namespace, IMAGE)
    return subprocess.Popen(
        [sys.executable, "-c", _CLIENT, *map(str, words)],
        stdout=subprocess.PIPE,
        text=True,
        env=plugin_environment(),
    )
