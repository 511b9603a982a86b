"""A volume plugin that does what local-persist does: its answers, its state file.

The real one is Go and in no distribution. What it answers and keeps is by its source:
a volume is the directory that its user names, and Remove forgets it.
"""

import json
import threading
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingUnixStreamServer
from typing import Any


class LocalPersist:
    """The plugin on ``socket``, with its state in the file ``state``."""

    def __init__(self, socket: Path, state: Path) -> None:
        self._state = state
        self._volumes: dict[str, str] = {}
        plugin = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                answer = plugin._answer(self.path, json.loads(body or b"{}"))
                found = json.dumps(answer).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(found)))
                self.end_headers()
                self.wfile.write(found)

            def address_string(self) -> str:
                return ""

            def log_message(self, *_: object) -> None:
                pass

        socket.parent.mkdir(parents=True, exist_ok=True)
        self._socket = socket
        self._server = ThreadingUnixStreamServer(str(socket), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        """End it; its socket goes, its state stays."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self._socket.unlink()

    def _answer(self, call: str, asked: dict[str, Any]) -> dict[str, Any]:
        name = asked.get("Name", "")
        path = self._volumes.get(name)
        match call:
            case "/Plugin.Activate":
                return {"Implements": ["VolumeDriver"]}
            case "/VolumeDriver.Capabilities":
                return {"Capabilities": {"Scope": "local"}}
            case "/VolumeDriver.List":
                found = [{"Name": n, "Mountpoint": p} for n, p in self._volumes.items()]
                return {"Volumes": found}
            case "/VolumeDriver.Create":
                self._volumes[name] = asked["Opts"]["mountpoint"]
                self._save()
            case "/VolumeDriver.Remove":
                self._volumes.pop(name, None)
                self._save()
            case _ if path is None:
                return {"Err": f"no volume found with the name {name}"}
            case "/VolumeDriver.Get":
                return {"Volume": {"Name": name, "Mountpoint": path}}
            case _:
                return {"Mountpoint": path}
        return {}

    def _save(self) -> None:
        self._state.parent.mkdir(mode=0o700, exist_ok=True)
        self._state.write_text(json.dumps({"state": self._volumes}))
