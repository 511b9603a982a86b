"""What engines were recorded to send, byte for byte, is answered as it was then."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from peers import host_of, serving_in_host
from support import recordings
from support.plugin import Plugin
from support.recordings import Line, Normaliser

pytestmark = pytest.mark.root

_REPLAYER: Final = Path(__file__).with_name("replayer.py")
FILES: Final = sorted(recordings.FOLDER.glob("*.jsonl"))


class Client:
    """A process that has the name of a recorded one."""

    def __init__(self, plugin: Plugin, program: str) -> None:
        # In the plugin's host, as an engine is: elsewhere it would not see mounts.
        words = (sys.executable, "-I", "-S", _REPLAYER, plugin.socket, program)
        self._process = subprocess.Popen(
            host_of(plugin).command(*words),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._read() == "ready\n"

    @property
    def pid(self) -> int:
        """The process that the server sees."""
        return self._process.pid

    def send(self, connection: int, request: bytes) -> bytes | None:
        """Send the bytes of a request; return those of the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(
            json.dumps([connection, request.decode("latin-1")]) + "\n"
        )
        self._process.stdin.flush()
        answer = json.loads(self._read())
        return None if answer is None else answer.encode("latin-1")

    def end(self) -> None:
        """End it, as its engine did after its last call."""
        self._process.kill()
        self._process.wait(10)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


class Replay:
    """The clients of one recording, each there from its first call to its last."""

    def __init__(self, plugin: Plugin, entries: list[Line]) -> None:
        self._plugin = plugin
        self._last = {entry["client"]["pid"]: entry for entry in entries}
        self._clients: dict[int, Client] = {}

    def send(self, entry: Line) -> Line:
        """Have the recorded client send the recorded request; return what happened."""
        recorded = entry["client"]["pid"]
        if recorded not in self._clients:
            program = entry["client"]["program"]
            self._clients[recorded] = Client(self._plugin, program)
        client = self._clients[recorded]
        request = recordings.request_bytes(entry["request"])
        answer = client.send(entry["connection"], request)
        happened = {
            **entry,
            "client": {**entry["client"], "pid": client.pid},
            "answer": None if answer is None else as_recorded(answer),
        }
        if self._last[recorded] is entry:
            self._clients.pop(recorded).end()
        return happened

    def close(self) -> None:
        """End all clients that are left."""
        for client in self._clients.values():
            client.end()


def as_recorded(answer: bytes) -> dict[str, Any]:
    """Return an answer as a recording has it."""
    head, _, body = answer.decode().partition("\r\n\r\n")
    line, *headers = head.split("\r\n")
    return {"status": int(line.split()[1]), "headers": headers, "body": body}


@contextlib.contextmanager
def replaying(plugin: Plugin, entries: list[Line]) -> Iterator[Replay]:
    replay = Replay(plugin, entries)
    try:
        yield replay
    finally:
        replay.close()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_replayed(file: Path, tmp_path: Path) -> None:
    """Each client gets what it got, and a recording of it is the same one again."""
    entries = [line for line in recordings.read(file) if "request" in line]
    assert entries
    again = tmp_path / "calls"
    config = f"record = {json.dumps(str(again))}"
    with serving_in_host(config=config, sweep=3600) as plugin:
        normalise = Normaliser(root=str(plugin.root))
        with replaying(plugin, entries) as replay:
            for entry in entries:
                assert normalise(replay.send(entry)) == entry
        plugin.stop()
        root, own = str(plugin.root), plugin.client_pid
    assert _recorded_again(again, root, own) == entries


def _recorded_again(file: Path, root: str, own: int) -> list[Line]:
    """Return the entries of a recording but for those of the test's own calls."""
    normalise = Normaliser(root=root)
    return [
        normalise(line)
        for line in recordings.read(file)
        if "request" in line and line["client"]["pid"] != own
    ]


def test_every_engine_has_recordings() -> None:
    """No file is lost, and none is empty or of another form."""
    engines = {file.stem.rpartition("-")[0] for file in FILES}
    assert engines == {
        *("dockerd-20.10", "podman-4.3", "moby-24", "pouch-1.0.0", "pouch-last")
    }
    for file in FILES:
        comment, *lines = recordings.read(file)
        assert list(comment) == ["comment"]
        kinds = [next(iter({"comment", "command", "request"} & set(x))) for x in lines]
        assert "request" in kinds
        assert "command" in kinds


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_nothing_of_a_machine_is_in_a_recording(file: Path) -> None:
    """It is the same when it is made on another machine, in another year."""
    entries = [line for line in recordings.read(file) if "request" in line]
    normalise = Normaliser(root="/nowhere")
    for entry in entries:
        assert normalise(entry) == entry
