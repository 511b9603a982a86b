"""The admin socket: who may connect, its calls, its client, and its command."""

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from click.testing import CliRunner, Result
from peers import scratch, serving
from support.client import Answer, Client
from support.plugin import Plugin, plugin_environment
from support.wait import eventually

from volplugin.admin.client import AdminClient
from volplugin.admin.messages import (
    DROP_SNAPSHOT,
    RELEASE,
    RESIZE,
    SNAPSHOTS,
    TAKE_OVER,
    TAKE_SNAPSHOT,
    ResizeAnswer,
    SnapshotEntry,
)
from volplugin.admin.server import AdminServer, listener
from volplugin.changes import Caller
from volplugin.cli import cli
from volplugin.drivers.driver import Snapshot
from volplugin.errors import (
    Internal,
    NoSpace,
    NotFound,
    Unavailable,
    Unsupported,
    VolpluginError,
)
from volplugin.migrating import Migrations
from volplugin.model import Volume
from volplugin.operations import Operations

pytestmark = pytest.mark.root

KINDS = VolpluginError.__subclasses__()


@pytest.fixture
def folder() -> Iterator[Path]:
    """A place for a server."""
    with scratch() as folder:
        yield folder


@pytest.fixture(scope="module")
def plugin() -> Iterator[Plugin]:
    """A server that runs, for the tests that do not end it."""
    with scratch() as folder, serving(folder) as plugin:
        yield plugin


def run(command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, whatever its status."""
    return subprocess.run(
        command,
        env={**plugin_environment(), **variables},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def mode_of(path: Path) -> int:
    """Return the permissions of a path."""
    return stat.S_IMODE(path.lstat().st_mode)


# Operations behind a real socket


class Manager:
    """All `Operations`, after ``seconds``: noted, then granted."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.others: list[tuple[str, ...]] = []  # what is asked but resizes
        self.hosts: list[str] = []
        self.held: list[str] = []
        self.found: list[Snapshot] = []
        self.callers: list[Caller] = []
        self.begun = threading.Event()
        self.ended = threading.Event()
        self.error: Exception | None = None
        self.seconds = 0.0

    async def resize(
        self, name: str, changes: Mapping[str, str], caller: Caller
    ) -> tuple[Volume, Volume]:
        self.asked.append((name, dict(changes)))
        await self._do(caller)
        before = {"size": "10G", "driver": "x"}
        return volume(name, before), volume(name, {**before, **changes})

    async def release(self, name: str, caller: Caller) -> Sequence[str]:
        self.others.append(("release", name))
        await self._do(caller)
        return self.held

    async def take_over(self, name: str, caller: Caller) -> Sequence[str]:
        self.others.append(("take_over", name))
        await self._do(caller)
        return self.hosts

    async def snapshots(self, name: str, caller: Caller) -> Sequence[Snapshot]:
        self.others.append(("snapshots", name))
        await self._do(caller)
        return self.found

    async def take_snapshot(self, name: str, snapshot: str, caller: Caller) -> None:
        self.others.append(("take_snapshot", name, snapshot))
        await self._do(caller)

    async def drop_snapshot(self, name: str, snapshot: str, caller: Caller) -> None:
        self.others.append(("drop_snapshot", name, snapshot))
        await self._do(caller)

    async def _do(self, caller: Caller) -> None:
        self.callers.append(caller)
        self.begun.set()
        await asyncio.sleep(self.seconds)
        self.ended.set()
        if self.error is not None:
            raise self.error


def volume(name: str, options: Mapping[str, str]) -> Volume:
    """Return a volume as the manager does."""
    return Volume(
        name=name,
        id="1",
        backend="b",
        driver="d",
        options=options,
        mountpoint="/v",
        created_at="",
    )


class Running:
    """An `AdminServer` of a `Manager`, on a loop in a thread of its own."""

    def __init__(self, socket: Path) -> None:
        self.manager = Manager()
        self.socket = socket
        self.client = AdminClient(str(socket))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._listener = listener(str(socket))
        self._drained = False
        self._thread.start()
        self._server = self._do(self._start())

    def _do(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(20)

    async def _start(self) -> AdminServer:
        server = AdminServer(
            cast(Operations, self.manager), cast(Migrations, self.manager)
        )
        await server.listen(self._listener)
        return server

    def drain(self, limit: float) -> bool:
        """Do as `AdminServer.drain`, once."""
        self._drained = True
        return cast(bool, self._do(self._server.drain(limit)))

    def close(self) -> None:
        """End it, with what is under way."""
        if not self._drained:
            self.drain(0)
        self._do(self._end_tasks())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()
        self._listener.close()

    async def _end_tasks(self) -> None:
        others = asyncio.all_tasks() - {
            cast("asyncio.Task[Any]", asyncio.current_task())
        }
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)


@pytest.fixture
def running(folder: Path) -> Iterator[Running]:
    """A server with a manager that grants everything."""
    server = Running(folder / "admin.sock")
    yield server
    server.close()


def command(running: Running, *words: str, **variables: str) -> Result:
    """Run ``volplugin volume resize`` in this process."""
    return invoke(running, "volume", "resize", *words, **variables)


def invoke(running: Running, *words: str, **variables: str) -> Result:
    """Run a command of operators in this process."""
    if not variables and "--config" not in words:
        words = (*words, "--admin-socket", str(running.socket))
    kept: dict[str, str | None] = {
        name: None for name in os.environ if name.startswith("VOLPLUGIN_")
    }
    runner = CliRunner(env={**kept, **variables})
    return runner.invoke(cli, list(words))


# The socket of a server


def test_for_root_alone(folder: Path) -> None:
    """The socket, and a directory that is made for it, are root's and nobody else's."""
    plugin = Plugin(folder)
    plugin.admin_socket = folder / "run" / "volplugin" / "admin.sock"
    with contextlib.closing(plugin):
        plugin.start()
        found = plugin.admin_socket.lstat()
        assert stat.S_ISSOCK(found.st_mode)
        assert mode_of(plugin.admin_socket) == 0o600
        assert (found.st_uid, found.st_gid) == (0, 0)
        for made in (folder / "run" / "volplugin", folder / "run"):
            assert mode_of(made) == 0o700


def test_a_directory_that_is_there_keeps_its_mode(folder: Path) -> None:
    """The operator's own directory is left as it is."""
    (folder / "run").mkdir(mode=0o755)
    plugin = Plugin(folder)
    plugin.admin_socket = folder / "run" / "admin.sock"
    with contextlib.closing(plugin):
        plugin.start()
        assert mode_of(folder / "run") == 0o755
        assert mode_of(plugin.admin_socket) == 0o600


def test_below_a_link(folder: Path) -> None:
    """A directory is made below a symbolic link too, such as /var/run."""
    (folder / "run").mkdir()
    (folder / "var").symlink_to("run")
    with contextlib.closing(listener(str(folder / "var" / "v" / "admin.sock"))):
        assert mode_of(folder / "run" / "v") == 0o700
        assert mode_of(folder / "run" / "v" / "admin.sock") == 0o600


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_goes_with_its_server(folder: Path, number: signal.Signals) -> None:
    """At its end a server takes its admin socket away."""
    with serving(folder) as plugin:
        assert plugin.admin_socket.exists()
        plugin.signal(number)
        assert plugin.wait() == 0
        assert not os.path.lexists(plugin.admin_socket)


def test_a_stale_socket(folder: Path) -> None:
    """The admin socket of a server that was killed is replaced."""
    with serving(folder) as plugin:
        plugin.kill()
        assert plugin.admin_socket.exists()
        with pytest.raises(Unavailable, match="no server listens"):
            AdminClient(str(plugin.admin_socket)).resize("q", size="1G")
        plugin.start()
        with pytest.raises(NotFound):
            AdminClient(str(plugin.admin_socket)).resize("q", size="1G")


def test_a_live_socket(plugin: Plugin, folder: Path) -> None:
    """A second server on one admin socket is refused, and leaves no socket behind."""
    other = Plugin(folder)
    other.admin_socket = plugin.admin_socket
    done = run([*other.command("serve"), "--socket", str(other.socket)])
    assert done.returncode == 1
    assert done.stderr.endswith(
        f"volplugin: socket {plugin.admin_socket}: another server is listening on it\n"
    )
    assert not os.path.lexists(other.socket)
    with pytest.raises(NotFound):
        AdminClient(str(plugin.admin_socket)).resize("q", size="1G")


def test_something_else_in_the_way(folder: Path) -> None:
    """What is no socket is not replaced, and told of."""
    plugin = Plugin(folder)
    plugin.admin_socket.write_text("precious")
    done = run([*plugin.command("serve"), "--socket", str(plugin.socket)])
    assert done.returncode == 1
    assert f"socket {plugin.admin_socket}: something else is there" in done.stderr
    assert plugin.admin_socket.read_text() == "precious"


def test_a_changed_socket_needs_a_restart(folder: Path) -> None:
    """SIGHUP with another admin socket is told of, and the old one goes on."""
    socket = folder / "one.sock"
    config = f'admin-socket = "{{}}"\n[socket.s]\npath = "{folder}/plugin.sock"\n'
    file = folder / "volplugin.toml"
    file.write_text(config.format(socket))
    words = ["serve", "--config", str(file), "--root", str(folder / "root")]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "volplugin", *words],
            env=plugin_environment(),
            stderr=log,
        )
    try:
        eventually(lambda: "serving" in (folder / "log").read_text(), "it serves")
        file.write_text(config.format(folder / "two.sock"))
        server.send_signal(signal.SIGHUP)
        eventually(lambda: "reloaded" in (folder / "log").read_text(), "it reloads")
        assert "changed sockets need a restart" in (folder / "log").read_text()
        assert socket.exists()
        assert not (folder / "two.sock").exists()
    finally:
        server.terminate()
        assert server.wait(20) == 0
    assert not socket.exists()


# Its calls, by hand


@pytest.mark.parametrize(
    ("line", "body", "status", "code", "reason"),
    [
        (f"POST {RESIZE}", b"{", 400, "INVALID_ARGUMENT", "is not JSON"),
        (f"POST {RESIZE}", b"", 400, "INVALID_ARGUMENT", "is not JSON"),
        (f"POST {RESIZE}", b"[]", 400, "INVALID_ARGUMENT", "no object"),
        (f"POST {RESIZE}", b"{}", 400, "INVALID_ARGUMENT", "name is missing"),
        (
            f"POST {RESIZE}",
            b'{"name":1}',
            400,
            "INVALID_ARGUMENT",
            "be a string, not 1",
        ),
        (
            f"POST {RESIZE}",
            b'{"name":"q","size":1}',
            400,
            "INVALID_ARGUMENT",
            "size must",
        ),
        (f"POST {RESIZE}", b'{"name":"q","a":1}', 400, "INVALID_ARGUMENT", "key 'a'"),
        (
            f"POST {RESIZE}",
            b'{"name":"q"}',
            500,
            "INVALID_ARGUMENT",
            "nothing to change",
        ),
        (
            f"POST {RESIZE}",
            b" " * (2 << 20),
            413,
            "INVALID_ARGUMENT",
            "more than 1048576",
        ),
        (f"GET {RESIZE}", None, 405, "INVALID_ARGUMENT", "takes POST, not GET"),
        (f"PUT {RESIZE}", b"{}", 405, "INVALID_ARGUMENT", "takes POST, not PUT"),
        (f"POST {RELEASE}", b"{}", 400, "INVALID_ARGUMENT", "name is missing"),
        (f"GET {RELEASE}", None, 405, "INVALID_ARGUMENT", "takes POST, not GET"),
        (f"POST {TAKE_OVER}", b"{}", 400, "INVALID_ARGUMENT", "name is missing"),
        (
            f"POST {TAKE_OVER}",
            b'{"name":"q","force":"1"}',
            400,
            "INVALID_ARGUMENT",
            "unknown key 'force'; it takes name",
        ),
        (f"POST {SNAPSHOTS}", b"[]", 400, "INVALID_ARGUMENT", "no object"),
        (
            f"POST {TAKE_SNAPSHOT}",
            b'{"name":"q"}',
            400,
            "INVALID_ARGUMENT",
            "snapshot is missing",
        ),
        (
            f"POST {DROP_SNAPSHOT}",
            b'{"name":"q","snapshot":1}',
            400,
            "INVALID_ARGUMENT",
            "be a string, not 1",
        ),
        (f"GET {SNAPSHOTS}", None, 405, "INVALID_ARGUMENT", "takes POST, not GET"),
        ("POST /admin/v1/shrink", b"{}", 404, "UNSUPPORTED", "/admin/v1/shrink"),
        ("POST /admin/v1/resize/", b"{}", 404, "UNSUPPORTED", "there is no call"),
        ("POST /admin/v2/resize", b"{}", 404, "UNSUPPORTED", "there is no call"),
        ("POST /VolumeDriver.List", b"{}", 404, "UNSUPPORTED", "there is no call"),
        ("GET /", None, 404, "UNSUPPORTED", "there is no call"),
    ],
)
def test_bad_input(
    plugin: Plugin,
    line: str,
    body: bytes | None,
    *,
    status: int,
    code: str,
    reason: str,
) -> None:
    """What is no call gets its reason in the form of every failure."""
    verb, path = line.split()
    answer = Client(plugin.admin_socket).request(path, body, verb=verb)
    assert (answer.status, answer.headers["Content-Type"]) == (
        status,
        "application/json",
    )
    assert set(answer.json) == {"code", "message"}
    assert answer.json["code"] == code
    assert reason in answer.json["message"]


def test_bytes_that_are_no_http(plugin: Plugin) -> None:
    """Noise ends its own connection and nothing else."""
    for noise in (b"\0" * 100, b"POST\r\n\r\n", b"POST / HTTP/1.1\r\nContent-Le"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as wire:
            wire.connect(str(plugin.admin_socket))
            wire.sendall(noise)
    assert resize_by_hand(plugin, name="none", size="1G").json["code"] == "NOT_FOUND"


def resize_by_hand(plugin: Plugin, **message: object) -> Answer:
    """Ask for a resize as a program in any language would."""
    return Client(plugin.admin_socket).request(RESIZE, json.dumps(message).encode())


def test_plugin_calls_are_not_for_operators(plugin: Plugin) -> None:
    """Neither socket answers the other's calls."""
    answer = plugin.client.request(RESIZE, b'{"name":"q","size":"1G"}')
    assert answer.status == 404


@pytest.mark.parametrize("name", ["../x", "", "a/b", "q" * 256, "ü"])
def test_names_are_checked(plugin: Plugin, name: str) -> None:
    """A name that can be no volume's is refused by the same rule as an engine's."""
    answer = resize_by_hand(plugin, name=name, size="1G")
    assert answer.status == 500
    assert answer.json["code"] == "INVALID_ARGUMENT"
    assert answer.json["message"].startswith("volume name ")


def test_each_call_is_logged(plugin: Plugin) -> None:
    """One line a call, as for engines' calls: what, of which volume, its outcome."""
    with pytest.raises(NotFound):
        AdminClient(str(plugin.admin_socket)).resize("logged", size="1G")
    (call,) = plugin.calls("logged")
    assert call.op == "Resize"
    assert call.outcome.startswith("not_found: ")


# The client


def test_a_resize(running: Running) -> None:
    """The words reach the manager, and its options come back, before and after."""
    answer = running.client.resize("q", size="20G", inodes="1m")
    before = {"size": "10G", "driver": "x"}
    assert running.manager.asked == [("q", {"size": "20G", "inodes": "1m"})]
    assert answer == ResizeAnswer(
        name="q", before=before, after={**before, "size": "20G", "inodes": "1m"}
    )
    running.client.resize("q", inodes="2m")
    assert running.manager.asked[1:] == [("q", {"inodes": "2m"})]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_each_error_is_raised_again(
    running: Running, kind: type[VolpluginError]
) -> None:
    """What the manager raises is what the client raises, class and text."""
    running.manager.error = kind("1G is too little\nfor q")
    with pytest.raises(kind) as caught:
        running.client.resize("q", size="1G")
    assert type(caught.value) is kind
    assert str(caught.value) == "1G is too little\nfor q"


def test_a_bug_of_the_server(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    """It is an answer too, and points to the log, which has the stack trace."""
    running.manager.error = ZeroDivisionError("oh")
    with pytest.raises(Internal, match=r"internal error ZeroDivisionError.*the log"):
        running.client.resize("q", size="1G")
    assert any(record.exc_info for record in caplog.records)


def test_no_server(folder: Path) -> None:
    """Without a socket, or with a dead one, the user learns what to look at."""
    path = folder / "admin.sock"
    reason = (
        f"no server listens on {path}: is volplugin serve running? (--admin-socket)"
    )
    for _ in range(2):
        with pytest.raises(Unavailable) as caught:
            AdminClient(str(path)).resize("q", size="1G")
        assert str(caught.value) == reason
        listener(str(path)).socket.close()


def test_not_root(running: Running, folder: Path) -> None:
    """Whoever is not root can't connect, and is told to be."""
    folder.chmod(0o755)
    os.seteuid(65534)
    try:
        with pytest.raises(Unavailable, match="run it as root"):
            running.client.resize("q", size="1G")
    finally:
        os.seteuid(0)
    assert not running.manager.asked


def test_another_program_listens(plugin: Plugin, folder: Path) -> None:
    """What does not answer as a server does is told, not taken for an answer."""
    reason = "does not answer as a server of this version does"
    with pytest.raises(Internal, match=reason):
        AdminClient(str(plugin.socket)).resize("q", size="1G")
    for answer in (b"hello\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"):
        with (
            answering(folder / "other.sock", answer) as path,
            pytest.raises(Internal, match=reason),
        ):
            AdminClient(path).resize("q", size="1G")


@contextlib.contextmanager
def answering(path: Path, answer: bytes) -> Iterator[str]:
    """Listen on ``path`` and answer whatever comes with the same bytes."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        listening.bind(str(path))
        listening.listen()

        def serve() -> None:
            wire, _ = listening.accept()
            with wire:
                asked = b""
                while not asked.endswith(b"}"):  # unread bytes would reset it
                    asked += wire.recv(65536)
                wire.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield str(path)
        finally:
            thread.join(10)
            path.unlink()


def in_background(call: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """Begin a call in a thread; what it returns or raises is in the list."""
    outcome: list[Any] = []

    def work() -> None:
        try:
            outcome.append(call())
        except VolpluginError as error:
            outcome.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    return thread, outcome


def test_a_live_call_is_answered_at_the_end(running: Running) -> None:
    """A server that drains takes its socket away and answers what is under way."""
    running.manager.seconds = 0.5
    thread, outcome = in_background(lambda: running.client.resize("q", size="2G"))
    assert running.manager.begun.wait(10)
    assert running.drain(10)
    assert not running.socket.exists()
    thread.join(10)
    assert outcome[0].after["size"] == "2G"


def test_a_server_that_ends_too_soon(running: Running) -> None:
    """A call that outlasts the drain is told that there will be no answer."""
    running.manager.seconds = 60
    thread, outcome = in_background(lambda: running.client.resize("q", size="2G"))
    assert running.manager.begun.wait(10)
    assert not running.drain(0.1)
    thread.join(10)
    assert type(outcome[0]) is Unavailable
    assert "the server ended before it answered" in str(outcome[0])


def test_the_server_is_killed(folder: Path) -> None:
    """A client whose server dies is told too."""
    with serving(folder) as plugin:
        plugin.signal(signal.SIGSTOP)
        client = AdminClient(str(plugin.admin_socket))
        thread, outcome = in_background(lambda: client.resize("q", size="2G"))
        time.sleep(0.5)
        plugin.kill()
        thread.join(10)
    assert type(outcome[0]) is Unavailable


# The command


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["q", "20G"], "q: size 10G -> 20G\n"),
        (["q", "10G"], "q: size 10G -> 10G\n"),
        (["q", "20G", "--inodes", "1m"], "q: size 10G -> 20G, inodes unset -> 1m\n"),
        (["--inodes", "1m", "q"], "q: inodes unset -> 1m\n"),
    ],
)
def test_what_is_printed(running: Running, words: list[str], line: str) -> None:
    """One line: what was asked for, as it was and as it is."""
    done = command(running, *words)
    assert (done.exit_code, done.output) == (0, line)


def test_an_error_is_printed(running: Running) -> None:
    """The error's lines, each with what failed, and status 1."""
    running.manager.error = NoSpace("20G do not fit on /srv")
    done = command(running, "q", "20G")
    assert done.exit_code == 1
    assert done.output == "volplugin: resize q: 20G do not fit on /srv\n"


def test_where_the_command_finds_the_server(running: Running, folder: Path) -> None:
    """By the flag, the variable or the file, as every setting."""
    variable = {"VOLPLUGIN_ADMIN_SOCKET": str(running.socket)}
    assert command(running, "q", "1G", **variable).exit_code == 0
    file = folder / "volplugin.toml"
    file.write_text(f'admin-socket = "{running.socket}"\n')
    assert command(running, "q", "1G", "--config", str(file)).exit_code == 0
    file.write_text("admin-socket = 'x'\n")
    assert command(running, "q", "1G", "--config", str(file)).exit_code == 78


def test_the_command_and_a_server(plugin: Plugin) -> None:
    """A real command and a real server: the error of a volume that is not there."""
    done = run(plugin.resize("none", "20G"))
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("volplugin: resize none: ")


def test_ctrl_c(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    """Ctrl-C ends the command with a word; the change goes on, and the log says so."""
    caplog.set_level(logging.INFO, "volplugin")
    running.manager.seconds = 1
    words = ["volume", "resize", "q", "20G", "--admin-socket", str(running.socket)]
    client = subprocess.Popen(
        [sys.executable, "-m", "volplugin", *words],
        env=plugin_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert running.manager.begun.wait(20)
    client.send_signal(signal.SIGINT)
    printed, said = client.communicate(timeout=10)
    assert client.returncode == 128 + signal.SIGINT
    assert printed == ""
    assert said == (
        "volplugin: resize q: the server goes on with it, and logs its outcome\n"
    )
    assert running.manager.ended.wait(10)
    assert not running.manager.callers[0].is_waiting()
    eventually(
        lambda: any(
            getattr(record, "fields", {}).get("outcome")
            == "ok (its caller left meanwhile)"
            for record in caplog.records
        ),
        "the outcome is logged",
    )


# Takeover and snapshots


@pytest.mark.parametrize(
    ("hosts", "printed"),
    [
        ([], "q: no host had it\n"),
        (["a"], "q: taken from a\n"),
        (["a", "b"], "q: taken from a, b\n"),
    ],
)
def test_a_takeover(running: Running, hosts: list[str], printed: str) -> None:
    """The command names the hosts that the volume was taken from."""
    running.manager.hosts = hosts
    assert list(running.client.take_over("q").hosts) == hosts
    done = invoke(running, "volume", "takeover", "q")
    assert (done.exit_code, done.output) == (0, printed)
    assert running.manager.others == [("take_over", "q")] * 2


@pytest.mark.parametrize(
    ("held", "printed"),
    [
        ([], "q: nobody held it\n"),
        (["'1' (pouchd)"], "q: released from '1' (pouchd)\n"),
        (["'1' (a)", "'2' (b)"], "q: released from '1' (a), '2' (b)\n"),
    ],
)
def test_a_release(running: Running, held: list[str], printed: str) -> None:
    """The command names who had held the volume."""
    running.manager.held = held
    assert list(running.client.release("q").holders) == held
    done = invoke(running, "volume", "release", "q")
    assert (done.exit_code, done.output) == (0, printed)
    assert running.manager.others == [("release", "q")] * 2


def test_the_help_of_a_release(running: Running) -> None:
    """It shows a command to type, when it is refused, and whom it is for."""
    done = invoke(running, "volume", "release", "--help")
    assert done.exit_code == 0
    told = " ".join(done.output.split())
    for words in ("volplugin volume release db", "Refused while a container has"):
        assert words in told
    assert "PouchContainer" in told


def test_a_snapshot(running: Running) -> None:
    """The command tells what it has made, in the words of ``from``."""
    done = invoke(running, "snapshot", "create", "q@then")
    assert (done.exit_code, done.output) == (0, "q@then\n")
    done = invoke(running, "snapshot", "rm", "q@then")
    assert (done.exit_code, done.output) == (0, "q@then\n")
    answer = running.client.take_snapshot("q", "now")
    assert (answer.name, answer.snapshot) == ("q", "now")
    answer = running.client.drop_snapshot("q", "now")
    assert (answer.name, answer.snapshot) == ("q", "now")
    assert running.manager.others == [
        ("take_snapshot", "q", "then"),
        ("drop_snapshot", "q", "then"),
        ("take_snapshot", "q", "now"),
        ("drop_snapshot", "q", "now"),
    ]


def test_snapshots_are_listed(running: Running) -> None:
    """As a table, with sizes for people; programs get bytes."""
    running.manager.found = [
        Snapshot(name="monday", created_at="2026-11-23T00:00:00Z", size=10 << 30),
        Snapshot(name="b", created_at="2026-11-24T00:00:00Z"),
    ]
    done = invoke(running, "snapshot", "ls", "q")
    assert done.exit_code == 0
    assert done.output.splitlines() == [
        "SNAPSHOT  CREATED               SIZE",
        "q@monday  2026-11-23T00:00:00Z  10G",
        "q@b       2026-11-24T00:00:00Z",
    ]
    assert list(running.client.snapshots("q").snapshots) == [
        SnapshotEntry(
            name="monday", created_at="2026-11-23T00:00:00Z", size=str(10 << 30)
        ),
        SnapshotEntry(name="b", created_at="2026-11-24T00:00:00Z", size=""),
    ]


def test_no_snapshots(running: Running) -> None:
    """The table is empty."""
    done = invoke(running, "snapshot", "ls", "q")
    assert (done.exit_code, done.output) == (0, "SNAPSHOT  CREATED  SIZE\n")


OTHERS = [
    (["volume", "release", "q"], "release q"),
    (["volume", "takeover", "q"], "takeover q"),
    (["snapshot", "create", "q@then"], "snapshot q@then"),
    (["snapshot", "ls", "q"], "snapshots of q"),
    (["snapshot", "rm", "q@then"], "snapshot q@then"),
]


@pytest.mark.parametrize(("words", "doing"), OTHERS)
def test_errors_of_the_others(running: Running, words: list[str], doing: str) -> None:
    """What the server refuses is printed with what was tried, and status 1."""
    running.manager.error = Unavailable("the cluster does not answer")
    done = invoke(running, *words)
    assert done.exit_code == 1
    assert done.output == f"volplugin: {doing}: the cluster does not answer\n"


@pytest.mark.parametrize(("words", "doing"), OTHERS)
def test_the_others_and_a_server(plugin: Plugin, words: list[str], doing: str) -> None:
    """Real commands and a real server: the error of a volume that is not there."""
    socket = str(plugin.admin_socket)
    done = run([sys.executable, "-m", "volplugin", *words, "--admin-socket", socket])
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == f"volplugin: {doing}: no such volume\n"


def test_a_driver_without_snapshots(plugin: Plugin) -> None:
    """The server's reason names the driver."""
    plugin.client.create("plain", {"driver": "local"})
    client = AdminClient(str(plugin.admin_socket))
    with pytest.raises(Unsupported, match="volumes of driver local have no snapshots"):
        client.take_snapshot("plain", "then")
    with pytest.raises(Unsupported, match="volumes of driver local belong to one host"):
        client.take_over("plain")
    plugin.client.remove("plain")
    assert {call.op for call in plugin.calls("plain")} > {"TakeSnapshot", "TakeOver"}
