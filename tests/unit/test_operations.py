"""The operators' verbs: what each needs of a driver, and of the volume."""

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import pytest
from fake_cluster import Host, Options, Plain, Run, World, runner, until

from volplugin import drivers
from volplugin.changes import Caller
from volplugin.drivers.driver import Held, Plan
from volplugin.errors import (
    AlreadyExists,
    InUse,
    InvalidArgument,
    NotFound,
    Unavailable,
    Unsupported,
)
from volplugin.model import Client, State
from volplugin.options import option, text
from volplugin.store.store import PutVolume

Verb = Callable[[Host, str], Coroutine[Any, Any, Any]]


@attrs.frozen(kw_only=True)
class AdoptOptions(Options):
    """Those of `Adopting`."""

    party: str | None = option(help="whose", parse=text, default=None)
    adopt: str | None = option(help="which one", parse=text, default=None)


class Adopting(Plain):
    """A driver that finds x, y and z of a party, by default the first."""

    name = "adopting"
    Options = AdoptOptions
    down = False

    def plan(self, name: str, volume_id: str, options: AdoptOptions) -> Plan:
        where = f"{self.place}/{name}"
        facts = {"party": options.party or "first", "name": options.adopt or name}
        return Plan(mountpoint=where, facts=facts)

    def adoptable(self, options: AdoptOptions) -> Sequence[Held]:
        if self.down:
            raise Unavailable("it is down")
        party = options.party or "first"
        return [
            Held(
                name=name,
                options={"party": party, "adopt": name},
                facts={"party": party, "name": name},
            )
            for name in ("x", "y", "z")
        ]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a test in a world of its own."""
    run = runner(tmp_path, monkeypatch)
    modules = {**drivers._MODULES, "adopting": (__name__, "Adopting")}
    monkeypatch.setattr(drivers, "_MODULES", modules)
    return run


async def resize(host: Host, name: str) -> Any:
    return await host.operations.resize(name, {"size": "2G"}, Caller())


async def release(host: Host, name: str) -> Any:
    return await host.operations.release(name, Caller())


async def take_over(host: Host, name: str) -> Any:
    return await host.operations.take_over(name, Caller())


async def snapshots(host: Host, name: str) -> Any:
    return await host.operations.snapshots(name, Caller())


async def take_snapshot(host: Host, name: str) -> Any:
    await host.operations.take_snapshot(name, "then", Caller())


async def drop_snapshot(host: Host, name: str) -> Any:
    await host.operations.drop_snapshot(name, "then", Caller())


every = pytest.mark.parametrize(
    "verb", [resize, release, take_over, snapshots, take_snapshot, drop_snapshot]
)


@every
def test_a_volume_that_is_not_there(run: Run, verb: Verb) -> None:
    """Each verb says so."""

    async def test(world: World) -> None:
        host = world.host("a")
        with pytest.raises(NotFound, match="no such volume"):
            await verb(host, "v")

    run(test)


@every
def test_what_is_no_name(run: Run, verb: Verb) -> None:
    """It is refused as in every other call."""

    async def test(world: World) -> None:
        host = world.host("a")
        with pytest.raises(InvalidArgument, match=r"volume name '\.\./v'"):
            await verb(host, "../v")

    run(test)


@every
def test_a_volume_that_is_being_removed(run: Run, verb: Verb) -> None:
    """Nothing is done with it any more."""

    async def test(world: World) -> None:
        host = world.host("a")
        await host.create("v")
        removing = attrs.evolve(host.catalog.get("v"), state=State.REMOVING)
        await host.store.commit(PutVolume(removing))
        asked = len(world.cluster.calls)
        with pytest.raises(Unavailable, match="it is being removed"):
            await verb(host, "v")
        assert len(world.cluster.calls) == asked

    run(test)


@pytest.mark.parametrize(
    ("verb", "reason"),
    [
        (resize, "volumes of driver plain have a fixed size"),
        (take_over, "volumes of driver plain belong to one host"),
        (snapshots, "volumes of driver plain have no snapshots"),
        (take_snapshot, "volumes of driver plain have no snapshots"),
        (drop_snapshot, "volumes of driver plain have no snapshots"),
    ],
)
def test_a_driver_that_can_not(run: Run, verb: Verb, reason: str) -> None:
    """The error names the driver."""

    async def test(world: World) -> None:
        host = world.host("a")
        await host.create("v", driver="plain")
        with pytest.raises(Unsupported, match=reason):
            await verb(host, "v")

    run(test)


@every
def test_a_verb_waits_for_its_turn(run: Run, verb: Verb) -> None:
    """One change of a volume at a time, however long each takes."""

    async def test(world: World) -> None:
        host = world.host("a")
        await host.create("v", size="1G")
        await take_snapshot(host, "v")
        await drop_snapshot(host, "v")
        if verb is drop_snapshot:
            await take_snapshot(host, "v")
        with world.cluster.holding("attach"):
            mounting = asyncio.create_task(host.mount("v"))
            await until(world.cluster.begun["attach"].is_set)
            asked = len(world.cluster.calls)
            task = asyncio.create_task(verb(host, "v"))
            await asyncio.sleep(0.05)
            assert not task.done()
            assert len(world.cluster.calls) == asked
        await asyncio.gather(mounting, task)
        await host.unmount("v")

    run(test)


def test_a_resize_is_known_everywhere(run: Run) -> None:
    """It returns the volume before and after, and the other host follows."""

    async def test(world: World) -> None:
        a, b = world.host("a"), world.host("b")
        b.follow()
        await until(lambda: world.cluster.watches)
        await a.create("v", size="1G")
        await until(lambda: b.id("v"))
        before, after = await resize(a, "v")
        assert (before.options, after.options) == ({"size": "1G"}, {"size": "2G"})
        await until(lambda: b.catalog.get("v").options == {"size": "2G"})

    run(test)


def test_a_release(run: Run) -> None:
    """It names who had held the volume, which is detached then; again it names nobody.

    Another host gets the volume afterwards.
    """

    async def test(world: World) -> None:
        a, b = world.host("a"), world.host("b")
        await a.create("v")
        await b.create("v")
        await a.mount("v")
        await a.manager.mount("v", "y" * 64, Client(program="pouchd"), Caller())
        first, second = await release(a, "v")
        assert first.startswith("'id' (dockerd")
        assert second.startswith("'yyyyyyyyyyyy…' (pouchd, since 20")
        mounts = a.catalog.mounts("v")
        assert not mounts.attached
        assert not mounts.holders
        assert list(await release(a, "v")) == []
        assert world.cluster.holders == {}
        await b.mount("v")
        await b.unmount("v")

    run(test)


def test_a_release_that_can_not_detach(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    """The holders are dropped and named in the log; the sweep detaches later."""

    async def test(world: World) -> None:
        host = world.host("a")
        await host.create("v")
        await host.mount("v")
        world.cluster.errors["detach", "v"] = InUse("a process has files open in it")
        with pytest.raises(InUse, match="a process has files open in it"):
            await release(host, "v")
        assert not host.catalog.mounts("v").holders
        assert host.catalog.mounts("v").attached
        assert "released by an operator" in caplog.text
        world.cluster.errors.clear()
        await host.manager.sweep()
        assert not host.catalog.mounts("v").attached

    run(test)


def test_a_release_without_its_backend(run: Run) -> None:
    """Nothing can be detached, so nobody is dropped."""

    async def test(world: World) -> None:
        host = world.host("a")
        await host.create("v")
        await host.mount("v")
        known = host.catalog.get("v")
        await host.store.commit(PutVolume(attrs.evolve(known, backend="gone")))
        with pytest.raises(Unavailable, match="'gone' is not in the configuration"):
            await release(host, "v")
        assert host.catalog.mounts("v").holders
        await host.store.commit(PutVolume(known))
        await host.unmount("v")

    run(test)


def test_a_takeover(run: Run) -> None:
    """It names who had the volume, which then is anyone's; again it names nobody."""

    async def test(world: World) -> None:
        a, b = world.host("a"), world.host("b")
        await a.create("v")
        await b.create("v")
        await a.mount("v")
        with pytest.raises(InUse, match="host a has it"):
            await b.mount("v")
        assert list(await take_over(b, "v")) == ["a"]
        assert list(await take_over(b, "v")) == []
        await b.mount("v")
        await a.unmount("v")
        assert world.cluster.holders == {b.id("v"): "b"}
        await b.unmount("v")

    run(test)


def test_a_takeover_of_ones_own(run: Run) -> None:
    """Nobody else has it: nothing happens."""

    async def test(world: World) -> None:
        host = world.host("a")
        await host.create("v")
        await host.mount("v")
        assert list(await take_over(host, "v")) == []
        assert world.cluster.holders == {host.id("v"): "a"}
        await host.unmount("v")

    run(test)


def test_snapshots(run: Run) -> None:
    """They are taken, listed and dropped; one of a name."""

    async def test(world: World) -> None:
        host = world.host("a")
        await host.create("v")
        assert list(await snapshots(host, "v")) == []
        await take_snapshot(host, "v")
        with pytest.raises(AlreadyExists, match="there is a snapshot then"):
            await take_snapshot(host, "v")
        assert [found.name for found in await snapshots(host, "v")] == ["then"]
        await drop_snapshot(host, "v")
        with pytest.raises(NotFound, match="there is no snapshot then"):
            await drop_snapshot(host, "v")

    run(test)


def test_the_driver_is_told_whether_it_is_attached(run: Run) -> None:
    """What this host has in its caches can only be synced where it is mounted."""

    async def test(world: World) -> None:
        host = world.host("a")
        await host.create("v")
        await host.mount("v")
        await host.operations.take_snapshot("v", "one", Caller())
        await host.unmount("v")
        await host.operations.take_snapshot("v", "two", Caller())
        sizes = {found.name: found.size for found in await snapshots(host, "v")}
        assert sizes == {"one": 1, "two": 0}

    run(test)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "-x", ".x", "a/b", "a@b", "é", "a b", "a\n", "x" * 65]
)
def test_what_is_no_name_of_a_snapshot(run: Run, name: str) -> None:
    """It is refused with the value and with what would be one."""

    async def test(world: World) -> None:
        host = world.host("a")
        await host.create("v")
        asked = len(world.cluster.calls)
        for verb in (host.operations.take_snapshot, host.operations.drop_snapshot):
            with pytest.raises(InvalidArgument, match="is no name of a snapshot") as e:
                await verb("v", name, Caller())
            assert repr(name)[:80] in str(e.value)
        assert len(world.cluster.calls) == asked

    run(test)


@pytest.mark.parametrize("name", ["a", "7", "2026-01-01", "a_b.c-d", "x" * 64])
def test_names_of_snapshots(run: Run, name: str) -> None:
    """Dates are; so is what has as much as 64 letters."""

    async def test(world: World) -> None:
        host = world.host("a")
        await host.create("v")
        await host.operations.take_snapshot("v", name, Caller())
        assert [found.name for found in await snapshots(host, "v")] == [name]

    run(test)


def test_a_client_that_leaves_ends_nothing(run: Run) -> None:
    """What has begun goes on to its end."""

    async def test(world: World) -> None:
        host = world.host("a")
        await host.create("v")
        with world.cluster.holding("take_snapshot"):
            task = asyncio.create_task(take_snapshot(host, "v"))
            await until(world.cluster.begun["take_snapshot"].is_set)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        assert [found.name for found in await snapshots(host, "v")] == ["then"]

    run(test)


# Volumes that others made


def adopting(world: World) -> Host:
    """Return a host with two backends that adopt."""
    return world.host("a", ours={"driver": "adopting"}, other={"driver": "adopting"})


async def adopt(
    host: Host, name: str, there: str = "x", backend: str = "ours", **asked: str
) -> None:
    await host.operations.adopt(name, backend, asked, there, Caller())


async def listed(host: Host, backend: str = "ours", **asked: str) -> Mapping[str, Any]:
    return await host.operations.adoptable(backend, asked)


def test_what_could_be_adopted(run: Run) -> None:
    """All that is there, each with the volume that it is, of this backend and party."""

    async def test(world: World) -> None:
        host = adopting(world)
        assert await listed(host) == {"x": None, "y": None, "z": None}
        await adopt(host, "x")
        await adopt(host, "mine", "y")
        await host.create("z", driver="ours")
        assert await listed(host) == {"x": "x", "y": "mine", "z": "z"}
        assert await listed(host, "other") == {"x": None, "y": None, "z": None}
        assert await listed(host, party="second") == dict.fromkeys(["x", "y", "z"])
        await host.remove("mine")
        assert await listed(host) == {"x": "x", "y": None, "z": "z"}

    run(test)


def test_an_adopted_volume(run: Run) -> None:
    """It has the options of a create that adopts it, and is that one again."""

    async def test(world: World) -> None:
        host = adopting(world)
        await adopt(host, "mine")
        volume = host.catalog.get("mine")
        assert volume.options == {"party": "first", "adopt": "x"}
        assert volume.facts == {"party": "first", "name": "x"}
        assert volume.backend == "ours"
        await adopt(host, "mine")
        await host.create("mine", driver="ours", party="first", adopt="x")
        assert host.catalog.get("mine") is volume

    run(test)


def test_one_that_is_ours_in_other_words(run: Run) -> None:
    """However it was made: what is that volume already is success."""

    async def test(world: World) -> None:
        host = adopting(world)
        await host.create("mine", driver="ours", adopt="x")
        await host.create("y", driver="ours")
        before = host.id("mine"), host.id("y")
        await adopt(host, "mine", "x")
        await adopt(host, "mine", "x", party="first")
        await adopt(host, "y", "y")
        assert (host.id("mine"), host.id("y")) == before

    run(test)


def test_a_name_of_another_volume(run: Run) -> None:
    """It is not replaced, be it of another party, backend or driver."""

    async def test(world: World) -> None:
        host = adopting(world)
        await adopt(host, "mine", "x")
        await host.create("plain", driver="plain")
        before = host.id("mine"), host.id("plain")
        with pytest.raises(AlreadyExists, match="adopt is x, asked for y"):
            await adopt(host, "mine", "y")
        with pytest.raises(AlreadyExists, match="party is first, asked for second"):
            await adopt(host, "mine", "x", party="second")
        with pytest.raises(AlreadyExists, match="driver is ours, asked for other"):
            await adopt(host, "mine", "x", "other")
        with pytest.raises(AlreadyExists, match="driver is plain, asked for ours"):
            await adopt(host, "plain", "x")
        assert (host.id("mine"), host.id("plain")) == before

    run(test)


def test_one_that_is_being_removed(run: Run) -> None:
    """It is removed first, and then adopted anew."""

    async def test(world: World) -> None:
        host = adopting(world)
        await adopt(host, "mine")
        before = host.catalog.get("mine")
        await host.store.commit(PutVolume(attrs.evolve(before, state=State.REMOVING)))
        await adopt(host, "mine")
        assert host.id("mine") not in {None, before.id}

    run(test)


def test_what_is_not_there(run: Run) -> None:
    """The error names the nearest that is; nothing is made."""

    async def test(world: World) -> None:
        host = adopting(world)
        with pytest.raises(NotFound) as caught:
            await adopt(host, "mine", "X")
        assert str(caught.value) == (
            "there is no volume 'X' to adopt; did you mean 'x'?"
        )
        with pytest.raises(InvalidArgument, match=r"volume name '\.\./x'"):
            await adopt(host, "../x")
        assert host.catalog.volumes() == []

    run(test)


def test_who_does_not_adopt(run: Run) -> None:
    """A driver that can't says so, one that is down too, and wrong options are."""

    async def test(world: World) -> None:
        host = adopting(world)
        for verb in (listed(host, "plain"), adopt(host, "v", "x", "plain")):
            with pytest.raises(Unsupported, match="driver plain adopts nothing"):
                await verb
        for verb in (listed(host, "our"), adopt(host, "v", "x", "our")):
            with pytest.raises(InvalidArgument, match="did you mean 'ours'"):
                await verb
        for verb in (listed(host, parti="x"), adopt(host, "v", parti="x")):
            with pytest.raises(InvalidArgument, match="did you mean 'party'"):
                await verb
        backend = host.backends.get("ours")
        assert backend is not None
        assert isinstance(backend.driver, Adopting)
        backend.driver.down = True
        for verb in (listed(host), adopt(host, "v")):
            with pytest.raises(Unavailable, match="it is down"):
                await verb
        assert host.catalog.volumes() == []

    run(test)
