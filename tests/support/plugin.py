"""The real server as a process, alone or in a `Host`: start, kill, stop, restart."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import attrs

from support.client import Client
from support.host import Host
from support.manager import Manager
from support.wait import eventually

REPOSITORY: Final = Path(__file__).resolve().parents[2]
DOCKER_SOCKET: Final = Path("/run/docker/plugins/volplugin.sock")
START_LIMIT: Final = 20.0  # seconds until the server answers
_MARK: Final = "log-mark-"


@attrs.frozen
class Call:
    """One call as the server's log tells it; ``outcome`` is ``ok`` or what failed."""

    op: str
    volume: str
    outcome: str


def plugin_environment() -> dict[str, str]:
    """Return this process's environment, made such that volplugin runs by defaults."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("VOLPLUGIN_")}
    return {**kept, "PYTHONPATH": str(REPOSITORY)}


class Plugin:
    """A ``volplugin serve`` below ``folder``, in ``host`` when there is one.

    In a host it listens where dockerd looks for it, else on a socket in ``folder``.
    ``config`` is the text of its configuration file. Between its lives all of its
    state stays in ``folder``. A ``manager`` starts it, where there is one.
    """

    def __init__(
        self,
        folder: Path,
        *,
        host: Host | None = None,
        socket: Path | None = None,
        config: str = "",
        arguments: Sequence[str] = (),
        manager: Manager | None = None,
    ) -> None:
        self._manager = manager
        self.root = folder / "root"
        self.config = folder / "volplugin.toml"
        self.config.write_text(config)
        self._host = host
        self._log = folder / "plugin.log"
        self._log.touch()
        self.admin_socket = folder / "admin.sock"
        self.socket = socket or (DOCKER_SOCKET if host else folder / "plugin.sock")
        self.client = (
            Client(host.path(self.socket), connector=host.connector)
            if host
            else Client(self.socket)
        )
        self._arguments = arguments
        self._process: subprocess.Popen[bytes] | None = None

    def command(self, *words: str) -> list[str]:
        """Return a command line of volplugin with this server's settings."""
        command = [*words, "--config", str(self.config), "--root", str(self.root)]
        command += ["--admin-socket", str(self.admin_socket)]
        return [sys.executable, "-m", "volplugin", *command]

    def release(self, name: str) -> subprocess.CompletedProcess[str]:
        """Release a volume of this server by the command line."""
        command = [sys.executable, "-m", "volplugin", "volume", "release", name]
        return subprocess.run(
            [*command, "--admin-socket", str(self.admin_socket)],
            env=plugin_environment(),
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )

    def resize(self, *words: str) -> list[str]:
        """Return a command line that resizes a volume of this server."""
        return self.operate("volume", "resize", *words)

    def operate(self, *words: str) -> list[str]:
        """Return a command line of operators for this server."""
        command = [sys.executable, "-m", "volplugin", *words]
        return [*command, "--admin-socket", str(self.admin_socket)]

    def start(
        self,
        *,
        failpoints: str = "",
        environment: Mapping[str, str] | None = None,
        wait: bool = True,
    ) -> None:
        """Start the server and return when it answers (at once without ``wait``).

        ``failpoints`` are armed from the first step of its start.
        """
        assert not self.is_running(), "it is running already"
        variables = {**plugin_environment(), **(environment or {})}
        if failpoints:
            variables["VOLPLUGIN_FAILPOINTS"] = failpoints
        command = self.command("serve")
        command += ["--socket", str(self.socket), "--log-format", "json", "-v"]
        command += self._arguments
        if self._manager is not None:
            command = self._manager.command(command)
            variables |= self._manager.environment()
        if self._host is not None:
            self._process = self._host.start(
                *command, log=self._log, environment=variables
            )
        else:
            with self._log.open("ab") as output:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=variables,
                    start_new_session=True,
                    pass_fds=self._manager.descriptors if self._manager else (),
                )
        if wait:
            self.wait_until_ready()

    def wait_until_ready(self) -> None:
        """Return when the server answers; fail with its log when it ended instead."""
        end = time.monotonic() + START_LIMIT
        while True:
            try:
                self.client.activate()
            except OSError as error:
                status = self.process.poll()
                if status is not None or time.monotonic() > end:
                    raise AssertionError(
                        f"no answer (exit status {status}):\n{self.log}"
                    ) from error
            else:
                return
            time.sleep(0.02)

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The server's process, also after its end."""
        assert self._process is not None, "it was never started"
        return self._process

    @property
    def pid(self) -> int:
        """The server's process id."""
        return self.process.pid

    @property
    def client_pid(self) -> int:
        """The process that the server sees behind `client`."""
        return os.getpid() if self._host is None else self._host.connector.pid

    def is_running(self) -> bool:
        """Return whether the server is there."""
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """End the server by SIGKILL."""
        self.process.kill()
        self.process.wait(10)

    def stop(self) -> None:
        """End the server by SIGTERM; it must exit with 0 and take its socket away."""
        self.process.terminate()
        status = self.process.wait(30)
        assert status == 0, f"exit status {status}:\n{self.log}"
        held = self._manager.paths if self._manager else ()
        for path in (self.client.socket, self.admin_socket):
            assert path.exists() is (path in held), f"{path} is not as it should be"

    def wait(self, seconds: float = 20) -> int:
        """Wait for the server's end and return its exit status."""
        return self.process.wait(seconds)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the server."""
        self.process.send_signal(number)

    def restart(self, *, failpoints: str = "") -> None:
        """Stop the server as `stop` does and start it again."""
        self.stop()
        self.start(failpoints=failpoints)

    def close(self) -> None:
        """End the server as `stop` does, if it runs; its log must tell of no bug."""
        if self.is_running():
            self.process.send_signal(signal.SIGCONT)
            self.stop()
        assert "Traceback" not in self.log, f"a bug, by its log:\n{self.log}"

    @property
    def log(self) -> str:
        """All that the server printed, over all its lives."""
        return self._log.read_text(errors="replace")

    def calls(self, volume: str | None = None) -> list[Call]:
        """Return the calls that were answered, of ``volume`` alone if given."""
        self._flush_log()
        calls = []
        for line in self.log.splitlines():
            if not line.startswith("{"):
                continue
            entry = json.loads(line)
            if entry["event"] == "call":
                fields = entry["fields"]
                call = Call(fields["op"], fields["volume"], fields["outcome"])
                if call.volume == volume or (
                    volume is None and not call.volume.startswith(_MARK)
                ):
                    calls.append(call)
        return calls

    def _flush_log(self) -> None:
        # The server logs a call before it answers, but a thread of its own writes.
        if not self.is_running():
            return
        mark = f"{_MARK}{uuid.uuid4().hex}"
        self.client.call("Get", {"Name": mark})
        eventually(lambda: mark in self.log, "the log is written")

    def operations(self, volume: str) -> list[str]:
        """Return the names of the calls that ``volume`` has had, Get left out."""
        return [call.op for call in self.calls(volume) if call.op != "Get"]
