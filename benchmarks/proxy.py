"""Volumes of another plugin through ours, beside that plugin called directly.

One rclone and one volplugin run; a step is a Mount and an Unmount, of one volume
through volplugin and of another at rclone itself, in turn. Get and List through
volplugin are measured while rclone answers and while it is stopped.
"""

import signal
import statistics
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import attrs

from benchmarks.client import Connection, request
from benchmarks.progress import tell
from benchmarks.results import Measure, Results
from benchmarks.servers import (
    RCLONE,
    VOLPLUGIN,
    Kind,
    Server,
    kill,
    sample,
    serving,
    unmount_below,
)

PATIENCE = 5.0  # seconds; see `calls.measure_rclone_mounts`
PAUSE = 0.02  # seconds: without one, rclone 1.60 hangs after a few dozen mounts
READS = 200

_TABLE = "Another plugin's volumes"


def measure(rounds: int, home: Path, results: Results) -> None:
    """Measure mounts and reads, ``rounds`` steps of each kind."""
    tell("proxy: rclone directly and through volplugin")
    place = home / "proxy"
    place.mkdir()
    with ExitStack() as stack:
        rclone = stack.enter_context(serving(RCLONE, place / RCLONE.name, 0))
        stack.callback(unmount_below, place)
        (place / "sockets").mkdir()
        (place / "sockets" / "rclone.sock").symlink_to(rclone.socket)
        ours = place / VOLPLUGIN.name
        server = stack.enter_context(serving(_configured(place), ours, 0))
        connection = stack.enter_context(Connection(server.socket))
        options = {"driver": "plugin", "plugin": "rclone"} | RCLONE.options(rclone.home)
        connection.call(request("Create", Name="through", Opts=options))
        try:
            _measure_mounts(rounds, rclone, connection, results)
            _measure_reads(rclone, connection, results)
        finally:
            with suppress(ProcessLookupError):
                rclone.process.send_signal(signal.SIGCONT)
            kill(rclone.process)


def _configured(place: Path) -> Kind:
    """Return volplugin with a backend that finds rclone below ``place``."""

    def command(home: Path) -> list[str]:
        words = VOLPLUGIN.command(home)
        with (home / "volplugin.toml").open("a") as file:
            file.write(f'[backend.plugin]\nsockets = ["{place}/sockets"]\n')
        return words

    return attrs.evolve(VOLPLUGIN, command=command)


def _measure_mounts(
    rounds: int, rclone: Server, ours: Connection, results: Results
) -> None:
    direct: list[float] = []
    through: list[float] = []
    with Connection(rclone.socket) as theirs:
        theirs.wait_at_most(PATIENCE)
        ours.wait_at_most(PATIENCE)
        for number in range(rounds + 3):
            try:
                pair = _step(theirs, sample(0)), _step(ours, "through")
            except TimeoutError:  # rclone hangs: what it did until then counts
                break
            if number >= 3:
                direct.append(pair[0])
                through.append(pair[1])
    results.measures["proxy mount"] = Measure(
        f"Mount+Unmount, median of {len(direct)}",
        "ms",
        statistics.median(through) * 1000,
        statistics.median(direct) * 1000,
        "rclone directly",
        _TABLE,
    )


def _step(connection: Connection, name: str) -> float:
    time.sleep(PAUSE)
    begun = time.perf_counter()
    connection.call(request("Mount", Name=name, ID="f" * 64))
    connection.call(request("Unmount", Name=name, ID="f" * 64))
    return time.perf_counter() - begun


def _measure_reads(rclone: Server, ours: Connection, results: Results) -> None:
    before = _reads(ours)
    rclone.process.send_signal(signal.SIGSTOP)
    hung = _reads(ours)
    results.measures["proxy reads"] = Measure(
        f"Get and List while rclone is stopped, median of {READS}",
        "ms",
        hung * 1000,
        before * 1000,
        "before",
        _TABLE,
    )


def _reads(connection: Connection) -> float:
    taken = []
    for _ in range(READS):
        begun = time.perf_counter()
        connection.call(request("Get", Name="through"))
        connection.call(request("List"))
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken)
