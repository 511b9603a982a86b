"""The HTTP server on plugin sockets: a request in, a verb called, an answer out."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

import attrs
from aiohttp import http_exceptions, web

from volplugin import protocol
from volplugin.changes import Caller
from volplugin.errors import Code, VolpluginError
from volplugin.host import processes
from volplugin.logs import log
from volplugin.manager import NAME, NAME_LIMIT, VolumeManager
from volplugin.model import Client
from volplugin.sockets import Listener

logger = logging.getLogger(__name__)
http_logger = logging.getLogger("volplugin.http")  # aiohttp's own voice

KEEP_ALIVE: Final = 7 * 24 * 3600.0
"""Seconds. An engine keeps idle connections and must be the one to close them: were it
us, its next call could cross the close and fail with EOF, and dockerd's retry after
that has an empty body."""

_TAKEN_IN: Final = 1.0  # seconds to accept who had connected at the end
_WRITTEN: Final = 0.2  # seconds to write the last answers; idle connections wait too


@attrs.frozen(eq=False)
class Call:
    """One request: its message and whoever sent it."""

    message: Mapping[str, Any]
    request: web.BaseRequest
    caller: Caller

    @property
    def name(self) -> str:
        """The volume's name as the client wrote it."""
        return protocol.text(self.message, "Name")

    @property
    def id(self) -> str:
        """The mount ID."""
        return protocol.text(self.message, "ID")

    @property
    def client(self) -> Client:
        """The process at the other end."""
        transport = self.request.transport
        if transport is None:
            return Client()
        return processes.client_of(transport.get_extra_info("socket"))


@attrs.frozen
class _Verb:
    handler: Callable[[Call], Awaitable[bytes]]
    needs_body: bool = True


class Server:
    """Answers the plugin protocol on any number of unix sockets."""

    def __init__(self, manager: VolumeManager) -> None:
        self._manager = manager
        self._verbs: Mapping[str, _Verb] = {
            "/Plugin.Activate": _Verb(self._activate, needs_body=False),
            "/VolumeDriver.Create": _Verb(self._create),
            "/VolumeDriver.Remove": _Verb(self._remove),
            "/VolumeDriver.Mount": _Verb(self._mount),
            "/VolumeDriver.Unmount": _Verb(self._unmount),
            "/VolumeDriver.Path": _Verb(self._path),
            "/VolumeDriver.Get": _Verb(self._get),
            # podman's List has no body; neither call can do harm without one.
            "/VolumeDriver.List": _Verb(self._list, needs_body=False),
            "/VolumeDriver.Capabilities": _Verb(self._capabilities, needs_body=False),
        }
        http_logger.addFilter(_without_clients_faults)
        self._http = web.Server(
            self._handle,
            logger=http_logger,
            access_log=None,
            keepalive_timeout=KEEP_ALIVE,
            tcp_keepalive=False,
            auto_decompress=False,
        )
        self._listeners: Sequence[Listener] = ()
        self._accepting: list[asyncio.AbstractServer] = []
        self._live = 0
        self._idle = asyncio.Event()
        self._draining = False
        self._list_answer: tuple[int, bytes] = (-1, b"")

    async def listen(self, listeners: Sequence[Listener]) -> None:
        """Begin to accept on bound sockets; call it after recovery."""
        loop = asyncio.get_running_loop()
        self._listeners = listeners
        for listener in listeners:
            self._accepting.append(
                await loop.create_server(self._http, sock=listener.socket, backlog=1024)
            )

    async def drain(self, limit: float) -> bool:
        """Stop accepting, answer the live calls within ``limit`` s, close the rest.

        The sockets are unlinked first: an engine that finds none waits for the next
        server, for up to 15 s. Who is connected by then may have written a call, which
        its retry would come without: all of them are still accepted. Return whether
        all calls were answered.
        """
        self._draining = True
        for listener in self._listeners:
            listener.unlink()
        await self._take_in()
        for server in self._accepting:
            server.close()
        if not self._live:
            self._idle.set()
        try:
            await asyncio.wait_for(self._idle.wait(), limit)
        except TimeoutError:
            return False
        finally:
            await self._http.shutdown(_WRITTEN)
        return True

    async def _take_in(self) -> None:
        """Accept all who have connected, and begin to read what they wrote."""
        end = time.monotonic() + _TAKEN_IN
        while any(listener.has_waiting() for listener in self._listeners):
            await asyncio.sleep(0)  # libuv accepts one of them in each turn
            if time.monotonic() > end:  # out of descriptors
                break
        for _ in range(10):  # turns, and 50 ms for who is about to write
            await asyncio.sleep(0.005)

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        self._live += 1
        try:
            return await self._answer(request)
        finally:
            self._live -= 1
            if self._draining and not self._live:
                self._idle.set()

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        path = request.raw_path  # not `path`, which parses a URL; no call has a query
        verb = self._verbs.get(path)
        if verb is None:
            return _refused(404, f"there is no call {path!r:.100}")
        operation = path.rpartition(".")[2]
        if request.method != "POST":
            return _refused(405, f"{operation} takes POST, not {request.method:.20}")
        try:
            body = await request.read()
        except web.HTTPRequestEntityTooLarge:
            return _refused(413, f"the body has more than {protocol.BODY_LIMIT} bytes")
        except (OSError, web.RequestPayloadError, http_exceptions.HttpProcessingError):
            return _hang_up(request)  # it left, or sent no body that HTTP knows
        body = body.strip()
        if verb.needs_body and not body:
            # dockerd retries a call whose answer it missed without the body. There is
            # no right answer: an error to Get would read as "no such volume".
            log(logger, logging.WARNING, "no body, no answer", op=operation)
            return _hang_up(request)
        response = await self._call(verb.handler, operation, request, body)
        if self._draining:
            response.force_close()
        return response

    async def _call(
        self,
        handler: Callable[[Call], Awaitable[bytes]],
        operation: str,
        request: web.BaseRequest,
        body: bytes,
    ) -> web.Response:
        """Run one call, log its outcome, and turn an error into its answer."""
        started = time.perf_counter()
        name, outcome, level = "", "ok", logging.INFO
        try:
            message = protocol.decode(body) if body else {}
            call = Call(message, request, Caller(lambda: _is_open(request)))
            name = call.name
            response = _response(200, await handler(call))
        except protocol.NotJSON as error:
            outcome, level = "not JSON", logging.WARNING
            response = _failed(400, str(error))
        except VolpluginError as error:
            reason = "; ".join(str(error).splitlines())
            outcome = f"{error.code.name.lower()}: {reason:.500}"
            # Engines ask Get for names that may not exist: that is no trouble.
            quiet = error.code is Code.NOT_FOUND and operation == "Get"
            level = logging.INFO if quiet else logging.WARNING
            response = _failed(500, _sentence(operation, name, str(error)))
        except Exception as error:
            outcome, level = f"bug: {error!r}", logging.ERROR
            logger.exception("unexpected error in %s", operation)
            response = _failed(
                500,
                _sentence(operation, name, f"internal error {error!r}; see the log"),
            )
        elapsed = round((time.perf_counter() - started) * 1e3, 2)
        log(
            logger,
            level,
            "call",
            op=operation,
            volume=name,
            ms=elapsed,
            outcome=outcome,
        )
        return response

    # Verbs

    async def _activate(self, call: Call) -> bytes:
        self._manager.activate(call.client)
        return protocol.ACTIVATED

    async def _capabilities(self, _call: Call) -> bytes:
        return protocol.CAPABILITIES

    async def _create(self, call: Call) -> bytes:
        asked = protocol.options(call.message)
        await self._manager.create(call.name, asked, call.client, call.caller)
        return protocol.EMPTY

    async def _remove(self, call: Call) -> bytes:
        await self._manager.remove(call.name, call.client, call.caller)
        return protocol.EMPTY

    async def _mount(self, call: Call) -> bytes:
        client = call.client
        path = await self._manager.mount(call.name, call.id, client, call.caller)
        if not call.caller.is_waiting():
            # It left in the last moment. Nothing was written yet, so it can't know.
            await self._manager.unmount(call.name, call.id, client, Caller())
        return protocol.mountpoint(path)

    async def _unmount(self, call: Call) -> bytes:
        await self._manager.unmount(call.name, call.id, call.client, call.caller)
        return protocol.EMPTY

    async def _path(self, call: Call) -> bytes:
        return protocol.mountpoint(self._manager.path(call.name))

    async def _get(self, call: Call) -> bytes:
        return protocol.volume(*self._manager.get(call.name))

    async def _list(self, _call: Call) -> bytes:
        generation, answer = self._list_answer
        if generation != self._manager.generation:
            generation = self._manager.generation
            answer = protocol.volumes(self._manager.volumes())
            self._list_answer = generation, answer
        return answer


def _is_open(request: web.BaseRequest) -> bool:
    transport = request.transport
    return transport is not None and not transport.is_closing()


def _sentence(operation: str, name: str, message: str) -> str:
    subject = f" {name}" if NAME.fullmatch(name[:NAME_LIMIT]) else ""
    return f"{operation.lower()}{subject[: NAME_LIMIT + 1]}: {message}"


def _response(status: int, body: bytes) -> web.Response:
    return web.Response(
        status=status, body=body, headers={"Content-Type": protocol.CONTENT_TYPE}
    )


def _failed(status: int, message: str) -> web.Response:
    return _response(status, protocol.failure(message))


def _refused(status: int, message: str) -> web.Response:
    """Answer what is no call of the protocol."""
    log(logger, logging.WARNING, "refused", status=status, reason=message)
    return _failed(status, message)


def _hang_up(request: web.BaseRequest) -> web.Response:
    """Close the connection; the response returned finds it closed and is dropped."""
    if request.transport is not None:
        request.transport.abort()
    return web.Response()


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
