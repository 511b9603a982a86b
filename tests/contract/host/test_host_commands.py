"""Programs with a time limit, on the real kernel."""

import os
import signal
import time
from pathlib import Path

import pytest
from support.wait import eventually

from volplugin.errors import Internal, NoSpace, Unavailable, Unsupported
from volplugin.host import commands


def run(script: str, **more: object) -> str:
    given = {"limit": 20.0, "doing": "try", **more}
    return commands.run(["sh", "-c", script], **given)  # type: ignore[arg-type]


def is_gone(pid: int) -> bool:
    """Tell whether a process that is not our child has ended."""
    try:
        return ") Z " in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True


def test_output() -> None:
    """What a program writes comes back, errors included, in the order written."""
    assert run("echo one; echo two >&2; echo three") == "one\ntwo\nthree\n"


def test_surroundings() -> None:
    """It gets no input, the C locale, a session of its own, nothing of ours."""
    os.environ["VOLPLUGIN_TEST_SECRET"] = "x"
    try:
        said = run("cat; env; cut -d' ' -f1,6 /proc/$$/stat")
    finally:
        del os.environ["VOLPLUGIN_TEST_SECRET"]
    assert "LC_ALL=C\n" in said
    assert "SECRET" not in said
    pid, session = said.splitlines()[-1].split()
    assert pid == session


def test_statuses() -> None:
    """A status that is not expected is an error with the last lines on one line."""
    assert run("echo fixed; exit 2", ok=(0, 1, 2)) == "fixed\n"
    script = "for i in 1 2 3 4 5 6; do echo line $i; done; echo; exit 3"
    with pytest.raises(Internal, match=r"^try: sh failed with 3: line 3; .*line 6$"):
        run(script)
    with pytest.raises(Internal, match="killed by signal 9: it says nothing"):
        run("kill -9 $$")


def test_no_space() -> None:
    """A program that finds the disk full is told apart."""
    with pytest.raises(NoSpace, match="No space left on device"):
        run("head -c 1 /dev/zero | dd of=/dev/full")


@pytest.mark.parametrize(
    ("program", "package"), [("xfs_growfs", "xfsprogs"), ("e2fsck", "e2fsprogs")]
)
def test_missing(program: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing program is named with the package that has it."""
    monkeypatch.setattr(commands, "SEARCH", "/nowhere")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(Unsupported, match=f"no program {program}: .*{package}"):
        commands.run([program], limit=1, doing="try")


def test_limit(tmp_path: Path) -> None:
    """At the limit the program dies with all that it has started."""
    pids = tmp_path / "pids"
    began = time.monotonic()
    with pytest.raises(Unavailable, match=r"sh did not end within 0\.5 s"):
        run(f"sleep 60 & echo $! $$ > {pids}; wait", limit=0.5)
    assert time.monotonic() - began < 5
    grandchild, child = (int(pid) for pid in pids.read_text().split())
    eventually(lambda: is_gone(grandchild), "the grandchild has ended")
    with pytest.raises(ProcessLookupError):  # no zombie either
        os.kill(child, 0)


def test_descriptors(tmp_path: Path) -> None:
    """Only the descriptors asked for are inherited."""
    file = os.open(tmp_path, os.O_RDONLY)
    other = os.open(tmp_path, os.O_RDONLY)
    os.set_inheritable(other, True)
    try:
        said = run("ls /proc/self/fd", keep=(file,)).split()
    finally:
        os.close(file)
        os.close(other)
    assert str(file) in said
    assert str(other) not in said


def test_interrupted() -> None:
    """An exception in the middle, as of a signal, ends the program too."""

    def raise_interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, raise_interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(KeyboardInterrupt):
            run("exec sleep 61")
    finally:
        signal.signal(signal.SIGALRM, before)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
