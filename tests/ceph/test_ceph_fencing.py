"""Hosts that hang, die or are cut off, and what the next host gets of their volumes."""

import errno
import os
import subprocess
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import pytest
from hosts import SMALL, Hosts, Server, Writer, assert_written, checksum, fill, sharing
from support import commands
from support.ceph import Ceph
from support.client import PluginError
from support.require import require
from support.wait import eventually

pytestmark = pytest.mark.root

# Seconds, generous: until a dead host's volume is another's. The cluster keeps a dead
# client for 30, and is waited for where nothing is forced.
_DEAD: Final = 60.0
_AT_ONCE: Final = 20.0


@pytest.fixture
def hosts(ceph: Ceph, namespace: str) -> Iterator[Hosts]:
    """Hosts that share a namespace."""
    with sharing(ceph, namespace) as made:
        yield made


def test_hung_host(hosts: Hosts) -> None:
    """What hung and was fenced writes nothing more, says so, and can be cleared away.

    Its other volumes go on as they were.
    """
    a, b = hosts("a"), hosts("b")
    for name in ("v", "other"):
        a.client.create(name, SMALL)
    hosts.all_know("v", "other")
    there = a.mount("v")
    kept = fill(there / "kept")
    elsewhere = a.mount("other")
    with Writer(there / "log") as writer, Writer(elsewhere / "log") as other:
        eventually(writer.is_under_way, "it writes")
        a.hang()
        synced = writer.synced
        assert "attached on a (address 127" in b.refusal("Mount", "v", ID="1")
        said = b.told("volume", "takeover", "v")
        assert said.startswith("v: taken from a (127.0.0.1:0/"), said
        path = b.mount("v")
        assert checksum(path / "kept") == kept
        assert_written(path / "log", synced)
        new = fill(path / "new")
        hung = other.synced
        a.wake()
        assert writer.error() in {errno.EIO, errno.EROFS}
        eventually(lambda: other.synced > hung + 5, "the other volume goes on")
        assert_fenced(a)
        a.plugin.restart()
        assert_fenced(a)
        assert b.status("v")["holder"].startswith("b (")
        # What is left is cleared away: the volume stays with the one that took it.
        a.unmount("v")
        assert not a.is_mounted("v")
        assert not a.mapping("v")
        assert "attached on b (address 127" in a.refusal("Mount", "v", ID="1")
        assert "in use on b (127.0.0.1:0/" in a.refusal("Remove", "v")
        assert checksum(path / "new") == new
        b.unmount("v")
        hosts.assert_whole("v")
        path = a.mount("v")
        assert checksum(path / "new") == new
        assert_written(path / "log", synced)
        fill(path / "back")
        written = other.stop()
        assert_written(elsewhere / "log", written)


def assert_fenced(host: Server) -> None:
    """Check that a host tells that its volume was taken, and gives it to nobody."""
    eventually(
        lambda: "taken over by b at" in host.status("v").get("error", ""),
        f"Status of {host.name} tells of it",
    )
    said = host.refusal("Mount", "v", ID="another")
    assert "taken over by b at" in said
    assert "stop the containers that have it here" in said


@pytest.fixture
def sharers(ceph: Ceph, namespace: str) -> Iterator[Hosts]:
    """Hosts that share a directory of CephFS as well."""
    with sharing(ceph, namespace, directory=f"/{namespace}") as made:
        yield made


@pytest.mark.timeout(240)
def test_dead_host(sharers: Hosts) -> None:
    """A dead host's volumes are another's within the bound, by what on-conflict says.

    With fence at once, else when the cluster has forgotten its clients: with fail a
    Mount that is tried again, with wait one that waits. What nobody took is the dead
    host's own when it is back. Where the server alone has died, nobody gets anything.

    A volume of CephFS is had by others all the while, but is not removed.
    """
    hosts = sharers
    a, b, c = hosts("a"), hosts("b"), hosts("c")
    policies = ("fail", "wait", "fence", "left")
    sums = {}
    for name in policies:
        chosen = {"on-conflict": name} if name != "left" else {}
        a.client.create(name, {**SMALL, **chosen})
        sums[name] = fill(a.mount(name) / "file")
    c.client.create("alive", SMALL)
    a.client.create("shared", {"driver": "cephfs", "size": "64M"})
    sums["shared"] = fill(a.mount("shared") / "file")
    hosts.all_know(*policies, "alive", "shared")
    with Writer(c.mount("alive") / "log") as writer:
        a.die()
        c.plugin.kill()
        begun = time.monotonic()
        with ThreadPoolExecutor() as pool:
            mounts = [pool.submit(taken, b, name) for name in policies[:3]]
        died = time.monotonic() - begun
        assert mounts[2].result() - begun < _AT_ONCE
        assert died < _DEAD
        assert "attached on c" in b.refusal("Mount", "alive", ID="1")
        c.plugin.start()
        synced = writer.stop()
    assert_written(c.mount("alive", "2") / "log", synced)
    for name in policies[:3]:
        assert checksum(Path(b.client.path(name)) / "file") == sums[name]
        fill(Path(b.client.path(name)) / "file2")
    assert_takes_share(b, sums["shared"])
    # It comes back, and has no more of what was taken.
    a.plugin.start()
    a.unmount("shared")
    for name in policies[:3]:
        assert "taken over by b" in a.refusal("Mount", name, ID="2")
        a.unmount(name)
        assert not a.is_mounted(name)
    assert "stop the containers" in a.refusal("Mount", "left", ID="2")
    a.unmount("left")
    assert checksum(a.mount("left") / "file") == sums["left"]
    for name in policies[:3]:
        b.unmount(name)
        hosts.assert_whole(name)
    # The metadata server waits for the client of the dead host's server, for a minute.
    eventually(lambda: is_removed(b, "shared"), "the volume is removed", seconds=90)
    eventually(lambda: "shared" not in a.client.list(), "a has forgotten it")


def assert_takes_share(host: Server, written: str) -> None:
    """Check that a dead host's hold is dropped by an operator's word, and nothing else.

    Its files are read at once then.
    """
    said = host.refusal("Remove", "shared")
    assert "in use by a (since" in said
    assert "volplugin volume takeover shared" in said
    assert host.told("volume", "takeover", "shared").startswith("shared: taken from a")
    begun = time.monotonic()
    path = host.mount("shared")
    assert checksum(path / "file") == written
    fill(path / "more")
    assert time.monotonic() - begun < _AT_ONCE
    host.unmount("shared")


def is_removed(host: Server, volume: str) -> bool:
    """Remove a volume; False while the file system does not answer."""
    try:
        host.client.remove(volume)
    except PluginError as error:
        if "did not answer" in str(error):
            return False
        raise
    return True


def taken(host: Server, volume: str) -> float:
    """Mount what the dead host a had; return when it was mounted.

    Only where the volume's on-conflict is fail, its name here, it may be refused.
    """
    while refused := host.tried(volume):
        assert "attached on a (address" in refused, refused
        assert volume == "fail"
        time.sleep(0.5)
    return time.monotonic()


def test_dead_host_of_two(hosts: Hosts) -> None:
    """Of two hosts that fence a third for its volume, one has it then."""
    a, b, c = hosts("a"), hosts("b"), hosts("c")
    a.client.create("v", SMALL)
    hosts.all_know("v")
    written = fill(a.mount("v") / "file")
    a.die()
    for host in (b, c):
        host.told("volume", "takeover", "v")
    with ThreadPoolExecutor() as pool:
        refused = dict(
            zip((b, c), pool.map(lambda h: h.tried("v"), (b, c)), strict=True)
        )
    (winner,) = (host for host, said in refused.items() if not said)
    (loser,) = {b, c} - {winner}
    assert f"attached on {winner.name} (address" in refused[loser]
    assert checksum(Path(winner.client.path("v")) / "file") == written
    # That one is taken in turn by an operator's word, without a death.
    said = loser.told("volume", "takeover", "v")
    assert said.startswith(f"v: taken from {winner.name} (127")
    assert checksum(loser.mount("v") / "file") == written


_BOOT: Final = """
mount --bind "$0" /proc/sys/kernel/random/boot_id
echo booted
exec cat
"""


class Boots:
    """The boots of one host, each with mounts and a boot id of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._holder: subprocess.Popen[str] | None = None

    def __call__(self) -> list[str]:
        """Boot anew; return what is put before a command that is to run there."""
        self.end()
        name = self._folder / f"{uuid.uuid4()}"
        name.write_text(f"{name.name}\n")
        alone = [require("unshare"), "--mount", "--propagation", "private"]
        self._holder = subprocess.Popen(
            [*alone, "sh", "-c", _BOOT, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == "booted\n"
        return [require("nsenter"), f"--mount=/proc/{self._holder.pid}/ns/mnt"]

    def end(self) -> None:
        """Take away all that is mounted; nothing must run in it any more.

        A program that serves a file system would wait for itself if it went last.
        """
        if self._holder is not None:
            self._holder.communicate()
            assert self._holder.returncode == 0


@pytest.fixture
def boots(tmp_path: Path) -> Iterator[Boots]:
    """The boots of a host."""
    made = Boots(tmp_path)
    yield made
    made.end()


def test_rebooted_host(boots: Boots, hosts: Hosts) -> None:
    """A host that boots anew has at once what it had, as nobody else has taken it.

    What its engine had mounted before is not in use any more.
    """
    a = hosts("a", enter=boots())
    b = hosts("b")
    sums = {}
    for name in ("v", "w"):
        a.client.create(name, SMALL)
        sums[name] = fill(seen(a, a.mount(name)) / "file")
    hosts.all_know("v", "w")
    a.die()
    a.plugin.enter(boots())
    a.mounted.clear()
    a.plugin.start()
    assert "attached on a (address" in b.refusal("Mount", "v", ID="1")
    begun = time.monotonic()
    path = seen(a, a.mount("v", "2"))
    assert time.monotonic() - begun < _AT_ONCE
    assert checksum(path / "file") == sums["v"]
    fill(path / "more")
    a.unmount("v", "2")
    assert checksum(b.mount("v") / "file") == sums["v"]
    # Nor does the earlier boot keep it from going.
    a.client.remove("w")
    b.unmount("v")
    hosts.assert_whole("v")


def seen(host: Server, path: Path) -> Path:
    """Return how this process reaches a path of a host with mounts of its own."""
    return Path(f"/proc/{host.plugin.pid}/root{path}")


class Cable:
    """A network namespace, and what ties it to the machine until it is cut.

    The addresses are of the range that is kept for such tests (RFC 2544).
    """

    def __init__(self) -> None:
        require("ip")
        number = os.getpid() % 250
        self.address, inside = (f"198.19.{number}.{end}" for end in (1, 2))
        self._name = f"vp-host{number}"
        commands.run("ip", "netns", "add", self._name)
        try:
            far = ["peer", "name", "cluster", "netns", self._name]
            commands.run("ip", "link", "add", self._name, "type", "veth", *far)
            commands.run("ip", "address", "add", f"{self.address}/30", *self._device)
            self.mend()
            for device in ("lo", "cluster"):
                commands.run(*self._inside, "link", "set", device, "up")
            on = ["dev", "cluster"]
            commands.run(*self._inside, "address", "add", f"{inside}/30", *on)
        except BaseException:
            self.close()
            raise

    @property
    def enter(self) -> list[str]:
        """What is put before a command that is to run there."""
        return [require("nsenter"), f"--net=/run/netns/{self._name}"]

    @property
    def _device(self) -> list[str]:
        return ["dev", self._name]

    @property
    def _inside(self) -> list[str]:
        return ["ip", "-n", self._name]

    def cut(self) -> None:
        """Let nothing pass any more; nobody is told."""
        commands.run("ip", "link", "set", *self._device, "down")

    def mend(self) -> None:
        """Let all pass again."""
        commands.run("ip", "link", "set", *self._device, "up")

    def close(self) -> None:
        """Take all of it away."""
        commands.run("ip", "netns", "delete", self._name)


@pytest.fixture
def cable() -> Iterator[Cable]:
    """A host's network of its own."""
    made = Cable()
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def far(cable: Cable) -> Iterator[Hosts]:
    """Hosts of a cluster at the end of the cable that a host in its network is on."""
    cluster = Ceph(address=cable.address, filesystem=False)
    try:
        cluster.start()
        with sharing(cluster, cluster.namespace()) as made:
            yield made
    finally:
        cluster.close()


def test_cut_off_host(far: Hosts, cable: Cable) -> None:
    """A host that is cut off waits; what was taken from it meanwhile stays taken.

    What nobody took goes on where it was, without an error, once it is back.
    """
    a, b = far("a", enter=cable.enter, timeout="5"), far("b")
    for name in ("v", "other"):
        a.client.create(name, SMALL)
    far.all_know("v", "other")
    there = a.mount("v")
    kept = fill(there / "kept")
    elsewhere = a.mount("other")
    with Writer(there / "log") as writer, Writer(elsewhere / "log") as other:
        eventually(writer.is_under_way, "it writes")
        cable.cut()
        synced = writer.synced
        assert "attached on a (address 198.19." in b.refusal("Mount", "v", ID="1")
        assert b.told("volume", "takeover", "v").startswith("v: taken from a (198.19.")
        path = b.mount("v")
        assert_written(path / "log", synced)
        new = fill(path / "new")
        # Reads come from memory, and tell of it.
        assert set(a.client.list()) == {"v", "other"}
        eventually(lambda: "unreachable" in a.status("v")["cluster"], "it is told of")
        written = other.synced
        cable.mend()
        assert writer.error() in {errno.EIO, errno.EROFS}
        assert_fenced(a)
        eventually(lambda: other.synced > written + 5, "it goes on", seconds=60)
        a.unmount("v")
        assert not a.is_mounted("v")
        assert checksum(path / "new") == new
        assert checksum(path / "kept") == kept
        b.unmount("v")
        far.assert_whole("v")
        written = other.stop()
        assert_written(elsewhere / "log", written)
