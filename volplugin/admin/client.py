"""The client's side of the admin socket, for the command line and for programs."""

import asyncio
import errno
from collections.abc import Mapping
from typing import Final, TypeVar

import aiohttp
import attrs

from volplugin.admin import messages
from volplugin.admin.messages import (
    AdoptableAnswer,
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
    SnapshotRequest,
    SnapshotsAnswer,
    TakeOverAnswer,
    VolumeRequest,
)
from volplugin.errors import Internal, InvalidArgument, Unavailable, VolpluginError

T = TypeVar("T", bound=attrs.AttrsInstance)

CONNECT_LIMIT: Final = 10.0  # seconds; the call itself takes as long as it takes

_ABSENT: Final = {errno.ENOENT, errno.ENOTDIR, errno.ECONNREFUSED}
_DENIED: Final = {errno.EACCES, errno.EPERM}


@attrs.frozen
class AdminClient:
    """Calls the server that listens on ``socket``; each call is its own connection.

    A failed call raises the `VolpluginError` of the server's code; `Unavailable` when
    there is no answer. No call may be made on a running event loop.
    """

    socket: str

    def resize(
        self, name: str, *, size: str | None = None, inodes: str | None = None
    ) -> ResizeAnswer:
        """Give a volume new limits and return its options before and after.

        Both are words as of ``docker volume create -o``; None leaves that limit as it
        is. It may take minutes. A client that ends before that ends nothing: the
        server goes on with the change.
        """
        request = ResizeRequest(name=name, size=size, inodes=inodes)
        request.changes()  # refused here as it would be there
        return asyncio.run(self._call(messages.RESIZE, request, ResizeAnswer))

    def release(self, name: str) -> ReleaseAnswer:
        """Drop all who hold the volume ``name`` on the host; return who they were."""
        request = VolumeRequest(name=name)
        return asyncio.run(self._call(messages.RELEASE, request, ReleaseAnswer))

    def take_over(self, name: str) -> TakeOverAnswer:
        """Fence all other hosts that have the volume ``name``; return which."""
        request = VolumeRequest(name=name)
        return asyncio.run(self._call(messages.TAKE_OVER, request, TakeOverAnswer))

    def snapshots(self, name: str) -> SnapshotsAnswer:
        """Return the snapshots of the volume ``name``, oldest first."""
        request = VolumeRequest(name=name)
        return asyncio.run(self._call(messages.SNAPSHOTS, request, SnapshotsAnswer))

    def take_snapshot(self, name: str, snapshot: str) -> SnapshotAnswer:
        """Keep the volume ``name`` as it is now under ``snapshot``."""
        request = SnapshotRequest(name=name, snapshot=snapshot)
        return asyncio.run(self._call(messages.TAKE_SNAPSHOT, request, SnapshotAnswer))

    def drop_snapshot(self, name: str, snapshot: str) -> SnapshotAnswer:
        """Delete ``snapshot`` of the volume ``name``."""
        request = SnapshotRequest(name=name, snapshot=snapshot)
        return asyncio.run(self._call(messages.DROP_SNAPSHOT, request, SnapshotAnswer))

    def adoptable(self, driver: str, options: Mapping[str, str]) -> AdoptableAnswer:
        """Return what there is of a driver or backend that it could adopt, or has."""
        request = AdoptableRequest(name=driver, options=options)
        return asyncio.run(self._call(messages.ADOPTABLE, request, AdoptableAnswer))

    def adopt(
        self, name: str, driver: str, options: Mapping[str, str], there: str
    ) -> AdoptAnswer:
        """Make what is there as ``there`` the volume ``name``; again is success."""
        request = AdoptRequest(name=name, driver=driver, options=options, there=there)
        return asyncio.run(self._call(messages.ADOPT, request, AdoptAnswer))

    def migrate(self, request: MigrateRequest) -> MigrateAnswer:
        """Make a directory a volume, which may take hours; again is success.

        As for `resize`, a client that ends before that ends nothing.
        """
        return asyncio.run(self._call(messages.MIGRATE, request, MigrateAnswer))

    def disown(self, name: str) -> AdoptAnswer:
        """Have the volume ``name`` be left where it is when it is removed here."""
        request = VolumeRequest(name=name)
        return asyncio.run(self._call(messages.DISOWN, request, AdoptAnswer))

    async def _call(self, path: str, request: attrs.AttrsInstance, kind: type[T]) -> T:
        try:
            status, body = await self._post(path, messages.encode(request))
        except aiohttp.ClientConnectorError as error:
            raise self._not_connected(error) from error
        except TimeoutError as error:
            raise Unavailable(
                f"{self.socket}: no connection within {CONNECT_LIMIT:g} s: the server "
                f"hangs or is overrun"
            ) from error
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as error:
            raise Unavailable(
                "the server ended before it answered; its log and its next start's "
                "tell what became of the call"
            ) from error
        except aiohttp.ClientError as error:
            raise self._not_understood(error) from error
        try:
            if status == 200:
                return messages.decode(body, kind)
            failure = messages.decode(body, Failure)
        except InvalidArgument as error:
            raise self._not_understood(error) from error
        raise failure.error()

    async def _post(self, path: str, body: bytes) -> tuple[int, bytes]:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_LIMIT)
        async with (
            aiohttp.ClientSession(
                connector=aiohttp.UnixConnector(path=self.socket), timeout=timeout
            ) as session,
            session.post(
                f"http://volplugin{path}",
                data=body,
                headers={"Content-Type": messages.CONTENT_TYPE},
            ) as response,
        ):
            return response.status, await response.read()

    def _not_connected(self, error: aiohttp.ClientConnectorError) -> VolpluginError:
        number = error.os_error.errno
        if number in _ABSENT:
            return Unavailable(
                f"no server listens on {self.socket}: is volplugin serve running? "
                f"(--admin-socket)"
            )
        if number in _DENIED:
            return Unavailable(f"no right to open {self.socket}: run it as root")
        return Unavailable(f"connect to {self.socket}: {error.os_error.strerror}")

    def _not_understood(self, error: Exception) -> VolpluginError:
        return Internal(
            f"what listens on {self.socket} does not answer as a server of this "
            f"version does: {error}"
        )
