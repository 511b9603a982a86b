"""Sockets of some backends alone: what is made, shown and refused there."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest
from peers import scratch, with_tmpfs
from support.client import Client, PluginError
from support.plugin import Plugin, plugin_environment

pytestmark = pytest.mark.root


@attrs.frozen
class Sockets:
    """A server with three sockets."""

    plugin: Plugin
    everyone: Client
    memory: Client  # of tmpfs alone
    disk: Client  # of local and quota, by default local


def configuration(folder: Path) -> str:
    """Return the sockets, and tmpfs volumes below ``folder``."""
    return with_tmpfs(
        folder,
        f"""
default-backend = "quota"

[socket.memory]
path = "{folder}/memory.sock"
backends = ["tmpfs"]

[socket.disk]
path = "{folder}/disk.sock"
backends = "local,quota"
default-backend = "local"
""",
    )


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A place for the server."""
    with scratch() as folder:
        yield folder


@pytest.fixture(scope="module")
def sockets(folder: Path) -> Iterator[Sockets]:
    """A server that runs, for tests that do not end it."""
    paths = [folder / "memory.sock", folder / "disk.sock"]
    arguments = [word for path in paths for word in ("--socket", str(path))]
    plugin = Plugin(folder, config=configuration(folder), arguments=arguments)
    with contextlib.closing(plugin):
        plugin.start()
        memory, disk = map(Client, paths)
        yield Sockets(plugin, plugin.client, memory, disk)


def refusal(client: Client, name: str, **options: str) -> str:
    """Create what must be refused; return the words."""
    with pytest.raises(PluginError) as caught:
        client.create(name, options)
    return str(caught.value)


def test_a_name_is_all_it_takes(sockets: Sockets) -> None:
    """``docker volume create -d tmpfs scratch`` needs no option."""
    sockets.memory.create("scratch", {"size": "1m"})
    path = sockets.memory.mount("scratch", "1")
    assert sockets.memory.get("scratch")["Status"]["backend"] == "tmpfs"
    assert Path(path).is_mount()
    sockets.memory.unmount("scratch", "1")
    sockets.memory.remove("scratch")


def test_each_shows_its_own(sockets: Sockets) -> None:
    """dockerd lists every socket as a driver: each volume is there once."""
    sockets.memory.create("a")
    sockets.disk.create("b")
    assert set(sockets.memory.list()) == {"a"}
    assert set(sockets.disk.list()) == {"b"}
    assert set(sockets.everyone.list()) == {"a", "b"}
    for client, hidden in ((sockets.memory, "b"), (sockets.disk, "a")):
        for call in ("Get", "Path", "Mount", "Remove"):
            with pytest.raises(PluginError, match="no such volume"):
                client.ask(call, {"Name": hidden, "ID": "1"})
    sockets.memory.remove("a")
    sockets.disk.remove("b")
    assert sockets.everyone.list() == {}


def test_unmount_is_always_possible(sockets: Sockets) -> None:
    """What was mounted through another socket, or before a restart, is let go of."""
    sockets.memory.create("a")
    path = sockets.memory.mount("a", "1")
    sockets.disk.unmount("a", "1")
    assert not Path(path).is_mount()
    sockets.memory.remove("a")


def test_another_backend_is_refused(sockets: Sockets) -> None:
    """With what was asked for and what can be had, and nothing is made."""
    assert refusal(sockets.memory, "v", driver="local") == (
        "create v: driver=local: this socket serves volumes of tmpfs alone: use "
        "another socket for those of local"
    )
    assert "volumes of local, quota alone" in refusal(
        sockets.disk, "v", driver="tmpfs", size="1m"
    )
    assert "there are local, quota" in refusal(sockets.disk, "v", driver="loacl")
    assert sockets.everyone.list() == {}


def test_help_lists_what_is_allowed(sockets: Sockets) -> None:
    """The help of one socket leads to no refusal there."""
    told = refusal(sockets.disk, "v", help="")
    assert "options of driver local:" in told
    assert told.endswith("-o driver=NAME -o help; there are local, quota")
    assert "driver=NAME" not in refusal(sockets.memory, "v", help="")
    assert "this socket serves" in refusal(sockets.memory, "v", driver="local", help="")


def test_a_hidden_name_is_taken(sockets: Sockets) -> None:
    """It is not said to be there with other options, which nobody here can see."""
    sockets.disk.create("v")
    assert refusal(sockets.memory, "v") == (
        "create v: a volume of backend local has this name, which this socket does "
        "not show: choose another name, or remove that one through a socket that "
        "serves local"
    )
    sockets.disk.create("v")
    sockets.disk.remove("v")
    sockets.memory.create("v")
    sockets.memory.remove("v")


def test_it_is_printed(sockets: Sockets) -> None:
    """``volplugin config`` tells what each serves, each with a default."""
    done = subprocess.run(
        sockets.plugin.command("config"),
        env=plugin_environment(),
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert 'default-backend = "tmpfs"\nbackends = ["tmpfs"]\n' in done.stdout
    assert 'default-backend = "local"\nbackends = ["local", "quota"]\n' in done.stdout
