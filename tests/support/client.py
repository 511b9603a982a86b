"""A client of a plugin socket, by the standard library alone."""

import http.client
import json
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from support.connections import Connector

_Socket = socket.socket  # `Client` has another one


class PluginError(Exception):
    """The plugin answered an error: its text, with the HTTP status."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


@attrs.frozen(kw_only=True)
class Answer:
    """An HTTP answer as it came."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body, decoded."""
        return json.loads(self.body)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, client: "Client") -> None:
        super().__init__("localhost", timeout=client.limit)
        self._client = client

    def connect(self) -> None:
        self.sock = self._client.connect()


@attrs.frozen
class Client:
    """Calls a plugin (or dockerd) on ``socket``; each call is a connection of its own.

    ``connector`` connects in its place, where the plugin's namespaces are not ours: it
    does not mount for who can't see the mount. Safe to share between threads.
    """

    socket: Path
    limit: float = 60
    connector: Connector | None = None

    def connect(self) -> _Socket:
        """Return a connection; each wait on it is for ``limit`` s at most."""
        if self.connector is not None:
            connection = self.connector.connect(self.socket)
            connection.settimeout(self.limit)
            return connection
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(self.limit)
            connection.connect(str(self.socket))
        except BaseException:
            connection.close()
            raise
        return connection

    def request(
        self,
        path: str,
        body: bytes | None = None,
        *,
        verb: str = "POST",
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """Send one request and return its answer, whatever its status.

        Raise `OSError` or `http.client.HTTPException` when there is no answer.
        """
        connection = _UnixConnection(self)
        try:
            connection.request(verb, path, body, dict(headers or {}))
            answer = connection.getresponse()
            return Answer(
                status=answer.status,
                headers=dict(answer.getheaders()),
                body=answer.read(),
            )
        finally:
            connection.close()

    def call(self, method: str, body: object = None) -> tuple[int, dict[str, Any]]:
        """Send ``body`` as JSON to ``method``; return the status and what it says.

        ``method`` is ``Create`` for ``/VolumeDriver.Create``; with a dot in it, it is
        taken whole (``Plugin.Activate``). No ``body`` is an empty one.
        """
        path = method if "." in method else f"VolumeDriver.{method}"
        sent = b"" if body is None else json.dumps(body).encode() + b"\n"
        answer = self.request(f"/{path}", sent)
        decoded = answer.json
        assert isinstance(decoded, dict), decoded
        return answer.status, decoded

    def ask(self, method: str, body: object = None) -> dict[str, Any]:
        """Do as `call`, return the answer alone; raise `PluginError` for an error."""
        status, answer = self.call(method, body)
        if status != 200 or answer.get("Err"):
            raise PluginError(status, str(answer.get("Err")))
        return answer

    def create(self, name: str, options: Mapping[str, str] | None = None) -> None:
        """Create a volume."""
        opts = None if options is None else dict(options)
        self.ask("Create", {"Name": name, "Opts": opts})

    def remove(self, name: str) -> None:
        """Remove a volume."""
        self.ask("Remove", {"Name": name})

    def mount(self, name: str, mount_id: str) -> str:
        """Mount a volume for ``mount_id`` and return its mountpoint."""
        return str(self.ask("Mount", {"Name": name, "ID": mount_id})["Mountpoint"])

    def unmount(self, name: str, mount_id: str) -> None:
        """Unmount a volume for ``mount_id``."""
        self.ask("Unmount", {"Name": name, "ID": mount_id})

    def path(self, name: str) -> str:
        """Return where a volume is, or an empty text."""
        return str(self.ask("Path", {"Name": name})["Mountpoint"])

    def get(self, name: str) -> dict[str, Any]:
        """Return a volume: Name, Mountpoint, CreatedAt, Status."""
        volume = self.ask("Get", {"Name": name})["Volume"]
        assert isinstance(volume, dict)
        return volume

    def list(self) -> dict[str, str]:
        """Return each volume's name with its mountpoint."""
        volumes = self.ask("List", {})["Volumes"]
        return {volume["Name"]: volume["Mountpoint"] for volume in volumes}

    def activate(self) -> dict[str, Any]:
        """Return what the plugin implements."""
        return self.ask("Plugin.Activate")
