"""A real podman in a `Host`: no daemon, each command is a process of its own."""

import os
import subprocess

from support.host import Host
from support.images import IMAGE, SEED_IMAGE, image_archive
from support.plugin import DOCKER_SOCKET
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
            f"--runroot={storage / 'run'}",
            f"--tmpdir={storage / 'tmp'}",
            "--cgroup-manager=cgroupfs",
        ]
        # podman has no discovery: a plugin is a line in this file.
        self._config = storage / "containers.conf"
        self._config.write_text(
            f'[engine.volume_plugins]\nvolplugin = "{DOCKER_SOCKET}"\n'
        )
        # The defaults raise limits, which a root without CAP_SYS_RESOURCE can't.
        limits = ["--ulimit=nofile=1024:1024", "--ulimit=nproc=1000:1000"]
        self._flags = ["--network=none", f"--cgroup-parent={host.cgroup}", *limits]

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
            env={**os.environ, "CONTAINERS_CONF": str(self._config)},
            timeout=limit,
            check=False,
        )
        if done.returncode:
            raise PodmanError(done.stderr.decode(errors="replace").strip())
        return done.stdout.decode().strip()

    def run(self, *words: str) -> str:
        """Do as ``podman run`` without a network; return what the container prints."""
        return self("run", *self._flags, *words)

    def sleeper(self, name: str, *words: str) -> str:
        """Start a container that sleeps for long, with ``words`` as its flags."""
        return self.run("-d", "--name", name, *words, IMAGE, "sleep", "600")

    def close(self) -> None:
        """Remove all containers and volumes."""
        self("rm", "--all", "--force", "--time", "0")
        self("volume", "prune", "--force")
