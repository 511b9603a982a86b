"""A recorder that has a fault of its own fails no call, and says so once."""

import asyncio
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from volplugin.exchanges import Conversation, Exchange, Message
from volplugin.model import Client
from volplugin.recorder import Recorder
from volplugin.transcripts import Connection

CONNECTION = Connection(socket="/s", number=1, client=Client())
REQUEST = Message(head=b"POST /x HTTP/1.1\r\n\r\n", whole=True)
ANSWER = Message(head=b"HTTP/1.1 200 OK\r\n\r\n", whole=True)


def exchange(answer: Message | None = ANSWER) -> Exchange:
    return Exchange(began=0.0, seconds=0.5, request=REQUEST, answer=answer)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "calls"


@pytest.fixture
def recorder(file: Path) -> Iterator[Recorder]:
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT
    recorder = Recorder(str(file), os.open(file, flags, 0o600))
    yield recorder
    recorder.close()


def test_what_is_queued_is_written_at_the_end(recorder: Recorder, file: Path) -> None:
    """`close` waits for it, and may be called again."""
    for _ in range(1000):
        recorder.put(CONNECTION, exchange())
    recorder.close()
    recorder.close()
    begin, *calls = map(json.loads, file.read_text().splitlines())
    assert begin["pid"] == os.getpid()
    assert [call["ms"] for call in calls] == [500.0] * 1000


def test_an_entry_that_can_not_be_made(
    recorder: Recorder, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It ends the recording; what came before is there."""
    recorder.put(CONNECTION, exchange())
    for _ in range(3):
        recorder.put(CONNECTION, exchange(Message(head=b"no status\r\n\r\n")))
    recorder.close()
    assert len(file.read_text().splitlines()) == 2
    assert [r.message for r in caplog.records] == ["recording ended"]
    assert caplog.records[0].levelno == logging.ERROR


class Echo(asyncio.Protocol):
    """A protocol that sends back what it gets."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._transport.write(data)


def test_a_fault_while_it_listens(
    recorder: Recorder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The bytes pass all the same."""

    def fail(*_: object) -> None:
        raise ValueError("a fault")

    monkeypatch.setattr(Conversation, "received", fail)
    monkeypatch.setattr(Conversation, "sent", fail)
    path = str(tmp_path / "s")

    async def talk() -> bytes:
        loop = asyncio.get_running_loop()
        async with await loop.create_unix_server(
            lambda: recorder.listen(Echo, path), path
        ):
            reader, writer = await asyncio.open_unix_connection(path)
            writer.write(b"hello")
            heard = await reader.readexactly(5)
            writer.close()
            await writer.wait_closed()
            await asyncio.sleep(0.05)
            return heard

    assert asyncio.run(talk()) == b"hello"
    assert [r.message for r in caplog.records] == ["recording ended"]


def test_after_its_end_it_is_not_in_the_way(recorder: Recorder, file: Path) -> None:
    """A connection that comes later has no ear, and nothing is written any more."""
    recorder.end(OSError(28, "No space left on device"))
    assert isinstance(recorder.listen(Echo, "/s"), Echo)
    recorder.put(CONNECTION, exchange())
    recorder.close()
    assert len(file.read_text().splitlines()) == 1
