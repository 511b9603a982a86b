"""Records in xattrs, immutable flags and guarded mountpoints on real file systems."""

import os
import stat
from pathlib import Path

import pytest
from support.commands import run

from volplugin.errors import InUse, InvalidArgument, NoSpace, NotFound
from volplugin.host import attributes, guard

pytestmark = pytest.mark.root

# A file system without trusted xattrs and without inode flags, on every host.
BARE = "/proc/sys"


def is_immutable(path: Path) -> bool:
    return "i" in run("lsattr", "-d", path).split()[0]


@pytest.mark.parametrize("where", ["ext4", "tmpfs"])
def test_record(request: pytest.FixtureRequest, where: str) -> None:
    """A record is read as it was written, replaced and cleared."""
    path = request.getfixturevalue(where)
    (path / "v").mkdir(mode=0)
    volume = str(path / "v")
    assert attributes.read_record(volume) is None
    for data in (b"{}", b"\0\xff" * 500, b""):
        assert attributes.write_record(volume, data)
        assert attributes.read_record(volume) == data
    for _ in range(2):
        attributes.clear_record(volume)
        assert attributes.read_record(volume) is None


def test_record_of_nothing(scratch: Path) -> None:
    """A missing path has no record and none to clear; it cannot be given one."""
    missing = str(scratch / "missing" / "deeper")
    assert attributes.read_record(missing) is None
    attributes.clear_record(missing)
    with pytest.raises(NotFound):
        attributes.write_record(missing, b"x")


def test_record_not_through_a_link(scratch: Path) -> None:
    """A link does not lend the record of what it points to."""
    attributes.write_record(str(scratch), b"x")
    (scratch / "link").symlink_to(scratch)
    assert attributes.read_record(str(scratch / "link")) is None


def test_record_without_xattrs() -> None:
    """Where the file system has no such xattrs, that is an answer, not an error."""
    assert attributes.read_record(BARE) is None
    assert attributes.write_record(BARE, b"x") is False
    attributes.clear_record(BARE)


def test_record_too_long(ext4: Path) -> None:
    """A record that does not fit is refused, and the one before it stays."""
    attributes.write_record(str(ext4), b"before")
    with pytest.raises(InvalidArgument, match="65537 bytes are too long"):
        attributes.write_record(str(ext4), bytes(65537))
    with pytest.raises(NoSpace, match="8000 bytes do not fit"):
        attributes.write_record(str(ext4), bytes(8000))
    assert attributes.read_record(str(ext4)) == b"before"


@pytest.mark.parametrize("mode", [0o755, 0])
def test_immutable(ext4: Path, mode: int) -> None:
    """An immutable directory takes no entry, of whatever mode; cleared, it does."""
    path = ext4 / "v"
    path.mkdir(mode=mode)
    for _ in range(2):
        assert attributes.set_immutable(str(path), on=True)
        assert is_immutable(path)
    with pytest.raises(PermissionError):
        (path / "file").touch()
    for _ in range(2):
        assert attributes.set_immutable(str(path), on=False)
        assert not is_immutable(path)
    (path / "file").touch()


def test_immutable_keeps_other_flags(ext4: Path) -> None:
    """The flags beside the immutable one stay as they are."""
    run("chattr", "+dA", ext4)
    before = run("lsattr", "-d", ext4)
    attributes.set_immutable(str(ext4), on=True)
    attributes.set_immutable(str(ext4), on=False)
    assert run("lsattr", "-d", ext4) == before


def test_immutable_where_it_cannot_be(scratch: Path) -> None:
    """A file system without flags says False; a missing path and a link are errors."""
    assert attributes.set_immutable(BARE, on=True) is False
    assert attributes.set_immutable(BARE, on=False) is False
    with pytest.raises(NotFound):
        attributes.set_immutable(str(scratch / "missing"), on=True)


@pytest.mark.parametrize("where", ["ext4", "tmpfs", "scratch"])
def test_guard(request: pytest.FixtureRequest, where: str) -> None:
    """Nothing can be written into a guarded mountpoint, and guard is undone."""
    path = request.getfixturevalue(where) / "v"
    path.mkdir()
    for _ in range(2):
        guard.guard(str(path))
        assert stat.S_IMODE(path.stat().st_mode) == 0
    if is_immutable(path):
        with pytest.raises(PermissionError):
            (path / "file").touch()
    else:
        assert where == "tmpfs"  # which has had flags since Linux 6.6 only
    for _ in range(2):
        guard.unguard(str(path))
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    path.rmdir()
    guard.unguard(str(path))


def test_guard_of_a_half_made_one(ext4: Path) -> None:
    """A mountpoint that is immutable with another mode is put right."""
    path = ext4 / "v"
    path.mkdir()
    run("chattr", "+i", path)
    guard.guard(str(path))
    assert stat.S_IMODE(path.stat().st_mode) == 0
    assert is_immutable(path)


def test_a_guarded_mountpoint_is_mounted_on(ext4: Path) -> None:
    """The mount covers the guard, which is there again after it."""
    path = ext4 / "v"
    path.mkdir()
    guard.guard(str(path))
    run("mount", "-t", "tmpfs", "x", path)
    (path / "file").touch()
    run("umount", path)
    assert os.listdir(path) == []
    assert is_immutable(path)


def test_guard_leaves_mounts_and_content_alone(scratch: Path, tmpfs: Path) -> None:
    """What is mounted or has content is neither guarded nor changed."""
    before = tmpfs.stat().st_mode
    with pytest.raises(InUse, match="mounted"):
        guard.guard(str(tmpfs))
    with pytest.raises(InUse, match="mounted"):
        guard.unguard(str(tmpfs))
    assert tmpfs.stat().st_mode == before
    with pytest.raises(InUse, match="not empty"):
        guard.guard(str(scratch))
    with pytest.raises(NotFound):
        guard.guard(str(scratch / "missing"))
    (scratch / "link").symlink_to(tmpfs)
    with pytest.raises(InvalidArgument):
        guard.unguard(str(scratch / "link"))
