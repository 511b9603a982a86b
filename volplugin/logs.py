"""Logging that never holds up the server: a bounded queue, and a thread that writes.

Nobody reads a plugin's output at times: a stopped dockerd, a full disk, a terminal on
hold. The event loop only queues a record. Formatting and writing are the thread's work;
what does not fit is counted and told afterwards.
"""

import io
import logging
import os
import sys
from collections.abc import Callable
from typing import Final, TextIO, TypeAlias

from volplugin.errors import InvalidArgument
from volplugin.linewriter import Descriptor, LineWriter, Sink
from volplugin.loglines import FORMATS

CAPACITY: Final = 10_000  # lines waiting to be written

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

    `logging` closes every handler at exit, so what is queued is still written.
    """

    def __init__(self, fmt: str, level: str, stream: TextIO | None) -> None:
        super().__init__()
        self.reconfigure(fmt, level)
        self._lines: LineWriter[_Entry] = LineWriter(
            "log",
            lambda expired: _sink(stream, expired),
            self._format,
            self._format_lost,
            CAPACITY,
        )

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

    @property
    def lost(self) -> int:
        """How many lines were lost that the log does not tell of yet."""
        return self._lines.lost

    def emit(self, record: logging.LogRecord) -> None:
        """Queue the record, or count it as lost when the queue is full."""
        # Other libraries' arguments may change before the thread gets to them.
        message = _message(record) if record.args else str(record.msg)
        self._lines.put((record, message))

    def close(self) -> None:
        """Write what is queued, as `LineWriter.close` does."""
        root = logging.getLogger()
        root.removeHandler(self)
        if not self._lines.close():
            return
        if not any(isinstance(handler, Writer) for handler in root.handlers):
            root.setLevel(logging.WARNING)
            logging.getLogger(_OURS).setLevel(logging.NOTSET)
        super().close()

    def _format_lost(self, count: int) -> bytes:
        record = logging.LogRecord(__name__, logging.WARNING, "", 0, "", None, None)
        record.fields = {"lines": count}
        return self._render(record, "log lines dropped")

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


def _sink(stream: TextIO | None, expired: Callable[[], bool]) -> Sink:
    if stream is None:  # the process was started without a stderr
        return _Stream(None)
    try:
        # A copy: were the stream closed, its number could be one of the store's files.
        return Descriptor(os.dup(stream.fileno()), expired)
    except (io.UnsupportedOperation, AttributeError, ValueError, OSError):
        return _Stream(stream)


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception:  # noqa: BLE001 - a wrong format string must not fail its caller
        return f"{record.msg} {record.args!r}"
