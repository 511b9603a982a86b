"""What a service tells the manager that started it: the protocol of sd_notify(3)."""

import contextlib
import os
import socket
import time
from collections.abc import MutableMapping
from typing import Final

import attrs

_VARIABLES: Final = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
_PATIENCE: Final = 1.0  # seconds for a manager whose queue is full

READY: Final = "READY=1"
STOPPING: Final = "STOPPING=1"
WATCHDOG: Final = "WATCHDOG=1"


@attrs.frozen
class Notifier:
    """Tells the manager at ``address``, a socket's; nobody where that is "".

    ``watchdog`` are the seconds after which it ends a service that told of no
    `WATCHDOG`; None where it does not watch.
    """

    address: str = ""
    watchdog: float | None = None

    def tell(self, *facts: str) -> None:
        """Tell ``facts``, each a line such as `READY`, in one message.

        May block for a second. Raise `OSError` when it could not be told.
        """
        if not self.address:
            return
        # unix(7): an abstract name begins with NUL; the manager writes "@" for it.
        address = "\0" * self.address.startswith("@") + self.address.removeprefix("@")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sending:
            sending.settimeout(_PATIENCE)
            sending.connect(address)
            sending.send("\n".join(facts).encode())


def notifier(environ: MutableMapping[str, str]) -> Notifier:
    """Return the notifier that ``environ`` names, and unset its variables.

    No child may tell in our name. A watchdog that is meant for another process is left
    out, and so is what is no number or no address of a socket.
    """
    address, usec, pid = (environ.pop(name, "") for name in _VARIABLES)
    if not address.startswith(("/", "@")):
        return Notifier()
    watchdog = None
    if pid in {"", str(os.getpid())}:
        with contextlib.suppress(ValueError):
            watchdog = int(usec) / 1e6
    return Notifier(address, watchdog if watchdog and watchdog > 0 else None)


def status(text: str) -> str:
    """Return the fact that shows ``text`` to operators, on one line."""
    return f"STATUS={' '.join(text.split())}"


def extend(seconds: float) -> str:
    """Return the fact that what is under way may take ``seconds`` more from now."""
    return f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}"


def reloading() -> tuple[str, str]:
    """Return the facts that begin a reload, which `READY` ends."""
    return "RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}"
