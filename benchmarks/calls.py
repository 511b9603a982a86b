"""Calls in a second: each call, with 1 and 8 connections, at each number of volumes.

All servers run at the same time and are asked in turn, round by round, so that what
else the machine does slows all of them. The rate quoted is the median of the rounds.
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import attrs

from benchmarks.client import Step, drive, request
from benchmarks.progress import tell
from benchmarks.results import Results
from benchmarks.servers import (
    KINDS,
    RCLONE,
    Server,
    kill,
    sample,
    serving,
    start,
    unmount_below,
)

CREATES = 160  # at most, in one round on one server: "0 volumes" stays near 0
PATIENCE = 2.0  # seconds
SLOW_START = 10_000  # volumes, with which rclone takes 15 s to start


@attrs.frozen
class Plan:
    """How much is measured."""

    sizes: Sequence[int]
    rounds: int
    seconds: float
    """How long each call is measured in each round."""
    connections: Sequence[int] = (1, 8)


def measure(plan: Plan, home: Path, results: Results) -> None:
    """Measure every call; the first, short round only warms up."""
    with ExitStack() as stack:
        servers = []
        for volumes, kind in itertools.product(plan.sizes, KINDS):
            place = home / f"{kind.name}{volumes}"
            servers.append(
                (volumes, stack.enter_context(serving(kind, place, volumes)))
            )
        _round(attrs.evolve(plan, seconds=0.05), servers, "w", Results())
        for number in range(plan.rounds):
            tell(f"calls: round {number + 1} of {plan.rounds}")
            # The order turns round, so that no server always comes after the same one.
            order = servers if number % 2 else servers[::-1]
            _round(plan, order, str(number), results)
    tell("calls: rclone's mounts")
    # Fewer rounds: one that hangs costs its whole patience.
    measure_rclone_mounts(
        attrs.evolve(plan, rounds=(plan.rounds + 1) // 2), home, results
    )


def _round(
    plan: Plan, servers: Sequence[tuple[int, Server]], name: str, results: Results
) -> None:
    for connections in plan.connections:
        for volumes, server in servers:
            prefix = f"c{name}.{connections}"
            created = _create(plan, server, connections, prefix)
            results.add_rate(
                ("Create", connections, volumes, server.kind.name), created[1]
            )
            removed = _remove(server, prefix, created[0])
            results.add_rate(
                ("Remove", connections, volumes, server.kind.name), removed
            )
        for call, (volumes, server) in itertools.product(
            ("Get", "List", "Mount+Unmount", "Mount+Unmount, tmpfs"), servers
        ):
            if call.startswith("Mount") and server.kind is RCLONE:
                continue
            loads = [_load(call, number) for number in range(connections)]
            outcome = drive(server.socket, loads, plan.seconds)
            key = (call, connections, volumes, server.kind.name)
            results.add_rate(key, outcome.rate)


def measure_rclone_mounts(plan: Plan, home: Path, results: Results) -> None:
    """Measure rclone's Mount and Unmount, on a server of its own for each time.

    rclone 1.60 sooner or later hangs for good, with one connection too. Its stacks then
    show a Mount that holds the driver's lock while it sends to the monitor of mounts,
    and that monitor waiting for the lock. So what it did until then is its rate, and
    the server is killed.
    """
    for number, volumes, connections in itertools.product(
        range(plan.rounds), plan.sizes, plan.connections
    ):
        if number and volumes >= SLOW_START:
            continue
        place = home / f"mounts{volumes}"
        place.mkdir(exist_ok=True)
        RCLONE.fill(RCLONE, place, volumes)
        with start(RCLONE, place) as server:
            loads = [_load("Mount+Unmount", number) for number in range(connections)]
            outcome = drive(server.socket, loads, plan.seconds, patience=PATIENCE)
            kill(server.process)
        unmount_below(place)
        key = ("Mount+Unmount", connections, volumes, RCLONE.name)
        if outcome.rate:
            results.add_rate(key, outcome.rate)
        results.hung[key] = results.hung.get(key, 0) + outcome.hung


def _create(
    plan: Plan, server: Server, connections: int, prefix: str
) -> tuple[tuple[int, ...], float]:
    options = server.kind.options(server.home)
    loads = [
        [
            (request("Create", Name=f"{prefix}.{number}.{n}", Opts=options),)
            for n in range(CREATES // connections)
        ]
        for number in range(connections)
    ]
    outcome = drive(server.socket, loads, plan.seconds)
    return outcome.steps, outcome.rate


def _remove(server: Server, prefix: str, created: tuple[int, ...]) -> float:
    loads = [
        [(request("Remove", Name=f"{prefix}.{number}.{n}"),) for n in range(count)]
        for number, count in enumerate(created)
    ]
    return drive(server.socket, loads, seconds=600).rate


def _load(call: str, number: int) -> Iterator[Step]:
    """Repeat a call for ever, each connection on a volume of its own."""
    name = sample(number)
    match call:
        case "Get":
            step: Step = (request("Get", Name=name),)
        case "List":
            step = (request("List"),)
        case _:
            if call.endswith("tmpfs"):
                name += ".tmpfs"
            step = (
                request("Mount", Name=name, ID="f" * 64),
                request("Unmount", Name=name, ID="f" * 64),
            )
    return itertools.repeat(step)
