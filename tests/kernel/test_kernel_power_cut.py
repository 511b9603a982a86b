"""The power fails under a server at work: what was answered is there afterwards."""

import json
import random
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import attrs
import pytest
from guest import CHOSEN, CLIENTS, JOURNAL, KINDS, LOCAL, TMPFS, content_of, kind_of
from support.commands import run
from support.plugin import REPOSITORY
from support.require import require
from support.uml import BOOT_SECONDS, Machine
from support.wait import eventually

pytestmark = [pytest.mark.root, pytest.mark.timeout(900)]

CUTS: Final = 3
FOLDER: Final = "/disk"
NAMES: Final = [f"{kind}-{number}" for kind in KINDS for number in range(CLIENTS)]
# mkfs.xfs makes none that is smaller than 300 MB; the images are sparse.
FILESYSTEMS: Final = {
    "ext4": (64 << 20, ("mkfs.ext4", "-q", "-I", "256")),
    "xfs": (320 << 20, ("mkfs.xfs", "-q")),
}

Fact = Mapping[str, Any]
Computer = Callable[[str], Machine]


@pytest.fixture
def computer() -> Iterator[Computer]:
    """Make a machine whose disk has the file system of the name given."""
    made: list[Machine] = []
    with tempfile.TemporaryDirectory(prefix="disks-") as folder:

        def make(filesystem: str) -> Machine:
            size, (mkfs, *flags) = FILESYSTEMS[filesystem]
            image = Path(folder).resolve() / f"{filesystem}.img"
            with image.open("wb") as file:
                file.truncate(size)
            run(require(mkfs), *flags, image)
            machine = Machine([image])
            made.append(machine)
            return machine

        yield make
        for machine in made:
            machine.close()


@attrs.define
class Known:
    """What the clients know of one volume, having had answers or not."""

    there: bool | None = False
    """None: a create or a remove was not answered."""

    synced: set[str] = attrs.field(factory=set)
    """Files whose fsync(2) returned."""

    begun: set[str] = attrs.field(factory=set)
    """Files that were being written."""

    def hear(self, fact: Fact, kind: str) -> None:
        """Take in that a call was sent or answered."""
        answered = fact["fact"] == "answered"
        match fact["work"]:
            case "create":
                self.there = True if answered else None
            case "remove":
                self.there = None if not answered else False
                if answered and kind != CHOSEN:  # a chosen directory keeps its files
                    self.synced, self.begun = set(), set()
            case "write" if answered:
                self.begun.remove(fact["file"])
                self.synced.add(fact["file"])
            case "write":
                self.begun.add(fact["file"])

    def resolve(self, *, there: bool, kind: str) -> None:
        """Take in what has become of the volume; what was half done is settled."""
        self.there = there
        if not there and kind != CHOSEN:
            self.synced, self.begun = set(), set()


@pytest.mark.parametrize(
    ("filesystem", "seed"), [pytest.param("ext4", 1), pytest.param("xfs", 2)]
)
def test_power_cuts(computer: Computer, filesystem: str, seed: int) -> None:
    """Every answer outlives the power, on a disk that loses what was not synced."""
    chance = random.Random(seed)
    machine = computer(filesystem)
    for _ in range(CUTS):
        worked = partial(has_worked, machine, past=len(journal(machine)))
        begin(machine, seed=chance.randrange(1 << 30), then="work")
        eventually(worked, "clients work", seconds=BOOT_SECONDS)
        time.sleep(chance.uniform(0.3, 1.5))
        machine.cut()
    begin(machine, seed=0, then="end")
    machine.wait(BOOT_SECONDS)
    facts = journal(machine)
    check(facts, machine)
    last = facts[-1]
    assert (last["fact"], last.get("status")) == ("end", 0), machine.told()
    warnings = (machine.output / "server.log").read_text()
    assert "taken over" not in warnings, "the store had lost a volume"


def begin(machine: Machine, *, seed: int, then: str) -> None:
    guest = Path(__file__).with_name("guest.py")
    words = [sys.executable, str(guest), FOLDER, str(seed), then]
    paths = [REPOSITORY, REPOSITORY / "tests"]
    machine.start(
        f"mkdir {FOLDER} && mount /dev/ubda {FOLDER} && {shlex.join(words)}\n",
        {
            "PYTHONPATH": ":".join(str(path) for path in paths),
            "PYTHONDONTWRITEBYTECODE": "1",
        },
    )


def journal(machine: Machine) -> list[Fact]:
    """Return the facts so far; the last line may be cut off."""
    file = machine.output / JOURNAL
    lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
    return [json.loads(line) for line in lines]


def has_worked(machine: Machine, *, past: int) -> bool:
    """Return whether a call was answered since ``past``; fail if none ever will be."""
    assert machine.is_running(), f"it ended by itself\n{machine.told()}"
    return any(fact["fact"] == "answered" for fact in journal(machine)[past:])


def check(facts: list[Fact], machine: Machine) -> None:
    """Go through the journal and hold each boot's state against all before it."""
    known = {name: Known() for name in NAMES}
    boots: set[str] = set()
    answered: set[tuple[str, str]] = set()
    for fact in facts:
        match fact["fact"]:
            case "sent" | "answered":
                kind = kind_of(fact["name"])
                known[fact["name"]].hear(fact, kind)
                if fact["fact"] == "answered":
                    answered.add((fact["work"], kind))
            case "state":
                assert fact["boot"] not in boots
                boots.add(fact["boot"])
                check_volumes(fact, known)
                check_disk(fact)
            case "exit" | "fault":
                pytest.fail(f"{fact}\n{machine.told()}")
    assert len(boots) == CUTS + 1, machine.told()
    assert {(work, kind) for work in ("create", "mount") for kind in KINDS} <= answered
    assert {("write", LOCAL), ("write", CHOSEN), ("remove", LOCAL)} <= answered


def check_volumes(state: Fact, known: Mapping[str, Known]) -> None:
    """What was answered holds; what was not is whole or absent."""
    volumes: dict[str, dict[str, Any]] = state["volumes"]
    assert set(volumes) <= set(known)
    for name, knowledge in known.items():
        kind, volume = kind_of(name), volumes.get(name)
        if knowledge.there is not None:
            assert (volume is not None) is knowledge.there, f"{name}: {knowledge}"
        knowledge.resolve(there=volume is not None, kind=kind)
        if kind == CHOSEN:  # removed or not, nothing in it is ever deleted
            assert knowledge.synced <= set(state["kept"].get(name, [])), name
        if volume is None:
            continue
        status = state["status"][name]
        assert "error" not in status, status
        assert (status["mounts"], status.get("holders")) == (0, None), status
        assert not status.get("attached"), status
        assert volume["mountpoint"] == volume["listed"]
        assert volume["record"] == name
        assert volume["mounted"] is (kind == TMPFS)
        files: dict[str, str] = volume["files"]
        assert knowledge.synced <= set(files) <= knowledge.synced | knowledge.begun, (
            name
        )
        for file in knowledge.synced:
            assert files[file] == content_of(name, file), f"{name}: {file}"


def check_disk(state: Fact) -> None:
    """Each volume has its directory and its record, and nothing else has."""
    there = {
        kind: sorted(v for v in state["volumes"] if kind_of(v) == kind)
        for kind in KINDS
    }
    folders, records = state["folders"], state["records"]
    assert folders["root/local/staging"] == []
    assert folders["root/local/volumes"] == there[LOCAL]
    assert folders.get("root/local/adopted", []) == there[CHOSEN]
    assert folders.get("tmpfs", []) == there[TMPFS]
    assert records["data"] == there[CHOSEN]
    assert records["root/local/volumes"] == there[LOCAL]
    assert records.get("tmpfs", []) == there[TMPFS]
    assert state["mounts"] == []
