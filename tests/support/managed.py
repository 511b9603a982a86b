"""The managed plugin as a user gets it: built, pushed to a registry, and installed."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import attrs
import pytest

from support import processes
from support.capabilities import CAP_SYS_RESOURCE, has_capability
from support.client import Client
from support.docker import Docker, DockerError
from support.host import Host
from support.mounts import Mount, read_mounts
from support.plugin import REPOSITORY
from support.require import require
from support.wait import eventually

NAME: Final = "volplugin"
TREE: Final = "/volumes"
REGISTRY: Final = "127.0.0.1:5000"
FIRST: Final = f"{REGISTRY}/volplugin:1"
SECOND: Final = f"{REGISTRY}/volplugin:2"
SECOND_VERSION: Final = "99.0"

_REGISTRY: Final = """
version: 0.1
log: {{level: warn}}
storage: {{filesystem: {{rootdirectory: {folder}}}}}
http: {{addr: "127.0.0.1:5000"}}
"""


@attrs.frozen
class Built:
    """Both versions of the plugin, ready for ``docker plugin create``."""

    first: Path
    second: Path
    told: str
    """What was said of the first."""


def assemble(directory: Path) -> str:
    """Make the plugin in ``directory``; return the line that tells of it."""
    for program in ("make", "mmdebstrap"):
        require(program)
    done = subprocess.run(
        ["make", "--no-print-directory", "plugin", f"PLUGIN={directory}"],
        cwd=REPOSITORY,
        env={**os.environ, "SOURCE_DATE_EPOCH": "1700000000"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def fit(directory: Path) -> None:
    """Leave out of the plugin's rights what this machine itself does not have.

    runc starts nothing with a capability that its own process lacks.
    """
    file = directory / "config.json"
    config = json.loads(file.read_text())
    if not has_capability(CAP_SYS_RESOURCE):
        config["linux"]["capabilities"].remove("CAP_SYS_RESOURCE")
    file.write_text(json.dumps(config))


def age(directory: Path, version: str) -> None:
    """Make the plugin in ``directory`` one of another ``version``."""
    package = directory / "rootfs/usr/lib/python3/dist-packages/volplugin"
    (package / "__init__.py").write_text(f'__version__ = "{version}"\n')
    for compiled in (package / "__pycache__").glob("__init__.*.pyc"):
        compiled.unlink()


class Managed:
    """A host with a dockerd, a registry in it, and two versions of the plugin there."""

    def __init__(self, built: Built, *, live_restore: bool = False) -> None:
        self._registry = require("docker-registry")
        self.host = Host(own_network=True)
        self.docker = Docker(self.host, live_restore=live_restore)
        self.data = self.host.folder / "data"
        self.data.mkdir()
        self._built = built
        self._serving: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start dockerd and the registry, and push the first version."""
        self.docker.start()
        self.docker.load_images()
        settings = self.host.folder / "registry.yml"
        settings.write_text(_REGISTRY.format(folder=self.host.folder / "registry"))
        log = self.host.folder / "registry.log"
        self._serving = self.host.start(self._registry, "serve", settings, log=log)
        self._offer(FIRST, self._built.first)

    def offer_second(self) -> None:
        """Push the second version."""
        self._offer(SECOND, self._built.second)

    def _offer(self, name: str, directory: Path) -> None:
        self.docker("plugin", "create", name, str(directory))
        eventually(partial(self._push, name), "the registry takes it")
        self.docker("plugin", "rm", name)

    def _push(self, name: str) -> bool:
        with contextlib.suppress(Exception):
            self.docker("plugin", "push", name)
            return True
        return False

    def install(self, *settings: str) -> None:
        """Do as ``docker plugin install``, with the data in a folder of the host's."""
        words = ("--grant-all-permissions", "--alias", NAME, FIRST)
        where = f"data.source={self.data}"
        self.docker("plugin", "install", *words, where, *settings)

    def inspect(self) -> dict[str, Any]:
        """Return what ``docker plugin inspect`` tells."""
        (answer,) = json.loads(self.docker("plugin", "inspect", NAME))
        assert isinstance(answer, dict)
        return answer

    def reset(self) -> None:
        """Have the plugin enabled, with the settings it was installed with."""
        names = [each.split("=")[0] for each in self.inspect()["Settings"]["Env"]]
        self.docker("plugin", "set", NAME, *(f"{name}=" for name in names))
        self.enable_after_failure()

    def enable_after_failure(self) -> None:
        """Enable the plugin after an enable that failed.

        dockerd 20.10 then says that the id is in use, and starts it all the same.
        """
        with contextlib.suppress(DockerError):
            self.docker("plugin", "enable", NAME)
        self.wait_until_ready()

    @property
    def id(self) -> str:
        """The plugin's id, by which its folders are named."""
        return str(self.inspect()["Id"])

    @property
    def client(self) -> Client:
        """A client that calls the plugin beside dockerd."""
        # By a short name: a socket's path has at most 107 bytes.
        short = self.host.folder / "s"
        short.unlink(missing_ok=True)
        short.symlink_to(self.host.path(f"/run/docker/plugins/{self.id}"))
        return Client(short / "volplugin.sock")

    def pids(self) -> list[int]:
        """Return the plugin's processes, by where their root directory is."""
        place = f"{self.host.folder}/docker-data/plugins/"
        ours = processes.mount_namespace("self")
        found = []
        for pid in (int(entry) for entry in os.listdir("/proc") if entry.isdecimal()):
            if processes.mount_namespace(pid) in {None, ours, self.host.namespace}:
                continue
            with contextlib.suppress(OSError):
                if any(
                    mount.mountpoint == "/" and mount.root.startswith(place)
                    for mount in read_mounts(pid)
                ):
                    found.append(pid)
        return sorted(found)

    def pid_of(self, program: str) -> int:
        """Return the plugin's process of this name."""
        found = [
            pid
            for pid in self.pids()
            if Path(f"/proc/{pid}/comm").read_text().strip() == program
        ]
        assert len(found) == 1, f"{program}: {found}"
        return found[0]

    def kill(self, program: str) -> None:
        """End the plugin's process of this name by SIGKILL, and wait for the next."""
        pid = self.pid_of(program)
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: not processes.is_alive(pid), "it is dead")
        self.wait_until_ready()

    def wait_until_ready(self) -> None:
        """Return once the plugin answers, and dockerd has seen that it does.

        dockerd looks for a plugin that it has started after 0.5 s, and again after 3 s:
        one that has died meanwhile it leaves disabled.
        """
        eventually(self.answers, "the plugin answers")
        time.sleep(1)

        def works() -> bool:
            with contextlib.suppress(DockerError):
                self.docker("volume", "create", "-d", NAME, "ready")
                self.docker("volume", "rm", "ready")
                return True
            return False

        eventually(works, "dockerd uses the plugin")

    def answers(self) -> bool:
        """Return whether the plugin answers."""
        with contextlib.suppress(OSError):
            return self.client.request("/VolumeDriver.Capabilities").status == 200
        return False

    def mounts(self) -> list[Mount]:
        """Return the volumes that the host has mounted."""
        place = f"{self.host.folder}/docker-data/plugins/"
        return [
            mount
            for mount in self.host.mounts()
            if mount.mountpoint.startswith(place)
            and "/propagated-mount/" in mount.mountpoint
        ]

    def volume(self, name: str) -> Mapping[str, Any]:
        """Return what ``docker volume inspect`` tells."""
        return self.docker.inspect("volume", name)

    def clear_volumes(self) -> None:
        """Remove all containers and volumes; nothing of them may stay."""
        containers = self.docker("ps", "-aq").split()
        if containers:
            self.docker("rm", "-fv", *containers)
        volumes = self.docker("volume", "ls", "-q").split()
        if volumes:
            self.docker("volume", "rm", *volumes)
        eventually(lambda: not self.mounts(), "all volumes are unmounted")

    def clear(self) -> None:
        """Do as `clear_volumes`, and remove the plugin."""
        self.clear_volumes()
        self.docker("plugin", "rm", "-f", NAME)
        assert self.pids() == []

    def close(self) -> None:
        """End all that runs, the plugin too, and the host."""
        with contextlib.ExitStack() as stack:
            stack.callback(self.host.close)
            stack.callback(self._clear_data)
            stack.callback(lambda: processes.end(lambda: set(self.pids())))
            stack.callback(self._end_registry)
            stack.callback(self.docker.close)

    def _end_registry(self) -> None:
        if self._serving is not None:
            self._serving.kill()
            self._serving.wait(10)

    def _clear_data(self) -> None:
        # Unmounted mountpoints are immutable.
        subprocess.run(["chattr", "-R", "-f", "-i", self.data], check=False)
        shutil.rmtree(self.data)


def build(directory: Path) -> Built:
    """Make both versions of the plugin in ``directory``."""
    first, second = directory / "1", directory / "2"
    told = assemble(first)
    fit(first)
    subprocess.run(["cp", "-a", first, second], check=True)
    age(second, SECOND_VERSION)
    return Built(first, second, told)


@contextlib.contextmanager
def running(built: Built, *, live_restore: bool = False) -> Iterator[Managed]:
    """A host with the plugin installed, from start to end."""
    managed = Managed(built, live_restore=live_restore)
    try:
        managed.start()
        managed.install()
        yield managed
        managed.clear()
    finally:
        managed.close()


@pytest.fixture(scope="session")
def built(temporary_folder: None) -> Iterator[Built]:
    """Two versions of the plugin; the first as `make plugin` has made it."""
    directory = Path(tempfile.mkdtemp(prefix="plugin-"))
    try:
        yield build(directory)
    finally:
        shutil.rmtree(directory)


@pytest.fixture(scope="module")
def shared_managed(built: Built) -> Iterator[Managed]:
    """A host with the plugin installed, for the tests of a module."""
    with running(built) as managed:
        yield managed


@pytest.fixture
def managed(shared_managed: Managed) -> Iterator[Managed]:
    """The module's host, with no container and no volume before and after."""
    yield shared_managed
    if not shared_managed.inspect()["Enabled"]:  # of a test that failed
        shared_managed.reset()
    shared_managed.clear_volumes()
