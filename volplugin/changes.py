"""Changes to volumes: one at a time a volume, none ever cancelled, waits bounded."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

import attrs

from volplugin.errors import DeadlineExceeded

T = TypeVar("T")


class Locks:
    """A lock for each name, which exists while someone holds or awaits it."""

    def __init__(self) -> None:
        self._locks: dict[str, tuple[asyncio.Lock, int]] = {}

    @contextlib.asynccontextmanager
    async def hold(self, name: str) -> AsyncIterator[None]:
        """Hold the lock of ``name``; those who wait get it in the order they came."""
        lock, users = self._locks.get(name, (asyncio.Lock(), 0))
        self._locks[name] = lock, users + 1
        try:
            async with lock:
                yield
        finally:
            lock, users = self._locks[name]
            if users == 1:
                del self._locks[name]
            else:
                self._locks[name] = lock, users - 1

    def waiting(self, name: str) -> int:
        """Return how many hold or await the lock of ``name``."""
        return self._locks[name][1] if name in self._locks else 0


@attrs.define
class Caller:
    """Whether whoever asked for a change still waits for its outcome.

    ``left`` is true once the deadline has passed. ``connected`` asks the connection.
    """

    connected: Callable[[], bool] = lambda: True
    left: bool = False

    def is_waiting(self) -> bool:
        """Tell whether an answer would still reach the caller."""
        return not self.left and self.connected()


class Changes:
    """The changes under way."""

    def __init__(self) -> None:
        self.locks = Locks()
        self._tasks: set[asyncio.Task[object]] = set()

    async def run(
        self,
        name: str,
        change: Callable[[], Awaitable[T]],
        *,
        limit: float | None,
        caller: Caller,
    ) -> T:
        """Run ``change`` under the lock of ``name`` and wait ``limit`` s for it.

        ``limit`` None waits as long as it takes.

        After the limit the change goes on and `DeadlineExceeded` is raised; asked
        again, the same call queues behind it and finds its outcome. One that has not
        begun by then never does. Cancelling this call leaves the change running too.
        """

        async def locked() -> T:
            async with self.locks.hold(name):
                if caller.left:
                    raise DeadlineExceeded("the caller did not wait for its turn")
                return await change()

        task = asyncio.create_task(locked())
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        try:
            done, _ = await asyncio.wait({task}, timeout=limit)
        except asyncio.CancelledError:
            caller.left = True
            raise
        if not done:
            caller.left = True
            raise DeadlineExceeded(
                f"still at it after {limit or 0:g} s; it goes on, and the same call "
                f"again waits for it"
            )
        return task.result()

    def _forget(self, task: asyncio.Task[object]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # the caller may have left: mark it as seen

    async def drain(self, limit: float) -> bool:
        """Wait ``limit`` s for all changes; return whether all have ended."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=limit)
        return not self._tasks
