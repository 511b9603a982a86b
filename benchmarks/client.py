"""The client of all measurements: plugin calls over blocking unix sockets.

It does as little as it can and is the same for every server, so that what differs is
the server. Several connections are as many processes: threads would wait for each
other.
"""

import json
import multiprocessing
import signal
import socket
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import attrs

TIMEOUT = 120.0  # seconds; dockerd's own limit for Create and Mount
_FORK = multiprocessing.get_context("fork")

Step = tuple[bytes, ...]
"""Calls that belong together and count as one, such as Mount and Unmount."""


class CallFailed(Exception):
    """A server answered a call with an error."""


def request(call: str, **message: Any) -> bytes:
    """Return the bytes that dockerd 20.10 sends: an empty Host, compact JSON."""
    path = call if "." in call else f"VolumeDriver.{call}"
    body = json.dumps(message, separators=(",", ":")).encode() + b"\n"
    head = f"POST /{path} HTTP/1.1\r\nHost: \r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


class Connection:
    """One kept-alive connection to a plugin socket."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(TIMEOUT)
        try:
            self._socket.connect(str(path))
        except OSError:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def wait_at_most(self, seconds: float) -> None:
        """Raise `TimeoutError` from a call whose answer takes longer."""
        self._socket.settimeout(seconds)

    def call(self, message: bytes) -> bytes:
        """Send a request and return its answer's body, chunked as it came."""
        self._socket.sendall(message)
        answer = self._receive()
        while (end := answer.find(b"\r\n\r\n")) < 0:
            answer += self._receive()
        head, end = bytes(answer[:end]).lower(), end + 4
        if b"transfer-encoding: chunked" in head:
            while not answer.endswith(b"\r\n0\r\n\r\n"):
                answer += self._receive()
        else:
            length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
            while len(answer) < end + length:
                answer += self._receive()
        body = bytes(answer[end:])
        if not head.startswith(b"http/1.1 200"):
            raise CallFailed(f"{message!r:.200} was answered {body!r:.300}")
        return body

    def _receive(self) -> bytearray:
        data = self._socket.recv(1 << 20)
        if not data:
            raise ConnectionError("the server closed the connection")
        return bytearray(data)


@attrs.frozen
class Outcome:
    """The steps that connections took, from when to when, and whether all went on.

    A connection hung when an answer took longer than the patience asked for.
    """

    steps: tuple[int, ...]
    begun: float
    ended: float
    hung: bool = False

    @property
    def rate(self) -> float:
        """Steps in a second; 0 when there was none."""
        total = sum(self.steps)
        return total / (self.ended - self.begun) if total else 0.0


def drive(
    path: Path,
    loads: Sequence[Iterable[Step]],
    seconds: float,
    *,
    patience: float | None = None,
) -> Outcome:
    """Take the steps of each load on a connection of its own, for so many seconds.

    A load that ends sooner ends its connection's part; so does an answer that takes
    longer than ``patience`` s. Without a patience that is an error, after `TIMEOUT`.
    """
    if len(loads) == 1:
        with Connection(path) as connection:
            return _take(connection, loads[0], seconds, patience)
    barrier = _FORK.Barrier(len(loads))
    receivers, processes = [], []
    try:
        for load in loads:
            receiver, sender = _FORK.Pipe(duplex=False)
            process = _FORK.Process(
                target=_work, args=(path, load, (seconds, patience), barrier, sender)
            )
            process.start()
            sender.close()
            receivers.append(receiver)
            processes.append(process)
        parts = [receiver.recv() for receiver in receivers]
        for process in processes:
            process.join()
    finally:
        for process in processes:
            process.kill()
            process.join()
        for receiver in receivers:
            receiver.close()
    if faults := [part for part in parts if isinstance(part, str)]:
        raise CallFailed(faults[0])
    return Outcome(
        tuple(count for part in parts for count in part.steps),
        min(part.begun for part in parts),
        max(part.ended for part in parts),
        any(part.hung for part in parts),
    )


def _take(
    connection: Connection,
    load: Iterable[Step],
    seconds: float,
    patience: float | None,
) -> Outcome:
    connection.wait_at_most(patience or TIMEOUT)
    begun = ended = time.perf_counter()
    steps = 0
    for step in load:
        try:
            for message in step:
                connection.call(message)
        except TimeoutError:
            if patience is None:
                raise
            return Outcome((steps,), begun, ended, hung=True)
        steps += 1
        ended = time.perf_counter()
        if ended >= begun + seconds:
            break
    return Outcome((steps,), begun, ended)


def _work(
    path: Path,
    load: Iterable[Step],
    limits: tuple[float, float | None],
    barrier: Any,
    sender: Any,
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with Connection(path) as connection:
            barrier.wait(TIMEOUT)
            sender.send(_take(connection, load, *limits))
    except (OSError, CallFailed) as error:
        sender.send(f"{type(error).__name__}: {error}")
