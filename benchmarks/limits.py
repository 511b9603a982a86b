"""What it costs to create with a limit, to set one, and to read what volumes hold.

Project quotas are measured in the guest, btrfs and loop images on the host.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.calibration import start_seconds, stat_seconds
from benchmarks.datapath import quota_btrfs
from benchmarks.disks import MIB
from benchmarks.progress import tell
from benchmarks.results import Measure, Results
from volplugin.host import btrfs, qgroups
from volplugin.quota import images
from volplugin.quota.btrfs import BtrfsQuota
from volplugin.quota.images import Image
from volplugin.quota.mechanism import Limited

TABLE = "Limits"
XFS_QUOTA = "xfs_quota"
PASSES = 15


def measure(
    guest: Mapping[str, Any] | None, home: Path, results: Results, *, quick: bool
) -> None:
    """Measure on the host and add what the guest has measured, under ``limit …``."""
    if guest is not None:
        _add_guest(guest, home, results)
    _measure_btrfs(home, 100 if quick else 1_000, results)
    _measure_images(home, 5 if quick else 50, results)


def _add_guest(guest: Mapping[str, Any], home: Path, results: Results) -> None:
    tell("limits: calibrate")
    volumes = guest["volumes"]
    stat = guest["stat"], stat_seconds(home)
    start = guest["start"], start_seconds()
    limited, plain = _medians(guest["create"], "limited", "plain")
    ours, theirs = _medians(guest["set"], "ours", XFS_QUOTA)
    passed = statistics.median(guest["measure"])
    calibrated = ours * stat[1] / stat[0], theirs * start[1] / start[0]
    for key, what, seconds, peer in (
        (
            "create",
            "Create with size, project quota (guest)",
            limited,
            (plain, "Create without"),
        ),
        ("set", "Directory with a project limit (guest)", ours, (theirs, XFS_QUOTA)),
        (
            "set calibrated",
            "The same, calibrated by stat and by start",
            calibrated[0],
            (calibrated[1], XFS_QUOTA),
        ),
        ("measure", f"{volumes:,} project volumes measured (guest)", passed, None),
        (
            f"measure calibrated {volumes}",
            "The same, calibrated by stat",
            passed * stat[1] / stat[0],
            None,
        ),
        ("stat", "stat of 1,000 files (guest)", stat[0], (stat[1], "host")),
        ("start", "start of /bin/true (guest)", start[0], (start[1], "host")),
    ):
        _add(results, key, what, seconds, peer)


def _medians(samples: Mapping[str, list[float]], *names: str) -> list[float]:
    return [statistics.median(samples[name]) for name in names]


def _measure_btrfs(home: Path, volumes: int, results: Results) -> None:
    tell(f"limits: {volumes:,} subvolumes")
    mechanism = BtrfsQuota()
    limited: dict[str, Limited] = {}
    with quota_btrfs(home / "many") as disk:
        for number in range(volumes):
            path = str(disk / f"v{number}")
            mechanism.make(path, {})
            subvolume = btrfs.subvolume_at(path)
            if subvolume is None:
                raise RuntimeError(f"{path} is no subvolume")
            # Without the mechanism's commit: a thousand take a while.
            qgroups.set_limit(path, subvolume.id, 8 * MIB)
            limited[f"v{number}"] = Limited(path, {})
        btrfs.commit(str(disk))
        _require_all(mechanism.measure(limited), volumes)
        seconds = _passes(lambda: mechanism.measure(limited))
    _add(results, "measure btrfs", f"{volumes:,} btrfs volumes measured", seconds)


def _measure_images(home: Path, volumes: int, results: Results) -> None:
    tell(f"limits: {volumes:,} loop images")
    folder = home / "loops"
    folder.mkdir()
    mounted: list[tuple[Image, str]] = []
    with ExitStack() as stack:
        for number in range(volumes):
            mountpoint = folder / f"v{number}"
            mountpoint.mkdir()
            image = Image(path=f"{mountpoint}.img", size=64 * MIB)
            scratch = f"{mountpoint}.scratch"
            images.make(image, uid=0, gid=0, mode=0o755, record=b"{}", scratch=scratch)
            images.attach(image, str(mountpoint))
            stack.callback(images.detach, image.path, str(mountpoint))
            mounted.append((image, str(mountpoint)))
        seconds = _passes(
            lambda: [images.usage(image, mountpoint) for image, mountpoint in mounted]
        )
    _add(results, "measure images", f"{volumes:,} loop images measured", seconds)


def _passes(action: Callable[[], object]) -> float:
    samples = []
    for _ in range(PASSES):
        begun = time.perf_counter()
        action()
        samples.append(time.perf_counter() - begun)
    return statistics.median(samples)


def _require_all(found: Mapping[str, object], volumes: int) -> None:
    if len(found) != volumes:
        raise RuntimeError(f"{len(found)} of {volumes} volumes were measured")


def _add(
    results: Results,
    key: str,
    what: str,
    seconds: float,
    peer: tuple[float, str] | None = None,
) -> None:
    peer_seconds, name = peer or (None, "")
    results.measures[f"limit {key}"] = Measure(
        what,
        "ms",
        seconds * 1000,
        None if peer_seconds is None else peer_seconds * 1000,
        name,
        table=TABLE,
    )
