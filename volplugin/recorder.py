"""A recording of all that is said on the plugin sockets, for whoever looks for a fault.

One JSON object a line; ``docs/reporting.rst`` tells its form. It is taken from the
bytes that pass between the sockets and HTTP, so it also has what is no HTTP, and a call
is the same with it and without. A thread writes: a slow disk costs entries, which are
counted, and a full one ends the recording.
"""

import asyncio
import contextlib
import errno
import logging
import os
import stat
import time
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeAlias, TypeVar, cast

import attrs

from volplugin import transcripts
from volplugin.errors import InvalidArgument, VolpluginError, from_os_error
from volplugin.exchanges import Conversation, Exchange, Message
from volplugin.host import processes
from volplugin.linewriter import Descriptor, LineWriter
from volplugin.logs import log
from volplugin.model import Client
from volplugin.transcripts import Connection

logger = logging.getLogger(__name__)

CAPACITY: Final = 32 << 20  # bytes waiting to be written
_KINDS: Final = {
    stat.S_IFDIR: "a directory",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_OVERHEAD: Final = 1024  # bytes that an exchange costs beside its messages

T = TypeVar("T")
_Item: TypeAlias = tuple[Connection, Exchange] | bytes


@contextlib.contextmanager
def recording(path: str | None) -> Iterator["Recorder | None"]:
    """Record in the file ``path``, which is made if it is not there; None without one.

    Raise `InvalidArgument` where something else is there than a file of root's.
    """
    if path is None:
        yield None
        return
    recorder = Recorder(path, _open(path))
    try:
        yield recorder
    finally:
        recorder.close()


class Recorder:
    """Writes down the exchanges of the connections that `listen` makes."""

    def __init__(self, path: str, descriptor: int) -> None:
        self._path = path
        self._connections = 0
        self._has_ended = False
        self._lines: LineWriter[_Item] = LineWriter(
            "recorder",
            lambda expired: _File(self, descriptor, expired),
            self._render,
            transcripts.dropped,
            CAPACITY,
        )
        self._lines.put(transcripts.beginning(), _OVERHEAD)

    def listen(
        self, make: Callable[[], asyncio.BaseProtocol], socket: str
    ) -> asyncio.BaseProtocol:
        """Return the protocol of a new connection on ``socket``, with an ear on it."""
        if self._has_ended:
            return make()
        self._connections += 1
        return _Ear(self, cast(asyncio.Protocol, make()), socket, self._connections)

    def put(self, connection: Connection, exchange: Exchange) -> None:
        """Have an exchange written."""
        if self._has_ended:
            return
        messages = [exchange.request, exchange.answer or Message()]
        weight = sum(len(each.head) + len(each.body) for each in messages)
        self._lines.put((connection, exchange), weight + _OVERHEAD)

    def end(self, error: Exception) -> None:
        """Record no more, and log why, once; the server goes on."""
        if not self._has_ended:
            self._has_ended = True
            reason = error.strerror if isinstance(error, OSError) else repr(error)
            log(
                logger,
                logging.ERROR,
                "recording ended",
                file=self._path,
                error=reason,
            )

    def close(self) -> None:
        """Write what is queued, as `LineWriter.close` does."""
        self._lines.close()

    def _render(self, item: _Item) -> bytes:
        try:
            return item if isinstance(item, bytes) else transcripts.entry(*item)
        except Exception as error:  # noqa: BLE001 - a bug must not pass unnoticed
            self.end(error)
            return b""


class _File:
    """The recording, as where lines go; what fails to be written ends it."""

    def __init__(
        self, recorder: Recorder, descriptor: int, expired: Callable[[], bool]
    ) -> None:
        self._recorder = recorder
        self._descriptor = Descriptor(
            descriptor, expired, torn=_ends_within_a_line(descriptor)
        )
        self._failed = False

    def write(self, data: bytes) -> bool:
        if self._failed or self._descriptor.write(data):
            return not self._failed
        if self._descriptor.error is not None:
            self._failed = True
            self._recorder.end(self._descriptor.error)
        return False

    def close(self) -> None:
        self._descriptor.close()


class _Ear(asyncio.Protocol):
    """Stands between a transport and its protocol, and hears what passes."""

    def __init__(
        self, recorder: Recorder, protocol: asyncio.Protocol, socket: str, number: int
    ) -> None:
        self._recorder = recorder
        self._protocol = protocol
        self._connection = Connection(socket=socket, number=number, client=Client())
        self._conversation = Conversation(self._tell)
        self._closed_by = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        with contextlib.suppress(VolpluginError):
            client = processes.client_of(transport.get_extra_info("socket"))
            self._connection = attrs.evolve(self._connection, client=client)
        mouth = _Mouth(cast(asyncio.Transport, transport), self)
        self._protocol.connection_made(cast(asyncio.BaseTransport, mouth))

    def data_received(self, data: bytes) -> None:
        self.hear(self._conversation.received, data)
        self._protocol.data_received(data)

    def eof_received(self) -> bool | None:
        self.closing("client")
        return self._protocol.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self.closing("client")
        self._protocol.connection_lost(exc)
        self.hear(self._conversation.closed, self._closed_by)

    def pause_writing(self) -> None:
        self._protocol.pause_writing()

    def resume_writing(self) -> None:
        self._protocol.resume_writing()

    def sent(self, data: bytes) -> None:
        """Hear what the server sends."""
        self.hear(self._conversation.sent, data)

    def closing(self, by: str) -> None:
        """Hear who is the first to end the connection."""
        self._closed_by = self._closed_by or by

    def hear(self, listen: Callable[[T, float], None], what: T) -> None:
        """Have the conversation hear of something; never fail the call for it."""
        try:
            listen(what, time.monotonic())
        except Exception as error:  # noqa: BLE001 - a bug here must not be one there
            self._recorder.end(error)

    def _tell(self, exchange: Exchange) -> None:
        self._recorder.put(self._connection, exchange)


class _Mouth:
    """A transport that has its `_Ear` hear what is written to it."""

    def __init__(self, transport: asyncio.Transport, ear: _Ear) -> None:
        self._transport = transport
        self._ear = ear

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._ear.sent(bytes(data))
        self._transport.write(data)

    def writelines(self, list_of_data: Any) -> None:
        parts = list(list_of_data)
        self._ear.sent(b"".join(parts))
        self._transport.writelines(parts)

    def close(self) -> None:
        self._ear.closing("server")
        self._transport.close()

    def abort(self) -> None:
        self._ear.closing("server")
        self._transport.abort()


def _open(path: str) -> int:
    """Return a descriptor that appends to the file ``path``, made if it is missing."""
    doing = f"record {path}"
    # Looked at first, for opening a device can do things; then in its own right.
    with contextlib.suppress(OSError):
        _check(path, os.lstat(path))
    # To be read as well, for how it ends. Nonblocking: a FIFO may have come meanwhile.
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        descriptor = os.open(path, flags | os.O_NOCTTY | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno == errno.ENOENT:
            folder = os.path.dirname(path)
            raise InvalidArgument(
                f"{doing}: there is no directory {folder}: make it, or name another"
            ) from error
        raise from_os_error(error, doing) from error
    try:
        _check(path, os.fstat(descriptor))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _check(path: str, status: os.stat_result) -> None:
    kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
    if not stat.S_ISREG(status.st_mode):
        raise InvalidArgument(
            f"record {path}: {kind} is there: name a file, or one that is not there yet"
        )
    if status.st_uid != 0:
        raise InvalidArgument(
            f"record {path}: the file there belongs to uid {status.st_uid}, and it is "
            f"only appended to root's: move it away, or name another"
        )


def _ends_within_a_line(descriptor: int) -> bool:
    size = os.fstat(descriptor).st_size
    return size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
