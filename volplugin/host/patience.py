"""Waiting for others to let go of what is to be taken away."""

import time
from collections.abc import Callable
from typing import Final

from volplugin.errors import InUse

_PAUSE: Final = 0.01  # seconds


def outwait(action: Callable[[], None], limit: float) -> None:
    """Do ``action``, again while it raises `InUse`; after ``limit`` seconds, let it.

    An indexer, a `df`, or a process that starts in a mount namespace of its own has a
    file system for a moment.
    """
    end = time.monotonic() + limit
    while True:
        try:
            return action()
        except InUse:
            if time.monotonic() > end:
                raise
        time.sleep(_PAUSE)
