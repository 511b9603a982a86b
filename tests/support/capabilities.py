"""What this process may do: a machine may keep some of root's rights from it."""

from pathlib import Path
from typing import Final

import pytest

CAP_SYS_RESOURCE: Final = 24  # linux/capability.h


def has_capability(number: int) -> bool:
    """Tell whether the capability is effective, see capabilities(7)."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("CapEff:"))
    return bool(int(line.split()[1], 16) >> number & 1)


def require_capability(number: int) -> None:
    """Skip the test without the capability, in CI too.

    For tests alone that ``tests/kernel/guest_limits.py`` runs again in a machine that
    has all of them, and that fails if one is skipped there.
    """
    if not has_capability(number):
        pytest.skip(
            f"needs capability {number} of linux/capability.h; tests/kernel has it"
        )
