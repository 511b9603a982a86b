"""The ratios that are asked of what was measured."""

import attrs

from benchmarks.results import OURS, RCLONE, Results

SAME = 1.3  # a ratio of times that counts as "the same": what rounds differ by here


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
    at_least += _data_path(results)
    at_least += [
        (f"{measure.what}, beside the bare mapper", 0.95, measure.ratio)
        for key, measure in results.measures.items()
        if key.startswith("ceph data ")
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
        (
            "Create with a project limit beside without",
            1.5,
            _ratio(ours.get("limit create"), peer.get("limit create")),
        ),
        (
            "New Ceph volume, Create to mounted, beside the shell's",
            0.6,
            _ratio(ours.get("ceph made"), peer.get("ceph made")),
        ),
        (
            "Ceph volume attached beside the shell's map and mount",
            0.7,
            _ratio(ours.get("ceph attached"), peer.get("ceph attached")),
        ),
        (
            "Get and List while the cluster hangs beside before",
            SAME,
            _ratio(ours.get("ceph hang"), peer.get("ceph hang")),
        ),
        (
            "Mount+Unmount through the proxy beside rclone directly",
            1.5,
            _ratio(ours.get("proxy mount"), peer.get("proxy mount")),
        ),
        (
            "Get and List of another plugin's volumes while it is stopped",
            SAME,
            _ratio(ours.get("proxy reads"), peer.get("proxy reads")),
        ),
        ("1,000 shared volumes known at start, s", 1, ours.get("ceph start")),
        (
            "1,000 project volumes measured, ms, calibrated",
            20,
            ours.get("limit measure calibrated 1000"),
        ),
    ]
    at_least.append(
        (
            "xfs_quota's time for a project limit beside ours",
            10,
            _ratio(peer.get("limit set"), ours.get("limit set")),
        )
    )
    return [
        Target(what, bound, measured, rows is at_least)
        for rows in (at_least, at_most)
        for what, bound, measured in rows
        if measured is not None
    ]


def _data_path(results: Results) -> list[tuple[str, float, float | None]]:
    """Hold what limited volumes write to what bare directories do, where they have."""
    return [
        (f"{measure.what}, beside {measure.peer_name}", bound, measure.ratio)
        for kind, bound in (("image", 0.85), ("btrfs", 0.95), ("project", 0.95))
        for key, measure in results.measures.items()
        # One without quotas at all is not what is asked for.
        if key.startswith(f"data {kind} ") and not key.endswith("off")
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
