"""A real ``rclone serve docker``: another volume plugin, whose mounts are FUSE's."""

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Final

from support.client import Client
from support.host import Host
from support.mounts import Mount, read_mounts
from support.require import require

_START_LIMIT: Final = 20.0  # seconds until it answers


# As `docker run -v FOLDER/base:FOLDER/base:rshared` has it: a root of its own, from
# which only what is mounted below the base reaches the host.
_CONTAINER: Final = """
set -e
folder=$1 sockets=$2
shift 2
root=$folder/container
mkdir -p "$root"
mount --make-private "$(findmnt --noheadings --output TARGET --target "$root")"
mount -t tmpfs root "$root"
cd "$root"
mkdir -p usr proc dev tmp ".$folder" ".$sockets"
ln -s usr/bin usr/sbin usr/lib usr/lib64 .
mount --bind /usr usr
mount --bind /dev dev
mount -t proc proc proc
mount --bind "$folder" ".$folder"
mount --bind "$folder/base" ".$folder/base"
mount --bind "$sockets" ".$sockets"
exec chroot . "$@"
"""


class Rclone:
    """rclone as the plugin ``NAME`` of the folder ``sockets``, in ``host`` if given.

    Its volumes show ``remote``, a directory; all of its state is in ``folder``, what it
    remembers of volumes and mounts in ``cache``. One that is ``contained`` runs in a
    container, from which its mounts reach the host.
    """

    def __init__(
        self,
        folder: Path,
        sockets: Path,
        *,
        name: str = "rclone",
        host: Host | None,
        contained: bool = False,
    ) -> None:
        self.name = name
        self._folder = folder
        self._sockets = sockets
        self._contained = contained
        self.remote = folder / "remote"
        self.base = folder / "base"
        self.cache = folder / "cache"
        for path in (self.remote, self.base, self.cache):
            path.mkdir(parents=True, exist_ok=True)
        self.log = folder / "rclone.log"
        self.socket = sockets / f"{name}.sock"
        self._host = host
        self._process: subprocess.Popen[bytes] | None = None
        self.client = Client(host.path(self.socket) if host else self.socket)

    @property
    def options(self) -> dict[str, str]:
        """The options of a volume that shows `remote`."""
        return {"plugin": self.name, "remote": str(self.remote)}

    def start(self) -> None:
        """Start it and return when it answers."""
        # It does not replace what an earlier one left, and leaves it when killed.
        self.client.socket.unlink(missing_ok=True)
        command = [
            *(require("rclone"), "serve", "docker", "--socket-addr", str(self.socket)),
            *("--base-dir", str(self.base), "--cache-dir", str(self.cache)),
            *("--config", "/dev/null", "--dir-cache-time", "0s", "-v"),
        ]
        if self._contained:
            assert self._host is not None
            self._host.run("mount", "--bind", self.base, self.base)
            # Else it is a peer of what it lies on, which would get each mount as well.
            self._host.run("mount", "--make-private", self.base)
            self._host.run("mount", "--make-shared", self.base)
            command = [
                *("unshare", "--mount", "--propagation", "unchanged"),
                *("sh", "-c", _CONTAINER, "sh"),
                *(str(self._folder), str(self._sockets), *command),
            ]
        if self._host is not None:
            self._process = self._host.start(*command, log=self.log)
        else:
            with self.log.open("ab") as output:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        end = time.monotonic() + _START_LIMIT
        while True:
            try:
                self.client.activate()
            except OSError as error:
                status = self._process.poll()
                if status is not None or time.monotonic() > end:
                    told = self.log.read_text(errors="replace")
                    raise AssertionError(f"no rclone ({status}):\n{told}") from error
                time.sleep(0.02)
            else:
                return

    @property
    def process(self) -> "subprocess.Popen[bytes]":
        """Its process, also after its end."""
        assert self._process is not None, "it was never started"
        return self._process

    def mounts(self) -> list[Mount]:
        """Return its own mounts, without those bound elsewhere."""
        table = self._host.mounts() if self._host else read_mounts()
        return [each for each in table if each.mountpoint.startswith(f"{self.base}/")]

    def kill(self) -> None:
        """End it by SIGKILL; its file systems are dead then."""
        self.process.kill()
        self.process.wait(10)

    def close(self) -> None:
        """End it, and what it has mounted."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGCONT)
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self.kill()
        if self._host is None:
            for mount in self.mounts():
                command = ["umount", "-l", mount.mountpoint]
                subprocess.run(command, check=False)
            if os.path.lexists(self.socket):
                self.socket.unlink()
