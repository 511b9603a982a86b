"""How an entry of a recording reads: one JSON object a line, without secrets."""

import datetime as dt
import json
import os
import time
from collections.abc import Mapping
from typing import Any

import attrs

from volplugin import __version__, times
from volplugin.exchanges import Exchange, Message
from volplugin.model import Client
from volplugin.redaction import Redaction


@attrs.frozen(kw_only=True)
class Connection:
    """A connection to ``socket``, by the process ``client``; they are numbered."""

    socket: str
    number: int
    client: Client


def beginning() -> bytes:
    """Return the line with which a server's part of a recording begins."""
    return _line({"time": times.now(), "version": __version__, "pid": os.getpid()})


def dropped(count: int) -> bytes:
    """Return the line that stands for ``count`` that were not written."""
    return _line({"time": times.now(), "dropped": count})


def entry(connection: Connection, exchange: Exchange) -> bytes:
    """Return the line of an exchange."""
    redaction = Redaction()
    began = time.time() - (time.monotonic() - exchange.began)
    moment = dt.datetime.fromtimestamp(began, dt.UTC)
    # In this order: an answer may quote the request.
    request = _request(exchange.request, redaction)
    answer = exchange.answer and _answer(exchange.answer, redaction)
    told = {
        "time": times.rfc3339(moment),
        "socket": connection.socket,
        "connection": connection.number,
        "client": attrs.asdict(connection.client),
        "request": request,
        "answer": answer,
        "ms": round(exchange.seconds * 1e3, 2),
    }
    if exchange.closed_by:
        told["closed"] = exchange.closed_by
    return _line(told)


def _request(message: Message, redaction: Redaction) -> dict[str, Any]:
    if not message.head:
        return {"unreadable": redaction.unreadable(_text(message.body))} | _rest(
            message
        )
    line, *headers = _lines(message.head)
    return {
        "line": redaction.request_line(line),
        "headers": [redaction.header(header) for header in headers],
        "body": redaction.body(_text(message.body)),
    } | _rest(message)


def _answer(message: Message, redaction: Redaction) -> dict[str, Any]:
    line, *headers = _lines(message.head) or [""]
    return {
        "status": int([*line.split(), "0", "0"][1]),
        "headers": headers,
        "body": redaction.answer(_text(message.body)),
    } | _rest(message)


def _rest(message: Message) -> dict[str, Any]:
    """Return what is told only of a message that is not recorded as a whole."""
    told: dict[str, Any] = {}
    if message.cut:
        told["cut"] = message.cut
    if message.head and not message.whole:
        told["incomplete"] = True
    return told


def _lines(head: bytes) -> list[str]:
    return _text(head).removesuffix("\r\n\r\n").split("\r\n")


def _text(data: bytes) -> str:
    """Return bytes as text; what is not UTF-8 becomes lone surrogates, as in Python."""
    return data.decode(errors="surrogateescape")


def _line(told: Mapping[str, Any]) -> bytes:
    return json.dumps(told, separators=(",", ":")).encode() + b"\n"
