"""Raw HTTP on a plugin socket: the bytes that are sent, the bytes that come back."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import attrs
from support.client import Answer, Client

CONTENT_TYPE: Final = "application/vnd.docker.plugins.v1.1+json"


def post(
    call: str,
    body: bytes = b"",
    *,
    headers: str = "Host: \r\n",
    version: str = "1.1",
) -> bytes:
    """Return a request for ``call`` (``Get``, ``Plugin.Activate``) as dockerd has it.

    dockerd 20.10: an empty Host, no Content-Type, Content-Length set.
    """
    path = call if call.startswith("Plugin.") else f"VolumeDriver.{call}"
    head = f"POST /{path} HTTP/{version}\r\n{headers}Content-Length: {len(body)}\r\n"
    return head.encode() + b"\r\n" + body


class Wire:
    """One connection; requests may be sent before answers are read."""

    def __init__(self, path: Path | Client, *, limit: float = 20) -> None:
        client = path if isinstance(path, Client) else Client(path)
        self.socket = attrs.evolve(client, limit=limit).connect()
        self._reader = self.socket.makefile("rb")

    def send(self, data: bytes) -> None:
        """Send ``data``; a server that has closed already is no error here."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.socket.sendall(data)

    def answer(self) -> Answer | None:
        """Read one answer; None when the connection was closed instead."""
        try:
            line = self._reader.readline()
            if not line:
                return None
            status = int(line.split()[1])
            headers = {}
            while (line := self._reader.readline()).strip():
                key, _, value = line.decode("latin-1").partition(":")
                headers[key] = value.strip()
            body = self._reader.read(int(headers["Content-Length"]))
        except ConnectionResetError:
            return None
        return Answer(status=status, headers=headers, body=body)

    def ask(self, data: bytes) -> Answer:
        """Send ``data`` and return the answer, which there must be."""
        self.send(data)
        answer = self.answer()
        assert answer is not None, "the connection was closed"
        return answer

    def close(self) -> None:
        """Close the connection, whatever is under way on it."""
        self._reader.close()
        self.socket.close()


@contextlib.contextmanager
def connected(path: Path | Client, *, limit: float = 20) -> Iterator[Wire]:
    """Connect to a plugin's socket, or as a client does; disconnect at the end."""
    wire = Wire(path, limit=limit)
    try:
        yield wire
    finally:
        wire.close()
