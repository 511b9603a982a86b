"""The kernel's version, and its modules: loaded by modprobe(8) where they are not."""

import os
import re
import threading
from typing import Final

from volplugin.errors import VolpluginError
from volplugin.host import commands

_LIMIT: Final = 20.0  # seconds; some look at the hardware first

_VERSION: Final = re.compile(r"(\d+)\.(\d+)")

_failed: dict[str, str] = {}
_lock = threading.Lock()


def kernel_version() -> tuple[int, int]:
    """Return the first two numbers of the running kernel's release."""
    found = _VERSION.match(os.uname().release)
    return (int(found[1]), int(found[2])) if found is not None else (0, 0)


def load(name: str, *parameters: str) -> str | None:
    """Have the module ``name`` in the kernel; return why it can't be, or None.

    ``parameters`` (``nbds_max=64``) count where it is not loaded yet. modprobe is tried
    once in the life of the process; a module that was loaded by other means meanwhile
    is seen.
    """
    with _lock:
        if os.path.isdir(f"/sys/module/{name}"):
            return None
        if name not in _failed:
            try:
                commands.run(
                    ["modprobe", name, *parameters],
                    limit=_LIMIT,
                    doing=f"load the kernel's module {name}",
                )
            except VolpluginError as error:
                _failed[name] = str(error)
            # It is in the kernel's file itself, or modprobe did nothing.
            else:
                return None
        return _failed[name]
