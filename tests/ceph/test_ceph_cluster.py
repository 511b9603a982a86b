"""The connection to a cluster: errors, time-outs, fencing, and nothing left of it."""

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import attrs
import pytest
from support.ceph import POOL, Ceph, Daemon
from support.wait import eventually

from volplugin.ceph import bindings
from volplugin.ceph.cluster import Access, Cluster, plain_address
from volplugin.errors import (
    InvalidArgument,
    NotFound,
    Unavailable,
    Unsupported,
    VolpluginError,
)

pytestmark = pytest.mark.root

Connect = Callable[..., Cluster]


def refused(cluster: Cluster, pool: str = POOL) -> VolpluginError:
    with pytest.raises(VolpluginError) as caught, cluster.io(pool):
        raise AssertionError("the block was reached")
    return caught.value


@pytest.mark.parametrize(
    ("shown", "plain"),
    [
        ("10.0.0.1:0/123", "10.0.0.1:0/123"),
        ("v1:10.0.0.1:0/123", "10.0.0.1:0/123"),
        ("[v2:10.0.0.1:0/1,v1:10.0.0.1:0/1]", "10.0.0.1:0/1"),
        ("[fd00::1]:0/7", "[fd00::1]:0/7"),
        ("v2:[fd00::1]:0/7", "[fd00::1]:0/7"),
        ("[v2:[fd00::1]:0/7,v1:[fd00::1]:0/7]", "[fd00::1]:0/7"),
        ("any:10.0.0.1:0/123", "10.0.0.1:0/123"),
    ],
)
def test_plain_address(shown: str, plain: str) -> None:
    """An address is told in one form, whatever was put around it."""
    assert plain_address(shown) == plain


def test_bindings_are_loaded_once() -> None:
    """Threads that ask at the same time get the same modules."""
    with ThreadPoolExecutor(8) as pool:
        found = set(map(id, pool.map(bindings.load, ["rbd"] * 20)))
    assert len(found) == 1


def test_bindings_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A binding that is not installed is told with the package that has it."""
    with pytest.raises(Unsupported, match="apt-get install python3-none"):
        bindings.load("none")  # type: ignore[arg-type]


def test_io(connect: Connect, namespace: str) -> None:
    """What is written in a namespace is there, and in no other."""
    cluster = connect()
    with cluster.io(POOL, namespace) as io:
        io.write_full("x", b"1")
    with cluster.io(POOL, namespace) as io:
        assert io.read("x") == b"1"
    with pytest.raises(NotFound), cluster.io(POOL) as io:
        io.read("x")
    with cluster.io(POOL, namespace) as io:
        io.remove_object("x")
    assert cluster.health == "ok"


def test_no_connection_before_use(connect: Connect) -> None:
    """A cluster that nobody used has no health to tell, and closes without effect."""
    cluster = connect(conf="/nonexistent/ceph.conf")
    assert cluster.health == "not connected yet"
    cluster.close()


def test_addresses(connect: Connect, ceph: Ceph, namespace: str) -> None:
    """Our address is the one that an object's watchers show."""
    cluster = connect()
    with cluster.io(POOL, namespace) as io:
        io.write_full("x", b"1")
        watch = io.watch("x", lambda *_: None)
        shown = ceph.rados("-p", POOL, "-N", namespace, "listwatchers", "x")
        watch.close()
        io.remove_object("x")
    (address,) = cluster.addresses()
    assert f"watcher={address} " in shown


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"conf": "/none/ceph.conf"}, "/none/ceph.conf: no such file"),
        ({"keyring": "/none/keyring"}, "/none/keyring: no such file"),
        ({"user": "nobody"}, "does not know client.nobody by the key in"),
        ({"user": "nobody", "keyring": None}, "no key of client.nobody"),
    ],
)
def test_bad_access(connect: Connect, changes: dict[str, object], text: str) -> None:
    """What is wrong with conf, user or keyring is said, with its value."""
    cluster = connect(**changes)
    assert text in str(refused(cluster))
    assert text in cluster.health
    assert cluster.health.startswith("unreachable since 20")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("gibberish\n", "is no keyring"),
        (
            "[client.volplugin]\n\tkey = AQDDZQdroFOkChAAK8UV2I9bpcRjdowAIRCBzw==\n",
            "does not know client.volplugin by the key in",
        ),
    ],
)
def test_bad_key(connect: Connect, tmp_path: Path, content: str, text: str) -> None:
    """A keyring that is none, or has another key, is told as that."""
    keyring = tmp_path / "keyring"
    keyring.write_text(content)
    error = refused(connect(keyring=str(keyring)))
    assert isinstance(error, Unavailable)
    assert text in str(error)
    assert str(keyring) in str(error)


def test_bad_conf(connect: Connect, tmp_path: Path) -> None:
    """A configuration that can't be parsed is told as that."""
    conf = tmp_path / "ceph.conf"
    conf.write_text("gibberish\n[[\n")
    assert f"{conf} or " in str(refused(connect(conf=str(conf))))


def test_no_monitor(connect: Connect, tmp_path: Path) -> None:
    """Monitors that don't answer cost the time-out once; who asks next is told so."""
    conf = tmp_path / "ceph.conf"
    conf.write_text("[global]\nmon host = 127.0.0.1:9\n")
    cluster = connect(conf=str(conf), timeout=1)
    with ThreadPoolExecutor(8) as pool:
        began = time.monotonic()
        errors = list(pool.map(refused, [cluster] * 8))
        took = time.monotonic() - began
    assert {type(error) for error in errors} == {Unavailable}
    assert "no monitor" in str(errors[0])
    assert took < 6  # not eight times the time-out


def test_wrong_pool(connect: Connect) -> None:
    """A pool that is not there is named, with those that are."""
    error = refused(connect(), "nope")
    assert isinstance(error, InvalidArgument)
    assert "no pool 'nope', but" in str(error)
    assert POOL in str(error)


def test_new_pool(connect: Connect, ceph: Ceph) -> None:
    """A pool that was made since the connect is found."""
    cluster = connect(user="admin", keyring=None)
    refused(cluster, "young")
    ceph.ceph("osd", "pool", "create", "young", "1")
    try:
        with cluster.io("young") as io:
            io.write_full("x", b"1")
    finally:
        words = ("young", "young", "--yes-i-really-really-mean-it")
        ceph.ceph("osd", "pool", "rm", *words)


def test_no_right_to_pool(connect: Connect) -> None:
    """A user without rights to a pool is told to look at its caps."""
    message = "refused client.volplugin: see its key and caps"
    with pytest.raises(Unavailable, match=message), connect().io("cephfs_meta") as io:
        io.write_full("x", b"1")


def test_blocklist(connect: Connect, namespace: str) -> None:
    """A blocklisted client can't write; ours goes on, and the client connects anew."""
    ours, theirs = connect(), connect()
    with theirs.io(POOL, namespace) as io:
        io.write_full("x", b"theirs")
    (address,) = theirs.addresses()
    ours.blocklist(address)
    ours.blocklist(f"v1:{address}")  # idempotent
    with (
        pytest.raises(Unavailable, match="fenced"),
        theirs.io(POOL, namespace) as io,
    ):
        io.write_full("x", b"late")
    assert "blocklisted" in theirs.health
    with ours.io(POOL, namespace) as io:
        assert io.read("x") == b"theirs"
        io.remove_object("x")
    with theirs.io(POOL, namespace) as io:
        assert "x" not in {each.key for each in io.list_objects()}
    assert theirs.addresses() != {address}
    assert theirs.health == "ok"


def test_blocklist_ourselves(connect: Connect) -> None:
    """Our own connection is not blocklisted."""
    cluster = connect()
    (address,) = cluster.addresses()
    with pytest.raises(InvalidArgument, match="own connection"):
        cluster.blocklist(address)


def test_blocklist_nonsense(connect: Connect) -> None:
    """What is no address is refused with its value."""
    with pytest.raises(InvalidArgument, match="blocklist nonsense"):
        connect().blocklist("nonsense")


def test_hung_osd(own_ceph: Ceph) -> None:
    """An OSD that hangs costs the time-out, and what was asked takes effect later."""
    cluster = Cluster(own_ceph.access(timeout=2))
    with cluster.io(POOL) as io:
        io.write_full("x", b"1")
    own_ceph.pause("osd")
    with (
        pytest.raises(Unavailable, match="did not answer within 2 s"),
        cluster.io(POOL) as io,
    ):
        io.write_full("x", b"2")
    assert cluster.health.startswith("unreachable since 20")
    own_ceph.resume("osd")
    with cluster.io(POOL) as io:
        assert io.read("x") == b"2"
    assert cluster.health == "ok"
    cluster.close()


def test_hung_monitor(own_ceph: Ceph) -> None:
    """A monitor that hangs costs I/O nothing, and other requests the time-out."""
    cluster = Cluster(own_ceph.access(timeout=2))
    with cluster.io(POOL) as io:
        io.write_full("x", b"1")
    own_ceph.pause("mon")
    with cluster.io(POOL) as io:
        assert io.read("x") == b"1"
    message = "did not answer within 2 s"
    with pytest.raises(Unavailable, match=message), cluster.io("nope"):
        pass
    with pytest.raises(Unavailable, match=message):
        cluster.blocklist("127.0.0.1:0/1")
    own_ceph.resume("mon")
    cluster.blocklist("127.0.0.1:0/1")
    cluster.close()


def test_restarts(own_ceph: Ceph) -> None:
    """A connection outlives restarts of the OSD and the monitor."""
    cluster = Cluster(own_ceph.access(timeout=15))
    daemons: tuple[Daemon, ...] = ("osd", "mon", "osd")
    for daemon in daemons:
        with cluster.io(POOL) as io:
            io.write_full("x", daemon.encode())
        own_ceph.restart(daemon)
        with cluster.io(POOL) as io:
            assert io.read("x") == daemon.encode()
    cluster.close()


def test_health_is_the_clusters(connect: Connect, namespace: str) -> None:
    """An error of the caller's own tells nothing of the cluster's health."""
    cluster = connect()
    with cluster.io(POOL, namespace) as io:
        list(io.list_objects())
    with pytest.raises(Unavailable), cluster.io(POOL, namespace):
        raise Unavailable("taken over")
    assert cluster.health == "ok"


def test_time_out_is_whole() -> None:
    """A time-out is rounded up to whole seconds, and never to none at all."""
    assert [Access(timeout=given).timeout for given in (0, 0.2, 1, 2.5)] == [1, 1, 1, 3]


def test_close(access: Access, namespace: str) -> None:
    """After close no thread and no socket is left, also after failed connects."""
    before = _own()
    for _ in range(3):
        cluster = Cluster(access)
        with cluster.io(POOL, namespace) as io:
            list(io.list_objects())
        assert _own() > before
        cluster.close()
        cluster.close()
        failing = Cluster(attrs.evolve(access, user="nobody"))
        refused(failing)
        failing.close()
        assert "was let go of" in str(refused(cluster))
    eventually(lambda: _own() == before, f"{_own()} threads, descriptors: {before}")


def test_close_waits(access: Access, namespace: str) -> None:
    """Close lets an operation that is under way end first."""
    cluster = Cluster(access)
    inside, go_on = threading.Event(), threading.Event()

    def work() -> set[str]:
        with cluster.io(POOL, namespace) as io:
            inside.set()
            go_on.wait(10)
            return {each.key for each in io.list_objects()}

    with ThreadPoolExecutor(2) as pool:
        working = pool.submit(work)
        assert inside.wait(10)
        closing = pool.submit(cluster.close)
        assert not closing.done()
        go_on.set()
        assert "x" not in working.result(10)
        closing.result(10)


def _own() -> tuple[int, int]:
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))
