"""Volumes of a cluster on several hosts: one server each, and what they see and do."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from hosts import SMALL, Hosts, Server, Writer, assert_written, checksum, fill, sharing
from support.ceph import POOL, Ceph
from support.client import PluginError
from support.plugin import plugin_environment
from support.wait import eventually

from volplugin.ceph.cluster import Cluster
from volplugin.ceph.images import Image, Images

pytestmark = pytest.mark.root


@pytest.fixture
def hosts(ceph: Ceph, namespace: str) -> Iterator[Hosts]:
    """Hosts that share a namespace."""
    with sharing(ceph, namespace) as made:
        yield made


def test_move_under_load(hosts: Hosts) -> None:
    """A volume moves to and fro, no create needed, with all that was synced."""
    a, b = hosts("a"), hosts("b")
    a.client.create("v", SMALL)
    hosts.all_know("v")
    synced = 0
    sums: dict[str, str] = {}
    for turn, host in enumerate([a, b, a, b]):
        path = host.mount("v")
        for name, written in sums.items():
            assert checksum(path / name) == written
        if turn:
            assert_written(path / "log", synced)
        sums[f"sum{turn}"] = fill(path / f"sum{turn}")
        with Writer(path / "log", synced) as writer:
            eventually(writer.is_under_way, "it writes")
            synced = writer.stop()
        host.unmount("v")
        assert not host.is_mounted("v")
    assert synced >= 20
    hosts.assert_whole("v")


def test_attach_at_once(hosts: Hosts) -> None:
    """Of two hosts that mount at once one does; the other is told of it."""
    a, b = hosts("a"), hosts("b")
    for name in ("v", "w", "x"):
        a.client.create(name, SMALL)
        hosts.all_know(name)
        with ThreadPoolExecutor() as pool:
            tries = {host: pool.submit(host.mount, name) for host in (a, b)}
        lost = [host for host, tried in tries.items() if tried.exception()]
        assert len(lost) == 1, tries
        (winner,) = {a, b} - set(lost)
        said = str(tries[lost[0]].exception())
        assert f"attached on {winner.name} (address 127.0.0.1:0/" in said
        assert f"volplugin volume takeover {name}" in said
        assert not lost[0].is_mounted(name)
        written = fill(tries[winner].result() / "file")
        winner.unmount(name)
        assert checksum(lost[0].mount(name) / "file") == written


def test_create_at_once(hosts: Hosts) -> None:
    """Of hosts that create one name at once, all succeed where the options agree."""
    every = [hosts(name) for name in "abcd"]
    same = [f"same{number}" for number in range(10)]
    other = [f"other{number}" for number in range(10)]

    def create(host: Server, name: str) -> str | None:
        size = 16 + (every.index(host) if name in other else 0)
        try:
            host.client.create(name, {"driver": "ceph", "size": f"{size}M"})
        except PluginError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(len(every) * 5) as pool:
        told = {
            (name, host.name): pool.submit(create, host, name)
            for pair in zip(same, other, strict=True)
            for name in pair
            for host in every
        }
    outcomes = {key: each.result() for key, each in told.items()}
    for name in same:
        assert [outcomes[name, host.name] for host in every] == [None] * 4
    for name in other:
        lost = [outcomes[name, host.name] for host in every]
        faults = [each for each in lost if each is not None]
        assert len(faults) == 3, lost
        assert all("it exists with other options: size is" in f for f in faults), faults
    hosts.all_know(*same, *other)
    shown = hosts.ceph.rbd("ls", f"{POOL}/{hosts.namespace}").split()
    assert sorted(each.partition(".")[0] for each in shown) == sorted(same + other)
    assert len({str(host.client.get("same0")["Status"]) for host in every}) == 1


def test_snapshots(hosts: Hosts) -> None:
    """What one host's commands do with snapshots, copies and sizes all hosts see."""
    a, b = hosts("a"), hosts("b")
    # XFS, as ext4 grows by CAP_SYS_RESOURCE alone.
    a.client.create("v", {"driver": "ceph", "fs": "xfs", "size": "300M"})
    hosts.all_know("v")
    written = fill(a.mount("v") / "file")
    assert b.told("snapshot", "create", "v@empty").strip() == "v@empty"
    a.told("snapshot", "create", "v@full")
    assert "v@full" in b.told("snapshot", "ls", "v")
    # Refused where another host has it; there it is done.
    refused = b.run("volume", "resize", "v", "320M")
    assert refused.returncode == 1
    assert "a: resize it there" in refused.stderr
    assert b.status("v")["size"] == "300M"
    a.told("volume", "resize", "v", "320M")
    eventually(lambda: b.status("v")["size"] == "320M", "b sees the new size")
    b.client.create("copy", {"driver": "ceph", "from": "v@full"})
    assert checksum(b.mount("copy") / "file") == written
    hosts.all_know("copy")
    refused = a.run("snapshot", "rm", "v@full")
    assert refused.returncode == 1
    assert "copy" in refused.stderr
    a.unmount("v")
    b.unmount("copy")
    assert "copy" in a.refusal("Remove", "v")
    a.told("volume", "resize", "v", "340M")
    figures = os.statvfs(b.mount("v"))
    assert figures.f_blocks * figures.f_frsize > 270 << 20  # but for XFS's log
    b.unmount("v")
    a.client.remove("copy")
    b.told("snapshot", "rm", "v@full")
    a.told("snapshot", "rm", "v@empty")
    a.client.remove("v")


def test_remove(hosts: Hosts) -> None:
    """A volume is removed by any host while none has it, and what is new is new."""
    a, b = hosts("a"), hosts("b")
    a.client.create("v", SMALL)
    hosts.all_know("v")
    (a.mount("v") / "file").write_text("old")
    said = b.refusal("Remove", "v")
    assert "in use on a (127.0.0.1:0/" in said
    assert a.is_mounted("v")
    a.unmount("v")
    a.client.remove("v")
    eventually(lambda: b.client.list() == {}, "b sees that it is gone")
    # Anew, while b does not look: it mounts what there is, not what it knew.
    a.client.create("w", SMALL)
    hosts.all_know("w")
    (b.mount("w") / "file").write_text("old")
    b.unmount("w")
    b.plugin.stop()
    a.client.remove("w")
    a.client.create("w", {**SMALL, "size": "48M"})
    b.plugin.start()
    with contextlib.suppress(PluginError):  # it may not have looked yet
        assert not (b.mount("w") / "file").exists()
    eventually(lambda: b.status("w")["size"] == "48M", "b has the new one's record")
    assert not (b.mount("w") / "file").exists()


def test_read_only(hosts: Hosts) -> None:
    """A volume with access=ro is on many hosts at once; nobody writes it."""
    a, b = hosts("a"), hosts("b")
    a.client.create("v", SMALL)
    written = fill(a.mount("v") / "file")
    a.unmount("v")
    a.client.create("view", {"driver": "ceph", "from": "v", "access": "ro"})
    hosts.all_know("v", "view")
    for host in (a, b):
        path = host.mount("view")
        assert checksum(path / "file") == written
        with pytest.raises(OSError, match="Read-only"):
            (path / "file").write_text("new")
    holder = a.status("view")["holder"]
    eventually(
        lambda: all(f"{n} (" in a.status("view")["holder"] for n in "ab"), holder
    )
    # Who writes to the very image keeps them out, and no one else is let in.
    for host in (a, b):
        host.unmount("view")
    with opened(hosts, "view") as address:
        assert address in a.refusal("Mount", "view", ID="1")
    a.mount("view")


def test_stranger(hosts: Hosts) -> None:
    """An image that some other program has open is not mounted, and its client named.

    It is, once that has closed it.
    """
    a, b = hosts("a"), hosts("b")
    a.client.create("v", SMALL)
    hosts.all_know("v")
    with opened(hosts, "v") as address:
        for host in (a, b):
            said = host.refusal("Mount", "v", ID="1")
            assert address in said
            assert "takeover v" in said
            assert address in host.refusal("Remove", "v")
    b.mount("v")


@contextlib.contextmanager
def opened(hosts: Hosts, volume: str) -> Iterator[str]:
    """A client that is none of volplugin's and has the image open to write.

    The value is its address.
    """
    stranger = Cluster(hosts.ceph.access())
    image = hosts.image(volume).rpartition("/")[2]
    images = Images(stranger, hosts.namespace)
    try:
        (address,) = stranger.addresses()
        with images.opened(Image(pool=POOL, name=image), "use it"):
            yield address
    finally:
        stranger.close()


def test_lost_store(hosts: Hosts) -> None:
    """A host without its store gets all volumes back, and one that joins has them.

    Also what it has mounted stays, and nobody else gets it meanwhile.
    """
    a, b = hosts("a"), hosts("b")
    names = [f"v{number}" for number in range(4)]
    for name in names:
        a.client.create(name, SMALL)
    written = fill(a.mount("v0") / "file")
    hosts.all_know(*names)
    before = {name: a.client.get(name) for name in names}
    a.plugin.stop()
    shutil.rmtree(a.plugin.root / "store")
    told = subprocess.run(
        a.plugin.command("recover"),
        capture_output=True,
        text=True,
        check=False,
        env=plugin_environment(),
        timeout=60,
    )
    assert told.returncode == 0, told.stderr
    a.plugin.start()
    assert set(a.client.list()) == set(names)
    for name in names:
        after = a.client.get(name)
        for key in ("Name", "Mountpoint", "CreatedAt"):
            assert after[key] == before[name][key]
    assert "attached on a" in b.refusal("Mount", "v0", ID="1")
    assert checksum(a.mount("v0") / "file") == written
    a.unmount("v0")
    assert not a.is_mounted("v0")
    late = hosts("c")
    eventually(lambda: set(late.client.list()) == set(names), "c has all volumes")
    assert checksum(late.mount("v0") / "file") == written


def test_cephfs(ceph: Ceph, namespace: str) -> None:
    """A volume of CephFS is written by two hosts at once, and removed with neither."""
    with sharing(ceph, namespace, directory=f"/{namespace}") as hosts:
        a, b = hosts("a"), hosts("b")
        a.client.create("shared", {"driver": "cephfs", "size": "64M"})
        hosts.all_know("shared")
        here, there = a.mount("shared"), b.mount("shared")
        with Writer(here / "a") as first, Writer(there / "b") as second:
            for writer in (first, second):
                eventually(writer.is_under_way, "it writes")
            synced = [first.stop(), second.stop()]
        assert_written(here / "b", synced[1])
        assert_written(there / "a", synced[0])
        a.unmount("shared")
        assert "in use by b (since" in a.refusal("Remove", "shared")
        assert b.is_mounted("shared")
        b.unmount("shared")
        a.client.remove("shared")
        eventually(lambda: b.client.list() == {}, "b sees that it is gone")
