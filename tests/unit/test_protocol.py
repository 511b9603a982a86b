"""The protocol's messages: bodies in, bodies out."""

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from volplugin import protocol
from volplugin.errors import InvalidArgument
from volplugin.model import Volume
from volplugin.protocol import NotJSON

VOLUME = Volume(
    name="db",
    id="1",
    backend="local",
    driver="local",
    mountpoint="/v/db",
    created_at="2026-11-24T19:00:00.000Z",
)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{}", {}),
        (b'{"Name":"v","Opts":null}\n', {"Name": "v", "Opts": None}),
        (b' { "Name" :\t"v" }\r\n', {"Name": "v"}),
        (b'\xef\xbb\xbf{"Name":"v"}', {"Name": "v"}),
        (b'{"Name":"a","Name":"b"}', {"Name": "b"}),
        ('{"Name":"é🐳"}'.encode(), {"Name": "é🐳"}),
    ],
)
def test_decode(body: bytes, message: dict[str, Any]) -> None:
    """Bodies as engines write them, and as JSON allows."""
    assert protocol.decode(body) == message


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"1",
        b'"{}"',
        b"{}{}",
        b"\xff\xfe",
        b'{"Name":"\x80"}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"Name":' + b"9" * 10_000 + b"}",
    ],
    ids=lambda body: repr(body[:12]),
)
def test_decode_refuses(body: bytes) -> None:
    """What is no JSON object is told in a short message, at whatever depth."""
    with pytest.raises(NotJSON) as caught:
        protocol.decode(body)
    assert str(caught.value).startswith("the body is ")
    assert len(str(caught.value)) < 300


@given(body=st.binary(max_size=200) | st.text(max_size=50).map(str.encode))
def test_decode_raises_nothing_else(body: bytes) -> None:
    """For no bytes is there another error."""
    with contextlib.suppress(NotJSON):
        assert isinstance(protocol.decode(body), dict)


@pytest.mark.parametrize("message", [{}, {"Name": None}])
def test_text_that_is_absent(message: dict[str, Any]) -> None:
    """Absent and null are the empty text."""
    assert protocol.text(message, "Name") == ""


@pytest.mark.parametrize("value", [0, 1.5, float("nan"), True, [], {}, ["v"], 9**999])
def test_text_of_another_type(value: object) -> None:
    """Another type is an error with the key and the value, cut short."""
    with pytest.raises(
        InvalidArgument, match=r"^Name must be a string, not "
    ) as caught:
        protocol.text({"Name": value}, "Name")
    assert len(str(caught.value)) < 120


@pytest.mark.parametrize("message", [{}, {"Opts": None}, {"Opts": {}}])
def test_no_options(message: dict[str, Any]) -> None:
    """dockerd sends null or an object, others nothing."""
    assert protocol.options(message) == {}


def test_options() -> None:
    """Options are the user's own words, unread."""
    words = {"driver": "tmpfs", "size": " 1 ", "é": "🐳\n"}
    assert protocol.options({"Opts": words}) == words


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ([], "Opts must be an object, not []"),
        ("a=b", "Opts must be an object, not 'a=b'"),
        (0, "Opts must be an object, not 0"),
        (False, "Opts must be an object, not False"),
        ({"size": 1}, "option 'size' must be a string, not 1"),
        ({"size": None}, "option 'size' must be a string, not None"),
        ({"a": "\ud800"}, "option 'a' is not valid UTF-8"),
        ({"\udfff": "a"}, "option '\\udfff' is not valid UTF-8"),
    ],
)
def test_wrong_options(value: object, complaint: str) -> None:
    """Options of a wrong type are told with key and value."""
    with pytest.raises(InvalidArgument) as caught:
        protocol.options({"Opts": value})
    assert str(caught.value) == complaint


def test_a_long_key_is_cut() -> None:
    """A message holds the start of a long key, not all of it."""
    for value in (1, "\ud800"):
        with pytest.raises(InvalidArgument) as caught:
            protocol.options({"Opts": {"k" * 100_000: value}})
        assert len(str(caught.value)) < 200


def test_bytes() -> None:
    """The answers that never change are what dockerd compares with."""
    assert protocol.EMPTY == b"{}"
    assert protocol.ACTIVATED == b'{"Implements":["VolumeDriver"]}'
    for scope in (b"local", b"global"):
        answer = b'{"Capabilities":{"Scope":"%s"}}' % scope
        assert protocol.capabilities(scope.decode()) == answer
    assert protocol.CONTENT_TYPE == "application/vnd.docker.plugins.v1.1+json"
    assert protocol.BODY_LIMIT == 1024 * 1024


def test_answers() -> None:
    """Each answer is compact JSON of the protocol's shape."""
    assert protocol.mountpoint("/v/db") == b'{"Mountpoint":"/v/db"}'
    assert protocol.failure("no") == b'{"Err":"no"}'
    assert protocol.volumes([]) == b'{"Volumes":[]}'
    entry = b'{"Name":"db","Mountpoint":"/v/db"}'
    assert protocol.volumes([VOLUME, VOLUME]) == b'{"Volumes":[%s,%s]}' % (entry, entry)
    assert protocol.volume(VOLUME, {"a": 1}) == (
        b'{"Volume":{"Name":"db","Mountpoint":"/v/db",'
        b'"CreatedAt":"2026-11-24T19:00:00.000Z","Status":{"a":1}}}'
    )


@given(text=st.text() | st.just("\ud800\0\n\x7f"))
def test_any_text_can_be_answered(text: str) -> None:
    """A path or a reason of whatever characters is ASCII JSON that reads back."""
    for answer, key in (
        (protocol.failure(text), "Err"),
        (protocol.mountpoint(text), "Mountpoint"),
    ):
        assert answer.isascii()
        assert json.loads(answer) == {key: text}
