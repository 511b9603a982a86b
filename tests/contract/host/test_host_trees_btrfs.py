"""Deleting trees on btrfs: subvolumes in them, read-only, nested, full, mounted."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.commands import run
from support.disks import disk, enable_quotas
from support.require import require

from volplugin import failpoints
from volplugin.errors import InUse, NoSpace
from volplugin.host import btrfs, qgroups, trees

pytestmark = pytest.mark.root


@pytest.fixture(params=["quotas", "no quotas"])
def top(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """The path of a tree still to be made, on a btrfs with or without quotas."""
    require("btrfs")
    with disk(tmp_path, "btrfs", 256 << 20) as mountpoint:
        if request.param == "quotas":
            enable_quotas(mountpoint)
        yield mountpoint / "top"
        if request.param == "quotas":
            subvolumes = set(ids(mountpoint)) | {5}
            assert set(qgroups.read(str(mountpoint)).qgroups) == subvolumes


def ids(mountpoint: Path) -> list[int]:
    btrfs.commit(str(mountpoint))
    shown = run("btrfs", "subvolume", "list", mountpoint)
    return [int(line.split()[1]) for line in shown.splitlines()]


def make(path: Path) -> Path:
    btrfs.create_subvolume(str(path), 0o755)
    return path


def snapshot(source: Path, target: Path, *flags: str) -> None:
    run("btrfs", "subvolume", "snapshot", *flags, source, target)


def never() -> bool:
    return False


def assert_deleted(top: Path) -> None:
    assert trees.delete(str(top), stop=never)
    assert not top.exists()
    assert ids(top.parent) == []


def test_a_subvolume_as_top(top: Path) -> None:
    """A tree that is a subvolume goes at once, files unread."""
    make(top)
    for number in range(100):
        (top / f"{number}").touch()
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return False

    assert trees.delete(str(top), stop=stop)
    assert asked < 5
    assert not top.exists()


def test_a_read_only_top(top: Path) -> None:
    """A read-only subvolume as top goes too."""
    make(top)
    (top / "file").touch()
    run("btrfs", "property", "set", top, "ro", "true")
    assert_deleted(top)


@pytest.mark.parametrize("is_subvolume", [True, False])
def test_nested_subvolumes(top: Path, is_subvolume: bool) -> None:
    """Subvolumes in directories in subvolumes go, whatever the top is."""
    if is_subvolume:
        make(top)
    else:
        top.mkdir()
    here = top
    for level in range(5):
        (here / "directory").mkdir()
        (here / "file").write_bytes(b"x" * 5000)
        here = make(here / "directory" / f"v{level}")
        make(here / "beside")
    assert_deleted(top)


def test_read_only_snapshots(top: Path) -> None:
    """Read-only snapshots go, also such as hold the place of a nested subvolume."""
    make(top)
    (top / "file").touch()
    make(top / "nested")
    (top / "nested" / "file").touch()
    snapshot(top, top / "read-only", "-r")
    snapshot(top, top / "writable")
    make(top / "writable" / "more")  # so that it can't go at once
    assert (top / "writable" / "nested").stat().st_ino == 2
    assert_deleted(top)


def test_a_read_only_subvolume_with_others_below(top: Path) -> None:
    """A subvolume made read-only when it held others is made writable to be emptied."""
    make(top)
    make(top / "v")
    (top / "v" / "file").touch()
    make(top / "v" / "nested")
    for path in (top / "v" / "nested", top / "v", top):
        run("btrfs", "property", "set", path, "ro", "true")
    assert_deleted(top)


def test_protected_subvolumes(top: Path) -> None:
    """Immutable subvolumes, and such in immutable directories, go too."""
    make(top)
    (top / "directory").mkdir()
    make(top / "directory" / "v")
    (top / "directory" / "v" / "file").touch()
    run("chattr", "+i", top / "directory" / "v", top / "directory", top)
    assert_deleted(top)


def test_many_levels_of_subvolumes(top: Path) -> None:
    """A path longer than the kernel takes is no obstacle."""
    make(top)
    before = os.getcwd()
    try:
        os.chdir(top)
        for _ in range(30):
            os.mkdir("d" * 200)
            os.chdir("d" * 200)
            run("btrfs", "subvolume", "create", "v")
            os.chdir("v")
    finally:
        os.chdir(before)
    assert_deleted(top)


@pytest.mark.parametrize("top", ["quotas"], indirect=True)
def test_full_subvolumes(top: Path) -> None:
    """Subvolumes at their limits, one in the other and read-only, go."""
    make(top)
    (top / "file").write_bytes(bytes(5000))
    make(top / "v")
    make(top / "v" / "nested")
    btrfs.sync(str(top))
    for path in (top / "v" / "nested", top / "v", top):
        found = btrfs.subvolume_at(str(path))
        assert found is not None
        run("btrfs", "property", "set", path, "ro", "true")
        qgroups.set_limit(str(top.parent), found.id, 16384)
    assert_deleted(top)


def test_a_mount_in_a_subvolume(top: Path) -> None:
    """A file system mounted in a nested subvolume is refused, and nothing deleted."""
    make(top)
    (top / "file").touch()
    (make(top / "v") / "place").mkdir()
    run("mount", "-t", "tmpfs", "x", top / "v" / "place")
    (top / "v" / "place" / "kept").touch()
    with pytest.raises(InUse, match=r"v/place; unmount it first"):
        trees.delete(str(top), stop=never)
    assert (top / "v" / "place" / "kept").exists()
    assert (top / "file").exists()
    run("umount", top / "v" / "place")
    assert_deleted(top)


@pytest.mark.parametrize("place", ["a", "v", "v/a"])
def test_a_mount_that_comes_meanwhile(top: Path, place: str) -> None:
    """A subvolume mounted in the tree after the start is neither entered nor lost."""
    top.mkdir()
    (top / "a").mkdir()
    (make(top / "v") / "a").mkdir()
    other = make(top.parent / "other")
    (other / "kept").touch()
    mounted = False

    def mount_now() -> bool:
        nonlocal mounted
        if not mounted:
            run("mount", "--bind", other, top / place)
            mounted = True
        return False

    with pytest.raises(InUse, match=r"is another file system|is mounted on"):
        trees.delete(str(top), stop=mount_now)
    assert (other / "kept").exists()
    assert (top / place / "kept").exists()
    run("umount", top / place)


def test_the_default_subvolume(top: Path) -> None:
    """The one that is mounted by default stays, and the error says what to do."""
    make(top)
    run("btrfs", "subvolume", "set-default", top)
    with pytest.raises(InUse, match="it is the file system's default"):
        trees.delete(str(top), stop=never)
    run("btrfs", "subvolume", "set-default", "5", top.parent)
    assert_deleted(top)


def test_stop_and_carry_on(top: Path) -> None:
    """Asked to stop between subvolumes it ends; the next call does the rest."""
    top.mkdir()
    for number in range(20):
        make(top / f"{number}")
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > 12

    before = len(os.listdir("/proc/self/fd"))
    assert not trees.delete(str(top), stop=stop)
    assert 0 < len(os.listdir(top)) < 20
    assert len(os.listdir("/proc/self/fd")) == before
    assert_deleted(top)
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_failpoint_comes_before(top: Path) -> None:
    """An error at the failpoint leaves a subvolume whole."""
    make(top)
    failpoints.arm("local.purge=error:28*1")
    try:
        with pytest.raises(NoSpace):
            trees.delete(str(top), stop=never)
        assert top.exists()
    finally:
        failpoints.arm("")
    assert_deleted(top)


def test_a_user_made_the_subvolumes(top: Path) -> None:
    """What a user without any right makes in a volume goes with it."""
    make(top)
    top.chmod(0o777)
    script = f"btrfs subvolume create {top}/v && echo x > {top}/v/file"
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    require("setpriv")
    top.parent.parent.chmod(0o755)
    inside = ["sh", "-c", script.replace(f"{top}/", "./")]
    subprocess.run([*nobody, *inside], check=True, cwd=top, capture_output=True)
    assert (top / "v").stat().st_uid == 65534
    assert_deleted(top)
