"""Sockets that a service manager holds: before, between and after servers."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import pytest
from peers import scratch, with_tmpfs
from support.client import Client, PluginError
from support.manager import Manager
from support.plugin import Plugin, plugin_environment
from support.require import require
from support.wait import eventually
from wire import Wire, connected, post

pytestmark = pytest.mark.root

RESTARTS = 10
CALLS = 1000


@pytest.fixture
def folder() -> Iterator[Path]:
    """A place for a server."""
    with scratch() as folder:
        yield folder


Start = Callable[..., Plugin]


@pytest.fixture
def held(folder: Path) -> Iterator[Start]:
    """Make a server, not started, whose plugin socket is held."""
    with contextlib.ExitStack() as stack:

        def make(config: str = "", mode: int = 0o660) -> Plugin:
            manager = Manager(folder, folder / "plugin.sock", mode=mode)
            stack.callback(manager.close)
            plugin = Plugin(folder, config=with_tmpfs(folder, config), manager=manager)
            stack.callback(plugin.close)
            return plugin

        yield make


def identity(path: Path) -> tuple[int, int, int, int]:
    """Return which file a socket is, its mode, and when that was changed."""
    found = path.lstat()
    return found.st_ino, found.st_mode, found.st_uid, found.st_ctime_ns


def refusal(plugin: Plugin, manager: Manager, *words: str) -> str:
    """Run a server that refuses what is handed on to it; return what it says."""
    done = subprocess.run(
        manager.command([*plugin.command("serve"), *words]),
        env={**plugin_environment(), **manager.environment()},
        pass_fds=manager.descriptors,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 78, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr
    assert not plugin.root.exists(), "it has begun"
    return done.stderr


# What is taken over


def test_it_stays_as_it_is(held: Start) -> None:
    """A held socket is neither unlinked nor bound nor changed, over three lives."""
    plugin = held('[socket.x]\npath = "/run/x"\nmode = "0600"\n', mode=0o606)
    before = identity(plugin.socket)
    for _ in range(2):
        plugin.start()
        assert plugin.client.list() == {}
        plugin.stop()
        assert identity(plugin.socket) == before
    plugin.start()
    plugin.kill()
    assert identity(plugin.socket) == before


def test_a_mode_of_its_own_is_told(held: Start) -> None:
    """The mode is the unit's; that it is not the configured one is in the log."""
    plugin = held(mode=0o666)
    plugin.start()
    line = next(x for x in plugin.log.splitlines() if "handed on" in x)
    fields = json.loads(line)["fields"]
    assert (fields["mode"], fields["configured"]) == ("0666", "0660")


def test_one_held_and_one_bound(folder: Path) -> None:
    """A configured socket that is not handed on is bound, and goes at the end."""
    one, two = folder / "one.sock", folder / "two.sock"
    manager = Manager(folder, one)
    plugin = Plugin(
        folder, socket=one, manager=manager, arguments=["--socket", str(two)]
    )
    with contextlib.closing(manager), contextlib.closing(plugin):
        plugin.start()
        Client(two).create("v")
        assert list(Client(one).list()) == ["v"]
        plugin.stop()
        assert one.exists()
        assert not os.path.lexists(two)
        plugin.start()
        Client(one).remove("v")


def test_the_admin_socket(folder: Path) -> None:
    """The admin socket can be held too, where it is root's alone."""
    plugin = Plugin(folder)
    manager = Manager(folder, plugin.admin_socket, mode=0o600)
    plugin = Plugin(folder, manager=manager)
    with contextlib.closing(manager), contextlib.closing(plugin):
        plugin.start()
        plugin.client.create("v")
        assert plugin.release("v").returncode == 0
        plugin.stop()
        assert manager.paths[0].exists()
        plugin.start()
        plugin.client.remove("v")


def test_an_admin_socket_that_others_can_open(folder: Path) -> None:
    """Whoever connects there can change all volumes: nobody but root may."""
    plugin = Plugin(folder)
    with contextlib.closing(Manager(folder, plugin.admin_socket)) as manager:
        said = refusal(plugin, manager)
    assert "has mode 0660" in said
    assert "SocketMode=0600" in said


def test_one_that_is_not_configured(folder: Path) -> None:
    """It is named, with its unit, before anything begins; so are all others."""
    plugin = Plugin(folder)
    paths = folder / "plugin.sock", folder / "one.sock", folder / "two.sock"
    with contextlib.closing(Manager(folder, *paths)) as manager:
        said = refusal(plugin, manager, "--socket", str(paths[0]))
    assert f"'one.socket': {paths[1]} is not in the configuration" in said
    assert f"'two.socket': {paths[2]} is not in the configuration" in said
    assert len(said.splitlines()) == 2
    assert str(plugin.admin_socket) in said


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        pytest.param(
            lambda _: socket.create_server(("127.0.0.1", 0)),
            "is no unix socket",
            id="tcp",
        ),
        pytest.param(
            lambda path: _bound(path, socket.SOCK_DGRAM),
            "does not listen for connections",
            id="datagram",
        ),
        pytest.param(
            lambda path: _bound(path, socket.SOCK_STREAM),
            "does not listen for connections",
            id="not listening",
        ),
        pytest.param(
            lambda _: _listening("\0volplugin-test"),
            "no absolute path",
            id="abstract",
        ),
        pytest.param(lambda path: path.open("wb"), "no socket", id="file"),
    ],
)
def test_what_is_no_listening_unix_socket(
    folder: Path, make: Callable[[Path], socket.socket | IO[bytes]], reason: str
) -> None:
    """Engines call on unix sockets with a path; what else is handed on is refused."""
    plugin = Plugin(folder)
    manager = Manager(folder, folder / "plugin.sock")
    with contextlib.closing(manager), make(folder / "other") as other:
        os.dup2(other.fileno(), manager.descriptors[0])
        said = refusal(plugin, manager)
    assert "handed on by systemd as 'plugin.socket': " in said
    assert reason in said


def _bound(path: Path, kind: int) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, kind)
    made.bind(str(path))
    return made


def _listening(name: str) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    made.bind(name)
    made.listen()
    return made


@pytest.mark.parametrize("count", ["x", "-1", "5000000000"])
def test_a_count_that_is_none(folder: Path, count: str) -> None:
    """Nonsense from the manager is an error, not a server without sockets."""
    plugin = Plugin(folder)
    with contextlib.closing(Manager(folder)) as manager:
        command = manager.command(["/usr/bin/env", f"LISTEN_FDS={count}"])
        done = subprocess.run(
            [*command, *plugin.command("serve")],
            env=plugin_environment(),
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    assert done.returncode == 78, done.stderr
    assert f"LISTEN_FDS: {count!r}" in done.stderr


def test_what_is_meant_for_another(folder: Path) -> None:
    """The variables of a parent are not for its child, who binds as without them."""
    plugin = Plugin(folder)
    with contextlib.closing(plugin):
        plugin.start(environment={"LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid())})
        assert plugin.client.list() == {}
        plugin.stop()
        assert not plugin.socket.exists()


CHILD = """
import json, os
kinds = [os.readlink(f"/proc/self/fd/{number}") for number in range(3, 6)
         if os.path.exists(f"/proc/self/fd/{number}")]
print(json.dumps({"variables": list(os.environ), "descriptors": kinds}))
"""


def test_children_get_nothing(folder: Path) -> None:
    """No program that the server starts gets a variable or a socket."""
    path = folder / "p.sock"
    code = f"""
import os, sys
from volplugin.config import Config, SocketConfig
from volplugin.supervision import supervisor
made = supervisor(Config(sockets=(SocketConfig(path={str(path)!r}),)), os.environ)
assert list(made.held) == [{str(path)!r}], made
assert made.notifier.address and made.notifier.watchdog == 5
os.execv(sys.executable, [sys.executable, "-S", "-c", {CHILD!r}])
"""
    with contextlib.closing(Manager(folder, path, watchdog=5)) as manager:
        done = subprocess.run(
            manager.command([sys.executable, "-c", code]),
            env={**plugin_environment(), **manager.environment()},
            pass_fds=manager.descriptors,
            stdout=subprocess.PIPE,
            timeout=30,
            check=True,
        )
    child = json.loads(done.stdout)
    named = {name for name in child["variables"] if "LISTEN" in name}
    named |= {"NOTIFY_SOCKET", "WATCHDOG_USEC"} & set(child["variables"])
    assert not named
    assert not [kind for kind in child["descriptors"] if "socket" in kind]


# Who is at the other end


def test_the_client_is_who_connects(held: Start) -> None:
    """Accounting sees the engine, also one that had connected before the server ran."""
    plugin = held()
    with ThreadPoolExecutor(1) as pool:
        early = pool.submit(plugin.client.create, "v", {"driver": "tmpfs"})
        time.sleep(0.2)
        assert not early.done()
        plugin.start()
        early.result(20)
    with connected(plugin.socket) as waiting:
        plugin.stop()
        waiting.send(post("Mount", b'{"Name":"v","ID":"closed"}'))
    with connected(plugin.socket) as waiting:
        waiting.send(post("Mount", b'{"Name":"v","ID":"x"}'))
        plugin.start()
        answer = waiting.answer()
        assert answer is not None
        assert answer.status == 200
    (holder,) = plugin.client.get("v")["Status"]["holders"]
    assert f"pid {os.getpid()}," in holder
    plugin.client.unmount("v", "x")
    plugin.client.remove("v")


def test_it_knows_itself(folder: Path, held: Start) -> None:
    """Not even by a socket that systemd listens on is it put behind itself."""
    plugin = held(f'[backend.plugin]\nsockets = ["{folder}"]\n')
    plugin.start()
    with pytest.raises(PluginError, match="is this volplugin itself"):
        plugin.client.create("v", {"driver": "plugin", "plugin": "plugin"})
    assert plugin.client.list() == {}


# Its end


def test_who_is_connected_is_answered(held: Start) -> None:
    """Calls written before the end began are answered, by this server or the next."""
    plugin = held()
    plugin.start()
    plugin.signal(signal.SIGSTOP)
    wires = [Wire(plugin.socket) for _ in range(50)]
    try:
        for number, wire in enumerate(wires):
            wire.send(post("Create", b'{"Name":"v%d"}' % number))
        plugin.signal(signal.SIGTERM)
        plugin.signal(signal.SIGCONT)
        assert plugin.wait() == 0
        plugin.start()
        answers = [wire.answer() for wire in wires]
    finally:
        for wire in wires:
            wire.close()
    assert [answer and answer.body for answer in answers] == [b"{}"] * 50
    assert len(plugin.client.list()) == 50
    for name in plugin.client.list():
        plugin.client.remove(name)


def test_a_live_call_is_answered(held: Start) -> None:
    """SIGTERM in the middle of a Mount: it is answered; a new call waits meanwhile."""
    plugin = held()
    plugin.start(failpoints="tmpfs.attach=sleep:1*1")
    plugin.client.create("v", {"driver": "tmpfs"})
    with ThreadPoolExecutor(2) as pool:
        mount = pool.submit(plugin.client.mount, "v", "x")
        eventually(
            lambda: plugin.client.get("v")["Status"]["mounts"], "it is under way"
        )
        plugin.signal(signal.SIGTERM)
        eventually(lambda: "stopping" in plugin.log, "the end begins")
        time.sleep(0.1)
        late = pool.submit(plugin.client.get, "v")
        assert mount.result(20).endswith("/tmpfs/v")
        assert plugin.wait() == 0
        assert not late.done()
        plugin.start()
        assert late.result(20)["Status"]["mounts"] == 1
    plugin.client.unmount("v", "x")
    plugin.client.remove("v")


class Caller:
    """Calls as an engine does: it keeps its connection, as long as that is open."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._wire: Wire | None = None

    def ask(self, request: bytes) -> bytes:
        """Return the answer; only what was never written is sent again."""
        while True:
            if self._wire is None:
                self._wire = Wire(self._path)
            try:
                self._wire.socket.sendall(request)
            except BrokenPipeError:
                self.close()
                continue
            answer = self._wire.answer()
            assert answer is not None, "the connection was closed without an answer"
            assert answer.status == 200, answer.body
            if answer.headers.get("Connection") == "close":
                self.close()
            return answer.body

    def close(self) -> None:
        """Close the connection."""
        if self._wire is not None:
            self._wire.close()
            self._wire = None


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_restarts_lose_no_call(held: Start, end: signal.Signals) -> None:
    """A thousand calls during ten restarts: all are answered, none fails.

    A call in the hands of a server that is killed fails, of course: there its clients
    have no call under way in that moment.
    """
    plugin = held()
    plugin.start()
    pause = threading.Lock()
    done = threading.Semaphore(0)

    def call(number: int) -> None:
        caller = Caller(plugin.socket)
        for turn in range(CALLS // 20):
            body = b'{"Name":"v%d-%d"}' % (number, turn)
            for verb in ("Create", "Get", "Path", "Get", "Remove"):
                if end is signal.SIGKILL:
                    caller.close()
                    with pause:
                        caller.ask(post(verb, body))
                else:
                    caller.ask(post(verb, body))
            done.release()
        caller.close()

    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(call, number) for number in range(4)]
        for _ in range(RESTARTS):
            for _ in range(4 * CALLS // 20 // (RESTARTS + 1)):
                assert done.acquire(timeout=60)
            with pause if end is signal.SIGKILL else contextlib.nullcontext():
                plugin.signal(end)
                plugin.wait()
            plugin.start(wait=False)
        for each in calls:
            each.result(60)
    assert plugin.client.list() == {}
    ended = plugin.log.count('"event":"stopped"')
    assert ended == (RESTARTS if end is signal.SIGTERM else 0)


# A real systemd's own tool


def test_by_systemd_socket_activate(folder: Path) -> None:
    """The first call starts the server, is answered, and so are all others."""
    tool = require("systemd-socket-activate")
    plugin = Plugin(folder)
    log = folder / "plugin.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                tool,
                f"--listen={plugin.socket}",
                *(f"--setenv={k}={v}" for k, v in plugin_environment().items()),
                *plugin.command("serve"),
                "--socket",
                str(plugin.socket),
            ],
            stderr=output,
        )
    try:
        eventually(plugin.socket.exists, "it listens")
        assert "serving" not in log.read_text()
        plugin.client.create("v")
        assert list(plugin.client.list()) == ["v"]
        plugin.client.remove("v")
        assert "handed on" in log.read_text()
    finally:
        process.terminate()
        assert process.wait(20) == 0
    assert plugin.socket.exists()
