"""Clusters followed: by notices, by looks at all, past trouble and through reloads."""

import asyncio
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import pytest
from fake_cluster import CLUSTERS, Host, Run, World, runner, until

from volplugin import following
from volplugin.changes import Caller
from volplugin.errors import InvalidArgument
from volplugin.model import State, Volume

SOON = 0.1  # an interval that tests wait for
TWO: Mapping[str, object] = {"driver": "shared", "cluster": "two"}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a test in a world of its own."""
    return runner(tmp_path, monkeypatch)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries follow each other sooner than in a server."""
    monkeypatch.setattr(following, "_RETRY", SOON)
    monkeypatch.setattr(following, "_APART", SOON)
    monkeypatch.setattr(following, "_BUSY", SOON)


def made(name: str, volume_id: str = "theirs") -> Volume:
    """Return a volume as another host has made it."""
    return Volume(
        name=name,
        id=volume_id,
        backend="elsewhere",
        driver="shared",
        mountpoint="/elsewhere",
        created_at="2026-01-01T00:00:00.000Z",
        state=State.READY,
    )


def logged(caplog: pytest.LogCaptureFixture, text: str) -> list[Any]:
    """Return the fields of the log's lines with this event."""
    return [
        vars(record).get("fields")
        for record in caplog.records
        if text in record.getMessage()
    ]


def followed_by(host: Host) -> set[str]:
    """Return the backends that the host would follow."""
    return {backend.name for backend in host.followers._followed()}


async def followed(host: Host) -> None:
    """Return once the host has looked at all for the first time."""
    cluster = CLUSTERS["one"]
    looks = cluster.count("volumes")
    host.follow()
    await until(lambda: cluster.count("volumes") > looks)


# Notices


def test_what_others_do_shows_up_at_once(run: Run) -> None:
    """A notice is enough, long before the next look at all volumes."""

    async def test(world: World) -> None:
        a, b = world.host("a"), world.host("b")
        await followed(a)
        await followed(b)
        await a.create("v", size="1G")
        await until(lambda: b.id("v") == a.id("v"))
        await a.operations.resize("v", {"size": "2G"}, Caller())
        await until(lambda: b.manager.get("v")[1]["size"] == "2G")
        await a.remove("v")
        await until(lambda: b.id("v") is None)
        assert world.cluster.count("volumes") == 2

    run(test)


def test_what_there_is_at_start_shows_up(run: Run) -> None:
    """The first look is at all volumes, and forgets those that have gone."""

    async def test(world: World) -> None:
        host = world.host("a")
        await host.create("old")
        await world.end(host)
        world.cluster.drop("old")
        world.cluster.put(made("new"))
        again = world.host("a")
        assert again.id("old") is not None
        await followed(again)
        await until(lambda: again.id("new") and not again.id("old"))

    run(test)


def test_notices_that_are_lost(run: Run, quick: None) -> None:
    """The next look at all makes up for them."""

    async def test(world: World) -> None:
        host = world.host("a")
        host.follow(2 * SOON)
        await until(lambda: world.cluster.watches)
        world.cluster.muted = True
        world.cluster.put(made("v"))
        await until(lambda: host.id("v") == "theirs")
        world.cluster.put(made("v", "new"))
        await until(lambda: host.id("v") == "new")
        world.cluster.drop("v")
        await until(lambda: host.id("v") is None)

    run(test)


def test_a_notice_that_something_was_missed(run: Run) -> None:
    """It has all volumes looked at."""

    async def test(world: World) -> None:
        host = world.host("a")
        await followed(host)
        world.cluster.muted = True
        world.cluster.put(made("v"))
        world.cluster.muted = False
        world.cluster.notify(None)
        await until(lambda: host.id("v"))
        assert world.cluster.count("volumes") == 2

    run(test)


def test_a_storm_of_notices(run: Run, quick: None) -> None:
    """More than are worth remembering: all is looked at instead, now and then."""

    async def test(world: World) -> None:
        host = world.host("a")
        await followed(host)
        await until(lambda: world.cluster.watches)
        for number in range(5 * following._MOST_NOTICES):
            world.cluster.notify(f"v{number}")
        world.cluster.muted = True
        for number in range(50):
            world.cluster.put(made(f"v{number}", str(number)))
        world.cluster.muted = False
        for _ in range(1000):
            world.cluster.notify(None)
        await until(lambda: len(host.store.volumes) == 50)
        assert world.cluster.count("volumes") < 10
        finds = following._MOST_NOTICES + 50
        assert world.cluster.count("find") <= finds + following._AT_ONCE

    run(test)


def test_requests_for_a_look_at_all_share_one(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often one is asked for, looks are some time apart."""
    monkeypatch.setattr(following, "_APART", 60.0)

    async def test(world: World) -> None:
        host = world.host("a")
        await followed(host)
        for _ in range(20):
            world.cluster.notify(None)
            await asyncio.sleep(0.005)
        assert world.cluster.count("volumes") == 1
        world.cluster.put(made("v"))  # and a notice of one does its work meanwhile
        await until(lambda: host.id("v"))

    run(test)


def test_own_notices_change_nothing(run: Run, quick: None) -> None:
    """What this host does itself is on record already."""

    async def test(world: World) -> None:
        host = world.host("a")
        await followed(host)
        await host.create("v")
        generation = host.store.generation
        looks = world.cluster.count("find", "v")
        world.cluster.notify("v")
        await until(lambda: world.cluster.count("find", "v") > looks)
        await asyncio.sleep(SOON)
        assert host.store.generation == generation

    run(test)


def test_a_look_leaves_threads_to_callers(run: Run) -> None:
    """However many volumes are to be looked at, and however long each takes."""

    async def test(world: World) -> None:
        host = world.host("a")
        await host.create("v")
        world.cluster.muted = True
        for number in range(100):
            world.cluster.put(made(f"w{number}", str(number)))
        with world.cluster.holding("find"):
            host.follow()
            await until(world.cluster.begun["find"].is_set)
            await host.mount("v")
            await host.unmount("v")
        await until(lambda: len(host.store.volumes) == 101)

    run(test)


def test_a_volume_that_is_busy_holds_up_no_other(run: Run, quick: None) -> None:
    """While one is being changed, the others follow; it does so afterwards."""

    async def test(world: World) -> None:
        host = world.host("a")
        await followed(host)
        await host.create("busy", size="1G")
        volume = world.cluster.volumes["busy"]
        with world.cluster.holding("attach"):
            mounting = asyncio.create_task(host.mount("busy"))
            await until(world.cluster.begun["attach"].is_set)
            world.cluster.put(attrs.evolve(volume, options={"size": "2G"}))
            world.cluster.put(made("v"))
            await until(lambda: host.id("v"))
            world.cluster.put(made("w", "2"))
            await until(lambda: host.id("w"))
            assert host.catalog.get("busy").options == {"size": "1G"}
        await mounting
        await until(lambda: host.catalog.get("busy").options == {"size": "2G"})
        await host.unmount("busy")

    run(test)


# Trouble


def test_a_cluster_that_is_down_at_start(
    run: Run, quick: None, caplog: pytest.LogCaptureFixture
) -> None:
    """It is tried again until it answers; its trouble is told once, and its end."""
    caplog.set_level(logging.DEBUG, "volplugin")

    async def test(world: World) -> None:
        world.cluster.down = True
        world.cluster.put(made("v"))
        host = world.host("a")
        host.follow()
        await until(lambda: world.cluster.count("follow") > 3)
        assert host.id("v") is None
        assert len(logged(caplog, "not followed")) == 1
        world.cluster.down = False
        await until(lambda: host.id("v"))
        await until(lambda: logged(caplog, "followed again"))

    run(test)
    (fields,) = logged(caplog, "not followed")
    assert fields == {"backend": "ceph", "error": "the cluster is down"}
    levels = {r.levelname for r in caplog.records if "follow" in r.getMessage()}
    assert levels == {"WARNING", "INFO"}


def test_a_backend_that_nobody_wants_is_no_trouble(
    run: Run, quick: None, caplog: pytest.LogCaptureFixture
) -> None:
    """One without settings and volumes is tried each interval, without a warning."""
    caplog.set_level(logging.DEBUG, "volplugin")

    async def test(world: World) -> None:
        CLUSTERS["one"].down = True
        host = world.host("a", ceph={})
        host.follow(SOON)
        await until(lambda: world.cluster.count("follow") > 2)

    run(test)
    levels = {r.levelname for r in caplog.records if "follow" in r.getMessage()}
    assert levels == {"DEBUG"}


def test_another_cluster_is_followed_all_the_same(run: Run) -> None:
    """One that hangs holds up only itself."""

    async def test(world: World) -> None:
        host = world.host("a", far=TWO)
        with CLUSTERS["two"].holding("follow", "volumes"):
            await followed(host)
            world.cluster.put(made("v"))
            await until(lambda: host.id("v"))
        await until(lambda: CLUSTERS["two"].watches)

    run(test)


def test_no_notice_makes_it_try_more_often(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cluster in trouble may call out at each try, and is not tried the more."""
    monkeypatch.setattr(following, "_RETRY", 60.0)

    async def test(world: World) -> None:
        host = world.host("a")
        await followed(host)
        await until(lambda: world.cluster.watches)
        world.cluster.down = True
        tries = len(world.cluster.calls)
        for _ in range(50):
            world.cluster.notify("v")
            world.cluster.notify(None)
            await asyncio.sleep(0.005)
        assert len(world.cluster.calls) <= tries + 2
        world.cluster.down = False

    run(test)


def test_a_cluster_that_is_lost_is_not_asked_for_each_volume(
    run: Run, quick: None
) -> None:
    """The first look that fails ends a pass over many, and the next one makes up."""

    async def test(world: World) -> None:
        world.cluster.muted = True
        for number in range(200):
            world.cluster.put(made(f"v{number}", str(number)))
        host = world.host("a")
        with world.cluster.holding("find"):
            host.follow()
            await until(world.cluster.begun["find"].is_set)
            world.cluster.down = True
        await until(lambda: world.cluster.count("volumes") > 2)
        assert world.cluster.count("find") <= following._AT_ONCE
        world.cluster.down = False
        await until(lambda: len(host.store.volumes) == 200)

    run(test)


def test_a_volume_that_can_not_be_read(
    run: Run, quick: None, caplog: pytest.LogCaptureFixture
) -> None:
    """It is told of once, and stands in the way of no other."""

    async def test(world: World) -> None:
        world.cluster.muted = True
        for name in "abc":
            world.cluster.put(made(name, name))
        world.cluster.errors["find", "a"] = InvalidArgument("a record of a newer one")
        host = world.host("a")
        host.follow(SOON)
        await until(lambda: host.id("b") and host.id("c"))
        await until(lambda: world.cluster.count("find", "a") > 2)
        assert host.id("a") is None
        world.cluster.errors.clear()
        await until(lambda: host.id("a"))

    run(test)
    (fields,) = logged(caplog, "not followed")
    assert fields == {"backend": "ceph", "error": "a: a record of a newer one"}


def test_a_bug_in_a_look_does_not_end_all_looks(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged as such, and the next look is made."""

    async def test(world: World) -> None:
        world.cluster.put(made("v"))
        world.cluster.errors["find", "v"] = ZeroDivisionError()
        host = world.host("a")
        task = host.follow(SOON)
        await until(lambda: world.cluster.count("find") > 1)
        assert not task.done()
        world.cluster.errors.clear()
        await until(lambda: host.id("v"))

    run(test)
    assert "following failed" in caplog.text


def test_a_subscription_that_died_is_made_anew(run: Run, quick: None) -> None:
    """The dead one is closed, and all is looked at: who knows what was missed."""

    async def test(world: World) -> None:
        host = world.host("a")
        host.follow(2 * SOON)
        await until(lambda: world.cluster.watches)
        (watch,) = world.cluster.watches
        watch.lost = True
        await until(lambda: world.cluster.watches not in ([], [watch]))
        assert watch not in world.cluster.watches
        world.cluster.put(made("v"))
        await until(lambda: host.id("v"))

    run(test)


# End


def test_the_end_closes_the_subscription(run: Run) -> None:
    """Before the connection is closed, which happens once."""

    async def test(world: World) -> None:
        host = world.host("a")
        await followed(host)
        await until(lambda: world.cluster.watches)
        await world.end(host)
        assert not world.cluster.watches
        assert [driver.closed for driver in world.cluster.drivers] == [1]

    run(test)


@pytest.mark.parametrize("call", ["follow", "volumes", "find"])
def test_ended_in_the_middle_of_a_call(run: Run, call: str) -> None:
    """What was opened meanwhile is closed, once the call returns."""

    async def test(world: World) -> None:
        host = world.host("a")
        world.cluster.put(made("v"))
        with world.cluster.holding(call):
            task = host.follow()
            await until(world.cluster.begun[call].is_set)
            task.cancel()
            await asyncio.wait({task}, timeout=0.1)
        await asyncio.gather(task, return_exceptions=True)
        assert not world.cluster.watches
        assert task.cancelled()

    run(test)


def test_a_cluster_that_hangs_holds_up_no_end(run: Run) -> None:
    """The server's end finds the call stuck within its limit, and goes without it."""

    async def test(world: World) -> None:
        host = world.host("a", far=TWO)
        with CLUSTERS["two"].holding("follow"):
            task = host.follow()
            await until(CLUSTERS["two"].begun["follow"].is_set)
            task.cancel()
            await asyncio.wait({task}, timeout=0.1)
            far = host.backends.get("far")
            assert far is not None
            assert not await far.close(0.1)
            host.closed.add(far)
        await asyncio.gather(task, return_exceptions=True)
        CLUSTERS["two"].watches.clear()  # gone with its connection

    run(test)


# Reload


async def reload(host: Host, **backends: Mapping[str, object]) -> None:
    """Take over a changed configuration, as the server does at SIGHUP."""
    await host.backends.reconfigure(host.config(**backends))
    host.catalog.forget_parsed()
    for task in host._tasks:
        task.cancel()
    host.follow()


def test_unchanged_settings_keep_the_connection(run: Run) -> None:
    """A reload that changes nothing of a backend connects nothing anew."""

    async def test(world: World) -> None:
        host = world.host("a")
        await followed(host)
        driver = host.backends.pick("ceph").driver
        await reload(host)
        assert host.backends.pick("ceph").driver is driver
        used, *others = world.cluster.drivers
        assert used is driver
        assert used.closed == 0
        assert all(other.opened == 0 for other in others)
        world.cluster.put(made("v"))
        await until(lambda: host.id("v"))

    run(test)


def test_changed_settings_make_a_new_connection(run: Run) -> None:
    """The old one is closed, and changes arrive by the new one."""

    async def test(world: World) -> None:
        host = world.host("a")
        await followed(host)
        await until(lambda: world.cluster.watches)
        (old,) = world.cluster.drivers
        (watch,) = world.cluster.watches
        await reload(host, ceph={"user": "other"})
        await until(lambda: old.closed)
        await until(lambda: world.cluster.watches not in ([], [watch]))
        assert host.backends.pick("ceph").driver is not old
        world.cluster.put(made("v"))
        await until(lambda: host.id("v"))

    run(test)


@pytest.mark.parametrize("call", ["attach", "follow", "volumes", "unfollow", "purge"])
def test_the_old_connection_is_closed_after_its_last_call(run: Run, call: str) -> None:
    """Also after the last one of whoever follows by it."""

    async def test(world: World) -> None:
        host = world.host("a")
        await host.create("v")
        old = world.cluster.drivers[0]
        work = None
        if call == "unfollow":
            await followed(host)
            await until(lambda: world.cluster.watches)
        with world.cluster.holding(call):
            if call == "attach":
                work = asyncio.create_task(host.mount("v"))
                await until(world.cluster.begun[call].is_set)
            elif call == "purge":
                host.backends.pick("ceph").start_purge()
                await until(world.cluster.begun[call].is_set)
            elif call != "unfollow":
                host.follow()
                await until(world.cluster.begun[call].is_set)
            await reload(host, ceph={"user": "other"})
            await until(world.cluster.begun[call].is_set)
            await asyncio.sleep(0.05)
            assert not old.closed
        await until(lambda: old.closed)
        if work is not None:
            await work
            await host.unmount("v")

    run(test)


def test_ended_while_an_old_connection_is_in_use(run: Run) -> None:
    """It is closed with the new one."""

    async def test(world: World) -> None:
        host = world.host("a")
        await host.create("v")
        with world.cluster.holding("attach"):
            work = asyncio.create_task(host.mount("v"))
            await until(world.cluster.begun["attach"].is_set)
            await host.backends.reconfigure(host.config(ceph={"user": "other"}))
            ceph = host.backends.pick("ceph")
            host.closed.add(ceph)
            closing = asyncio.create_task(ceph.close(10))
            await asyncio.sleep(0.05)
            assert not closing.done()
        assert await closing
        await asyncio.gather(work, return_exceptions=True)
        assert [driver.closed for driver in world.cluster.drivers] == [1, 1]

    run(test)


def test_a_purge_that_fails_is_told_once(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is tried again and again; a backend that nobody configured is no trouble."""
    monkeypatch.setattr("volplugin.backends.PURGE_RETRY", 0.01)
    caplog.set_level(logging.DEBUG, "volplugin")

    async def test(world: World) -> None:
        host = world.host("a", own={"driver": "shared"})
        world.cluster.down = True
        for name in ("ceph", "own"):
            host.backends.pick(name).start_purge()
        await until(lambda: world.cluster.count("purge") > 6)

    run(test)
    told = [r for r in caplog.records if r.getMessage() == "purge failed"]
    assert sorted(record.levelname for record in told) == ["DEBUG", "WARNING"]


def test_a_backend_added_by_a_reload_is_followed(run: Run) -> None:
    """Without a restart."""

    async def test(world: World) -> None:
        host = world.host("a")
        await followed(host)
        await reload(host, far=TWO)
        CLUSTERS["two"].put(made("v"))
        await until(lambda: host.id("v"))
        assert host.catalog.get("v").backend == "far"

    run(test)


def test_reload_after_reload(run: Run) -> None:
    """Each connection but the last is closed, once."""

    async def test(world: World) -> None:
        host = world.host("a")
        await followed(host)
        for user in "abcd":
            await reload(host, ceph={"user": user})
        *olds, last = world.cluster.drivers
        await until(lambda: all(old.closed == 1 for old in olds))
        await until(lambda: len(world.cluster.watches) == 1)
        assert not last.closed

    run(test)


def test_a_drivers_own_backend_beside_configured_ones(run: Run) -> None:
    """It is followed where it has volumes: else it may be a second way to the same."""

    async def test(world: World) -> None:
        host = world.host("a", own={"driver": "shared"}, far=TWO)
        assert followed_by(host) == {"ceph", "far"}
        await host.create("v", driver="own")
        assert followed_by(host) == {"ceph", "far", "own"}

    run(test)
