"""The server's side of the admin socket: a message in, a verb called, an answer out."""

import logging
import os
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

import attrs
from aiohttp import web

from volplugin import protocol
from volplugin.admin import messages
from volplugin.admin.messages import (
    AdoptableAnswer,
    AdoptableEntry,
    AdoptableRequest,
    AdoptAnswer,
    AdoptRequest,
    Failure,
    MigrateAnswer,
    MigrateRequest,
    ReleaseAnswer,
    ResizeAnswer,
    ResizeRequest,
    SnapshotAnswer,
    SnapshotEntry,
    SnapshotRequest,
    SnapshotsAnswer,
    TakeOverAnswer,
    VolumeRequest,
)
from volplugin.changes import Caller
from volplugin.config import SocketConfig
from volplugin.errors import (
    Internal,
    InvalidArgument,
    Unsupported,
    VolpluginError,
)
from volplugin.host import paths
from volplugin.httpserver import UNREADABLE, CallLog, HttpServer, caller_of, hang_up
from volplugin.logs import log
from volplugin.migrating import Migration, Migrations
from volplugin.operations import Operations
from volplugin.sockets import Listener, bind

logger = logging.getLogger(__name__)

MODE: Final = 0o600  # whoever may connect can change any volume: root alone


_Request = (
    AdoptableRequest
    | AdoptRequest
    | MigrateRequest
    | ResizeRequest
    | SnapshotRequest
    | VolumeRequest
)


@attrs.frozen
class _Verb:
    operation: str
    request: type[_Request]
    handler: Callable[[Any, Caller], Awaitable[attrs.AttrsInstance]]


def listener(path: str) -> Listener:
    """Bind the admin socket, for root alone, as `sockets.bind` does.

    Directories that are missing are made, for root alone too. One that is there keeps
    its mode: the socket's own is enough.
    """
    # Resolved first, for /var/run is a link and no link is followed there.
    paths.make_directories(os.path.realpath(os.path.dirname(path)), 0o700)
    return bind(SocketConfig(path=path, mode=MODE, owner=0, group=0))


class AdminServer:
    """Answers operators' calls on the admin socket."""

    def __init__(self, operations: Operations, migrations: Migrations) -> None:
        self._operations = operations
        self._migrations = migrations
        self._verbs: Mapping[str, _Verb] = {
            messages.RESIZE: _Verb("Resize", ResizeRequest, self._resize),
            messages.RELEASE: _Verb("Release", VolumeRequest, self._release),
            messages.TAKE_OVER: _Verb("TakeOver", VolumeRequest, self._take_over),
            messages.SNAPSHOTS: _Verb("Snapshots", VolumeRequest, self._snapshots),
            messages.TAKE_SNAPSHOT: _Verb(
                "TakeSnapshot", SnapshotRequest, self._take_snapshot
            ),
            messages.DROP_SNAPSHOT: _Verb(
                "DropSnapshot", SnapshotRequest, self._drop_snapshot
            ),
            messages.ADOPTABLE: _Verb("Adoptable", AdoptableRequest, self._adoptable),
            messages.ADOPT: _Verb("Adopt", AdoptRequest, self._adopt),
            messages.DISOWN: _Verb("Disown", VolumeRequest, self._disown),
            messages.MIGRATE: _Verb("Migrate", MigrateRequest, self._migrate),
        }
        self._http = HttpServer(self._answer)

    async def listen(self, listening: Listener) -> None:
        """Begin to accept on the bound socket; call it after recovery."""
        await self._http.listen([listening])

    async def drain(self, limit: float) -> bool:
        """Do as `HttpServer.drain`."""
        return await self._http.drain(limit)

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        path = request.raw_path
        verb = self._verbs.get(path)
        if verb is None:
            return _refused(404, Unsupported(f"there is no call {path!r:.100}"))
        if request.method != "POST":
            reason = f"{path} takes POST, not {request.method:.20}"
            return _refused(405, InvalidArgument(reason))
        try:
            body = await request.read()
        except web.HTTPRequestEntityTooLarge:
            reason = f"the body has more than {protocol.BODY_LIMIT} bytes"
            return _refused(413, InvalidArgument(reason))
        except UNREADABLE:
            return hang_up(request)
        try:
            message = messages.decode(body, verb.request)
        except InvalidArgument as error:
            return _refused(400, error)
        return await self._call(verb, message, caller_of(request))

    async def _call(
        self,
        verb: _Verb,
        message: _Request,
        caller: Caller,
    ) -> web.Response:
        """Run one call, log its outcome, and turn an error into its answer."""
        told = CallLog(logger, verb.operation)
        told.volume = message.name
        try:
            response = _response(200, await verb.handler(message, caller))
        except VolpluginError as error:
            told.failed(error)
            response = _failed(500, error)
        except Exception as error:
            told.failed(error)
            logger.exception("unexpected error in %s", verb.operation)
            response = _failed(500, Internal(f"internal error {error!r}; see the log"))
        if not caller.is_waiting():
            told.outcome += " (its caller left meanwhile)"
        told.write()
        return response

    # Verbs

    async def _resize(self, request: ResizeRequest, caller: Caller) -> ResizeAnswer:
        before, after = await self._operations.resize(
            request.name, request.changes(), caller
        )
        return ResizeAnswer(
            name=after.name, before=dict(before.options), after=dict(after.options)
        )

    async def _release(self, request: VolumeRequest, caller: Caller) -> ReleaseAnswer:
        holders = await self._operations.release(request.name, caller)
        return ReleaseAnswer(name=request.name, holders=list(holders))

    async def _take_over(
        self, request: VolumeRequest, caller: Caller
    ) -> TakeOverAnswer:
        hosts = await self._operations.take_over(request.name, caller)
        return TakeOverAnswer(name=request.name, hosts=list(hosts))

    async def _snapshots(
        self, request: VolumeRequest, caller: Caller
    ) -> SnapshotsAnswer:
        found = await self._operations.snapshots(request.name, caller)
        entries = [
            SnapshotEntry(
                name=snapshot.name,
                created_at=snapshot.created_at,
                size="" if snapshot.size is None else str(snapshot.size),
            )
            for snapshot in found
        ]
        return SnapshotsAnswer(name=request.name, snapshots=entries)

    async def _take_snapshot(
        self, request: SnapshotRequest, caller: Caller
    ) -> SnapshotAnswer:
        name, snapshot = request.name, request.snapshot
        await self._operations.take_snapshot(name, snapshot, caller)
        return SnapshotAnswer(name=name, snapshot=snapshot)

    async def _drop_snapshot(
        self, request: SnapshotRequest, caller: Caller
    ) -> SnapshotAnswer:
        name, snapshot = request.name, request.snapshot
        await self._operations.drop_snapshot(name, snapshot, caller)
        return SnapshotAnswer(name=name, snapshot=snapshot)

    async def _adoptable(
        self, request: AdoptableRequest, _caller: Caller
    ) -> AdoptableAnswer:
        found = await self._operations.adoptable(request.name, request.options)
        entries = [AdoptableEntry(name=n, volume=v or "") for n, v in found.items()]
        return AdoptableAnswer(volumes=entries)

    async def _adopt(self, request: AdoptRequest, caller: Caller) -> AdoptAnswer:
        await self._operations.adopt(
            request.name, request.driver, request.options, request.there, caller
        )
        return AdoptAnswer(name=request.name)

    async def _migrate(self, request: MigrateRequest, caller: Caller) -> MigrateAnswer:
        wanted = Migration(
            name=request.name,
            backend=request.driver,
            options=request.options,
            origin=request.origin,
            remove_origin=request.remove_origin,
        )
        outcome = (
            await self._migrations.plan(wanted)
            if request.dry
            else await self._migrations.migrate(wanted, caller)
        )
        return MigrateAnswer(
            name=request.name,
            way=outcome.way,
            mountpoint=outcome.mountpoint,
            reason=outcome.reason,
            earlier=outcome.earlier,
        )

    async def _disown(self, request: VolumeRequest, caller: Caller) -> AdoptAnswer:
        await self._operations.disown(request.name, caller)
        return AdoptAnswer(name=request.name)


def _response(status: int, message: attrs.AttrsInstance) -> web.Response:
    return web.Response(
        status=status,
        body=messages.encode(message),
        headers={"Content-Type": messages.CONTENT_TYPE},
    )


def _failed(status: int, error: VolpluginError) -> web.Response:
    return _response(status, Failure.of(error))


def _refused(status: int, error: VolpluginError) -> web.Response:
    """Answer what is no call."""
    log(logger, logging.WARNING, "refused", status=status, reason=str(error))
    return _failed(status, error)
