"""Recordings of engines: how they are read and written, the same on every machine.

A file is what ``serve --record`` makes of one scenario, with three things changed. What
differs from one run to the next has a value of its own kind: moments, pids, IDs, the
number of a connection, the place of the plugin's root, what libraries call themselves.
Of a volume's Status there is only what tells of mounts. And lines of comments and of
the commands that made an engine call stand between, but not the server's own.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, TypeAlias

import attrs

Line: TypeAlias = dict[str, Any]

FOLDER: Final = Path(__file__).resolve().parents[1] / "protocol" / "recordings"
ROOT: Final = "/var/lib/volplugin"

_SOCKET: Final = "/run/docker/plugins/volplugin.sock"
_MOMENT: Final = "2000-01-01T00:00:00"
_DATE: Final = "Sat, 01 Jan 2000 00:00:00 GMT"
_LIBRARIES: Final = "Python/3 aiohttp/3"
_FIRST_PID: Final = 1001

_MOMENTS: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(?=Z)")
_ID: Final = re.compile(r"\b[0-9a-f]{64}\b")
_SHORT_ID: Final = re.compile(r"(?<=')[0-9a-f]{12}(?=…)")
_PROCESS: Final = re.compile(r"\(([^(),]+), pid (\d+)")
# What tells of mounts. The rest is for people, and of the moment or of the disk.
_STATUS: Final = ("driver", "backend", "attached", "mounts", "holders")


def read(file: Path) -> list[Line]:
    """Return the lines of a file."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def write(file: Path, lines: Iterable[Line]) -> None:
    """Write a file anew."""
    text = [json.dumps(line, separators=(",", ":")) + "\n" for line in lines]
    file.write_text("".join(text), encoding="ascii")


def request_bytes(request: Mapping[str, Any]) -> bytes:
    """Return a recorded request as it was sent."""
    head = "\r\n".join([request["line"], *request["headers"], "", ""])
    return f"{head}{request['body']}".encode(errors="surrogateescape")


@attrs.define
class Normaliser:
    """Makes the entries of one recording the same in every run.

    ``root`` is the plugin's; ``programs`` are what to call the processes with a pid.
    """

    root: str
    programs: Mapping[int, str] = attrs.field(factory=dict)
    _connections: dict[int, int] = attrs.field(factory=dict, init=False)
    _pids: dict[int, int] = attrs.field(factory=dict, init=False)
    _ids: dict[str, str] = attrs.field(factory=dict, init=False)

    def __call__(self, entry: Line) -> Line:
        """Return an entry as it is told in every run."""
        number, client = entry["connection"], entry["client"]
        pid = self._pids.setdefault(client["pid"], _FIRST_PID + len(self._pids))
        told: Line = {
            **entry,
            "time": f"{_MOMENT}.000Z",
            "socket": _SOCKET,
            "connection": self._connections.setdefault(
                number, len(self._connections) + 1
            ),
            "client": {
                "program": self.programs.get(client["pid"], client["program"]),
                "pid": pid,
                "started": pid,
            },
            "ms": 0.0,
        }
        request = entry["request"]
        told["request"] = {**request, "body": self._with_ids(request["body"])}
        if entry["answer"] is not None:
            told["answer"] = self._answer(entry["answer"])
        return told

    def _answer(self, answer: Line) -> Line:
        content = self._values(json.loads(answer["body"]))
        if "Volume" in content:
            status = content["Volume"]["Status"]
            known = {key: status[key] for key in _STATUS if key in status}
            content["Volume"]["Status"] = known
        # As the server writes it, for its length is in a header.
        body = json.dumps(content, separators=(",", ":"))
        values = {"Date": _DATE, "Server": _LIBRARIES, "Content-Length": str(len(body))}
        headers = []
        for header in answer["headers"]:
            name, _, value = header.partition(": ")
            headers.append(f"{name}: {values.get(name, value)}")
        return {**answer, "headers": headers, "body": body}

    def _values(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self._values(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._values(item) for item in value]
        return self._text(value) if isinstance(value, str) else value

    def _text(self, text: str) -> str:
        text = _SHORT_ID.sub(lambda found: self._short(found[0]), text)
        text = _MOMENTS.sub(
            lambda found: _MOMENT + re.sub(r"\d", "0", found[1] or ""), text
        )
        text = _PROCESS.sub(self._process, text)
        return self._with_ids(text).replace(self.root, ROOT)

    def _process(self, found: re.Match[str]) -> str:
        pid = int(found[2])
        program = self.programs.get(pid, found[1])
        return f"({program}, pid {self._pids.get(pid, pid)}"

    def _with_ids(self, text: str) -> str:
        return _ID.sub(lambda found: self._id(found[0]), text)

    def _id(self, id_: str) -> str:
        """Return the nth ID for the nth that was seen; an ID of ours is its own."""
        number = str(len(self._ids) + 1)
        return self._ids.setdefault(id_, hashlib.sha256(number.encode()).hexdigest())

    def _short(self, short: str) -> str:
        known = [new for old, new in self._ids.items() if old.startswith(short)]
        return known[0][: len(short)] if known else short
