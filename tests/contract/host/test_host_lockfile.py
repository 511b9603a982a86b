"""One process has the lock of a root; the next is told which."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from volplugin.errors import InUse, NotFound, VolpluginError
from volplugin.host import lockfile


def test_one_at_a_time(scratch: Path) -> None:
    """A second lock is refused with the pid of the first, until that is released."""
    path = scratch / "lock"
    path.write_text("12345678901\n")  # longer than ours: what was there goes
    first = lockfile.acquire(str(path))
    assert path.read_text() == f"{os.getpid()}\n"
    with pytest.raises(InUse, match=f"process {os.getpid()};"):
        lockfile.acquire(str(path))
    lockfile.release(first)
    lockfile.release(lockfile.acquire(str(path)))


def test_it_goes_with_the_process(scratch: Path) -> None:
    """A process that is killed leaves no lock, whoever has forked from it."""
    path = str(scratch / "lock")
    program = (
        "import subprocess, sys\n"
        "from volplugin.host import lockfile\n"
        f"lockfile.acquire({path!r})\n"
        "subprocess.Popen(['sleep', '60'], stdout=subprocess.DEVNULL)\n"
        "print(flush=True)\n"
        "sys.stdin.read()\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
        cwd=Path(lockfile.__file__).parents[2],
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"\n"
    with pytest.raises(InUse, match=f"process {child.pid};"):
        lockfile.acquire(path)
    child.kill()
    child.wait()
    lockfile.release(lockfile.acquire(path))
    os.killpg(child.pid, 9)
    child.communicate()


def test_a_forked_child_does_not_keep_it(scratch: Path) -> None:
    """Release ends the lock though a child has the descriptor too."""
    path = str(scratch / "lock")
    descriptor = lockfile.acquire(path)
    copy = os.dup(descriptor)  # what a fork leaves open
    lockfile.release(descriptor)
    lockfile.release(lockfile.acquire(path))
    os.close(copy)


def test_where_it_cannot_be(scratch: Path) -> None:
    """A missing directory is not found; a link in the file's place is not followed."""
    with pytest.raises(NotFound):
        lockfile.acquire(str(scratch / "none" / "lock"))
    (scratch / "link").symlink_to(scratch / "elsewhere")
    with pytest.raises(VolpluginError):
        lockfile.acquire(str(scratch / "link"))
    assert not (scratch / "elsewhere").exists()
