"""The servers under measurement: how each is started, filled, and stopped again."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

import attrs

from benchmarks.client import CallFailed, Connection, drive, request
from benchmarks.progress import tell

SAMPLES = 8  # volumes that every server has: one for each connection's Get and Mount
START_LIMIT = 60.0  # seconds


def sample(number: int) -> str:
    """Return the name of a volume that every server has."""
    return f"sample{number}"


@attrs.frozen
class Kind:
    """A program that serves volumes."""

    name: str
    command: Callable[[Path], list[str]]
    options: Callable[[Path], dict[str, str]]
    """Create's options for a plain volume."""
    fill: Callable[["Kind", Path, int], None]
    """Give the server in this directory the samples and so many volumes besides."""


@attrs.define
class Server:
    """A running server, and all that it has on disk below ``home``."""

    kind: Kind
    home: Path
    process: subprocess.Popen[bytes]
    start_seconds: float = 0.0
    """From the program's start to its first answered Get."""

    @property
    def socket(self) -> Path:
        """Where it listens."""
        return socket_of(self.home)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        end(self.process)

    def resident(self) -> float:
        """Return the resident memory in MiB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def start(kind: Kind, home: Path, *, probe: bytes | None = None) -> Server:
    """Start a server and wait until it has answered ``probe``."""
    home.mkdir(parents=True, exist_ok=True)
    probe = probe or request("Get", Name=sample(0))
    environment = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("VOLPLUGIN_", "RCLONE_"))
    }
    begun = time.perf_counter()
    process = spawn(kind.command(home), home / "log", environment)
    server = Server(kind, home, process)
    try:
        wait_for_answer(process, server.socket, probe, home / "log")
    except BaseException:
        end(process)
        raise
    server.start_seconds = time.perf_counter() - begun
    return server


def spawn(
    command: list[str], log: Path, environment: dict[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start a program in a session of its own: a Ctrl-C here is not one there."""
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,
        )


def end(process: subprocess.Popen[bytes]) -> None:
    """Ask a program to stop and make sure that it, and what it started, has."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            kill(process)


def kill(process: subprocess.Popen[bytes]) -> None:
    """End a program that hangs, with all in its session's group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def unmount_below(directory: Path) -> None:
    """Take away what a server that was killed left mounted."""
    for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines()):
        mountpoint = line.split()[4]
        if mountpoint.startswith(f"{directory}/"):
            subprocess.run(["umount", "--lazy", mountpoint], check=False)


def wait_for_answer(
    process: subprocess.Popen[bytes], socket: Path, probe: bytes, log: Path
) -> None:
    """Ask until the server answers; raise when it has ended or takes too long."""
    deadline = time.monotonic() + START_LIMIT
    while True:
        try:
            with Connection(socket) as connection:
                connection.call(probe)
        except (FileNotFoundError, ConnectionError) as error:
            if process.poll() is not None or time.monotonic() > deadline:
                tail = log.read_text(errors="replace")[-2000:]
                raise CallFailed(f"{process.args!r} does not serve:\n{tail}") from error
            time.sleep(0.001)
        else:
            return


def socket_of(home: Path) -> Path:
    """Return where the server of this directory listens."""
    return home / "plugin.sock"


@contextmanager
def serving(kind: Kind, home: Path, volumes: int) -> Iterator[Server]:
    """Have a server with the samples and so many volumes besides, then stop it.

    A directory that was filled before serves again.
    """
    filled = home / "filled"
    if not filled.exists():
        tell(f"filling {kind.name} with {volumes:,} volumes")
        home.mkdir(parents=True)
        kind.fill(kind, home, volumes)
        filled.touch()
    with start(kind, home) as server:
        yield server


def _volplugin_command(home: Path) -> list[str]:
    configuration = home / "volplugin.toml"
    configuration.write_text(f'[backend.tmpfs]\ndriver = "tmpfs"\nroot = "{home}/t"\n')
    command = [sys.executable, "-m", "volplugin", "serve", f"--config={configuration}"]
    command += [f"--root={home}/root", f"--socket={socket_of(home)}"]
    return [*command, f"--admin-socket={home}/admin.sock"]


def _fill_volplugin(kind: Kind, home: Path, volumes: int) -> None:
    create = [(request("Create", Name=f"v{n:05}", Opts={}),) for n in range(volumes)]
    create += [
        (request("Create", Name=sample(n), Opts={}),) for n in range(SAMPLES)
    ] + [
        (request("Create", Name=f"{sample(n)}.tmpfs", Opts={"driver": "tmpfs"}),)
        for n in range(SAMPLES)
    ]
    with start(kind, home, probe=request("List")) as server:
        loads = [create[n::SAMPLES] for n in range(SAMPLES)]
        drive(server.socket, loads, seconds=600)


def _rclone_command(home: Path) -> list[str]:
    (home / "base").mkdir(exist_ok=True)
    return [
        "rclone",
        "serve",
        "docker",
        "--config=/dev/null",
        f"--base-dir={home}/base",
        f"--cache-dir={home}/cache",
        f"--socket-addr={socket_of(home)}",
    ]


def _rclone_options(home: Path) -> dict[str, str]:
    # By "type" and "path" it makes volumes that its own next start cannot restore.
    return {"remote": f"{home}/data"}


def _fill_rclone(kind: Kind, home: Path, volumes: int) -> None:
    """Write the state file, as rclone 1.60 does: to create so many takes it minutes."""
    names = [f"v{n:05}" for n in range(volumes)] + [sample(n) for n in range(SAMPLES)]
    (home / "data").mkdir(exist_ok=True)
    (home / "cache").mkdir(exist_ok=True)
    for name in names:
        (home / "base" / name).mkdir(parents=True, exist_ok=True)
    state = [
        {
            "name": name,
            "mountpoint": f"{home}/base/{name}",
            "created": "2024-01-01T00:00:00Z",
            "fs": kind.options(home)["remote"],
            "type": "",
            "path": "",
            "options": {},
            "mounts": [],
        }
        for name in names
    ]
    (home / "cache" / "docker-plugin.state").write_text(json.dumps(state))


VOLPLUGIN = Kind("volplugin", _volplugin_command, lambda _: {}, _fill_volplugin)
RCLONE = Kind("rclone", _rclone_command, _rclone_options, _fill_rclone)
KINDS = (VOLPLUGIN, RCLONE)
