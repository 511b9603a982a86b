"""Helper programs that outlive the process that started them."""

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest
from support.wait import eventually

from volplugin.errors import (
    Internal,
    InUse,
    Unavailable,
    Unsupported,
    VolpluginError,
)
from volplugin.host import daemons
from volplugin.host.daemons import Helper

SERVES = "touch ready; exec sleep 1000"


@attrs.frozen
class Place:
    """A helper's folder."""

    folder: Path

    @property
    def record(self) -> str:
        return str(self.folder / "pid")

    def start(self, script: str = SERVES, *, limit: float = 10) -> Helper:
        return self.run(["sh", "-c", script], limit=limit)

    def run(self, words: list[str], *, limit: float = 10) -> Helper:
        (self.folder / "ready").unlink(missing_ok=True)
        return daemons.start(
            words,
            record=self.record,
            log=str(self.folder / "log"),
            folder=str(self.folder),
            ready=(self.folder / "ready").exists,
            limit=limit,
            doing="serve",
            failed=self.failed,
        )

    def failed(self, said: str) -> VolpluginError:
        return Internal(f"it said {said}")


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    yield made
    daemons.end(made.record, grace=0)
    assert daemons.find(made.record) is None


def proc(helper: Helper) -> Path:
    return Path(f"/proc/{helper.pid}")


def ended(helper: Helper) -> bool:
    """Tell whether not even a zombie is left."""
    return not proc(helper).exists()


def test_start_and_end(place: Place) -> None:
    """A helper runs from its start to its end, and is found by its record."""
    assert daemons.find(place.record) is None
    helper = place.start()
    assert daemons.find(place.record) == helper
    daemons.end(place.record, grace=5)
    assert daemons.find(place.record) is None
    assert ended(helper)
    daemons.end(place.record, grace=5)


def test_what_it_inherits(place: Place) -> None:
    """A helper has a session and a folder of its own, and nothing of ours."""
    with open("/dev/zero", "rb") as zero:
        os.set_inheritable(zero.fileno(), True)
        helper = place.start()
        files = {os.readlink(fd) for fd in (proc(helper) / "fd").iterdir()}
    pipes = {file for file in files if file.startswith("pipe:")}
    assert files - pipes == {"/dev/null", place.record}
    assert len(pipes) == 1
    assert os.getsid(helper.pid) == helper.pid
    assert os.readlink(proc(helper) / "cwd") == str(place.folder)
    environment = (proc(helper) / "environ").read_bytes().split(b"\0")
    names = {entry.partition(b"=")[0] for entry in environment if entry}
    assert names <= {b"PATH", b"LC_ALL", b"PWD"}


def test_what_fails(place: Place) -> None:
    """A program that ends before it is ready is told by its words."""
    with pytest.raises(Internal, match=r"^it said no disk today$"):
        place.start("echo no disk; echo today >&2; exit 3")
    assert daemons.find(place.record) is None


def test_what_it_says(place: Place) -> None:
    """Its first words are in the log; later ones take no disk, and no time."""
    place.start(
        "echo hello; touch ready; i=0; while [ $i -lt 20000 ];"
        " do i=$((i + 1)); echo trouble >&2; done; touch through; exec sleep 1000"
    )
    eventually((place.folder / "through").exists, "it did not wait for a reader")
    assert daemons.find(place.record) is not None
    log = (place.folder / "log").read_text()
    assert log.startswith("hello\n")
    assert len(log) < 100_000


def test_its_last_words(place: Place) -> None:
    """The end of what it says is told, though it says much."""
    with pytest.raises(Internal, match=r"line 5000$"):
        place.start("seq -f 'line %.0f' 5000; exit 1")


def test_what_is_missing(place: Place) -> None:
    """A program that is not installed is named."""
    with pytest.raises(Unsupported, match="serve: there is no program no-such-thing"):
        place.run(["no-such-thing"])


def test_what_is_never_ready(place: Place) -> None:
    """A program that does not get ready in time is gone when that is told."""
    with pytest.raises(Unavailable, match=r"not ready within 0.3 s; waiting for"):
        place.start("echo waiting for $$; exec sleep 1000", limit=0.3)
    pid = int((place.folder / "log").read_text().split()[-1])
    assert not os.path.exists(f"/proc/{pid}")
    assert place.start()


def test_one_for_a_record(place: Place) -> None:
    """A second helper is refused as long as the first one runs, and then not."""
    helper = place.start()
    with pytest.raises(InUse, match="runs already"):
        place.start()
    assert daemons.find(place.record) == helper
    daemons.end(place.record, grace=5)
    assert place.start() != helper


def test_what_ignores_sigterm(place: Place) -> None:
    """A helper that does not end by SIGTERM is killed."""
    helper = place.start("trap '' TERM; touch ready; while :; do sleep 0.05; done")
    daemons.end(place.record, grace=0.2)
    assert ended(helper)


def test_what_is_stopped(place: Place) -> None:
    """A helper that is stopped is killed."""
    helper = place.start()
    os.kill(helper.pid, signal.SIGSTOP)
    daemons.end(place.record, grace=0.2)
    assert ended(helper)


def test_what_died(place: Place) -> None:
    """A helper that was killed is none, and can be started anew."""
    helper = place.start()
    os.kill(helper.pid, signal.SIGKILL)
    eventually(lambda: daemons.find(place.record) is None, "it is not found")
    assert place.start() != helper
    assert ended(helper)  # was waited for on that occasion


def test_its_starter_dies(place: Place) -> None:
    """A helper outlives a starter that is killed, and another process ends it."""
    code = f"""
import os, sys
sys.path[:0] = {sys.path!r}
from test_host_daemons import Path, Place
Place(Path({str(place.folder)!r})).start()
os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", code], check=False)
    helper = daemons.find(place.record)
    assert helper is not None
    daemons.end(place.record, grace=5)
    # Its new parent waits for it, some day.
    eventually(lambda: not (proc(helper) / "exe").exists(), "it has ended")


def test_its_starter_dies_early(place: Place) -> None:
    """A helper that was to get ready when its starter died is found and ended."""
    code = f"""
import sys
sys.path[:0] = {sys.path!r}
from test_host_daemons import Path, Place
Place(Path({str(place.folder)!r})).start("sleep 1000")
"""
    with subprocess.Popen([sys.executable, "-c", code]) as starter:
        eventually(lambda: daemons.find(place.record), "the helper runs")
        starter.kill()
    assert daemons.find(place.record) is not None
    daemons.end(place.record, grace=5)
    assert daemons.find(place.record) is None


def test_a_process_of_the_same_id(place: Place) -> None:
    """A process with the id, but another start time or boot, is not the helper."""
    place.start()
    record = Path(place.record)
    written = record.read_text()
    fields = written.split()
    fields[22] = str(int(fields[22]) - 1)  # field 22 of stat, behind the boot id
    record.write_text(" ".join(fields))
    assert daemons.find(place.record) is None
    record.write_text(f"{'0' * 36} {written.partition(' ')[2]}")
    assert daemons.find(place.record) is None
    record.write_text("")
    assert daemons.find(place.record) is None
    record.write_text(written)
    assert daemons.find(place.record) is not None


def test_a_record_that_is_to_be_written(place: Place) -> None:
    """A helper whose record is not there yet is waited for."""
    helper = place.start()
    record = Path(place.record)
    written = record.read_text()
    record.write_text("")
    write = (
        f"import time; time.sleep(0.3); open({place.record!r}, 'w').write({written!r})"
    )
    with subprocess.Popen([sys.executable, "-c", write]):
        daemons.end(place.record, grace=5)
    assert ended(helper)


def test_a_record_that_others_lock(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who keeps a record locked that names no helper is asked for."""
    monkeypatch.setattr(daemons, "_RECORD_WAIT", 0.2)
    record = Path(place.record)
    with record.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(Unavailable, match=r"`fuser -v .*` shows it"):
            daemons.end(place.record, grace=5)


def test_many_at_once(tmp_path: Path) -> None:
    """Helpers of several records don't know of each other."""
    places = [Place(tmp_path / str(number)) for number in range(4)]
    for each in places:
        each.folder.mkdir()
    helpers = [each.start() for each in places]
    assert len({helper.pid for helper in helpers}) == 4
    for each, helper in zip(places, helpers, strict=True):
        daemons.end(each.record, grace=5)
        assert ended(helper)


def test_oom(place: Place) -> None:
    """The kernel's memory killer spares a helper, where we may ask for that."""
    helper = place.start()
    score = (proc(helper) / "oom_score_adj").read_text().strip()
    ours = Path("/proc/self/oom_score_adj").read_text().strip()
    assert score in {"-1000", ours}


def test_said(tmp_path: Path) -> None:
    """A log is told by its end, on one line."""
    log = tmp_path / "log"
    assert daemons.said(str(log)) == ""
    log.write_text("x" * 9000 + "\nthe\n\n end \n")
    assert daemons.said(str(log)).endswith("x the end")
    assert len(daemons.said(str(log))) < 4100
