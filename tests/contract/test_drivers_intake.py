"""The driver ``local`` takes directories in: by a rename, by a copy, or not at all."""

import os
import stat
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
from driver_cases import cleaned, record_of, snapshot
from support.commands import Container
from support.disks import disk, enable_quotas

from volplugin import failpoints, options
from volplugin.drivers.driver import Plan, Spec, TakesIn
from volplugin.drivers.local import Local, LocalConfig
from volplugin.errors import (
    AlreadyExists,
    InUse,
    InvalidArgument,
    NoSpace,
    NotFound,
    Unsupported,
)
from volplugin.host import copying
from volplugin.model import State, Volume
from volplugin.store import records

pytestmark = pytest.mark.root

ID = "1" * 32


@attrs.frozen
class Case:
    """An open driver, and a directory that others have."""

    driver: Local
    place: Path
    origin: Path

    @classmethod
    def of(cls, folder: Path, place: Path, root: Path | None = None) -> "Case":
        """Open the driver in ``place``, which is on ``root`` if given."""
        driver = Local(LocalConfig(root=str(root) if root else None), str(place))
        driver.open()
        origin = folder / "theirs" / "web"
        (origin / "folder").mkdir(parents=True)
        (origin / "folder" / "file").write_text("theirs")
        os.link(origin / "folder" / "file", origin / "again")
        os.chown(origin, 5, 6)
        origin.chmod(0o2750)
        return cls(driver, root or place, origin)

    def plan(self, **asked: str) -> Plan:
        """Plan the volume."""
        parsed: Any = options.parse(self.driver.Options, asked, subject="a test")
        return self.driver.plan_intake("v", ID, parsed, str(self.origin))

    def spec(self, **asked: str) -> Spec:
        """Return the volume as the driver gets it, *creating*."""
        plan = self.plan(**asked)
        volume = Volume(
            name="v",
            id=ID,
            backend="local",
            driver="local",
            options=asked,
            facts=plan.facts,
            mountpoint=plan.mountpoint,
            created_at="2024-01-01T00:00:00.000Z",
        )
        parsed: Any = options.parse(self.driver.Options, asked, subject="a test")
        record = records.encode(attrs.evolve(volume, state=State.READY))
        return Spec(volume=volume, options=parsed, record=record)


def ready(spec: Spec) -> Spec:
    """Return the volume once it is made."""
    return attrs.evolve(spec, volume=attrs.evolve(spec.volume, state=State.READY))


@pytest.fixture
def folder(scratch: Path) -> Iterator[Path]:
    """A folder that nothing stays mounted or immutable in."""
    with cleaned(scratch):
        yield scratch
    failpoints.arm("")


@pytest.fixture
def moving(folder: Path) -> Case:
    """The directory is on the driver's file system."""
    return Case.of(folder, folder / "place")


@pytest.fixture
def copying_(folder: Path, ext4: Path) -> Case:
    """The directory is on another file system."""
    return Case.of(folder, folder / "place", ext4 / "place")


@pytest.fixture(params=["move", "copy"])
def case(request: pytest.FixtureRequest) -> Case:
    """Both in turn."""
    wanted = "moving" if request.param == "move" else "copying_"
    found = request.getfixturevalue(wanted)
    assert isinstance(found, Case)
    return found


def test_a_plan_to_move(moving: Case) -> None:
    """A rename where one file system has both."""
    assert moving.plan().facts == {"origin": str(moving.origin), "intake": "move"}


def test_a_plan_to_copy(copying_: Case) -> None:
    """And a reason where a rename will not do."""
    facts = copying_.plan().facts
    assert facts["intake"] == "copy"
    assert "another file system" in facts["copied-for"]


def test_a_plan_changes_nothing(case: Case) -> None:
    """It only looks."""
    before = snapshot(case.origin), snapshot(case.place)
    case.plan()
    assert (snapshot(case.origin), snapshot(case.place)) == before


def test_moved(moving: Case) -> None:
    """The directory itself is the volume, as it was, with the record."""
    inode = moving.origin.stat().st_ino
    spec = moving.spec()
    assert not moving.driver.is_taken_in(spec)
    moving.driver.create(spec)
    path = Path(spec.volume.mountpoint)
    assert path == moving.place / "volumes" / "v"
    assert path.stat().st_ino == inode
    assert (stat.S_IMODE(path.stat().st_mode), path.stat().st_uid) == (0o2750, 5)
    assert (path / "folder" / "file").read_text() == "theirs"
    assert record_of(path) == spec.record
    assert not moving.origin.exists()
    assert moving.driver.is_taken_in(spec)
    moving.driver.create(spec)  # again is success
    moving.driver.attach(ready(spec))


def test_copied(copying_: Case) -> None:
    """The directory is as it was, and the volume is the same."""
    before = snapshot(copying_.origin)
    spec = copying_.spec()
    copying_.driver.create(spec)
    assert snapshot(copying_.origin) == before
    path = spec.volume.mountpoint
    assert copying.difference(str(copying_.origin), path) is None
    assert record_of(path) == spec.record
    assert copying_.driver.is_taken_in(spec)
    assert list((copying_.place / "staging").iterdir()) == []
    copying_.driver.create(spec)
    copying_.driver.attach(ready(spec))


def test_removed_as_any_other(case: Case) -> None:
    """Once it is ready it is a volume like any other: removal throws it away."""
    spec = case.spec()
    case.driver.create(spec)
    removing = attrs.evolve(spec.volume, state=State.REMOVING)
    case.driver.remove(attrs.evolve(spec, volume=removing))
    assert not Path(spec.volume.mountpoint).exists()
    assert case.driver.purge(lambda: False)
    assert list((case.place / "trash").iterdir()) == []


@pytest.mark.parametrize(
    "point", ["intake.mark", "intake.copy", "intake.compared", "intake.publish"]
)
def test_undone(folder: Path, ext4: Path, point: str) -> None:
    """What a create began is taken away, and the directory is as it was."""
    root = None if point == "intake.mark" else ext4 / "place"
    case = Case.of(folder, folder / "place", root)
    before = snapshot(case.origin)
    spec = case.spec()
    failpoints.arm(f"{point}=error:5")
    with pytest.raises(OSError, match="failpoint"):
        case.driver.create(spec)
    if point == "intake.publish":
        assert case.driver.is_taken_in(spec)
        return
    assert not case.driver.is_taken_in(spec)
    case.driver.remove(spec)
    case.driver.remove(spec)
    assert snapshot(case.origin) == before
    assert list((case.place / "staging").iterdir()) == []
    assert list((case.place / "volumes").iterdir()) == []
    assert case.driver.purge(lambda: False)
    failpoints.arm("")
    case.driver.create(spec)


def test_a_copy_that_is_not_the_same(copying_: Case) -> None:
    """A directory that changes meanwhile is no volume: it says what differs."""
    spec = copying_.spec()
    (copying_.origin / "folder" / "deep").symlink_to("/")
    failpoints.arm("intake.copy=sleep:1")
    writer = threading.Timer(
        0.5, lambda: (copying_.origin / "again").write_text("later")
    )
    writer.start()
    with pytest.raises(InUse, match="not the same: 'again': another content"):
        copying_.driver.create(spec)
    writer.join()
    copying_.driver.remove(spec)
    assert (copying_.origin / "again").read_text() == "later"


def test_used_by_a_container(case: Case, container: Container) -> None:
    """What a container has, or a part of it, is refused with the process."""
    spec = case.spec()
    child = container(case.origin / "folder")
    for call in (case.plan, lambda: case.driver.create(spec)):
        with pytest.raises(InUse, match=rf"pid {child.pid} \(sleep\)"):
            call()
    assert (case.origin / "again").exists()


def test_mounted_into(case: Case) -> None:
    """What has a mount below it is refused."""
    inside = case.origin / "folder"
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", inside], check=True)
    try:
        with pytest.raises(InUse, match="is mounted on"):
            case.plan()
    finally:
        subprocess.run(["umount", inside], check=True)


def test_place_is_taken(case: Case) -> None:
    """What lies in the volume's place is not touched, nor is the directory."""
    spec = case.spec()
    Path(spec.volume.mountpoint).mkdir()
    before = snapshot(case.origin)
    with pytest.raises(AlreadyExists, match="no volume of that name is known"):
        case.driver.create(spec)
    case.driver.remove(spec)
    assert snapshot(case.origin) == before
    assert Path(spec.volume.mountpoint).exists()


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"uid": "5"}, "taken as it is; leave uid out"),
        ({"mode": "0700"}, "leave mode out"),
        ({"mount": "/mnt/x"}, "leave mount out"),
        ({"quota": "btrfs"}, "give size or inodes"),
    ],
)
def test_refused_options(moving: Case, asked: dict[str, str], reason: str) -> None:
    """Options that would change the directory are refused."""
    with pytest.raises(InvalidArgument, match=reason):
        moving.plan(**asked)


@pytest.mark.parametrize(
    "path",
    [
        *("/", "/etc", "/etc/default", "/home", "/var/lib", "/usr/share/doc"),
        *("/var/lib/docker", "/var/lib/docker/overlay2", "/var/lib/docker/volumes"),
        "/var/lib/docker/volumes/web",
    ],
)
def test_refused_directories(moving: Case, path: str) -> None:
    """No part of the system, and nothing of an engine but a volume's files."""
    with pytest.raises(InvalidArgument, match="system directory"):
        attrs.evolve(moving, origin=Path(path)).plan()


def test_links_and_what_is_missing(moving: Case) -> None:
    """A symbolic link is not followed; what is not there is told."""
    link = moving.origin.parent / "link"
    link.symlink_to(moving.origin)
    with pytest.raises(InvalidArgument, match="is a symbolic link to"):
        attrs.evolve(moving, origin=link).plan()
    with pytest.raises(InvalidArgument, match="does not exist"):
        attrs.evolve(moving, origin=moving.origin / "none").plan()


def test_limited(folder: Path) -> None:
    """With a size it is a copy, into a directory with that limit."""
    with disk(folder, "btrfs", 256 << 20) as mountpoint:
        enable_quotas(mountpoint)
        case = Case.of(mountpoint, folder / "place", mountpoint / "place")
        spec = case.spec(size="16m")
        assert spec.volume.facts["copied-for"] == "it gets a limit"
        case.driver.create(spec)
        path = spec.volume.mountpoint
        assert copying.difference(str(case.origin), path) is None
        with pytest.raises(OSError, match="quota exceeded"):
            (Path(path) / "large").write_bytes(os.urandom(20 << 20))
        (Path(path) / "large").unlink()


def test_too_small_a_limit(folder: Path) -> None:
    """What does not fit into its limit is refused, and undone."""
    with disk(folder, "btrfs", 256 << 20) as mountpoint:
        enable_quotas(mountpoint)
        case = Case.of(mountpoint, folder / "place", mountpoint / "place")
        (case.origin / "large").write_bytes(os.urandom(20 << 20))
        spec = case.spec(size="16m")
        with pytest.raises(NoSpace, match="Disk quota exceeded"):
            case.driver.create(spec)
        case.driver.remove(spec)
        assert case.driver.purge(lambda: False)
        assert (case.origin / "large").stat().st_size == 20 << 20


def test_no_limit_there(moving: Case) -> None:
    """Where nothing can limit, a size is refused before anything is done."""
    with pytest.raises(Unsupported, match="can't be limited in place"):
        moving.plan(size="16m")


def test_the_origin_is_dropped(copying_: Case) -> None:
    """What was copied is deleted when asked; again is success."""
    spec = ready(copying_.spec())
    copying_.driver.create(spec)
    for _ in range(2):
        copying_.driver.drop_origin(spec)
        assert list(copying_.origin.parent.iterdir()) == []
    assert (Path(spec.volume.mountpoint) / "again").read_text() == "theirs"


def test_a_dropping_goes_on(copying_: Case) -> None:
    """One that was cut short goes on; a directory made anew there is not touched."""
    spec = ready(copying_.spec())
    copying_.driver.create(spec)
    failpoints.arm("intake.aside=error:5")
    with pytest.raises(OSError, match="failpoint"):
        copying_.driver.drop_origin(spec)
    failpoints.arm("")
    copying_.origin.mkdir()
    (copying_.origin / "new").touch()
    copying_.driver.drop_origin(spec)
    assert [p.name for p in copying_.origin.parent.iterdir()] == ["web"]
    assert (copying_.origin / "new").exists()
    with pytest.raises(AlreadyExists, match="is kept"):
        copying_.driver.drop_origin(spec)
    assert (copying_.origin / "new").exists()


def test_what_changed_is_not_dropped(copying_: Case, container: Container) -> None:
    """Neither a directory that was written to since, nor one in use."""
    spec = ready(copying_.spec())
    copying_.driver.create(spec)
    child = container(copying_.origin)
    with pytest.raises(InUse, match=f"pid {child.pid}"):
        copying_.driver.drop_origin(spec)
    os.killpg(child.pid, 9)
    child.wait()
    (copying_.origin / "later").touch()
    with pytest.raises(AlreadyExists, match="delete it yourself"):
        copying_.driver.drop_origin(spec)
    assert (copying_.origin / "later").exists()


def test_is_a_power(moving: Case) -> None:
    """It is one of the powers that not all drivers have."""
    assert isinstance(moving.driver, TakesIn)


def test_what_others_remove_meanwhile(moving: Case) -> None:
    """A directory that went away between plan and create is an error."""
    spec = moving.spec()
    subprocess.run(["rm", "-r", moving.origin], check=True)
    with pytest.raises(NotFound):
        moving.driver.create(spec)
    moving.driver.remove(spec)
