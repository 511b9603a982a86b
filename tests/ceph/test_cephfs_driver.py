"""The driver ``cephfs`` on a real file system: one directory, many hosts, no loss."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
import pytest
from cephfs_cases import MOUNT, SMALL, Administrator, HostCase, in_state
from support.ceph import FILESYSTEM, Ceph
from support.commands import Container
from support.require import missing
from support.wait import eventually

from volplugin import failpoints
from volplugin.ceph.identity import ensure
from volplugin.drivers.driver import (
    Measures,
    Purges,
    Resizes,
    Shares,
    Snapshots,
    TakesOver,
)
from volplugin.errors import (
    AlreadyExists,
    InUse,
    InvalidArgument,
    NoSpace,
    NotFound,
    Unavailable,
    VolpluginError,
)
from volplugin.host import daemons, mountinfo
from volplugin.model import State

pytestmark = pytest.mark.root

Hosts = Callable[..., HostCase]
MODES = {
    "volume": {},
    "backend": {"mounts": "backend"},
    "subvolume": {"subvolume_group": "group"},
    "subvolume-backend": {"subvolume_group": "group", "mounts": "backend"},
}
STAGES = ("record", "directory", "quota", "made")
POOL = "cephfs_data"


@pytest.fixture(scope="module")
def files(ceph: Ceph) -> Iterator[Administrator]:
    """The file system as its administrator sees it."""
    administrator = Administrator(ceph)
    yield administrator
    administrator.close()


@pytest.fixture
def directory(ceph: Ceph, files: Administrator) -> Iterator[str]:
    """A directory for one backend, in which nothing may be left."""
    path = f"/test-{uuid.uuid4().hex[:8]}"
    yield path
    for folder in ("volumes", "trash"):
        assert files.names(f"{path}/{folder}") == []
    _assert_no_records(ceph, path.strip("/"))
    files.remove(path)


def _assert_no_records(ceph: Ceph, namespace: str) -> None:
    objects = set(ceph.rados("-p", POOL, "-N", namespace, "ls").split())
    assert objects <= {"volplugin.index"}, f"records left: {objects}"
    for name in objects:
        assert ceph.rados("-p", POOL, "-N", namespace, "listomapkeys", name) == ""
        ceph.rados("-p", POOL, "-N", namespace, "rm", name)


@pytest.fixture
def hosts(
    ceph: Ceph, files: Administrator, directory: str, tmp_path: Path
) -> Iterator[Hosts]:
    """Make hosts that share the volumes of ``directory``; nothing is left on them."""
    made: list[HostCase] = []
    groups = set()

    def make(name: str = "a", **settings: object) -> HostCase:
        if "subvolume_group" in settings:
            settings["subvolume_group"] = directory.strip("/")
            groups.add(directory.strip("/"))
        made.append(HostCase.of(ceph, directory, tmp_path, name, **settings))
        return made[-1]

    yield make
    failpoints.arm("")
    for host in made:
        host.detach_all()
    for host in made:
        host.clear()
    assert [mount for host in made for mount in host.mounts()] == []
    assert [path for host in made for path in host.left()] == []
    for group in groups:
        assert [n for n in files.names(f"/volumes/{group}") if n[0] not in "._"] == []
        ceph.ceph("fs", "subvolumegroup", "rm", FILESYSTEM, group, "--force")
        _assert_no_records(ceph, f"volumes/{group}")


@pytest.fixture(params=MODES, ids=str)
def case(request: pytest.FixtureRequest, hosts: Hosts) -> HostCase:
    """A host with volumes made and mounted in each of the ways that there are."""
    return hosts(**MODES[request.param])


def test_contract(hosts: Hosts) -> None:
    """The driver has the powers that a shared directory can have."""
    driver = hosts().driver
    for power in (Measures, Purges, Resizes, Shares, Snapshots, TakesOver):
        assert isinstance(driver, power)


def test_plan(case: HostCase) -> None:
    """A plan has no effect, on this host and in the cluster."""
    plan = case.spec("v").volume
    assert os.path.isabs(plan.mountpoint)
    assert any(plan.mountpoint.startswith(f"{r}/") for r in case.driver.roots())
    assert case.left() == []
    assert case.driver.find("v") is None


def test_life(case: HostCase) -> None:
    """A volume is made, attached, written, detached and removed, each step twice."""
    spec = case.spec("v", uid="5", gid="6", mode="2750", **SMALL)
    for _ in range(2):
        case.driver.create(spec)
    spec = in_state(spec, State.READY)
    path = Path(spec.volume.mountpoint)
    assert not path.exists()
    for _ in range(2):
        case.driver.attach(spec)
        assert case.is_attached(spec)
        assert len([m for m in case.mounts() if m.mountpoint == str(path)]) == 1
    status = path.stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (5, 6, 0o2750)
    assert os.getxattr(path, "trusted.volplugin") == spec.record
    (path / "file").write_text("text")
    (path / "open").touch(0o644)
    assert (path / "open").stat().st_mode & 0o777 == 0o644
    for _ in range(2):
        case.driver.detach(spec)
        assert not case.is_attached(spec)
        assert case.left() == []
    case.driver.attach(spec)
    assert (path / "file").read_text() == "text"
    for _ in range(2):
        case.remove(spec)
        assert not case.is_attached(spec)
        assert case.driver.find("v") is None


def test_remove_what_never_was(case: HostCase) -> None:
    """Removing a volume of which nothing was made is success, without effect."""
    spec = case.spec("v")
    for state in State:
        case.driver.remove(in_state(spec, state))
    assert case.left() == []


@pytest.mark.parametrize("stage", STAGES)
def test_undo(case: HostCase, stage: str) -> None:
    """A create that fails at any step is undone in full, and can be made again."""
    failpoints.arm(f"cephfs.{stage}=error:5*1")
    spec = case.spec("v", **SMALL)
    with pytest.raises((OSError, VolpluginError)):
        case.driver.create(spec)
    volume = case.driver.find("v")
    assert volume is not None
    assert volume.state is State.CREATING
    case.driver.create(spec)
    failpoints.arm(f"cephfs.{stage}=error:5*1")
    other = case.spec("w", **SMALL)
    with pytest.raises((OSError, VolpluginError)):
        case.driver.create(other)
    for _ in range(2):
        case.driver.remove(other)
        assert case.driver.purge(lambda: False)
        assert case.driver.find("w") is None
    case.driver.create(case.spec("w", **SMALL))


@pytest.mark.parametrize("point", ["hold", "mountpoint", "mounted"])
def test_attach_after_failure(case: HostCase, point: str) -> None:
    """An attach that fails at any step is taken back by detach, and works again."""
    spec = case.made("v")
    failpoints.arm(f"cephfs.{point}=error:5*1")
    with pytest.raises((OSError, VolpluginError)):
        case.driver.attach(spec)
    case.driver.detach(spec)
    assert case.mounts() == []
    assert case.left() == []
    case.driver.attach(spec)
    assert case.is_attached(spec)


@pytest.mark.parametrize("point", ["unmounted", "detached"])
def test_detach_after_failure(case: HostCase, point: str) -> None:
    """A detach that fails at any step is ended by the next one."""
    spec, _ = case.attached("v")
    failpoints.arm(f"cephfs.{point}=error:5*1")
    with pytest.raises((OSError, VolpluginError)):
        case.driver.detach(spec)
    case.driver.detach(spec)
    assert case.left() == []
    case.remove(spec)


def test_other_volumes_mount(case: HostCase) -> None:
    """What is mounted counts for the volume with its id alone."""
    spec, _ = case.attached("v")
    other = attrs.evolve(spec.volume, id="f" * 32)
    assert case.driver.is_attached(other, mountinfo.read()) is False


def test_something_else_is_mounted(hosts: Hosts) -> None:
    """A mountpoint with another file system on it is not answered, nor unmounted."""
    case = hosts()
    spec = case.made("v")
    path = Path(spec.volume.mountpoint)
    path.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "other", path], check=True)
    try:
        with pytest.raises(Unavailable, match="'other' mounted on it"):
            case.driver.attach(spec)
    finally:
        subprocess.run(["umount", path], check=True)
        path.rmdir()


def test_mountpoint_in_use(hosts: Hosts) -> None:
    """A directory with files where the volume is to be mounted refuses a create."""
    case = hosts()
    spec = case.spec("v")
    path = Path(spec.volume.mountpoint)
    path.mkdir(parents=True)
    (path / "theirs").write_text("theirs")
    with pytest.raises(AlreadyExists):
        case.driver.create(spec)
    case.driver.remove(spec)
    assert (path / "theirs").read_text() == "theirs"
    (path / "theirs").unlink()
    path.rmdir()


def test_two_volumes(case: HostCase) -> None:
    """Removing one volume leaves the other as it is, mounted."""
    one, two = case.made("a"), case.made("b")
    for spec in (one, two):
        case.driver.attach(spec)
    file = Path(two.volume.mountpoint) / "file"
    file.write_text("text")
    case.remove(one)
    assert file.read_text() == "text"
    assert [volume.name for volume in case.driver.volumes()] == ["b"]


def test_restart(case: HostCase, hosts: Hosts) -> None:
    """A plugin that starts anew finds what is mounted, and takes it down."""
    spec, path = case.attached("v")
    (path / "file").write_text("text")
    fresh = case.restarted()
    assert fresh.is_attached(spec)
    fresh.driver.attach(spec)
    assert len([m for m in case.mounts() if m.mountpoint == str(path)]) == 1
    fresh.driver.detach(spec)
    assert fresh.left() == []
    fresh.driver.close()


# Limits and usage


def test_quota(case: HostCase) -> None:
    """A quota stops a writer with EDQUOT, a little late."""
    _, path = case.attached("v", **SMALL)
    done = subprocess.run(  # noqa: PLW1510 - it must fail
        ["dd", "if=/dev/zero", f"of={path}/big", "bs=1M", "count=128", "conv=fsync"],
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"], "LC_ALL": "C"},
    )
    assert "quota exceeded" in done.stderr.lower()
    written = (path / "big").stat().st_size
    assert 15 << 20 <= written <= 96 << 20


def test_df_shows_the_quota(hosts: Hosts) -> None:
    """A volume mounted by itself has the size of its quota."""
    for name, settings in (("plain", {}), ("sub", MODES["subvolume"])):
        spec, path = hosts(name, **settings).attached(name, size="64m")
        found = os.statvfs(path)
        assert found.f_blocks * found.f_frsize == 64 << 20, spec


def test_inodes(case: HostCase) -> None:
    """A limit on files holds, a little late."""
    _, path = case.attached("v", inodes="20")

    def fill() -> None:
        for number in range(2000):
            (path / str(number)).touch()

    with pytest.raises(OSError, match="quota"):
        fill()


def test_usage(case: HostCase) -> None:
    """What a volume holds is known on every host, attached or not."""
    spec, path = case.attached("v", **SMALL)
    free = case.made("free")
    (path / "file").write_bytes(b"x" * (2 << 20))
    (path / "directory").mkdir()
    case.driver.detach(spec)

    def counted() -> bool:
        usage = case.driver.measure([spec])[spec.volume.id]
        return (usage.used, usage.inodes_used) == (2 << 20, 3)

    eventually(counted, "the statistics reach the root", seconds=60)
    usage = case.driver.measure([spec, free])
    assert usage[spec.volume.id].available == 14 << 20
    assert usage[spec.volume.id].size == 16 << 20
    assert usage[free.volume.id].size is None
    assert usage[free.volume.id].available > 64 << 20


def test_resize(case: HostCase) -> None:
    """A volume is resized while it is in use; below what it holds it is refused."""
    spec, path = case.attached("v", **SMALL)
    (path / "file").write_bytes(b"x" * (8 << 20))
    larger = case.resized(spec, size="32m", inodes="100")
    case.driver.plan_resize(spec, larger.options, attached=True)
    for _ in range(2):
        case.driver.resize(larger, attached=True)
    assert os.getxattr(path, "trusted.volplugin") == larger.record
    found = case.driver.find("v")
    assert found is not None
    assert found.options["size"] == "32m"

    def counted() -> bool:
        usage = case.driver.measure([larger])[spec.volume.id]
        return (usage.used, usage.size, usage.inodes) == (8 << 20, 32 << 20, 100)

    eventually(counted, "the statistics reach the root", seconds=60)
    smaller = case.resized(spec, size="1m")
    with pytest.raises(NoSpace, match="more than size=1M"):
        case.driver.plan_resize(larger, smaller.options, attached=True)
    with pytest.raises(NoSpace):
        case.driver.resize(smaller, attached=True)


def test_purge(case: HostCase, files: Administrator) -> None:
    """A removed volume is deleted with all that is in it, snapshots included."""
    spec, path = case.attached("v")
    for number in range(10):
        deep = path / f"d{number}" / "e" / "f"
        deep.mkdir(parents=True)
        for name in range(30):
            (deep / str(name)).write_text("x")
    (path / "link").symlink_to("/etc")
    case.driver.take_snapshot(spec, "s", attached=True)
    (path / "d0" / "e" / "f" / "0").unlink()
    case.driver.remove(in_state(spec, State.REMOVING))
    assert case.driver.find("v") is None
    assert case.driver.purge(lambda: True) in {True, False}
    assert case.driver.purge(lambda: False) is True


def test_purge_by_two(hosts: Hosts) -> None:
    """Two hosts may delete the same at once."""
    one, two = hosts("a"), hosts("b")
    spec, path = one.attached("v")
    for number in range(500):
        (path / str(number)).touch()
    one.driver.remove(in_state(spec, State.REMOVING))
    done: list[bool] = []
    threads = [
        threading.Thread(target=lambda h=host: done.append(h.driver.purge(bool)))
        for host in (one, two)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done == [True, True]


# Many hosts


def test_two_hosts(hosts: Hosts) -> None:
    """Two hosts write into one volume at once, and see each other's files."""
    one, two = hosts("a"), hosts("b")
    spec, path = one.attached("v", **SMALL)
    there = two.found("v")
    assert there.volume.mountpoint != spec.volume.mountpoint
    two.driver.attach(there)
    for number in range(20):
        (path / f"a{number}").write_text("a")
        (Path(there.volume.mountpoint) / f"b{number}").write_text("b")
    names = sorted(os.listdir(path))
    assert names == sorted(os.listdir(there.volume.mountpoint))
    assert len(names) == 40
    assert one.driver.find("v") is not None
    assert one.driver.status(spec.volume, spec.options, attached=True)[
        "other-hosts"
    ] == ["host-b"]


def test_remove_while_another_host_has_it(hosts: Hosts) -> None:
    """A volume that another host has is not removed, and the host is named."""
    one, two = hosts("a"), hosts("b")
    spec, path = one.attached("v")
    there = two.found("v")
    with pytest.raises(InUse, match=r"host-a .*volplugin volume takeover v"):
        two.driver.remove(in_state(there, State.REMOVING))
    (path / "file").write_text("still there")
    one.driver.detach(spec)
    two.remove(there)
    assert one.driver.find("v") is None
    with pytest.raises(NotFound):
        one.driver.attach(spec)
    one.driver.detach(spec)
    assert one.left() == []


def test_finished_while_it_is_taken_away(hosts: Hosts) -> None:
    """What its maker finishes is not taken for left behind; the maker may undo it."""
    maker, other = hosts("a"), hosts("b")
    half_made = in_state(maker.made("v"), State.CREATING)
    with pytest.raises(InUse, match="another host has made v"):
        other.driver.remove(half_made)
    assert other.driver.find("v") is not None
    maker.driver.remove(half_made)
    assert maker.driver.find("v") is None


def test_take_over(hosts: Hosts) -> None:
    """A host that died is dropped by a takeover, and kept from writing if it lives."""
    one, two = hosts("a"), hosts("b")
    spec, path = one.attached("v")
    there = two.found("v")
    assert two.driver.take_over(there) == ["host-a"]
    assert two.driver.take_over(there) == []
    if MOUNT == "fuse":

        def refused() -> bool:
            try:
                (path / "late").write_text("x")
                with (path / "late").open("a") as file:
                    os.fsync(file.fileno())
            except OSError:
                return True
            return False

        eventually(refused, "the fenced host can't write any more")
        # It is mounted anew when a container wants it next.
        one.driver.attach(spec)
        (path / "again").write_text("x")
    two.driver.attach(there)
    one.driver.detach(spec)
    two.remove(there)


def test_name_taken(hosts: Hosts) -> None:
    """Of hosts that make a volume of one name, one wins and the others make nothing."""
    cases = [hosts(name) for name in "abc"]
    specs = [case.spec("v") for case in cases]
    outcomes: list[str] = []

    def create(number: int) -> None:
        try:
            cases[number].driver.create(specs[number])
            outcomes.append("made")
        except AlreadyExists:
            cases[number].driver.remove(specs[number])
            outcomes.append("taken")

    threads = [threading.Thread(target=create, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["made", "taken", "taken"]
    cases[0].driver.attach(cases[0].found("v"))


def test_follow(hosts: Hosts) -> None:
    """What one host does is told to the others."""
    one, two = hosts("a"), hosts("b")
    told: list[str | None] = []
    following = two.driver.follow(told.append)
    assert following.is_alive()
    one.made("v")
    eventually(lambda: "v" in told, "a notice of the volume")
    following.close()
    assert not following.is_alive()


def test_unfinished_by_another_host(hosts: Hosts) -> None:
    """What a host left half made can be taken away by another one."""
    one, two = hosts("a"), hosts("b")
    failpoints.arm("cephfs.made=error:5*1")
    spec = one.spec("v")
    with pytest.raises(OSError, match="failpoint"):
        one.driver.create(spec)
    left = two.found("v")
    assert left.volume.state is State.CREATING
    with pytest.raises(Unavailable, match="being made by host-a"):
        two.driver.attach(left)
    two.driver.remove(left)
    assert two.driver.find("v") is None
    with pytest.raises(NotFound):
        one.driver._parts.records.finish(spec.volume)
    one.driver.remove(spec)


def test_removal_ended_by_another_host(hosts: Hosts) -> None:
    """A removal that a host did not end is ended by another one."""
    one, two = hosts("a"), hosts("b")
    spec = one.made("v")
    failpoints.arm("cephfs.trash=error:5*1")
    with pytest.raises(OSError, match="failpoint"):
        one.driver.remove(in_state(spec, State.REMOVING))
    left = two.found("v")
    assert left.volume.state is State.REMOVING
    with pytest.raises(Unavailable, match="being removed by host-a"):
        two.driver.attach(left)
    two.driver.detach(left)
    two.remove(left)
    assert one.driver.find("v") is None


def test_hold_of_an_earlier_boot(hosts: Hosts) -> None:
    """A host that was booted anew gives up what it held, and keeps no one."""
    one, two = hosts("a"), hosts("b")
    spec = one.made("v")
    one.driver._parts.records._boot_id = "earlier"
    one.driver._parts.records.hold(spec.volume, "rw")
    one.driver._parts.records._boot_id = "now"
    with pytest.raises(InUse):
        two.driver.remove(in_state(two.found("v"), State.REMOVING))
    assert one.driver.purge(lambda: False) is True
    two.remove(two.found("v"))


def test_identity(tmp_path: Path) -> None:
    """A backend's identity is drawn once, also by threads that race for it."""
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(ensure(f"{tmp_path}/place")))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1
    assert os.listdir(tmp_path / "place") == ["identity"]
    (tmp_path / "place" / "identity").write_text("nonsense")
    with pytest.raises(Unavailable, match="'nonsense', which is no identity"):
        ensure(f"{tmp_path}/place")


# Snapshots


def test_snapshots(case: HostCase) -> None:
    """A snapshot keeps what was there, and goes when it is dropped."""
    spec, path = case.attached("v")
    assert case.driver.snapshots(spec) == []
    (path / "file").write_text("before")
    case.driver.take_snapshot(spec, "one", attached=True)
    (path / "file").write_text("after!")
    time.sleep(0.01)  # they are told apart by the time
    case.driver.take_snapshot(spec, "two", attached=True)
    found = case.driver.snapshots(spec)
    assert [snapshot.name for snapshot in found] == ["one", "two"]
    assert found[0].created_at <= found[1].created_at
    assert found[0].created_at.startswith("20")
    with pytest.raises(AlreadyExists, match="'one'"):
        case.driver.take_snapshot(spec, "one", attached=True)
    kept = [name for name in os.listdir(path / ".snap") if "one" in name]
    assert (path / ".snap" / kept[0] / "file").read_text() == "before"
    case.driver.drop_snapshot(spec, "one")
    with pytest.raises(NotFound, match="'one'"):
        case.driver.drop_snapshot(spec, "one")
    assert [snapshot.name for snapshot in case.driver.snapshots(spec)] == ["two"]
    for name in ("_x", "a/b", ".."):
        with pytest.raises(InvalidArgument, match="no name of a snapshot"):
            case.driver.take_snapshot(spec, name, attached=True)


# Directories of users


@pytest.fixture
def theirs(files: Administrator) -> Iterator[str]:
    """A directory that a user has, with a file and a quota."""
    path = f"/theirs-{uuid.uuid4().hex[:8]}/data"
    files.make(path, 0o750)
    files.write(f"{path}/file", "theirs")
    files.set_attribute(path, "ceph.quota.max_files", "1000")
    yield path
    assert files.names(path) == ["file"]
    assert files.attribute(path, "trusted.volplugin") is None
    assert files.attribute(path, "ceph.quota.max_files") == b"1000"
    assert files.attribute(path, "ceph.quota.max_bytes") in {b"0", None}
    assert files.status(path).st_mode & 0o7777 == 0o750
    files.remove(os.path.dirname(path))


def test_adopt(hosts: Hosts, theirs: str) -> None:
    """A directory of a user's is a volume as it is, and theirs again when removed."""
    case = hosts()
    spec = case.spec("v", path=theirs, size="16m")
    case.driver.create(spec)
    case.driver.remove(spec)  # as if it had failed at the end
    spec = case.spec("v", path=theirs, size="16m")
    case.driver.create(spec)
    case.driver.create(spec)
    spec = in_state(spec, State.READY)
    case.driver.attach(spec)
    path = Path(spec.volume.mountpoint)
    assert (path / "file").read_text() == "theirs"
    found = os.statvfs(path)
    assert found.f_blocks * found.f_frsize == 16 << 20
    case.driver.resize(case.resized(spec, size="32m"), attached=True)
    case.remove(spec)
    case.remove(spec)


def test_adopt_what_can_not_be(
    hosts: Hosts, theirs: str, directory: str, files: Administrator
) -> None:
    """No directory is two volumes, and those of volplugin are no one's."""
    case = hosts()
    case.made("v", path=theirs)
    parent = os.path.dirname(theirs)
    with pytest.raises(AlreadyExists, match="is the directory of volume 'v'"):
        case.spec("w", path=theirs)
    with pytest.raises(AlreadyExists, match="volume 'v' has"):
        case.spec("w", path=parent)
    for path in (directory, f"{directory}/volumes/x"):
        with pytest.raises(InvalidArgument, match="volplugin's own"):
            case.spec("w", path=path)
    with pytest.raises(InvalidArgument, match="no such directory"):
        case.spec("w", path="/nowhere/at/all")
    case.remove(case.found("v"))
    files.make(f"{theirs}-more")
    with pytest.raises(InvalidArgument, match="is not a directory"):
        case.spec("w", path=f"{theirs}/file")


def test_read_only(hosts: Hosts, theirs: str) -> None:
    """A volume with access=ro can be read on many hosts, and written on none."""
    for name in ("a", "b"):
        case = hosts(name, mounts="backend" if name == "b" else "volume")
        if name == "a":
            case.made("v", path=theirs, access="ro")
        spec = case.found("v")
        case.driver.attach(spec)
        path = Path(spec.volume.mountpoint)
        assert (path / "file").read_text() == "theirs"
        with pytest.raises(OSError, match="Read-only"):
            (path / "new").touch()
        case.driver.attach(spec)
        case.driver.detach(spec)
    case.remove(spec)


# Deaths


def _fuse(case: HostCase, key: str) -> int:
    helper = daemons.find(str(case.folder / "mounts" / f"{key}.run"))
    assert helper is not None
    return helper.pid


def _require_fuse() -> None:
    if MOUNT != "fuse":
        pytest.skip("the kernel's client has no process that could die")


@pytest.mark.parametrize("mode", ["volume", "backend"])
def test_dead_fuse(hosts: Hosts, mode: str) -> None:
    """A ceph-fuse that was killed is told of, and mounted anew by the next attach."""
    _require_fuse()
    case = hosts(**MODES[mode])
    spec, path = case.attached("v")
    (path / "file").write_text("text")
    with (path / "held").open("w") as file:
        file.write("held")
        file.flush()
        os.fsync(file.fileno())
        key = spec.volume.id if mode == "volume" else "backend-cephfs"
        os.kill(_fuse(case, key), signal.SIGKILL)
        eventually(
            lambda: "dead" in str(_status(case, spec)), "Status tells of the death"
        )
        with contextlib.suppress(OSError):
            file.close()
    with pytest.raises(OSError, match="not connected"):
        os.listdir(path)
    assert case.is_attached(spec)
    before = time.monotonic()
    case.driver.attach(spec)
    # Its session, with the right to write the file, was not waited for: a minute.
    assert time.monotonic() - before < 40
    assert (path / "file").read_text() == "text"
    assert (path / "held").read_text() == "held"
    assert "mount" not in _status(case, spec)
    assert len([m for m in case.mounts() if m.mountpoint == str(path)]) == 1


def _status(case: HostCase, spec: object) -> dict[str, object]:
    return dict(
        case.driver.status(spec.volume, spec.options, attached=True)  # type: ignore[attr-defined]
    )


def test_dead_fuse_that_a_container_has(hosts: Hosts, container: Container) -> None:
    """A dead mount is not replaced while a container still has it, and that is told."""
    _require_fuse()
    case = hosts()
    spec, path = case.attached("v")
    child = container(path)
    os.kill(_fuse(case, spec.volume.id), signal.SIGKILL)
    with pytest.raises(Unavailable, match=f"pid {child.pid}"):
        case.driver.attach(spec)
    child.kill()
    child.wait()
    case.driver.attach(spec)
    (path / "file").write_text("text")


def test_detach_after_death(hosts: Hosts) -> None:
    """A dead mount is detached like one that lives."""
    _require_fuse()
    case = hosts()
    spec, _ = case.attached("v")
    os.kill(_fuse(case, spec.volume.id), signal.SIGKILL)
    case.driver.detach(spec)
    assert case.left() == []


def test_fuse_in_a_container_alone(hosts: Hosts, container: Container) -> None:
    """A volume that a container alone still has is detached once that has ended."""
    _require_fuse()
    case = hosts(timeout=2)
    spec, path = case.attached("v")
    child = container(path)
    with pytest.raises(Unavailable, match="still writes"):
        case.driver.detach(spec)
    child.kill()
    child.wait()
    case.driver.detach(spec)
    assert case.left() == []


_DYING = """
import os, signal, sys
from pathlib import Path
from cephfs_cases import CephFS, CephFSConfig, HostCase
config = CephFSConfig(conf=sys.argv[1], directory=sys.argv[2], mount=sys.argv[3])
case = HostCase("a", Path(sys.argv[4]), CephFS(config, sys.argv[4]), config)
case.made("v")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_plugin_killed(
    ceph: Ceph, hosts: Hosts, directory: str, tmp_path: Path
) -> None:
    """What a plugin that was killed had in its hands is not waited for: a minute."""
    case = hosts()
    words = [ceph.conf, directory, MOUNT, case.folder]
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1]), *sys.path]
    killed = subprocess.run(
        [sys.executable, "-c", _DYING, *map(str, words)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    before = time.monotonic()
    case.made("w")
    case.remove(case.found("v"))
    assert time.monotonic() - before < 40


# A cluster that hangs


def test_hung_mds(own_ceph: Ceph, tmp_path: Path) -> None:
    """While the MDS hangs, calls fail in time, and all of it mends afterwards."""
    case = HostCase.of(own_ceph, "/volplugin", tmp_path, timeout=2)
    spec = case.made("v", **SMALL)
    other = case.spec("w", **SMALL)
    own_ceph.pause("mds")
    before = time.monotonic()
    with pytest.raises(Unavailable, match="did not answer within 2 s"):
        case.driver.create(other)
    with pytest.raises(Unavailable, match="has not answered for"):
        case.driver.attach(spec)
    with pytest.raises(Unavailable):
        case.driver.measure([spec])
    assert "not answered" in case.driver.health()
    assert case.driver.find("v") is not None
    assert time.monotonic() - before < 30
    own_ceph.resume("mds")
    eventually(lambda: case.driver.health() == "ok", "it answers again", seconds=60)
    case.driver.create(other)
    case.driver.attach(in_state(other, State.READY))
    case.driver.detach(spec)
    case.clear()
    assert case.left() == []


def test_hung_mds_at_first_use(own_ceph: Ceph, tmp_path: Path) -> None:
    """A session that can't be begun fails in time, and is begun later."""
    own_ceph.pause("mds")
    case = HostCase.of(own_ceph, "/volplugin", tmp_path, timeout=2)
    with pytest.raises(Unavailable):
        case.spec("v")  # the plan asks whether the user may make directories
    own_ceph.resume("mds")

    def created() -> bool:
        try:
            case.driver.create(case.spec("v"))
        except Unavailable:
            return False
        return True

    eventually(created, "the session is begun", seconds=90)
    case.clear()


def test_hung_osd(own_ceph: Ceph, tmp_path: Path) -> None:
    """While the OSD hangs, calls fail in time; what was written is there afterwards."""
    case = HostCase.of(own_ceph, "/volplugin", tmp_path, timeout=2)
    spec, path = case.attached("v")
    (path / "file").write_bytes(b"x" * 100_000)
    own_ceph.pause("osd")
    before = time.monotonic()
    with pytest.raises(Unavailable):
        case.driver.detach(spec)
    with pytest.raises(Unavailable):
        case.driver.find("v")
    assert case.driver.health() != "ok"
    assert time.monotonic() - before < 30
    own_ceph.resume("osd")

    def detached() -> bool:
        try:
            case.driver.detach(spec)
        except Unavailable:
            return False
        return True

    eventually(detached, "it is detached", seconds=60)
    case.driver.attach(spec)
    assert (path / "file").stat().st_size == 100_000
    case.clear()
    assert case.left() == []


def test_mds_restart(own_ceph: Ceph, tmp_path: Path) -> None:
    """A metadata server that is started anew costs no volume and no mount."""
    case = HostCase.of(own_ceph, "/volplugin", tmp_path, timeout=5)
    spec, path = case.attached("v")
    (path / "file").write_text("text")
    own_ceph.restart("mds")

    def works() -> bool:
        try:
            case.driver.attach(spec)
        except Unavailable:
            return False
        return (path / "file").read_text() == "text"

    eventually(works, "the volume is there again", seconds=60)
    case.clear()


# Rights and bad input


def test_rights_in_one_directory(
    ceph: Ceph, files: Administrator, directory: str, tmp_path: Path
) -> None:
    """A user whose rights end at the backend's directory is enough."""
    files.make(directory)
    user = directory.strip("/")
    keyring = ceph.user(
        user,
        mon="profile rbd, allow r",
        osd=f"allow rw tag cephfs data={FILESYSTEM}",
        mds=f"allow rwps path={directory}",
    )
    case = HostCase.of(ceph, directory, tmp_path, user=user, keyring=str(keyring))
    spec, path = case.attached("v", **SMALL)
    (path / "file").write_text("text")
    case.driver.take_snapshot(spec, "s", attached=True)
    with pytest.raises(Unavailable, match="has no rights outside of"):
        case.spec("w", path="/elsewhere")
    case.clear()
    assert case.left() == []
    ceph.ceph("auth", "rm", f"client.{user}")


@pytest.mark.parametrize(
    "lacking",
    [("rws", "p", {"size": "16m"}), ("rwp", "s", {})],
)
def test_missing_right(
    ceph: Ceph,
    directory: str,
    tmp_path: Path,
    lacking: tuple[str, str, dict[str, str]],
) -> None:
    """A right that is missing in the user's caps is named."""
    letters, needed, option = lacking
    user = f"lacks-{needed}"
    keyring = ceph.user(
        user,
        mon="profile rbd, allow r",
        osd=f"allow rw tag cephfs data={FILESYSTEM}",
        mds=f"allow {letters}",
    )
    case = HostCase.of(ceph, directory, tmp_path, user=user, keyring=str(keyring))
    spec = case.spec("v", **option)

    def use() -> None:
        case.driver.create(spec)
        case.driver.take_snapshot(spec, "s", attached=False)

    with pytest.raises(Unavailable, match=f"the '{needed}' is missing in its mds caps"):
        use()
    case.driver.remove(spec)
    case.clear()
    ceph.ceph("auth", "rm", f"client.{user}")


def test_wrong_settings(ceph: Ceph, tmp_path: Path) -> None:
    """What is wrong in a backend's settings is named, with what would be right."""
    empty = tmp_path / "empty.keyring"
    empty.write_text(
        "[client.volplugin]\n key = AQBSdFlnAAAAABAAVdUV0kX8NA8VjWEMpNHgvw==\n"
    )
    for settings, said in (
        (
            {"fs": "nope"},
            f"fs=nope: there is no such file system; there are {FILESYSTEM}",
        ),
        ({"registry_pool": "nope"}, "nope"),
        ({"keyring": str(empty)}, "key"),
        ({"conf": "/nowhere/ceph.conf"}, "/nowhere/ceph.conf: no such file"),
        ({"user": "nobody"}, "client.nobody"),
    ):
        case = HostCase.of(ceph, "/unused", tmp_path, **settings)
        with pytest.raises((Unavailable, InvalidArgument), match=said):
            case.driver.find("v")  # as the core does before all else
        case.driver.close()


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"size": "1"}, "below the minimum, 4K"),
        ({"access": "ro"}, "give path= as well"),
        ({"access": "rx"}, "rw"),
        ({"path": "/"}, "whole file system"),
        ({"path": "/a/.snap/b"}, "in a snapshot"),
        ({"path": "a"}, "absolute"),
        ({"path": "/a", "uid": "1"}, "leave uid, gid and mode out"),
        ({"from": "v"}, "unknown option 'from'"),
    ],
)
def test_bad_options(hosts: Hosts, raw: dict[str, str], said: str) -> None:
    """An option that can't be is refused, with what would be right."""
    case = hosts()
    with pytest.raises(VolpluginError, match=said):
        case.parsed(raw)


def test_no_way_to_mount(ceph: Ceph, directory: str, tmp_path: Path) -> None:
    """A host that can't mount CephFS is told so before anything is made."""
    if MOUNT == "kernel" or "ceph" in Path("/proc/filesystems").read_text().split():
        missing("needs a kernel without CephFS")
    case = HostCase.of(ceph, directory, tmp_path, mount="kernel")
    with pytest.raises(Unavailable, match="this one has no file system ceph"):
        case.spec("v")
    case.driver.close()
