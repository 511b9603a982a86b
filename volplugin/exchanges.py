"""What was said on one connection: bytes in, requests with their answers out.

It only listens. Where it can't tell where a request ends it keeps the bytes as they
are; what they mean is the server's business.
"""

import re
from collections import deque
from collections.abc import Callable
from typing import Final

import attrs

# Bytes of a body, or of a head without end; what is more is counted.
KEPT_REQUEST: Final = 64 << 10  # more than any engine sends
KEPT_ANSWER: Final = 4 << 20  # a List of tens of thousands of volumes

_HEAD_END: Final = b"\r\n\r\n"
_LENGTH: Final = re.compile(
    rb"\r\ncontent-length:[ \t]*([0-9]{1,18})[ \t]*\r\n", re.IGNORECASE
)
_CHUNKED: Final = re.compile(
    rb"\r\ntransfer-encoding:[^\r]*\bchunked[ \t]*\r\n", re.IGNORECASE
)
_ENDLESS: Final = 1 << 62
_INTERIM: Final = re.compile(rb"HTTP/1\.[01] 1[0-9][0-9] ")


@attrs.frozen(kw_only=True)
class Message:
    """A request or an answer. Without ``head`` it is no HTTP, and ``body`` is all.

    ``cut`` bytes of its body are left out; ``whole`` says that all of it came.
    """

    head: bytes = b""
    body: bytes = b""
    cut: int = 0
    whole: bool = False


@attrs.frozen(kw_only=True)
class Exchange:
    """A request and its answer; None where the connection ended without one.

    ``began`` is the moment of its first byte, and ``seconds`` passed until its last.
    """

    began: float
    seconds: float
    request: Message
    answer: Message | None
    closed_by: str = ""


class _Reader:
    """Takes one message out of the bytes that come."""

    def __init__(self, kept: int, began: float = 0.0) -> None:
        self.began = began
        self.whole = False
        self._kept = kept
        self._head = b""
        self._body = bytearray()
        self._cut = 0
        self._pending = bytearray()  # a head, or a line between chunks, not yet whole
        self._left = 0  # bytes of the body, or of a chunk of it, to come
        self._chunked = False
        self._is_trailer = False

    def is_empty(self) -> bool:
        """Tell whether nothing of a message has come."""
        return not self._head and not self._pending

    def has_head(self) -> bool:
        """Tell whether its head came; what has none is no HTTP."""
        return bool(self._head)

    def is_interim(self) -> bool:
        """Tell whether this is an answer before the answer, as ``100 Continue``."""
        return _INTERIM.match(self._head) is not None

    def message(self) -> Message:
        """Return what came so far."""
        body = bytes(self._body if self._head else self._pending)
        return Message(head=self._head, body=body, cut=self._cut, whole=self.whole)

    def feed(self, data: bytes) -> bytes:
        """Take what belongs to this message; return the rest."""
        if not self._head:
            self._pending += data
            if not self._take_head():
                return b""
            data = bytes(self._pending)
            self._pending.clear()
        if self._chunked:
            return self._take_chunks(data)
        rest = self._take_body(data)
        self.whole = not self._left
        return rest

    def _take_head(self) -> bool:
        # HTTP lets a client send empty lines between requests.
        while self._pending.startswith(b"\r\n"):
            del self._pending[:2]
        head, end, rest = self._pending.partition(_HEAD_END)
        if not end:
            self._cut += max(0, len(self._pending) - self._kept)
            del self._pending[self._kept :]
            return False
        self._head, self._pending = bytes(head + end), rest
        self._chunked = _CHUNKED.search(self._head) is not None
        length = _LENGTH.search(self._head)
        self._left = int(length[1]) if length and not self._chunked else 0
        return True

    def _take_body(self, data: bytes) -> bytes:
        taken = data[: self._left]
        self._left -= len(taken)
        room = self._kept - len(self._body)
        self._body += taken[:room]
        self._cut += len(taken[room:])
        return data[len(taken) :]

    def _take_chunks(self, data: bytes) -> bytes:
        self._pending += data
        while not self.whole:
            self._pending = bytearray(self._take_body(bytes(self._pending)))
            line, end, after = self._pending.partition(b"\n")
            if self._left or not end:
                break
            self._pending = after
            self._take_line(bytes(line.strip()))
        return bytes(self._pending) if self.whole else b""

    def _take_line(self, line: bytes) -> None:
        """Take what stands between chunks: an end of line, a size, a trailer."""
        if self._is_trailer:
            self.whole = not line
        elif line:
            try:
                self._left = int(line.partition(b";")[0], 16)
            except ValueError:  # no chunk: where it ends can't be told any more
                self._left = _ENDLESS
            self._is_trailer = not self._left


class Conversation:
    """Listens to one connection, and has ``tell`` called with each exchange."""

    def __init__(self, tell: Callable[[Exchange], None]) -> None:
        self._tell = tell
        self._requests: deque[_Reader] = deque()
        self._answer = _Reader(KEPT_ANSWER)
        self._answered: tuple[Message, float] | None = None
        self._is_lost = False

    def received(self, data: bytes, now: float) -> None:
        """Hear what the client sent at ``now``, in seconds."""
        while data and not self._is_lost:
            if not self._requests or self._requests[-1].whole:
                self._requests.append(_Reader(KEPT_REQUEST, now))
            reader = self._requests[-1]
            data = reader.feed(data)
            if reader.is_empty():
                self._requests.pop()
            # It was answered before all of it had come.
            if reader.whole and self._answered and reader is self._requests[0]:
                self._finish(*self._answered)

    def sent(self, data: bytes, now: float) -> None:
        """Hear what the server sent at ``now``."""
        while data:
            data = self._answer.feed(data)
            if not self._answer.whole:
                break
            answer, self._answer = self._answer, _Reader(KEPT_ANSWER)
            if answer.is_interim():
                continue
            reader = self._requests[0] if self._requests else _Reader(0)
            if reader.whole or not reader.has_head():
                # An answer to what is no HTTP is the last one.
                self._is_lost = not reader.whole
                self._finish(answer.message(), now)
            else:
                self._answered = answer.message(), now

    def closed(self, by: str, now: float) -> None:
        """Hear that the connection has ended, by the ``client`` or the ``server``."""
        if self._answered:
            self._finish(*self._answered)
        partial = None if self._answer.is_empty() else self._answer.message()
        while self._requests:
            self._finish(partial, now, by)
            partial = None

    def _finish(self, answer: Message | None, now: float, closed_by: str = "") -> None:
        self._answered = None
        reader = self._requests.popleft() if self._requests else _Reader(0, now)
        self._tell(
            Exchange(
                began=reader.began,
                seconds=now - reader.began,
                request=reader.message(),
                answer=answer,
                closed_by=closed_by,
            )
        )
