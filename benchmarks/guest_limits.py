"""What runs in the guest: limits by project quota on an XFS disk, and their peers.

``python -m benchmarks.guest_limits FOLDER PART… [--quick]`` writes ``figures.json``
into the folder: the figures of each part, ``limits`` and ``datapath``.
"""

import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import fio
from benchmarks.calibration import start_seconds, stat_seconds
from benchmarks.client import drive, request
from benchmarks.disks import MIB, command
from benchmarks.progress import tell
from benchmarks.servers import VOLPLUGIN, start
from volplugin.quota.ids import IdRange
from volplugin.quota.mechanism import Limit, Limited
from volplugin.quota.project import ProjectQuota

DEVICE = "/dev/ubda"
DISK = Path("/disk")
FIRST_BY_HAND = 1000  # the project ids that xfs_quota is given


def main(folder: Path, parts: Sequence[str], *, quick: bool) -> None:
    """Measure the parts and tell their figures."""
    figures: dict[str, Any] = {}
    with _disk() as disk:
        if "datapath" in parts:
            figures["datapath"] = _data(disk, quick=quick)
        if "limits" in parts:
            figures["limits"] = _limits(disk, quick=quick)
    whole = folder / "figures.part"
    whole.write_text(json.dumps(figures))
    whole.rename(folder / "figures.json")


@contextmanager
def _disk() -> Iterator[Path]:
    DISK.mkdir()
    command("mount", "-t", "xfs", "-o", "pquota", DEVICE, DISK)
    try:
        yield DISK
    finally:
        command("umount", DISK)


def _limits(disk: Path, *, quick: bool) -> dict[str, Any]:
    volumes = 100 if quick else 1_000
    mechanism = ProjectQuota(str(disk / "place"), IdRange())
    tell("limits: create")
    creates = _creates(disk / "server", rounds=3 if quick else 9)
    tell("limits: set")
    sets = _sets(disk / "set", mechanism, 10 if quick else 30)
    tell(f"limits: measure {volumes}")
    passes = _measures(disk / "many", mechanism, volumes)
    tell("limits: calibrate")
    return {
        "create": creates,
        "set": sets,
        "measure": passes,
        "volumes": volumes,
        "stat": stat_seconds(disk),
        "start": start_seconds(),
    }


def _creates(home: Path, *, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of a Create, of volumes with a limit and without, by turns."""
    seconds: dict[str, list[float]] = {"limited": [], "plain": []}
    options = {"limited": {"size": "8m"}, "plain": {}}
    with start(VOLPLUGIN, home, probe=request("List")) as server:
        for number in range(rounds + 1):
            kinds = list(options)
            for kind in kinds if number % 2 else kinds[::-1]:
                load = [
                    (request("Create", Name=f"{kind}{number}.{n}", Opts=options[kind]),)
                    for n in range(20)
                ]
                outcome = drive(server.socket, [load], seconds=600)
                if number:  # the first only warms up
                    seconds[kind].append(1 / outcome.rate)
    return seconds


def _sets(folder: Path, mechanism: ProjectQuota, rounds: int) -> dict[str, list[float]]:
    """Return the seconds to make a directory with a limit, ours and xfs_quota's."""
    folder.mkdir()
    numbers = itertools.count(FIRST_BY_HAND)

    def ours(path: Path) -> None:
        facts = mechanism.reserve(str(path.parent))
        mechanism.make(str(path), facts)
        mechanism.set_limit(str(path), facts, Limit(size=8 * MIB))

    def theirs(path: Path) -> None:
        number = next(numbers)
        path.mkdir(0o700)
        tag, limit = f"project -s -p {path} {number}", f"limit -p bhard=8m {number}"
        command("xfs_quota", "-x", "-c", tag, "-c", limit, DISK)

    seconds: dict[str, list[float]] = {"ours": [], "xfs_quota": []}
    for number in range(rounds + 1):
        for name, make in (("ours", ours), ("xfs_quota", theirs)):
            took = _timed(lambda: make(folder / f"{name}{number}"))  # noqa: B023
            if number:
                seconds[name].append(took)
    return seconds


def _measures(folder: Path, mechanism: ProjectQuota, volumes: int) -> list[float]:
    """Return the seconds of a pass over so many volumes."""
    folder.mkdir()
    limited: dict[str, Limited] = {}
    for number in range(volumes):
        path = str(folder / f"v{number}")
        facts = mechanism.reserve(str(folder))
        mechanism.make(path, facts)
        mechanism.set_limit(path, facts, Limit(size=8 * MIB))
        limited[f"v{number}"] = Limited(path, facts)
    found = mechanism.measure(limited)
    if found.keys() != limited.keys():
        raise RuntimeError(f"{len(found)} of {len(limited)} volumes were measured")
    return [_timed(lambda: mechanism.measure(limited)) for _ in range(15)]


def _data(disk: Path, *, quick: bool) -> fio.Samples:
    mechanism = ProjectQuota(str(disk / "place"), IdRange())
    path, bare = disk / "volume", disk / "bare"
    facts = mechanism.reserve(str(disk))
    mechanism.make(str(path), facts)
    mechanism.set_limit(str(path), facts, Limit(size=4096 * MIB))
    bare.mkdir()
    plan = fio.Plan(1, 64, 16) if quick else fio.Plan(9, 320, 48)
    return fio.measure({"limited": path, "bare, same XFS": bare}, plan)


def _timed(action: Callable[[], object]) -> float:
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


if __name__ == "__main__":
    os.umask(0o022)
    main(Path(sys.argv[1]), sys.argv[2:], quick="--quick" in sys.argv)
