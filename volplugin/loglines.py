"""How a log record reads: one line a fact with its fields, for people or for machines.

A line is always one line, whatever a name, an option or a stack trace holds, and never
longer than `LONGEST`: dockerd stops reading a managed plugin's output at a line above
64 KiB, and the plugin's next write then blocks for ever.
"""

import json
import logging
import re
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, Final

LONGEST: Final = 8192  # bytes, with the newline

_LONGEST_VALUE: Final = 2048  # characters
_TRACE_HEAD, _TRACE_TAIL = 1000, 3500  # characters; the end of a trace names the error
_CUT: Final = "…"

_PLAIN: Final = re.compile(r'[^\s"=]+')
_UNPRINTABLE_EVENT: Final = re.compile(r'["=]')
_NAMES: Final = {
    logging.DEBUG: "DEBUG",
    logging.INFO: "INFO",
    logging.WARNING: "WARN",
    logging.ERROR: "ERROR",
    logging.CRITICAL: "FATAL",
}


def text_line(record: logging.LogRecord, message: str) -> bytes:
    """Return ``2026-11-24T19:00:00.123Z INFO  call volume=db ms=1.2`` as UTF-8.

    Values with blanks, quotes, ``=`` or anything that does not print are JSON strings,
    so that no value can pass for another field or line.
    """
    event = _cut(message)
    if not event.isprintable() or _UNPRINTABLE_EVENT.search(event):
        event = _quoted(event)
    level = _NAMES.get(record.levelno, record.levelname)
    parts = [f"{_time(record.created)} {level:<5} {event}"]
    parts += [
        f"{_value(key)}={_value(value)}" for key, value in _fields(record).items()
    ]
    trace = _trace(record)
    if trace:
        parts.append(f"exception={_quoted(trace)}")
    line = " ".join(parts).encode(errors="backslashreplace")
    if len(line) >= LONGEST:
        end = _CUT.encode()
        line = line[: LONGEST - 1 - len(end)].decode(errors="ignore").encode() + end
    return line + b"\n"


def json_line(record: logging.LogRecord, message: str) -> bytes:
    """Return an object with time, level, event, fields, logger, and any exception.

    One that would be too long has its values cut, and is then still an object.
    """
    fields = _fields(record)
    trace = _trace(record)
    line = _object(record, _cut(message), fields, trace)
    if len(line) >= LONGEST:
        short = {key[:64]: _cut(_plain(value), 64) for key, value in fields.items()}
        line = _object(record, _cut(message, 256), short, trace[-1500:])
    if len(line) >= LONGEST:
        line = _object(record, _cut(message, 256), {}, _cut(trace[-256:]))
    return line + b"\n"


FORMATS: Final[Mapping[str, Callable[[logging.LogRecord, str], bytes]]] = {
    "text": text_line,
    "json": json_line,
}


def _object(
    record: logging.LogRecord, event: str, fields: Mapping[str, Any], trace: str
) -> bytes:
    whole = {
        "time": _time(record.created),
        "level": record.levelname.lower(),
        "event": event,
        "fields": {key: _json_value(value) for key, value in fields.items()},
        "logger": record.name[:128],
    }
    if trace:
        whole["exception"] = trace
    return json.dumps(whole, separators=(",", ":")).encode()


def _json_value(value: object) -> object:
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float) and abs(value) < float("inf"):
        return value  # JSON has neither NaN nor infinity
    if isinstance(value, list | tuple):
        return [_cut(_plain(item)) for item in value[:64]]
    return _cut(_plain(value))


def _time(created: float) -> str:
    milliseconds = int(created * 1000)
    whole = time.gmtime(milliseconds // 1000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', whole)}.{milliseconds % 1000:03}Z"


def _fields(record: logging.LogRecord) -> Mapping[str, Any]:
    fields = getattr(record, "fields", None)
    return fields if isinstance(fields, dict) else {}


def _value(value: object) -> str:
    text = _cut(_plain(value))
    if text.isprintable() and _PLAIN.fullmatch(text):
        return text
    return _quoted(text)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=not text.isprintable())


def _plain(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


def _cut(text: str, longest: int = _LONGEST_VALUE) -> str:
    return text if len(text) <= longest else text[:longest] + _CUT


def _trace(record: logging.LogRecord) -> str:
    parts = []
    if record.exc_info and record.exc_info[1] is not None:
        parts += traceback.format_exception(record.exc_info[1])
    elif record.exc_text:
        parts.append(record.exc_text)
    if record.stack_info:
        parts.append(record.stack_info)
    trace = "".join(parts).rstrip("\n")
    if len(trace) > _TRACE_HEAD + _TRACE_TAIL:
        trace = f"{trace[:_TRACE_HEAD]}\n{_CUT}\n{trace[-_TRACE_TAIL:]}"
    return trace
