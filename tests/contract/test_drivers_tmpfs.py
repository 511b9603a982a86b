"""The driver ``tmpfs``: what it mounts, and what it leaves unmounted."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from driver_cases import Case, Kind, cleaned, record_of, snapshot
from support.mounts import read_mounts

from volplugin import failpoints
from volplugin.errors import AlreadyExists, InUse, InvalidArgument, Unavailable
from volplugin.host import mountinfo
from volplugin.model import State

pytestmark = pytest.mark.root

DEFAULT = Kind(name="tmpfs", options={}, stages=())
EXISTING = Kind(
    name="tmpfs", options={"mount": "existing"}, stages=(), is_existing=True
)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder that nothing stays mounted or immutable in."""
    with cleaned(tmp_path):
        yield tmp_path
    failpoints.arm("")


@pytest.fixture
def case(folder: Path) -> Case:
    """An open driver for volumes in its own place."""
    return Case.of(DEFAULT, folder)


def writable(place: str | Path) -> None:
    """Take the guard's flag off, where the file system has it."""
    subprocess.run(["chattr", "-i", place], check=False, capture_output=True)


def attached(folder: Path, asked: dict[str, str]) -> Path:
    """Make and attach a volume with options, and return where it is."""
    case = Case.of(Kind(name="tmpfs", options=asked, stages=()), folder)
    spec = case.made("v")
    case.driver.attach(spec)
    return Path(spec.volume.mountpoint)


@pytest.mark.parametrize(
    ("asked", "size", "mode", "owner"),
    [
        ({}, 64 << 20, 0o1777, (0, 0)),
        ({"size": "1m", "mode": "700", "uid": "7", "gid": "8"}, 1 << 20, 0o700, (7, 8)),
        ({"size": "10.5m", "inodes": "20"}, 21 << 19, 0o1777, (0, 0)),
    ],
)
def test_options(
    folder: Path, asked: dict[str, str], size: int, mode: int, owner: tuple[int, int]
) -> None:
    """The mounted file system has the size, inodes, mode and owner asked for."""
    place = attached(folder, asked)
    found, space = place.stat(), os.statvfs(place)
    assert space.f_blocks * space.f_frsize == size
    assert found.st_mode & 0o7777 == mode
    assert (found.st_uid, found.st_gid) == owner
    if "inodes" in asked:
        assert space.f_files == int(asked["inodes"])


@pytest.mark.parametrize(("asked", "noexec"), [({}, True), ({"exec": ""}, False)])
def test_flags(folder: Path, asked: dict[str, str], *, noexec: bool) -> None:
    """Devices and set-user-ID never work in it; programs only if asked for."""
    place = attached(folder, asked)
    mount = next(m for m in read_mounts() if m.mountpoint == str(place))
    assert mount.options >= {"nosuid", "nodev"}
    assert ("noexec" in mount.options) is noexec
    assert mount.filesystem == "tmpfs"


def test_limit(folder: Path) -> None:
    """The size is a limit."""
    place = attached(folder, {"size": "64k"})
    with pytest.raises(OSError, match="No space left"):
        (place / "file").write_bytes(b"x" * (65 << 10))


def test_unmounted(case: Case) -> None:
    """Nothing can be written to a mountpoint while nothing is mounted there."""
    spec = case.made("v")
    place = Path(spec.volume.mountpoint)
    assert place.stat().st_mode & 0o7777 == 0
    with pytest.raises(PermissionError):
        (place / "file").touch()
    case.driver.attach(spec)
    (place / "file").touch()
    case.driver.detach(spec)
    with pytest.raises(PermissionError):
        (place / "file").touch()


def test_content_goes(case: Case) -> None:
    """What was written is gone with the detach."""
    spec = case.made("v")
    case.driver.attach(spec)
    (Path(spec.volume.mountpoint) / "file").touch()
    case.driver.detach(spec)
    case.driver.attach(spec)
    assert list(Path(spec.volume.mountpoint).iterdir()) == []


def test_busy(case: Case) -> None:
    """While a process is in it a volume is not detached, and goes on."""
    spec = case.made("v")
    case.driver.attach(spec)
    with (Path(spec.volume.mountpoint) / "file").open("w"):
        for call in (case.driver.detach, case.driver.remove):
            with pytest.raises(InUse):
                call(spec)
    assert (Path(spec.volume.mountpoint) / "file").exists()
    case.driver.detach(spec)


def test_mounted_more_than_once(case: Case) -> None:
    """Detach takes every mount of the volume away."""
    spec = case.made("v")
    case.driver.attach(spec)
    place = spec.volume.mountpoint
    source = f"volplugin-{spec.volume.id}"
    subprocess.run(["mount", "-t", "tmpfs", source, place], check=True)
    case.driver.detach(spec)
    assert case.mounts_below() == []


def test_other_mount_in_its_place(case: Case) -> None:
    """What somebody else mounted there is not taken for the volume, nor unmounted."""
    spec = case.made("v")
    place = spec.volume.mountpoint
    subprocess.run(["mount", "-t", "tmpfs", "theirs", place], check=True)
    with pytest.raises(Unavailable, match="'theirs' mounted on it"):
        case.driver.attach(spec)
    case.driver.detach(spec)
    assert [mount.source for mount in case.mounts_below()] == ["theirs"]
    subprocess.run(["umount", place], check=True)
    case.driver.attach(spec)


def test_mountpoint_lost(case: Case) -> None:
    """A mountpoint that went with a boot, its root being in memory, is made again."""
    spec = case.made("v")
    writable(spec.volume.mountpoint)
    Path(spec.volume.mountpoint).rmdir()
    Path(spec.volume.mountpoint).parent.rmdir()
    case.driver.attach(spec)
    assert record_of(spec.volume.mountpoint) == spec.record
    case.driver.detach(spec)
    assert Path(spec.volume.mountpoint).stat().st_mode & 0o7777 == 0


def test_files_under_the_mount(case: Case) -> None:
    """Files that lie where nothing should be are not deleted with the volume."""
    spec = case.made("v")
    place = Path(spec.volume.mountpoint)
    writable(place)
    (place / "file").write_text("text")
    with pytest.raises(InUse, match="move them away"):
        case.driver.remove(case.in_state(spec, State.REMOVING))
    assert (place / "file").read_text() == "text"
    (place / "file").unlink()
    case.driver.remove(case.in_state(spec, State.REMOVING))
    assert not place.exists()


def test_leftover_in_the_root(case: Case) -> None:
    """A directory with content in a volume's place is told of and left alone."""
    spec = case.spec("v")
    place = Path(spec.volume.mountpoint)
    place.mkdir()
    (place / "file").touch()
    before = snapshot(place)
    with pytest.raises(AlreadyExists, match="volplugin recover"):
        case.driver.create(spec)
    case.driver.remove(spec)
    assert snapshot(place) == before


def test_chosen_with_content(folder: Path) -> None:
    """A directory with content can't be chosen: a mount would hide it."""
    case = Case.of(EXISTING, folder)
    (folder / "v/existing/file").touch()
    with pytest.raises(InvalidArgument, match="is not empty"):
        case.spec("v")


def test_chosen_mountpoint(folder: Path) -> None:
    """A directory that something is mounted on can't be chosen."""
    case = Case.of(EXISTING, folder)
    place = folder / "v/existing"
    subprocess.run(["mount", "-t", "tmpfs", "theirs", place], check=True)
    with pytest.raises(InvalidArgument, match="has a tmpfs mounted on it"):
        case.spec("v")


def test_mounted_after_the_plan(folder: Path) -> None:
    """What is mounted in a volume's place meanwhile refuses a create and stays."""
    case = Case.of(EXISTING, folder)
    place = folder / "v/existing"
    spec = case.spec("v")
    subprocess.run(["mount", "-t", "tmpfs", "theirs", place], check=True)
    before = snapshot(place)
    with pytest.raises(InUse, match="mounted"):
        case.driver.create(spec)
    case.driver.remove(spec)
    assert mountinfo.at(str(place), case.mounts()) is not None
    assert snapshot(place) == before


def test_mounted_before_the_removal(case: Case) -> None:
    """What is mounted in a volume's place keeps it from being removed."""
    spec = case.made("v")
    place = spec.volume.mountpoint
    subprocess.run(["mount", "-t", "tmpfs", "theirs", place], check=True)
    with pytest.raises(InUse, match="'theirs' mounted on it"):
        case.driver.remove(case.in_state(spec, State.REMOVING))
    subprocess.run(["umount", place], check=True)
    case.driver.remove(case.in_state(spec, State.REMOVING))
    assert not Path(place).exists()
