"""The calls of plugin sockets: a request in, a verb called, an answer out."""

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import attrs
from aiohttp import web

from volplugin import protocol, route
from volplugin.changes import Caller
from volplugin.doors import ANY_DOOR, Door
from volplugin.errors import Code, VolpluginError
from volplugin.host import processes
from volplugin.httpserver import UNREADABLE, CallLog, HttpServer, caller_of, hang_up
from volplugin.logs import log
from volplugin.manager import NAME, NAME_LIMIT, VolumeManager
from volplugin.model import Client
from volplugin.recorder import Recorder
from volplugin.sockets import Listener

logger = logging.getLogger(__name__)


@attrs.frozen(eq=False)
class Call:
    """One request: its message and whoever sent it."""

    message: Mapping[str, Any]
    request: web.BaseRequest
    caller: Caller
    door: Door

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
    """Answers the plugin protocol on any number of unix sockets.

    ``doors`` say what each serves, by path; without one it serves everything. A
    ``recorder`` hears all calls.
    """

    def __init__(
        self,
        manager: VolumeManager,
        doors: Mapping[str, Door] | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self._manager = manager
        self._doors = doors or {}
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
        self._http = HttpServer(self._answer, recorder)
        self._list_answers: dict[Door, tuple[int, bytes]] = {}

    async def listen(self, listeners: Sequence[Listener]) -> None:
        """Begin to accept on bound sockets; call it after recovery."""
        await self._http.listen(listeners)

    async def drain(self, limit: float) -> bool:
        """Do as `HttpServer.drain`."""
        return await self._http.drain(limit)

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
        except UNREADABLE:
            return hang_up(request)
        body = body.strip()
        if verb.needs_body and not body:
            # dockerd retries a call whose answer it missed without the body. There is
            # no right answer: an error to Get would read as "no such volume".
            log(logger, logging.WARNING, "no body, no answer", op=operation)
            return hang_up(request)
        return await self._call(verb.handler, operation, request, body)

    async def _call(
        self,
        handler: Callable[[Call], Awaitable[bytes]],
        operation: str,
        request: web.BaseRequest,
        body: bytes,
    ) -> web.Response:
        """Run one call, log its outcome, and turn an error into its answer."""
        told = CallLog(logger, operation)
        try:
            # Proxies add lines of their own.
            route.enter(", ".join(request.headers.getall(route.HEADER, ())))
            message = protocol.decode(body) if body else {}
            door = self._door_of(request) if self._doors else ANY_DOOR
            call = Call(message, request, caller_of(request), door)
            told.volume = call.name
            response = _response(200, await handler(call))
        except protocol.NotJSON as error:
            told.outcome, told.level = "not JSON", logging.WARNING
            response = _failed(400, str(error))
        except VolpluginError as error:
            told.failed(error)
            # Engines ask Get for names that may not exist: that is no trouble.
            if error.code is Code.NOT_FOUND and operation == "Get":
                told.level = logging.INFO
            response = _failed(500, _sentence(operation, told.volume, str(error)))
        except Exception as error:
            told.failed(error)
            logger.exception("unexpected error in %s", operation)
            reason = f"internal error {error!r}; see the log"
            response = _failed(500, _sentence(operation, told.volume, reason))
        told.write()
        return response

    def _door_of(self, request: web.BaseRequest) -> Door:
        if request.transport is None:
            return ANY_DOOR
        return self._doors.get(request.transport.get_extra_info("sockname"), ANY_DOOR)

    # Verbs

    async def _activate(self, call: Call) -> bytes:
        self._manager.activate(call.client)
        return protocol.ACTIVATED

    async def _capabilities(self, call: Call) -> bytes:
        return protocol.capabilities("global" if call.door.shared_only else "local")

    async def _create(self, call: Call) -> bytes:
        asked = protocol.options(call.message)
        await self._manager.create(
            call.name, asked, call.client, call.caller, call.door
        )
        return protocol.EMPTY

    async def _remove(self, call: Call) -> bytes:
        await self._manager.remove(call.name, call.client, call.caller, call.door)
        return protocol.EMPTY

    async def _mount(self, call: Call) -> bytes:
        client = call.client
        path = await self._manager.mount(
            call.name, call.id, client, call.caller, call.door
        )
        if not call.caller.is_waiting():
            # It left in the last moment. Nothing was written yet, so it can't know.
            await self._manager.unmount(call.name, call.id, client, Caller())
        return protocol.mountpoint(path)

    async def _unmount(self, call: Call) -> bytes:
        await self._manager.unmount(call.name, call.id, call.client, call.caller)
        return protocol.EMPTY

    async def _path(self, call: Call) -> bytes:
        return protocol.mountpoint(self._manager.path(call.name, call.door))

    async def _get(self, call: Call) -> bytes:
        return protocol.volume(*self._manager.get(call.name, call.door))

    async def _list(self, call: Call) -> bytes:
        generation, answer = self._list_answers.get(call.door, (-1, b""))
        if generation != self._manager.generation:
            generation = self._manager.generation
            answer = protocol.volumes(self._manager.volumes(call.door))
            self._list_answers[call.door] = generation, answer
        return answer


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
