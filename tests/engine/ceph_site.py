"""Two docker hosts that share the volumes of a cluster, for the tests of containers.

Each is a host to the cluster: a plugin with a root, an identity and a name of its own,
on a socket of scope local and one of scope global, and a dockerd that looks for both.
"""

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from support import processes
from support.ceph import POOL, Ceph
from support.client import Client
from support.docker import DockerError
from support.engine import Engine
from support.plugin import plugin_environment
from support.wait import eventually

GLOBAL_SOCKET: Final = "/run/docker/plugins/ceph.sock"

_CONFIG: Final = """\
follow-interval = 1

[socket.ceph]
path = "{socket}"
default-backend = "ceph"
scope = "global"

[backend.cephfs]
conf = "{conf}"
user = "volplugin"
keyring = "{keyring}"
directory = "/{namespace}"
host-name = "{name}"
mount = "fuse"

{ceph}
"""
# What RBD and the registry keep in a namespace that holds nothing.
_KEPT: Final = {
    "rbd_children",
    "rbd_directory",
    "rbd_info",
    "rbd_trash",
    "volplugin.index",
}


class CephHost:
    """A docker host of the site: its ``docker``, its ``plugin``, and what it has."""

    def __init__(self, site: "Site", name: str) -> None:
        ceph, namespace = site.ceph, site.namespace
        # Of all mappers the one that every machine has.
        backend = ceph.backend(
            namespace=namespace, mapper="qemu", **{"host-name": name}
        )
        config = _CONFIG.format(
            socket=GLOBAL_SOCKET,
            conf=ceph.conf,
            keyring=ceph.least(),
            namespace=namespace,
            name=name,
            ceph=backend,
        )
        arguments = ("--socket", GLOBAL_SOCKET)
        self.name = name
        self.engine = Engine(config=config, arguments=arguments)
        self.docker = self.engine.docker
        self.plugin = self.engine.plugin
        self.globe = Client(self.engine.host.path(GLOBAL_SOCKET))

    def create(self, name: str, *options: str, driver: str = "volplugin") -> None:
        """Do as ``docker volume create -o …``."""
        words = [word for option in options for word in ("-o", option)]
        self.docker("volume", "create", "-d", driver, *words, name)

    def refusal(self, *words: str) -> str:
        """Run ``docker`` with words that must fail; return what it says."""
        try:
            said = self.docker(*words)
        except DockerError as error:
            return error.stderr
        raise AssertionError(f"docker {' '.join(words)} succeeded: {said}")

    def status(self, volume: str) -> dict[str, object]:
        """Return what ``docker volume inspect`` shows as Status."""
        status = self.docker.inspect("volume", volume)["Status"]
        assert isinstance(status, dict)
        return status

    def run(self, *words: str) -> str:
        """Run volplugin's command line for this host; return what it prints."""
        command = [sys.executable, "-m", "volplugin", *words]
        command += ["--admin-socket", str(self.plugin.admin_socket)]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            env=plugin_environment(),
            timeout=100,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def mounts(self) -> list[str]:
        """Return what is mounted here of volumes and of their images."""
        below = f"{self.plugin.root}/"
        found = [mount.mountpoint for mount in self.engine.host.mounts()]
        return [path for path in found if path.startswith(below)]

    def helpers(self) -> list[str]:
        """Return the programs that map and mount volumes here."""
        commands = map(processes.command_of, self.engine.host.processes())
        names = ("qemu-storage-daemon", "ceph-fuse", "rbd-nbd")
        return [
            command
            for command in commands
            if command.partition(" ")[0].rpartition("/")[2] in names
        ]

    def loops(self) -> list[str]:
        """Return the loop devices on images of volumes of this host."""
        # losetup looks at every file, and would hang on that of a hung cluster.
        files = Path("/sys/block").glob("loop*/loop/backing_file")
        shown = [_read(file).strip() for file in files]
        return [path for path in shown if path.startswith(f"{self.plugin.root}/")]

    def is_free(self) -> bool:
        """Tell whether the host has no volume attached."""
        return not (self.mounts() or self.helpers() or self.loops())

    def eventually_free(self) -> None:
        """Return when the host has no volume attached."""
        with contextlib.suppress(AssertionError):
            eventually(self.is_free, "nothing is attached")
        left = (self.mounts(), self.helpers(), self.loops())
        assert left == ([], [], []), f"left on {self.name}: {left}"

    def clear(self) -> None:
        """Remove all containers; nothing may stay attached."""
        if not self.plugin.is_running():
            self.plugin.start()
        containers = self.docker("ps", "-aq").split()
        if containers:
            self.docker("rm", "-fv", *containers)
        self.eventually_free()


class Site:
    """The hosts ``a`` and ``b``; `clear` between tests."""

    def __init__(self, ceph: Ceph) -> None:
        self.ceph = ceph
        self.namespace = ceph.namespace()
        self.a = CephHost(self, "hosta")
        self.b = CephHost(self, "hostb")

    @property
    def hosts(self) -> tuple[CephHost, CephHost]:
        """Both."""
        return self.a, self.b

    def both_know(self, volume: str) -> None:
        """Return when the plugins of both hosts have the volume on record."""
        for host in self.hosts:
            eventually(lambda h=host: volume in h.plugin.client.list(), volume)  # type: ignore[misc]

    def clear(self) -> None:
        """Remove all containers and volumes; nothing of them may stay anywhere."""
        for host in self.hosts:
            host.clear()
        for volume in self.a.plugin.client.list():
            self.a.plugin.client.remove(volume)
        for host in self.hosts:
            eventually(lambda h=host: not h.plugin.client.list(), "no volume is known")  # type: ignore[misc]
            eventually(
                lambda h=host: (
                    not h.engine.host.run("ls", f"{h.plugin.root}/ceph/volumes")
                ),  # type: ignore[misc]
                "no mountpoint is left",
            )
            # dockerd forgets a volume that is gone when it next looks.
            assert host.docker("volume", "ls", "-q") == ""
        with contextlib.suppress(AssertionError):
            eventually(lambda: not self._left(), "the cluster is as before", seconds=45)
        assert self._left() == [], f"left in {self.namespace}"

    def _left(self) -> list[str]:
        place = f"{POOL}/{self.namespace}"
        trash = json.loads(
            self.ceph.rbd("trash", "ls", "--all", place, "--format", "json")
        )
        objects = self.ceph.rados("-p", POOL, "-N", self.namespace, "ls").split()
        records = self.ceph.rados("-p", "cephfs_data", "--all", "ls").splitlines()
        return [
            *map(str, trash),
            *sorted(set(objects) - _KEPT),
            *(line for line in records if "volplugin.volume." in line),
        ]

    def close(self) -> None:
        """End all of it."""
        with contextlib.ExitStack() as stack:
            for host in self.hosts:
                stack.callback(host.engine.close)


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:  # it has gone meanwhile
        return ""


@contextlib.contextmanager
def running(ceph: Ceph) -> Iterator[Site]:
    """A site from its start to its end."""
    site = Site(ceph)
    try:
        for host in site.hosts:
            host.engine.start()
        yield site
    finally:
        site.close()
