"""`docker volume create` and `rm` through a dockerd of our own.

The daemon runs in a mount namespace whose /run/docker/plugins is the directory of our
socket: dockerd looks there and nowhere else, and the host's stays as it is.
"""

import shutil
import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.progress import tell
from benchmarks.results import Measure, Results
from benchmarks.servers import VOLPLUGIN, end, serving, spawn

RUN_DOCKER = Path("/run/docker")
START_LIMIT = 60.0  # seconds
LOCAL = "local"  # Docker's built-in driver


def measure(runs: int, home: Path, results: Results) -> None:
    """Measure both drivers in turn, so many times each."""
    samples: dict[tuple[str, str], list[float]] = {}
    with serving(VOLPLUGIN, home / "docker", 0) as server:
        plugins = home / "plugins"
        plugins.mkdir()
        (plugins / "volplugin.sock").symlink_to(server.socket)
        with _dockerd(home, plugins) as docker:
            for number in range(-2, runs):
                if number % 20 == 0:
                    tell(f"docker: run {number} of {runs}")
                drivers = (VOLPLUGIN.name, LOCAL)
                for driver in drivers if number % 2 else drivers[::-1]:
                    name = f"{driver}{number}"
                    create = _timed([*docker, "create", "-d", driver, name])
                    remove = _timed([*docker, "rm", name])
                    if number >= 0:  # the first only warm up
                        samples.setdefault((driver, "create"), []).append(create)
                        samples.setdefault((driver, "rm"), []).append(remove)
    for verb in ("create", "rm"):
        results.measures[f"docker {verb}"] = Measure(
            f"docker volume {verb}",
            "ms",
            statistics.median(samples[VOLPLUGIN.name, verb]) * 1000,
            statistics.median(samples[LOCAL, verb]) * 1000,
            "built-in local",
        )


@contextmanager
def _dockerd(home: Path, plugins: Path) -> Iterator[list[str]]:
    """Run a daemon; give the command that its client's volume verbs begin with."""
    made = not RUN_DOCKER.exists()
    RUN_DOCKER.mkdir(exist_ok=True)
    address = f"unix://{home}/docker.sock"
    script = (
        "mount -t tmpfs plugins /run/docker && mkdir /run/docker/plugins && "
        'mount --bind "$1" /run/docker/plugins && shift && exec "$@"'
    )
    command = ["unshare", "--mount", "--propagation=private", "sh", "-ec", script, "sh"]
    command += [str(plugins), "dockerd", f"--host={address}", "--bridge=none"]
    command += [f"--data-root={home}/dockerd", f"--exec-root={home}/exec"]
    command += ["--iptables=false", "--ip6tables=false"]
    command += [f"--pidfile={home}/docker.pid"]
    log = home / "dockerd.log"
    process = spawn(command, log)
    # Debian's client beside Debian's daemon, whatever else is on the path.
    program = shutil.which("docker", path="/usr/bin") or "docker"
    docker = [program, "--host", address, "volume"]
    try:
        deadline = time.monotonic() + START_LIMIT
        while subprocess.run(
            [*docker, "ls"], check=False, capture_output=True
        ).returncode:
            if process.poll() is not None or time.monotonic() > deadline:
                tail = log.read_text(errors="replace")[-2000:]
                raise RuntimeError(f"dockerd does not serve:\n{tail}")
            time.sleep(0.1)
        yield docker
    finally:
        end(process)
        if made:
            RUN_DOCKER.rmdir()


def _timed(command: list[str]) -> float:
    begun = time.perf_counter()
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    seconds = time.perf_counter() - begun
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return seconds
