"""Project quotas, tried in a machine whose kernel has them: see ``guest_*.py``."""

import contextlib
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import pytest
from support.commands import run
from support.plugin import REPOSITORY
from support.require import require
from support.uml import BOOT_SECONDS, OUTPUT, Machine, run_tests
from support.wait import eventually

pytestmark = [pytest.mark.root, pytest.mark.timeout(1000)]

FILES: Final = ("guest_quota", "guest_tagging")
# In the order of the devices; the images are sparse. mkfs.xfs makes none below 300M.
DISKS: Final = (
    (600, ("mkfs.xfs", "-q")),
    (600, ("mkfs.ext4", "-q", "-O", "quota,project")),
    (32, ("mkfs.ext4", "-q")),
    (320, ("mkfs.xfs", "-q")),
)


@pytest.fixture
def machine() -> Iterator[Machine]:
    """A machine with the disks."""
    with computer() as made:
        yield made


@pytest.fixture(scope="module")
def outcomes() -> Iterator[Mapping[str, str]]:
    """What became of the tests of all files, run in one boot."""
    files = [Path(__file__).with_name(f"{name}.py") for name in FILES]
    with computer() as made:
        yield run_tests(made, files, seconds=900)


@contextlib.contextmanager
def computer() -> Iterator[Machine]:
    with tempfile.TemporaryDirectory(prefix="disks-") as folder:
        images = []
        for number, (size, (mkfs, *flags)) in enumerate(DISKS):
            image = Path(folder).resolve() / f"{number}.img"
            with image.open("wb") as file:
                file.truncate(size << 20)
            run(require(mkfs), *flags, image)
            images.append(image)
        machine = Machine(images)
        try:
            yield machine
        finally:
            machine.close()


@pytest.mark.parametrize("file", FILES)
def test_in_the_machine(outcomes: Mapping[str, str], file: str) -> None:
    """Every test of the file has passed there, and none was left out."""
    mine = {name: told for name, told in outcomes.items() if name.startswith(file)}
    wrong = {name: told for name, told in mine.items() if told != "passed"}
    assert not wrong, "\n\n".join(f"{name}\n{told}" for name, told in wrong.items())
    source = Path(__file__).with_name(f"{file}.py").read_text()
    written = set(re.findall(r"^def (test_\w+)", source, re.MULTILINE))
    assert {name.partition("::")[2].partition("[")[0] for name in mine} == written


def test_a_limit_outlives_the_power(machine: Machine) -> None:
    """What set_limit put in force is there after a cut right behind its return."""
    begin(machine, "set")
    done = machine.output / "set"
    eventually(done.exists, "the limits are set", seconds=BOOT_SECONDS)
    machine.cut()
    begin(machine, "get")
    machine.wait(BOOT_SECONDS)
    assert (machine.output / "get").read_text() == done.read_text(), machine.told()
    assert "Project(id=16777217, inherits=True)" in done.read_text()
    assert "size=4194304, inodes=77" in done.read_text()


def begin(machine: Machine, work: str) -> None:
    guest = Path(__file__).with_name("guest_limit.py")
    words = [sys.executable, str(guest), work, str(OUTPUT / work)]
    paths = [REPOSITORY, REPOSITORY / "tests"]
    machine.start(
        f"{shlex.join(words)}\n",
        {
            "PYTHONPATH": ":".join(str(path) for path in paths),
            "PYTHONDONTWRITEBYTECODE": "1",
        },
    )
