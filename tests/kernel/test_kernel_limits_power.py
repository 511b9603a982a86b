"""The power fails while limits are made, changed and taken away: all agree afterwards.

A server has volumes on XFS and ext4 with project quotas, and images; its store is on
one of the disks. What runs in the machine is in ``guest_limits_power.py``.
"""

import random
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import attrs
import pytest
from guest_limits_power import KINDS, NAMES, kind_of
from support.plugin import REPOSITORY
from support.uml import BOOT_SECONDS, Machine
from support.wait import eventually
from test_kernel_limits import computer
from test_kernel_power_cut import journal

pytestmark = [pytest.mark.root, pytest.mark.timeout(900)]

CUTS: Final = 3
SEED: Final = 5

Fact = Mapping[str, Any]


@pytest.fixture
def machine() -> Iterator[Machine]:
    """A machine with the disks."""
    with computer() as made:
        yield made


@attrs.define
class Known:
    """The sizes that a volume may have, as far as its client knows.

    0 is no volume. There is more than one after a call that was not answered.
    """

    sizes: set[int] = attrs.field(factory=lambda: {0})

    def hear(self, fact: Fact) -> None:
        """Take in that a call was sent or answered."""
        if fact["fact"] == "answered":
            self.sizes = {fact["size"]}
        else:
            self.sizes.add(fact["size"])


def test_limits_outlive_power_cuts(machine: Machine) -> None:
    """Every answered call holds; store, record and limit in force agree."""
    chance = random.Random(SEED)
    for _ in range(CUTS):
        worked = partial(has_worked, machine, past=len(journal(machine)))
        begin(machine, seed=chance.randrange(1 << 30), then="work")
        eventually(worked, "clients work", seconds=BOOT_SECONDS)
        time.sleep(chance.uniform(0.5, 2))
        machine.cut()
    begin(machine, seed=0, then="end")
    machine.wait(BOOT_SECONDS)
    facts = journal(machine)
    check(facts, machine)
    last = facts[-1]
    assert (last["fact"], last.get("status")) == ("end", 0), machine.told()
    told = (machine.output / "server.log").read_text()
    assert "taken over" not in told, "the store had lost a volume"
    assert "Traceback" not in told, told


def begin(machine: Machine, *, seed: int, then: str) -> None:
    guest = Path(__file__).with_name("guest_limits_power.py")
    paths = [REPOSITORY, REPOSITORY / "tests"]
    machine.start(
        f"{shlex.join([sys.executable, str(guest), str(seed), then])}\n",
        {
            "PYTHONPATH": ":".join(str(path) for path in paths),
            "PYTHONDONTWRITEBYTECODE": "1",
        },
    )


def has_worked(machine: Machine, *, past: int) -> bool:
    """Return whether each kind had a call answered since ``past``."""
    assert machine.is_running(), f"it ended by itself\n{machine.told()}"
    answered = {
        kind_of(fact["name"])
        for fact in journal(machine)[past:]
        if fact["fact"] == "answered"
    }
    return answered == set(KINDS)


def check(facts: list[Fact], machine: Machine) -> None:
    """Go through the journal and hold each boot's state against all before it."""
    known = {name: Known() for name in NAMES}
    boots: set[str] = set()
    answered: set[tuple[str, str]] = set()
    for fact in facts:
        match fact["fact"]:
            case "sent" | "answered":
                known[fact["name"]].hear(fact)
                if fact["fact"] == "answered":
                    answered.add((fact["work"], kind_of(fact["name"])))
            case "state":
                boots.add(fact["boot"])
                check_state(fact, known)
            case "exit" | "fault":
                pytest.fail(f"{fact}\n{machine.told()}")
    assert len(boots) == CUTS + 1, machine.told()
    works = ("create", "resize", "remove")
    assert answered == {(work, kind) for work in works for kind in KINDS}
    assert facts[-2]["volumes"] == {}, "the last look is after the removal of all"


def check_state(state: Fact, known: Mapping[str, Known]) -> None:
    """What was answered holds, and all that tells a size tells the same."""
    volumes: dict[str, dict[str, Any]] = state["volumes"]
    assert set(volumes) <= set(known)
    for name, knowledge in known.items():
        volume = volumes.get(name)
        size = volume["told"] if volume else 0
        assert size in knowledge.sizes, f"{name}: {size}, {knowledge}"
        knowledge.sizes = {size}
        if volume is None:
            continue
        assert "error" not in volume["status"], volume
        assert volume["size"] == volume["noted"] == size, f"{name}: {volume}"
        if kind_of(name) == "loop":
            assert volume["length"] == size, f"{name}: {volume}"
        else:
            assert volume["inherits"] is True, f"{name}: {volume}"
    for disk, ids in state["limits"].items():
        mine = [v["id"] for name, v in volumes.items() if kind_of(name) == disk]
        assert sorted(ids) == sorted(mine), f"limits on {disk}"
    images = [v["image"] for name, v in volumes.items() if kind_of(name) == "loop"]
    assert sorted(state["images"]) == sorted(images)
