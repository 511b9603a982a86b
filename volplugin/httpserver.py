"""HTTP on unix sockets: accept, count the live calls, drain; how a call is logged."""

import asyncio
import contextlib
import functools
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, cast

from aiohttp import http_exceptions, web

from volplugin.changes import Caller
from volplugin.errors import VolpluginError
from volplugin.logs import log
from volplugin.recorder import Recorder
from volplugin.sockets import Listener

http_logger = logging.getLogger("volplugin.http")  # aiohttp's own voice

UNREADABLE: Final = (
    OSError,
    web.RequestPayloadError,
    http_exceptions.HttpProcessingError,
)
"""What reading a body raises when the client left, or sent none that HTTP knows."""

KEEP_ALIVE: Final = 7 * 24 * 3600.0
"""Seconds. An engine keeps idle connections and must be the one to close them: were it
us, its next call could cross the close and fail with EOF, and dockerd's retry after
that has an empty body."""

_TAKEN_IN: Final = 1.0  # seconds to accept who had connected at the end
_READ: Final = 1 << 16  # bytes at once
_WRITTEN: Final = 0.2  # seconds to write the last answers; idle connections wait too


class HttpServer:
    """Has ``answer`` called for each request on any number of unix sockets.

    A ``recorder`` hears all that is said on them.
    """

    def __init__(
        self,
        answer: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]],
        recorder: Recorder | None = None,
    ) -> None:
        self._answer = answer
        self._recorder = recorder
        http_logger.addFilter(_without_clients_faults)
        self._http = web.Server(
            self._handle,
            logger=http_logger,
            access_log=None,
            keepalive_timeout=KEEP_ALIVE,
            tcp_keepalive=False,
            auto_decompress=False,
        )
        self._accepting: list[tuple[Listener, asyncio.AbstractServer]] = []
        self._live = 0
        self._idle = asyncio.Event()
        self._draining = False

    async def listen(self, listeners: Sequence[Listener]) -> None:
        """Begin to accept on bound sockets; call it after recovery."""
        loop = asyncio.get_running_loop()
        for listener in listeners:
            make: Callable[[], asyncio.BaseProtocol] = self._http
            if self._recorder is not None:
                make = functools.partial(self._recorder.listen, make, listener.path)
            server = await loop.create_server(make, sock=listener.socket, backlog=1024)
            self._accepting.append((listener, server))

    async def drain(self, limit: float) -> bool:
        """Stop accepting, answer the live calls within ``limit`` s, close the rest.

        Our own sockets are unlinked first: an engine that finds none waits for the
        next server, for up to 15 s. Who is connected by then may have written a call,
        which its retry would come without: all of them are still accepted. On a held
        socket nobody is accepted any more: they wait there, with what they wrote, for
        the next server. Return whether all calls were answered.
        """
        self._draining = True
        for listener, server in self._accepting:
            listener.unlink()
            if listener.is_held:
                server.close()
        await self._take_in()
        for _, server in self._accepting:
            server.close()
        try:
            async with asyncio.timeout(limit):
                while await self._has_calls():
                    await self._answered()
        except TimeoutError:
            return False
        finally:
            await self._http.shutdown(_WRITTEN)
        return True

    async def _take_in(self) -> None:
        """Accept all who have connected, and begin to read what they wrote."""
        end = time.monotonic() + _TAKEN_IN
        ours = [listener for listener, _ in self._accepting if not listener.is_held]
        while any(listener.has_waiting() for listener in ours):
            await asyncio.sleep(0)  # libuv accepts one of them in each turn
            if time.monotonic() > end:  # out of descriptors
                break
        for _ in range(10):  # turns, and 50 ms for who is about to write
            await asyncio.sleep(0.005)

    async def _has_calls(self) -> bool:
        """Tell whether a call is live; when none is, none can come any more."""
        await _turns()
        if self._live:
            return True
        found = self._cut_off()
        await _turns()
        return found or self._live > 0

    async def _answered(self) -> None:
        """Wait until no call is live."""
        self._idle.clear()
        if self._live:
            await self._idle.wait()

    def _cut_off(self) -> bool:
        """Read the last from all connections; return whether there was a call.

        A call that an engine writes while we close its idle connection would be lost:
        its retry has no body. So first of all nobody can write any more: then a call
        is either here, or was never written and comes to the next server whole. (Of
        one that was half written the rest is missing for good: it takes the limit.)
        """
        found = False
        for connection in self._http.connections:
            transport = connection.transport
            if transport is None or transport.is_closing():
                continue
            # The event loop would close the connection at its end, unanswered.
            transport.pause_reading()
            rest = _last_words(transport.get_extra_info("socket").fileno())
            if rest:
                found = True
                cast(asyncio.Protocol, transport.get_protocol()).data_received(rest)
        return found

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        self._live += 1
        try:
            response = await self._answer(request)
            if self._draining:
                response.force_close()
            return response
        finally:
            self._live -= 1
            if self._draining and not self._live:
                self._idle.set()


class CallLog:
    """What the log tells of one call: made when it begins, written when it ends."""

    def __init__(self, logger: logging.Logger, operation: str) -> None:
        self._logger = logger
        self._operation = operation
        self._started = time.perf_counter()
        self.volume = ""
        self.outcome = "ok"
        self.level = logging.INFO

    def failed(self, error: Exception) -> None:
        """Note that ``error`` is the outcome; one that is not ours is a bug."""
        self.level = logging.WARNING
        if isinstance(error, VolpluginError):
            reason = "; ".join(str(error).splitlines())
            self.outcome = f"{error.code.name.lower()}: {reason:.500}"
        else:
            self.outcome, self.level = f"bug: {error!r}", logging.ERROR

    def write(self) -> None:
        """Write the line, with the milliseconds since the call began."""
        log(
            self._logger,
            self.level,
            "call",
            op=self._operation,
            volume=self.volume,
            ms=round((time.perf_counter() - self._started) * 1e3, 2),
            outcome=self.outcome,
        )


def caller_of(request: web.BaseRequest) -> Caller:
    """Return the caller that waits for as long as the request's connection is open."""
    return Caller(lambda: _is_open(request))


def hang_up(request: web.BaseRequest) -> web.Response:
    """Close the connection; the response returned finds it closed and is dropped."""
    if request.transport is not None:
        request.transport.abort()
    return web.Response()


async def _turns() -> None:
    """Let the event loop turn more often than a call needs from accepted to begun."""
    for _ in range(10):
        await asyncio.sleep(0)


def _last_words(descriptor: int) -> bytes:
    """Return what a peer has written; nothing that it writes afterwards arrives."""
    with socket.socket(fileno=os.dup(descriptor)) as peer:
        words = bytearray()
        with contextlib.suppress(OSError):  # it has left
            # unix(7): from now on its write fails (EPIPE), and ours still goes out;
            # what is in the queue is read before the end is told.
            peer.shutdown(socket.SHUT_RD)
            while some := peer.recv(_READ):
                words += some
        return bytes(words)


def _is_open(request: web.BaseRequest) -> bool:
    transport = request.transport
    return transport is not None and not transport.is_closing()


def _without_clients_faults(record: logging.LogRecord) -> bool:
    """Tell in one line of what is no HTTP: a stack trace means a bug of ours."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, AssertionError):
        return False  # aiohttp 3.8's, when a client has left before its call began
    if isinstance(error, http_exceptions.HttpProcessingError):
        record.exc_info, record.args = None, None
        record.levelno, record.levelname = logging.WARNING, "WARNING"
        record.msg = "no HTTP: " + " ".join(error.message.split())
    return True
