"""Shared volumes: one truth for all hosts, and a store that follows it."""

import asyncio
import logging
from pathlib import Path
from typing import Any

import attrs
import pytest
from fake_cluster import (
    CLUSTERS,
    ENGINE,
    Cluster,
    Host,
    Run,
    World,
    runner,
    until,
)

from volplugin import sharing
from volplugin.changes import Caller
from volplugin.doors import Door
from volplugin.errors import (
    AlreadyExists,
    InUse,
    InvalidArgument,
    NotFound,
    Unavailable,
)
from volplugin.model import State, Volume
from volplugin.recovery import recover
from volplugin.store.store import PutVolume, Store

GLOBAL = Door(shared_only=True)
PLAIN = Door(default_backend="plain", backends=("plain",))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a test in a world of its own."""
    return runner(tmp_path, monkeypatch)


def made(
    name: str,
    *,
    volume_id: str = "theirs",
    state: State = State.READY,
    **options: str,
) -> Volume:
    """Return a volume as another host has made it."""
    return Volume(
        name=name,
        id=volume_id,
        backend="elsewhere",
        driver="shared",
        options=options,
        mountpoint=f"/elsewhere/{name}",
        created_at="2026-01-01T00:00:00.000Z",
        state=state,
    )


def at(host: Host, name: str) -> Volume | None:
    """Return what the host has on record, also what no engine would see."""
    return host.store.volumes.get(name)


async def cut_short(host: Host, name: str, state: State) -> None:
    """Leave on record what a server that died in the middle leaves."""
    volume = attrs.evolve(host.catalog.get(name), state=state)
    await host.store.commit(PutVolume(volume))


def harm(cluster: Cluster, name: str, state: State = State.REMOVING) -> None:
    """Have the cluster say that some host was in the middle of it."""
    cluster.volumes[name] = attrs.evolve(cluster.volumes[name], state=state)


async def looks(cluster: Cluster, count: int) -> None:
    """Return after so many more looks for a volume."""
    wanted = cluster.count("find") + count
    await until(lambda: cluster.count("find") >= wanted)


async def refresh(host: Host, name: str, backend: str = "ceph") -> None:
    """Bring one volume in step, as the follower does."""
    found = host.backends.get(backend)
    assert found is not None
    async with host.changes.locks.hold(name):
        await host.core.sharing.refresh(found, name)


# Create


def test_a_volume_of_another_host_is_there_for_create(run: Run) -> None:
    """With equal options Create is success, and it is the same volume."""

    async def test(world: World) -> None:
        a, b = world.host("a"), world.host("b")
        await a.create("v", size="1G")
        await b.create("v", size="1G")
        assert a.id("v") == b.id("v")
        assert world.cluster.count("create") == 1

    run(test)


def test_a_volume_found_is_this_hosts(run: Run) -> None:
    """Its backend and mountpoint are those of the host that looks."""

    async def test(world: World) -> None:
        a, b = world.host("a"), world.host("b")
        await a.create("v")
        await b.create("v")
        volume = b.catalog.get("v")
        assert volume.backend == "ceph"
        assert volume.mountpoint == str(world.folder / "b/ceph/v")

    run(test)


def test_other_options_are_a_conflict_that_names_them(run: Run) -> None:
    """A volume of another host is held against what is asked here."""

    async def test(world: World) -> None:
        a, b = world.host("a"), world.host("b")
        await a.create("v", size="1G")
        with pytest.raises(AlreadyExists, match="size is 1G, asked for 2G"):
            await b.create("v", size="2G")

    run(test)


def test_two_hosts_create_at_once(run: Run) -> None:
    """The one that is second in the cluster ends with the volume of the first."""

    async def test(world: World) -> None:
        a, b = world.host("a"), world.host("b")
        with world.cluster.holding("create"):
            first = asyncio.create_task(a.create("v", size="1G"))
            second = asyncio.create_task(b.create("v", size="1G"))
            await until(lambda: world.cluster.count("create") == 2)
        await asyncio.gather(first, second)
        assert a.id("v") == b.id("v") == world.cluster.volumes["v"].id
        assert world.cluster.count("remove") == 1  # what the second had begun

    run(test)


def test_two_hosts_create_at_once_with_other_options(run: Run) -> None:
    """One of the two is told what the difference is, and leaves nothing."""

    async def test(world: World) -> None:
        a, b = world.host("a"), world.host("b")
        with world.cluster.holding("create"):
            tasks = [
                asyncio.create_task(a.create("v", size="1G")),
                asyncio.create_task(b.create("v", size="2G")),
            ]
            await until(lambda: world.cluster.count("create") == 2)
        done = await asyncio.gather(*tasks, return_exceptions=True)
        errors = [error for error in done if error is not None]
        assert len(errors) == 1
        assert isinstance(errors[0], AlreadyExists)
        assert "asked for" in str(errors[0])
        assert a.id("v") == b.id("v") == world.cluster.volumes["v"].id

    run(test)


def test_a_create_of_another_host_is_waited_for(run: Run) -> None:
    """While another host makes the volume, Create here waits for its outcome."""

    async def test(world: World) -> None:
        a, b = world.host("a"), world.host("b")
        with world.cluster.holding("make"):
            first = asyncio.create_task(a.create("v"))
            await until(lambda: "v" in world.cluster.volumes)
            second = asyncio.create_task(b.create("v"))
            await until(lambda: world.cluster.count("find", "v") > 3)
            assert not second.done()
            assert at(b, "v") is None
        await asyncio.gather(first, second)
        assert a.id("v") == b.id("v")

    run(test)


def test_a_create_that_fails_elsewhere_leaves_the_name(run: Run) -> None:
    """Who has waited for it makes the volume then."""

    async def test(world: World) -> None:
        host = world.host("a")
        world.cluster.put(made("v", state=State.CREATING))
        task = asyncio.create_task(host.create("v"))
        await until(lambda: world.cluster.count("find", "v") > 1)
        assert not task.done()
        world.cluster.drop("v")
        await task
        assert host.id("v") == world.cluster.volumes["v"].id != "theirs"

    run(test)


def test_what_a_dead_maker_left_is_taken_away(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A create of another host that does not move loses the name in the end."""
    monkeypatch.setattr(sharing, "UNFINISHED_LIMIT", 0.5)

    async def test(world: World) -> None:
        world.cluster.put(made("v", state=State.CREATING))
        host = world.host("a")
        await host.create("v", size="1G")
        assert host.id("v") == world.cluster.volumes["v"].id != "theirs"
        assert world.cluster.count("remove", "v") == 1

    run(test)
    assert "taken away" in caplog.text


def test_a_maker_that_finishes_in_the_end_keeps_its_volume(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is made just when it is to be taken away is the volume of that name."""
    monkeypatch.setattr(sharing, "UNFINISHED_LIMIT", 0.2)

    async def test(world: World) -> None:
        world.cluster.put(made("v", state=State.CREATING))
        world.cluster.errors["remove", "v"] = InUse("another host has made v")
        host = world.host("a")
        with world.cluster.holding("remove"):
            task = asyncio.create_task(host.create("v"))
            await until(lambda: world.cluster.count("remove", "v") == 1)
            world.cluster.put(made("v"))
        await task
        assert host.id("v") == "theirs"

    run(test)


def test_makers_that_follow_each_other_have_the_whole_limit(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another volume of the name that is being made begins the wait anew."""
    monkeypatch.setattr(sharing, "UNFINISHED_LIMIT", 1.0)
    monkeypatch.setattr(sharing, "_PAUSE", 0.05)

    async def test(world: World) -> None:
        host = world.host("a")
        world.cluster.put(made("v", volume_id="0", state=State.CREATING))
        task = asyncio.create_task(host.create("v"))
        for number in range(1, 8):
            await looks(world.cluster, 3)
            volume_id = str(number)
            world.cluster.put(made("v", volume_id=volume_id, state=State.CREATING))
        assert world.cluster.count("remove") == 0
        world.cluster.put(made("v", volume_id="7"))
        await task
        assert host.id("v") == "7"

    run(test)


def test_a_failed_create_leaves_nothing(run: Run) -> None:
    """Neither on record here nor in the cluster."""

    async def test(world: World) -> None:
        host = world.host("a")
        world.cluster.errors["make", "v"] = Unavailable("no answer")
        with pytest.raises(Unavailable, match="no answer"):
            await host.create("v")
        assert at(host, "v") is None
        assert not world.cluster.volumes

    run(test)


def test_a_create_that_could_not_be_undone_is_settled_later(run: Run) -> None:
    """Its intent stays on record until the cluster answers again."""

    async def test(world: World) -> None:
        host = world.host("a")
        world.cluster.errors["make", "v"] = Unavailable("no answer")
        world.cluster.errors["remove", "v"] = Unavailable("no answer")
        with pytest.raises(Unavailable):
            await host.create("v")
        assert host.core.unsettled() == ["v"]
        assert host.id("v") is None
        world.cluster.errors.clear()
        await host.manager.sweep()
        assert at(host, "v") is None
        assert not world.cluster.volumes

    run(test)


def test_a_volume_gone_elsewhere_is_made_anew(run: Run) -> None:
    """Create does not trust a record of a volume that another host has removed."""

    async def test(world: World) -> None:
        a, b = world.host("a"), world.host("b")
        await a.create("v")
        await b.create("v")
        await a.remove("v")
        await b.create("v", size="2G")
        assert b.id("v") == world.cluster.volumes["v"].id

    run(test)


def test_create_of_a_known_volume_while_the_cluster_is_down(run: Run) -> None:
    """What was last known of it holds, as for Get."""

    async def test(world: World) -> None:
        host = world.host("a")
        await host.create("v", size="1G")
        world.cluster.down = True
        await host.create("v", size="1G")
        with pytest.raises(AlreadyExists, match="size is 1G"):
            await host.create("v", size="2G")

    run(test)


def test_create_of_a_new_volume_while_the_cluster_is_down(run: Run) -> None:
    """It is refused before anything is on record."""

    async def test(world: World) -> None:
        host = world.host("a")
        world.cluster.down = True
        with pytest.raises(Unavailable, match="the cluster is down"):
            await host.create("v")
        assert at(host, "v") is None

    run(test)


# The same name elsewhere


def test_a_name_that_a_backend_of_this_host_has(run: Run) -> None:
    """A local volume of the name keeps it: a create in the cluster is refused."""

    async def test(world: World) -> None:
        host = world.host("a")
        await host.create("v", driver="plain")
        with pytest.raises(AlreadyExists, match="driver is plain, asked for ceph"):
            await host.create("v", driver="ceph")
        assert not world.cluster.volumes

    run(test)


def test_a_shared_volume_hidden_by_a_local_one(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    """It is told once, and shows up when the local one has gone."""

    async def test(world: World) -> None:
        host = world.host("a")
        await host.create("v", driver="plain")
        world.cluster.put(made("v"))
        for _ in range(3):
            await refresh(host, "v")
        assert host.catalog.get("v").backend == "plain"
        told = [r for r in caplog.records if "hidden by" in str(vars(r).get("fields"))]
        assert len(told) == 1
        await host.remove("v")
        await refresh(host, "v")
        assert host.id("v") == "theirs"

    run(test)


def test_a_name_that_two_clusters_have(run: Run) -> None:
    """The one known first stays; what the other says never touches it."""

    async def test(world: World) -> None:
        host = world.host("a", far={"driver": "shared", "cluster": "two"})
        world.cluster.put(made("v", volume_id="near"))
        await refresh(host, "v")
        CLUSTERS["two"].put(made("v", volume_id="far"))
        await refresh(host, "v", "far")
        assert host.id("v") == "near"
        CLUSTERS["two"].drop("v")
        await refresh(host, "v", "far")
        assert host.id("v") == "near"
        with pytest.raises(AlreadyExists, match="driver is ceph, asked for far"):
            await host.create("v", driver="far")

    run(test)


def test_a_name_freed_in_another_cluster(run: Run) -> None:
    """Create in one looks into the other that had the name, as this host knows."""

    async def test(world: World) -> None:
        host = world.host("a", far={"driver": "shared", "cluster": "two"})
        world.cluster.put(made("v"))
        await refresh(host, "v")
        world.cluster.muted = True
        world.cluster.drop("v")
        await host.create("v", driver="far")
        assert host.catalog.get("v").backend == "far"
        assert CLUSTERS["two"].volumes["v"].id == host.id("v")

    run(test)


# Refresh


def test_what_others_make_is_taken_note_of(run: Run) -> None:
    """A volume that is ready is shown; one being made is not."""

    async def test(world: World) -> None:
        host = world.host("a")
        world.cluster.put(made("v", state=State.CREATING))
        await refresh(host, "v")
        assert at(host, "v") is None
        world.cluster.put(made("v"))
        await refresh(host, "v")
        assert host.id("v") == "theirs"

    run(test)


def test_what_others_remove_is_forgotten(run: Run) -> None:
    """With its mounts and all that was parsed and measured of it."""

    async def test(world: World) -> None:
        host = world.host("a")
        world.cluster.put(made("v"))
        await refresh(host, "v")
        await host.mount("v")
        await host.unmount("v")
        host.catalog.spec(host.catalog.get("v"))
        world.cluster.drop("v")
        await refresh(host, "v")
        assert at(host, "v") is None
        assert "v" not in host.store.mounts
        assert not host.catalog._specs
        with pytest.raises(NotFound):
            host.manager.get("v")

    run(test)


def test_a_volume_made_anew_elsewhere(run: Run) -> None:
    """It takes the older one's place in one step, and no parsed option is mixed up."""

    async def test(world: World) -> None:
        host = world.host("a")
        world.cluster.put(made("v", size="1G"))
        await refresh(host, "v")
        assert host.manager.get("v")[1]["size"] == "1G"
        world.cluster.put(made("v", volume_id="new", size="2G"))
        await refresh(host, "v")
        assert host.id("v") == "new"
        assert host.manager.get("v")[1]["size"] == "2G"
        assert set(host.catalog._specs) == {"new"}

    run(test)


def test_a_volume_made_anew_is_so_after_a_restart(run: Run) -> None:
    """The store's file says what its memory says, mounts of the old one gone."""

    async def test(world: World) -> None:
        host = world.host("a")
        world.cluster.put(made("v"))
        await refresh(host, "v")
        await host.mount("v")
        await host.unmount("v")
        world.cluster.put(made("v", volume_id="new"))
        await refresh(host, "v")
        volumes, mounts = dict(host.store.volumes), dict(host.store.mounts)
        await world.end(host)
        store = Store(str(world.folder / "a/store"))
        assert dict(store.volumes) == volumes
        assert dict(store.mounts) == mounts == {}
        store.close()

    run(test)


def test_a_resize_elsewhere(run: Run) -> None:
    """The record follows, also while the volume is in use here."""

    async def test(world: World) -> None:
        host = world.host("a")
        world.cluster.put(made("v", size="1G"))
        await refresh(host, "v")
        await host.mount("v")
        world.cluster.put(made("v", size="2G"))
        await refresh(host, "v")
        assert host.manager.get("v")[1]["size"] == "2G"
        assert host.manager.get("v")[1]["mounts"] == 1
        await host.unmount("v")

    run(test)


@pytest.mark.parametrize("again", [False, True])
def test_removed_elsewhere_and_in_use_here(
    run: Run, again: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """It stays on record until nobody here has it, and that is told once."""

    async def test(world: World) -> None:
        host = world.host("a")
        world.cluster.put(made("v"))
        await refresh(host, "v")
        await host.mount("v")
        world.cluster.drop("v")
        if again:
            world.cluster.put(made("v", volume_id="new"))
        for _ in range(3):
            await refresh(host, "v")
        assert host.id("v") == "theirs"
        told = [
            r for r in caplog.records if "in use here" in str(vars(r).get("fields"))
        ]
        assert len(told) == 1
        await host.unmount("v")
        await refresh(host, "v")
        assert host.id("v") == ("new" if again else None)

    run(test)


def test_what_differs_in_nothing_is_not_written(run: Run) -> None:
    """A look at volumes that are as they were changes no record."""

    async def test(world: World) -> None:
        host = world.host("a")
        await host.create("v", size="1G")
        generation = host.store.generation
        await refresh(host, "v")
        assert host.store.generation == generation

    run(test)


def test_a_removal_under_way_is_left_alone(run: Run) -> None:
    """What this host removes is not shown again while the cluster still has it."""

    async def test(world: World) -> None:
        host = world.host("a")
        await host.create("v")
        await cut_short(host, "v", State.REMOVING)
        harm(world.cluster, "v")
        await refresh(host, "v")
        assert host.catalog.get("v").state is State.REMOVING
        await host.manager.sweep()
        assert at(host, "v") is None
        assert not world.cluster.volumes

    run(test)


def test_a_removal_elsewhere_is_no_removal_here(run: Run) -> None:
    """Until the volume is gone it is there: if that host dies, this one can finish."""

    async def test(world: World) -> None:
        host = world.host("a")
        world.cluster.put(made("v", state=State.REMOVING))
        await refresh(host, "v")
        assert host.catalog.get("v").state is State.READY
        await host.remove("v")
        assert not world.cluster.volumes

    run(test)


@pytest.mark.parametrize("state", [State.CREATING, State.REMOVING])
def test_what_was_cut_short_long_ago_harms_nobody(
    run: Run, state: State, caplog: pytest.LogCaptureFixture
) -> None:
    """A volume that others have had ready since is kept, and is ready here too."""

    async def test(world: World) -> None:
        a, b = world.host("a"), world.host("b")
        await a.create("v")
        await b.create("v")
        await cut_short(a, "v", state)
        await b.mount("v")  # and writes
        await b.unmount("v")
        await a.manager.sweep()
        assert a.catalog.get("v") == world.cluster.drivers[0]._ours(
            world.cluster.volumes["v"]
        )
        assert world.cluster.count("remove") == 0

    run(test)
    assert "kept: other hosts have had it ready since" in caplog.text


@pytest.mark.parametrize("state", [State.CREATING, State.REMOVING])
@pytest.mark.parametrize("harmed", [State.CREATING, State.REMOVING])
def test_what_is_harmed_is_taken_away(run: Run, state: State, harmed: State) -> None:
    """Half made or half removed, nobody has it: what was begun is carried on."""

    async def test(world: World) -> None:
        host = world.host("a")
        await host.create("v")
        await cut_short(host, "v", state)
        harm(world.cluster, "v", harmed)
        await host.manager.sweep()
        assert at(host, "v") is None
        assert not world.cluster.volumes

    run(test)


def test_a_removal_that_is_asked_for_again(run: Run) -> None:
    """Who asks now means what is there now: it is removed, whole or not."""

    async def test(world: World) -> None:
        host = world.host("a")
        await host.create("v")
        await cut_short(host, "v", State.REMOVING)
        await host.remove("v")
        assert at(host, "v") is None
        assert not world.cluster.volumes

    run(test)


def test_a_create_on_what_was_cut_short(run: Run) -> None:
    """It ends with the volume that is there, or makes it anew where it is harmed."""

    async def test(world: World) -> None:
        host = world.host("a")
        await host.create("v")
        first = host.id("v")
        await cut_short(host, "v", State.CREATING)
        await host.create("v")
        assert host.id("v") == first
        await cut_short(host, "v", State.CREATING)
        harm(world.cluster, "v", State.CREATING)
        await host.create("v")
        assert host.id("v") == world.cluster.volumes["v"].id != first

    run(test)


def test_a_resize_cut_short_is_left_to_the_sweep(run: Run) -> None:
    """The record of a volume with a pending resize is not overwritten."""

    async def test(world: World) -> None:
        host = world.host("a")
        await host.create("v", size="1G")
        pending = attrs.evolve(host.catalog.get("v"), pending={"size": "2G"})
        await host.store.commit(PutVolume(pending))
        await refresh(host, "v")
        assert host.catalog.get("v") == pending
        await host.manager.sweep()
        assert host.catalog.get("v").options == {"size": "2G"}
        assert world.cluster.volumes["v"].options == {"size": "2G"}

    run(test)


def test_a_resize_cut_short_of_a_volume_that_is_gone(run: Run) -> None:
    """There is nothing left to finish: the record goes with the volume."""

    async def test(world: World) -> None:
        host = world.host("a")
        await host.create("v", size="1G")
        pending = attrs.evolve(host.catalog.get("v"), pending={"size": "2G"})
        await host.store.commit(PutVolume(pending))
        world.cluster.drop("v")
        await refresh(host, "v")
        assert at(host, "v") is None

    run(test)


# Remove and mount


def test_removed_here_of_what_another_host_has(run: Run) -> None:
    """The refusal of the cluster leaves the volume as it was."""

    async def test(world: World) -> None:
        a, b = world.host("a"), world.host("b")
        await a.create("v")
        await b.create("v")
        await a.mount("v")
        with pytest.raises(InUse, match="host a has it"):
            await b.remove("v")
        assert b.catalog.get("v").state is State.READY
        await a.unmount("v")
        await b.remove("v")
        assert not world.cluster.volumes

    run(test)


def test_removing_what_is_gone_is_success(run: Run) -> None:
    """Another host was quicker."""

    async def test(world: World) -> None:
        a, b = world.host("a"), world.host("b")
        await a.create("v")
        await b.create("v")
        await a.remove("v")
        await b.remove("v")
        assert at(b, "v") is None

    run(test)


def test_an_old_record_removes_no_new_volume(run: Run) -> None:
    """Ids tell two volumes of one name apart."""

    async def test(world: World) -> None:
        host = world.host("a")
        await host.create("v")
        world.cluster.put(made("v", volume_id="new"))
        await host.remove("v")
        assert world.cluster.volumes["v"].id == "new"

    run(test)


# Clones


async def source_gone(host: Host, cluster: Cluster) -> str:
    return "there is no volume 'v'"


async def source_misspelt(host: Host, cluster: Cluster) -> str:
    await host.create("vv")
    return "did you mean"


async def source_elsewhere(host: Host, cluster: Cluster) -> str:
    await host.create("v", driver="plain")
    return "v is a volume of backend plain"


async def source_going(host: Host, cluster: Cluster) -> str:
    await host.create("v")
    removing = attrs.evolve(host.catalog.get("v"), state=State.REMOVING)
    await host.store.commit(PutVolume(removing))
    return "from=v: v is being removed"


async def source_coming(host: Host, cluster: Cluster) -> str:
    await host.create("v")
    creating = attrs.evolve(host.catalog.get("v"), state=State.CREATING)
    await host.store.commit(PutVolume(creating))
    return "there is no volume 'v'"


@pytest.mark.parametrize(
    "prepare",
    [source_gone, source_misspelt, source_elsewhere, source_going, source_coming],
)
def test_a_copy_of_what_can_not_be_copied(run: Run, prepare: Any) -> None:
    """It is refused with the reason, and nothing of the copy is left."""

    async def test(world: World) -> None:
        host = world.host("a")
        reason = await prepare(host, world.cluster)
        with pytest.raises(InvalidArgument) as caught:
            await host.create("copy", from_="v")
        assert reason in str(caught.value)
        assert at(host, "copy") is None
        assert "copy" not in world.cluster.volumes

    run(test)


@pytest.mark.parametrize("wanted", ["v", "v@then"])
def test_a_copy(run: Run, wanted: str) -> None:
    """The driver plans it and gets the source; the same create again is success."""

    async def test(world: World) -> None:
        host = world.host("a")
        await host.create("v")
        await host.operations.take_snapshot("v", "then", Caller())
        await host.create("copy", from_=wanted)
        await host.create("copy", from_=wanted)
        assert host.catalog.get("copy").options == {"from": wanted}
        snapshot = wanted.partition("@")[2] or None
        assert world.cluster.count("plan_clone", f"v@{snapshot}") == 1
        with pytest.raises(AlreadyExists, match="from is v"):
            await host.create("copy")

    run(test)


def test_a_copy_is_only_made_by_a_driver_that_copies(run: Run) -> None:
    """An option ``from`` of another driver is that driver's own affair."""

    async def test(world: World) -> None:
        host = world.host("a")
        await host.create("v", driver="plain", from_="nothing")
        assert host.catalog.get("v").options == {"from": "nothing"}

    run(test)


# Doors


def test_a_global_door_makes_shared_volumes_alone(run: Run) -> None:
    """An engine takes its volumes for those of every host."""

    async def test(world: World) -> None:
        host = world.host("a")
        await host.create("shared", GLOBAL)
        with pytest.raises(InvalidArgument, match="driver=plain: this socket serves"):
            await host.create("mine", GLOBAL, driver="plain")
        assert at(host, "mine") is None

    run(test)


def test_a_global_door_shows_shared_volumes_alone(run: Run) -> None:
    """What is this host's alone does not exist there, for no verb."""

    async def test(world: World) -> None:
        host = world.host("a")
        await host.create("shared")
        await host.create("mine", driver="plain")
        manager = host.manager
        assert [v.name for v in manager.volumes(GLOBAL)] == ["shared"]
        assert len(manager.volumes()) == 2
        for look in (manager.get, manager.path):
            look("shared", GLOBAL)
            with pytest.raises(NotFound):
                look("mine", GLOBAL)
        with pytest.raises(NotFound):
            await manager.remove("mine", ENGINE, Caller(), GLOBAL)
        with pytest.raises(NotFound):
            await manager.mount("mine", "id", ENGINE, Caller(), GLOBAL)
        assert await manager.mount("shared", "id", ENGINE, Caller(), GLOBAL)
        await manager.unmount("shared", "id", ENGINE, Caller())
        await manager.remove("shared", ENGINE, Caller(), GLOBAL)

    run(test)


def test_a_door_of_some_backends_makes_no_others(run: Run) -> None:
    """What it refuses is named, with what it takes; its help lists no more."""

    async def test(world: World) -> None:
        host = world.host("a")
        with pytest.raises(InvalidArgument) as caught:
            await host.create("v", PLAIN, driver="ceph")
        assert str(caught.value) == (
            "driver=ceph: this socket serves volumes of plain alone: use another "
            "socket for those of ceph"
        )
        with pytest.raises(InvalidArgument, match="driver=krbd: this socket serves"):
            await host.create("v", PLAIN, driver="krbd")
        with pytest.raises(InvalidArgument) as caught:
            await host.create("v", PLAIN, driver="plian")
        assert str(caught.value) == (
            "driver=plian: there is no such driver or backend; did you mean 'plain'?; "
            "there are plain"
        )
        with pytest.raises(InvalidArgument, match="driver=ceph: this socket serves"):
            await host.create("v", PLAIN, driver="ceph", help="")
        with pytest.raises(InvalidArgument) as caught:
            await host.create("v", PLAIN, help="")
        assert str(caught.value).startswith("options of driver plain:")
        assert "ceph" not in str(caught.value)
        assert at(host, "v") is None
        await host.create("v", PLAIN)
        assert host.catalog.get("v").backend == "plain"

    run(test)


def test_a_door_of_some_backends_shows_no_others(run: Run) -> None:
    """They do not exist there, for no verb; but Unmount is always possible."""

    async def test(world: World) -> None:
        host = world.host("a")
        await host.create("shared")
        await host.create("mine", PLAIN)
        manager = host.manager
        assert [v.name for v in manager.volumes(PLAIN)] == ["mine"]
        for look in (manager.get, manager.path):
            look("mine", PLAIN)
            with pytest.raises(NotFound):
                look("shared", PLAIN)
        with pytest.raises(NotFound):
            await manager.remove("shared", ENGINE, Caller(), PLAIN)
        with pytest.raises(NotFound):
            await manager.mount("shared", "id", ENGINE, Caller(), PLAIN)
        assert not host.catalog.mounts("shared").holders
        await manager.mount("shared", "id", ENGINE, Caller())
        await manager.unmount("shared", "id", ENGINE, Caller())
        await manager.remove("mine", ENGINE, Caller(), PLAIN)
        assert at(host, "shared") is not None

    run(test)


@pytest.mark.parametrize("door", ["plain", "global"])
def test_a_name_that_a_door_does_not_show_is_taken(run: Run, door: str) -> None:
    """Whoever can't see the volume is told of it, and of the way out."""

    async def test(world: World) -> None:
        host = world.host("a")
        theirs, ours = ("ceph", "plain") if door == "plain" else ("plain", "ceph")
        await host.create("v", driver=theirs)
        with pytest.raises(AlreadyExists) as caught:
            await host.create("v", PLAIN if door == "plain" else GLOBAL, driver=ours)
        assert str(caught.value) == (
            f"a volume of backend {theirs} has this name, which this socket does not "
            f"show: choose another name, or remove that one through a socket that "
            f"serves {theirs}"
        )
        assert host.catalog.get("v").backend == theirs

    run(test)


def test_what_a_door_shows_is_looked_at_in_its_turn(run: Run) -> None:
    """A volume replaced while a Remove waits is judged as it is then."""

    async def test(world: World) -> None:
        host = world.host("a")
        await host.create("v", PLAIN)
        async with host.changes.locks.hold("v"):
            removing = asyncio.create_task(
                host.manager.remove("v", ENGINE, Caller(), PLAIN)
            )
            await until(lambda: host.changes.locks.waiting("v") == 2)
            now = attrs.evolve(host.catalog.get("v"), backend="ceph", driver="shared")
            await host.store.commit(PutVolume(now))
        with pytest.raises(NotFound):
            await removing
        assert at(host, "v") == now

    run(test)


def test_a_door_has_a_default_of_its_own(run: Run) -> None:
    """It goes before everyone's default, and after what the user names."""

    async def test(world: World) -> None:
        host = world.host("a")
        door = Door(default_backend="plain")
        await host.create("one", door)
        await host.create("two", door, driver="ceph")
        await host.create("three")
        backends = {v.name: v.backend for v in host.manager.volumes()}
        assert backends == {"one": "plain", "two": "ceph", "three": "ceph"}
        with pytest.raises(InvalidArgument, match="options of driver plain"):
            await host.create("x", door, help="")

    run(test)


def test_an_alias_names_the_backend(run: Run) -> None:
    """Also where its help is asked for."""

    async def test(world: World) -> None:
        host = world.host("a")
        await host.create("v", driver="krbd")
        assert host.catalog.get("v").backend == "ceph"
        with pytest.raises(InvalidArgument, match="options of driver shared"):
            await host.create("x", driver="krbd", help="")

    run(test)


# Start and Get


def test_a_start_asks_no_cluster(run: Run) -> None:
    """What is unfinished is left to the sweep: others must not wait for a cluster."""

    async def test(world: World) -> None:
        host = world.host("a")
        await host.create("v")
        await host.create("w", driver="plain")
        for name in ("v", "w"):
            await cut_short(host, name, State.REMOVING)
        harm(world.cluster, "v")
        await world.end(host)
        world.cluster.down = True
        again = world.host("a")
        asked = len(world.cluster.calls)
        await recover(again.core)
        assert len(world.cluster.calls) == asked
        assert set(again.store.volumes) == {"v"}
        world.cluster.down = False
        await again.manager.sweep()
        assert not again.store.volumes
        assert not world.cluster.volumes

    run(test)


def test_a_start_detaches_nothing_by_itself(run: Run) -> None:
    """What nobody holds any more is noted, and detached by the sweep."""

    async def test(world: World) -> None:
        host = world.host("a")
        await host.create("v")
        world.cluster.errors["detach", "v"] = Unavailable("no answer")
        await host.mount("v")
        with pytest.raises(Unavailable):
            await host.unmount("v")
        await world.end(host)
        again = world.host("a")
        asked = world.cluster.count("detach")
        await recover(again.core)
        assert world.cluster.count("detach") == asked
        assert again.core.unsettled() == ["v"]
        world.cluster.errors.clear()
        await again.manager.sweep()
        assert not world.cluster.holders
        assert again.core.unsettled() == []

    run(test)


def test_get_never_waits_for_the_cluster(run: Run) -> None:
    """While all calls hang, known volumes are in Get and in List."""

    async def test(world: World) -> None:
        host = world.host("a")
        await host.create("v")
        with world.cluster.holding("find", "attach"):
            waiting = [
                asyncio.create_task(host.create("w")),
                asyncio.create_task(host.mount("v")),
            ]
            await until(world.cluster.begun["attach"].is_set)
            assert host.manager.get("v")[1]["cluster"] == "ok"
            assert [v.name for v in host.manager.volumes()] == ["v"]
            with pytest.raises(NotFound):
                host.manager.get("w")
        await asyncio.gather(*waiting)
        await host.unmount("v")

    run(test)


def test_a_look_and_a_create_do_not_wait_for_each_other(run: Run) -> None:
    """Both take the volume's lock, one after the other, and hold no other."""

    async def test(world: World) -> None:
        host = world.host("a")
        work = [
            change
            for number in range(20)
            for change in (host.create(f"v{number % 4}"), refresh(host, f"v{number}"))
        ]
        await asyncio.gather(*work)
        assert {v.name for v in host.manager.volumes()} == {"v0", "v1", "v2", "v3"}

    run(test)


def test_errors_are_told_with_what_they_are(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    """A failed undo is logged as an error, not raised over the first one."""
    caplog.set_level(logging.ERROR)

    async def test(world: World) -> None:
        host = world.host("a")
        world.cluster.errors["make", "v"] = InvalidArgument("no such pool")
        world.cluster.errors["remove", "v"] = Unavailable("no answer")
        with pytest.raises(InvalidArgument, match="no such pool"):
            await host.create("v")
        world.cluster.errors.clear()

    run(test)
    assert [r.getMessage() for r in caplog.records] == [
        "undo failed, to be tried again"
    ]


def test_two_backends_that_are_one_cluster(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    """One volume is one volume: it stays that of the backend that has shown it."""

    async def test(world: World) -> None:
        host = world.host("a", again={"driver": "shared", "user": "other"})
        world.cluster.put(made("v"))
        await refresh(host, "v")
        await refresh(host, "v", "again")
        assert host.catalog.get("v").backend == "ceph"

    run(test)
    assert "hidden" not in str([vars(record) for record in caplog.records])
