"""The admin socket's messages, and what the command makes of its words."""

import json
from pathlib import Path
from typing import Any

import attrs
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from volplugin import protocol
from volplugin.admin import messages
from volplugin.admin.client import AdminClient
from volplugin.admin.messages import (
    AdoptableAnswer,
    AdoptableEntry,
    AdoptableRequest,
    AdoptAnswer,
    AdoptRequest,
    Failure,
    ReleaseAnswer,
    ResizeAnswer,
    ResizeRequest,
    SnapshotAnswer,
    SnapshotEntry,
    SnapshotRequest,
    SnapshotsAnswer,
    TakeOverAnswer,
    VolumeRequest,
)
from volplugin.cli import cli, volumes
from volplugin.errors import Code, Internal, InvalidArgument, VolpluginError

KINDS = VolpluginError.__subclasses__()

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=9)
words = st.none() | texts
options = st.dictionaries(texts, texts, max_size=3)
entries = st.builds(SnapshotEntry, name=texts, created_at=texts, size=texts)
held = st.builds(AdoptableEntry, name=texts, volume=texts)


@given(
    st.builds(ResizeRequest, name=texts, size=words, inodes=words)
    | st.builds(ResizeAnswer, name=texts, before=options, after=options)
    | st.builds(VolumeRequest, name=texts)
    | st.builds(ReleaseAnswer, name=texts, holders=st.lists(texts, max_size=3))
    | st.builds(TakeOverAnswer, name=texts, hosts=st.lists(texts, max_size=3))
    | st.builds(SnapshotRequest, name=texts, snapshot=texts)
    | st.builds(SnapshotAnswer, name=texts, snapshot=texts)
    | st.builds(SnapshotsAnswer, name=texts, snapshots=st.lists(entries, max_size=3))
    | st.builds(AdoptableRequest, name=texts, options=options)
    | st.builds(AdoptableAnswer, volumes=st.lists(held, max_size=3))
    | st.builds(AdoptRequest, name=texts, driver=texts, options=options, there=texts)
    | st.builds(AdoptAnswer, name=texts)
    | st.builds(Failure, code=texts, message=texts)
)
def test_what_is_written_is_read_back(message: Any) -> None:
    """Each message is the same value at the other end."""
    body = messages.encode(message)
    assert messages.decode(body, type(message)) == message


def test_the_wire() -> None:
    """The bytes that a program in another language writes and reads."""
    request = ResizeRequest(name="q", size="20G")
    answer = ResizeAnswer(name="q", before={"size": "10G"}, after={"size": "20G"})
    assert messages.RESIZE == "/admin/v1/resize"
    assert messages.encode(request) == b'{"name":"q","size":"20G"}'
    assert json.loads(messages.encode(answer)) == {
        "name": "q",
        "before": {"size": "10G"},
        "after": {"size": "20G"},
    }
    paths = [
        messages.RELEASE,
        messages.TAKE_OVER,
        messages.SNAPSHOTS,
        messages.TAKE_SNAPSHOT,
        messages.DROP_SNAPSHOT,
    ]
    assert paths == [
        "/admin/v1/release",
        "/admin/v1/take-over",
        "/admin/v1/snapshots",
        "/admin/v1/take-snapshot",
        "/admin/v1/drop-snapshot",
    ]
    entry = SnapshotEntry(name="then", created_at="2026-01-01T00:00:00Z", size="7")
    listed = SnapshotsAnswer(name="q", snapshots=[entry])
    assert json.loads(messages.encode(listed)) == {
        "name": "q",
        "snapshots": [
            {"name": "then", "created_at": "2026-01-01T00:00:00Z", "size": "7"}
        ],
    }
    released = ReleaseAnswer(name="q", holders=["'1' (pouchd)"])
    assert messages.encode(released) == b"""{"name":"q","holders":["'1' (pouchd)"]}"""
    assert [messages.ADOPTABLE, messages.ADOPT] == [
        "/admin/v1/adoptable",
        "/admin/v1/adopt",
    ]
    found = AdoptableAnswer(volumes=[AdoptableEntry(name="x", volume="")])
    assert messages.encode(found) == b'{"volumes":[{"name":"x","volume":""}]}'
    adopted = AdoptRequest(name="q", driver="d", options={"plugin": "p"}, there="x")
    assert json.loads(messages.encode(adopted)) == {
        "name": "q",
        "driver": "d",
        "options": {"plugin": "p"},
        "there": "x",
    }
    taken = TakeOverAnswer(name="q", hosts=["a"])
    assert messages.encode(taken) == b'{"name":"q","hosts":["a"]}'


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "the body is not JSON: Expecting value"),
        (b"{", "the body is not JSON"),
        (b"\xff{}", "the body is not JSON"),
        (b"[" * 100_000, "nested too deep"),
        (b"[]", "the body is JSON but no object"),
        (b"null", "the body is JSON but no object"),
        (b"{}", "name is missing"),
        (b'{"size":"1G"}', "name is missing"),
        (b'{"name":null}', "name must be a string, not None"),
        (b'{"name":5}', "name must be a string, not 5"),
        (b'{"name":"q","size":5}', "size must be a string, not 5"),
        (b'{"name":"q","size":true}', "size must be a string, not True"),
        (b'{"name":"q","size":["1G"]}', "size must be a string, not ['1G']"),
        (b'{"name":"q","inodes":{}}', "inodes must be a string, not {}"),
        (b'{"name":"\\udc80"}', "name is not valid UTF-8: '\\udc80'"),
        (
            b'{"name":"q","soze":"1G"}',
            "unknown key 'soze'; it takes name, size, inodes",
        ),
        (
            b'{"b":1,"name":"q","a":2}',
            "unknown key 'a', 'b'; it takes name, size, inodes",
        ),
    ],
)
def test_what_is_no_request(body: bytes, reason: str) -> None:
    """A faulty body is refused with the key and the value that are at fault."""
    with pytest.raises(InvalidArgument) as caught:
        messages.decode(body, ResizeRequest)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b'{"name":"q","before":{}}', "after is missing"),
        (b'{"name":"q","before":[],"after":{}}', "before must hold strings, not []"),
        (b'{"name":"q","before":{"a":1},"after":{}}', "before must hold strings"),
    ],
)
def test_what_is_no_answer(body: bytes, reason: str) -> None:
    """An answer is held to its form too."""
    with pytest.raises(InvalidArgument) as caught:
        messages.decode(body, ResizeAnswer)
    assert reason in str(caught.value)


WORDS = ["name", "size", "x", "snapshot", "snapshots", "options", "volumes", "there"]
LISTED = '{"name":"q","snapshots":[{"name":"s","created_at":"","size":""}]}'


@pytest.mark.parametrize(
    ("kind", "body", "reason"),
    [
        (VolumeRequest, "{}", "name is missing"),
        (VolumeRequest, '{"name":"q","size":"1"}', "unknown key 'size'; it takes name"),
        (SnapshotRequest, '{"name":"q"}', "snapshot is missing"),
        (
            SnapshotRequest,
            '{"name":"q","snapshot":null}',
            "snapshot must be a string, not None",
        ),
        (TakeOverAnswer, '{"name":"q"}', "hosts is missing"),
        (TakeOverAnswer, '{"name":"q","hosts":"a"}', "hosts must be texts, not 'a'"),
        (TakeOverAnswer, '{"name":"q","hosts":[1]}', "hosts must be texts, not [1]"),
        (SnapshotsAnswer, '{"name":"q"}', "snapshots is missing"),
        (SnapshotsAnswer, '{"name":"q","snapshots":5}', "snapshots must be objects"),
        (SnapshotsAnswer, '{"name":"q","snapshots":null}', "snapshots must be objects"),
        (SnapshotsAnswer, '{"name":"q","snapshots":"a"}', "snapshots must be objects"),
        (SnapshotsAnswer, '{"name":"q","snapshots":[5]}', "snapshots must be objects"),
        (SnapshotsAnswer, '{"name":"q","snapshots":[{}]}', "name is missing"),
        (
            SnapshotsAnswer,
            LISTED.replace('"s"', "1"),
            "name must be a string, not 1",
        ),
        (
            SnapshotsAnswer,
            LISTED.replace("size", "soze"),
            "unknown key 'soze'",
        ),
        (AdoptableRequest, '{"name":"d"}', "options is missing"),
        (AdoptableRequest, '{"options":{}}', "name is missing"),
        (
            AdoptableRequest,
            '{"name":"d","options":{"a":1}}',
            "options must hold strings",
        ),
        (
            AdoptableRequest,
            '{"name":"d","options":[]}',
            "options must hold strings, not []",
        ),
        (AdoptRequest, '{"name":"q","driver":"d","options":{}}', "there is missing"),
        (
            AdoptRequest,
            '{"name":"q","driver":"d","options":{},"there":1}',
            "there must be a string, not 1",
        ),
        (
            AdoptRequest,
            '{"name":"q","driver":"d","options":{},"there":"x","as":"y"}',
            "unknown key 'as'",
        ),
        (AdoptableAnswer, "{}", "volumes is missing"),
        (AdoptableAnswer, '{"volumes":{}}', "volumes must be objects"),
        (AdoptableAnswer, '{"volumes":[1]}', "volumes must be objects"),
        (AdoptableAnswer, '{"volumes":[{"name":"x"}]}', "volume is missing"),
        (
            AdoptableAnswer,
            '{"volumes":[{"name":"x","volume":null}]}',
            "volume must be a string, not None",
        ),
    ],
)
def test_what_is_no_message_of_its_kind(
    kind: type[attrs.AttrsInstance], body: str, reason: str
) -> None:
    """Each is held to its form, down to the entries of a list."""
    with pytest.raises(InvalidArgument) as caught:
        messages.decode(body.encode(), kind)
    assert reason in str(caught.value)


@given(
    st.binary()
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(WORDS), inner, max_size=4)
        ),
    ).map(lambda value: json.dumps(value).encode()),
    st.sampled_from(
        [
            *(ResizeRequest, VolumeRequest, SnapshotRequest, SnapshotsAnswer),
            *(AdoptableRequest, AdoptRequest, AdoptableAnswer),
        ]
    ),
)
def test_any_body_is_a_message_or_refused(
    body: bytes, kind: type[attrs.AttrsInstance]
) -> None:
    """No body escapes as another error."""
    try:
        messages.decode(body, kind)
    except InvalidArgument as error:
        assert str(error)  # noqa: PT017 - may also be right


def test_the_faults_told_are_bounded() -> None:
    """A body of a thousand unknown keys gets a short answer."""
    body = json.dumps({"name": "q", **dict.fromkeys(map(str, range(1000)), "")})
    with pytest.raises(InvalidArgument) as caught:
        messages.decode(body.encode(), ResizeRequest)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_error_is_the_same_at_the_other_end(kind: type[VolpluginError]) -> None:
    """Each code becomes the class that it came from, with its message alone."""
    body = messages.encode(Failure.of(kind("it is so\nand so")))
    assert json.loads(body)["code"] == kind.code.name
    error = messages.decode(body, Failure).error()
    assert type(error) is kind
    assert str(error) == "it is so\nand so"


def test_every_code_has_a_name_on_the_wire() -> None:
    """A code that is not known here, a newer server's, is `Internal` with its text."""
    assert {kind.code for kind in KINDS} == set(Code)
    error = Failure(code="TOO_NEW", message="of another time").error()
    assert type(error) is Internal
    assert str(error) == "of another time"


@pytest.mark.parametrize(
    ("size", "inodes", "changes"),
    [
        ("20G", None, {"size": "20G"}),
        (None, "1m", {"inodes": "1m"}),
        ("20G", "1m", {"size": "20G", "inodes": "1m"}),
        ("", None, {"size": ""}),
    ],
)
def test_what_is_asked_for(
    size: str | None, inodes: str | None, changes: dict[str, str]
) -> None:
    """Only what was given is changed; an empty text is for the driver to refuse."""
    assert ResizeRequest(name="q", size=size, inodes=inodes).changes() == changes


def test_nothing_to_change() -> None:
    """A resize to nothing is refused, before any server is asked."""
    with pytest.raises(InvalidArgument, match="nothing to change"):
        ResizeRequest(name="q").changes()
    with pytest.raises(InvalidArgument, match="nothing to change"):
        AdminClient("/nowhere").resize("q")


def test_messages_are_values() -> None:
    """A message can't be changed once it is made."""
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        ResizeRequest(name="q").name = "r"  # type: ignore[misc]


def test_a_large_request_fits() -> None:
    """The longest name and words are far below the body's limit."""
    request = ResizeRequest(name="q" * 255, size="1" * 2048, inodes="1" * 2048)
    assert len(messages.encode(request)) < protocol.BODY_LIMIT / 100


# The command's words


def test_the_help_teaches() -> None:
    """Examples, what grows and shrinks online, and where the server is found."""
    done = CliRunner().invoke(cli, ["volume", "resize", "--help"], terminal_width=88)
    shown = " ".join(done.output.split())
    assert done.exit_code == 0
    assert "\n    volplugin volume resize db 20G\n" in done.output
    assert "NAME [SIZE]" in done.output
    for text in ("project quota", "btrfs", "ext4 it shrinks only", "XFS never"):
        assert text in shown
    assert "[default: /run/volplugin/admin.sock]" in shown


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["q"], "nothing to change: give SIZE or --inodes, or both"),
        ([], "Missing argument 'NAME'"),
        (["q", "1G", "2G"], "unexpected extra argument"),
        (["q", "--size", "1G"], "No such option"),
    ],
)
def test_wrong_words(arguments: list[str], reason: str) -> None:
    """What can't be meant is told with status 2, as by every command."""
    done = CliRunner().invoke(cli, ["volume", "resize", *arguments])
    assert done.exit_code == 2
    assert reason.lower() in done.output.lower()


@pytest.mark.parametrize(
    ("words", "texts"),
    [
        (
            ["volume", "takeover"],
            ["volplugin volume takeover pg", "blocklisted", "not yet synced"],
        ),
        (
            ["snapshot", "create"],
            ["volplugin snapshot create pg@monday", "power cut"],
        ),
        (
            ["volume", "adopt"],
            [
                "volplugin volume adopt --driver plugin=rclone photos",
                "nothing is copied or moved",
                "the plugin keeps it",
            ],
        ),
        (["snapshot", "ls"], ["oldest first"]),
        (["snapshot", "rm"], ["Refused while volumes"]),
        (["snapshot"], ["-o from=VOLUME@SNAPSHOT", "create", "ls", "rm"]),
    ],
    ids=" ".join,
)
def test_the_help_of_the_others_teaches(words: list[str], texts: list[str]) -> None:
    """An example, and what to know before."""
    done = CliRunner().invoke(cli, [*words, "--help"], terminal_width=88)
    assert done.exit_code == 0
    shown = " ".join(done.output.split())
    for text in texts:
        assert text in shown
    if len(words) == 2:
        assert "[default: /run/volplugin/admin.sock]" in shown


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["volume", "takeover"], "Missing argument 'NAME'"),
        (["volume", "takeover", "a", "b"], "unexpected extra argument"),
        (["volume", "adopt", "x"], "Missing option '--driver'"),
        (["volume", "adopt", "--driver", "plugin"], "give VOLUME..., or --all, or"),
        (["volume", "adopt", "--driver", "p", "x", "--all"], "give VOLUME..., or"),
        (["volume", "adopt", "--driver", "p", "--list", "--all"], "give VOLUME..., or"),
        (
            ["volume", "adopt", "--driver", "p", "a", "b", "--as", "c"],
            "--as is for one",
        ),
        (["volume", "adopt", "--driver", "p", "--all", "--as", "c"], "--as is for one"),
        (
            ["volume", "adopt", "--driver", "p", "--list", "--as", "c"],
            "--as is for one",
        ),
        (["snapshot", "ls"], "Missing argument 'VOLUME'"),
        (["snapshot", "create"], "Missing argument 'VOLUME@SNAPSHOT'"),
        (["snapshot", "create", "pg"], "'pg': give VOLUME@SNAPSHOT"),
        (["snapshot", "create", "pg@"], "'pg@': give VOLUME@SNAPSHOT"),
        (["snapshot", "rm", "@monday"], "'@monday': give VOLUME@SNAPSHOT"),
        (["snapshot", "drop", "pg@x"], "No such command"),
    ],
)
def test_wrong_words_of_the_others(arguments: list[str], reason: str) -> None:
    """They are told with status 2 too."""
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 2
    assert reason.lower() in done.output.lower()


def test_a_managed_plugin_is_found_in_the_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nobody says otherwise, and no server is at the usual place."""
    monkeypatch.setattr(volumes, "DEFAULT_ADMIN_SOCKET", str(tmp_path / "usual"))
    monkeypatch.setenv("VOLPLUGIN_CONFIG", "/dev/null")
    monkeypatch.setenv("VOLPLUGIN_ROOT", str(tmp_path))
    monkeypatch.setenv("VOLPLUGIN_ADMIN_SOCKET", str(tmp_path / "usual"))

    def told() -> str:
        done = CliRunner().invoke(cli, ["volume", "release", "db"])
        assert done.exit_code == 1
        return str(done.output)

    assert f"no server listens on {tmp_path}/usual:" in told()
    (tmp_path / "admin.sock").touch()
    assert f"no server listens on {tmp_path}/admin.sock:" in told()
    (tmp_path / "usual").touch()
    assert f"no server listens on {tmp_path}/usual:" in told()
    (tmp_path / "usual").unlink()
    monkeypatch.setenv("VOLPLUGIN_ADMIN_SOCKET", str(tmp_path / "other"))
    assert f"no server listens on {tmp_path}/other:" in told()
