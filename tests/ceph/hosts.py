"""Hosts for the tests of several: each a real server with a root of its own.

To the cluster a server with its own root, identity and name is a host. One is hung or
killed with the programs that map its images, as its containers' I/O goes through them.
"""

import contextlib
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Self

import attrs
from support import processes
from support.ceph import POOL, Ceph
from support.client import Client, PluginError
from support.connections import Connector
from support.mounts import read_mounts
from support.plugin import Plugin, plugin_environment
from support.require import require
from support.wait import eventually

from volplugin.host import loops

SMALL: Final = {"driver": "ceph", "size": "32M"}
BLOCK: Final = 4096  # bytes of a block of `Writer`

# Appends blocks, and tells of each that it is synced; ends with the error's number. At
# most 400 KiB in a second: for as long as a test may take, there is room in the volume.
_WRITER: Final = """
import hashlib, os, signal, sys, time
ended = []
signal.signal(signal.SIGTERM, lambda *_: ended.append(1))
number = int(sys.argv[2])
with open(sys.argv[1], "ab", buffering=0) as file:
    while not ended:
        try:
            file.write(hashlib.sha256(b"%d" % number).digest() * 128)
            os.fsync(file.fileno())
        except OSError as error:
            raise SystemExit(error.errno)
        print(number, flush=True)
        number += 1
        time.sleep(0.01)
"""

_CEPHFS: Final = """\
[backend.cephfs]
conf = "{conf}"
user = "volplugin"
keyring = "{keyring}"
directory = "{directory}"
mount = "fuse"
host-name = "{name}"
"""


class Writer:
    """A program that writes and syncs a file on and on, as a database would.

    ``first`` is the number of its first block: those before it must be there.
    """

    def __init__(self, file: Path, first: int = 0) -> None:
        self._first = first
        self._told = tempfile.TemporaryFile()  # noqa: SIM115  it is closed with it
        self._process = subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(file), str(first)],
            stdout=self._told,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """End it, if it is still there."""
        self._process.kill()
        self._process.wait(60)
        self._told.close()

    @property
    def synced(self) -> int:
        """How many blocks the file has for certain."""
        size = os.fstat(self._told.fileno()).st_size
        lines = os.pread(self._told.fileno(), size, 0).split(b"\n")
        return int(lines[-2]) + 1 if len(lines) > 1 else self._first

    def is_under_way(self, blocks: int = 5) -> bool:
        """Tell whether it has written some."""
        assert self._process.poll() is None, "it has ended"
        return self.synced >= self._first + blocks

    def stop(self) -> int:
        """End it after the block that it is at; return how many are synced."""
        self._process.terminate()
        status = self._process.wait(60)
        assert status == 0, f"it failed: {os.strerror(status)}"
        return self.synced

    def error(self) -> int:
        """Wait until a write fails; return the error's number."""
        return self._process.wait(60)


def assert_written(file: Path, blocks: int) -> None:
    """Check that the first ``blocks`` of a `Writer` are in the file."""
    with file.open("rb") as opened:
        for number in range(blocks):
            expected = hashlib.sha256(b"%d" % number).digest() * 128
            assert opened.read(BLOCK) == expected, f"block {number} of {blocks}"


def fill(file: Path, size: int = 1 << 20) -> str:
    """Write and sync a file of no pattern; return its checksum."""
    with file.open("wb") as opened:
        opened.write(os.urandom(size))
        os.fsync(opened.fileno())
    return checksum(file)


def checksum(file: Path) -> str:
    """Return the checksum of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


class Inside(Plugin):
    """A server in the namespaces that `enter` brings it into, with its helpers.

    Its engine is there too: it gets no mount whose mounts it can't see.
    """

    def __init__(self, folder: Path, enter: Sequence[str], config: str) -> None:
        super().__init__(folder, config=config)
        self._enter: Sequence[str] = ()
        self._connector: Connector | None = None
        self.enter(enter)

    def enter(self, words: Sequence[str]) -> None:
        """Have the next start begin with ``words``, and the engine come from there."""
        self._leave()
        self._enter = words
        if words:
            self._connector = Connector(words)
        self.client = Client(self.socket, connector=self._connector)

    def _leave(self) -> None:
        if self._connector is not None:
            self._connector.close()
        self._connector = None

    def command(self, *words: str) -> list[str]:
        return [*self._enter, *super().command(*words)]

    def close(self) -> None:
        self._leave()
        self.client = Client(self.socket)  # what is still to be asked, it may answer
        super().close()


@attrs.define(eq=False)
class Server:
    """A host: a server, and what its engine would have mounted."""

    name: str
    folder: Path
    plugin: Inside
    mounted: list[tuple[str, str]] = attrs.field(factory=list)
    has_died: bool = False

    @property
    def client(self) -> Client:
        """What calls it."""
        return self.plugin.client

    def mount(self, volume: str, mount_id: str = "1") -> Path:
        """Mount a volume, as for a container; return where it is."""
        path = Path(self.client.mount(volume, mount_id))
        self.mounted.append((volume, mount_id))
        assert self.is_mounted(volume), f"{path} has nothing on it"
        return path

    def tried(self, volume: str) -> str:
        """Mount a volume; return why it was refused, or an empty text."""
        try:
            self.mount(volume)
        except PluginError as error:
            return str(error)
        return ""

    def unmount(self, volume: str, mount_id: str = "1") -> None:
        """Unmount a volume, as when a container has ended."""
        if (volume, mount_id) in self.mounted:
            self.mounted.remove((volume, mount_id))
        self.client.unmount(volume, mount_id)

    def is_mounted(self, volume: str) -> bool:
        """Tell whether a volume is mounted here."""
        return any(
            mount.mountpoint.startswith(f"{self.plugin.root}/")
            and Path(mount.mountpoint).name == volume
            for mount in read_mounts(self.plugin.pid)
        )

    def status(self, volume: str) -> dict[str, Any]:
        """Return what Status tells of a volume."""
        status = self.client.get(volume)["Status"]
        assert isinstance(status, dict)
        return status

    def refusal(self, method: str, volume: str, **body: object) -> str:
        """Call what must be refused; return the words."""
        status, answer = self.client.call(method, {"Name": volume, **body})
        assert status != 200, answer
        return str(answer["Err"])

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run the command line of this host."""
        command = [sys.executable, "-m", "volplugin", *words]
        command += ["--admin-socket", str(self.plugin.admin_socket)]
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            env=plugin_environment(),
            timeout=100,
        )

    def told(self, *words: str) -> str:
        """Run a command line that must succeed; return what it prints."""
        done = self.run(*words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def mapping(self, volume: str = "") -> set[int]:
        """Return the programs by which the volume, or all, is mapped or mounted."""
        found = set()
        for pid in filter(str.isdigit, os.listdir("/proc")):
            words = processes.command_of(int(pid))
            program = words.partition(" ")[0].rpartition("/")[2]
            if (
                program in {"qemu-storage-daemon", "ceph-fuse"}
                and f"{self.plugin.root}/" in words
                and f"{volume}." in words
                and processes.is_alive(int(pid))
            ):
                found.add(int(pid))
        return found

    def hang(self) -> None:
        """Stop all that makes up the host, where it is."""
        for pid in (self.plugin.pid, *self.mapping()):
            os.kill(pid, signal.SIGSTOP)

    def wake(self) -> None:
        """Let the host that hangs go on."""
        for pid in (*self.mapping(), self.plugin.pid):
            os.kill(pid, signal.SIGCONT)

    def die(self) -> None:
        """Kill all that makes up the host; what it had mounted is of no use."""
        self.has_died = True
        self.plugin.kill()
        for pid in self.mapping():
            os.kill(pid, signal.SIGKILL)
        eventually(lambda: not self.mapping(), "the programs that map are gone")


class Hosts:
    """Hosts that share the volumes of one namespace, each made by its name's call.

    Each has a backend ``ceph`` and, with ``directory``, a backend ``cephfs``. The words
    ``enter`` begin its command line, and bring it into namespaces of its own.
    """

    def __init__(
        self, ceph: Ceph, namespace: str, *, directory: str | None = None
    ) -> None:
        self.ceph = ceph
        self.namespace = namespace
        self._directory = directory
        self._made: dict[str, Server] = {}

    def __call__(
        self,
        name: str,
        *,
        enter: Sequence[str] = (),
        config: str = "",
        **settings: str,
    ) -> Server:
        if name in self._made:
            return self._made[name]
        # Short, because a socket's path has at most 108 bytes.
        folder = Path(tempfile.mkdtemp(prefix=f"{name}-")).resolve()
        text = self.configuration(name, folder, config, **settings)
        plugin = Inside(folder, enter, text)
        server = Server(name=name, folder=folder, plugin=plugin)
        self._made[name] = server
        server.plugin.start()
        return server

    def configuration(
        self, name: str, folder: Path, config: str = "", **settings: str
    ) -> str:
        """Return the configuration of a host."""
        # The mapper whose parts can be stopped and killed on every machine.
        given = {"mapper": "qemu", "host-name": name, **settings}
        backends = self.ceph.backend(namespace=self.namespace, **given)
        if self._directory is not None:
            backends += _CEPHFS.format(
                conf=self.ceph.conf,
                keyring=self.ceph.least(),
                directory=self._directory,
                name=name,
            )
        return (
            f"sweep-interval = 0.2\nfollow-interval = 2\n{config}\n{backends}"
            f'[backend.tmpfs]\nroot = "{folder}/tmpfs"\n'
        )

    def all_know(self, *volumes: str) -> None:
        """Return when each host knows the volumes."""
        wanted = set(volumes)
        for host in self._made.values():
            eventually(
                lambda host=host: wanted <= set(host.client.list()),  # type: ignore[misc]
                f"{host.name} knows {volumes}",
            )

    def image(self, volume: str) -> str:
        """Return the image of a volume."""
        shown = self.ceph.rbd("ls", f"{POOL}/{self.namespace}").split()
        (image,) = (each for each in shown if each.startswith(f"{volume}."))
        return f"{POOL}/{self.namespace}/{image}"

    def assert_whole(self, volume: str) -> None:
        """Check the file system of a volume that no host has."""
        file = Path(tempfile.mkdtemp()) / "image"
        try:
            self.ceph.rbd("export", "--no-progress", self.image(volume), file)
            done = subprocess.run(
                [require("e2fsck"), "-f", "-n", file],
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stdout + done.stderr
        finally:
            shutil.rmtree(file.parent)

    def clear(self) -> None:
        """Take away all volumes, and what they left on hosts and in the cluster."""
        for host in self._made.values():
            if host.plugin.is_running():
                host.wake()
            else:
                host.plugin.start()
            for volume, mount_id in sorted(host.mounted):
                # Whoever makes a mount namespace has a copy of each mount for a while:
                # then the sweep takes it down.
                with contextlib.suppress(PluginError):
                    host.unmount(volume, mount_id)
        for host in self._made.values():
            eventually(
                lambda host=host: not host.mapping(),  # type: ignore[misc]
                f"{host.name} is free",
                seconds=60,
            )
        for host in list(self._made.values())[:1]:
            eventually(lambda host=host: _removed_all(host), "all is removed")  # type: ignore[misc]
        place = f"{POOL}/{self.namespace}"
        eventually(
            lambda: not self.ceph.rbd("trash", "ls", "--all", place).strip(),
            "the trash is empty",
        )
        # What snapshots kept of an object goes some time after its image.
        objects = ("-p", POOL, "-N", self.namespace, "ls")
        eventually(
            lambda: "rbd_data." not in self.ceph.rados(*objects),
            "the data of deleted images is gone",
            seconds=60,
        )

    def close(self) -> None:
        """End all servers and remove their folders."""
        with contextlib.ExitStack() as stack:
            if any(host.has_died for host in self._made.values()):
                stack.callback(self._forget_dead)
            for host in self._made.values():
                stack.callback(shutil.rmtree, host.folder)
                stack.callback(_unmount_below, host)
                stack.callback(host.plugin.close)

    def _forget_dead(self) -> None:
        """Have the cluster forget the servers that were killed, which takes it 30 s."""
        place = ("-p", POOL, "-N", self.namespace)
        watchers = self.ceph.rados(*place, "listwatchers", "volplugin.index")
        for address in re.findall(r"watcher=(\S+)", watchers):
            self.ceph.ceph("osd", "blocklist", "add", address, "60")


def _removed_all(host: Server) -> bool:
    for volume in host.client.list():
        with contextlib.suppress(PluginError):  # copies before what they are of
            host.client.remove(volume)
    return not host.client.list()


def _unmount_below(host: Server) -> None:
    """Leave nothing behind of a test that failed."""
    for pid in host.mapping():
        os.kill(pid, signal.SIGKILL)
    mapped = [
        device
        for device, file in loops.backing_files().items()
        if file.startswith(f"{host.folder}/")
    ]
    for mount in reversed(read_mounts()):
        if mount.mountpoint.startswith(f"{host.folder}/"):
            subprocess.run(["umount", "-l", mount.mountpoint], check=False)
    for device in mapped:
        subprocess.run([require("losetup"), "-d", device], check=False)
    subprocess.run(["chattr", "-R", "-i", host.folder], check=False, stderr=-3)


@contextlib.contextmanager
def sharing(
    ceph: Ceph, namespace: str, *, directory: str | None = None
) -> Iterator[Hosts]:
    """Hosts that share a namespace, where nothing is left of them at the end."""
    hosts = Hosts(ceph, namespace, directory=directory)
    try:
        yield hosts
        hosts.clear()
    finally:
        hosts.close()
