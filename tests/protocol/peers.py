"""Servers, clients that look like engines, and containers, for the protocol tests."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from support.client import PluginError
from support.host import Host
from support.mounts import Mount, read_mounts
from support.plugin import Plugin

_PEER: Final = Path(__file__).with_name("peer.py")

_CONTAINER: Final = """
set -e
mount -t tmpfs root "$1"
cd "$1"
mkdir usr proc data old
ln -s usr/bin usr/sbin usr/lib usr/lib64 .
mount --bind /usr usr
mount -t proc proc proc
mount --bind "$2" data
pivot_root . old
exec chroot . sh -c 'umount -l /old; echo ready; exec sleep 600'
"""


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A directory with a short name, for a socket's path has at most 108 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="vp-")).resolve()
    try:
        yield folder
    finally:
        for mount in reversed(mounts_below(folder)):
            subprocess.run(["umount", "-l", mount.mountpoint], check=False)
        subprocess.run(["chattr", "-R", "-i", folder], check=False, capture_output=True)
        shutil.rmtree(folder)


def mounts_below(folder: Path) -> list[Mount]:
    """Return what is mounted in ``folder``."""
    return [m for m in read_mounts() if m.mountpoint.startswith(f"{folder}/")]


@contextlib.contextmanager
def serving(
    folder: Path, *, config: str = "", failpoints: str = ""
) -> Iterator[Plugin]:
    """A server that keeps all it has in ``folder``, tmpfs volumes too."""
    plugin = Plugin(folder, config=with_tmpfs(folder, config))
    try:
        plugin.start(failpoints=failpoints)
        yield plugin
    finally:
        plugin.close()


def with_tmpfs(folder: Path, config: str = "") -> str:
    """Return the configuration that puts tmpfs volumes in ``folder``."""
    return f'{config}\n[backend.tmpfs]\nroot = "{folder}/tmpfs"\n'


@contextlib.contextmanager
def serving_in_host(
    *, config: str = "", failpoints: str = "", sweep: float = 0.2
) -> Iterator[Plugin]:
    """A server in a mount namespace of its own, swept every ``sweep`` s."""
    host = Host()
    plugin = Plugin(
        host.folder, host=host, config=f"sweep-interval = {sweep}\n{config}"
    )
    try:
        plugin.start(failpoints=failpoints)
        yield plugin
    finally:
        with contextlib.ExitStack() as stack:
            stack.callback(host.close)
            stack.callback(plugin.close)


def host_of(plugin: Plugin) -> Host:
    """Return the host that ``plugin`` runs in."""
    assert plugin._host is not None
    return plugin._host


class Life:
    """One life of a client: a process named ``program`` that makes calls.

    It is in the plugin's host, unless the words ``enter`` bring it elsewhere.
    """

    def __init__(
        self, plugin: Plugin, program: str, enter: Sequence[str] | None = None
    ) -> None:
        self.program = program
        if enter is None:
            enter = [] if plugin._host is None else plugin._host.command()
        peer = [sys.executable, "-I", "-S", str(_PEER), str(plugin.socket)]
        self._process = subprocess.Popen(
            [*enter, *peer, program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._read() == "ready"

    @property
    def pid(self) -> int:
        """The process that the server sees."""
        return self._process.pid

    def begin(self, call: str, message: Mapping[str, object]) -> None:
        """Make a call and do not wait for its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([call, message]) + "\n")
        self._process.stdin.flush()

    def finish(self) -> tuple[int, dict[str, Any]]:
        """Return the answer of the call that was begun."""
        status, answer = json.loads(self._read())
        assert isinstance(answer, dict), f"no answer: {answer!r}"
        return status, answer

    def call(
        self, call: str, message: Mapping[str, object]
    ) -> tuple[int, dict[str, Any]]:
        """Make a call and return its status and answer."""
        self.begin(call, message)
        return self.finish()

    def ask(self, call: str, **message: object) -> dict[str, Any]:
        """Make a call that succeeds, or raise `PluginError`."""
        status, answer = self.call(call, message)
        if status != 200:
            raise PluginError(status, str(answer.get("Err")))
        return answer

    def mount(self, name: str, mount_id: str) -> str:
        """Mount a volume and return where it is."""
        return str(self.ask("Mount", Name=name, ID=mount_id)["Mountpoint"])

    def unmount(self, name: str, mount_id: str) -> None:
        """Unmount a volume."""
        self.ask("Unmount", Name=name, ID=mount_id)

    def end(self) -> None:
        """End this life as a crash does; its connections close."""
        self._process.kill()
        self._process.wait(10)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the client ended: {self._process.poll()}"
        return line.strip()


class Lives:
    """The clients of a test; all end with it."""

    def __init__(self, plugin: Plugin) -> None:
        self._plugin = plugin
        self._begun: list[Life] = []

    def begin(
        self, program: str = "dockerd", enter: Sequence[str] | None = None
    ) -> Life:
        """Begin a life of ``program``."""
        life = Life(self._plugin, program, enter)
        self._begun.append(life)
        return life

    def close(self) -> None:
        """End all that have not ended."""
        for life in self._begun:
            life.end()


@contextlib.contextmanager
def lives_of(plugin: Plugin) -> Iterator[Lives]:
    """Clients of ``plugin`` for one test."""
    lives = Lives(plugin)
    try:
        yield lives
    finally:
        lives.close()


class Container:
    """A process with a root and a mount namespace of its own, a volume at ``/data``."""

    def __init__(self, plugin: Plugin, path: str) -> None:
        host = host_of(plugin)
        self._root = tempfile.mkdtemp(dir=host.folder)
        self._process = subprocess.Popen(
            host.command(
                *("unshare", "--mount", "--propagation", "private"),
                *("sh", "-c", _CONTAINER, "sh", self._root, path),
            ),
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    @property
    def pid(self) -> int:
        """Its first process."""
        return self._process.pid

    @property
    def data(self) -> Path:
        """How this process reaches the volume in the container."""
        return Path(f"/proc/{self.pid}/root/data")

    def end(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait(10)
        assert self._process.stdout is not None
        self._process.stdout.close()
        os.rmdir(self._root)


@contextlib.contextmanager
def container(plugin: Plugin, path: str) -> Iterator[Container]:
    """A container that has the volume at ``path``, until it or the test ends."""
    running = Container(plugin, path)
    try:
        yield running
    finally:
        if running._process.returncode is None:
            running.end()


def mount_of(plugin: Plugin, path: str) -> Mount | None:
    """Return what is mounted on ``path`` in the plugin's host, which is one or none."""
    found = [m for m in host_of(plugin).mounts() if m.mountpoint == path]
    assert len(found) <= 1, f"mounted {len(found)} times: {found}"
    return found[0] if found else None


def holders(plugin: Plugin, name: str) -> int:
    """Return how many mounts the plugin counts for a volume."""
    count = plugin.client.get(name)["Status"]["mounts"]
    assert isinstance(count, int)
    return count
