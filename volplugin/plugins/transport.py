"""One HTTP exchange with a plugin, over within its time whatever the plugin does."""

import contextlib
import http.client
import os
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from typing import Any, Final, cast

import attrs

from volplugin.errors import InvalidArgument
from volplugin.host import processes
from volplugin.plugins.discovery import TLS, Address

LARGEST_ANSWER: Final = 32 << 20  # bytes; a List of a hundred thousand volumes has 15M

_CHUNK: Final = 64 << 10


class NotSent(Exception):
    """The plugin was not reached: the call had no effect and may be made again."""


class NoAnswer(Exception):
    """The call was sent, and what became of it is not known.

    ``late`` says that the plugin kept its connection open until the time was over.
    """

    def __init__(self, reason: str, *, late: bool = False) -> None:
        super().__init__(reason)
        self.late = late


@attrs.frozen
class Answer:
    """An HTTP answer as it came."""

    status: int
    body: bytes


def exchange(
    address: Address,
    path: str,
    body: bytes,
    *,
    limit: float,
    headers: Mapping[str, str],
) -> Answer:
    """POST ``body`` to the plugin and return its answer, whatever its status.

    Raise `NotSent` or `NoAnswer`, after ``limit`` seconds at the latest, and
    `InvalidArgument` for a plugin that is this very process, or whose TLS files can't
    be used.
    """
    deadline = time.monotonic() + limit
    try:
        connected = _connected(address, deadline)
    except (OSError, ValueError) as error:
        raise NotSent(f"{address}: {_reason(error)}") from error
    try:
        return _converse(connected, _request(address, path, body, headers))
    except TimeoutError as error:
        reason = f"{address}: no answer within {round(limit, 1):g} s"
        raise NoAnswer(reason, late=True) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise NoAnswer(f"{address}: {_reason(error)}") from error
    finally:
        connected.close()


def listener_of(address: Address, *, limit: float) -> int | None:
    """Return the process that listens on a socket; None for one on another machine."""
    if not address.path:
        return None
    try:
        connected = _connected(address, time.monotonic() + limit)
    except OSError:
        return None
    try:
        return processes.peer_of(connected) or None
    finally:
        connected.close()


def _request(
    address: Address, path: str, body: bytes, headers: Mapping[str, str]
) -> bytes:
    lines = [
        f"POST {path} HTTP/1.1",
        # As dockerd's, which is empty on a socket.
        "Host: " + ("" if address.path else str(address)),
        *(f"{key}: {value}" for key, value in headers.items()),
        f"Content-Length: {len(body)}",
        "Connection: close",
    ]
    # Headers may pass on bytes that aiohttp could not decode.
    return "\r\n".join([*lines, "", ""]).encode("utf-8", "surrogateescape") + body


def _converse(connected: socket.socket, request: bytes) -> Answer:
    # In one piece: a plugin may answer before it has read the body, and close. What it
    # has answered by then can still be read.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        connected.sendall(request)
    response = http.client.HTTPResponse(connected, method="POST")
    try:
        response.begin()
        received = bytearray()
        while chunk := response.read(_CHUNK):
            received += chunk
        if response.length:  # read in parts, http.client takes the end for the end
            raise http.client.IncompleteRead(bytes(received), response.length)
    finally:
        response.close()
    return Answer(response.status, bytes(received))


def _connected(address: Address, deadline: float) -> socket.socket:
    """Connect within the deadline; raise `InvalidArgument` where this is our own."""
    if not address.path:
        return _connected_to_host(address, deadline)
    connected = _Bounded(socket.AF_UNIX, socket.SOCK_STREAM)
    _connect(connected.until(deadline), address.path)
    try:
        _require_another(connected, address)
    except BaseException:
        connected.close()
        raise
    return connected


def _connected_to_host(address: Address, deadline: float) -> socket.socket:
    context = None if address.tls is None else _context(address)
    failure = OSError(f"{address.host} has no address")
    for family, kind, proto, _, place in _looked_up(address, deadline):
        connected = _Bounded(family, kind, proto)
        try:
            _connect(connected.until(deadline), place)
        except OSError as error:
            failure = error
            continue
        if context is None:
            return connected
        return _wrapped(connected, context, address.host, deadline)
    raise failure


def _looked_up(address: Address, deadline: float) -> list[Any]:
    """Return what getaddrinfo(3) finds; raise `TimeoutError` at the deadline."""
    found: list[Any] = []
    failures: list[Exception] = []

    def look_up() -> None:
        try:
            found.extend(
                socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
            )
        except (OSError, ValueError) as error:
            failures.append(error)

    # The resolver has limits of its own, by which a thread that is left behind ends.
    looking = threading.Thread(target=look_up, daemon=True)
    looking.start()
    looking.join(_left(deadline))
    if looking.is_alive():
        raise TimeoutError("its name can't be looked up in time")
    if failures:
        raise failures[0]
    return found


class _Bounded(socket.socket):
    """What makes all waits of a socket end at one deadline, and bounds what comes."""

    deadline: float = 0.0
    received: int = 0

    def until(self, deadline: float) -> "_Bounded":
        """Set the deadline, of `time.monotonic`; return the socket."""
        self.deadline = deadline
        return self

    def recv_into(self, *args: Any, **kwargs: Any) -> int:
        """Do as `socket.socket.recv_into`, which `http.client` reads by."""
        self.settimeout(_left(self.deadline))
        size = super().recv_into(*args, **kwargs)
        self.received += size
        if self.received > LARGEST_ANSWER:
            raise ValueError(f"its answer has more than {LARGEST_ANSWER} bytes")
        return size

    def sendall(self, *args: Any, **kwargs: Any) -> None:
        """Do as `socket.socket.sendall`, whose timeout is for all of it."""
        self.settimeout(_left(self.deadline))
        super().sendall(*args, **kwargs)


class _BoundedTLS(_Bounded, ssl.SSLSocket):
    pass


def _connect(connecting: "_Bounded", place: Any) -> None:
    try:
        connecting.settimeout(_left(connecting.deadline))
        connecting.connect(place)
    except BaseException:
        connecting.close()
        raise


def _context(address: Address) -> ssl.SSLContext:
    """Return how the plugin is to prove itself, and we to it."""
    tls = address.tls or TLS()
    try:
        context = ssl.create_default_context(cafile=tls.ca_file or None)
    except OSError as error:
        raise InvalidArgument(
            f"{address.found_in}: CAFile {tls.ca_file}: {_reason(error)}"
        ) from error
    context.sslsocket_class = _BoundedTLS
    if tls.insecure_skip_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if tls.cert_file:
        try:
            # Without a password OpenSSL would ask for one on the terminal.
            context.load_cert_chain(tls.cert_file, tls.key_file or None, password="")
        except (OSError, ValueError) as error:
            raise InvalidArgument(
                f"{address.found_in}: CertFile {tls.cert_file}, KeyFile "
                f"{tls.key_file}: {_reason(error)}"
            ) from error
    return context


def _wrapped(
    plain: socket.socket, context: ssl.SSLContext, host: str, deadline: float
) -> socket.socket:
    """Begin TLS; raise `OSError` where the plugin does not prove itself."""
    try:
        plain.settimeout(_left(deadline))
        wrapped = context.wrap_socket(plain, server_hostname=host)
    except BaseException:
        plain.close()
        raise
    return cast(_BoundedTLS, wrapped).until(deadline)


def _require_another(connected: socket.socket, address: Address) -> None:
    if processes.peer_of(connected) == os.getpid():
        raise InvalidArgument(
            f"{address} is this volplugin itself: name another plugin, or create the "
            f"volume without plugin="
        )


def _left(deadline: float) -> float:
    """Return the seconds left; raise `TimeoutError` for none."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("timed out")
    return left


def _reason(error: Exception) -> str:
    if isinstance(error, http.client.RemoteDisconnected):
        return "it closed the connection without an answer"
    if isinstance(error, http.client.IncompleteRead):
        return "its answer was cut off"
    if isinstance(error, http.client.BadStatusLine):
        return f"its answer is no HTTP: {str(error)[:40]!r}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
