"""What it costs to start, to stay resident, and to remove a volume full of files."""

import json
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.calls import SLOW_START
from benchmarks.client import Connection, request
from benchmarks.progress import tell
from benchmarks.results import Measure, Results
from benchmarks.servers import KINDS, RCLONE, VOLPLUGIN, Server, sample, serving

FILES = 100_000
TRASH_LIMIT = 300.0  # seconds


def measure_start(
    sizes: Sequence[int], rounds: int, home: Path, results: Results
) -> None:
    """Measure the seconds to the first answered Get, and the memory after one List."""
    seconds: dict[tuple[str, int], list[float]] = {}
    resident: dict[tuple[str, int], list[float]] = {}
    for number in range(rounds + 1):
        tell(f"start: round {number} of {rounds}")
        for volumes in sizes:
            for kind in KINDS:
                key = kind.name, volumes
                if kind is RCLONE and volumes >= SLOW_START and number > 2:
                    continue
                with serving(kind, home / f"{kind.name}{volumes}", volumes) as server:
                    if number == 0:
                        continue  # fills, and warms the page cache
                    with Connection(server.socket) as connection:
                        connection.call(request("List"))
                        connection.call(request("Get", Name=sample(0)))
                    seconds.setdefault(key, []).append(server.start_seconds)
                    resident.setdefault(key, []).append(server.resident())
    for what, unit, found in (
        ("start", "s", seconds),
        ("memory", "MiB", resident),
    ):
        title = {"start": "Start to the first answer", "memory": "Resident memory"}
        for volumes in sizes:
            results.measures[f"{what} {volumes}"] = Measure(
                f"{title[what]}, {volumes:,} volumes",
                unit,
                statistics.median(found[VOLPLUGIN.name, volumes]),
                statistics.median(found[RCLONE.name, volumes]),
                RCLONE.name,
            )


def measure_removal(rounds: int, home: Path, results: Results) -> None:
    """Measure how soon Remove answers, for a volume with many files and with none."""
    full: list[float] = []
    empty: list[float] = []
    purge: list[float] = []
    with (
        serving(VOLPLUGIN, home / "removal", 0) as server,
        Connection(server.socket) as connection,
    ):
        for number in range(rounds):
            tell(f"removal: round {number + 1} of {rounds}")
            empty += [
                _remove(server, connection, f"empty{number}.{part}", 0)[0]
                for part in range(3)
            ]
            answer, gone = _remove(server, connection, f"full{number}", FILES)
            full.append(answer)
            purge.append(gone)
    for key, what, unit, samples in (
        ("remove empty", "Remove of an empty volume, answered", "ms", empty),
        ("remove full", f"Remove of {FILES:,} files, answered", "ms", full),
        ("purge", f"Remove of {FILES:,} files, all deleted", "s", purge),
    ):
        factor = 1000 if unit == "ms" else 1
        median = statistics.median(samples) * factor
        results.measures[key] = Measure(what, unit, median)


def _remove(
    server: Server, connection: Connection, name: str, files: int
) -> tuple[float, float]:
    """Return the seconds until Remove is answered, and until the trash is empty."""
    connection.call(request("Create", Name=name, Opts={}))
    answer = json.loads(connection.call(request("Get", Name=name)))
    _write_files(Path(answer["Volume"]["Mountpoint"]), files)
    os.sync()  # what the files cost the journal is not Remove's
    # Nor is what a server that sat idle meanwhile takes to wake up.
    for verb in ("Create", "Remove"):
        connection.call(request(verb, Name="before", Opts={}))
    trash = server.home / "root" / "local" / "trash"
    _wait_until_empty(trash)
    begun = time.perf_counter()
    connection.call(request("Remove", Name=name))
    answered = time.perf_counter() - begun
    _wait_until_empty(trash)
    return answered, time.perf_counter() - begun


def _wait_until_empty(trash: Path) -> None:
    deadline = time.monotonic() + TRASH_LIMIT
    while any(trash.iterdir()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{trash} is not empty after {TRASH_LIMIT:.0f} s")
        time.sleep(0.01)


def _write_files(root: Path, files: int) -> None:
    for number in range(files):
        if number % 1000 == 0:
            folder = root / f"{number // 1000}"
            folder.mkdir()
        os.close(os.open(folder / f"{number}", os.O_CREAT | os.O_WRONLY, 0o644))
