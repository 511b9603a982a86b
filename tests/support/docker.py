"""A real dockerd in a `Host`, its command line, and images that need no registry."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from support import processes
from support.client import Client
from support.host import Host
from support.images import IMAGE, SEED_IMAGE, image_archive
from support.require import require

_START_LIMIT: Final = 30.0  # seconds until dockerd answers


class DockerError(Exception):
    """The command line failed: its standard error, with its exit status."""

    def __init__(self, command: Sequence[str], status: int, stderr: str) -> None:
        super().__init__(f"docker {' '.join(command)}: exit status {status}: {stderr}")
        self.status = status
        self.stderr = stderr


def require_docker() -> tuple[str, str]:
    """Return the paths of dockerd and of its command line, or end the test."""
    for other in ("containerd", "runc", "busybox"):
        require(other)
    return require("dockerd"), require("docker")


class Docker:
    """A dockerd of its own. Call it with a command line's words: ``docker("ps")``."""

    def __init__(self, host: Host, *, live_restore: bool = False) -> None:
        self._dockerd, self._cli = require_docker()
        self._host = host
        self._data = host.folder / "docker-data"
        self._exec = Path("/run/dockerd")  # new with each boot
        self._socket = host.folder / "docker.sock"
        self.log = host.folder / "dockerd.log"
        self.client = Client(self._socket)
        self._live_restore = live_restore
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *, wait: bool = True) -> None:
        """Start dockerd and return when it answers (at once without ``wait``)."""
        # Where pid 1 does not reap, a killed containerd looks alive by this file.
        pid_file = self._exec / "containerd" / "containerd.pid"
        self._host.path(pid_file).unlink(missing_ok=True)
        settings = self._host.folder / "daemon.json"
        settings.write_text("{}")
        arguments: list[str] = []
        for name, value in {
            "config-file": settings,
            "data-root": self._data,
            "exec-root": self._exec,
            "host": f"unix://{self._socket}",
            "pidfile": "/run/dockerd.pid",
            "cgroup-parent": self._host.cgroup,
            "exec-opt": "native.cgroupdriver=cgroupfs",
            "bridge": "none",
            "log-level": "warn",
            "iptables": "false",
            "ip6tables": "false",
            "ip-forward": "false",
            "live-restore": str(self._live_restore).lower(),
        }.items():
            arguments.append(f"--{name}={value}")
        self._process = self._host.start(self._dockerd, *arguments, log=self.log)
        if wait:
            self.wait_until_ready()

    def wait_until_ready(self) -> None:
        """Return when dockerd answers; fail with its log when it ended instead."""
        end = time.monotonic() + _START_LIMIT
        while True:
            try:
                if self.client.request("/_ping", verb="GET").status == 200:
                    return
            except OSError as error:
                status = self.process.poll()
                if status is not None or time.monotonic() > end:
                    raise AssertionError(
                        f"dockerd does not answer (exit status {status}):\n"
                        f"{self.log.read_text()[-4000:]}"
                    ) from error
            time.sleep(0.05)

    def load_images(self) -> None:
        """Make `IMAGE` and `SEED_IMAGE` of this machine's static busybox."""
        self("import", "-", IMAGE, data=image_archive(seeded=False))
        self("import", "-", SEED_IMAGE, data=image_archive(seeded=True))

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """dockerd's process, also after its end."""
        assert self._process is not None, "it was never started"
        return self._process

    def is_running(self) -> bool:
        """Return whether dockerd is there."""
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """End dockerd by SIGKILL; its containers go on until the next start."""
        self.process.kill()
        self.process.wait(10)

    def terminate(self) -> None:
        """End dockerd by SIGTERM; without live-restore its containers end too."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)

    def restart(self) -> None:
        """End dockerd as `terminate` does and start it again."""
        self.terminate()
        self.start()

    def close(self) -> None:
        """End dockerd, its containerd, its shims and its containers."""
        if self.is_running():
            try:
                self.terminate()
            except subprocess.TimeoutExpired:  # it waits for a plugin that is not there
                self.kill()
        known = str(self._exec)

        def left() -> set[int]:
            ours = {
                p for p in self._host.processes() if known in processes.command_of(p)
            }
            # A container's own processes are in our cgroup, not in our namespace.
            foreign = {
                pid
                for pid in self._host.processes()
                if processes.mount_namespace(pid) != self._host.namespace
            }
            return ours | foreign

        processes.end(left)

    def __call__(self, *words: str, data: bytes | None = None, limit: int = 90) -> str:
        """Run ``docker`` with ``words`` and return what it prints, stripped.

        Raise `DockerError` when it fails; ``limit`` seconds are its time.
        """
        environment = {
            "PATH": os.environ.get("PATH", ""),
            processes.SESSION: os.environ[processes.SESSION],
            "DOCKER_HOST": f"unix://{self._socket}",
            "DOCKER_CONFIG": str(self._host.folder),
        }
        done = subprocess.run(
            [self._cli, *words],
            input=data or b"",
            capture_output=True,
            env=environment,
            timeout=limit,
            check=False,
        )
        if done.returncode:
            error = done.stderr.decode(errors="replace") + done.stdout.decode()
            raise DockerError(words, done.returncode, error.strip())
        return done.stdout.decode().strip()

    def run(self, *words: str, limit: int = 90) -> str:
        """Do as ``docker run`` without a network; return what the container prints."""
        return self("run", "--network", "none", *words, limit=limit)

    def sleeper(self, name: str, *words: str, image: str = IMAGE) -> str:
        """Start a container that sleeps for long, with ``words`` as its flags."""
        # A sleep as pid 1 ignores SIGTERM, and dockerd would wait 10 s for it.
        flags = ["-d", "--name", name, "--stop-signal", "KILL", *words]
        return self.run(*flags, image, "sleep", "600")

    def inspect(self, kind: str, name: str) -> dict[str, Any]:
        """Return what ``docker KIND inspect NAME`` tells: a volume or a container."""
        (answer,) = json.loads(self(kind, "inspect", name))
        assert isinstance(answer, dict)
        return answer

    def volumes(self, *, driver: str = "volplugin") -> set[str]:
        """Return the names of the volumes of ``driver``."""
        shown = self("volume", "ls", "--format", "{{.Driver}} {{.Name}}")
        pairs = [line.split(" ", 1) for line in shown.splitlines()]
        return {name for of, name in pairs if of == driver}
