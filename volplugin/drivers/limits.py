"""What drivers do with limits: the choice of a mechanism, changes, promises.

Shared by the drivers whose volumes are limited in place; the means themselves are in
`volplugin.quota`.
"""

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import attrs

from volplugin.drivers.driver import Spec
from volplugin.errors import (
    InvalidArgument,
    NoSpace,
    Unsupported,
    VolpluginError,
)
from volplugin.host import attributes, paths
from volplugin.logs import log
from volplugin.model import State, Usage, Volume
from volplugin.quota.btrfs import BtrfsQuota
from volplugin.quota.ids import IdRange
from volplugin.quota.mechanism import Limit, Limited, Mechanism
from volplugin.quota.project import ProjectQuota
from volplugin.sizes import format_size

logger = logging.getLogger(__name__)

FACT: Final = "quota"
"""The fact that names a volume's mechanism; absent where nothing limits it."""


@attrs.frozen(kw_only=True)
class Bound:
    """A mechanism with what it needs to know of one volume."""

    mechanism: Mechanism
    facts: Mapping[str, str]
    limit: Limit

    def set_limit(self, path: str) -> None:
        """Put the limit in force on the volume's directory."""
        self.mechanism.set_limit(path, self.facts, self.limit)


class Limits:
    """The mechanisms of one backend, and the disk that its volumes share."""

    def __init__(self, root: str, ids: IdRange, overcommit: float | None) -> None:
        self._root = root
        self._overcommit = overcommit
        self._warned = False
        mechanisms = (ProjectQuota(root, ids), BtrfsQuota())
        self._mechanisms: Mapping[str, Mechanism] = {m.name: m for m in mechanisms}

    def choose(
        self, directory: str, wanted: str | None, *, itself: bool = False
    ) -> Mechanism:
        """Return the first mechanism that works in ``directory``, or the one wanted.

        With ``itself``, one that works on the directory and not in it.
        Raise `Unsupported` with what stands against each.
        """
        problems = []
        for name, mechanism in self._mechanisms.items():
            if wanted not in {None, name}:
                continue
            problem = mechanism.problem(directory, itself=itself)
            if problem is None:
                return mechanism
            problems.append(f"{name}: {problem}")
        raise Unsupported("; ".join(problems))

    def bound(self, volume: Volume, options: Any) -> Bound | None:
        """Return the volume's mechanism with its limit; None if nothing limits it."""
        mechanism = self._mechanisms.get(volume.facts.get(FACT, ""))
        if mechanism is None:
            return None
        return Bound(mechanism=mechanism, facts=volume.facts, limit=limit_of(options))

    def describe(self, directory: str, otherwise: str) -> str:
        """Say what limits directories in ``directory``, which need not exist yet.

        ``otherwise`` is what is done where nothing does.
        """
        while not os.path.isdir(directory):
            directory = os.path.dirname(directory)
        try:
            return f"{self.choose(directory, None).name} quota"
        except VolpluginError as error:
            return f"{otherwise} ({error})"

    def measure(self, specs: Sequence[Spec]) -> dict[str, Usage]:
        """Return what volumes hold, by id: one pass for each mechanism."""
        groups: dict[str, dict[str, Limited]] = {}
        for spec in specs:
            name = spec.volume.facts.get(FACT, "")
            limited = Limited(spec.volume.mountpoint, spec.volume.facts)
            groups.setdefault(name, {})[spec.volume.id] = limited
        found: dict[str, Usage] = {}
        for name, mechanism in self._mechanisms.items():
            if name in groups:
                found.update(mechanism.measure(groups[name]))
        return found

    def verify(self, specs: Iterable[Spec]) -> None:
        """Hold limits and ids against what is there, as `driver.Verifies`."""
        for spec in specs:
            bound = self.bound(spec.volume, spec.options)
            if bound is None:
                continue
            path = spec.volume.mountpoint
            try:
                bound.mechanism.keep(os.path.dirname(path), bound.facts)
                if spec.volume.state is not State.READY:
                    continue
                wrong = bound.mechanism.verify(path, bound.facts, bound.limit)
            except (VolpluginError, OSError) as error:
                # Its disk may be away: the volume is told of when it is mounted.
                wrong = f"not put right: {error}"
            if wrong is not None:
                log(
                    logger,
                    logging.WARNING,
                    "limit was wrong",
                    volume=spec.volume.name,
                    path=path,
                    found=wrong,
                )

    def plan_resize(self, spec: Spec, bound: Bound, limit: Limit) -> None:
        """Refuse a limit that the mechanism or the disk can't have."""
        bound.mechanism.check(limit)
        require_fits(limit, spec.volume.mountpoint)

    def resize(self, spec: Spec, bound: Bound) -> None:
        """Put another limit in force, and write the record that says so."""
        path = spec.volume.mountpoint
        bound.set_limit(path)
        if attributes.write_record(path, spec.record):
            paths.sync(path)

    def require_room(self, total: int) -> None:
        """Hold ``total`` promised bytes against the disk, as `driver.Promises`."""
        capacity = capacity_of(self._root)
        ratio = total / capacity
        figures = (
            f"all volumes below {self._root} together would have {format_size(total)}, "
            f"{ratio:.2f} times the {format_size(capacity)} of its file system"
        )
        if self._overcommit is not None and ratio > self._overcommit:
            raise NoSpace(
                f"{figures}; the backend's 'overcommit' allows {self._overcommit:g}"
            )
        if ratio > 1 and not self._warned:
            log(logger, logging.WARNING, "over-committed", told=figures)
        self._warned = ratio > 1

    def work(self, stop: Callable[[], bool]) -> bool:
        """Go on with what mechanisms left for the background."""
        done = [mechanism.work(stop) for mechanism in self._mechanisms.values()]
        return all(done)


def limit_of(options: Any) -> Limit:
    """Return the limit that a volume's options ask for."""
    return Limit(size=options.size, inodes=options.inodes)


def capacity_of(directory: str) -> int:
    """Return the bytes of the file system that ``directory`` is on."""
    found = os.statvfs(directory)
    return found.f_blocks * found.f_frsize


def require_fits(limit: Limit, directory: str) -> None:
    """Refuse a size that the disk below can never hold."""
    # Of the device: statvfs(3) in a limited directory tells the limit.
    capacity = paths.device_size(directory) or capacity_of(directory)
    if limit.size is not None and limit.size > capacity:
        raise InvalidArgument(
            f"size={format_size(limit.size)} is more than the {format_size(capacity)} "
            f"of the file system of {directory}"
        )


def status_of(volume: Volume, options: Any) -> dict[str, Any]:
    """Return the part of Status that tells a volume's limits."""
    status: dict[str, Any] = {}
    if options.size is not None:
        status["size"] = format_size(options.size)
    if options.inodes is not None:
        status["inodes"] = str(options.inodes)
    if FACT in volume.facts:
        status["mechanism"] = volume.facts[FACT]
    return status
