"""Waiting for what another process does, with a limit and a reason."""

import time
from collections.abc import Callable


def eventually(true: Callable[[], object], what: str, *, seconds: float = 15) -> None:
    """Return once ``true()`` holds; fail naming ``what`` after ``seconds``."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            raise AssertionError(f"not within {seconds} s: {what}")
        time.sleep(0.05)
