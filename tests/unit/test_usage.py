"""Usage: one pass a backend, never in Get, plain figures, marks warned of once."""

import asyncio
import json
import logging
import threading
from collections.abc import (
    AsyncIterator,
    Callable,
    Coroutine,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import attrs
import pytest

from volplugin import usage as module
from volplugin.backends import Backend, Backends
from volplugin.catalog import Catalog
from volplugin.config import Config
from volplugin.drivers.driver import Driver, Plan, Spec
from volplugin.errors import Unavailable
from volplugin.host.mountinfo import Mount
from volplugin.model import State, Usage, Volume
from volplugin.store.store import DropVolume, PutVolume, Store
from volplugin.usage import Usages, describe, reached

G = 1 << 30
LONG = 60.0  # seconds that no test waits


@attrs.frozen(kw_only=True)
class Nothing:
    """No options, no settings."""


class Plain(Driver):
    """A driver that does nothing and measures nothing."""

    name = "plain"
    Options = Nothing
    Config = Nothing

    def __init__(self, config: Any = None, place: str = "") -> None:
        pass

    def open(self) -> None:
        pass

    def roots(self) -> Sequence[str]:
        return ()

    def plan(self, name: str, volume_id: str, options: Any) -> Plan:
        return Plan(mountpoint="/nowhere")

    def create(self, spec: Spec) -> None:
        pass

    def remove(self, spec: Spec) -> None:
        pass

    def attach(self, spec: Spec) -> None:
        pass

    def detach(self, spec: Spec) -> None:
        pass

    def attaches(self, volume: Volume) -> bool:
        return False

    def is_attached(self, volume: Volume, table: Sequence[Mount]) -> bool:
        return False

    def status(
        self, volume: Volume, options: Any, *, attached: bool
    ) -> Mapping[str, Any]:
        return {}


class Measuring(Plain):
    """A driver that tells what a test set, and can be held up or made to fail."""

    name = "measuring"

    def __init__(self, config: Any = None, place: str = "") -> None:
        self.held: dict[str, Usage] = {}
        self.asked: list[list[str]] = []
        self.error: Exception | None = None
        self.begun = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()

    def measure(self, specs: Sequence[Spec]) -> Mapping[str, Usage]:
        self.asked.append([spec.volume.name for spec in specs])
        found = dict(self.held)
        self.begun.set()
        assert self.go_on.wait(20)
        if self.error is not None:
            raise self.error
        return found


def volume(name: str, *, backend: str = "one", state: State = State.READY) -> Volume:
    return Volume(
        name=name,
        id=f"id-{name}",
        backend=backend,
        driver="measuring",
        mountpoint=f"/volumes/{name}",
        created_at="2024-01-01T00:00:00.000Z",
        state=state,
    )


def spec(name: str, *, backend: str = "one") -> Spec:
    return Spec(volume=volume(name, backend=backend), options=Nothing(), record=b"")


class World:
    """The backends ``one``, with volumes ``a`` and ``b``, and ``two``, with ``c``."""

    def __init__(self, marks: Sequence[int] = ()) -> None:
        self.drivers = {"one": Measuring(), "two": Measuring()}
        self.backends = {
            name: Backend(name, driver) for name, driver in self.drivers.items()
        }
        self.specs = {
            "one": [spec("a"), spec("b")],
            "two": [spec("c", backend="two")],
        }
        self.usages = Usages(self.backends.values, self.specs_of, marks)
        self.one, self.two = self.drivers["one"], self.drivers["two"]
        self.one.held = {"id-a": Usage(used=1, available=9), "id-b": full(50)}
        self.two.held = {"id-c": Usage(used=3, available=7)}

    async def specs_of(self, backend: str) -> list[Spec]:
        return self.specs[backend]

    async def refresh(self, backend: str = "one") -> None:
        await self.usages.refresh(self.backends[backend], self.specs[backend])

    async def measured(self, percent: float, name: str = "a") -> None:
        """Measure ``one`` with the volume so full."""
        self.one.held = {f"id-{name}": full(percent)}
        await self.refresh()

    def of(self, name: str) -> dict[str, Any]:
        return self.usages.of(volume(name))

    @asynccontextmanager
    async def refreshing(self, interval: float = LONG) -> AsyncIterator[None]:
        task = asyncio.create_task(self.usages.keep_refreshing(interval))
        yield
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def full(percent: float) -> Usage:
    used = round(percent / 100 * 10 * G)
    return Usage(used=used, available=10 * G - used, size=10 * G)


def run(test: Callable[[World], Coroutine[Any, Any, None]], *marks: int) -> None:
    """Run a test on a loop; it may leave no task and no thread."""

    async def checked() -> None:
        world = World(marks)
        try:
            await asyncio.wait_for(test(world), 20)
        finally:
            for driver in world.drivers.values():
                driver.go_on.set()
            closed = [await each.close(5) for each in world.backends.values()]
        await asyncio.sleep(0.01)
        assert all(closed)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(checked())


async def until(true: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not true():  # noqa: ASYNC110  a thread makes it true
            await asyncio.sleep(0.005)


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> float:
    """Passes may follow each other sooner than in a server."""
    monkeypatch.setattr(module, "APART", 0.2)
    return 0.2


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Callable[[], list[tuple[Any, ...]]]:
    """Returns what was logged since the last time: level, event, fields."""
    caplog.set_level(logging.INFO, "volplugin")

    def logged() -> list[tuple[Any, ...]]:
        found = [
            (record.levelname, record.getMessage(), getattr(record, "fields", None))
            for record in caplog.records
        ]
        caplog.clear()
        return found

    return logged


# Figures


def test_every_figure_is_a_number() -> None:
    """Bytes, counts and percentages are what a script can reckon with."""
    usage = Usage(
        used=3 * G,
        available=6 * G,
        size=9 * G,
        inodes_used=10,
        inodes=64,
        notes={"tagging": "12 files to go"},
    )
    assert json.loads(json.dumps(describe(usage))) == {
        "used": 3 * G,
        "available": 6 * G,
        "percent": 33.3,
        "inodes-used": 10,
        "inodes-percent": 15.6,
        "tagging": "12 files to go",
    }


@pytest.mark.parametrize(
    ("usage", "left_out"),
    [
        (Usage(used=1, available=1), {"percent", "inodes-used", "inodes-percent"}),
        (Usage(used=1, available=1, size=5), {"inodes-used", "inodes-percent"}),
        (Usage(used=1, available=1, inodes=5), {"inodes-used", "inodes-percent"}),
        (Usage(used=1, available=1, inodes_used=5), {"inodes-percent"}),
    ],
)
def test_what_is_not_known_is_left_out(usage: Usage, left_out: set[str]) -> None:
    """There is no percentage of no limit, and no count that nobody made."""
    assert left_out.isdisjoint(describe(usage))


def test_notes_take_no_figures_place() -> None:
    """A note is shown unless its key is a figure's, or one that Pouch stumbles over."""
    notes = {"used": "x", "ref": "x", "progress": "x"}
    fields = describe(Usage(used=1, available=2, notes=notes))
    assert fields == {"used": 1, "available": 2, "progress": "x"}


def test_nothing_is_shown_before_the_first_pass() -> None:
    """A volume that was never measured has no fields of usage at all."""

    async def test(world: World) -> None:
        assert world.of("a") == {}

    run(test)


def test_figures_tell_when_they_were_taken() -> None:
    """``as-of`` is RFC 3339 with a zone; ``age`` is the seconds since, at each Get."""

    async def test(world: World) -> None:
        await world.refresh()
        first = world.of("a")
        since = datetime.now(UTC) - datetime.fromisoformat(first["as-of"])
        assert timedelta(0) <= since < timedelta(seconds=5)
        await asyncio.sleep(0.25)
        later = world.of("a")
        assert later["as-of"] == first["as-of"]
        assert isinstance(later["age"], float)
        assert later["age"] >= first["age"] + 0.1
        assert later["age"] == round(later["age"], 1)

    run(test)


# Passes


def test_one_pass_measures_all_volumes() -> None:
    """A backend is asked once, for all its volumes together."""

    async def test(world: World) -> None:
        await world.refresh()
        assert world.one.asked == [["a", "b"]]
        assert world.two.asked == []
        assert world.of("a")["used"] == 1
        assert world.of("b")["percent"] == 50.0

    run(test)


def test_a_driver_that_measures_nothing_is_not_asked() -> None:
    """Usage is an optional power of drivers."""

    async def test(world: World) -> None:
        world.backends["one"].driver = Plain()
        await world.refresh()
        assert world.of("a") == {}

    run(test)


def test_a_backend_without_volumes_is_not_asked() -> None:
    """A pass for nothing is no I/O."""

    async def test(world: World) -> None:
        world.specs["one"] = []
        await world.refresh()
        assert world.one.asked == []

    run(test)


def test_a_volume_that_was_left_out_keeps_its_figures() -> None:
    """What can't be measured now is shown as it was, with its age."""

    async def test(world: World) -> None:
        await world.refresh()
        del world.one.held["id-a"]
        await asyncio.sleep(0.15)
        await world.refresh()
        assert world.of("a")["used"] == 1
        assert world.of("a")["age"] > world.of("b")["age"]

    run(test)


def test_a_hung_backend_holds_up_no_other_and_no_get() -> None:
    """While one backend's disk hangs, others are measured and figures are read."""

    async def test(world: World) -> None:
        await world.refresh()
        world.one.go_on.clear()
        async with world.refreshing():
            await until(lambda: len(world.one.asked) == 2 and world.of("c"))
            world.usages.soon("two")
            await until(lambda: len(world.two.asked) == 2)
            assert world.of("a")["used"] == 1

    run(test)


def test_a_hung_pass_is_not_followed_by_another(apart: float) -> None:
    """Passes over a hung backend don't queue up, not even those of a new interval."""

    async def test(world: World) -> None:
        world.one.go_on.clear()
        for _ in range(3):
            async with world.refreshing(0.01):
                world.usages.soon("one")
                await until(world.one.begun.is_set)
                await asyncio.sleep(1.5 * apart)
        await world.refresh()
        assert len(world.one.asked) == 1

    run(test)


def test_a_pass_that_no_longer_hangs_counts() -> None:
    """It ends by itself, also when nobody waits for it any more, and others follow."""

    async def test(world: World) -> None:
        world.one.go_on.clear()
        async with world.refreshing():
            await until(world.one.begun.is_set)
        assert world.of("a") == {}
        world.one.go_on.set()
        await until(lambda: world.of("a"))
        await asyncio.sleep(0)
        await world.refresh()
        assert len(world.one.asked) == 2

    run(test)


def test_figures_of_a_slow_pass_are_as_old_as_its_begin() -> None:
    """They may have been read at once and told late."""

    async def test(world: World) -> None:
        world.one.go_on.clear()
        task = asyncio.create_task(world.refresh())
        await asyncio.sleep(0.3)
        world.one.go_on.set()
        await task
        assert world.of("a")["age"] >= 0.2

    run(test)


@pytest.mark.parametrize(
    "error", [Unavailable("the disk is away"), OSError(5, "I/O"), ZeroDivisionError()]
)
def test_a_failure_is_logged_once_until_success(
    error: Exception, logged: Callable[[], list[tuple[Any, ...]]]
) -> None:
    """Whatever a driver raises is a line in the log, not one each pass."""

    async def test(world: World) -> None:
        await world.refresh()
        world.one.error = error
        await world.refresh()
        await world.refresh()
        (line,) = logged()
        assert line[0] in ("WARNING", "ERROR")
        assert "one" in str(line)
        assert world.of("a")["used"] == 1
        world.one.error = None
        await world.refresh()
        await world.refresh()
        assert logged() == [("INFO", "usage measured again", {"backend": "one"})]
        world.one.error = error
        await world.refresh()
        assert len(logged()) == 1

    run(test)


def test_forgotten_usage_is_gone() -> None:
    """A volume that is removed leaves nothing to a later one of its name."""

    async def test(world: World) -> None:
        await world.refresh()
        world.usages.forget(volume("a"))
        assert world.of("a") == {}
        world.usages.forget(volume("a"))

    run(test)


def test_a_pass_under_way_tells_nothing_of_a_volume_gone_meanwhile() -> None:
    """What was measured before the removal is dropped after it."""

    async def test(world: World) -> None:
        world.one.go_on.clear()
        task = asyncio.create_task(world.refresh())
        await until(world.one.begun.is_set)
        world.usages.forget(volume("a"))
        world.one.go_on.set()
        await task
        assert world.of("a") == {}
        assert world.of("b") != {}

    run(test)


def test_volumes_that_were_not_asked_for_are_not_kept() -> None:
    """A driver that tells of others makes no entry that nobody would forget."""

    async def test(world: World) -> None:
        world.one.held["id-strange"] = full(1)
        await world.refresh()
        assert world.of("strange") == {}

    run(test)


def test_many_volumes_leave_others_their_turn() -> None:
    """A large pass is taken note of in slices."""

    async def test(world: World) -> None:
        names = [f"v{number}" for number in range(2000)]
        world.specs["one"] = [spec(name) for name in names]
        world.one.held = {f"id-{name}": full(1) for name in names}
        await world.refresh()
        assert all(world.of(name) for name in names)

    run(test)


# When


def test_backends_are_measured_every_interval(apart: float) -> None:
    """The first pass comes at once, the others each after the interval."""

    async def test(world: World) -> None:
        async with world.refreshing(2 * apart):
            await until(lambda: len(world.one.asked) == 1)
            before = asyncio.get_running_loop().time()
            await until(lambda: len(world.one.asked) == 3)
            spent = asyncio.get_running_loop().time() - before
            assert 3 * apart < spent < 20 * apart
            assert len(world.two.asked) >= 2

    run(test)


def test_wakes_one_backend_at_once_when_there_is_reason(apart: float) -> None:
    """A new volume's figures need not wait for the interval."""

    async def test(world: World) -> None:
        async with world.refreshing():
            await until(lambda: world.of("a"))
            await asyncio.sleep(1.5 * apart)
            world.usages.soon("one")
            await until(lambda: len(world.one.asked) == 2)
            assert len(world.two.asked) == 1

    run(test)


def test_many_reasons_make_one_pass(apart: float) -> None:
    """However many volumes are made, passes are `APART` seconds apart."""

    async def test(world: World) -> None:
        async with world.refreshing():
            await until(lambda: world.of("a"))
            time = asyncio.get_running_loop().time
            begun = time()
            for _ in range(40):
                world.usages.soon("one")
                await asyncio.sleep(0.01)
            await asyncio.sleep(1.5 * apart)
            assert 2 <= len(world.one.asked) <= (time() - begun) / apart + 2
            count = len(world.one.asked)
            await asyncio.sleep(2.5 * apart)
            assert len(world.one.asked) == count

    run(test)


def test_a_volume_made_during_a_pass_is_measured_after_it(apart: float) -> None:
    """What the pass can't know of makes another one."""

    async def test(world: World) -> None:
        world.one.go_on.clear()
        async with world.refreshing():
            await until(world.one.begun.is_set)
            world.specs["one"].append(spec("d"))
            world.one.held["id-d"] = full(3)
            world.usages.soon("one")
            world.one.go_on.set()
            await until(lambda: world.of("d"))

    run(test)


def test_a_bug_ends_no_loop(
    apart: float, logged: Callable[[], list[tuple[Any, ...]]]
) -> None:
    """When even the list of volumes fails, the next pass is tried."""

    async def test(world: World) -> None:
        specs = world.specs.pop("one")
        async with world.refreshing(0.01):
            await until(lambda: world.of("c"))
            world.specs["one"] = specs
            await until(lambda: world.of("a"))
        assert logged()[0][:2] == ("ERROR", "usage not refreshed")

    run(test)


# Marks


@pytest.mark.parametrize(
    ("percent", "before", "mark"),
    [
        (79.9, 0, 0),
        (80.0, 0, 80),
        (94.9, 80, 80),
        (95.0, 0, 95),
        (120.0, 0, 95),
        (94.0, 95, 95),
        (93.0, 95, 95),
        (92.9, 95, 80),
        (78.0, 95, 80),
        (77.9, 95, 0),
        (79.0, 80, 80),
        (94.0, 80, 80),
    ],
)
def test_a_mark_is_left_two_points_below(
    percent: float, before: int, mark: int
) -> None:
    """What goes to and fro around a mark does not cross it each time."""
    assert reached((80, 95), percent, before) == mark


def test_crossing_a_mark_is_told_once(
    logged: Callable[[], list[tuple[Any, ...]]],
) -> None:
    """One warning upwards for the highest mark, one information downwards."""

    async def test(world: World) -> None:
        await world.measured(79)
        assert logged() == []
        assert "near-full" not in world.of("a")
        await world.measured(81.25)
        told = {"volume": "a", "percent": 81.2, "mark": 80, "size": "10G"}
        assert logged() == [("WARNING", "volume nearly full", told)]
        assert world.of("a")["near-full"] == 80
        await world.measured(90)
        await world.measured(79)
        assert logged() == []
        assert world.of("a")["near-full"] == 80
        await world.measured(70)
        told = {"volume": "a", "percent": 70.0, "mark": 80, "size": "10G"}
        assert logged() == [("INFO", "volume less full again", told)]
        assert "near-full" not in world.of("a")
        await world.measured(99)
        told = {"volume": "a", "percent": 99.0, "mark": 95, "size": "10G"}
        assert logged() == [("WARNING", "volume nearly full", told)]
        assert world.of("a")["near-full"] == 95

    run(test, 80, 95)


def test_inodes_reach_marks_too(logged: Callable[[], list[tuple[Any, ...]]]) -> None:
    """A volume with room for bytes and none for files is nearly full."""

    async def test(world: World) -> None:
        held = Usage(used=G, available=G, size=2 * G, inodes_used=97, inodes=100)
        world.one.held = {"id-a": held}
        await world.refresh()
        told = {"volume": "a", "percent": 97.0, "mark": 95, "inodes": 100}
        assert logged() == [("WARNING", "volume nearly full", told)]
        assert world.of("a")["near-full"] == 95

    run(test, 80, 95)


def test_without_marks_nothing_is_near_full(
    logged: Callable[[], list[tuple[Any, ...]]],
) -> None:
    """Whoever wants no warnings gets none."""

    async def test(world: World) -> None:
        await world.measured(100)
        assert logged() == []
        assert "near-full" not in world.of("a")

    run(test)


def test_marks_can_be_changed(logged: Callable[[], list[tuple[Any, ...]]]) -> None:
    """New marks count from the next pass on."""

    async def test(world: World) -> None:
        await world.measured(85)
        logged()
        world.usages.marks = (50, 90)
        await world.measured(85)
        assert world.of("a")["near-full"] == 50
        world.usages.marks = ()
        await world.measured(85)
        assert "near-full" not in world.of("a")

    run(test, 80, 95)


def test_a_larger_limit_takes_the_mark_back(
    logged: Callable[[], list[tuple[Any, ...]]],
) -> None:
    """After a resize the percentage is of the new size."""

    async def test(world: World) -> None:
        await world.measured(90)
        world.one.held["id-a"] = Usage(used=9 * G, available=11 * G, size=20 * G)
        await world.refresh()
        assert world.of("a")["percent"] == 45.0
        assert [line[0] for line in logged()] == ["WARNING", "INFO"]
        assert "near-full" not in world.of("a")

    run(test, 80)


# In the catalog


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(str(tmp_path / "store"))
    yield store
    store.close()


def in_catalog(
    store: Store, test: Callable[[Catalog, World], Coroutine[Any, Any, None]]
) -> None:
    async def with_catalog(world: World) -> None:
        backends = Backends(Config(root="/nonexistent"))
        await test(Catalog(store, backends, "boot"), world)
        assert all([await backend.close(5) for backend in backends.all()])

    run(with_catalog)


async def made(store: Store, name: str, **fields: Any) -> Volume:
    """Write a record of a tmpfs volume."""
    record = attrs.evolve(volume(name, backend="tmpfs"), driver="tmpfs", **fields)
    await store.commit(PutVolume(record))
    return record


def test_status_shows_usage_beside_the_drivers_own(store: Store) -> None:
    """Usage is merged in; what the driver tells goes before it."""

    async def test(catalog: Catalog, world: World) -> None:
        record = await made(store, "a", options={"size": "10G"})
        before = catalog.status(record)
        usage = attrs.evolve(full(50), notes={"size": "x", "driver": "x", "ref": "x"})
        world.one.held = {record.id: usage}
        specs = await catalog.specs("tmpfs")
        await catalog.usages.refresh(world.backends["one"], specs)
        status = json.loads(json.dumps(catalog.status(record)))
        assert before.items() <= status.items()
        assert before["size"] == "10G"
        assert set(status) - set(before) == {
            *("used", "available", "percent", "as-of", "age")
        }

    in_catalog(store, test)


def test_a_forgotten_volume_has_no_usage(store: Store) -> None:
    """The catalog forgets all of a volume at once."""

    async def test(catalog: Catalog, world: World) -> None:
        record = await made(store, "a")
        specs = await catalog.specs("tmpfs")
        await catalog.usages.refresh(world.backends["one"], specs)
        assert "used" in catalog.status(record)
        catalog.forget(record)
        assert "used" not in catalog.status(record)

    in_catalog(store, test)


def test_only_volumes_that_are_ready_and_understood_are_measured(store: Store) -> None:
    """One that is being made or removed, or whose options are strange, is left out."""

    async def test(catalog: Catalog, world: World) -> None:
        await made(store, "ready")
        await made(store, "new", state=State.CREATING)
        await made(store, "old", state=State.REMOVING)
        await made(store, "strange", options={"strange": "1"})
        await made(store, "other", backend="local")
        specs = await catalog.specs("tmpfs")
        assert [each.volume.name for each in specs] == ["ready"]
        assert await catalog.specs("gone") == []

    in_catalog(store, test)


def test_a_volume_removed_while_others_are_looked_at_is_left_out(store: Store) -> None:
    """Nobody would forget the usage of one that is gone already."""

    async def test(catalog: Catalog, world: World) -> None:
        names = [f"v{number}" for number in range(150)]
        await asyncio.gather(*(made(store, name) for name in names))
        looking = catalog.specs("tmpfs")
        looking.send(None)  # its first turn
        for name in (names[0], names[-1]):
            await store.commit(DropVolume(name))
        with pytest.raises(StopIteration) as ended:
            looking.send(None)
        found = [spec.volume.name for spec in ended.value.value]
        assert found == names[1:-1]

    in_catalog(store, test)


def test_a_resized_volume_is_measured_as_it_is(store: Store) -> None:
    """A record with other options is parsed anew; one under way is not in the xattr."""

    async def test(catalog: Catalog, world: World) -> None:
        before = await made(store, "a", options={"size": "1G"})
        (spec,) = await catalog.specs("tmpfs")
        assert catalog.spec(before) is spec
        pending = await made(store, "a", options={"size": "1G"}, pending={"size": "2G"})
        assert catalog.spec(pending).record == spec.record
        await made(store, "a", options={"size": "2G"})
        (spec,) = await catalog.specs("tmpfs")
        assert spec.options.size == 2 * G

    in_catalog(store, test)
