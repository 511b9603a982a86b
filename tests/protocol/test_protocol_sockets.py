"""The sockets and the life of the server: start, reload, end, and who else is there."""

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from peers import mounts_below, scratch, serving, with_tmpfs
from support.client import Client, PluginError
from support.plugin import Plugin, plugin_environment
from support.wait import eventually
from wire import Wire, connected, post

pytestmark = pytest.mark.root


@pytest.fixture
def folder() -> Iterator[Path]:
    """A place for a server."""
    with scratch() as folder:
        yield folder


@pytest.fixture
def plugin(folder: Path) -> Iterator[Plugin]:
    """A server that runs."""
    with serving(folder) as plugin:
        yield plugin


def refused(plugin: Plugin, *arguments: str) -> str:
    """Run a server that cannot start; return what it says, once it exits with 1."""
    done = subprocess.run(
        [*plugin.command("serve"), *arguments],
        env=plugin_environment(),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 1, (done.returncode, done.stderr)
    return done.stderr


def status_of(path: Path) -> tuple[int, int, int]:
    """Return mode, owner and group of a socket."""
    found = path.lstat()
    assert stat.S_ISSOCK(found.st_mode)
    return stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid


@contextlib.contextmanager
def in_background(call: Callable[[], Any]) -> Iterator["Future[Any]"]:
    """Make a call while the test goes on."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(call)


def mount_slowly(plugin: Plugin) -> Any:
    """Return the answer of a Mount of ``v``, or what came instead of one."""
    try:
        return plugin.client.mount("v", "x")
    except (OSError, PluginError) as error:
        return error


# Where it listens


def test_by_default(plugin: Plugin) -> None:
    """A socket is for its owner and group alone; dockerd runs as root."""
    assert status_of(plugin.socket) == (0o660, 0, 0)


def test_many_sockets(folder: Path) -> None:
    """Sockets of the file and their modes and owners; all answer the same."""
    one, two = folder / "one.sock", folder / "deep" / "two.sock"
    config = (
        f'[socket.docker]\npath = "{one}"\n'
        f'[socket.podman]\npath = "{two}"\nmode = "0600"\n'
        'owner = 12\ngroup = "daemon"\n'
    )
    daemon = 1  # Debian's own number for this group
    plugin = Plugin(folder, socket=one, config=config, arguments=["--socket", str(two)])
    with contextlib.closing(plugin):
        plugin.start()
        assert status_of(one) == (0o660, 0, 0)
        assert status_of(two) == (0o600, 12, daemon)
        Client(one).create("v")
        assert list(Client(two).list()) == ["v"]
        Client(two).remove("v")
        assert Client(one).list() == {}
        plugin.stop()
        assert not os.path.lexists(two)


def test_sockets_of_the_file(folder: Path) -> None:
    """Without --socket those of the file are listened on, each of them."""
    paths = [folder / "one.sock", folder / "two.sock"]
    config = "".join(f'[socket.s{n}]\npath = "{p}"\n' for n, p in enumerate(paths))
    plugin = Plugin(folder, config=config)
    server = subprocess.Popen(
        plugin.command("serve"), env=plugin_environment(), stderr=subprocess.PIPE
    )
    try:
        for path in paths:
            eventually(path.exists, f"{path} is there")
            eventually(lambda p=path: answers(p), f"{path} answers")  # type: ignore[misc]
    finally:
        server.terminate()
        _, log = server.communicate(timeout=20)
    assert server.returncode == 0, log
    assert not any(map(os.path.lexists, paths))


def answers(path: Path) -> bool:
    """Return whether a server listens on ``path``."""
    try:
        Client(path).activate()
    except OSError:
        return False
    return True


def test_a_stale_socket(plugin: Plugin) -> None:
    """The socket of a server that was killed is replaced."""
    plugin.kill()
    assert status_of(plugin.socket)
    with pytest.raises(ConnectionRefusedError):
        plugin.client.list()
    plugin.start()
    assert plugin.client.list() == {}


def test_a_start_that_recovers_for_long_refuses(folder: Path) -> None:
    """Its socket is there at once, for a dockerd that would not wait for none."""
    config = with_tmpfs(folder)
    plugin = Plugin(folder, config=config)
    with contextlib.closing(plugin):
        plugin.start(failpoints="core.create.driver=kill")
        with pytest.raises(OSError):  # noqa: PT011  closed, or reset: it was killed
            plugin.client.create("v", {"driver": "tmpfs"})
        plugin.wait()
        plugin.socket.unlink()
        plugin.start(failpoints="core.recover.create=sleep:1", wait=False)
        eventually(plugin.socket.exists, "it is bound")
        with pytest.raises(ConnectionRefusedError):
            plugin.client.list()
        plugin.wait_until_ready()
        assert plugin.client.list() == {}


def removals(plugin: Plugin) -> int:
    """Return how many sockets the log says were removed."""
    return plugin.log.count("stale socket removed")


def test_a_socket_that_is_not_configured_any_more(folder: Path) -> None:
    """What a killed server left of it is removed: it would cost an engine 15 s a call.

    The admin socket as well; what a server listens on by now stays.
    """
    old, taken = folder / "old.sock", folder / "taken.sock"
    arguments = ["--socket", str(old), "--socket", str(taken)]
    first = Plugin(folder, arguments=arguments)
    first.start()
    first.kill()
    taken.unlink()
    with scratch() as elsewhere:
        other = Plugin(elsewhere, socket=taken)
        second = Plugin(folder)
        second.admin_socket = folder / "new-admin.sock"
        with contextlib.closing(other), contextlib.closing(second):
            other.start()
            assert old.exists()
            assert first.admin_socket.exists()
            second.start()
            assert not old.exists()
            assert not first.admin_socket.exists()
            assert other.client.list() == {}
            eventually(lambda: removals(second) == 2, "it is logged")
            second.restart()
            second.stop()
            assert removals(second) == 2


def test_a_socket_of_a_server_that_died_at_its_start(folder: Path) -> None:
    """It is known from before it was bound."""
    old = folder / "old.sock"
    plugin = Plugin(folder, config=with_tmpfs(folder), arguments=["--socket", str(old)])
    plugin.start(failpoints="core.create.driver=kill")
    with pytest.raises(OSError):  # noqa: PT011  closed, or reset: it was killed
        plugin.client.create("v", {"driver": "tmpfs"})
    plugin.wait()
    plugin.start(failpoints="core.recover.create=kill", wait=False)
    plugin.wait()
    assert old.exists()
    again = Plugin(folder, config=with_tmpfs(folder))
    with contextlib.closing(again):
        again.start()
        assert not old.exists()


def test_a_live_socket(plugin: Plugin) -> None:
    """The socket of a live server is left to it."""
    with scratch() as folder:
        other = Plugin(folder)
        said = refused(other, "--socket", str(plugin.socket))
    assert said.endswith(
        f"volplugin: socket {plugin.socket}: another server is listening on it\n"
    )
    assert plugin.client.list() == {}


def test_one_of_two_is_taken(plugin: Plugin) -> None:
    """A server that gets one socket but not the other leaves none behind."""
    with scratch() as folder:
        free = folder / "free.sock"
        sockets = ("--socket", str(free), "--socket", str(plugin.socket))
        assert "another server is listening" in refused(Plugin(folder), *sockets)
        assert not os.path.lexists(free)
    assert plugin.client.list() == {}


@pytest.mark.parametrize("kind", ["file", "directory", "link", "fifo"])
def test_something_else_in_the_way(folder: Path, kind: str) -> None:
    """What is no socket is not replaced, and told of."""
    path = folder / "plugin.sock"
    if kind == "file":
        path.write_text("precious")
    elif kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        (folder / "precious").write_text("precious")
        path.symlink_to(folder / "precious")
    before = path.lstat()
    said = refused(Plugin(folder), "--socket", str(path))
    assert f"socket {path}: something else is there" in said
    assert path.lstat() == before
    if kind in {"file", "link"}:
        assert path.read_text() == "precious"


def test_a_folder_that_cannot_be(folder: Path) -> None:
    """A socket in what is no folder ends the server with the reason."""
    (folder / "file").write_text("")
    said = refused(Plugin(folder), "--socket", str(folder / "file" / "p.sock"))
    assert "Traceback" not in said
    assert str(folder / "file") in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_its_socket_goes_with_it(plugin: Plugin, number: signal.Signals) -> None:
    """At its end a server takes its socket away: engines wait for the next one."""
    plugin.signal(number)
    assert plugin.wait() == 0
    assert not os.path.lexists(plugin.socket)


def test_anothers_socket_stays(plugin: Plugin) -> None:
    """A server whose path has another's socket by now leaves that one alone."""
    plugin.socket.unlink()
    with scratch() as folder:
        other = Plugin(folder, socket=plugin.socket)
        with contextlib.closing(other):
            other.start()
            plugin.process.terminate()
            assert plugin.wait() == 0
            assert other.client.list() == {}


# Its root


def test_one_server_a_root(plugin: Plugin) -> None:
    """A second server on the same root is refused; the first is not disturbed."""
    said = refused(plugin, "--socket", str(plugin.root.parent / "second.sock"))
    assert f"pid {plugin.pid}" in said or str(plugin.pid) in said
    assert "Traceback" not in said
    plugin.client.create("v")
    plugin.client.remove("v")


def test_it_listens_after_recovery(folder: Path) -> None:
    """No engine gets an answer before the state is recovered: Get would lie to it."""
    config = with_tmpfs(folder)
    plugin = Plugin(folder, config=config)
    with contextlib.closing(plugin):
        plugin.start(failpoints="core.create.driver=kill")
        with pytest.raises(OSError):  # noqa: PT011  closed, or reset: it was killed
            plugin.client.create("v", {"driver": "tmpfs"})
        plugin.wait()
        seconds = 1.0
        began = time.monotonic()
        plugin.start(failpoints=f"core.recover.create=sleep:{seconds}", wait=False)
        refusals = 0
        while not answers(plugin.socket):
            refusals += 1
            # Never absent: a dockerd that has just started would pass over it.
            assert status_of(plugin.socket)
            time.sleep(0.01)
        assert time.monotonic() - began >= seconds
        assert refusals
        assert plugin.client.list() == {}
        plugin.client.create("v", {"driver": "tmpfs", "size": "1m"})
        plugin.client.remove("v")


# Its end


def test_a_live_call_is_answered(folder: Path) -> None:
    """SIGTERM in the middle of a Mount: it is answered, exit 0, and the mount stays."""
    with serving(folder, failpoints="tmpfs.attach=sleep:1*1") as plugin:
        plugin.client.create("v", {"driver": "tmpfs"})
        with in_background(lambda: mount_slowly(plugin)) as mount:
            eventually(
                lambda: plugin.client.get("v")["Status"]["mounts"], "it is under way"
            )
            plugin.signal(signal.SIGTERM)
            path = mount.result(20)
        assert path == str(folder / "tmpfs" / "v")
        assert plugin.wait() == 0
        assert [m.mountpoint for m in mounts_below(folder)] == [path]
        plugin.start()
        assert plugin.client.get("v")["Status"]["mounts"] == 1
        plugin.client.unmount("v", "x")
        assert not mounts_below(folder)
        plugin.client.remove("v")


def test_the_socket_goes_first(folder: Path) -> None:
    """While the last calls are answered, new ones find no socket and are retried."""
    with serving(folder, failpoints="tmpfs.attach=sleep:1.5*1") as plugin:
        plugin.client.create("v", {"driver": "tmpfs"})
        with (
            connected(plugin.socket) as kept,
            in_background(lambda: mount_slowly(plugin)) as mount,
        ):
            eventually(
                lambda: plugin.client.get("v")["Status"]["mounts"], "it is under way"
            )
            assert kept.ask(post("List")).status == 200
            plugin.signal(signal.SIGTERM)
            eventually(lambda: not os.path.lexists(plugin.socket), "it is unlinked")
            assert not mount.done()
            with pytest.raises(FileNotFoundError):
                plugin.client.list()
            # Who is connected is answered still, and told to come back.
            answer = kept.ask(post("List"))
            assert (answer.status, answer.headers["Connection"]) == (200, "close")
            assert kept.answer() is None
            assert mount.result(20) == str(folder / "tmpfs" / "v")
        assert plugin.wait() == 0
        plugin.start()
        plugin.client.unmount("v", "x")
        plugin.client.remove("v")


def test_who_is_connected_is_answered(plugin: Plugin) -> None:
    """Calls written before the end began are answered, accepted yet or not.

    dockerd's retry of a call that was written has no body, so it could not be.
    """
    plugin.signal(signal.SIGSTOP)
    wires = [Wire(plugin.socket) for _ in range(50)]
    try:
        for number, wire in enumerate(wires):
            wire.send(post("Create", b'{"Name":"v%d"}' % number))
        plugin.signal(signal.SIGTERM)
        plugin.signal(signal.SIGCONT)
        answers = [wire.answer() for wire in wires]
    finally:
        for wire in wires:
            wire.close()
    assert [answer and answer.body for answer in answers] == [b"{}"] * 50
    assert plugin.wait() == 0
    plugin.start()
    assert len(plugin.client.list()) == 50
    for name in plugin.client.list():
        plugin.client.remove(name)


def test_a_call_on_an_idle_connection(plugin: Plugin) -> None:
    """A call that was written is answered; else it was not written.

    An engine keeps idle connections, and may write to one in the moment in which the
    server closes it.
    """
    wires = [Wire(plugin.socket) for _ in range(400)]
    try:
        for wire in wires:
            assert wire.ask(post("List")).status == 200
        plugin.signal(signal.SIGTERM)
        written = []
        for wire in wires:
            time.sleep(0.001)
            try:
                wire.socket.sendall(post("List"))
            except OSError:
                continue
            written.append(wire)
        answers = [wire.answer() for wire in written]
        assert plugin.wait() == 0
    finally:
        for wire in wires:
            wire.close()
    assert 0 < len(written) < 400, "the end came before or after all calls"
    assert [answer and answer.status for answer in answers] == [200] * len(written)


def test_a_driver_that_is_stuck(folder: Path) -> None:
    """A call that hangs for ever delays the end by the limit and no more."""
    config = "[timeouts]\ndrain = 1\n"
    with serving(folder, config=config, failpoints="tmpfs.attach=sleep:999") as plugin:
        plugin.client.create("v", {"driver": "tmpfs"})
        plugin.client.create("w")
        with in_background(lambda: mount_slowly(plugin)) as mount:
            eventually(
                lambda: plugin.client.get("v")["Status"]["mounts"], "it is under way"
            )
            began = time.monotonic()
            plugin.signal(signal.SIGTERM)
            assert plugin.wait(15) == 0
            assert 1 <= time.monotonic() - began < 9
            assert isinstance(mount.result(5), OSError)
        assert "exit with calls stuck in drivers" in plugin.log
        assert not os.path.lexists(plugin.socket)
        # What was never answered is not held, and all that was is there.
        plugin.start()
        assert plugin.client.get("v")["Status"]["mounts"] == 0
        for name in ("v", "w"):
            plugin.client.remove(name)


def test_repeated_signals(folder: Path) -> None:
    """A second SIGTERM does not cut the first one's drain short."""
    with serving(folder, failpoints="tmpfs.attach=sleep:1*1") as plugin:
        plugin.client.create("v", {"driver": "tmpfs"})
        with in_background(lambda: mount_slowly(plugin)) as mount:
            eventually(
                lambda: plugin.client.get("v")["Status"]["mounts"], "it is under way"
            )
            for _ in range(3):
                plugin.signal(signal.SIGTERM)
                plugin.signal(signal.SIGINT)
                time.sleep(0.05)
            assert mount.result(20) == str(folder / "tmpfs" / "v")
        assert plugin.wait() == 0
        plugin.start()
        plugin.client.unmount("v", "x")
        plugin.client.remove("v")


# SIGHUP


class Reloading:
    """A server by its file alone, whose log is read line by line."""

    def __init__(self, folder: Path, config: str, failpoints: str = "") -> None:
        self.folder = folder
        self._plugin = Plugin(folder, config=self._whole(config))
        self._log = folder / "reload.log"
        environment = plugin_environment()
        if failpoints:
            environment["VOLPLUGIN_FAILPOINTS"] = failpoints
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._plugin.command("serve"), env=environment, stderr=log
            )
        self.client = Client(folder / "plugin.sock")
        eventually(lambda: answers(self.client.socket), "it answers")

    def _whole(self, config: str) -> str:
        return f'{config}\n[socket.one]\npath = "{self.folder}/plugin.sock"\n'

    def reload(self, config: str) -> list[str]:
        """Reload with ``config``; return the log's lines on it."""
        known = len(self.lines())
        self._plugin.config.write_text(self._whole(config))
        self._process.send_signal(signal.SIGHUP)
        eventually(
            lambda: any("reloaded" in line for line in self.lines()[known:]),
            "the reload is logged",
        )
        time.sleep(0.05)
        return self.lines()[known:]

    def lines(self) -> list[str]:
        """Return the log as it is now."""
        return self._log.read_text().splitlines()

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        assert self._process.wait(20) == 0
        assert "Traceback" not in self._log.read_text()


@pytest.fixture
def reloading(folder: Path) -> Iterator[Callable[..., Reloading]]:
    """Start a server that is to be reloaded."""
    with contextlib.ExitStack() as stack:

        def start(config: str = "", failpoints: str = "") -> Reloading:
            server = Reloading(folder, config, failpoints)
            stack.callback(server.close)
            return server

        yield start


Start = Callable[..., Reloading]


def test_reload_of_the_log(reloading: Start) -> None:
    """The log's format and level follow the file, line by line."""
    server = reloading('log-level = "warning"')
    server.client.list()
    assert server.lines() == []
    (line,) = server.reload('log-format = "json"')
    assert json.loads(line)["event"] == "configuration reloaded"
    server.client.list()
    eventually(lambda: len(server.lines()) == 2, "the call is logged")
    assert json.loads(server.lines()[1])["fields"]["op"] == "List"
    (line,) = server.reload('log-format = "text"')
    assert line.endswith("INFO  configuration reloaded")


def test_reload_of_timeouts(reloading: Start) -> None:
    """New deadlines hold for the calls after the reload."""
    server = reloading(failpoints="local.stage=sleep:0.5")
    server.client.create("v")
    server.reload("[timeouts]\ncreate = 0.1\n")
    with pytest.raises(PluginError, match=r"^create w: still at it after 0\.1 s"):
        server.client.create("w")
    server.reload("")
    server.client.create("w")
    for name in ("v", "w"):
        server.client.remove(name)


def test_reload_of_what_is_allowed(reloading: Start) -> None:
    """Directories that users may name follow the file; volumes that exist stay."""
    server = reloading()
    one, two = server.folder / "one", server.folder / "two"
    server.client.create("v", {"mount": f"{one}"})
    server.reload(f'[backend.local]\nallow = ["{one}"]\n')
    with pytest.raises(PluginError, match="is not allowed on this host"):
        server.client.create("w", {"mount": f"{two}"})
    server.reload(f'[backend.local]\nallow = ["{two}"]\n')
    server.client.create("w", {"mount": f"{two}"})
    assert server.client.mount("v", "x") == str(one)
    server.client.unmount("v", "x")
    for name in ("v", "w"):
        server.client.remove(name)


def test_reload_with_a_new_backend(reloading: Start) -> None:
    """A backend that is new in the file takes volumes; one that is gone is kept."""
    server = reloading()
    with pytest.raises(PluginError, match="no such driver or backend"):
        server.client.create("v", {"driver": "fast"})
    fast = f'[backend.fast]\ndriver = "tmpfs"\nroot = "{server.folder}/fast"\n'
    server.reload(f'default-backend = "fast"\n{fast}')
    server.client.create("v")
    assert server.client.mount("v", "x") == str(server.folder / "fast" / "v")
    lines = server.reload("")
    assert any("backend.fast: taking it away needs a restart" in x for x in lines)
    assert server.client.get("v")["Status"]["backend"] == "fast"
    server.client.unmount("v", "x")
    server.client.remove("v")


def test_reload_of_a_bad_file(reloading: Start) -> None:
    """A file with faults changes nothing, and each fault is a line of the log."""
    server = reloading("[timeouts]\ncreate = 60\n")
    lines = server.reload(
        'log-format = "yaml"\nlog-levle = "debug"\n'
        '[timeouts]\ncreate = 0.001\nmount = "x"\n[backend.x]\n'
    )
    faults = [line for line in lines if "configuration not reloaded" in line]
    assert len(faults) == 4
    for fault in ("log-format", "log-levle", "timeouts.mount", "backend.x"):
        assert sum(fault in line for line in faults) == 1
    assert not any("configuration reloaded" in line for line in lines)
    server.client.create("v")  # it has 60 s still
    server.client.remove("v")
    assert any("not reloaded" in line for line in server.reload("= no TOML"))
    assert server.reload("")[-1].endswith("configuration reloaded")


def test_reload_of_what_needs_a_restart(reloading: Start) -> None:
    """A changed root or socket is told of, and the server goes on as it was."""
    server = reloading()
    other = f'[socket.two]\npath = "{server.folder}/two.sock"\n'
    lines = server.reload(other)
    assert any("changed sockets need a restart" in line for line in lines)
    assert not (server.folder / "two.sock").exists()
    # It is still true at the next reload.
    lines = server.reload(other)
    assert any("changed sockets need a restart" in line for line in lines)
    assert server.client.list() == {}


def test_reload_under_load(reloading: Start) -> None:
    """Reloads between calls lose no call."""
    server = reloading()
    stop = threading.Event()
    errors: list[Exception] = []

    def call() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            try:
                server.client.create("v")
                server.client.mount("v", "x")
                server.client.unmount("v", "x")
                server.client.remove("v")
            except (OSError, PluginError) as error:
                errors.append(error)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(call)
        for number in range(5):
            server.reload(f"sweep-interval = {number + 1}\n")
        stop.set()
    assert errors == []


def test_a_client_of_another_kind(plugin: Plugin) -> None:
    """A datagram socket cannot disturb it."""
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other,
        pytest.raises(OSError, match="wrong type for socket"),
    ):
        other.connect(str(plugin.socket))
    assert plugin.client.list() == {}
