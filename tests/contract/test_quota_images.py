"""Volumes in image files, on the real kernel: made, mounted, resized, cut short."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
import pytest
from support.capabilities import CAP_SYS_RESOURCE, require_capability
from support.commands import Container, run
from support.require import require
from support.wait import eventually

from volplugin import failpoints
from volplugin.errors import (
    AlreadyExists,
    InUse,
    InvalidArgument,
    NoSpace,
    Unavailable,
    Unsupported,
    VolpluginError,
)
from volplugin.host import attributes, loops, mountinfo, superblocks
from volplugin.quota import images
from volplugin.quota.images import Image

pytestmark = pytest.mark.root

MIB = 1 << 20
KINDS = ["ext4", "xfs"]
RECORD = json.dumps({"name": "db", "id": "1"}).encode()


@pytest.fixture(autouse=True)
def _ready() -> Iterator[None]:
    require("mkfs.ext4")
    require("mkfs.xfs")
    yield
    failpoints.arm("")


@pytest.fixture
def mountpoint(scratch: Path) -> str:
    path = scratch / "volume"
    path.mkdir()
    return str(path)


def asked(scratch: Path, name: str = "1", **more: object) -> Image:
    given: dict[str, object] = {"size": 320 * MIB, **more}
    return Image(path=str(scratch / f"{name}.img"), **given)  # type: ignore[arg-type]


def make(image: Image, *, record: bytes = RECORD) -> Image:
    images.make(
        image,
        uid=1000,
        gid=1001,
        mode=0o2750,
        record=record,
        scratch=scratch_of(image),
    )
    return image


def scratch_of(image: Image) -> str:
    return os.path.join(os.path.dirname(image.path), "scratch")


def is_mounted(image: Image, mountpoint: str) -> bool:
    return images.is_mounted(image.path, mountpoint, mountinfo.read())


def is_free(image: Image) -> bool:
    return not loops.devices_of(image.path)


def in_child(work: Callable[[], object]) -> int:
    """Do ``work`` in a child process; return its status as of waitpid(2)."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1]


@pytest.mark.parametrize("kind", KINDS)
def test_make(scratch: Path, mountpoint: str, kind: str) -> None:
    """An image has an empty root of the owner and mode asked for, and the record."""
    image = make(asked(scratch, kind=kind))
    assert attributes.read_record(image.path) == RECORD
    status = os.stat(image.path)
    assert (status.st_size, status.st_mode & 0o7777) == (320 * MIB, 0o600)
    assert status.st_blocks * 512 < 100 * MIB
    images.attach(image, mountpoint)
    assert is_mounted(image, mountpoint)
    assert os.listdir(mountpoint) == []
    assert attributes.read_record(mountpoint) == RECORD
    root = os.stat(mountpoint)
    assert (root.st_uid, root.st_gid, root.st_mode & 0o7777) == (1000, 1001, 0o2750)
    images.detach(image.path, mountpoint)
    assert is_free(image)
    assert sorted(os.listdir(scratch)) == ["1.img", "volume"]


def test_an_image_that_was_attached_in_another_namespace(
    scratch: Path, mountpoint: str
) -> None:
    """Where the mount that its path led over has gone, it is known by what is left."""
    image = make(asked(scratch))
    there = scratch / "there"
    there.mkdir()
    run("mount", "--bind", scratch, there)
    seen = attrs.evolve(image, path=str(there / Path(image.path).name))
    images.attach(seen, mountpoint)
    run("umount", "--lazy", there)
    device = mountinfo.at(mountpoint, mountinfo.read())
    assert device is not None
    assert loops.backing_file(device.device) == f"/{Path(image.path).name}"
    assert is_mounted(image, mountpoint)
    assert not images.is_mounted(f"{scratch}/2.img", mountpoint, mountinfo.read())
    assert not images.is_mounted(f"{scratch}/11.img", mountpoint, mountinfo.read())
    images.attach(image, mountpoint)  # nothing is mounted on top
    images.detach(image.path, mountpoint)
    assert is_free(image)


def test_make_again(scratch: Path, mountpoint: str) -> None:
    """Making what is there changes nothing; another volume's image is refused."""
    image = make(asked(scratch))
    images.attach(image, mountpoint)
    Path(mountpoint, "file").write_text("kept")
    make(image)
    assert Path(mountpoint, "file").read_text() == "kept"
    with pytest.raises(AlreadyExists, match="another volume"):
        make(image, record=b"{}")


@pytest.mark.parametrize("kind", KINDS)
def test_the_limit(scratch: Path, mountpoint: str, kind: str) -> None:
    """Root can't write more than the image holds either, and the rest stays whole."""
    image = make(asked(scratch, kind=kind))
    images.attach(image, mountpoint)
    Path(mountpoint, "file").write_text("kept")
    said = subprocess.run(
        ["dd", "if=/dev/zero", f"of={mountpoint}/big", "bs=1M", "conv=fsync"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "No space left" in said.stderr
    assert 200 * MIB < os.stat(f"{mountpoint}/big").st_size < 320 * MIB
    usage = images.usage(image, mountpoint)
    assert usage.available < MIB
    assert usage.size == 320 * MIB
    assert Path(mountpoint, "file").read_text() == "kept"


@pytest.mark.parametrize("kind", KINDS)
def test_deleted_bytes_go_back(scratch: Path, mountpoint: str, kind: str) -> None:
    """What is deleted in a volume is free on the host's disk soon after."""
    image = make(asked(scratch, kind=kind))
    images.attach(image, mountpoint)
    file = Path(mountpoint, "file")
    file.write_bytes(os.urandom(100 * MIB))
    os.sync()
    assert os.stat(image.path).st_blocks * 512 > 100 * MIB
    file.unlink()

    def is_smaller() -> bool:
        os.sync()
        return os.stat(image.path).st_blocks * 512 < 90 * MIB

    eventually(is_smaller, "the image takes less of the disk")


@pytest.mark.parametrize("kind", KINDS)
def test_prealloc(scratch: Path, mountpoint: str, kind: str) -> None:
    """A preallocated image takes all of its space at once, and keeps it."""
    image = make(asked(scratch, kind=kind, prealloc=True))
    images.attach(image, mountpoint)
    file = Path(mountpoint, "file")
    file.write_bytes(os.urandom(50 * MIB))
    os.sync()
    file.unlink()
    images.detach(image.path, mountpoint)
    assert os.stat(image.path).st_blocks * 512 >= 320 * MIB


def test_no_room_to_preallocate(tmpfs: Path) -> None:
    """An image that doesn't fit is refused, and leaves nothing behind."""
    with pytest.raises(NoSpace, match="No space left"):
        make(asked(tmpfs, size=16 * MIB, prealloc=True))
    assert os.listdir(tmpfs) == []


def test_what_no_image_can_be(scratch: Path) -> None:
    """Too small, inodes of an XFS, options and blocks that don't fit are refused."""
    with pytest.raises(InvalidArgument, match="at least 300"):
        images.check(asked(scratch, kind="xfs", size=299 * MIB))
    with pytest.raises(InvalidArgument, match="too small for ext4"):
        images.check(asked(scratch, size=MIB))
    with pytest.raises(Unsupported, match="leave inodes= away"):
        images.check(asked(scratch, kind="xfs", inodes=5))
    for size in ("65536", "3000"):
        with pytest.raises(InvalidArgument, match="block-size"):
            images.check(asked(scratch, mkfs={"block-size": size}))
    images.check(asked(scratch, mkfs={"block-size": "1024"}, inodes=5))


@pytest.mark.parametrize("kind", KINDS)
def test_attach_is_idempotent(scratch: Path, mountpoint: str, kind: str) -> None:
    """Attaching twice mounts once; detaching twice is success."""
    image = make(asked(scratch, kind=kind))
    for _ in range(2):
        images.attach(image, mountpoint)
    (device,) = loops.devices_of(image.path)
    assert [m.source for m in mountinfo.read() if m.mountpoint == mountpoint] == [
        device
    ]
    for _ in range(2):
        images.detach(image.path, mountpoint)
        assert is_free(image)


def test_detach_leaves_what_is_another(scratch: Path, mountpoint: str) -> None:
    """What is mounted there and is not this image stays, and is not taken for it."""
    one, other = make(asked(scratch)), make(asked(scratch, "2"))
    images.attach(other, mountpoint)
    assert not is_mounted(one, mountpoint)
    images.detach(one.path, mountpoint)
    assert is_mounted(other, mountpoint)


def test_detach_in_use(scratch: Path, mountpoint: str) -> None:
    """A volume with an open file stays."""
    image = make(asked(scratch))
    images.attach(image, mountpoint)
    with Path(mountpoint, "file").open("w"), pytest.raises(InUse, match="fuser"):
        images.detach(image.path, mountpoint)
    assert is_mounted(image, mountpoint)


def test_detach_of_a_deleted_image(scratch: Path, mountpoint: str) -> None:
    """An image that was deleted while it was mounted is unmounted like any other."""
    image = make(asked(scratch))
    images.attach(image, mountpoint)
    os.unlink(image.path)
    assert is_mounted(image, mountpoint)
    images.detach(image.path, mountpoint)
    assert not is_mounted(image, mountpoint)


@pytest.mark.parametrize("kind", KINDS)
def test_a_container_that_holds_on(
    scratch: Path, mountpoint: str, kind: str, container: Container
) -> None:
    """While a container still has the mount, attach gives the same file system."""
    image = make(asked(scratch, kind=kind))
    images.attach(image, mountpoint)
    child = container(Path(mountpoint))
    images.detach(image.path, mountpoint)
    (device,) = loops.devices_of(image.path)
    run("nsenter", "-t", str(child.pid), "-m", "-r", "touch", "/data/from-container")
    images.attach(image, mountpoint)
    assert loops.devices_of(image.path) == [device]
    assert os.listdir(mountpoint) == ["from-container"]
    images.detach(image.path, mountpoint)
    child.kill()
    eventually(lambda: is_free(image), "the device has gone with the container")


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut(scratch: Path, mountpoint: str, kind: str) -> None:
    """An image as a power cut leaves it is mounted again, with what was synced."""
    image = make(asked(scratch, kind=kind))
    images.attach(image, mountpoint)
    Path(mountpoint, "file").write_text("kept")
    os.sync()
    for index in range(200):
        Path(mountpoint, str(index)).write_text("perhaps")
    cut = asked(scratch, "cut", kind=kind)
    run("cp", "--sparse=always", image.path, cut.path)
    place = scratch / "place"
    place.mkdir()
    images.attach(cut, str(place))
    assert (place / "file").read_text() == "kept"
    assert attributes.read_record(str(place)) == RECORD


def test_damaged(scratch: Path, mountpoint: str) -> None:
    """What is no file system, or cut off, is told, and nothing is left mounted."""
    image = make(asked(scratch))
    os.truncate(image.path, 100 * MIB)
    with pytest.raises(Unavailable, match="cut short"):
        images.attach(image, mountpoint)
    with open(image.path, "r+b") as file:
        file.write(bytes(8192))
    with pytest.raises(Unavailable, match="by hand: `e2fsck -f"):
        images.attach(image, mountpoint)
    xfs = make(asked(scratch, "2", kind="xfs"))
    with open(xfs.path, "r+b") as file:
        file.seek(32)  # the UUID, so that the superblock's checksum is wrong
        file.write(bytes(16))
    with pytest.raises(Unavailable, match="xfs_repair"):
        images.attach(xfs, mountpoint)
    assert is_free(image)
    assert is_free(xfs)


def test_many(scratch: Path) -> None:
    """Twenty images are mounted at once, each with its own device, and all go."""
    one = make(asked(scratch))
    all_of_them = []
    for index in range(20):
        image = asked(scratch, f"many{index}")
        run("cp", "--sparse=always", one.path, image.path)
        place = scratch / f"place{index}"
        place.mkdir()
        images.attach(image, str(place))
        (place / "mine").write_text(str(index))
        all_of_them.append((image, place))
    devices = {loops.devices_of(image.path)[0] for image, _ in all_of_them}
    assert len(devices) == 20
    for image, place in all_of_them:
        assert (place / "mine").read_text() == place.name.removeprefix("place")
        images.detach(image.path, str(place))
        assert is_free(image)


@pytest.mark.parametrize(
    "point", ["image.file", "image.mkfs", "image.mounted", "image.ready"]
)
def test_killed_while_it_is_made(scratch: Path, mountpoint: str, point: str) -> None:
    """Killed at any step of making: all is taken away, or made by another call."""
    image = asked(scratch)

    def die() -> None:
        failpoints.arm(f"{point}=kill")
        make(image)

    assert in_child(die) == signal.SIGKILL
    assert attributes.read_record(f"{image.path}.part") is None
    images.clear_scratch(image.path, scratch_of(image))
    assert os.listdir(scratch) == ["volume"]
    assert in_child(die) == signal.SIGKILL
    make(image)
    images.attach(image, mountpoint)
    assert os.listdir(mountpoint) == []


@pytest.mark.parametrize(
    "point", ["image.file", "image.mkfs", "image.mounted", "image.ready"]
)
def test_a_failure_leaves_nothing(scratch: Path, point: str) -> None:
    """An error at any step of making leaves no file, mount or device."""
    failpoints.arm(f"{point}=error:5")
    with pytest.raises((OSError, VolpluginError)):
        make(asked(scratch))
    assert os.listdir(scratch) == []
    assert mountinfo.below(str(scratch), mountinfo.read()) == []


@pytest.mark.parametrize("point", ["image.attach", "image.attached"])
def test_killed_while_attached(scratch: Path, mountpoint: str, point: str) -> None:
    """Killed while it is attached: mount and device are both there, or neither."""
    image = make(asked(scratch))

    def die() -> None:
        failpoints.arm(f"{point}=kill")
        images.attach(image, mountpoint)

    assert in_child(die) == signal.SIGKILL
    assert is_mounted(image, mountpoint) == (point == "image.attached")
    assert is_free(image) != is_mounted(image, mountpoint)
    images.attach(image, mountpoint)
    images.detach(image.path, mountpoint)
    assert is_free(image)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attached", [True, False])
def test_grow(scratch: Path, mountpoint: str, kind: str, attached: bool) -> None:
    """An image grows under a writer, or unmounted, and again is nothing."""
    if kind == "ext4":  # tests/kernel/guest_limits.py runs this where it has the right
        require_capability(CAP_SYS_RESOURCE)
    image = make(asked(scratch, kind=kind))
    images.attach(image, mountpoint)
    before = os.statvfs(mountpoint).f_blocks
    larger = asked(scratch, kind=kind, size=480 * MIB)
    writer = subprocess.Popen(
        ["dd", "if=/dev/urandom", f"of={mountpoint}/file", "bs=64k", "count=800"],
        stderr=subprocess.DEVNULL,
    )
    if not attached:
        writer.wait()
        images.detach(image.path, mountpoint)
    images.check_resize(image, larger.size, attached=attached)
    for _ in range(2):
        images.resize(larger, mountpoint if attached else None)
    assert writer.wait() == 0
    images.attach(larger, mountpoint)
    assert os.statvfs(mountpoint).f_blocks - before > 30000
    assert os.stat(f"{mountpoint}/file").st_size == 50 * MIB
    assert images.usage(larger, mountpoint).size == 480 * MIB


@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_resize_that_died(
    scratch: Path, mountpoint: str, kind: str, attached: bool
) -> None:
    """Killed once the file was longer: it can be taken back to what it was."""
    image = make(asked(scratch, kind=kind))
    place = mountpoint if attached else None
    if attached:
        images.attach(image, mountpoint)

    def die() -> None:
        failpoints.arm("image.resize=kill")
        images.resize(asked(scratch, kind=kind, size=480 * MIB), place)

    assert in_child(die) == signal.SIGKILL
    assert os.stat(image.path).st_size == 480 * MIB
    images.resize(image, place)
    assert os.stat(image.path).st_size == 320 * MIB
    images.attach(image, mountpoint)
    images.detach(image.path, mountpoint)
    assert superblocks.size(image.path, kind) == 320 * MIB


def test_a_grown_xfs_is_not_cut(scratch: Path, mountpoint: str) -> None:
    """An XFS that has grown stays as it is, though its superblock may be behind."""
    image = make(asked(scratch, kind="xfs"))
    images.attach(image, mountpoint)
    larger = asked(scratch, kind="xfs", size=480 * MIB)
    images.resize(larger, mountpoint)
    with pytest.raises(Unsupported, match="can't be made smaller"):
        images.resize(image, mountpoint)
    cut = asked(scratch, "cut", kind="xfs")
    run("cp", "--sparse=always", image.path, cut.path)
    with pytest.raises(Unsupported, match="can't be made smaller"):
        images.resize(cut, None)
    assert os.stat(cut.path).st_size == 480 * MIB
    with pytest.raises(Unsupported, match="can't be made smaller"):
        images.check_resize(larger, 320 * MIB, attached=False)


def test_shrink(scratch: Path, mountpoint: str) -> None:
    """An unmounted ext4 gets smaller with all that it holds, and its record."""
    image = make(asked(scratch))
    images.attach(image, mountpoint)
    content = os.urandom(20 * MIB)
    Path(mountpoint, "file").write_bytes(content)
    smaller = asked(scratch, size=64 * MIB)
    with pytest.raises(InUse, match="while it is mounted"):
        images.check_resize(image, smaller.size, attached=True)
    for place in (mountpoint, None):
        with pytest.raises(InUse, match="while it is mounted"):
            images.resize(smaller, place)
    images.detach(image.path, mountpoint)
    with pytest.raises(NoSpace, match="20M"):
        images.check_resize(image, 20 * MIB, attached=False)
    with pytest.raises(NoSpace, match="20M"):
        images.resize(asked(scratch, size=20 * MIB), None)
    images.check_resize(image, smaller.size, attached=False)
    for _ in range(2):
        images.resize(smaller, None)
    assert os.stat(image.path).st_size == 64 * MIB
    assert attributes.read_record(image.path) == RECORD
    images.attach(smaller, mountpoint)
    assert os.listdir(mountpoint) == ["file"]
    assert Path(mountpoint, "file").read_bytes() == content


def test_a_shrink_that_died(scratch: Path, mountpoint: str) -> None:
    """Killed before the smaller copy took its place: the image is what it was."""
    image = make(asked(scratch))

    def die() -> None:
        failpoints.arm("image.shrunk=kill")
        images.resize(asked(scratch, size=64 * MIB), None)

    assert in_child(die) == signal.SIGKILL
    assert attributes.read_record(f"{image.path}.part") is None
    images.resize(image, None)
    assert sorted(os.listdir(scratch)) == ["1.img", "volume"]
    images.attach(image, mountpoint)
    images.detach(image.path, mountpoint)
    assert superblocks.size(image.path, "ext4") == 320 * MIB


def test_usage(scratch: Path, mountpoint: str) -> None:
    """Mounted, files and bytes are counted; unmounted, what the disk has of it."""
    image = make(asked(scratch, inodes=100))
    found = images.usage(image, None)
    assert found.used == os.stat(image.path).st_blocks * 512
    assert found.used + found.available == found.size == 320 * MIB
    images.attach(image, mountpoint)
    before = images.usage(image, mountpoint)
    assert before.notes["direct I/O"] in {"yes", "no"}
    Path(mountpoint, "file").write_bytes(bytes(10 * MIB))
    os.sync()
    after = images.usage(image, mountpoint)
    assert after.used - before.used == pytest.approx(10 * MIB, abs=MIB)
    assert (after.inodes_used or 0) - (before.inodes_used or 0) == 1
    groups = 3  # of 128 MiB, each with whole blocks of 16 inodes
    assert 110 <= (after.inodes or 0) < 110 + groups * 16


def test_speed(scratch: Path) -> None:
    """Making an image of 10 GiB takes no time to speak of."""
    began = time.monotonic()
    make(asked(scratch, size=10 << 30))
    assert time.monotonic() - began < 10
