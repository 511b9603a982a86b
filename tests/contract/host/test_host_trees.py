"""Deleting trees that others have filled: deep, wide, hostile, changing."""

import os
import resource
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from support.commands import run

from volplugin import failpoints
from volplugin.errors import InUse, InvalidArgument, NoSpace
from volplugin.host import trees

pytestmark = pytest.mark.root


def never() -> bool:
    return False


@contextmanager
def few_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 8, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def make_deep(top: Path, levels: int, name: str = "d") -> None:
    top.mkdir()
    here = os.open(top, os.O_RDONLY)
    for _ in range(levels):
        os.mkdir(name, dir_fd=here)
        below = os.open(name, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    os.close(here)


def test_all_kinds_of_entries(scratch: Path) -> None:
    """Files, links, pipes, sockets, devices and odd names all go, and nothing else."""
    top, outside = scratch / "top", scratch / "outside"
    (top / "sub" / "empty").mkdir(parents=True)
    outside.mkdir()
    (outside / "kept").touch()
    for name in (b"file", b"two words", b"new\nline", b"\xff\xfe", b"-rf", b"..."):
        for directory in (top, top / "sub"):
            with open(os.fsencode(directory) + b"/" + name, "w"):
                pass
    (top / "link").symlink_to(outside)
    (top / "sub" / "loop").symlink_to("..")
    (top / "dangling").symlink_to("nowhere")
    os.mkfifo(top / "pipe")
    os.mknod(top / "null", 0o20666, os.makedev(1, 3))
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(top / "socket"))
    (top / "locked").mkdir(mode=0)
    (top / "hard").hardlink_to(outside / "kept")
    assert trees.delete(str(top), stop=never)
    assert os.listdir(scratch) == ["outside"]
    assert os.listdir(outside) == ["kept"]


def test_what_is_missing_is_deleted(scratch: Path) -> None:
    """A missing tree, or one without a parent, is success."""
    assert trees.delete(str(scratch / "missing"), stop=never)
    assert trees.delete(str(scratch / "missing" / "deeper"), stop=never)


def test_only_a_directory_is_a_tree(scratch: Path) -> None:
    """A link or a file in the tree's place is refused and stays."""
    (scratch / "dir").mkdir()
    (scratch / "link").symlink_to(scratch / "dir")
    (scratch / "file").touch()
    for name in ("link", "file", "link/x"):
        with pytest.raises(InvalidArgument):
            trees.delete(str(scratch / name), stop=never)
    assert len(os.listdir(scratch)) == 3


@pytest.mark.parametrize("name", ["d", "x" * 200])
def test_a_deep_tree(scratch: Path, name: str) -> None:
    """Five thousand levels need neither recursion nor descriptors nor a path."""
    make_deep(scratch / "top", 5000, name)
    before = len(os.listdir("/proc/self/fd"))
    with few_descriptors():
        assert trees.delete(str(scratch / "top"), stop=never)
    assert os.listdir(scratch) == []
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("where", ["scratch", "tmpfs"])
def test_a_wide_tree(request: pytest.FixtureRequest, where: str) -> None:
    """More directories than are kept in memory at once, and files among them."""
    scratch = request.getfixturevalue(where)
    top = scratch / "top"
    top.mkdir()
    for number in range(trees._BATCH + 500):
        (top / f"d{number}").mkdir()
        (top / f"d{number}" / "x").touch()
        (top / f"f{number}").touch()
    assert trees.delete(str(top), stop=never)
    assert not top.exists()


def test_protected_entries(ext4: Path) -> None:
    """Immutable and append-only files and directories go too."""
    top = ext4 / "top"
    (top / "i" / "sub").mkdir(parents=True)
    (top / "a" / "sub").mkdir(parents=True)
    for directory in (top, top / "i", top / "a", top / "i" / "sub"):
        (directory / "file").touch()
        (directory / "link").symlink_to("file")
    run("chattr", "+i", top / "i" / "file", top / "i" / "sub", top / "i")
    run("chattr", "+a", top / "a" / "file", top / "a" / "sub", top / "a")
    run("chattr", "+i", top)
    assert trees.delete(str(top), stop=never)
    assert not top.exists()


def test_the_directory_above_keeps_its_flags(ext4: Path) -> None:
    """Flags are cleared inside the tree, not on the directory it lies in."""
    (ext4 / "above" / "top").mkdir(parents=True)
    run("chattr", "+i", ext4 / "above")
    with pytest.raises(Exception, match="Operation not permitted"):
        trees.delete(str(ext4 / "above" / "top"), stop=never)
    assert (ext4 / "above" / "top").exists()


@pytest.mark.parametrize("name", ["top", "top/a/b"])
def test_a_mount_is_refused_up_front(scratch: Path, name: str) -> None:
    """With a mount at or below it nothing is deleted, and the mountpoint is named."""
    (scratch / "top" / "a" / "b").mkdir(parents=True)
    (scratch / "top" / "file").touch()
    run("mount", "-t", "tmpfs", "x", scratch / name)
    with pytest.raises(InUse, match=f"tmpfs is mounted on {scratch / name};"):
        trees.delete(str(scratch / "top"), stop=never)
    run("umount", scratch / name)
    assert (scratch / "top" / "file").exists()


def test_a_bind_mount_is_refused(scratch: Path) -> None:
    """A mount of the same file system is no part of the tree either."""
    (scratch / "top" / "a").mkdir(parents=True)
    (scratch / "other").mkdir()
    (scratch / "other" / "kept").touch()
    run("mount", "--bind", scratch / "other", scratch / "top" / "a")
    with pytest.raises(InUse):
        trees.delete(str(scratch / "top"), stop=never)
    assert (scratch / "other" / "kept").exists()


def test_a_mount_that_comes_meanwhile(scratch: Path) -> None:
    """A file system mounted after the start is not entered."""
    (scratch / "top" / "a").mkdir(parents=True)
    mounted = False

    def mount_now() -> bool:
        nonlocal mounted
        if not mounted:
            run("mount", "-t", "tmpfs", "x", scratch / "top" / "a")
            (scratch / "top" / "a" / "kept").touch()
            mounted = True
        return False

    with pytest.raises(InUse, match="a is another file system"):
        trees.delete(str(scratch / "top"), stop=mount_now)
    assert (scratch / "top" / "a" / "kept").exists()


def test_a_bind_mount_that_comes_meanwhile(scratch: Path) -> None:
    """A directory of the same file system bound in after the start is not entered."""
    (scratch / "top" / "a").mkdir(parents=True)
    (scratch / "other").mkdir()
    (scratch / "other" / "kept").touch()
    mounted = False

    def mount_now() -> bool:
        nonlocal mounted
        if not mounted:
            run("mount", "--bind", scratch / "other", scratch / "top" / "a")
            mounted = True
        return False

    with pytest.raises(InUse, match="a is another file system"):
        trees.delete(str(scratch / "top"), stop=mount_now)
    assert (scratch / "other" / "kept").exists()


def test_stop_and_carry_on(scratch: Path) -> None:
    """Asked to stop it ends between two entries; the next call does the rest."""
    top = scratch / "top"
    top.mkdir()
    for number in range(100):
        (top / f"{number}").touch()
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > 40

    before = len(os.listdir("/proc/self/fd"))
    assert not trees.delete(str(top), stop=stop)
    assert 50 < len(os.listdir(top)) < 70
    assert len(os.listdir("/proc/self/fd")) == before
    assert trees.delete(str(top), stop=never)
    assert not top.exists()


def test_a_tree_that_is_written_to(scratch: Path) -> None:
    """Someone who goes on writing is an error to try again, never an endless loop."""
    top = scratch / "top"
    make_deep(top, 3)
    deepest = os.open(top / "d" / "d", os.O_RDONLY)
    done = threading.Event()

    def write() -> None:
        while not done.is_set():
            try:
                os.close(os.open("new", os.O_CREAT | os.O_WRONLY, dir_fd=deepest))
            except FileNotFoundError:
                return

    thread = threading.Thread(target=write)
    thread.start()
    try:
        trees.delete(str(top), stop=never)
    except InUse as error:
        assert "others" in str(error)  # noqa: PT017 both may happen
    finally:
        done.set()
        thread.join()
        os.close(deepest)
    assert trees.delete(str(top), stop=never)


def test_a_directory_swapped_for_a_link(scratch: Path) -> None:
    """While directories and links change places, nothing outside is touched."""
    outside, top = scratch / "outside", scratch / "top"
    (outside / "sub").mkdir(parents=True)
    (outside / "kept").touch()
    done = threading.Event()

    def swap() -> None:
        while not done.is_set():
            # Each step may meet what the walk has deleted; the next round makes it.
            for step in (
                lambda: (scratch / "real" / "sub").mkdir(parents=True),
                lambda: (scratch / "link").symlink_to(outside),
                lambda: (scratch / "real").rename(top / "a" / "b"),
                lambda: (top / "a" / "b").rename(scratch / "real"),
                lambda: (scratch / "link").rename(top / "a" / "b"),
                lambda: (top / "a" / "b").rename(scratch / "link"),
            ):
                with suppress(OSError):
                    step()

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        for _ in range(300):
            for name in ("c", "d", "e"):
                (top / "a" / name).mkdir(parents=True, exist_ok=True)
                (top / "a" / name / "file").touch()
            with suppress(InUse):
                trees.delete(str(top), stop=never)
    finally:
        done.set()
        thread.join()
    assert (outside / "kept").exists()
    assert (outside / "sub").exists()


def test_a_directory_moved_away(scratch: Path) -> None:
    """A directory moved out of the tree meanwhile does not take the walk with it."""
    top, outside = scratch / "top", scratch / "outside"
    (top / "a" / "b").mkdir(parents=True)
    (top / "a" / "b" / "file").touch()
    outside.mkdir()
    (outside / "kept").touch()

    def move_now() -> bool:
        if not (outside / "b").exists() and open_somewhere(top / "a" / "b"):
            (top / "a" / "b").rename(outside / "b")
        return False

    with pytest.raises(InUse, match="moved meanwhile"):
        trees.delete(str(top), stop=move_now)
    assert (outside / "kept").exists()


def open_somewhere(path: Path) -> bool:
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}") == str(path):
                return True
        except FileNotFoundError:
            continue
    return False


def test_the_failpoint_is_hit_once(scratch: Path) -> None:
    """An error at the failpoint is one of ours, and the tree is whole."""
    (scratch / "top" / "a").mkdir(parents=True)
    failpoints.arm("local.purge=error:28*1")
    try:
        with pytest.raises(NoSpace):
            trees.delete(str(scratch / "top"), stop=never)
        assert (scratch / "top" / "a").exists()
        assert trees.delete(str(scratch / "top"), stop=never)
    finally:
        failpoints.arm("")


def test_an_entry_that_vanishes_is_not_success(scratch: Path) -> None:
    """Once the walk has begun, "no such file" never counts as a tree that is gone."""
    (scratch / "top").mkdir()
    failpoints.arm("local.purge=error:2*1")
    try:
        with pytest.raises(InUse, match="others change it"):
            trees.delete(str(scratch / "top"), stop=never)
    finally:
        failpoints.arm("")
    assert (scratch / "top").exists()
