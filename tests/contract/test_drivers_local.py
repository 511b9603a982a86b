"""The driver ``local``: looks of its directories, its trash, directories it refuses."""

import itertools
import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from driver_cases import Case, Kind, cleaned, snapshot

from volplugin import failpoints, options
from volplugin.drivers.local import Local, LocalConfig, LocalOptions
from volplugin.errors import (
    AlreadyExists,
    InUse,
    InvalidArgument,
    Unavailable,
    Unsupported,
    VolpluginError,
)
from volplugin.host import attributes
from volplugin.model import State

pytestmark = pytest.mark.root

DEFAULT = Kind(name="local", options={}, stages=())
CHOSEN = Kind(name="local", options={"mount": "new/deep"}, stages=(), is_kept=True)


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


def local(case: Case) -> Local:
    """Return the driver as what it is."""
    assert isinstance(case.driver, Local)
    return case.driver


def trash(case: Case) -> Path:
    """Return where removed volumes wait to be deleted."""
    return case.folder / "place/trash"


def removed(case: Case, name: str, *, files: int = 0) -> Path:
    """Make a volume, write files, remove it, and return where it waits."""
    spec = case.made(name)
    for number in range(files):
        folder = Path(spec.volume.mountpoint) / f"folder{number % 3}"
        folder.mkdir(exist_ok=True)
        (folder / f"file{number}").touch()
    case.driver.remove(case.in_state(spec, State.REMOVING))
    return trash(case) / spec.volume.id


def looks(path: str) -> tuple[int, int, int]:
    """Return mode, uid and gid."""
    found = Path(path).stat()
    return stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid


@pytest.mark.parametrize("kind", [DEFAULT, CHOSEN], ids=["own", "chosen"])
@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, (0o755, 0, 0)),
        ({"uid": "7", "gid": "8", "mode": "2770"}, (0o2770, 7, 8)),
        ({"mode": "0"}, (0, 0, 0)),
    ],
)
def test_looks(
    folder: Path, kind: Kind, asked: dict[str, str], expected: tuple[int, int, int]
) -> None:
    """A new root has the mode and owner asked for, whatever the umask."""
    case = Case.of(
        Kind(name="local", options={**kind.options, **asked}, stages=()), folder
    )
    before = os.umask(0o077)
    try:
        spec = case.made("v")
    finally:
        os.umask(before)
    assert looks(spec.volume.mountpoint) == expected


def test_place_is_closed(case: Case) -> None:
    """Containers of other users can pass through the place, and look at nothing."""
    place = case.folder / "place"
    assert looks(str(place))[0] == 0o711
    assert looks(str(place / "volumes"))[0] == 0o711
    for inner in ("staging", "trash"):
        assert looks(str(place / inner))[0] == 0o700


def test_remove_leaves_bytes_to_purge(case: Case) -> None:
    """Remove is a rename; purge deletes what it left."""
    waiting = removed(case, "v", files=30)
    assert len(list(waiting.rglob("file*"))) == 30
    assert local(case).purge(lambda: False) is True
    assert list(trash(case).iterdir()) == []
    assert local(case).purge(lambda: False) is True


def test_purge_stops_and_goes_on(case: Case) -> None:
    """A purge that is told to stop leaves the rest to the next one."""
    waiting = removed(case, "v", files=60)
    count = itertools.count()
    assert local(case).purge(lambda: next(count) > 20) is False
    assert 0 < len(list(waiting.rglob("file*"))) < 60
    again = local(Case(case.kind, case.folder, DEFAULT.driver(case.folder / "place")))
    assert again.purge(lambda: True) is False
    assert again.purge(lambda: False) is True
    assert list(trash(case).iterdir()) == []


def test_purge_with_a_mount_in_the_trash(case: Case) -> None:
    """A tree that something is mounted in stays whole; the others are deleted."""
    kept = removed(case, "a", files=5)
    other = removed(case, "b", files=5)
    inner = kept / "folder0"
    subprocess.run(["mount", "-t", "tmpfs", "test", inner], check=True)
    (inner / "precious").write_text("text")
    assert local(case).purge(lambda: False) is False
    assert not other.exists()
    assert (inner / "precious").read_text() == "text"
    assert (kept / "folder1/file1").exists()
    subprocess.run(["umount", inner], check=True)
    assert local(case).purge(lambda: False) is True
    assert not kept.exists()


def test_remove_with_a_mount_inside(case: Case) -> None:
    """A volume that something is mounted in is not removed, and stays as it is."""
    spec = case.made("v")
    inner = Path(spec.volume.mountpoint) / "inner"
    inner.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "test", inner], check=True)
    with pytest.raises(InUse, match="unmount it first"):
        case.driver.remove(case.in_state(spec, State.REMOVING))
    assert inner.exists()
    case.driver.attach(spec)
    subprocess.run(["umount", inner], check=True)
    case.driver.remove(case.in_state(spec, State.REMOVING))


def test_remove_of_links(case: Case) -> None:
    """Links in a volume lead purge nowhere."""
    outside = case.folder / "outside"
    outside.mkdir()
    (outside / "file").write_text("text")
    spec = case.made("v")
    (Path(spec.volume.mountpoint) / "link").symlink_to(outside)
    case.driver.remove(case.in_state(spec, State.REMOVING))
    case.purge()
    assert (outside / "file").read_text() == "text"


def test_missing_directory(case: Case) -> None:
    """A volume whose directory is gone is not attached, and not made anew empty."""
    spec = case.made("v")
    Path(spec.volume.mountpoint).rmdir()
    with pytest.raises(Unavailable, match="is missing"):
        case.driver.attach(spec)
    assert not Path(spec.volume.mountpoint).exists()


def test_unmounted_disk(folder: Path) -> None:
    """A chosen directory without the record is not the volume: its disk is missing."""
    case = Case.of(CHOSEN, folder)
    disk = folder / "v/new"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "test", disk], check=True)
    spec = case.made("v")
    case.driver.attach(spec)
    subprocess.run(["umount", disk], check=True)
    (disk / "deep").mkdir()
    with pytest.raises(Unavailable, match="is its disk mounted"):
        case.driver.attach(spec)


def test_file_in_its_place(case: Case) -> None:
    """What is no directory refuses a create, and is left alone."""
    spec = case.spec("v")
    Path(spec.volume.mountpoint).write_text("text")
    with pytest.raises(AlreadyExists):
        case.driver.create(spec)
    case.driver.remove(spec)
    assert Path(spec.volume.mountpoint).read_text() == "text"


def test_link_in_its_place(case: Case) -> None:
    """A link in a volume's place is neither followed nor removed."""
    spec = case.spec("v")
    outside = case.folder / "outside"
    outside.mkdir()
    Path(spec.volume.mountpoint).symlink_to(outside)
    before = snapshot(outside)
    with pytest.raises(VolpluginError):
        case.driver.create(spec)
    case.driver.remove(spec)
    assert snapshot(outside) == before
    assert Path(spec.volume.mountpoint).is_symlink()


def refused(folder: Path, raw: dict[str, str], *, allow: tuple[str, ...] | None) -> str:
    """Plan a volume that is refused, and return why."""
    driver = Local(LocalConfig(allow=allow), str(folder / "place"))
    driver.open()
    parsed = options.parse(LocalOptions, raw, subject="driver local")
    before = snapshot(folder)
    with pytest.raises(InvalidArgument) as caught:
        driver.plan("v", "1" * 32, parsed)
    assert snapshot(folder) == before
    return str(caught.value)


@pytest.mark.parametrize(
    "path",
    [
        *("/", "/etc", "/etc/volume", "/usr", "/proc/1", "/sys", "/dev/shm", "/run"),
        *("/var/lib/docker/volumes", "/var", "/home", "/var/lib", "/tmp"),
    ],
)
def test_system_directories(folder: Path, path: str) -> None:
    """No volume is made of a directory that the host or an engine lives by."""
    assert "system directory" in refused(folder, {"mount": path}, allow=None)


def test_allowed_directories(folder: Path) -> None:
    """Where an operator allows some directories, all others are refused by name."""
    raw = {"mount": str(folder / "chosen-not")}
    text = refused(folder, raw, allow=(f"{folder}/chosen",))
    assert f"{folder}/chosen" in text
    assert "not allowed" in text
    assert "no directory" in refused(folder, raw, allow=())
    driver = Local(LocalConfig(allow=(str(folder),)), str(folder / "place"))
    for path in (str(folder), str(folder / "below/it")):
        plan = driver.plan("v", "1" * 32, LocalOptions(mount=path))
        assert plan.mountpoint == path


def test_chosen_through_a_link(folder: Path) -> None:
    """A chosen path that leads through a link is refused, and where to is told."""
    (folder / "real").mkdir()
    (folder / "link").symlink_to(folder / "real")
    text = refused(folder, {"mount": f"{folder}/link/volume"}, allow=None)
    assert f"{folder}/real" in text


def test_chosen_file(folder: Path) -> None:
    """A chosen path that is a file is refused."""
    (folder / "file").touch()
    refused(folder, {"mount": f"{folder}/file"}, allow=None)


@pytest.mark.parametrize("key", ["uid", "gid", "mode"])
def test_existing_with_other_looks(folder: Path, key: str) -> None:
    """An existing directory is adopted as it is, or refused: never changed."""
    (folder / "chosen").mkdir(mode=0o755)
    raw = {"mount": f"{folder}/chosen", key: "700"}
    assert f"leave {key} out" in refused(folder, raw, allow=None)


def test_size_without_quotas(case: Case) -> None:
    """A size is refused where nothing holds it, with what stands against each way."""
    asked = options.parse(LocalOptions, {"size": "16m"}, subject="a test")
    with pytest.raises(Unsupported, match=r"project: .*; btrfs: .*driver=quota"):
        case.driver.plan("v", "id", asked)


def test_quota_without_size(case: Case) -> None:
    """A mechanism without a limit is a mistake."""
    asked = options.parse(LocalOptions, {"quota": "project"}, subject="a test")
    with pytest.raises(InvalidArgument, match="give size or inodes"):
        case.driver.plan("v", "id", asked)


def test_without_xattrs(folder: Path) -> None:
    """On a file system without xattrs a volume lives and ends like any other."""
    place = folder / "ramfs"
    place.mkdir()
    subprocess.run(["mount", "-t", "ramfs", "test", place], check=True)
    assert attributes.are_supported(str(place)) is False
    case = Case(DEFAULT, folder, Local(LocalConfig(), str(place)))
    case.driver.open()
    spec = case.made("v")
    case.driver.attach(spec)
    case.driver.remove(case.in_state(spec, State.REMOVING))
    case.purge()
    assert list((place / "volumes").iterdir()) == []
    assert list((place / "trash").iterdir()) == []
