"""Measure volplugin beside other drivers and tools, and its limits beside none.

Run by ``make bench``, as root. Prints tables; ``--write`` puts them into README.rst.
"""

import argparse
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

import volplugin
from benchmarks import (
    calls,
    ceph,
    datapath,
    docker_cli,
    lifetime,
    limits,
    machine,
    proxy,
    report,
    servers,
)
from benchmarks.results import Results

# What is printed, and kept in README.rst, together.
BLOCKS = {
    "results": ("calls", "start", "removal", "docker"),
    "limits": ("limits", "datapath"),
    "ceph": ("ceph",),
    "proxy": ("proxy",),
}
PARTS = tuple(part for parts in BLOCKS.values() for part in parts)
README = Path(__file__).with_name("README.rst")


def main() -> None:
    """Run the parts asked for and print what they found."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rounds, no 10,000")
    parser.add_argument("--write", action="store_true", help="keep it in README.rst")
    parser.add_argument(
        "--only", action="append", choices=PARTS, help="this part; may be repeated"
    )
    parser.add_argument(
        "--directory",
        type=Path,
        default=Path("/var/tmp"),
        help="where all state is while it runs: a real disk, for what is synced",
    )
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("volplugin and dockerd need root")
    parts = arguments.only or PARTS
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        with _workspace(arguments.directory) as home:
            blocks = {
                block: _run(chosen, home, quick=arguments.quick)
                for block, all_of_it in BLOCKS.items()
                if (chosen := [part for part in all_of_it if part in parts])
            }
    except KeyboardInterrupt:
        sys.exit("interrupted; nothing was kept")
    for block, results in blocks.items():
        text = report.render(results)
        print(text)
        if arguments.write:
            report.write(text, README, block)


def _run(parts: Sequence[str], home: Path, *, quick: bool) -> Results:
    begun = time.monotonic()
    results = Results()
    sizes = (0, 1_000) if quick else (0, 1_000, 10_000)
    ends = (sizes[0], sizes[-1])
    if "calls" in parts:
        plan = calls.Plan(
            sizes, rounds=2 if quick else 5, seconds=0.1 if quick else 0.25
        )
        calls.measure(plan, home, results)
    if "start" in parts:
        lifetime.measure_start(ends, 2 if quick else 5, home, results)
    if "removal" in parts:
        lifetime.measure_removal(1 if quick else 3, home, results)
    if "docker" in parts:
        docker_cli.measure(10 if quick else 60, home, results)
    if in_guest := [part for part in BLOCKS["limits"] if part in parts]:
        _run_limits(in_guest, home, results, quick=quick)
    if "ceph" in parts and machine.is_available():
        ceph.measure(home, results, quick=quick)
    if "proxy" in parts:
        proxy.measure(20 if quick else 100, home, results)
    seconds = time.monotonic() - begun
    results.conditions += _conditions(home, seconds, quick=quick)
    return results


def _run_limits(
    parts: Sequence[str], home: Path, results: Results, *, quick: bool
) -> None:
    figures: dict[str, Any] = {}
    if machine.is_available():
        figures = machine.run(parts, home, quick=quick)
    else:
        results.conditions.append(
            "left out: project quotas, as the guest needs pytest: "
            f"{sys.executable} -m pip install -e '.[test]'"
        )
    if "limits" in parts:
        limits.measure(figures.get("limits"), home, results, quick=quick)
    if "datapath" in parts:
        datapath.measure(figures.get("datapath"), home, results, quick=quick)


def _conditions(home: Path, seconds: float, *, quick: bool) -> list[str]:
    versions = ", ".join(
        f"{name} {metadata.version(name)}" for name in ("aiohttp", "plyvel", "uvloop")
    )
    kind = _output(
        ["findmnt", "--noheadings", "--output=FSTYPE", "--target", str(home)]
    )
    rclone = _output(["rclone", "version"]).splitlines()[0]
    return [
        f"volplugin {volplugin.__version__} on Python {platform.python_version()} "
        f"with {versions}; {rclone}; {_output(['dockerd', '--version'])}",
        f"Linux {platform.release()}, {os.cpu_count()} processors, {kind} below all "
        "state",
        f"{time.strftime('%Y-%m-%d')}, {seconds:.0f} s"
        + (" (--quick: too short to judge by)" if quick else ""),
    ]


def _output(command: list[str]) -> str:
    return subprocess.run(
        command, check=True, capture_output=True, text=True
    ).stdout.strip()


@contextmanager
def _workspace(directory: Path) -> Iterator[Path]:
    """Give a directory, and leave neither it nor a mount or a server below it."""
    # A short name: the path of a socket has at most 108 bytes.
    home = Path(tempfile.mkdtemp(prefix="vpbench", dir=directory)).resolve()
    try:
        yield home
    finally:
        # A second signal must not cut this short.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        servers.unmount_below(home)
        # Where volumes are mounted is immutable; of sockets chattr knows nothing.
        subprocess.run(["chattr", "-R", "-f", "-i", str(home)], check=False)
        shutil.rmtree(home)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
