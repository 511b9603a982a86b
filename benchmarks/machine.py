"""A guest with project quotas, which the host's kernel may lack: user-mode Linux."""

import importlib.util
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.disks import MIB, make_image
from benchmarks.progress import tell

REPOSITORY = Path(__file__).resolve().parents[1]
TESTS = REPOSITORY / "tests"  # where the machine is: the tests have the same one
DISK_SIZE = 16 << 10  # MiB, sparse
LIMIT = 240.0  # seconds


def is_available() -> bool:
    """Tell whether there is what the tests' machine needs: pytest, by ``.[test]``."""
    if str(TESTS) not in sys.path:
        sys.path.append(str(TESTS))
    return importlib.util.find_spec("pytest") is not None


def run(parts: Sequence[str], home: Path, *, quick: bool) -> dict[str, Any]:
    """Boot a guest with an XFS disk, have it measure parts, and return their figures.

    It must be available. Raise `RuntimeError` with all that it told when there are
    none.
    """
    from support.uml import OUTPUT, Machine  # noqa: PLC0415  see is_available

    image = home / "guest.img"
    make_image(image, "xfs", DISK_SIZE * MIB)
    tell(f"guest: {', '.join(parts)}")
    words = [sys.executable, "-m", "benchmarks.guest_limits", str(OUTPUT), *parts]
    words += ["--quick"] if quick else []
    machine = Machine([image])
    try:
        machine.start(
            f"cd {shlex.quote(str(REPOSITORY))} && {shlex.join(words)}\n",
            {"PYTHONDONTWRITEBYTECODE": "1"},
        )
        machine.wait(LIMIT)
        file = machine.output / "figures.json"
        if not file.exists():
            raise RuntimeError(f"the guest has measured nothing\n{machine.told()}")
        figures: dict[str, Any] = json.loads(file.read_text())
        return figures
    finally:
        machine.close()
        image.unlink()
