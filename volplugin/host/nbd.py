"""Network block devices, ``/dev/nbdN``, as the kernel shows them in ``/sys/block``.

There are as many as the module was loaded for. One is *taken* while it has a server, or
what was mounted from it outlives that server.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from volplugin.errors import NoSpace
from volplugin.host import modules, nodes

MANY: Final = 64  # devices, where the module is not loaded yet; the usual is 16

_chosen: set[str] = set()
_lock = threading.Lock()


def problem() -> str | None:
    """Say why there are no such devices here; None if there are. Loads the module."""
    if os.path.isdir("/sys/block/nbd0"):
        return None
    reason = modules.load("nbd", f"nbds_max={MANY}")
    if reason is not None:
        return f"the kernel has no module nbd: {reason}"
    return None if _names() else "the module nbd has no devices (nbds_max=0)"


@contextmanager
def free() -> Iterator[str]:
    """Yield the name of a device that nothing uses, kept from other threads meanwhile.

    Raise `NoSpace` when there is none.
    """
    with _lock:
        names = _names()
        name = next((n for n in names if n not in _chosen and _is_free(n)), None)
        if name is None:
            raise NoSpace(
                f"all {len(names)} devices /dev/nbdN are taken: load the module for"
                " more (`options nbd nbds_max=256` in /etc/modprobe.d), or use another"
                " mapper"
            )
        _chosen.add(name)
    try:
        yield name
    finally:
        with _lock:
            _chosen.discard(name)


def server_of(name: str) -> int | None:
    """Return the process (or thread of it) that serves ``name``; None: it has none.

    It may have died, while what is mounted holds the device.
    """
    try:
        with open(f"/sys/block/{name}/pid", encoding="ascii") as file:
            return int(file.read())
    except OSError:
        return None


def is_served_by(name: str, pid: int) -> bool:
    """Tell whether the process ``pid``, or a thread of it, serves the device."""
    server = server_of(name)
    return server is not None and os.path.isdir(f"/proc/{pid}/task/{server}")


def _names() -> list[str]:
    names = [name for name in os.listdir("/sys/block") if name.startswith("nbd")]
    return sorted(names, key=lambda name: int(name.removeprefix("nbd")))


def _is_free(name: str) -> bool:
    # One whose server has died is still a mounted file system's, which would go on
    # with whatever image came next.
    if server_of(name) is not None or nodes.size_of(name):
        return False
    nodes.ensure(name)
    return nodes.is_unclaimed(name)
