"""What this process may do: a machine may keep some of root's rights from it."""

from pathlib import Path

from support.require import missing

CAP_SYS_RESOURCE = 24  # linux/capability.h


def has_capability(number: int) -> bool:
    """Tell whether the capability is effective, see capabilities(7)."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("CapEff:"))
    return bool(int(line.split()[1], 16) >> number & 1)


def require_capability(number: int) -> None:
    """End the test as `missing` does without the capability."""
    if not has_capability(number):
        missing(f"needs capability {number} of linux/capability.h")
