"""The records of shared volumes: one winner, nothing lost, everybody told."""

import contextlib
import errno
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import attrs
import pytest
from support.ceph import POOL, Ceph
from support.wait import eventually

from volplugin import failpoints
from volplugin.ceph import records
from volplugin.ceph.cluster import Cluster
from volplugin.ceph.registry import INDEX, PREFIX, Holder, Registry, Shared
from volplugin.errors import (
    AlreadyExists,
    InvalidArgument,
    NoSpace,
    NotFound,
    Unavailable,
    Unsupported,
)
from volplugin.model import State, Volume

pytestmark = pytest.mark.root

Connect = Callable[..., Cluster]
Open = Callable[[], Registry]


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    failpoints.arm("")


@pytest.fixture
def opened(connect: Connect, namespace: str) -> Open:
    """Open the namespace's registry by a client of its own at each call."""
    return lambda: Registry(connect(), POOL, namespace)


@pytest.fixture
def registry(opened: Open) -> Registry:
    return opened()


def shared(name: str = "db", volume_id: str = "1", **more: object) -> Shared:
    volume = Volume(
        name=name,
        id=volume_id,
        backend="ceph",
        driver="rbd",
        options={"size": "10G", "opt.fs": "ext4"},
        facts={"image": f"{name}.{volume_id}"},
        mountpoint=f"/var/lib/volplugin/ceph/volumes/{name}",
        created_at="2026-01-02T03:04:05.678Z",
    )
    return Shared(volume=volume, maker="host-a", **more)  # type: ignore[arg-type]


def holder(number: int = 1) -> Holder:
    return Holder(
        identity=f"identity-{number}",
        boot_id="boot",
        host=f"host-{number}",
        since="2026-01-02T03:04:05Z",
        addresses=(f"10.0.0.{number}:0/{number}",),
    )


def adds(number: int) -> Callable[[Shared], Shared]:
    def change(before: Shared) -> Shared:
        if any(each.is_same(holder(number)) for each in before.holders):
            return before
        return attrs.evolve(before, holders=(*before.holders, holder(number)))

    return change


def clear(registry: Registry) -> None:
    """Remove all volumes, and wait until the last notice of it is out."""
    for name, volume_id in registry.names().items():
        registry.remove(name, volume_id)
    assert registry.names() == {}


def test_record_as_written() -> None:
    """A record is read back as it was written, but for its version."""
    written = shared(
        holders=(holder(1), holder(2)), unclean=True, taken_by="host-b at some time"
    )
    read = records.decode("db", records.encode(written), 7)
    assert read == written
    assert read.version == 7


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        ({"version": 2}, Unsupported, "form 2.*upgrade"),
        ({"more": 1}, Unavailable, "damaged, or a newer"),
        ({"volume": {}}, Unavailable, "damaged"),
        ({"holders": [{"identity": "x", "lease": 3}]}, Unavailable, "damaged"),
    ],
)
def test_record_of_another_form(
    change: dict[str, object], kind: type[Exception], text: str
) -> None:
    """A record that a newer volplugin wrote is refused, never half read."""
    written = json.loads(records.encode(shared())) | change
    with pytest.raises(kind, match=text):
        records.decode("db", json.dumps(written).encode(), 1)


@pytest.mark.parametrize("data", [b"", b"x", b"[]", b"3", b"{}", b"\xff"])
def test_record_of_nothing(data: bytes) -> None:
    """What is no record is told as damaged."""
    with pytest.raises(Unavailable, match="damaged"):
        records.decode("db", data, 1)


def test_record_of_another_name() -> None:
    """A record in another's place is refused."""
    with pytest.raises(Unavailable, match="damaged"):
        records.decode("other", records.encode(shared()), 1)


def test_record_too_long() -> None:
    """A record that a read would not get whole is refused before it is written."""
    long = attrs.evolve(shared().volume, options={"label": "x" * 17_000})
    with pytest.raises(InvalidArgument, match="give it shorter options"):
        records.encode(attrs.evolve(shared(), volume=long))


def test_life(registry: Registry) -> None:
    """A record is made, read, changed and removed; each step may be taken again."""
    assert registry.read("db") is None
    assert registry.names() == {}
    for _ in range(2):
        registry.create(shared())
    assert registry.read("db") == shared()
    for _ in range(2):
        changed = registry.change("db", "1", adds(1))
    assert changed.holders == (holder(1),)
    found = registry.read("db")
    assert found == changed
    assert found is not None
    assert found.version == changed.version
    assert registry.names() == {"db": "1"}
    assert list(registry.all()) == [changed]
    for _ in range(2):
        registry.remove("db", "1")
    assert registry.read("db") is None
    assert list(registry.all()) == []


def test_other_id(registry: Registry) -> None:
    """A volume of the same name with another id is told, and left alone."""
    registry.create(shared())
    message = "another volume of the name db, made by host-a at 2026-01-02"
    with pytest.raises(AlreadyExists, match=message):
        registry.create(shared(volume_id="2"))
    with pytest.raises(AlreadyExists, match=message):
        registry.change("db", "2", adds(1))
    registry.remove("db", "2")
    assert registry.read("db") == shared()
    assert registry.names() == {"db": "1"}
    clear(registry)


def test_change_of_nothing(registry: Registry) -> None:
    """A change of a volume that is not there is told."""
    with pytest.raises(NotFound, match="no record of volume db"):
        registry.change("db", "1", adds(1))


def test_change_refuses(registry: Registry) -> None:
    """An error from within a change reaches the caller, and nothing was written."""
    registry.create(shared())

    def refuse(before: Shared) -> Shared:
        raise InvalidArgument("no")

    with pytest.raises(InvalidArgument, match="no"):
        registry.change("db", "1", refuse)
    assert registry.read("db") == shared()
    clear(registry)


def test_lost_race(registry: Registry, opened: Open) -> None:
    """A change that lost against another is made again, upon the winner's value."""
    registry.create(shared())
    other, seen = opened(), []

    def change(before: Shared) -> Shared:
        seen.append(before)
        if len(seen) == 1:
            other.change("db", "1", adds(2))
        return adds(1)(before)

    after = registry.change("db", "1", change)
    assert after.holders == (holder(2), holder(1))
    assert len(seen) == 2
    clear(registry)


def test_removed_in_between(registry: Registry, opened: Open) -> None:
    """A change that lost against a removal makes nothing."""
    registry.create(shared())
    other = opened()

    def change(before: Shared) -> Shared:
        other.remove("db", "1")
        return adds(1)(before)

    with pytest.raises(NotFound):
        registry.change("db", "1", change)
    assert registry.read("db") is None


def test_made_anew_in_between(registry: Registry, opened: Open) -> None:
    """A change never hits a volume of the same name that came in between."""
    registry.create(shared())
    other = opened()

    def change(before: Shared) -> Shared:
        other.remove("db", "1")
        other.create(shared(volume_id="2"))
        return adds(1)(before)

    with pytest.raises(AlreadyExists):
        registry.change("db", "1", change)
    assert registry.read("db") == shared(volume_id="2")
    clear(registry)


def test_changes_in_parallel(opened: Open) -> None:
    """Of changes by many at once none is lost."""
    registries = [opened() for _ in range(4)]
    registries[0].create(shared())
    with ThreadPoolExecutor(8) as pool:
        numbers = range(1, 25)
        list(pool.map(lambda n: registries[n % 4].change("db", "1", adds(n)), numbers))
    found = registries[0].read("db")
    assert found is not None
    assert {each.identity for each in found.holders} == {
        f"identity-{number}" for number in numbers
    }
    clear(registries[0])


def test_names_raced(opened: Open) -> None:
    """Of four clients that create the same 200 names, each name has one winner."""
    registries = {str(number): opened() for number in range(4)}
    names = [f"v{number}" for number in range(200)]

    def race(client: str) -> list[str]:
        won = []
        for name in names:
            try:
                registries[client].create(shared(name, client))
            except AlreadyExists:
                continue
            won.append(name)
        return won

    with ThreadPoolExecutor(4) as pool:
        won = dict(zip(registries, pool.map(race, registries), strict=True))
    assert sorted(name for each in won.values() for name in each) == sorted(names)
    found = {each.volume.name: each.volume.id for each in registries["0"].all()}
    assert found == {name: client for client in won for name in won[client]}
    assert registries["1"].names() == found

    def remove(client: str) -> None:
        for name, volume_id in found.items():
            registries[client].remove(name, volume_id)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(remove, registries))
    assert registries["0"].names() == {}


def test_pages(registry: Registry) -> None:
    """An index of more names than one call gives is read whole."""
    names = [f"v{number:04}" for number in range(2500)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: registry.create(shared(name)), names))
    assert list(registry.names()) == names
    assert [each.volume.name for each in registry.all()] == names
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: registry.remove(name, "1"), names))
    assert registry.names() == {}


def test_unreadable_is_left_out(
    registry: Registry, connect: Connect, namespace: str
) -> None:
    """A record that can't be read keeps no other from being listed."""
    for name in ("a", "b", "c"):
        registry.create(shared(name))
    with connect().io(POOL, namespace) as io:
        io.write_full(PREFIX + "b", b'{"version": 9}')
    assert [each.volume.name for each in registry.all()] == ["a", "c"]
    with pytest.raises(Unsupported, match="upgrade"):
        registry.read("b")
    with pytest.raises(Unsupported, match="upgrade"):
        registry.create(shared("b"))
    with connect().io(POOL, namespace) as io:
        io.write_full(PREFIX + "b", records.encode(shared("b")))
    clear(registry)


@pytest.mark.parametrize("point", ["registry.create", "registry.remove"])
def test_index_left_behind(registry: Registry, point: str) -> None:
    """What was cut short between record and index is finished by the next attempt."""
    if point == "registry.remove":
        registry.create(shared())
    failpoints.arm(f"{point}=error:{errno.EIO}*1")
    for attempt in range(2):
        try:
            if point == "registry.create":
                registry.create(shared())
            else:
                registry.remove("db", "1")
        except OSError:
            assert attempt == 0
    assert registry.names() == {"registry.create": {"db": "1"}}.get(point, {})
    clear(registry)


def test_stale_key(registry: Registry) -> None:
    """A listing takes a name out of the index that a dead host left there."""
    registry.create(shared())
    failpoints.arm(f"registry.remove=error:{errno.EIO}*1")
    with pytest.raises(OSError, match="failpoint"):
        registry.remove("db", "1")
    assert registry.names() == {"db": "1"}
    assert list(registry.all()) == []
    assert registry.names() == {}


def test_key_of_an_earlier_volume(registry: Registry) -> None:
    """A listing sets the id right where a host died before it could."""
    registry.create(shared())
    failpoints.arm(f"registry.remove=error:{errno.EIO}*1")
    with pytest.raises(OSError, match="failpoint"):
        registry.remove("db", "1")
    failpoints.arm(f"registry.create=error:{errno.EIO}*1")
    with pytest.raises(OSError, match="failpoint"):
        registry.create(shared(volume_id="2"))
    assert registry.names() == {"db": "1"}
    assert list(registry.all()) == [shared(volume_id="2")]
    assert registry.names() == {"db": "2"}
    registry.remove("db", "1")  # the earlier one: its end takes no newer name away
    assert registry.names() == {"db": "2"}
    clear(registry)


def test_notices(registry: Registry, opened: Open) -> None:
    """Each change is told to whoever watches, also to ourselves."""
    theirs: list[str | None] = []
    ours: list[str | None] = []
    watches = [opened().watch(theirs.append), registry.watch(ours.append)]
    assert [each.is_alive() for each in watches] == [True, True]
    registry.create(shared())
    eventually(lambda: theirs == ours == ["db"], f"a notice of create: {theirs}")
    registry.change("db", "1", adds(1))
    eventually(lambda: theirs == ours == ["db"] * 2, f"of the change: {theirs}")
    registry.change("db", "1", adds(1))  # changes nothing
    registry.remove("db", "1")
    eventually(lambda: theirs == ours == ["db"] * 3, f"of the removal: {theirs}")
    for each in watches:
        each.close()
        each.close()
        assert not each.is_alive()
    registry.create(shared())
    registry.remove("db", "1")
    assert theirs == ["db"] * 3


def test_many_notices(registry: Registry, opened: Open) -> None:
    """Of many changes in a row each is told, several at a time."""
    heard: list[str | None] = []
    watch = opened().watch(heard.append)
    names = {f"v{number}" for number in range(100)}
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: registry.create(shared(name)), names))
    eventually(lambda: set(heard) == names, "all are told")
    watch.close()
    eventually(
        lambda: "ceph-notices" not in {each.name for each in threading.enumerate()},
        "the thread that tells of them has ended",
    )
    clear(registry)


def test_hearer_fails(registry: Registry) -> None:
    """An error in who hears of a change ends no watch."""
    heard: list[str | None] = []

    def changed(name: str | None) -> None:
        heard.append(name)
        raise ValueError(name)

    watch = registry.watch(changed)
    registry.create(shared())
    eventually(lambda: heard == ["db"], "the first notice")
    registry.remove("db", "1")
    eventually(lambda: heard == ["db"] * 2, "the second")
    assert watch.is_alive()
    watch.close()


def test_watch_is_lost(registry: Registry, opened: Open) -> None:
    """A watch whose client is blocklisted says that it missed changes."""
    heard: list[str | None] = []
    theirs = opened()
    watch = theirs.watch(heard.append)
    (address,) = theirs.cluster.addresses()
    registry.cluster.blocklist(address)
    eventually(lambda: None in heard, "the loss is told", seconds=60)
    assert not watch.is_alive()
    watch.close()
    again = theirs.watch(heard.append)  # by a new connection
    registry.create(shared())
    eventually(lambda: "db" in heard, "a notice by the new watch")
    again.close()
    clear(registry)


def test_dead_watcher_holds_up_nobody(registry: Registry, own_ceph: Ceph) -> None:
    """A host that hangs delays neither changes nor notices to others for long."""
    cluster = Cluster(own_ceph.access())
    registry = Registry(cluster, POOL, "")
    hang = threading.Event()
    heard: list[str | None] = []
    other = Cluster(own_ceph.access())

    def hangs(name: str | None) -> None:
        hang.wait(20)

    hung = Registry(other, POOL, "").watch(hangs)
    watch = registry.watch(heard.append)
    registry.create(shared())
    began = time.monotonic()
    for number in range(20):
        registry.change("db", "1", adds(number))
    assert time.monotonic() - began < 10
    registry.create(shared("last"))
    eventually(lambda: "last" in heard, "the last notice")
    hang.set()
    for each in (watch, hung):
        each.close()
    for closed in (cluster, other):
        closed.close()


def test_osd_restarts(own_ceph: Ceph) -> None:
    """A watch outlives a restart of the OSD, or says that it is lost."""
    cluster = Cluster(own_ceph.access())
    registry = Registry(cluster, POOL, "")
    heard: list[str | None] = []
    watch = registry.watch(heard.append)
    own_ceph.restart("osd")
    number = 0

    def is_told() -> bool:
        nonlocal number
        number += 1
        registry.create(shared(f"v{number}"))
        return bool(heard)

    eventually(is_told, "a notice, or the loss", seconds=60)
    if None in heard:
        assert not watch.is_alive()
    watch.close()
    again = registry.watch(heard.append)
    registry.create(shared("last"))
    eventually(lambda: "last" in heard, "the last notice")
    again.close()
    cluster.close()


def test_watch_of_a_hung_cluster(own_ceph: Ceph) -> None:
    """A watch of an OSD that hangs is closed within the time-out, also twice."""
    cluster = Cluster(own_ceph.access(timeout=2))
    watch = Registry(cluster, POOL, "").watch(lambda name: None)
    own_ceph.pause("osd")
    watch.close()
    watch.close()
    own_ceph.resume("osd")
    Registry(cluster, POOL, "").create(shared())
    del watch
    own_ceph.pause("osd")
    cluster.close()
    own_ceph.resume("osd")


def test_time_out(own_ceph: Ceph) -> None:
    """A write that was told to have failed may take effect; asking again finds it."""
    cluster = Cluster(own_ceph.access(timeout=2))
    registry = Registry(cluster, POOL, "")
    registry.create(shared())
    own_ceph.pause("osd")
    with pytest.raises(Unavailable, match="within 2 s"):
        registry.create(shared("new"))
    with pytest.raises(Unavailable, match="within 2 s"):
        registry.change("db", "1", adds(1))
    own_ceph.resume("osd")
    registry.create(shared("new"))
    assert registry.read("new") == shared("new")
    assert registry.change("db", "1", adds(1)).holders == (holder(1),)
    cluster.close()


def test_listing_of_a_hung_cluster(own_ceph: Ceph) -> None:
    """A listing of a cluster that hangs fails, and leaves no name out."""
    cluster = Cluster(own_ceph.access(timeout=2))
    registry = Registry(cluster, POOL, "")
    names = [f"v{number:03}" for number in range(150)]
    for name in names:
        registry.create(shared(name))
    listing = registry.all()
    assert next(listing).volume.name == names[0]  # more is to be read
    own_ceph.pause("osd")
    for attempt in (listing, registry.all()):
        with pytest.raises(Unavailable, match="within 2 s"):
            list(attempt)
    own_ceph.resume("osd")
    assert [each.volume.name for each in registry.all()] == names
    cluster.close()


def test_time_out_of_create_and_effect(own_ceph: Ceph) -> None:
    """A create that timed out is a success where it took effect meanwhile."""
    cluster = Cluster(own_ceph.access(timeout=4))
    registry = Registry(cluster, POOL, "")
    with cluster.io(POOL):
        own_ceph.pause("osd")  # it is connected by now
    with resumed_later(own_ceph):
        registry.create(shared())
    assert [each.volume.name for each in registry.all()] == ["db"]
    cluster.close()


def test_time_out_of_change_and_effect(own_ceph: Ceph) -> None:
    """A change that timed out is a success where it took effect meanwhile."""
    cluster = Cluster(own_ceph.access(timeout=4))
    registry = Registry(cluster, POOL, "")
    registry.create(shared())
    seen: list[Shared] = []

    def change(before: Shared) -> Shared:
        if not seen:
            own_ceph.pause("osd")
        seen.append(before)
        return adds(1)(before)

    with resumed_later(own_ceph):
        changed = registry.change("db", "1", change)
    assert changed.holders == (holder(1),)
    assert seen[-1] == changed  # it was there when it was looked at again
    cluster.close()


@contextlib.contextmanager
def resumed_later(ceph: Ceph) -> Iterator[None]:
    """Let the OSD go on after a time-out of 4 s, while it is looked at again."""
    resuming = threading.Timer(6, lambda: ceph.resume("osd"))
    resuming.start()
    yield
    resuming.join()


def test_full(own_ceph: Ceph) -> None:
    """A full cluster is told at once; what is there can be removed."""
    cluster = Cluster(own_ceph.access(timeout=30))
    registry = Registry(cluster, POOL, "")
    registry.create(shared())
    own_ceph.ceph("osd", "pool", "set-quota", POOL, "max_objects", "1")
    flags = "full_quota"
    eventually(
        lambda: flags in own_ceph.ceph("osd", "pool", "ls", "detail"),
        "the pool is full",
        seconds=60,
    )
    with pytest.raises(NoSpace, match="quota"):
        registry.create(shared("new"))
    registry.remove("db", "1")
    assert registry.names() == {}
    cluster.close()


def test_index_is_the_listing_alone(
    registry: Registry, connect: Connect, namespace: str
) -> None:
    """Without its index a volume is still read, changed and removed."""
    registry.create(shared())
    with connect().io(POOL, namespace) as io:
        io.remove_object(INDEX)
    assert registry.names() == {}
    assert registry.change("db", "1", adds(1)).holders == (holder(1),)
    registry.remove("db", "1")
    assert registry.read("db") is None


def test_ready(registry: Registry) -> None:
    """A volume becomes ready by a change that is told to all."""
    registry.create(shared())

    def ready(before: Shared) -> Shared:
        volume = attrs.evolve(before.volume, state=State.READY)
        return attrs.evolve(before, volume=volume)

    registry.change("db", "1", ready)
    found = registry.read("db")
    assert found is not None
    assert found.volume.state is State.READY
    clear(registry)
