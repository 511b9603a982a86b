"""The mount table: what the kernel writes is read back, and asked about."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.commands import run

from volplugin.host import mountinfo
from volplugin.host.mountinfo import Mount

pytestmark = pytest.mark.root


def entry(mountpoint: str, mount_id: int, parent_id: int = 1, root: str = "/") -> Mount:
    return Mount(
        mount_id, parent_id, f"0:{mount_id}", root, mountpoint, "rw", (), "x", "y"
    )


@pytest.mark.parametrize(
    "name",
    [b"plain", b"two words", b"new\nline", b"tab\there", b"back\\040slash", b"a#b",
     b"carriage\rreturn", "größe".encode(), b"not\xffutf8", b" - "],
)  # fmt: skip
def test_names_come_back_as_they_are(scratch: Path, name: bytes) -> None:
    """A mountpoint of any bytes is found under its own name."""
    path = os.fsencode(scratch) + b"/" + name
    os.mkdir(path)
    run("mount", "-t", "tmpfs", "the source", os.fsdecode(path))
    found = mountinfo.at(os.fsdecode(path), mountinfo.read())
    assert found is not None
    assert (found.kind, found.source) == ("tmpfs", "the source")
    status = os.stat(path)
    assert found.device == f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}"


def test_optional_fields_are_tags(tmpfs: Path) -> None:
    """A shared mount says so in its tags; a private one has none."""
    found = mountinfo.at(str(tmpfs), mountinfo.read())
    assert found is not None
    run("mount", "--make-private", tmpfs)
    private = mountinfo.at(str(tmpfs), mountinfo.read())
    assert private is not None
    assert private.tags == ()
    run("mount", "--make-shared", tmpfs)
    shared = mountinfo.at(str(tmpfs), mountinfo.read())
    assert shared is not None
    assert [tag.partition(":")[0] for tag in shared.tags] == ["shared"]
    assert shared.mount_id == found.mount_id


def test_an_empty_source_is_no_trouble(scratch: Path) -> None:
    """The fields stay in their places when a mount has the empty string as source."""
    from volplugin.host import mounts

    mounts.mount("", str(scratch), "tmpfs", flags=mounts.MountFlag.NOSUID)
    found = mountinfo.at(str(scratch), mountinfo.read())
    run("umount", scratch)
    assert found is not None
    assert found.kind == "tmpfs"
    assert "nosuid" in found.options.split(",")


def test_topmost_of_a_stack(tmpfs: Path) -> None:
    """Of two mounts on one mountpoint the upper one is at it and covers it."""
    run("mount", "-t", "tmpfs", "upper", tmpfs)
    table = mountinfo.read()
    for found in (
        mountinfo.at(str(tmpfs), table),
        mountinfo.covering(f"{tmpfs}/x/y", table),
    ):
        assert found is not None
        assert found.source == "upper"


def test_topmost_is_told_by_the_parents() -> None:
    """The order of the table does not decide which mount is the upper one."""
    table = [entry("/", 1), entry("/v", 9, parent_id=5), entry("/v", 5)]
    found = mountinfo.at("/v", table)
    assert found is not None
    assert found.mount_id == 9


def test_bind_mount_names_the_directory(tmpfs: Path, scratch: Path) -> None:
    """A bind mount's paths lead to the same place inside the file system."""
    (tmpfs / "a b" / "c").mkdir(parents=True)
    other = scratch / "other"
    other.mkdir()
    run("mount", "--bind", tmpfs / "a b", other)
    table = mountinfo.read()
    assert mountinfo.inside(f"{other}/c", table) == mountinfo.inside(
        f"{tmpfs}/a b/c", table
    )
    inside = mountinfo.inside(str(other), table)
    assert inside is not None
    assert inside[1] == "/a b"
    top = mountinfo.inside(str(tmpfs), table)
    assert top is not None
    assert top[1] == "/"


def test_components_are_compared_whole() -> None:
    """A mount on /mnt/a neither covers nor lies below /mnt/ab."""
    table = [entry("/", 1), entry("/mnt/a", 2), entry("/mnt/ab/c", 3)]
    covering = mountinfo.covering("/mnt/ab", table)
    assert covering is not None
    assert covering.mountpoint == "/"
    assert [mount.mountpoint for mount in mountinfo.below("/mnt/ab", table)] == [
        "/mnt/ab/c"
    ]
    assert mountinfo.below("/mnt/a", table) == []
    assert len(mountinfo.below("/", table)) == 2
    assert mountinfo.to_unmount("/mnt", table) == []
    assert mountinfo.to_unmount("/", table) == ["/mnt/ab/c", "/mnt/a", "/"]
    assert mountinfo.at("/mnt", table) is None
    assert mountinfo.covering("/x", table[1:]) is None
    assert mountinfo.inside("/x", table[1:]) is None


def test_the_root_is_one_slash() -> None:
    """The place inside a file system is joined without doubled slashes."""
    table = [entry("/", 1, root="/sub"), entry("/m", 2)]
    assert mountinfo.inside("/", table) == ("0:1", "/sub")
    assert mountinfo.inside("/a/b", table) == ("0:1", "/sub/a/b")
    assert mountinfo.inside("/m/", table) == ("0:2", "/")


@given(st.binary().filter(lambda name: b"\0" not in name))
def test_escapes_are_undone(name: bytes) -> None:
    """Whatever the bytes, those that the kernel escapes come back."""
    written = b"".join(
        b"\\%03o" % byte if byte in b" \t\n\\#" else bytes([byte]) for byte in name
    )
    text = mountinfo._text(written)
    assert text.encode("utf-8", "surrogateescape") == name


def test_a_missing_process_is_an_os_error() -> None:
    """The caller is told of a process that is not there by the plain error."""
    with pytest.raises(FileNotFoundError):
        mountinfo.read(2**22 + 1)


def test_the_place_of_a_mount_is_the_directory_below_it(tmpfs: Path) -> None:
    """What a mount covers is named as a path of the file system around it."""
    table = mountinfo.read()
    mount = mountinfo.at(str(tmpfs), table)
    assert mount is not None
    around = mountinfo.inside(str(tmpfs.parent), table)
    assert around is not None
    assert mountinfo.place_of(mount, table) == (around[0], f"{around[1]}/tmpfs")
    assert mountinfo.place_of(entry("/a", 5, parent_id=9), [entry("/", 1)]) is None
    root = entry("/", 1)
    assert mountinfo.place_of(entry("/a", 2), [root]) == (root.device, "/a")
    bound = entry("/host", 3, root="/deep")
    inner = entry("/host/a/b", 4, parent_id=3)
    assert mountinfo.place_of(inner, [root, bound, inner]) == (
        bound.device,
        "/deep/a/b",
    )


def test_a_file_system_is_shown_best_by_a_mount_of_its_root() -> None:
    """Bind mounts of a part come after, however short; of equals the first counts."""
    part = Mount(1, 0, "8:1", "/x", "/a", "rw", (), "xfs", "/dev/sda1")
    whole = Mount(2, 0, "8:1", "/", "/long/path", "rw", (), "xfs", "/dev/sda1")
    again = Mount(3, 0, "8:1", "/", "/long/path", "rw", (), "xfs", "/dev/sda1")
    other = Mount(4, 0, "8:2", "/", "/b", "rw", (), "ext4", "/dev/sda2")
    assert mountinfo.of_file_system("8:1", [part, other, whole, again]) is whole
    assert mountinfo.of_file_system("8:1", [part, other]) is part
    assert mountinfo.of_file_system("8:3", [part, other]) is None
