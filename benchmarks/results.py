"""What was measured."""

import statistics

import attrs

OURS, RCLONE = "volplugin", "rclone"

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
    table: str = "Times and memory"
    """The title of the table that it is in."""

    @property
    def ratio(self) -> float | None:
        """Ours beside the peer's."""
        return None if self.peer is None else self.ours / self.peer


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
