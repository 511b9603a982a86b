"""Many calls at once: nobody sees half a change, and nobody waits for a hung driver."""

import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import pytest
from peers import mounts_below, scratch, serving
from support.client import Client, PluginError
from support.plugin import Plugin
from support.wait import eventually
from wire import connected, post

pytestmark = pytest.mark.root

NAMES: Final = [f"v{number}" for number in range(20)]
CALLS: Final = 200


@pytest.fixture
def folder() -> Iterator[Path]:
    """A place for a server."""
    with scratch() as folder:
        yield folder


def at_once(call: Callable[[int], None], count: int = CALLS) -> Counter[str]:
    """Make ``count`` calls at once; return how often each outcome came."""

    def outcome(number: int) -> str:
        try:
            call(number)
        except PluginError as error:
            return str(error).split(": ", 1)[1]
        return "ok"

    with ThreadPoolExecutor(50) as pool:
        return Counter(pool.map(outcome, range(count)))


def name_of(number: int) -> str:
    """Return the volume of a call: ten calls for each."""
    return NAMES[number % len(NAMES)]


@pytest.mark.parametrize("driver", ["local", "tmpfs"])
def test_each_verb_at_once(folder: Path, driver: str) -> None:
    """200 creates, mounts, unmounts and removes over 20 volumes, each verb at once."""
    options = {"driver": driver}
    with serving(folder) as plugin:
        client = plugin.client
        assert at_once(lambda n: client.create(name_of(n), options)) == {"ok": CALLS}
        assert sorted(client.list()) == sorted(NAMES)

        paths: set[str] = set()
        done = at_once(lambda n: paths.add(client.mount(name_of(n), f"id{n}")))
        assert done == {"ok": CALLS}
        assert paths == set(client.list().values())
        mounted = [mount.mountpoint for mount in mounts_below(folder)]
        assert sorted(mounted) == (sorted(paths) if driver == "tmpfs" else [])
        assert {client.get(name)["Status"]["mounts"] for name in NAMES} == {10}

        refused = at_once(lambda n: client.remove(name_of(n)))
        assert sum(refused.values()) == CALLS
        assert all(why.startswith("in use by 10 mounts: ") for why in refused)

        done = at_once(lambda n: client.unmount(name_of(n), f"id{n}"))
        assert done == {"ok": CALLS}
        assert mounts_below(folder) == []

        removed = at_once(lambda n: client.remove(name_of(n)))
        assert removed == {"ok": len(NAMES), "no such volume": CALLS - len(NAMES)}
        assert_nothing_left(plugin, folder)


def test_all_verbs_at_once(folder: Path) -> None:
    """Whatever meets whatever: only the errors that it explains, and nothing left."""
    rng = random.Random(20)  # which calls meet is chance enough
    with serving(folder) as plugin:
        client = plugin.client

        def work(number: int) -> None:
            name, mine = rng.choice(NAMES), f"id{number}"
            if number % 10 == 9:
                client.list()
                client.remove(name)
                return
            client.create(name, {"driver": "tmpfs" if name < "v15" else "local"})
            path = client.mount(name, mine)
            try:
                (Path(path) / mine).write_text(mine)
                assert client.get(name)["Mountpoint"] == path
                assert client.path(name) == path
                assert (Path(path) / mine).read_text() == mine
                with pytest.raises(PluginError, match="in use by"):
                    client.remove(name)
            finally:
                client.unmount(name, mine)
            if number % 3 == 0:
                client.remove(name)

        outcomes = at_once(work)
        assert outcomes["ok"] > CALLS // 4
        for outcome in outcomes:
            assert outcome in {"ok", "no such volume"} or outcome.startswith(
                "in use by"
            )
        assert mounts_below(folder) == []
        for name in client.list():
            client.remove(name)
        assert_nothing_left(plugin, folder)


def test_creates_that_race_with_other_options(folder: Path) -> None:
    """Of two creates of one name with other options, one wins and one is told."""
    with serving(folder) as plugin:
        client = plugin.client
        sizes = ["1m", "2m"]

        def create(number: int) -> None:
            options = {"driver": "tmpfs", "size": sizes[number // 20 % 2]}
            client.create(name_of(number), options)

        outcomes = at_once(create)
        assert sum(outcomes.values()) == CALLS
        assert outcomes["ok"] == CALLS // 2
        for outcome in set(outcomes) - {"ok"}:
            assert outcome.startswith("it exists with other options: size is ")
        assert {client.get(n)["Status"]["size"] for n in NAMES} <= {"1M", "2M"}
        for name in NAMES:
            client.remove(name)


def test_creates_that_race_for_a_directory(folder: Path) -> None:
    """One directory is given to one volume, whoever asks for it at once."""
    with serving(folder) as plugin:
        client, shared = plugin.client, folder / "shared"

        def create(number: int) -> None:
            inner = shared / "inner" if number % 2 else shared
            client.create(f"v{number}", {"mount": str(inner)})

        outcomes = at_once(create, 20)
        assert outcomes["ok"] == 1
        (name,) = client.list()
        client.remove(name)
        eventually(lambda: client.list() == {}, "it is released")


def test_reads_while_a_driver_hangs(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Get, List, Path and Capabilities do not wait for a Mount that hangs."""
    with serving(folder, failpoints="tmpfs.attach=sleep:3*1") as plugin:
        client = plugin.client
        for name in NAMES:
            client.create(name, {"driver": "tmpfs"})
        with ThreadPoolExecutor(1) as pool:
            mount = pool.submit(client.mount, "v0", "x")
            eventually(lambda: client.get("v0")["Status"]["mounts"], "it hangs")
            times: dict[str, list[float]] = {}
            with connected(plugin.socket) as wire:
                for _ in range(100):
                    for call in ("Get", "List", "Path", "Capabilities"):
                        began = time.perf_counter()
                        answer = wire.ask(post(call, b'{"Name":"v0"}'))
                        took = (time.perf_counter() - began) * 1000
                        assert answer.status == 200
                        times.setdefault(call, []).append(took)
            assert not mount.done(), "the reads took as long as the hung Mount"
            assert mount.result(20) == str(folder / "tmpfs" / "v0")
        with capsys.disabled():
            sys.stdout.write(f"\nms while a Mount hangs: {report(times)}\n")
        assert all(statistics.median(took) < 50 for took in times.values())
        client.unmount("v0", "x")
        for name in NAMES:
            client.remove(name)


def report(times: dict[str, list[float]]) -> str:
    """Return the median and the slowest of each call's times."""
    return ", ".join(
        f"{call} median {statistics.median(took):.2f} slowest {max(took):.2f}"
        for call, took in times.items()
    )


def test_changes_while_a_driver_hangs(folder: Path) -> None:
    """A Mount that hangs holds up its own volume; all others change as ever."""
    with serving(folder, failpoints="tmpfs.attach=sleep:2*1") as plugin:
        client = plugin.client
        for name in ("hung", "free"):
            client.create(name, {"driver": "tmpfs"})
        with ThreadPoolExecutor(2) as pool:
            mount = pool.submit(client.mount, "hung", "x")
            eventually(lambda: client.get("hung")["Status"]["mounts"], "it hangs")
            remove = pool.submit(client.remove, "hung")
            for _ in range(3):
                client.mount("free", "x")
                client.unmount("free", "x")
                client.create("more")
                client.remove("more")
            assert not mount.done()
            assert not remove.done()
            mount.result(20)
            with pytest.raises(PluginError, match="in use by 1 mount"):
                remove.result(20)
        client.unmount("hung", "x")
        for name in ("hung", "free"):
            client.remove(name)


def test_one_backend_that_hangs(folder: Path) -> None:
    """A backend whose threads all hang starves no other one."""
    names = [f"hung{number}" for number in range(12)]
    with serving(folder, failpoints="tmpfs.attach=sleep:1.5*12") as plugin:
        client = plugin.client
        for name in names:
            client.create(name, {"driver": "tmpfs"})
        with ThreadPoolExecutor(len(names)) as pool:
            mounts = [pool.submit(client.mount, name, "x") for name in names]
            eventually(
                lambda: all(client.get(n)["Status"]["mounts"] for n in names),
                "all are under way",
            )
            client.create("free")
            client.mount("free", "x")
            client.unmount("free", "x")
            client.remove("free")
            assert sorted(client.list()) == sorted(names)
            assert not any(mount.done() for mount in mounts)
            for mount in mounts:
                mount.result(20)
        release(client, names)


def release(client: Client, names: Iterable[str]) -> None:
    """Unmount and remove volumes."""
    for name in names:
        client.unmount(name, "x")
        client.remove(name)


def test_mounts_of_one_volume_at_once(folder: Path) -> None:
    """Three starts are three parallel Mounts: all wait for the one that mounts."""
    with serving(folder, failpoints="tmpfs.attach=sleep:0.5*1") as plugin:
        client = plugin.client
        client.create("v", {"driver": "tmpfs"})
        done = at_once(
            lambda n: Path(client.mount("v", f"id{n}")).joinpath("f").touch(), 8
        )
        assert done == {"ok": 8}
        assert len(mounts_below(folder)) == 1
        order = list(range(8))
        random.Random(8).shuffle(order)
        for number in order:
            assert len(mounts_below(folder)) == 1
            client.unmount("v", f"id{number}")
        assert mounts_below(folder) == []
        client.remove("v")


def assert_nothing_left(plugin: Plugin, folder: Path) -> None:
    """Hold the disk and the mount table to there being no volume any more."""
    assert plugin.client.list() == {}
    assert mounts_below(folder) == []
    local = plugin.root / "local"
    places = [local / "volumes", local / "staging", local / "adopted", folder / "tmpfs"]
    left = [path for place in places if place.exists() for path in place.iterdir()]
    assert left == []
    eventually(lambda: not any((local / "trash").iterdir()), "the trash is emptied")
