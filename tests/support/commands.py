"""Commands and types that the tests of the kernel layer share."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

# Starts a container on a volume, see the fixture of this name.
Container = Callable[..., subprocess.Popen[str]]


def run(*command: str | Path) -> str:
    done = subprocess.run(
        [str(word) for word in command], check=True, capture_output=True, text=True
    )
    return done.stdout


def wait_for_program(pid: int, program: str) -> None:
    """Wait until process ``pid`` has become ``program``."""
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}/comm").read_text() != f"{program}\n":
        assert time.monotonic() < deadline
        time.sleep(0.01)
