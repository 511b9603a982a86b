"""Where servers die: a host with a fork server, and plugins that it starts."""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, cast

from support.host import Host
from support.plugin import Plugin, plugin_environment
from support.require import require

SCRIPT: Final = Path(__file__).with_name("forkserver.py")

# Seconds. Of two threads that ask a btrfs to commit at once (BTRFS_IOC_START_SYNC) one
# may wait, and can't be killed, until the file system's own next commit, 30 s later.
COMMIT_LIMIT: Final = 45.0


class Child:
    """A process of the fork server, with as much of `subprocess.Popen` as is used."""

    def __init__(self, room: "Room", pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._room = room

    def poll(self) -> int | None:
        """Return the exit status, or None while it runs."""
        if self.returncode is None:
            self.returncode = self._room.ask({"poll": self.pid})
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Wait for the end and return the exit status."""
        end = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("volplugin", timeout)
            time.sleep(0.003)
        return status

    def send_signal(self, number: int) -> None:
        """Send a signal unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)


class Room:
    """A host of its own with a fork server in it, and a btrfs that has quotas on."""

    def __init__(self) -> None:
        self.host = Host()
        try:
            self.btrfs = self._mount_btrfs()
        except BaseException as error:
            if isinstance(error, subprocess.CalledProcessError):
                error.add_note(error.stderr)
            self.host.close()
            raise
        self._numbers = itertools.count()
        self._children: list[Child] = []
        self._lock = threading.Lock()
        self._forks = subprocess.Popen(
            self.host.command(sys.executable, SCRIPT),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=plugin_environment(),
        )

    def _mount_btrfs(self) -> Path:
        require("mkfs.btrfs")
        require("btrfs")
        image, disk = self.host.folder / "btrfs.img", self.host.folder / "btrfs"
        disk.mkdir()
        with image.open("wb") as file:
            file.truncate(512 << 20)
        self.host.run("mkfs.btrfs", "-q", image)
        self.host.run("mount", "-o", "loop", image, disk)
        self.host.run("btrfs", "quota", "enable", disk)
        self.host.run("btrfs", "quota", "rescan", "-w", disk)
        return disk

    def ask(self, order: Mapping[str, Any]) -> int | None:
        """Give the fork server an order and return its answer."""
        assert self._forks.stdin is not None
        assert self._forks.stdout is not None
        with self._lock:
            self._forks.stdin.write(json.dumps(order) + "\n")
            self._forks.stdin.flush()
            return cast("int | None", json.loads(self._forks.stdout.readline()))

    def fork(
        self, words: Sequence[str], log: Path, environment: Mapping[str, str]
    ) -> Child:
        """Start ``volplugin WORDS``; what it prints is added to ``log``."""
        order = {"words": words, "environment": environment, "output": str(log)}
        pid = self.ask(order)
        assert pid is not None
        self._children.append(Child(self, pid))
        return self._children[-1]

    def folder(self) -> Path:
        """Make a folder for one test."""
        folder = self.host.folder / str(next(self._numbers))
        folder.mkdir()
        return folder

    def close(self) -> None:
        """End the fork server, with what a failed test left running, and the host."""
        for child in self._children:
            child.kill()
            child.wait(10)
        assert self._forks.stdin is not None
        assert self._forks.stdout is not None
        self._forks.stdin.close()
        self._forks.stdout.close()
        self._forks.wait(10)
        self.host.run("umount", self.btrfs)  # the loop device goes with it
        # Of a failed test: mountpoints that are immutable, beside its sockets, which
        # let chattr exit with 1.
        words = ("chattr", "-R", "-f", "-i", str(self.host.folder))
        subprocess.run(words, check=False)
        self.host.close()


@contextmanager
def opened() -> Iterator[Room]:
    """A room from its start to its end."""
    room = Room()
    try:
        yield room
    finally:
        room.close()


class ForkedPlugin(Plugin):
    """A `Plugin` in a room, with its tmpfs volumes below its own folder.

    Its backend ``fast`` has directories on the room's btrfs, in a folder of its own.
    """

    def __init__(self, room: Room, folder: Path, *, config: str = "") -> None:
        self.folder = folder
        self.host = room.host
        self.tmpfs = folder / "tmpfs"
        self.disk = room.btrfs
        self.on_btrfs = room.btrfs / folder.name
        room.host.path(self.on_btrfs).mkdir()
        self.fast = self.on_btrfs / "fast"
        super().__init__(
            folder,
            host=room.host,
            socket=folder / "plugin.sock",
            config=f"""
                {config}
                [backend.tmpfs]
                root = "{self.tmpfs}"
                [backend.fast]
                driver = "local"
                root = "{self.fast}"
            """,
        )
        self._room = room
        room.host.logs[:] = [self._log]  # what is shown of a test that fails

    def start(
        self,
        *,
        failpoints: str = "",
        environment: Mapping[str, str] | None = None,
        wait: bool = True,
    ) -> None:
        """Do as `Plugin.start`, forked."""
        assert not self.is_running(), "it is running already"
        words = [*self.command("serve")[3:], "--socket", str(self.socket)]
        words += ["--log-format", "json", "-v"]
        child = self._fork(words, self._log, failpoints)
        self._process = cast("subprocess.Popen[bytes]", child)
        if wait:
            self.wait_until_ready()

    def kill(self) -> None:
        """End the server by SIGKILL, which a thread in the kernel can put off."""
        self.process.kill()
        self.wait()

    def wait(self, seconds: float = COMMIT_LIMIT) -> int:
        """Wait for the server's end and return its exit status."""
        return super().wait(seconds)

    def close(self) -> None:
        """End the server at once, for it outlives that; its log must tell of no bug."""
        if self.is_running():
            self.kill()
        super().close()

    def recover(self, *, failpoints: str = "") -> tuple[int, str]:
        """Run ``volplugin recover``; return its exit status and what it printed."""
        log = self.folder / "recover.log"
        log.unlink(missing_ok=True)
        words = self.command("recover")[3:]
        status = self._fork(words, log, failpoints).wait(20)
        return status, log.read_text()

    def refuse(self) -> tuple[int, str]:
        """Start a server that must end by itself; return its status and output."""
        before = len(self.log)
        self.start(wait=False)
        return self.wait(), self.log[before:]

    def _fork(self, words: Sequence[str], log: Path, failpoints: str) -> Child:
        variables = plugin_environment()
        if failpoints:
            variables["VOLPLUGIN_FAILPOINTS"] = failpoints
        return self._room.fork(words, log, variables)
