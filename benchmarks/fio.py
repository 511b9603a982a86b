"""What fio(1) writes in a second, in several places by turns.

Each sample writes a new file, and none of its blocks is allocated before: that is where
quotas are counted. A file system's caches are used, as programs do; the sync of the
file at the end is part of the time.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs

from benchmarks.disks import MIB, command
from benchmarks.progress import tell

SEQUENTIAL, RANDOM = "sequential, 1M", "random, 4k"

_SETTINGS = (
    *("--ioengine=psync", "--fallocate=none", "--end_fsync=1", "--unlink=1"),
    "--randrepeat=1",  # the same offsets everywhere
)

Samples = dict[str, dict[str, list[float]]]
"""MiB in a second, by job and place."""


@attrs.frozen
class Plan:
    """How much is written: MiB a sample."""

    rounds: int
    sequential: int
    random: int

    @property
    def jobs(self) -> Mapping[str, Sequence[str]]:
        """The words that fio takes for each job."""
        return {
            SEQUENTIAL: ("--rw=write", "--bs=1M", f"--size={self.sequential}M"),
            RANDOM: ("--rw=randwrite", "--bs=4k", f"--size={self.random}M"),
        }


def measure(places: Mapping[str, Path], plan: Plan) -> Samples:
    """Write in each place in turn, in an order that turns round.

    The first round is one more, and dropped, unless a single one is planned. Nothing is
    left in the places.
    """
    samples: Samples = {job: {place: [] for place in places} for job in plan.jobs}
    for number in range(1 if plan.rounds == 1 else 0, plan.rounds + 1):
        tell(f"datapath: round {number} of {plan.rounds} on {', '.join(places)}")
        order = list(places) if number % 2 else list(places)[::-1]
        for job, words in plan.jobs.items():
            rates = _write([places[place] for place in order], words)
            if number:
                for place, rate in zip(order, rates, strict=True):
                    samples[job][place].append(rate)
    return samples


def medians(samples: Samples) -> dict[str, dict[str, float]]:
    """Return the median for each job and place."""
    return {
        job: {place: statistics.median(rates) for place, rates in places.items()}
        for job, places in samples.items()
    }


def _write(directories: Sequence[Path], words: Sequence[str]) -> list[float]:
    """Write a file in each directory, one after the other; return the rates."""
    # As threads: worker processes would outlive the death of their parent.
    run = ["fio", "--thread", "--output-format=json", *_SETTINGS, *words]
    for number, directory in enumerate(directories):
        # What others wrote, and what the last file's end left to do, is done before.
        run += [f"--name={number}", f"--filename={directory}/fio", "--stonewall"]
        run += ["--exec_prerun=sync"]
    told = command(*run)
    jobs = json.loads(told[told.index("{") :])["jobs"]
    if faults := [job["jobname"] for job in jobs if job["error"]]:
        raise RuntimeError(f"fio failed in {[directories[int(n)] for n in faults]}")
    return [
        job["write"]["io_bytes"] / MIB / job["write"]["runtime"] * 1000 for job in jobs
    ]
