"""What was measured, and the ratios that are asked of it."""

import statistics

import attrs

OURS, RCLONE = "volplugin", "rclone"

SAME = 1.3  # a ratio of times that counts as "the same": what rounds differ by here

RateKey = tuple[str, int, int, str]
"""Call, connections, volumes, server."""


@attrs.frozen
class Measure:
    """One row beside the rates: a figure of ours, and a peer's where there is one."""

    what: str
    unit: str
    ours: float
    peer: float | None = None
    peer_name: str = ""


@attrs.define
class Results:
    """All samples of one run."""

    rates: dict[RateKey, list[float]] = attrs.Factory(dict)
    measures: dict[str, Measure] = attrs.Factory(dict)
    hung: dict[RateKey, int] = attrs.Factory(dict)
    """In how many rounds a server stopped answering."""
    conditions: list[str] = attrs.Factory(list)
    """Lines on what ran where."""

    def add_rate(self, key: RateKey, rate: float) -> None:
        """Keep one round's calls in a second."""
        self.rates.setdefault(key, []).append(rate)

    def rate(self, call: str, connections: int, volumes: int, server: str) -> float:
        """Return the median over the rounds; raise `KeyError` for what did not run."""
        return statistics.median(self.rates[call, connections, volumes, server])

    def rate_if_run(
        self, call: str, connections: int, volumes: int, server: str
    ) -> float | None:
        """Return the median over the rounds, None for what did not run."""
        samples = self.rates.get((call, connections, volumes, server))
        return statistics.median(samples) if samples else None


@attrs.frozen
class Target:
    """A ratio to reach: at least ``bound``, or at most."""

    what: str
    bound: float
    measured: float
    at_least: bool

    @property
    def met(self) -> bool:
        """Whether it is reached."""
        if self.at_least:
            return self.measured >= self.bound
        return self.measured <= self.bound


def targets(results: Results) -> list[Target]:
    """Hold the results to what is asked; leave out what did not run."""
    at_least: list[tuple[str, float, float | None]] = []
    at_most: list[tuple[str, float, float | None]] = []
    for clients in (1, 8):
        plural = f"{clients} connection{'s' if clients > 1 else ''}"
        create, create_empty = (
            results.rate_if_run("Create", clients, volumes, OURS)
            for volumes in (10_000, 0)
        )
        at_least += [
            (
                f"Create at 10,000 volumes beside rclone, {plural}",
                8,
                _beside_rclone(results, "Create", clients, 10_000),
            ),
            (
                f"List at 10,000 volumes beside rclone, {plural}",
                5,
                _beside_rclone(results, "List", clients, 10_000),
            ),
        ]
        at_most.append(
            (
                f"Create at 0 volumes beside at 10,000, {plural}",
                1.3,
                _ratio(create_empty, create),
            )
        )
    at_least += [
        (
            f"Get at {volumes:,} volumes beside rclone, 1 connection",
            0.75,
            _beside_rclone(results, "Get", 1, volumes),
        )
        for volumes in sorted({key[2] for key in results.rates})
    ]
    ours = {key: measure.ours for key, measure in results.measures.items()}
    peer = {key: measure.peer for key, measure in results.measures.items()}
    at_most += [
        (
            "Start at 10,000 volumes beside at 0",
            5,
            _ratio(ours.get("start 10000"), ours.get("start 0")),
        ),
        (
            "Remove of 100,000 files beside of none",
            SAME,
            _ratio(ours.get("remove full"), ours.get("remove empty")),
        ),
        (
            "docker volume create beside the built-in driver's",
            1.15,
            _ratio(ours.get("docker create"), peer.get("docker create")),
        ),
    ]
    return [
        Target(what, bound, measured, rows is at_least)
        for rows in (at_least, at_most)
        for what, bound, measured in rows
        if measured is not None
    ]


def _beside_rclone(
    results: Results, call: str, connections: int, volumes: int
) -> float | None:
    return _ratio(
        results.rate_if_run(call, connections, volumes, OURS),
        results.rate_if_run(call, connections, volumes, RCLONE),
    )


def _ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or below is None else above / below
