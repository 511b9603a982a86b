"""The volume plugins that a call has come through, so that none asks itself.

Each call to another plugin carries the header ``Via`` (RFC 9110, section 7.6.3) with
the servers before it. One that finds itself there refuses: the call would go round and
round, and wait for the lock of the volume that it holds itself.
"""

import uuid
from contextvars import ContextVar
from typing import Final

from volplugin.errors import InvalidArgument

HEADER: Final = "Via"
SELF: Final = f"volplugin-{uuid.uuid4().hex}"
"""This process, as it calls itself in the header."""

_before: ContextVar[str] = ContextVar("volplugin.route", default="")


def enter(header: str) -> None:
    """Note where the call of this task has come through; "" for an engine's own.

    Raise `InvalidArgument` where that is this server.
    """
    _before.set(header)
    if SELF in header:
        raise InvalidArgument(
            "this volplugin asks itself, through a volume of driver plugin that leads "
            "back to it: give that volume another plugin"
        )


def header() -> str:
    """Return the header for a call that this server makes for the call of this task."""
    before = _before.get()
    return f"{before}, 1.1 {SELF}" if before else f"1.1 {SELF}"
