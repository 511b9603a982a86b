"""Logging that never holds up the server: a bounded queue, and a thread that writes.

Nobody reads a plugin's output at times: a stopped dockerd, a full disk, a terminal on
hold. The event loop only queues a record. Formatting and writing are the thread's work;
what does not fit is counted and told afterwards.
"""

import contextlib
import io
import logging
import os
import queue
import select
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import Final, TextIO, TypeAlias

from volplugin.errors import InvalidArgument
from volplugin.loglines import FORMATS

CAPACITY: Final = 10_000  # lines waiting to be written
FLUSH_LIMIT: Final = 1.0  # seconds that `Writer.close` waits for them

_GATHER: Final = 0.02  # seconds to wait for more lines after a first one
_BATCH: Final = 256  # lines formatted before they are written
_CHUNK: Final = 4096  # bytes: pipe(7) takes PIPE_BUF at once when poll(2) says so
_LOOK_AGAIN: Final = 0.1  # seconds between looks at a stream that takes nothing

_LEVELS: Final = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}
_OURS: Final = "volplugin"

_Entry: TypeAlias = tuple[logging.LogRecord, str]


def log(logger: logging.Logger, level: int, event: str, /, **fields: object) -> None:
    """Log ``event`` with its fields; nearly free when the level is off.

    Values are turned into text later, in another thread: give none that will change.
    An exception with its stack trace is for ``logger.exception``.
    """
    if not logger.isEnabledFor(level):
        return
    # Built here, without the search for the caller's line that Logger.log makes.
    record = logging.LogRecord(logger.name, level, "", 0, event, None, None)
    record.fields = fields
    logger.handle(record)


def setup(*, fmt: str, level: str, stream: TextIO | None = None) -> "Writer":
    """Log from now on to ``stream`` (default: stderr), in place of what was set up.

    ``level`` is for our own loggers; other libraries' debug and information is left
    out. An earlier `Writer` is closed. Raise `InvalidArgument` for an unknown format
    or level.
    """
    writer = Writer(fmt, level, sys.stderr if stream is None else stream)
    root = logging.getLogger()
    earlier = [handler for handler in root.handlers if isinstance(handler, Writer)]
    # One assignment, so that no record goes to both or to neither.
    root.handlers = [h for h in root.handlers if not isinstance(h, Writer)] + [writer]
    for handler in earlier:
        handler.close()
    return writer


class Writer(logging.Handler):
    """Queues records and writes them, until it is closed.

    The thread is a daemon only so that a process that ends without `close` is not held
    by it; `logging` closes every handler at exit, so what is queued is still written.
    """

    def __init__(self, fmt: str, level: str, stream: TextIO | None) -> None:
        super().__init__()
        self._queue: queue.SimpleQueue[_Entry | None] = queue.SimpleQueue()
        self._lost = 0
        self._lost_lock = threading.RLock()
        self._ended = False
        self._closing = threading.Event()
        self._deadline = float("inf")
        self.reconfigure(fmt, level)
        self._sink = _sink(stream, lambda: time.monotonic() > self._deadline)
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def reconfigure(self, fmt: str, level: str) -> None:
        """Change format and level; lines still queued are written in the new format."""
        if fmt not in FORMATS:
            raise InvalidArgument(f"log format {fmt!r} is none of {', '.join(FORMATS)}")
        if level not in _LEVELS:
            raise InvalidArgument(
                f"log level {level!r} is none of {', '.join(_LEVELS)}"
            )
        self._render = FORMATS[fmt]
        logging.getLogger(_OURS).setLevel(_LEVELS[level])
        logging.getLogger().setLevel(max(_LEVELS[level], logging.WARNING))

    def emit(self, record: logging.LogRecord) -> None:
        """Queue the record, or count it as lost when the queue is full."""
        if self._ended or self._queue.qsize() >= CAPACITY:
            self._lose(1)
            return
        # Other libraries' arguments may change before the thread gets to them.
        message = _message(record) if record.args else str(record.msg)
        self._queue.put((record, message))

    def close(self) -> None:
        """Write what is queued, for at most `FLUSH_LIMIT`, and end the thread."""
        with self._lost_lock:
            if self._ended:
                return
            self._ended = True
        root = logging.getLogger()
        root.removeHandler(self)
        if not any(isinstance(handler, Writer) for handler in root.handlers):
            root.setLevel(logging.WARNING)
            logging.getLogger(_OURS).setLevel(logging.NOTSET)
        self._deadline = time.monotonic() + FLUSH_LIMIT
        self._closing.set()
        self._queue.put(None)
        self._thread.join(FLUSH_LIMIT + 2 * _LOOK_AGAIN)
        super().close()

    def _lose(self, count: int) -> None:
        with self._lost_lock:
            self._lost += count

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
        lines = [self._format(entry) for entry in entries if entry is not None]
        for chunk, count in _chunks(lines):
            if not self._sink.write(chunk):
                self._lose(count)
        self._tell_loss()
        return None not in entries and time.monotonic() <= self._deadline

    def _tell_loss(self) -> None:
        with self._lost_lock:
            lost, self._lost = self._lost, 0
        if lost:
            record = logging.LogRecord(__name__, logging.WARNING, "", 0, "", None, None)
            record.fields = {"lines": lost}
            if not self._sink.write(self._render(record, "log lines dropped")):
                self._lose(lost)

    def _format(self, entry: _Entry) -> bytes:
        record, message = entry
        try:
            return self._render(record, message)
        except Exception as error:  # noqa: BLE001 - a value's own __str__ may raise all
            record = logging.LogRecord(
                record.name, record.levelno, "", 0, "", None, None
            )
            record.fields = {"event": message[:200], "error": type(error).__name__}
            return self._render(record, "log line without its fields")


class _Descriptor:
    """Writes to a file descriptor of its own, and waits no longer than it may."""

    def __init__(self, descriptor: int, expired: Callable[[], bool]) -> None:
        # A copy: were the stream closed, its number could be one of the store's files.
        self._descriptor = os.dup(descriptor)
        self._expired = expired
        self._torn = False
        self._poll = select.poll()
        self._poll.register(self._descriptor, select.POLLOUT)

    def write(self, data: bytes) -> bool:
        """Write whole lines; return False where that fails or the time is up."""
        left = memoryview(b"\n" + data if self._torn else data)
        whole = len(left)
        try:
            while left:
                if self._expired():
                    return False
                if self._poll.poll(_LOOK_AGAIN * 1000):
                    left = left[self._write_some(left[:_CHUNK]) :]
        except OSError:  # no reader, no space: the next lines may fare better
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
        os.close(self._descriptor)


class _Stream:
    """Writes to a stream without a descriptor, in memory; to None, nothing."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream

    def write(self, data: bytes) -> bool:
        try:
            if self._stream is not None:
                self._stream.write(data.decode())
                self._stream.flush()
        except (OSError, ValueError):  # closed
            return False
        return True

    def close(self) -> None:
        """Leave the stream to its owner."""


def _sink(stream: TextIO | None, expired: Callable[[], bool]) -> _Descriptor | _Stream:
    if stream is None:  # the process was started without a stderr
        return _Stream(None)
    try:
        return _Descriptor(stream.fileno(), expired)
    except (io.UnsupportedOperation, AttributeError, ValueError, OSError):
        return _Stream(stream)


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


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception:  # noqa: BLE001 - a wrong format string must not fail its caller
        return f"{record.msg} {record.args!r}"
