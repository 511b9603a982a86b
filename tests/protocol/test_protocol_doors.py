"""Sockets with a backend and a scope of their own, and a cluster that is not there."""

import asyncio
import contextlib
import json
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Final

import attrs
import pytest
from peers import scratch, with_tmpfs
from support.client import Client, PluginError
from support.plugin import Plugin, plugin_environment
from support.require import missing
from support.wait import eventually

from volplugin.ceph.bindings import load
from volplugin.errors import Unsupported
from volplugin.model import State, Volume
from volplugin.store.store import PutVolume, Store

pytestmark = pytest.mark.root

LIMIT: Final = 2  # seconds for an operation of the cluster


@attrs.frozen
class Doors:
    """A server with three sockets, on a cluster that answers nobody."""

    plugin: Plugin
    everyone: Client
    here: Client  # its default backend is tmpfs
    globe: Client  # of scope global, its default backend is ceph


@contextlib.contextmanager
def silent() -> Iterator[int]:
    """A port where whoever connects waits for ever, as for a monitor that hangs."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(64)
        yield listening.getsockname()[1]


def configuration(folder: Path, *, user: str = "nobody") -> str:
    """Return the sockets and the backend, and tmpfs volumes below ``folder``."""
    return with_tmpfs(
        folder,
        f"""
sweep-interval = 0.2
follow-interval = 0.5

[timeouts]
drain = 5

[socket.here]
path = "{folder}/here.sock"
default-backend = "tmpfs"

[socket.globe]
path = "{folder}/globe.sock"
default-backend = "ceph"
scope = "global"

[backend.ceph]
driver = "rbd"
conf = "{folder}/ceph.conf"
user = "{user}"
pool = "volumes"
timeout = {LIMIT}
""",
    )


def doors_of(folder: Path) -> Doors:
    """Return a server that is not started yet."""
    paths = [folder / "here.sock", folder / "globe.sock"]
    arguments = [word for path in paths for word in ("--socket", str(path))]
    plugin = Plugin(folder, config=configuration(folder), arguments=arguments)
    here, globe = (Client(path) for path in paths)
    return Doors(plugin, plugin.client, here, globe)


def plant(folder: Path, state: State = State.READY) -> None:
    """Leave in the store what an earlier life knew of a shared volume."""
    volume = Volume(
        name="shared",
        id="5f" * 16,
        backend="ceph",
        driver="rbd",
        facts={
            "pool": "volumes",
            "image": "shared.5f5f5f5f5f5f",
            "fs": "ext4",
            "size": "1073741824",
        },
        mountpoint=f"{folder}/root/ceph/shared",
        created_at="2026-01-01T00:00:00.000Z",
        state=state,
    )

    async def put() -> None:
        store = Store(str(folder / "root" / "store"))
        await store.commit(PutVolume(volume))
        store.close()

    (folder / "root").mkdir(exist_ok=True)
    asyncio.run(put())


@pytest.fixture(scope="module")
def monitor() -> Iterator[int]:
    """The port of what never answers."""
    try:
        load("rados")
    except Unsupported as error:
        missing(str(error))
    with silent() as port:
        yield port


def silence(folder: Path, port: int) -> None:
    """Write the conf of the cluster."""
    (folder / "ceph.conf").write_text(
        f"[global]\nmon_host = [v2:127.0.0.1:{port}]\nauth_client_required = none\n"
    )


@pytest.fixture
def folder(monitor: int) -> Iterator[Path]:
    """A place for a server, whose cluster answers nobody."""
    with scratch() as folder:
        silence(folder, monitor)
        yield folder


@pytest.fixture(scope="module")
def doors(monitor: int) -> Iterator[Doors]:
    """A server that runs and knows a shared volume, for tests that end neither."""
    with scratch() as folder:
        silence(folder, monitor)
        plant(folder)
        found = doors_of(folder)
        with contextlib.closing(found.plugin):
            found.plugin.start()
            yield found


def reloaded(plugin: Plugin, times: int) -> bool:
    """Tell whether the server has taken over so many configurations."""
    return plugin.log.count("configuration reloaded") == times


def warnings(plugin: Plugin) -> list[str]:
    """Return the log's warnings of a cluster that is not followed."""
    lines = plugin.log.splitlines()
    return [line for line in lines if "not followed" in line and '"warning"' in line]


# What each socket serves


def test_each_socket_tells_its_scope(doors: Doors) -> None:
    """Swarm takes volumes of scope global for the same ones on every host."""
    scopes = [
        each.ask("Capabilities", {})["Capabilities"]["Scope"]
        for each in (doors.everyone, doors.here, doors.globe)
    ]
    assert scopes == ["local", "local", "global"]


def test_each_socket_has_its_default(doors: Doors) -> None:
    """A volume that names no driver is made by that of the socket it comes from."""
    doors.everyone.create("one")
    doors.here.create("two")
    doors.here.create("three", {"driver": "local"})
    kinds = [
        doors.everyone.get(name)["Status"]["backend"]
        for name in ("one", "two", "three")
    ]
    assert kinds == ["local", "tmpfs", "local"]
    with pytest.raises(PluginError, match=r"no monitor of .* answered within 2 s"):
        doors.globe.create("four")
    for name in ("one", "two", "three"):
        doors.here.remove(name)


def test_help_is_of_the_sockets_driver(doors: Doors) -> None:
    """``-o help`` tells what a create there would take."""
    for client, driver in [
        (doors.everyone, "local"),
        (doors.here, "tmpfs"),
        (doors.globe, "rbd"),
    ]:
        with pytest.raises(PluginError, match=f"options of driver {driver}:"):
            client.create("x", {"help": ""})


@pytest.mark.parametrize(
    ("name", "driver"),
    [("ceph", "rbd"), ("rbd", "rbd"), ("cephfs", "cephfs"), ("local", "local")],
)
def test_help_of_any_driver(doors: Doors, name: str, driver: str) -> None:
    """At once, whatever the cluster does."""
    with pytest.raises(PluginError, match=f"options of driver {driver}:") as caught:
        doors.everyone.create("x", {"driver": name, "help": ""})
    assert "from" in str(caught.value) or driver != "rbd"


def test_a_global_socket_shows_no_volume_of_this_host(doors: Doors) -> None:
    """There it does not exist: not for Get, List, Path, Mount or Remove."""
    doors.everyone.create("mine")
    assert set(doors.everyone.list()) == set(doors.here.list()) == {"mine", "shared"}
    assert set(doors.globe.list()) == {"shared"}
    for call in ("Get", "Path", "Remove", "Mount"):
        with pytest.raises(PluginError, match="no such volume"):
            doors.globe.ask(call, {"Name": "mine", "ID": "1"})
    assert doors.globe.get("shared")["Status"]["driver"] == "rbd"
    assert doors.globe.path("shared") == doors.everyone.path("shared")
    doors.everyone.remove("mine")


def test_a_global_socket_makes_no_volume_of_this_host(doors: Doors) -> None:
    """It is told where to make it instead."""
    for driver in ("local", "tmpfs", "quota"):
        with pytest.raises(PluginError) as caught:
            doors.globe.create("mine", {"driver": driver})
        assert f"driver={driver}: this socket serves volumes of clusters" in str(
            caught.value
        )
    assert "mine" not in doors.everyone.list()


def test_a_list_is_each_sockets_own(doors: Doors) -> None:
    """Also while volumes come and go: no answer is kept for another socket."""
    for number in range(3):
        doors.here.create(f"v{number}")
        names = {f"v{n}" for n in range(number + 1)}
        assert set(doors.globe.list()) == {"shared"}
        assert set(doors.everyone.list()) == names | {"shared"}
    for number in range(3):
        doors.everyone.remove(f"v{number}")
        assert f"v{number}" not in doors.here.list()


# A cluster that does not answer


def test_a_start_without_the_cluster(folder: Path) -> None:
    """The sockets answer at once; what was known is in Get and List."""
    plant(folder)
    doors = doors_of(folder)
    with contextlib.closing(doors.plugin):
        doors.plugin.start()
        for client in (doors.everyone, doors.globe):
            assert "shared" in client.list()
            volume = client.get("shared")
            assert volume["CreatedAt"] == "2026-01-01T00:00:00.000Z"
        doors.everyone.create("v")
        doors.everyone.mount("v", "1")
        doors.everyone.unmount("v", "1")
        eventually(lambda: warnings(doors.plugin), "the trouble is told")
        health = doors.everyone.get("shared")["Status"]["cluster"]
        assert health.startswith("unreachable since ")
        with pytest.raises(PluginError, match="no monitor of"):
            doors.globe.create("w")  # as long as another look of the follower
        assert len(warnings(doors.plugin)) == 1
        served, _, _ = doors.plugin.log.partition("no monitor of")
        assert '"event":"serving"' in served


@pytest.mark.parametrize("state", [State.CREATING, State.REMOVING])
def test_what_is_unfinished_waits_for_the_cluster(folder: Path, state: State) -> None:
    """It holds up no start and nobody else, and is told of once."""
    plant(folder, state)
    doors = doors_of(folder)
    with contextlib.closing(doors.plugin):
        doors.plugin.start()
        doors.everyone.create("v")
        eventually(lambda: "not settled" in doors.plugin.log, "the sweep has tried")
        assert ("shared" in doors.everyone.list()) == (state is State.REMOVING)
        assert doors.plugin.log.count("not settled") == 1


def test_a_mount_that_waits_for_the_cluster(folder: Path) -> None:
    """It fails with the reason, and nothing else waits with it."""
    plant(folder)
    doors = doors_of(folder)
    with contextlib.closing(doors.plugin), ThreadPoolExecutor(1) as pool:
        doors.plugin.start()
        mounting = pool.submit(doors.globe.call, "Mount", {"Name": "shared", "ID": "1"})
        slowest = 0.0
        while not mounting.done():
            begun = time.monotonic()
            assert doors.everyone.get("shared")["Name"] == "shared"
            assert "shared" in doors.globe.list()
            slowest = max(slowest, time.monotonic() - begun)
        status, answer = mounting.result()
        assert status == 500
        assert "no monitor of" in answer["Err"]
        assert slowest < LIMIT


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_end_does_not_wait_for_the_cluster(
    folder: Path, number: signal.Signals
) -> None:
    """Calls under way get their drain; then the server ends, connected or not."""
    plant(folder)
    doors = doors_of(folder)
    with contextlib.closing(doors.plugin), ThreadPoolExecutor(1) as pool:
        doors.plugin.start()
        mounting = pool.submit(doors.globe.call, "Mount", {"Name": "shared", "ID": "1"})
        eventually(
            lambda: doors.everyone.get("shared")["Status"]["attached"], "it is mounting"
        )
        doors.plugin.signal(number)
        assert doors.plugin.wait(30) == 0
        assert mounting.result()[0] == 500


def test_a_reload_with_another_cluster(folder: Path) -> None:
    """The old connection goes when its calls have ended; all sockets answer on."""
    plant(folder)
    doors = doors_of(folder)
    with contextlib.closing(doors.plugin):
        doors.plugin.start()
        for number, user in enumerate(("other", "other", "third"), 1):
            doors.plugin.config.write_text(configuration(folder, user=user))
            doors.plugin.signal(signal.SIGHUP)
            eventually(partial(reloaded, doors.plugin, number), "it is reloaded")
            assert set(doors.globe.list()) == {"shared"}
        with pytest.raises(PluginError, match="no monitor of"):
            doors.globe.create("v")
        assert "let go of" not in doors.plugin.log


# The configuration


def printed(folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    """Run ``volplugin config`` on ``text``."""
    plugin = Plugin(folder, config=text)
    command = plugin.command("config")
    return subprocess.run(
        command,
        env=plugin_environment(),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_the_configuration_is_printed(folder: Path) -> None:
    """What is printed makes the same configuration, sockets and all."""
    done = printed(folder, configuration(folder))
    assert done.returncode == 0, done.stderr
    assert 'default-backend = "ceph"\nscope = "global"\n' in done.stdout
    assert '[backend.ceph]\ndriver = "rbd"\n' in done.stdout
    again = printed(folder, done.stdout)
    assert again.returncode == 0, again.stderr
    assert again.stdout == done.stdout


def test_a_global_socket_of_a_local_backend(folder: Path) -> None:
    """It is refused before anything starts."""
    done = printed(folder, '[socket.s]\npath = "/s"\nscope = "global"\n')
    assert done.returncode == 78
    assert "give it a default-backend of driver cephfs or rbd" in done.stderr


def test_the_other_name_of_the_driver(folder: Path) -> None:
    """``[backend.ceph]`` needs no driver, and is none but of block devices."""
    done = printed(folder, "[backend.ceph]\npool = 'volumes'\n")
    assert '[backend.ceph]\ndriver = "rbd"\n' in done.stdout
    done = printed(folder, "[backend.ceph]\ndriver = 'local'\n")
    assert done.returncode == 78
    assert "a backend with a driver's name is of that driver" in done.stderr


def test_answers_are_json(doors: Doors) -> None:
    """The body of Capabilities is what engines parse."""
    answer = doors.globe.request("/VolumeDriver.Capabilities", b"")
    assert json.loads(answer.body) == {"Capabilities": {"Scope": "global"}}
