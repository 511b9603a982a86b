"""A real podman in a `Host`: no daemon, each command is a process of its own."""

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from typing import Any

from support.host import Host
from support.images import IMAGE, SEED_IMAGE, image_archive
from support.mounts import Mount
from support.plugin import DOCKER_SOCKET, Plugin
from support.require import require


class PodmanError(Exception):
    """The command failed: its standard error."""


class Podman:
    """Call it with a command line's words: ``podman("ps")``."""

    def __init__(self, host: Host) -> None:
        self._host = host
        storage = host.folder / "podman"
        storage.mkdir()
        self._command = [
            require("podman"),
            f"--root={storage / 'root'}",
            # By these being gone podman tells that the host has booted.
            "--runroot=/run/containers",
            "--tmpdir=/run/libpod",
            "--cgroup-manager=cgroupfs",
        ]
        # podman has no discovery: a plugin is a line in this file.
        self._config = storage / "containers.conf"
        self.configure()
        # The defaults raise limits, which a root without CAP_SYS_RESOURCE can't.
        limits = ["--ulimit=nofile=1024:1024", "--ulimit=nproc=1000:1000"]
        self._flags = ["--network=none", f"--cgroup-parent={host.cgroup}", *limits]

    def configure(self, engine: str = "") -> None:
        """Write podman's configuration, with ``engine`` as lines of its own."""
        self._config.write_text(
            f"[engine]\n{engine}\n"
            f'[engine.volume_plugins]\nvolplugin = "{DOCKER_SOCKET}"\n'
        )

    def load_images(self) -> None:
        """Make `IMAGE` and `SEED_IMAGE`."""
        self("import", "-", IMAGE, data=image_archive(seeded=False))
        self("import", "-", SEED_IMAGE, data=image_archive(seeded=True))

    def __call__(self, *words: str, data: bytes = b"", limit: int = 60) -> str:
        """Run ``podman`` with ``words`` and return what it prints, stripped.

        Raise `PodmanError` when it fails; ``limit`` seconds are its time.
        """
        done = subprocess.run(
            self._host.command(*self._command, *words),
            input=data,
            capture_output=True,
            env=self._environment,
            timeout=limit,
            check=False,
        )
        if done.returncode:
            raise PodmanError(done.stderr.decode(errors="replace").strip())
        return done.stdout.decode().strip()

    @property
    def _environment(self) -> dict[str, str]:
        return {**os.environ, "CONTAINERS_CONF": str(self._config)}

    def start_run(self, *words: str) -> subprocess.Popen[bytes]:
        """Do as `run` in the background, for a podman that does not live to its end."""
        return self._host.start(
            *(*self._command, "run", *self._flags, *words),
            log=self._host.folder / "podman.log",
            environment=self._environment,
        )

    def run(self, *words: str) -> str:
        """Do as ``podman run`` without a network; return what the container prints."""
        return self("run", *self._flags, *words)

    def sleeper(self, name: str, *words: str) -> str:
        """Start a container that sleeps for long, with ``words`` as its flags."""
        return self.run("-d", "--name", name, *words, IMAGE, "sleep", "600")

    def create(self, *words: str) -> str:
        """Do as ``podman run`` without starting it; return the container's ID."""
        return self("create", *self._flags, *words)

    def inspect(self, volume: str) -> dict[str, Any]:
        """Return what ``podman volume inspect`` tells."""
        (answer,) = json.loads(self("volume", "inspect", volume))
        assert isinstance(answer, dict)
        return answer

    def volumes(self) -> set[str]:
        """Return the names of the volumes that podman knows."""
        return set(self("volume", "ls", "--quiet").split())

    def clear(self) -> None:
        """Remove all containers and volumes."""
        self("rm", "--all", "--force", "--time", "0")
        self("volume", "prune", "--force")


class PodmanEngine:
    """``host``, ``plugin`` and ``podman``; `clear` between tests."""

    def __init__(self) -> None:
        self.host = Host()
        self._inherited = {mount.source for mount in self.host.mounts()}
        self.plugin = Plugin(
            self.host.folder, host=self.host, config="sweep-interval = 1\n"
        )
        self.podman = Podman(self.host)

    def mounts(self) -> list[Mount]:
        """Return the plugin's tmpfs mounts that the host has.

        Without those that the machine had when the host was cut off from it: another
        plugin may be at work there.
        """
        return [
            mount
            for mount in self.host.mounts()
            if mount.source.startswith("volplugin-")
            and mount.source not in self._inherited
        ]

    def clear(self) -> None:
        """Remove all containers and volumes; nothing of them may stay."""
        self.podman.clear()
        assert self.plugin.client.list() == {}
        assert self.mounts() == []

    def close(self) -> None:
        """End the plugin and the host; each tells if anything is wrong."""
        with contextlib.ExitStack() as stack:
            stack.callback(self.host.close)
            stack.callback(self.plugin.close)


@contextlib.contextmanager
def running_podman() -> Iterator[PodmanEngine]:
    """A podman with images and the plugin, from their start to their end."""
    engine = PodmanEngine()
    try:
        engine.plugin.start()
        engine.podman.load_images()
        yield engine
        engine.clear()
    finally:
        engine.close()
