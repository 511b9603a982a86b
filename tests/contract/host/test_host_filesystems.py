"""File systems in image files, by the real programs on the real kernel."""

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.capabilities import CAP_SYS_RESOURCE, require_capability
from support.commands import run
from support.require import require

from volplugin.errors import (
    InUse,
    InvalidArgument,
    NoSpace,
    Unavailable,
    Unsupported,
)
from volplugin.host import filesystems, loops, superblocks

pytestmark = pytest.mark.root

MIB = 1 << 20

Make = Callable[..., str]


@pytest.fixture
def make(scratch: Path) -> Make:
    """Make an image with a file system and return its path."""
    require("mkfs.ext4")
    require("mkfs.xfs")

    def image(kind: str = "ext4", size: int = 64 * MIB, **more: object) -> str:
        path = scratch / f"{kind}-{size}"
        with path.open("wb") as file:
            file.truncate(size)
        given = {"label": "volume", "options": {}, **more}
        filesystems.make(str(path), kind, **given)  # type: ignore[arg-type]
        return str(path)

    return image


def header(image: str) -> dict[str, str]:
    said = run("dumpe2fs", "-h", image)
    return dict(re.findall(r"^([^:\n]+):\s+(.*)$", said, re.MULTILINE))


def mount(image: str, scratch: Path) -> Path:
    place = scratch / "mounted"
    place.mkdir(exist_ok=True)
    run("mount", "-o", "loop", image, place)
    return place


def test_ext4(make: Make) -> None:
    """An ext4 keeps nothing back for root, has a journal and room for the record."""
    found = header(make(size=filesystems.MINIMUM["ext4"]))
    assert found["Filesystem volume name"] == "volume"
    assert found["Reserved block count"] == "0"
    assert found["Block size"] == "4096"
    assert found["Inode size"] == "256"
    assert found["Errors behavior"] == "Remount read-only"
    assert "has_journal" in found["Filesystem features"]


def test_below_the_minimum(make: Make) -> None:
    """Below the smallest size ext4 has no journal, and XFS is refused."""
    small = make(size=filesystems.MINIMUM["ext4"] - MIB)
    assert "has_journal" not in header(small)["Filesystem features"]
    make("xfs", filesystems.MINIMUM["xfs"])
    with pytest.raises(InvalidArgument, match="larger than 300MB"):
        make("xfs", filesystems.MINIMUM["xfs"] - MIB, options={"inode-size": "512"})


def test_options(make: Make, scratch: Path) -> None:
    """What is asked of mkfs is what is there."""
    options = {
        "block-size": "1024",
        "inode-size": "512",
        "inode-ratio": "8192",
        "journal-size": str(2 * MIB),
    }
    found = header(make(options=options))
    assert (found["Block size"], found["Inode size"]) == ("1024", "512")
    assert found["Inode count"] == "8192"
    assert found["Total journal size"] == "2048k"
    options = {"block-size": "2048", "inode-size": "1024", "journal-size": "67108864"}
    image = make("xfs", 320 * MIB, options=options)
    said = run("xfs_info", mount(image, scratch))
    assert re.search(
        r"isize=1024 .*bsize=2048 .*bsize=2048 +blocks=32768", said, re.DOTALL
    )


def test_refused_options(make: Make) -> None:
    """Options that mkfs has not, or doesn't take, are the user's to change."""
    with pytest.raises(InvalidArgument, match=r"mkfs\.inode-ratio: xfs has no such"):
        make("xfs", 320 * MIB, options={"inode-ratio": "8192"})
    with pytest.raises(InvalidArgument, match=r"with mkfs\.inode-size=300"):
        make(options={"inode-size": "300"})


@pytest.mark.parametrize("asked", [1, 100, 118, 119, 1000, 5000])
def test_inodes(make: Make, asked: int, scratch: Path) -> None:
    """An ext4 takes as many files as asked for, and at most a block's inodes more."""
    place = mount(make(inodes=asked), scratch)
    (place / "lost+found").rmdir()
    made = 0
    with contextlib.suppress(OSError):
        while made < asked + 1000:
            (place / str(made)).touch()
            made += 1
    assert asked <= made < asked + 16


def test_size(make: Make) -> None:
    """The superblock tells the size of an ext4 and of an XFS."""
    assert superblocks.size(make(size=64 * MIB), "ext4") == 64 * MIB
    assert superblocks.size(make("xfs", 300 * MIB), "xfs") == 300 * MIB


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_no_file_system(scratch: Path, kind: str) -> None:
    """A file without a file system is told as that."""
    path = scratch / "empty"
    path.write_bytes(bytes(5000))
    with pytest.raises(Unavailable, match=f"no {kind} in"):
        superblocks.size(str(path), kind)


def test_clean(make: Make, scratch: Path) -> None:
    """An ext4 is clean when made and unmounted, not in a copy taken while mounted."""
    image, copy = make(), str(scratch / "copy")
    assert superblocks.is_clean(image, "ext4")
    place = mount(image, scratch)
    (place / "file").write_text("kept")
    os.sync()
    run("cp", "--sparse=always", image, copy)
    run("umount", place)
    assert superblocks.is_clean(image, "ext4")
    assert not superblocks.is_clean(copy, "ext4")
    assert "recovering journal" in filesystems.check(copy, "ext4")
    assert superblocks.is_clean(copy, "ext4")
    assert (mount(copy, scratch) / "file").read_text() == "kept"


def test_errors_are_not_clean(make: Make) -> None:
    """An ext4 that the kernel has marked as damaged is checked, and is clean then."""
    image = make()
    run("debugfs", "-w", "-R", "set_super_value state 2", image)
    assert not superblocks.is_clean(image, "ext4")
    filesystems.check(image, "ext4")
    assert superblocks.is_clean(image, "ext4")


def test_beyond_preening(make: Make) -> None:
    """Damage that asks for a decision is told with the command to run."""
    image = make()
    run("debugfs", "-w", "-R", "clri <2>", image)
    run("debugfs", "-w", "-R", "set_super_value state 2", image)
    with pytest.raises(Unavailable, match=f"by hand: `e2fsck -f {image}`"):
        filesystems.check(image, "ext4")


def test_a_check_makes_no_lost_and_found(make: Make, scratch: Path) -> None:
    """lost+found, which a check makes, is taken away again and all is consistent."""
    image = make()
    place = mount(image, scratch)
    (place / "lost+found").rmdir()
    run("umount", place)
    run("debugfs", "-w", "-R", "set_super_value state 2", image)
    assert "lost+found not found.  CREATED" in filesystems.check(image, "ext4")
    run("e2fsck", "-f", "-n", image)
    assert list(mount(image, scratch).iterdir()) == []


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_grow(make: Make, scratch: Path, kind: str) -> None:
    """A mounted file system fills its larger device, and growing again is nothing."""
    if kind == "ext4":  # tests/kernel/guest_limits.py runs this where it has the right
        require_capability(CAP_SYS_RESOURCE)
    image = make(kind, 300 * MIB)
    place = mount(image, scratch)
    (device,) = loops.devices_of(image)
    os.truncate(image, 400 * MIB)
    loops.set_capacity(device)
    assert superblocks.size_mounted(device, str(place), kind) == 300 * MIB
    for _ in range(2):
        filesystems.grow(device, str(place), kind)
        assert superblocks.size_mounted(device, str(place), kind) == 400 * MIB


def test_grow_without_the_right(make: Make, scratch: Path) -> None:
    """Without CAP_SYS_RESOURCE an ext4 stays as it is, and the error says why."""
    image = make()
    place = mount(image, scratch)
    (device,) = loops.devices_of(image)
    os.truncate(image, 128 * MIB)
    loops.set_capacity(device)
    program = (
        "from volplugin.errors import Unsupported\n"
        "from volplugin.host import filesystems\n"
        "try:\n"
        f"    filesystems.grow({device!r}, {str(place)!r}, 'ext4')\n"
        "except Unsupported as error:\n"
        "    print(error)\n"
    )
    said = subprocess.run(
        ["setpriv", "--bounding-set=-sys_resource", sys.executable, "-c", program],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(loops.__file__).parents[2],
    )
    assert "CAP_SYS_RESOURCE" in said.stdout
    assert superblocks.size_mounted(device, str(place), "ext4") == 64 * MIB


def test_shrink(make: Make, scratch: Path) -> None:
    """An ext4 gets smaller with all it holds, but not smaller than that takes."""
    image = make(size=128 * MIB)
    place = mount(image, scratch)
    (place / "file").write_bytes(os.urandom(20 * MIB))
    content = (place / "file").read_bytes()
    run("umount", place)
    needed = filesystems.smallest(image)
    assert 20 * MIB < needed < 64 * MIB
    with pytest.raises(NoSpace, match=rf"{needed} bytes.*{16 * MIB} bytes"):
        filesystems.shrink(image, "ext4", 16 * MIB)
    filesystems.shrink(image, "ext4", 64 * MIB)
    assert superblocks.size(image, "ext4") == 64 * MIB
    os.truncate(image, 64 * MIB)
    assert (mount(image, scratch) / "file").read_bytes() == content


def test_xfs_does_not_shrink(make: Make) -> None:
    """XFS can't be made smaller."""
    with pytest.raises(Unsupported, match="can't be made smaller"):
        filesystems.shrink(make("xfs", 300 * MIB), "xfs", 250 * MIB)


def test_nothing_works_on_a_mounted_image(make: Make, scratch: Path) -> None:
    """What is for unmounted images refuses one that a loop device backs."""
    image = make()
    mount(image, scratch)
    for work in (
        lambda: filesystems.check(image, "ext4"),
        lambda: filesystems.shrink(image, "ext4", 32 * MIB),
        lambda: filesystems.make(image, "ext4", label="", options={}),
    ):
        with pytest.raises(InUse, match="/dev/loop"):
            work()


def test_an_orphan_keeps_others_away(make: Make) -> None:
    """A program on an image is waited for, also when it is no child of ours."""
    image = make()
    with loops.locked(image) as lock:
        child = subprocess.Popen(["sleep", "0.5"], pass_fds=(lock,))
    filesystems.smallest(image)
    assert child.poll() is not None
