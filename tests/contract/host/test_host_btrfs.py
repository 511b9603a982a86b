"""Subvolumes and qgroups of a real btrfs, cross-checked with btrfs-progs."""

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.commands import run
from support.disks import disk, enable_quotas
from support.require import require

from volplugin.errors import AlreadyExists, NoSpace, NotFound, Unsupported
from volplugin.host import btrfs, paths, qgroup_removal, qgroups
from volplugin.host.qgroups import Qgroup, Quotas

pytestmark = pytest.mark.root


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[Path]:
    """A btrfs without quotas."""
    require("btrfs")
    with disk(tmp_path, "btrfs", 256 << 20) as mountpoint:
        yield mountpoint


@pytest.fixture
def quotas(plain: Path) -> Path:
    """A btrfs with quotas, counted."""
    enable_quotas(plain)
    return plain


def make(path: Path) -> int:
    btrfs.create_subvolume(str(path), 0o700)
    subvolume = btrfs.subvolume_at(str(path))
    assert subvolume is not None
    return subvolume.id


def shown(mountpoint: Path) -> dict[int, tuple[int, int, int | None]]:
    """What btrfs-progs says: referenced, exclusive and limit by id."""
    table = run("btrfs", "qgroup", "show", "--raw", "-r", mountpoint)
    return {
        int(found[1]): (
            int(found[2]),
            int(found[3]),
            None if found[4] == "none" else int(found[4]),
        )
        for found in re.finditer(r"\n0/(\d+) +(\d+) +(\d+) +(\d+|none)", table)
    }


def destroy(path: Path) -> bool:
    with paths.parent(str(path)) as (directory, name):
        return btrfs.destroy_at(directory, name)


def remove_qgroup(mountpoint: Path, number: int) -> bool:
    descriptor = paths.open_directory(str(mountpoint))
    try:
        qgroup_removal.note_at(descriptor, number)
        return qgroup_removal.remove_at(descriptor, lambda: False)
    finally:
        os.close(descriptor)


def test_btrfs_is_told_apart(plain: Path, scratch: Path, tmpfs: Path) -> None:
    """A directory of btrfs is on btrfs at any depth, and others are not."""
    (plain / "directory").mkdir()
    assert btrfs.is_btrfs(str(plain))
    assert btrfs.is_btrfs(str(plain / "directory"))
    assert not btrfs.is_btrfs(str(scratch))
    assert not btrfs.is_btrfs(str(tmpfs))


def test_a_subvolume(plain: Path) -> None:
    """It has the mode asked for, an id that btrfs-progs shows, and is found again."""
    before = os.umask(0o077)
    try:
        btrfs.create_subvolume(str(plain / "v"), 0o751)
    finally:
        os.umask(before)
    found = btrfs.subvolume_at(str(plain / "v"))
    assert found is not None
    assert f"Subvolume ID: \t\t{found.id}\n" in run(
        "btrfs", "subvolume", "show", plain / "v"
    )
    assert stat.S_IMODE((plain / "v").stat().st_mode) == 0o751
    assert found.file_system.hex() == re.sub(
        "-", "", run("findmnt", "-no", "UUID", plain).strip()
    )


def test_making_what_is_there(plain: Path) -> None:
    """A subvolume is left as it is; a directory or a file in its place is refused."""
    number = make(plain / "v")
    (plain / "v" / "file").touch()
    assert make(plain / "v") == number
    assert (plain / "v" / "file").exists()
    (plain / "directory").mkdir()
    (plain / "file").touch()
    for name in ("directory", "file"):
        with pytest.raises(AlreadyExists, match="is no subvolume"):
            btrfs.create_subvolume(str(plain / name), 0o700)
    with pytest.raises(NotFound):
        btrfs.create_subvolume(str(plain / "missing" / "v"), 0o700)


def test_other_file_systems_have_none(scratch: Path, tmpfs: Path) -> None:
    """Where there is no btrfs, nothing is a subvolume and none can be made."""
    for place in (scratch, tmpfs):
        assert btrfs.subvolume_at(str(place)) is None
        with pytest.raises(Unsupported, match="not btrfs"):
            btrfs.create_subvolume(str(place / "v"), 0o700)
        with pytest.raises(Unsupported, match="not btrfs"):
            qgroups.state(str(place))


def test_only_a_root_is_a_subvolume(plain: Path) -> None:
    """A directory in a subvolume is none; the top of the file system is number 5."""
    make(plain / "v")
    (plain / "v" / "directory").mkdir()
    assert btrfs.subvolume_at(str(plain / "v" / "directory")) is None
    top = btrfs.subvolume_at(str(plain))
    assert top is not None
    assert top.id == 5


def test_destroying(plain: Path) -> None:
    """A subvolume goes whole, read-only too, but not while one lies below it."""
    make(plain / "v")
    (plain / "v" / "directory").mkdir()
    (plain / "v" / "directory" / "file").touch()
    make(plain / "v" / "directory" / "nested")
    run("btrfs", "subvolume", "snapshot", "-r", plain / "v", plain / "snapshot")
    assert not destroy(plain / "v")
    assert destroy(plain / "snapshot")
    assert destroy(plain / "v" / "directory" / "nested")
    assert destroy(plain / "v")
    assert os.listdir(plain) == []
    with pytest.raises(FileNotFoundError):
        destroy(plain / "v")


def test_a_name_is_not_followed(plain: Path) -> None:
    """A link to a subvolume, or a directory, is no subvolume to destroy."""
    make(plain / "v")
    (plain / "link").symlink_to("v")
    (plain / "directory").mkdir()
    for name in ("link", "directory"):
        with pytest.raises(OSError, match=r"Invalid argument|Not a directory"):
            destroy(plain / name)
    assert (plain / "v").exists()


def test_a_new_subvolume_outlives_a_power_cut(tmp_path: Path, scratch: Path) -> None:
    """It is on disk at return, with its mode, and after a rename under its new name."""
    with disk(tmp_path, "btrfs", 256 << 20) as mountpoint:
        (mountpoint / "volumes").mkdir()
        make(mountpoint / "v")
        run("cp", "--sparse=always", mountpoint.parent / "image", scratch / "made")
        paths.move(str(mountpoint / "v"), str(mountpoint / "volumes" / "v"))
        run("cp", "--sparse=always", mountpoint.parent / "image", scratch / "moved")
    for image, place in (("made", "v"), ("moved", "volumes/v")):
        after = scratch / "after"
        after.mkdir(exist_ok=True)
        run("mount", "-o", "loop", scratch / image, after)
        found = (after / place).stat()
        run("umount", after)
        assert (found.st_ino, stat.S_IMODE(found.st_mode)) == (256, 0o700)


def test_quotas_off(plain: Path) -> None:
    """Without quotas there is nothing to read, to limit or to remove."""
    number = make(plain / "v")
    assert qgroups.state(str(plain)) == Quotas(is_on=False)
    assert qgroups.read(str(plain)) == Quotas(is_on=False)
    with pytest.raises(Unsupported, match="quotas are off"):
        qgroups.get(str(plain / "v"), number)
    with pytest.raises(Unsupported, match="quotas are off"):
        qgroups.set_limit(str(plain / "v"), number, 1 << 20)
    assert remove_qgroup(plain, number)


def test_quotas_switched_off_again(quotas: Path) -> None:
    """Once switched off, quotas are off, as if they had never been on."""
    make(quotas / "v")
    assert qgroups.state(str(quotas)).is_on
    run("btrfs", "quota", "disable", quotas)
    assert qgroups.read(str(quotas)) == Quotas(is_on=False)


def test_quotas_that_lost_count(quotas: Path) -> None:
    """A qgroup of a higher level given usage by hand leaves the counts inconsistent."""
    number = make(quotas / "v")
    (quotas / "v" / "file").write_bytes(bytes(1 << 20))
    run("btrfs", "subvolume", "snapshot", quotas / "v", quotas / "s")
    run("btrfs", "qgroup", "create", "1/1", quotas)
    btrfs.sync(str(quotas))
    run("btrfs", "qgroup", "assign", "--no-rescan", f"0/{number}", "1/1", quotas)
    btrfs.commit(str(quotas))
    assert qgroups.state(str(quotas)).is_inconsistent
    run("btrfs", "quota", "rescan", "-w", quotas)
    assert not qgroups.state(str(quotas)).is_inconsistent


def test_reading_agrees_with_btrfs_progs(quotas: Path) -> None:
    """All figures of all qgroups are those that btrfs-progs shows."""
    for name, size in (("a", 1 << 20), ("b", 10 << 20), ("c", None)):
        number = make(quotas / name)
        (quotas / name / "file").write_bytes(os.urandom(300_000))
        qgroups.set_limit(str(quotas), number, size)
    run("btrfs", "subvolume", "snapshot", quotas / "a", quotas / "snapshot")
    btrfs.sync(str(quotas))
    found = qgroups.read(str(quotas))
    assert found.is_on
    assert not found.is_inconsistent
    assert not found.is_rescanning
    assert len(found.qgroups) == 5
    assert {
        number: (qgroup.referenced, qgroup.exclusive, qgroup.size)
        for number, qgroup in found.qgroups.items()
    } == shown(quotas)


def test_more_qgroups_than_fit_one_answer(quotas: Path) -> None:
    """A search that needs several calls finds each qgroup once."""
    numbers = range(1 << 48 | 1, 1 << 48 | 3001)  # 1/1 and so on
    top = paths.open_directory(str(quotas))
    try:
        for number in numbers:
            btrfs.ioctl(top, btrfs.WRITE, 42, qgroup_removal.CREATE_ARGS, 1, number)
    finally:
        os.close(top)
    assert len(numbers) * (32 + 40) > qgroups._BUFFER
    assert set(qgroups.read(str(quotas)).qgroups) == {5, *numbers}


def test_a_limit(quotas: Path) -> None:
    """It is read back at once, also by btrfs-progs; 0 is a limit, None is none."""
    path, number = str(quotas / "v"), make(quotas / "v")
    for size in (1 << 20, 0, 12345, None, 1 << 40):
        qgroups.set_limit(path, number, size)
        assert qgroups.get(path, number) == Qgroup(16384, 16384, size)
        assert shown(quotas)[number][2] == size


def test_a_limit_leaves_the_other(quotas: Path) -> None:
    """The limit of exclusive bytes that someone has set stays."""
    path, number = str(quotas / "v"), make(quotas / "v")
    run("btrfs", "qgroup", "limit", "-e", "2M", path)
    for size in (1 << 20, None):
        qgroups.set_limit(path, number, size)
        assert qgroups.get(path, number) == Qgroup(16384, 16384, size, 2 << 20)


def test_an_unknown_qgroup(quotas: Path) -> None:
    """No such qgroup is an error with the commands that make it."""
    for call in (
        lambda: qgroups.get(str(quotas), 4711),
        lambda: qgroups.set_limit(str(quotas), 4711, 1 << 20),
    ):
        with pytest.raises(NotFound, match="btrfs qgroup create 0/4711"):
            call()
    assert remove_qgroup(quotas, 4711)


def test_a_limit_of_zero_stops_all(quotas: Path) -> None:
    """With the limit 0 not even an empty file can be made."""
    path, number = str(quotas / "v"), make(quotas / "v")
    qgroups.set_limit(path, number, 0)
    with pytest.raises(OSError, match="quota exceeded"):
        (quotas / "v" / "file").touch()


def test_a_full_subvolume_can_be_given_more(quotas: Path) -> None:
    """At its limit it can be given another, though newer kernels refuse that inside."""
    path, number = str(quotas / "v"), make(quotas / "v")
    qgroups.set_limit(path, number, 16384)
    qgroups.set_limit(path, number, 1 << 20)
    assert qgroups.get(path, number).size == 1 << 20


def test_a_full_subvolume_that_is_a_mountpoint(quotas: Path, scratch: Path) -> None:
    """Another mount of the file system helps; where there is none the error says so."""
    number = make(quotas / "v")
    device = run("findmnt", "-no", "SOURCE", quotas).strip()
    alone = scratch / "alone"
    alone.mkdir()
    run("mount", "-o", "subvol=v", device, alone)
    qgroups.set_limit(str(alone), number, 16384)
    qgroups.set_limit(str(alone), number, 1 << 20)
    qgroups.set_limit(str(alone), number, 16384)
    run("umount", quotas)
    try:
        qgroups.set_limit(str(alone), number, 1 << 20)
    except NoSpace as error:  # which kernels refuse is not known
        assert "no room left for the change itself" in str(error)  # noqa: PT017
        assert qgroups.get(str(alone), number).size == 16384
    finally:
        run("mount", device, quotas)
        run("umount", alone)


def test_the_qgroup_of_a_deleted_subvolume(quotas: Path) -> None:
    """It can be removed once the kernel has taken the subvolume apart."""
    number = make(quotas / "v")
    (quotas / "v" / "file").write_bytes(bytes(1 << 20))
    qgroups.set_limit(str(quotas), number, 2 << 20)
    assert destroy(quotas / "v")
    for _ in range(2):
        assert remove_qgroup(quotas, number)
        assert list(shown(quotas)) == [5]


def test_what_is_left_is_tried_again(quotas: Path) -> None:
    """A removal that was stopped is done with the next."""
    numbers = [make(quotas / name) for name in ("a", "b")]
    top = paths.open_directory(str(quotas))
    try:
        with (quotas / "a" / "file").open("wb") as in_use:
            assert destroy(quotas / "a")
            qgroup_removal.note_at(top, numbers[0])
            assert not qgroup_removal.remove_at(top, lambda: True)
            in_use.write(b"x")
        assert destroy(quotas / "b")
        qgroup_removal.note_at(top, numbers[1])
        assert qgroup_removal.remove_at(top, lambda: False)
    finally:
        os.close(top)
    assert list(shown(quotas)) == [5]


def test_how_fresh_usage_is(quotas: Path) -> None:
    """A commit alone does not count data not written yet; fsync and sync do."""
    path, number = str(quotas / "v"), make(quotas / "v")
    data = os.urandom(1 << 20)
    with (quotas / "v" / "file").open("wb") as file:
        file.write(data)
        file.flush()
        assert qgroups.get(path, number).referenced == 16384
        os.fsync(file.fileno())
        btrfs.commit(path)
        assert qgroups.get(path, number).referenced >= 1 << 20
    (quotas / "v" / "other").write_bytes(data)
    btrfs.commit(path)
    assert qgroups.get(path, number).referenced < 2 << 20
    btrfs.sync(path)
    assert qgroups.get(path, number).referenced >= 2 << 20
