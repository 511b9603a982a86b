"""Limits by project quota, from end to end, in machines that have such quotas.

The tests are in ``guest_limits.py``. There is a machine for each kind of disk, and both
run at once: each has one processor.
"""

import contextlib
import re
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import pytest
from guest_limits import ONCE
from support.commands import run
from support.require import require
from support.uml import Machine, run_tests

pytestmark = [pytest.mark.root, pytest.mark.timeout(1000)]

GUEST: Final = Path(__file__).with_name("guest_limits.py")
KINDS: Final = ("xfs", "ext4")
# In the order of the devices that the guest expects; the images are sparse.
DISKS: Final = (("mkfs.xfs", "-q"), ("mkfs.ext4", "-q", "-O", "quota,project"))
SIZE: Final = 2 << 30

Outcomes = Mapping[str, str]


@contextlib.contextmanager
def computer() -> Iterator[Machine]:
    """A machine with the disks."""
    with tempfile.TemporaryDirectory(prefix="disks-") as folder:
        images = []
        for number, (mkfs, *flags) in enumerate(DISKS):
            image = Path(folder).resolve() / f"{number}.img"
            with image.open("wb") as file:
                file.truncate(SIZE)
            run(require(mkfs), *flags, image)
            images.append(image)
        machine = Machine(images)
        try:
            yield machine
        finally:
            machine.close()


@pytest.fixture(scope="module")
def outcomes() -> Iterator[Mapping[str, Outcomes]]:
    """What became of the tests, by the kind of the disk they ran on."""
    with contextlib.ExitStack() as stack:
        machines = {kind: stack.enter_context(computer()) for kind in KINDS}

        def run_on(kind: str) -> Outcomes:
            chosen = {"VOLPLUGIN_TEST_DISKS": kind}
            return run_tests(machines[kind], [GUEST], seconds=900, environment=chosen)

        with ThreadPoolExecutor(len(KINDS)) as pool:
            yield dict(zip(KINDS, pool.map(run_on, KINDS), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_in_the_machine(outcomes: Mapping[str, Outcomes], kind: str) -> None:
    """Every test has passed there, but for those left to the other machine."""
    wrong = {
        name: told
        for name, told in outcomes[kind].items()
        if told != "passed" and ONCE not in told
    }
    assert not wrong, "\n\n".join(f"{name}\n{told}" for name, told in wrong.items())


def test_none_is_left_out(outcomes: Mapping[str, Outcomes]) -> None:
    """Every test that is written has passed in one machine at least."""
    passed = {
        name.partition("::")[2].partition("[")[0]
        for mine in outcomes.values()
        for name, told in mine.items()
        if told == "passed"
    }
    written = re.findall(r"^def (test_\w+)", GUEST.read_text(), re.MULTILINE)
    assert passed == set(written)
