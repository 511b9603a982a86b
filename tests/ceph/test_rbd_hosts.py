"""The driver ``rbd`` on several hosts: one writer, and how it changes."""

import contextlib
import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import attrs
import pytest
from rbd_cases import HostCase, Hosts, in_state
from support.ceph import Ceph
from support.wait import eventually

from volplugin.ceph.images import Image
from volplugin.errors import (
    AlreadyExists,
    InUse,
    NotFound,
    Unavailable,
    VolpluginError,
)
from volplugin.model import State

pytestmark = pytest.mark.root

_PATHS: Final = (Path(__file__).parent, Path(__file__).parents[1])
_CHILD: Final = """
import sys
from pathlib import Path
sys.path[:0] = {paths!r}
from rbd_cases import HostCase
from volplugin import failpoints
class Cluster:
    conf = {conf!r}
    def least(self):
        return {keyring!r}
host = HostCase.of(Cluster(), {namespace!r}, Path({folder!r}), "a")
{prepare}
failpoints.arm("{step}=kill")
{action}
raise SystemExit("not killed at {step}")
"""


@pytest.fixture
def hosts(ceph: Ceph, namespace: str, tmp_path: Path) -> Iterator[Hosts]:
    """Hosts that share a namespace."""
    made = Hosts(ceph, namespace, tmp_path)
    try:
        yield made
        made.finish()
    finally:
        made.close()


def killed_at(hosts: Hosts, step: str, action: str, prepare: str = "") -> None:
    """Do something on host a in a process that is killed at a step of it."""
    code = _CHILD.format(
        paths=[str(path) for path in _PATHS],
        conf=str(hosts.ceph.conf),
        keyring=str(hosts.ceph.least()),
        namespace=hosts.namespace,
        folder=str(hosts.folder),
        step=step,
        action=action,
        prepare=prepare,
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
        timeout=100,
    )
    assert done.returncode == -9, done.stderr


def test_move(hosts: Hosts) -> None:
    """A volume made on one host is attached on another, and holds what was written."""
    a, b = hosts("a"), hosts("b")
    here = a.make("v")
    there = b.found("v")
    assert there.volume.mountpoint != here.volume.mountpoint
    assert [each.name for each in b.driver.volumes()] == ["v"]
    for turn in range(3):
        a.driver.attach(here)
        with pytest.raises(InUse, match=r"attached on host-a \(address 127"):
            b.driver.attach(there)
        a.file(here).write_text(f"turn {turn}")
        a.driver.detach(here)
        b.driver.attach(there)
        assert b.file(there).read_text() == f"turn {turn}"
        b.driver.detach(there)


def test_take_over(hosts: Hosts) -> None:
    """What was taken over is written by the new host alone, and the old one tells."""
    a, b = hosts("a"), hosts("b")
    here = a.make("v")
    a.driver.attach(here)
    file = a.file(here)
    file.write_text("before")
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
    there = b.found("v")
    assert any("host-a" in each for each in b.driver.take_over(there))
    b.driver.attach(there)
    assert b.file(there).read_text() == "before"
    assert b.record("v").unclean is False, "it was checked"
    assert write_synced(file) in {errno.EIO, errno.EROFS}
    b.file(there).write_text("after")
    a.driver.find("v")
    status = a.driver.status(here.volume, here.options, attached=True)
    assert "taken over by host-b" in status["error"]
    with pytest.raises(Unavailable, match="taken over by host-b"):
        a.driver.attach(here)
    a.driver.detach(here)
    assert not a.is_attached(here)
    with pytest.raises(InUse, match="host-b"):
        a.driver.attach(here)
    b.driver.detach(there)
    a.driver.attach(here)
    assert a.file(here).read_text() == "after"


def write_synced(file: Path) -> int:
    """Write and sync a file; return the error's number, or 0."""
    try:
        with file.open("wb") as opened:
            opened.write(b"x" * 4096)
            os.fsync(opened.fileno())
    except OSError as error:
        return error.errno or -1
    return 0


def test_take_over_nothing(hosts: Hosts) -> None:
    """Nobody is fenced where no other host has the volume."""
    host = hosts()
    spec = host.make("v")
    assert list(host.driver.take_over(spec)) == []
    host.driver.attach(spec)
    assert list(host.driver.take_over(spec)) == []
    host.file(spec).write_text("text")


def test_fence_on_conflict(hosts: Hosts) -> None:
    """With on-conflict=fence the next host takes the volume at once."""
    a, b = hosts("a"), hosts("b")
    here = a.make("v", on_conflict="fence", size="16M")
    a.driver.attach(here)
    there = b.found("v")
    b.driver.attach(there)
    assert b.is_attached(there)
    a.driver.detach(here)


def test_wait_on_conflict(hosts: Hosts) -> None:
    """With on-conflict=wait the next host waits for the one that has it."""
    a, b = hosts("a"), hosts("b", on_conflict="wait")
    here = a.make("v")
    a.driver.attach(here)
    there = b.found("v")
    waiter = threading.Thread(target=b.driver.attach, args=(there,))
    waiter.start()
    time.sleep(1)
    assert waiter.is_alive()
    a.driver.detach(here)
    waiter.join(30)
    assert b.is_attached(there)


def test_read_only_on_many(hosts: Hosts) -> None:
    """A volume with access=ro is attached on many hosts, and no one can write."""
    a, b = hosts("a"), hosts("b")
    source = a.make("v")
    a.driver.attach(source)
    a.file(source).write_text("text")
    a.driver.detach(source)
    here = a.make("view", from_="v", access="ro")
    there = b.found("view")
    for host, spec in ((a, here), (b, there)):
        host.driver.attach(spec)
        assert host.file(spec).read_text() == "text"
        with pytest.raises(OSError, match="Read-only"):
            host.file(spec).write_text("more")
    assert len(a.record("view").holders) == 2
    b.driver.detach(there)
    assert a.is_attached(here)


def test_read_only_of_mounted(hosts: Hosts) -> None:
    """A read-only copy of a volume in use is mounted, whatever its journal holds."""
    for fs, size in (("ext4", "16M"), ("xfs", "300M")):
        host = hosts()
        source = host.make(f"v-{fs}", fs=fs, size=size)
        host.driver.attach(source)
        host.file(source).write_text("text")
        view = host.make(f"view-{fs}", from_=f"v-{fs}", access="ro")
        host.driver.attach(view)
        assert host.file(view).parent.is_dir()


def test_remove_held(hosts: Hosts) -> None:
    """A volume that another host has is not removed; its name is told."""
    a, b = hosts("a"), hosts("b")
    here = a.make("v")
    a.driver.attach(here)
    there = b.found("v")
    with pytest.raises(InUse, match="host-a"):
        b.remove(there)
    assert a.record("v").volume.state is State.READY
    a.file(here).write_text("text")
    larger = attrs.evolve(there.volume, options={**there.volume.options, "size": "32M"})
    with pytest.raises(InUse, match="host-a: resize it there"):
        b.driver.plan_resize(there, b.spec_of(larger).options, attached=False)


def test_removed_elsewhere(hosts: Hosts) -> None:
    """A volume that another host removed can't be attached, but removed."""
    a, b = hosts("a"), hosts("b")
    here = a.make("v")
    b.remove(b.found("v"))
    with pytest.raises(NotFound, match="another host has removed it"):
        a.driver.attach(here)
    again = b.make("v")
    with pytest.raises(NotFound):
        a.driver.attach(here)
    a.remove(here)
    b.driver.attach(again)


def test_foreign_client(hosts: Hosts) -> None:
    """An image that some other client has open is not mounted, moved or removed."""
    a = hosts("a")
    spec = a.make("v")
    image = Image(pool=spec.volume.facts["pool"], name=spec.volume.facts["image"])
    with hosts("b").driver._images.opened(image, "use it"):
        with pytest.raises(InUse, match=r"127\.0\.0\.1:0/"):
            a.driver.attach(spec)
        with pytest.raises(InUse, match=r"127\.0\.0\.1:0/"):
            a.remove(spec)
        assert a.record("v").volume.state is State.READY
    a.driver.attach(spec)


def test_race(hosts: Hosts) -> None:
    """Of hosts that make one name at once, one does, and the others are told."""
    every = [hosts(name) for name in "abcd"]
    won, lost = [], []

    def make(host: HostCase, name: str) -> None:
        spec = host.spec(name, size="16M")
        try:
            host.driver.create(spec)
            won.append((name, host))
        except AlreadyExists:
            host.driver.remove(spec)
            lost.append(name)

    for number in range(5):
        threads = [
            threading.Thread(target=make, args=(host, f"v{number}")) for host in every
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(name for name, _ in won) == [f"v{number}" for number in range(5)]
    assert len(lost) == 15
    for name, host in won:
        spec = host.found(name)
        host.driver.attach(spec)
        host.driver.detach(spec)


def test_follow(hosts: Hosts) -> None:
    """What another host makes and removes is told by name."""
    a, b = hosts("a"), hosts("b")
    heard: list[str | None] = []
    following = b.driver.follow(heard.append)
    try:
        spec = a.make("v")
        eventually(lambda: "v" in heard, "the volume is told of")
        heard.clear()
        a.remove(spec)
        eventually(lambda: "v" in heard, "its removal is told of")
        assert following.is_alive()
    finally:
        following.close()


def test_discover(hosts: Hosts) -> None:
    """Another host finds the records of all volumes, as its own."""
    a, b = hosts("a"), hosts("b")
    for name in ("v", "w"):
        a.make(name)
    found = list(b.driver.discover({"w"}))
    assert [each.path for each in found] == [None]
    assert found[0].record == b.found("v").record


# What a killed plugin leaves

_MAKE: Final = 'host.make("v")'
_ATTACH: Final = 'host.driver.attach(host.found("v"))'
_MAKING: Final = (
    *("registry.create", "rbd.recorded", "rbd.image", "rbd.mkfs", "rbd.filled"),
    *("rbd.ready", "rbd.mountpoint", "rbd.guard"),
)
_ATTACHING: Final = (
    *("rbd.mountpoint", "holding.hold", "rbd.hold", "rbd.mapped", "rbd.noted"),
    *("rbd.checked", "rbd.mounted"),
)
_DETACHING: Final = ("rbd.detach", "rbd.unmounted", "rbd.unmapped")
_REMOVING: Final = (
    *("rbd.removing", "rbd.trash", "registry.remove", "rbd.forgotten", "rbd.unguard"),
)


@pytest.mark.parametrize("step", _MAKING)
def test_killed_making(hosts: Hosts, step: str) -> None:
    """What a create that was killed left is undone at the next start."""
    killed_at(hosts, step, _MAKE)
    host = hosts("a")
    shared = host.record("v")
    if shared.volume.state is State.CREATING:
        assert_not_attachable(hosts("b"))
    host.driver.remove(host.spec_of(shared.volume))
    assert host.driver.find("v") is None
    assert os.listdir(host.folder / "ceph" / "staging") == []
    host.driver.attach(host.make("v"))


def assert_not_attachable(host: HostCase) -> None:
    """Check that a volume that isn't finished can't be attached by anyone."""
    with pytest.raises(Unavailable, match="is being made"):
        host.driver.attach(host.found("v"))


@pytest.mark.parametrize("step", ["rbd.recorded", "rbd.filled"])
def test_left_by_dead_host(hosts: Hosts, step: str) -> None:
    """What a dead host left half made gives its name to the next, after a while."""
    killed_at(hosts, step, 'host.make("v", created_at="2024-01-01T00:00:00.000Z")')
    host = hosts("b")
    spec = host.spec("v", size="16M")
    eventually(lambda: is_made(host, spec), "its watcher is forgotten", seconds=60)
    host.driver.attach(host.ready(spec))


def test_finished_while_it_is_taken_away(hosts: Hosts) -> None:
    """What its maker finishes is not taken for left behind; the maker may undo it."""
    maker, other = hosts("a"), hosts("b")
    spec = maker.make("v")
    half_made = in_state(spec, State.CREATING)
    with pytest.raises(InUse, match="another host has made v"):
        other.driver.remove(half_made)
    other.driver.attach(other.found("v"))
    other.driver.detach(other.found("v"))
    maker.driver.remove(half_made)
    assert maker.driver.find("v") is None


def is_made(host: HostCase, spec: Any) -> bool:
    """Try to make a volume; False while another host seems to make it."""
    try:
        host.driver.create(spec)
    except AlreadyExists:
        return False
    return True


@pytest.mark.parametrize("step", _ATTACHING)
def test_killed_attaching(hosts: Hosts, step: str) -> None:
    """After an attach that was killed the volume can be attached, or taken back."""
    prepare = _MAKE
    if step == "rbd.mountpoint":  # as on a host that did not make the volume
        hosts("b").make("v")
        prepare = ""
    killed_at(hosts, step, _ATTACH, prepare)
    host = hosts("a")
    spec = host.found("v")
    host.driver.attach(spec)
    assert host.is_attached(spec)
    host.file(spec).write_text("text")
    host.driver.detach(spec)
    assert host.record("v").holders == ()


@pytest.mark.parametrize("step", _DETACHING)
def test_killed_detaching(hosts: Hosts, step: str) -> None:
    """A detach that was killed is finished by the next one."""
    action = 'host.driver.detach(host.found("v"))'
    killed_at(hosts, step, action, f"{_MAKE}\n{_ATTACH}")
    host = hosts("a")
    spec = host.found("v")
    host.driver.detach(spec)
    assert not host.is_attached(spec)
    assert host.record("v").holders == ()
    hosts("b").driver.attach(hosts("b").found("v"))


@pytest.mark.parametrize("step", _REMOVING)
def test_killed_removing(hosts: Hosts, step: str) -> None:
    """A removal that was killed is finished by the next one."""
    before = hosts("a")
    spec = before.make("v")
    killed_at(hosts, step, 'host.remove(host.found("v"))')
    before.remove(spec)
    assert before.driver.find("v") is None
    assert not os.path.exists(spec.volume.mountpoint)


def test_killed_copying(hosts: Hosts) -> None:
    """A copy whose making was killed is undone, its snapshot with it."""
    source = hosts("a").make("v")
    for step in ("rbd.snapshot", "rbd.cloned"):
        killed_at(hosts, step, 'host.make("copy", from_="v")')
        host = hosts("a")
        host.driver.remove(host.spec_of(host.record("copy").volume))
    image = Image(pool=source.volume.facts["pool"], name=source.volume.facts["image"])
    with hosts("a").driver._images.opened(image, "look") as handle:
        assert list(handle.list_snaps()) == []


# A cluster that hangs


@pytest.fixture
def hanging(own_ceph: Ceph, tmp_path: Path) -> Iterator[Hosts]:
    """Hosts on a cluster of the test's own."""
    made = Hosts(own_ceph, own_ceph.namespace(), tmp_path)
    try:
        yield made
        made.finish()
    finally:
        made.close()


@pytest.mark.timeout(400)
def test_hung_osd(hanging: Hosts) -> None:
    """No call hangs with the cluster: each ends in time, and works again after."""
    host = hanging(timeout=2)
    ceph = hanging.ceph
    mounted, free = host.make("mounted"), host.make("free")
    host.driver.attach(mounted)
    host.file(mounted).write_text("text")
    parsed = host.spec("new", size="16M")
    calls: dict[str, Callable[[], Any]] = {
        "plan": lambda: host.spec("other", size="16M"),
        "create": lambda: host.driver.create(parsed),
        "attach": lambda: host.driver.attach(free),
        "attach again": lambda: host.driver.attach(mounted),
        "detach": lambda: host.driver.detach(mounted),
        "snapshot": lambda: host.driver.take_snapshot(free, "s", attached=False),
        "snapshots": lambda: host.driver.snapshots(free),
        "resize": lambda: host.driver.resize(free, attached=False),
        "remove": lambda: host.remove(free),
        "find": lambda: host.driver.find("free"),
        "volumes": lambda: list(host.driver.volumes()),
        "take over": lambda: host.driver.take_over(free),
    }
    for name, call in calls.items():
        ceph.pause("osd")
        begun = time.monotonic()
        try:
            if name == "plan":  # may know all from memory
                with contextlib.suppress(VolpluginError):
                    call()
            else:
                with pytest.raises(Unavailable, match=r"did not answer|lock was not"):
                    call()
            assert time.monotonic() - begun < 60, name
            host.driver.measure([mounted])
            status = host.driver.status(mounted.volume, mounted.options, attached=True)
        finally:
            ceph.resume("osd")
        assert "did not answer" in status["cluster"], name
        assert host.is_attached(mounted), name
        eventually(lambda: answers(host), "the cluster answers again")
        if name == "create":
            host.driver.remove(parsed)
        elif name == "remove":
            free = host.found("free")
        elif name not in {"detach", "plan", "snapshot"}:
            call()
            host.driver.detach(free)
    host.driver.detach(mounted)
    host.driver.attach(mounted)
    assert host.file(mounted).read_text() == "text"


def answers(host: HostCase) -> bool:
    """Tell whether the cluster answers a host."""
    try:
        host.driver.find("free")
    except Unavailable:
        return False
    return True
