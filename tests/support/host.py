"""A host for one test: its own mount table, its own /run, /mnt and engines' folders.

The namespace is cut off from the machine's and shared within itself, as the table of a
host under systemd is, so containers' namespaces are slaves of it as they are there.
"""

import contextlib
import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from support import processes
from support.connections import Connector
from support.mounts import Mount, read_mounts
from support.require import require, require_root

# /run: the plugin sockets (/run/docker/plugins is fixed in dockerd) and the shims'
# (/run/containerd/s is fixed in containerd 1.6). /etc/docker: dockerd 20.10 writes a
# key.json there and reads plugin specs. /mnt: the tmpfs driver's default root.
# /var/lib/containers: podman's cache of blobs has no other place.
_PRIVATE = ("/run", "/mnt", "/etc/docker", "/var/lib/containers")
_SETUP = """
set -e
mount --make-rshared /
for folder in "$@"; do mount -t tmpfs -o mode=755 private "$folder"; done
mkdir -p /run/docker/plugins
echo ready
exec cat
"""
_BOOT_ID = "/proc/sys/kernel/random/boot_id"
_BOOT = f"""
set -e
umount /run
mount -t tmpfs -o mode=755 private /run
mkdir -p /run/docker/plugins
mount --bind "$1" {_BOOT_ID}
"""


class Host:
    """A mount namespace with a folder of its own; ``close`` ends all that is in it.

    Tests see its files through `path`, also what is mounted in it alone. With
    ``own_network`` it has a network of its own too, with nothing but its loopback.
    """

    alive: ClassVar[list["Host"]] = []

    def __init__(self, *, own_network: bool = False) -> None:
        require_root()
        self._nsenter = require("nsenter")
        cut_off = [require("unshare"), "--mount", "--propagation", "private"]
        if own_network:
            cut_off.append("--net")
        self._own_network = own_network
        # Short, because a socket's path has at most 108 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="vp-"))
        self.logs: list[Path] = []
        self._started: list[subprocess.Popen[bytes]] = []
        self._made = [folder for folder in _PRIVATE if _make(folder)]
        self.namespace = ""
        self._connector: Connector | None = None
        self._holder = subprocess.Popen(
            [*cut_off, "sh", "-c", _SETUP, "sh", *_PRIVATE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.alive.append(self)
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != "ready\n":
            self.close()
            raise AssertionError("the namespace could not be set up: see stderr")
        namespace = processes.mount_namespace(self.pid)
        assert namespace is not None
        self.namespace = namespace
        if own_network:
            self.run(require("ip"), "link", "set", "lo", "up")
        self._own_mounts = {_identity(mount) for mount in self.mounts()}
        self._connector = Connector(self.command())

    @property
    def pid(self) -> int:
        """The process that holds the namespace."""
        return self._holder.pid

    @property
    def connector(self) -> Connector:
        """What connects in here: an engine of this host, to the servers in it."""
        assert self._connector is not None
        return self._connector

    @property
    def cgroup(self) -> str:
        """The cgroup below which this host's containers live."""
        return f"/{self.folder.name}"

    def path(self, inside: str | Path) -> Path:
        """Return how this process reaches the absolute path ``inside`` the host."""
        return Path(f"/proc/{self.pid}/root{inside}")

    def command(self, *words: str | Path) -> list[str]:
        """Return the command that runs ``words`` in this host, as the same process."""
        enter = [self._nsenter, f"--mount=/proc/{self.pid}/ns/mnt"]
        if self._own_network:
            enter.append(f"--net=/proc/{self.pid}/ns/net")
        return [*enter, "--", *map(str, words)]

    def run(self, *words: str | Path, check: bool = True) -> str:
        """Run ``words`` in this host and return what they print."""
        return subprocess.run(
            self.command(*words),
            check=check,
            capture_output=True,
            text=True,
            timeout=60,
        ).stdout

    def start(
        self,
        *words: str | Path,
        log: Path,
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start ``words`` in the background; what they print is added to ``log``.

        ``environment`` None is this process's.
        """
        if log not in self.logs:
            self.logs.append(log)
        with log.open("ab") as output:
            process = subprocess.Popen(
                self.command(*words),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def mounts(self) -> list[Mount]:
        """Return the mounts that this host sees."""
        return read_mounts(self.pid)

    def processes(self) -> set[int]:
        """Return what runs in this host and in its containers, the holder excluded."""
        # A process that was just started may not have entered the namespace yet.
        started = {process.pid for process in self._started if process.poll() is None}
        inside = processes.of_namespace(self.namespace)
        contained = processes.of_cgroups(self._cgroups())
        return (started | inside | contained) - {self.pid, self.connector.pid}

    def reboot(self) -> None:
        """End all processes at once, take down all mounts, and have another boot id.

        /run is a new one; what is on disk, and in /mnt, is as it was.
        """
        processes.end(self.processes)
        for mount in reversed(self.mounts()):
            if _identity(mount) not in self._own_mounts:
                self.run("umount", mount.mountpoint)
        boot_id = self.folder / "boot_id"
        boot_id.unlink(missing_ok=True)
        boot_id.write_text(f"{uuid.uuid4()}\n")
        self.run("sh", "-c", _BOOT, "sh", boot_id)

    def close(self) -> None:
        """End what is left in the host, then the host; raise if anything was left."""
        self.alive.remove(self)
        if self._connector is not None:
            self._connector.close()
        left: list[str] = []
        if self._holder.poll() is None:
            left = processes.end(self.processes)
        assert self._holder.stdin is not None
        assert self._holder.stdout is not None
        self._holder.stdin.close()
        self._holder.stdout.close()
        # Its mounts go with it, and those of overlayfs write the whole disk back.
        self._holder.wait(60)
        for cgroup in self._cgroups():
            for folder, _, _ in os.walk(cgroup, topdown=False):
                os.rmdir(folder)
        for made in self._made:
            with contextlib.suppress(OSError):  # another host has it mounted
                os.rmdir(made)
        self._delete_folder()
        assert not left, f"left running in the host: {left}"

    def _delete_folder(self) -> None:
        try:
            shutil.rmtree(self.folder)
        except PermissionError:  # an unmounted mountpoint is immutable
            # Of links and sockets chattr knows nothing, and fails.
            subprocess.run(["chattr", "-R", "-f", "-i", self.folder], check=False)
            shutil.rmtree(self.folder)

    def _cgroups(self) -> list[Path]:
        return [
            folder
            for mount in read_mounts()
            if mount.filesystem in {"cgroup", "cgroup2"}
            and (folder := Path(mount.mountpoint + self.cgroup)).is_dir()
        ]


def _identity(mount: Mount) -> tuple[str, str]:
    return mount.mountpoint, mount.source


def _make(folder: str) -> bool:
    if os.path.isdir(folder):
        return False
    os.mkdir(folder, 0o755)
    return True
