"""What volumes hold: measured in the background, shown in Status from memory.

Each backend is measured in one pass for all its volumes, and its passes wait for those
of no other: one whose disk hangs has figures that grow old, and nothing else waits.
"""

import asyncio
import contextlib
import logging
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, Final

import attrs

from volplugin.backends import Backend
from volplugin.drivers.driver import Measures, Spec
from volplugin.errors import VolpluginError
from volplugin.logs import log
from volplugin.model import Usage, Volume
from volplugin.sizes import format_size

logger = logging.getLogger(__name__)

APART: Final = 1.0  # seconds at least between two passes over one backend
HYSTERESIS: Final = 2  # points of percent that a volume falls below a mark to leave it

_SLICE: Final = 500  # volumes taken note of before other tasks have their turn


@attrs.frozen(kw_only=True)
class _Taken:
    """A volume's usage, when its pass began, and the highest mark it has reached."""

    usage: Usage
    at: float  # time.monotonic()
    as_of: str
    mark: int  # 0 below all marks


@attrs.frozen(kw_only=True)
class _Pass:
    """A pass under way, and the volumes whose figures are still wanted of it."""

    task: "asyncio.Task[None]"
    wanted: dict[str, Volume]


class Usages:
    """The latest usage of each volume, by its id. All on the event loop.

    ``specs`` returns the volumes to measure of the backend that it is given the name
    of. ``marks`` are the percentages, ascending, of which to warn; they may be set to
    others at any time and count from the next pass on.
    """

    def __init__(
        self,
        backends: Callable[[], Iterable[Backend]],
        specs: Callable[[str], Awaitable[Sequence[Spec]]],
        marks: Sequence[int] = (),
    ) -> None:
        self.marks = marks
        self._backends = backends
        self._specs = specs
        self._taken: dict[str, _Taken] = {}
        self._passes: dict[str, _Pass] = {}
        self._failing: set[str] = set()
        self._asked_for: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)

    def of(self, volume: Volume) -> dict[str, Any]:
        """Return what Status shows of the volume's usage; nothing before it is known.

        Figures are plain numbers, for scripts; ``age`` is the seconds since the pass
        began.
        """
        taken = self._taken.get(volume.id)
        if taken is None:
            return {}
        fields = describe(taken.usage)
        fields["as-of"] = taken.as_of
        fields["age"] = round(time.monotonic() - taken.at, 1)
        if taken.mark:
            fields["near-full"] = taken.mark
        return fields

    def forget(self, volume: Volume) -> None:
        """Drop the usage of a volume that is gone, also what a pass is yet to tell."""
        self._taken.pop(volume.id, None)
        under_way = self._passes.get(volume.backend)
        if under_way is not None:
            under_way.wanted.pop(volume.id, None)

    def soon(self, backend: str) -> None:
        """Have the backend of this name measured without waiting for the interval.

        At once, or `APART` s after its last pass; asked twice before that, once.
        """
        self._asked_for[backend].set()

    async def keep_refreshing(self, interval: float) -> None:
        """`refresh` each backend now, every ``interval`` s, and when `soon` says so.

        Runs for ever. A cancelled one leaves passes under way to end by themselves, and
        the next one begins none beside them.
        """
        async with asyncio.TaskGroup() as group:
            for backend in self._backends():
                if isinstance(backend.driver, Measures):
                    group.create_task(self._keep_refreshing(backend, interval))

    async def _keep_refreshing(self, backend: Backend, interval: float) -> None:
        asked_for = self._asked_for[backend.name]
        while True:
            asked_for.clear()
            try:
                await self.refresh(backend, await self._specs(backend.name))
            except Exception:  # a bug in one pass must not end all passes
                logger.exception("usage not refreshed")
            await asyncio.sleep(APART)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(interval - APART):
                    await asked_for.wait()

    async def refresh(self, backend: Backend, specs: Sequence[Spec]) -> None:
        """Measure these volumes of ``backend``, unless an earlier pass still runs.

        Volumes that the driver leaves out keep the figures they had. A failure is
        logged, once until a pass succeeds again, and never raised. A cancelled caller
        leaves the pass running.
        """
        driver = backend.driver
        busy = backend.name in self._passes
        if busy or not specs or not isinstance(driver, Measures):
            return
        wanted = {spec.volume.id: spec.volume for spec in specs}
        task = asyncio.create_task(self._measure(backend, driver, specs, wanted))
        self._passes[backend.name] = _Pass(task=task, wanted=wanted)
        task.add_done_callback(lambda _: self._passes.pop(backend.name))
        await asyncio.shield(task)

    async def _measure(
        self,
        backend: Backend,
        driver: Measures,
        specs: Sequence[Spec],
        wanted: dict[str, Volume],
    ) -> None:
        # Of its begin, for however long it hangs: figures are never younger than told.
        at, as_of = time.monotonic(), time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        try:
            found = await backend.run(driver.measure, specs)
            for number, (volume_id, usage) in enumerate(found.items(), 1):
                if volume_id in wanted:
                    self._take(wanted[volume_id], usage, at, as_of)
                if number % _SLICE == 0:
                    await asyncio.sleep(0)
        except Exception as error:  # noqa: BLE001  all are logged, each with its trace
            self._note_failure(backend.name, error)
        else:
            if backend.name in self._failing:
                self._failing.remove(backend.name)
                log(logger, logging.INFO, "usage measured again", backend=backend.name)

    def _note_failure(self, backend: str, error: Exception) -> None:
        if backend in self._failing:
            return
        self._failing.add(backend)
        if isinstance(error, VolpluginError):
            log(
                logger,
                logging.WARNING,
                "usage not measured, to be tried again",
                backend=backend,
                error=str(error),
            )
        else:
            logger.error("usage not measured: %s", backend, exc_info=error)

    def _take(self, volume: Volume, usage: Usage, at: float, as_of: str) -> None:
        earlier = self._taken.get(volume.id)
        before = 0 if earlier is None else earlier.mark
        bytes_used = _percent(usage.used, usage.size)
        inodes_used = _percent(usage.inodes_used, usage.inodes)
        fullest = max(bytes_used, inodes_used)
        mark = reached(self.marks, fullest, before)
        self._taken[volume.id] = _Taken(usage=usage, at=at, as_of=as_of, mark=mark)
        if mark == before:
            return
        limit: dict[str, object] = (
            {"size": None if usage.size is None else format_size(usage.size)}
            if bytes_used >= inodes_used
            else {"inodes": usage.inodes}
        )
        log(
            logger,
            logging.WARNING if mark > before else logging.INFO,
            "volume nearly full" if mark > before else "volume less full again",
            volume=volume.name,
            percent=round(fullest, 1),
            mark=max(mark, before),
            **limit,
        )


def describe(usage: Usage) -> dict[str, Any]:
    """Return the fields of Status that ``usage`` alone tells: bytes, counts, percent.

    What is not known, or has no limit to be held against, is left out. No key is named
    ``ref``: PouchContainer takes it for its own and then refuses to remove the volume.
    """
    fields: dict[str, Any] = {**usage.notes}
    fields.pop("ref", None)
    fields["used"] = usage.used
    fields["available"] = usage.available
    if usage.size:
        fields["percent"] = round(_percent(usage.used, usage.size), 1)
    if usage.inodes_used is not None:
        fields["inodes-used"] = usage.inodes_used
        if usage.inodes:
            percent = _percent(usage.inodes_used, usage.inodes)
            fields["inodes-percent"] = round(percent, 1)
    return fields


def reached(marks: Iterable[int], percent: float, before: int) -> int:
    """Return the highest of ``marks`` that ``percent`` has reached, or 0.

    One up to ``before``, the mark reached earlier, is left only `HYSTERESIS` points
    below it.
    """
    return max(
        (
            mark
            for mark in marks
            if percent >= (mark - HYSTERESIS if mark <= before else mark)
        ),
        default=0,
    )


def _percent(used: int | None, limit: int | None) -> float:
    return 100 * used / limit if used and limit else 0.0
