"""What a limit costs each write: limited volumes beside bare directories below them.

Loop images and btrfs are measured on the host, project quotas in the guest.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from benchmarks import fio
from benchmarks.disks import MIB, command, make_image, mounted
from benchmarks.results import Measure, Results
from volplugin.quota import images
from volplugin.quota.btrfs import BtrfsQuota
from volplugin.quota.images import Image
from volplugin.quota.mechanism import Limit

TABLE = "Data path"
DISK_SIZE = 6 << 10  # MiB, sparse: three samples of the largest kind
SIZE = Limit(size=4 << 30)


def measure(
    guest: fio.Samples | None, home: Path, results: Results, *, quick: bool
) -> None:
    """Measure on the host and add what the guest has measured, under ``data …``."""
    plan = fio.Plan(1, 128, 16) if quick else fio.Plan(6, 256, 64)
    with _image(home) as places:
        image = fio.measure(places, plan)
    with _btrfs(home) as places:
        btrfs = fio.measure(places, plan)
    for kind, samples, volume, bare in (
        ("image", image, "loop image", "bare, ext4 below"),
        ("btrfs", btrfs, "btrfs volume", "plain directory"),
        ("btrfs", btrfs, "btrfs volume", "subvolume, no limit"),
        ("btrfs", btrfs, "btrfs volume", "btrfs, quotas off"),
        ("project", guest, "project volume", "bare, same XFS"),
    ):
        for job, medians in fio.medians(samples or {}).items():
            results.measures[f"data {kind} {job} {bare}"] = Measure(
                f"{volume}: {job}",
                "MiB/s",
                medians["limited"],
                medians[bare],
                bare,
                table=TABLE,
            )


@contextmanager
def _image(home: Path) -> Iterator[Mapping[str, Path]]:
    """Have a volume in a loop image and a directory where the image is."""
    folder = home / "images"
    mountpoint, bare = folder / "volume", folder / "bare"
    for path in (folder, mountpoint, bare):
        path.mkdir()
    image = Image(path=str(folder / "volume.img"), size=4 << 30)
    scratch = str(folder / "scratch")
    images.make(image, uid=0, gid=0, mode=0o755, record=b"{}", scratch=scratch)
    images.attach(image, str(mountpoint))
    try:
        yield {"limited": mountpoint, "bare, ext4 below": bare}
    finally:
        images.detach(image.path, str(mountpoint))
        Path(image.path).unlink()


@contextmanager
def _btrfs(home: Path) -> Iterator[Mapping[str, Path]]:
    """Have two btrfs, one with quotas and a limited volume, and directories there."""
    with quota_btrfs(home / "btrfs") as disk, btrfs(home / "off") as off:
        mechanism = BtrfsQuota()
        volume, subvolume, plain = disk / "volume", disk / "subvolume", disk / "plain"
        mechanism.make(str(volume), {})
        mechanism.set_limit(str(volume), {}, SIZE)
        mechanism.make(str(subvolume), {})
        plain.mkdir()
        yield {
            "limited": volume,
            "plain directory": plain,
            "subvolume, no limit": subvolume,
            "btrfs, quotas off": off,
        }


@contextmanager
def quota_btrfs(place: Path) -> Iterator[Path]:
    """Have a btrfs with quotas, mounted at ``place``."""
    with btrfs(place) as disk:
        command("btrfs", "quota", "enable", disk)
        command("btrfs", "quota", "rescan", "-w", disk)
        yield disk


@contextmanager
def btrfs(place: Path) -> Iterator[Path]:
    """Have a btrfs, mounted at ``place``, in a sparse image beside it."""
    image = place.with_suffix(".img")
    make_image(image, "btrfs", DISK_SIZE * MIB)
    # What was freed stays part of the image: giving it back goes on in the background.
    with mounted(image, "btrfs", place, "nodiscard") as disk:
        yield disk
    place.rmdir()
    image.unlink()
