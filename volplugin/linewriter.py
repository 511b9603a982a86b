"""Lines that a thread writes: a bounded queue in front of what may take nothing.

Whoever has a line only queues what it is made of. Making and writing it are the
thread's work; what does not fit is counted, and told in a line of its own afterwards.
"""

import contextlib
import os
import queue
import select
import threading
import time
from collections.abc import Callable, Iterable
from typing import Final, Generic, Protocol, TypeVar

FLUSH_LIMIT: Final = 1.0  # seconds that `LineWriter.close` waits for what is queued

_GATHER: Final = 0.02  # seconds to wait for more lines after a first one
_BATCH: Final = 256  # lines made before they are written
_CHUNK: Final = 4096  # bytes: pipe(7) takes PIPE_BUF at once when poll(2) says so
_LOOK_AGAIN: Final = 0.1  # seconds between looks at a file that takes nothing

T = TypeVar("T")


class Sink(Protocol):
    """Where lines go."""

    def write(self, data: bytes) -> bool:
        """Write whole lines; return False where that fails or the time is up."""

    def close(self) -> None:
        """Let go of what it writes to."""


class LineWriter(Generic[T]):
    """Queues what lines are made of and writes them, until it is closed.

    ``open_sink`` is given what tells whether the time to write is up; ``render`` makes
    a line, in the thread, and ``render_lost`` the one that tells how many were lost.
    The weights of what waits add up to ``capacity`` at most.

    The thread is a daemon only so that a process that ends without `close` is not held
    by it.
    """

    def __init__(
        self,
        name: str,
        open_sink: Callable[[Callable[[], bool]], Sink],
        render: Callable[[T], bytes],
        render_lost: Callable[[int], bytes],
        capacity: int,
    ) -> None:
        self._render = render
        self._render_lost = render_lost
        self._capacity = capacity
        self._queue: queue.SimpleQueue[tuple[T, int] | None] = queue.SimpleQueue()
        # Reentrant: a finalizer may log while its thread is in here.
        self._lock = threading.RLock()
        self._waiting = 0
        self.lost = 0
        self._ended = False
        self._closing = threading.Event()
        self._deadline = float("inf")
        self._sink = open_sink(lambda: time.monotonic() > self._deadline)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, item: T, weight: int = 1) -> None:
        """Queue what a line is made of, or count it as lost when the queue is full."""
        with self._lock:
            if self._ended or self._waiting + weight > self._capacity:
                self.lost += 1
                return
            self._waiting += weight
        self._queue.put((item, weight))

    def close(self) -> bool:
        """Write what is queued, for at most `FLUSH_LIMIT`, and end the thread.

        Return False where it was closed before.
        """
        with self._lock:
            if self._ended:
                return False
            self._ended = True
        self._deadline = time.monotonic() + FLUSH_LIMIT
        self._closing.set()
        self._queue.put(None)
        self._thread.join(FLUSH_LIMIT + 2 * _LOOK_AGAIN)
        return True

    def _lose(self, count: int) -> None:
        with self._lock:
            self.lost += count

    def _run(self) -> None:
        try:
            while self._write_batch():
                pass
        finally:
            self._sink.close()

    def _write_batch(self) -> bool:
        """Write what waits, at least one line; return False when that was the last."""
        entries = [self._queue.get()]
        # Not at once: a thread that wakes for each line takes turns with the event
        # loop, which then costs the server more than the line.
        if self._queue.qsize() < _BATCH:
            self._closing.wait(_GATHER)
        with contextlib.suppress(queue.Empty):
            while len(entries) < _BATCH:
                entries.append(self._queue.get_nowait())
        taken = [entry for entry in entries if entry is not None]
        lines = [self._render(item) for item, _ in taken]
        with self._lock:
            self._waiting -= sum(weight for _, weight in taken)
        for chunk, count in _chunks(lines):
            if not self._sink.write(chunk):
                self._lose(count)
        self._tell_loss()
        return None not in entries and time.monotonic() <= self._deadline

    def _tell_loss(self) -> None:
        with self._lock:
            lost, self.lost = self.lost, 0
        if lost and not self._sink.write(self._render_lost(lost)):
            self._lose(lost)


class Descriptor:
    """Writes to a file descriptor, and waits no longer than it may.

    ``torn`` says that what is there ends within a line. ``error`` is why the last
    write failed, None where it did not, or where only its time was up.
    """

    def __init__(
        self, descriptor: int, expired: Callable[[], bool], *, torn: bool = False
    ) -> None:
        self._descriptor = descriptor
        self._expired = expired
        self._torn = torn
        self.error: OSError | None = None
        self._poll = select.poll()
        self._poll.register(self._descriptor, select.POLLOUT)

    def write(self, data: bytes) -> bool:
        """Do as `Sink.write`."""
        left = memoryview(b"\n" + data if self._torn else data)
        whole = len(left)
        self.error = None
        try:
            while left:
                if self._expired():
                    return False
                if self._poll.poll(_LOOK_AGAIN * 1000):
                    left = left[self._write_some(left[:_CHUNK]) :]
        except OSError as error:  # no reader, no space: the next lines may fare better
            self.error = error
            return False
        finally:
            self._torn = 0 < len(left) < whole or (self._torn and len(left) == whole)
        return True

    def _write_some(self, data: memoryview) -> int:
        try:
            return os.write(self._descriptor, data)
        except BlockingIOError:  # made non-blocking by another process that has it
            time.sleep(_LOOK_AGAIN)
            return 0

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._descriptor)


def _chunks(lines: Iterable[bytes]) -> Iterable[tuple[bytes, int]]:
    """Join lines into as few writes as keep other processes' lines out of ours."""
    chunk, count = b"", 0
    for line in lines:
        if chunk and len(chunk) + len(line) > _CHUNK:
            yield chunk, count
            chunk, count = b"", 0
        chunk += line
        count += 1
    if chunk:
        yield chunk, count
