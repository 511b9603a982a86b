"""Failpoints: armed by name, hit as often as asked, free when they are not."""

import errno
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from volplugin import failpoints
from volplugin.errors import InvalidArgument

PACKAGE = Path(failpoints.__file__).parent


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    """No point stays armed."""
    yield
    failpoints.arm("")


def test_unarmed() -> None:
    """Nothing happens at a point that is not armed, known or not."""
    failpoints.hit("core.create.intent")
    failpoints.arm("local.stage=error:28")
    failpoints.hit("core.create.intent")


def test_error() -> None:
    """An armed error is an OSError of that number which names the point."""
    failpoints.arm("local.stage=error:28")
    for _ in range(2):
        with pytest.raises(OSError, match=r"failpoint local\.stage") as caught:
            failpoints.hit("local.stage")
        assert caught.value.errno == errno.ENOSPC


def test_times() -> None:
    """``*N`` arms for the first N hits."""
    failpoints.arm("local.stage=error:5*2")
    for _ in range(2):
        with pytest.raises(OSError):  # noqa: PT011  any: the number was tested above
            failpoints.hit("local.stage")
    failpoints.hit("local.stage")


def test_sleep() -> None:
    """A sleep delays the thread that hits."""
    failpoints.arm("local.stage=sleep:0.05*1")
    began = time.monotonic()
    failpoints.hit("local.stage")
    assert time.monotonic() - began >= 0.05
    failpoints.hit("local.stage")


def test_kill() -> None:
    """A kill ends the process as SIGKILL does: nothing is cleaned up."""
    program = (
        "from volplugin import failpoints\n"
        "failpoints.arm('core.create.intent=kill')\n"
        "try:\n    failpoints.hit('core.create.intent')\n"
        "finally:\n    print('cleaned up')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        check=False,
        timeout=30,
    )
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, b"")


def test_many_at_once() -> None:
    """Points are separated by semicolons; blanks and empty ones do not matter."""
    failpoints.arm(" local.stage=error:5 ;; store.sync=error:28; ")
    for name, number in (("local.stage", errno.EIO), ("store.sync", errno.ENOSPC)):
        with pytest.raises(OSError) as caught:  # noqa: PT011
            failpoints.hit(name)
        assert caught.value.errno == number


def test_arming_replaces() -> None:
    """What is armed takes the place of what was."""
    failpoints.arm("local.stage=error:5")
    failpoints.arm("store.sync=error:5")
    failpoints.hit("local.stage")
    failpoints.arm("")
    failpoints.hit("store.sync")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("no.such=kill", "there is no failpoint 'no.such'"),
        ("local.stage", "no action ''"),
        ("local.stage=explode", "no action 'explode'"),
        ("local.stage=sleep:long", "has a bad number"),
        ("local.stage=error:x*2", "has a bad number"),
        ("local.stage=error:5*x", "has a bad number"),
    ],
)
def test_mistakes(text: str, complaint: str) -> None:
    """A mistake is told, and arms nothing: a test that kills nowhere proves nothing."""
    failpoints.arm("store.sync=error:5")
    with pytest.raises(InvalidArgument, match=re.escape(complaint)):
        failpoints.arm(text)
    with pytest.raises(OSError):  # noqa: PT011  what was armed before still is
        failpoints.hit("store.sync")


def test_names_and_code_agree() -> None:
    """Each name is hit somewhere in the code, and no other one is."""
    pattern = re.compile(r'\bhit\(\s*"([^"]+)"')
    hits = {
        name
        for path in PACKAGE.rglob("*.py")
        for name in pattern.findall(path.read_text())
    }
    assert hits == failpoints.NAMES
