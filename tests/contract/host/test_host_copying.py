"""Copies of trees have all that the original has, and a difference is found."""

import contextlib
import os
import socket
import stat
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.commands import run

from volplugin.errors import NoSpace
from volplugin.host import attributes, copying

pytestmark = pytest.mark.root

HOLE = 1 << 22
ACL = "system.posix_acl_access"


def acl(*, user: int) -> bytes:
    """Return an access list of mode 0751 that lets a user read, as the kernel has it.

    linux/posix_acl_xattr.h: version 2, then tag, permissions and id of each entry.
    """
    anyone = 0xFFFFFFFF
    entries = (1, 7, anyone), (2, 4, user), (4, 5, anyone), (16, 5, anyone)
    packed = (struct.pack("<HHI", *entry) for entry in (*entries, (32, 1, anyone)))
    return struct.pack("<I", 2) + b"".join(packed)


def fill(top: Path) -> None:
    """Make a tree with one of each kind, and with all that an inode can carry."""
    (top / "folder" / "deep").mkdir(parents=True)
    (top / "folder").chmod(0o2770)
    os.chown(top / "folder", 1000, 1001)
    file = top / "folder" / "file"
    file.write_bytes(b"content" * 1000)
    os.setxattr(file, "user.colour", b"blue")
    os.setxattr(file, "trusted.key", b"\0secret")
    os.chown(file, 5, 6)
    file.chmod(0o4751)
    os.setxattr(file, ACL, acl(user=77))
    os.utime(file, ns=(10**18, 10**18 + 123456789))
    os.link(file, top / "again")
    (top / "link").symlink_to("/nowhere/at all")
    os.chown(top / "link", 7, 8, follow_symlinks=False)
    with (top / "sparse").open("wb") as sparse:
        sparse.seek(HOLE)
        sparse.write(b"end")
    os.mkfifo(top / "pipe", 0o640)
    os.mknod(top / "device", 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(top / "socket"))
    (top / "new\nline \udcff").touch()
    os.utime(top, ns=(10**18, 10**18))


@pytest.fixture
def tree(scratch: Path) -> Path:
    """A tree on the host's disk."""
    top = scratch / "tree"
    top.mkdir(0o751)
    os.chown(top, 3, 4)
    os.setxattr(top, "user.of", b"the root")
    fill(top)
    return top


@pytest.fixture
def copied(tree: Path, ext4: Path) -> Path:
    """Its copy on another file system."""
    target = ext4 / "copy"
    target.mkdir(0o700)
    copying.copy(str(tree), str(target))
    return target


def test_a_copy_has_it_all(tree: Path, copied: Path) -> None:
    """Owners, modes, times, attributes, lists, links, holes, nodes and odd names."""
    assert copying.difference(str(tree), str(copied)) is None
    assert copying.difference(str(copied), str(tree)) is None
    file = copied / "folder" / "file"
    found = file.stat()
    assert (found.st_mode & 0o7777, found.st_uid, found.st_gid) == (0o4751, 5, 6)
    assert found.st_mtime_ns == 10**18 + 123456789
    assert (copied / "again").stat().st_ino == found.st_ino
    assert os.getxattr(file, "trusted.key") == b"\0secret"
    assert os.getxattr(file, ACL) == acl(user=77)
    assert (copied / "sparse").stat().st_blocks * 512 < HOLE
    assert (copied / "sparse").stat().st_size == HOLE + 3
    assert (copied.stat().st_uid, copied.stat().st_mode & 0o7777) == (3, 0o751)
    assert os.getxattr(copied, "user.of") == b"the root"
    assert (copied / "device").stat().st_rdev == os.makedev(1, 3)


def overwrite(path: Path) -> None:
    """Change a byte of a file, and neither its length nor its time."""
    with same_times(path), path.open("r+b") as file:
        file.write(b"C")


@contextlib.contextmanager
def same_times(*paths: Path) -> Iterator[None]:
    """Give paths back the times that they had."""
    before = {path: path.stat() for path in paths}
    yield
    for path, found in before.items():
        os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


CHANGES: dict[str, Callable[[Path], object]] = {
    "content": lambda top: overwrite(top / "again"),
    "mode": lambda top: (top / "folder").chmod(0o770),
    "owner": lambda top: os.chown(top / "link", 9, 8, follow_symlinks=False),
    "time": lambda top: os.utime(top / "folder" / "file", ns=(0, 0)),
    "attribute": lambda top: os.setxattr(top / "again", "user.colour", b"red"),
    "no attribute": lambda top: os.removexattr(top / "again", "trusted.key"),
    "acl": lambda top: os.setxattr(top / "again", ACL, acl(user=78)),
    "root's mode": lambda top: top.chmod(0o700),
    "root's attribute": lambda top: os.removexattr(top, "user.of"),
    "missing": lambda top: (top / "pipe").unlink(),
    "surplus": lambda top: (top / "folder" / "deep" / "new").touch(),
    "surplus name": lambda top: os.link(top / "again", top / "third"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_difference_is_found(
    tree: Path, copied: Path, change: Callable[[Path], object]
) -> None:
    """Whatever it is, and on whichever side."""
    with same_times(copied, copied / "folder", copied / "folder" / "deep"):
        change(copied)
    assert copying.difference(str(tree), str(copied)) is not None
    assert copying.difference(str(copied), str(tree)) is not None


def test_of_links(tree: Path, copied: Path) -> None:
    """A file of two names is not the same as two files."""
    content, found = (copied / "again").read_bytes(), (copied / "again").stat()
    with same_times(copied):
        run("cp", "-a", copied / "again", copied / "other")
        os.replace(copied / "other", copied / "again")
    assert (copied / "again").read_bytes() == content
    assert (copied / "again").stat().st_ino != found.st_ino
    assert "hard links" in str(copying.difference(str(tree), str(copied)))


def test_of_what_is_replaced(tree: Path, copied: Path) -> None:
    """A link that points elsewhere, and a file in the place of a link."""
    link, original = copied / "link", (tree / "link").lstat()
    with same_times(copied):
        link.unlink()
        link.symlink_to("/nowhere/at ALL")
        os.chown(link, 7, 8, follow_symlinks=False)
        times = (original.st_atime_ns, original.st_mtime_ns)
        os.utime(link, ns=times, follow_symlinks=False)
    assert "points elsewhere" in str(copying.difference(str(tree), str(copied)))
    with same_times(copied):
        link.unlink()
        link.touch()
    assert "type or mode" in str(copying.difference(str(tree), str(copied)))


def test_records_do_not_count(tree: Path, copied: Path) -> None:
    """A volume's record on one of the roots is no difference; one below is."""
    attributes.write_record(str(copied), b"{}")
    assert copying.difference(str(tree), str(copied)) is None
    attributes.write_record(str(copied / "folder"), b"{}")
    assert "attributes" in str(copying.difference(str(tree), str(copied)))


def test_a_full_disk(tree: Path, ext4: Path) -> None:
    """What does not fit is `NoSpace`, and the original is whole."""
    (tree / "large").write_bytes(os.urandom(20 << 20))
    target = ext4 / "copy"
    target.mkdir()
    with pytest.raises(NoSpace):
        copying.copy(str(tree), str(target))
    assert (tree / "large").stat().st_size == 20 << 20
