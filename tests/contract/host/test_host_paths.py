"""Directories by path: no link is followed, whatever changes meanwhile."""

import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.commands import run

from volplugin.errors import AlreadyExists, InUse, InvalidArgument, NoSpace, NotFound
from volplugin.host import paths, renaming

pytestmark = pytest.mark.root


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@contextmanager
def umask(value: int) -> Iterator[None]:
    before = os.umask(value)
    try:
        yield
    finally:
        os.umask(before)


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_open_directory(scratch: Path) -> None:
    """The descriptor is the directory's, for reading and syncing, not inherited."""
    (scratch / "a" / "b").mkdir(parents=True)
    for path in (f"{scratch}/a/b", f"{scratch}//a/b/"):
        descriptor = paths.open_directory(path)
        try:
            assert os.path.samestat(os.fstat(descriptor), os.stat(path))
            assert os.listdir(descriptor) == []
            os.fsync(descriptor)
            assert not os.get_inheritable(descriptor)
        finally:
            os.close(descriptor)


@pytest.mark.parametrize("link", ["first", "a/middle", "a/b/last"])
def test_a_link_is_named(scratch: Path, link: str) -> None:
    """A link in any component is refused with its path and where it points."""
    (scratch / "a" / "b").mkdir(parents=True)
    (scratch / "target" / "x").mkdir(parents=True)
    (scratch / link).symlink_to(scratch / "target")
    for path in (scratch / link, scratch / link / "x"):
        with pytest.raises(InvalidArgument) as caught:
            paths.open_directory(str(path))
        assert str(scratch / link) in str(caught.value)
        assert str(scratch / "target") in str(caught.value)


@pytest.mark.parametrize(
    "path",
    ["", "a", "./a", "/a/../b", "/./a", "/..", "/a\0b", "/\ud800", "/" + "x" * 256],
)
def test_paths_that_are_none(path: str) -> None:
    """Relative paths, dots, NUL, lone surrogates and long names are refused."""
    for call in (paths.open_directory, paths.missing_directories, paths.make_directory):
        with pytest.raises(InvalidArgument):
            call(path)


def test_missing_and_not_a_directory(scratch: Path) -> None:
    """What is missing is not found; a file on the way is a wrong argument."""
    (scratch / "file").touch()
    with pytest.raises(NotFound, match="/none does not exist"):
        paths.open_directory(str(scratch / "none" / "deeper"))
    for path in (scratch / "file", scratch / "file" / "x"):
        with pytest.raises(InvalidArgument, match="not a directory"):
            paths.open_directory(str(path))


def test_descriptors_are_closed(scratch: Path) -> None:
    """Neither success nor failure leaves a descriptor open."""
    (scratch / "link").symlink_to("/")
    before = open_descriptors()
    paths.make_directories(str(scratch / "a" / "b"), 0o700)
    paths.missing_directories(str(scratch / "a" / "b" / "c"))
    for call in (paths.open_directory, paths.make_directory, paths.remove_directory):
        with pytest.raises(InvalidArgument):
            call(str(scratch / "link" / "x" / "y"))
    with pytest.raises(NotFound):
        paths.open_directory(str(scratch / "none"))
    paths.remove_directory(str(scratch / "a" / "b"))
    assert open_descriptors() == before


def test_a_swapped_component_leads_nowhere(scratch: Path) -> None:
    """While a directory and a link change places, the link is never gone through."""
    outside = scratch / "outside"
    (outside / "x").mkdir(parents=True)
    (scratch / "dir" / "x").mkdir(parents=True)
    (scratch / "link").symlink_to(outside)
    forbidden = paths.identity(str(outside / "x"))
    done = threading.Event()

    def swap() -> None:
        while not done.is_set():
            (scratch / "dir").rename(scratch / "aside")
            (scratch / "link").rename(scratch / "dir")
            (scratch / "dir").rename(scratch / "link")
            (scratch / "aside").rename(scratch / "dir")

    thread = threading.Thread(target=swap)
    thread.start()
    opened = refused = 0
    try:
        for _ in range(20_000):
            try:
                descriptor = paths.open_directory(str(scratch / "dir" / "x"))
            except (InvalidArgument, NotFound):
                refused += 1
                continue
            found = os.fstat(descriptor)
            os.close(descriptor)
            assert (found.st_dev, found.st_ino) != forbidden
            opened += 1
            if opened > 100 and refused > 100:
                break
    finally:
        done.set()
        thread.join()
    assert opened
    assert refused


@pytest.mark.parametrize("wanted", [0o755, 0o777, 0o700, 0o1777, 0o2770, 0])
@pytest.mark.parametrize("mask", [0o022, 0o077, 0])
def test_the_mode_is_exact(scratch: Path, wanted: int, mask: int) -> None:
    """Neither the umask nor the parent's set-group-ID bit changes the mode."""
    scratch.chmod(0o2755)
    with umask(mask):
        paths.make_directory(str(scratch / "new"), wanted)
    assert mode(scratch / "new") == wanted


def test_make_directory_again(scratch: Path) -> None:
    """A directory that exists stays as it is; anything else has taken the name."""
    path = scratch / "new"
    path.mkdir(mode=0o711)
    (path / "file").touch()
    paths.make_directory(str(path), 0o700)
    assert mode(path) == 0o711
    for name in ("file", "link"):
        if name == "link":
            (path / name).symlink_to(scratch)
        with pytest.raises(AlreadyExists):
            paths.make_directory(str(path / name))
    with pytest.raises(NotFound):
        paths.make_directory(str(scratch / "none" / "deeper"))


def test_make_directories(scratch: Path) -> None:
    """Those that were missing are made with the mode, told outermost first."""
    path = scratch / "a" / "b" / "c"
    (scratch / "a").mkdir()
    expected = [str(scratch / "a" / "b"), str(path)]
    assert paths.missing_directories(str(path)) == expected
    with umask(0o077):
        assert paths.make_directories(str(path), 0o775) == expected
    assert mode(path) == mode(path.parent) == 0o775
    assert paths.make_directories(str(path), 0o700) == []
    assert paths.missing_directories(str(path)) == []
    assert paths.missing_directories("/") == []


def test_directories_that_fail_are_taken_back(tmpfs: Path) -> None:
    """Where a deeper one cannot be made, none of those above it is left."""
    run("mount", "-o", "remount,nr_inodes=3", tmpfs)
    with pytest.raises(NoSpace, match="/a/b/c"):
        paths.make_directories(str(tmpfs / "a" / "b" / "c"), 0o755)
    assert os.listdir(tmpfs) == []


def test_remove_directory(scratch: Path, tmpfs: Path) -> None:
    """Empty ones go, missing ones are gone, all else stays and says why."""
    (scratch / "dir" / "sub").mkdir(parents=True)
    (scratch / "file").touch()
    (scratch / "link").symlink_to(scratch / "dir" / "sub")
    with pytest.raises(InUse, match="not empty"):
        paths.remove_directory(str(scratch / "dir"))
    with pytest.raises(InUse):
        paths.remove_directory(str(tmpfs))
    for name in ("file", "link"):
        with pytest.raises(InvalidArgument):
            paths.remove_directory(str(scratch / name))
    for _ in range(2):
        paths.remove_directory(str(scratch / "dir" / "sub"))
        paths.remove_directory(str(scratch / "none" / "deeper"))
    assert not (scratch / "dir" / "sub").exists()


def test_move(scratch: Path) -> None:
    """A directory moves with its content, to another parent or the same."""
    (scratch / "a" / "v" / "data").mkdir(parents=True)
    (scratch / "b").mkdir()
    paths.move(str(scratch / "a" / "v"), str(scratch / "b" / "w"))
    paths.move(str(scratch / "b" / "w"), str(scratch / "b" / "x"))
    assert (scratch / "b" / "x" / "data").is_dir()
    with pytest.raises(NotFound):
        paths.move(str(scratch / "a" / "v"), str(scratch / "y"))


@pytest.mark.parametrize("kind", ["directory", "file", "link"])
def test_move_replaces_nothing(scratch: Path, kind: str) -> None:
    """An empty directory, a file or a dangling link at the target is not replaced."""
    (scratch / "source").mkdir()
    target = scratch / "target"
    if kind == "directory":
        target.mkdir()
    elif kind == "file":
        target.touch()
    else:
        target.symlink_to("nowhere")
    before = paths.identity(str(target))
    with pytest.raises(AlreadyExists):
        paths.move(str(scratch / "source"), str(target))
    directory = os.open(scratch, os.O_RDONLY)
    try:
        with pytest.raises(FileExistsError):
            renaming.look_and_rename(directory, "source", directory, "target")
        renaming.look_and_rename(directory, "source", directory, "free")
    finally:
        os.close(directory)
    assert paths.identity(str(target)) == before
    assert (scratch / "free").is_dir()


def test_move_between_file_systems(scratch: Path, tmpfs: Path) -> None:
    """A move to another file system is refused, the source stays."""
    (scratch / "v").mkdir()
    with pytest.raises(InvalidArgument, match="different file systems"):
        paths.move(str(scratch / "v"), str(tmpfs / "v"))
    assert (scratch / "v").is_dir()


def test_move_through_no_link(scratch: Path) -> None:
    """A link among the parents of source or target is refused."""
    (scratch / "dir" / "v").mkdir(parents=True)
    (scratch / "link").symlink_to(scratch / "dir")
    for source, target in (("link/v", "w"), ("dir/v", "link/w")):
        with pytest.raises(InvalidArgument, match="symbolic link"):
            paths.move(str(scratch / source), str(scratch / target))


def test_identity(scratch: Path) -> None:
    """A link has an identity of its own; what is missing has none."""
    (scratch / "link").symlink_to(scratch)
    found = scratch.stat()
    assert paths.identity(str(scratch)) == (found.st_dev, found.st_ino)
    assert paths.identity(str(scratch / "link")) != paths.identity(str(scratch))
    assert paths.identity(str(scratch / "none" / "deeper")) is None
    (scratch / "file").touch()
    assert paths.identity(str(scratch / "file" / "x")) is None
