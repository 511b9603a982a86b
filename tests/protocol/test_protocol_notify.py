"""What the server tells the service manager, and when."""

import contextlib
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from peers import scratch, with_tmpfs
from support.manager import Manager
from support.plugin import Plugin
from support.wait import eventually

pytestmark = pytest.mark.root

READY = "READY=1"


@pytest.fixture
def folder() -> Iterator[Path]:
    """A place for a server."""
    with scratch() as folder:
        yield folder


Start = Callable[..., tuple[Plugin, Manager]]


@pytest.fixture
def managed(folder: Path) -> Iterator[Start]:
    """Start a server and wait for its READY, with nothing held."""
    with contextlib.ExitStack() as stack:

        def start(
            *, failpoints: str = "", watchdog: float = 0, abstract: bool = False
        ) -> tuple[Plugin, Manager]:
            manager = Manager(folder, watchdog=watchdog, abstract=abstract)
            stack.callback(manager.close)
            plugin = Plugin(folder, config=with_tmpfs(folder), manager=manager)
            stack.callback(plugin.close)
            plugin.start(wait=False, failpoints=failpoints)
            manager.hears(READY)
            return plugin, manager

        yield start


@pytest.mark.parametrize("abstract", [False, True], ids=["path", "abstract"])
def test_its_life(managed: Start, *, abstract: bool) -> None:
    """Ready means that it answers; the end is told with the time that it may take."""
    plugin, manager = managed(abstract=abstract)
    assert plugin.client.list() == {}  # at once
    assert manager.facts() == [
        "STATUS=recovering",
        "EXTEND_TIMEOUT_USEC=60000000",
        READY,
        f"STATUS=serving on {plugin.socket}",
    ]
    plugin.stop()
    assert manager.facts()[4:] == [
        "STOPPING=1",
        "EXTEND_TIMEOUT_USEC=90000000",
        "STATUS=answering the calls under way",
    ]


def test_a_long_recovery(managed: Start) -> None:
    """While it recovers it asks for time, and it is not ready."""
    plugin, _ = managed(failpoints="core.create.driver=kill")
    with pytest.raises(OSError):  # noqa: PT011  closed, or reset: it was killed
        plugin.client.create("v", {"driver": "tmpfs"})
    plugin.wait()
    with contextlib.closing(Manager(plugin.root)) as manager:
        again = Plugin(
            plugin.root.parent, config=plugin.config.read_text(), manager=manager
        )
        with contextlib.closing(again):
            again.start(wait=False, failpoints="core.recover.create=sleep:1")
            manager.hears("EXTEND_TIMEOUT_USEC=60000000")
            assert READY not in manager.facts()
            manager.hears(READY)


def test_a_reload(managed: Start) -> None:
    """A reload is told from its signal to its end, with the time of its begin."""
    plugin, manager = managed()
    known = len(manager.facts())
    before = time.monotonic_ns() // 1000
    plugin.signal(signal.SIGHUP)
    manager.hears(READY, times=2)
    reloading, since, doing, ready, status = manager.facts()[known:]
    assert (reloading, ready) == ("RELOADING=1", READY)
    name, _, usec = since.partition("=")
    assert name == "MONOTONIC_USEC"
    assert before <= int(usec) <= time.monotonic_ns() // 1000
    assert doing == "STATUS=reading the configuration"
    assert status == f"STATUS=serving on {plugin.socket}"


def test_a_reload_of_a_bad_file(managed: Start) -> None:
    """It is ready again, and its status tells that the file is not in effect."""
    plugin, manager = managed()
    plugin.config.write_text("= no TOML")
    plugin.signal(signal.SIGHUP)
    manager.hears(READY, times=2)
    (status,) = [f for f in manager.facts() if "not in effect" in f]
    assert status.startswith(f"STATUS=serving on {plugin.socket};")


def test_the_watchdog_is_fed(managed: Start) -> None:
    """An event loop that turns is told of twice in each interval."""
    _, manager = managed(watchdog=0.4)
    began = time.monotonic()
    manager.hears("WATCHDOG=1", times=manager.facts().count("WATCHDOG=1") + 5)
    assert 0.6 < time.monotonic() - began < 3


def test_the_watchdog_of_a_blocked_loop(managed: Start) -> None:
    """An event loop that is blocked is not told of: systemd ends such a server."""
    # This failpoint is hit on the event loop itself.
    plugin, manager = managed(watchdog=0.4, failpoints="core.create.intent=sleep:1.5*1")
    manager.hears("WATCHDOG=1", times=3)
    call = threading.Thread(target=plugin.client.create, args=["v"])
    call.start()
    time.sleep(0.2)
    blocked = manager.facts().count("WATCHDOG=1")
    time.sleep(0.8)
    assert manager.facts().count("WATCHDOG=1") == blocked
    manager.hears("WATCHDOG=1", times=blocked + 2)
    call.join()
    plugin.client.remove("v")


def test_a_watchdog_of_another(folder: Path) -> None:
    """One that is meant for another process is not fed."""
    manager = Manager(folder, watchdog=0.2)
    plugin = Plugin(folder, manager=manager)
    with contextlib.closing(manager), contextlib.closing(plugin):
        plugin.start(environment={"WATCHDOG_PID": "1"})
        time.sleep(0.5)
        assert "WATCHDOG=1" not in manager.facts()


@pytest.mark.parametrize("kind", ["missing", "full", "nonsense"])
def test_a_manager_that_does_not_listen(folder: Path, kind: str) -> None:
    """The server serves all the same, and the log tells that it was not heard."""
    manager = Manager(folder)
    plugin = Plugin(folder, manager=manager)
    with contextlib.closing(manager), contextlib.closing(plugin):
        if kind == "missing":
            manager.address.unlink()
        elif kind == "full":
            manager.fill()
        else:
            manager.name = "vsock:2:1234"
        plugin.start()
        plugin.client.create("v")
        plugin.client.remove("v")
        if kind == "nonsense":
            assert "systemd" not in plugin.log
        else:
            eventually(lambda: "systemd not told" in plugin.log, "the log tells")


def test_without_a_manager(folder: Path) -> None:
    """Nobody is told, and nothing is logged of that."""
    plugin = Plugin(folder)
    with contextlib.closing(plugin):
        plugin.start()
        assert "systemd" not in plugin.log


def test_a_datagram_is_one_message(folder: Path) -> None:
    """What belongs together comes together: systemd would act on the half."""
    path = folder / "n"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as hearing:
        hearing.settimeout(20)
        hearing.bind(str(path))
        plugin = Plugin(folder)
        with contextlib.closing(plugin):
            plugin.start(environment={"NOTIFY_SOCKET": str(path)})
            while b"READY" not in (message := hearing.recv(4096)):
                pass
            assert message == f"READY=1\nSTATUS=serving on {plugin.socket}".encode()
