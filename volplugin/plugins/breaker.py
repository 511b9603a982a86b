"""A circuit breaker: what does not answer is not waited for by one call after another.

Closed, all calls pass. After `FAILURES` of them in a row it opens, and for `PAUSE`
seconds each call fails at once; then one at a time is let through, and the first that
is answered closes it again.
"""

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Final

from volplugin.errors import Unavailable
from volplugin.times import now

FAILURES: Final = 3
PAUSE: Final = 5.0  # seconds


class Breaker:
    """The breaker of one plugin; safe in threads."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._failures = 0
        self._since = ""
        self._reason = ""
        self._again = 0.0  # time.monotonic() at which one call is let through
        self._trying = False  # that one has not ended
        self._answered = False

    @contextlib.contextmanager
    def passing(self) -> Iterator[None]:
        """Let a call pass, or raise `Unavailable` that says since when and why not."""
        is_trial = self._let_through()
        try:
            yield
        finally:
            if is_trial:
                with self._lock:
                    self._trying = False

    def _let_through(self) -> bool:
        """Return whether the call is the one that tries whether it is up again."""
        with self._lock:
            if self._failures < FAILURES:
                return False
            # One that hangs is waited for: each more would take another thread.
            if self._trying or time.monotonic() < self._again:
                raise Unavailable(
                    f"plugin {self._name} is down since {self._since}: "
                    f"{self._reason}; it is tried again every {PAUSE:g} s"
                )
            self._trying = True
            return True

    def reset(self) -> None:
        """Let calls begin again: there is reason to think that it is up."""
        with self._lock:
            self._failures = min(self._failures, FAILURES - 1)

    def succeeded(self) -> bool:
        """Note that a call was answered; return whether it was down before."""
        with self._lock:
            was_down = self._failures > 0
            self._failures, self._since, self._answered = 0, "", True
            return was_down

    def failed(self, reason: str) -> bool:
        """Note that a call was not answered; return whether it was up before."""
        with self._lock:
            self._failures += 1
            self._reason = reason
            self._again = time.monotonic() + PAUSE
            if self._since:
                return False
            self._since = now()
            return True

    def is_failing(self) -> bool:
        """Tell whether the last call was not answered."""
        with self._lock:
            return self._failures > 0

    def health(self) -> str:
        """Say how the plugin is, from memory: ``ok``, or since when it is down."""
        with self._lock:
            if self._failures:
                return f"down since {self._since}: {self._reason}"
            return "ok" if self._answered else "not asked yet"
