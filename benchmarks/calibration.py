"""How much slower a guest is than its host: the same small work, timed in both."""

import os
import statistics
import subprocess
import time
from pathlib import Path

FILES = 1_000


def stat_seconds(folder: Path) -> float:
    """Return what a stat(2) of each of 1,000 files takes, made below ``folder``."""
    place = folder / "stat"
    place.mkdir()
    files = [str(place / str(number)) for number in range(FILES)]
    for file in files:
        Path(file).touch()
    samples = []
    for _ in range(15):
        begun = time.perf_counter()
        for file in files:
            os.stat(file)
        samples.append(time.perf_counter() - begun)
    return statistics.median(samples)


def start_seconds() -> float:
    """Return what it takes to run a program that does nothing."""
    samples = []
    for _ in range(20):
        begun = time.perf_counter()
        subprocess.run(["/bin/true"], check=True)
        samples.append(time.perf_counter() - begun)
    return statistics.median(samples)
