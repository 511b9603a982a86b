"""Finding and ending the processes that a test started, and no others."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterable
from pathlib import Path

from support.wait import eventually

# Every process that a test starts, however it daemonizes, carries this name in its
# environment; tests/conftest.py sets it.
SESSION = "TEST_SESSION"


def mount_namespace(pid: int | str) -> str | None:
    """Return which mount namespace ``pid`` is in; None for a zombie or none at all."""
    try:
        return os.readlink(f"/proc/{pid}/ns/mnt")
    except OSError:
        return None


def is_alive(pid: int) -> bool:
    """Return whether ``pid`` is there and no zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in {"Z", "X"}


def command_of(pid: int) -> str:
    """Return the command line of ``pid``, empty for a zombie or none at all."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return ""
    return b" ".join(words).decode(errors="replace").strip()


def of_namespace(namespace: str) -> set[int]:
    """Return the processes whose mount namespace is ``namespace``."""
    return _where(lambda pid: mount_namespace(pid) == namespace)


def of_session() -> set[int]:
    """Return the live processes that descend from this test session, itself excluded.

    A container's own processes have the image's environment and are not among them;
    their cgroup and their shim tell of them.
    """
    mark = f"{SESSION}={os.environ[SESSION]}".encode()

    def ours(pid: int) -> bool:
        try:
            return mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            return False

    return _where(ours) - {os.getpid()}


def of_group(group: int) -> set[int]:
    """Return the live processes of the process group ``group``."""

    def ours(pid: int) -> bool:
        try:
            return os.getpgid(pid) == group and is_alive(pid)
        except ProcessLookupError:
            return False

    return _where(ours)


def of_cgroups(folders: Iterable[Path]) -> set[int]:
    """Return the processes in the cgroups ``folders`` and below."""
    found: set[int] = set()
    for folder in folders:
        for listing in folder.rglob("cgroup.procs"):
            with contextlib.suppress(OSError):
                found |= {int(pid) for pid in listing.read_text().split()}
    return found


def end(find: Callable[[], set[int]], *, seconds: float = 10) -> list[str]:
    """Kill what ``find`` finds until it finds nothing; return the command lines."""
    commands: dict[int, str] = {}

    def gone() -> bool:
        living = {pid for pid in find() if is_alive(pid)}
        for pid in living:
            # It is empty in the middle of an exec.
            commands[pid] = command_of(pid) or commands.get(pid, f"process {pid}")
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not living

    eventually(gone, f"processes end: {commands}", seconds=seconds)
    return list(commands.values())


def _where(holds: Callable[[int], bool]) -> set[int]:
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return {pid for pid in pids if holds(pid)}
