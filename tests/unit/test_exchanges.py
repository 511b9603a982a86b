"""What was said on a connection becomes requests with answers, however it is cut up."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from volplugin.exchanges import (
    KEPT_ANSWER,
    KEPT_REQUEST,
    Conversation,
    Exchange,
    Message,
)

GET = (
    b"POST /VolumeDriver.Get HTTP/1.1\r\nHost: \r\nContent-Length: 13\r\n\r\n"
    b'{"Name":"v"}\n'
)
LIST = b"POST /VolumeDriver.List HTTP/1.1\r\nHost: plugin\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
FAILED = b'HTTP/1.1 500 X\r\ncontent-length:  11 \r\n\r\n{"Err":"x"}'


class Heard:
    """A conversation, and the exchanges that it told of."""

    def __init__(self) -> None:
        self.told: list[Exchange] = []
        self.conversation = Conversation(self.told.append)
        self._now = 100.0

    def say(self, *parts: bytes | str) -> list[Exchange]:
        """Bytes that begin with ``HTTP`` are sent, others received; a text closes."""
        for part in parts:
            self._now += 1
            if isinstance(part, str):
                self.conversation.closed(part, self._now)
            elif part.startswith(b"HTTP"):
                self.conversation.sent(part, self._now)
            else:
                self.conversation.received(part, self._now)
        return self.told


@pytest.fixture
def heard() -> Heard:
    return Heard()


def messages(told: Sequence[Exchange]) -> list[tuple[bytes, bytes | None]]:
    """Return each request's body with its answer's."""
    return [(e.request.body, e.answer.body if e.answer else None) for e in told]


def test_a_request_and_its_answer(heard: Heard) -> None:
    """Both are there with head and body, and the time from first to last byte."""
    (told,) = heard.say(GET, OK)
    head, _, body = GET.partition(b"\r\n\r\n")
    assert told == Exchange(
        began=101.0,
        seconds=1.0,
        request=Message(head=head + b"\r\n\r\n", body=body, whole=True),
        answer=Message(head=OK[:-2], body=b"{}", whole=True),
    )


def test_requests_that_do_not_wait(heard: Heard) -> None:
    """Answers come in the order of the requests."""
    told = heard.say(GET + LIST + GET, OK + FAILED, OK)
    assert messages(told) == [
        (b'{"Name":"v"}\n', b"{}"),
        (b"", b'{"Err":"x"}'),
        (b'{"Name":"v"}\n', b"{}"),
    ]


@given(st.lists(st.integers(1, 3 * len(GET)), max_size=20))
def test_any_cut(places: list[int]) -> None:
    """It does not matter in which pieces bytes arrive."""
    said = GET + b"\r\n" + LIST + CHUNKED + GET
    heard = Heard()
    begin = 0
    for place in sorted({*places, len(said)}):
        heard.conversation.received(said[begin:place], 1)
        begin = max(begin, place)
    for place in range(0, 4 * len(OK), 7):
        heard.conversation.sent((4 * OK)[place : place + 7], 2)
    requests = [e.request for e in heard.told]
    assert [r.body for r in requests] == [
        b'{"Name":"v"}\n',
        b"",
        b'{"Name":"v"}',
        b'{"Name":"v"}\n',
    ]
    assert all(r.whole for r in requests)
    assert all(e.answer and e.answer.body == b"{}" for e in heard.told)


CHUNKED = (
    b"POST /VolumeDriver.Get HTTP/1.1\r\nTransfer-Encoding: gzip, chunked\r\n\r\n"
    b'5\r\n{"Nam\r\n7;x=y\r\ne":"v"}\r\n0\r\nTrailer: x\r\n\r\n'
)


def test_chunks_without_a_size(heard: Heard) -> None:
    """What can't be told apart any more is one body."""
    head = CHUNKED.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
    told = heard.say(head + b"3\r\nabc\r\nxyz\r\n123", OK, GET, "server")
    assert told[0].request.body == b"abc123" + GET
    assert not told[0].request.whole


def test_an_interim_answer(heard: Heard) -> None:
    """100 Continue is none."""
    told = heard.say(GET[:-13], b"HTTP/1.1 100 Continue\r\n\r\n", GET[-13:], FAILED)
    assert messages(told) == [(b'{"Name":"v"}\n', b'{"Err":"x"}')]


@pytest.mark.parametrize("by", ["client", "server"])
def test_a_connection_that_ends_without_an_answer(heard: Heard, by: str) -> None:
    """Each request that waited is told, with who hung up."""
    told = heard.say(GET + LIST, by)
    assert messages(told) == [(b'{"Name":"v"}\n', None), (b"", None)]
    assert [e.closed_by for e in told] == [by, by]


def test_half_a_request(heard: Heard) -> None:
    """What came of it is told."""
    (told,) = heard.say(GET[:-5], "client")
    assert told.request.body == b'{"Name":'
    assert not told.request.whole


def test_half_an_answer(heard: Heard) -> None:
    """What was sent of it is told, and that it ended there."""
    (told,) = heard.say(GET, FAILED[:-4], "client")
    assert told.answer is not None
    assert (told.answer.body, told.answer.whole) == (b'{"Err":', False)
    assert told.closed_by == "client"


def test_an_answer_before_the_end_of_the_request(heard: Heard) -> None:
    """It is told once the request has come, or never will."""
    assert heard.say(GET[:-5], FAILED) == []
    assert messages(heard.say(GET[-5:], GET[:-5], OK, "client")) == [
        (b'{"Name":"v"}\n', b'{"Err":"x"}'),
        (b'{"Name":', b"{}"),
    ]


def test_no_http(heard: Heard) -> None:
    """Its bytes are told with the answer, which is the last one."""
    (told,) = heard.say(b"\x16\x03\x01\x02", FAILED, b"more", "server")
    assert told.request == Message(body=b"\x16\x03\x01\x02")
    assert told.answer is not None


def test_nothing_was_said(heard: Heard) -> None:
    """A connection without a request is none."""
    assert heard.say(b"\r\n", "client") == []


def test_what_is_too_long(heard: Heard) -> None:
    """Only so much is kept of a body, or of what has no end."""
    kept = KEPT_REQUEST
    head = b"POST /x HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % (kept + 1000)
    heard.say(head, b"x" * kept, b"y" * 1000, OK, b"z" * kept, b"z" * 9, "client")
    first, second = heard.told
    assert (first.request.body, first.request.cut) == (b"x" * kept, 1000)
    assert first.request.whole
    assert (second.request.body, second.request.cut) == (b"z" * kept, 9)


def test_a_long_answer(heard: Heard) -> None:
    """More is kept of it than of a request."""
    size = KEPT_ANSWER + 7
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size
    (told,) = heard.say(GET, head + b"x" * size)
    assert told.answer is not None
    assert (len(told.answer.body), told.answer.cut) == (KEPT_ANSWER, 7)
