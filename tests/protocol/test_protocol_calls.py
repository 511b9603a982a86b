"""Every call on the wire: what the engines send, byte for byte, and what comes back."""

import concurrent.futures
import contextlib
import datetime as dt
import json
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from peers import mounts_below, scratch, serving
from support.client import Answer
from support.plugin import Plugin
from wire import CONTENT_TYPE, Wire, connected, post

pytestmark = pytest.mark.root

ID: Final = "3f2a" * 16
NEED_A_BODY: Final = ("Create", "Remove", "Mount", "Unmount", "Path", "Get")
PODMAN: Final = (
    "Host: plugin\r\nUser-Agent: Go-http-client/1.1\r\n"
    "Content-Type: application/json\r\nAccept-Encoding: gzip\r\n"
)
IMPLEMENTS: Final = b'{"Implements":["VolumeDriver"]}'
POUCH: Final = "Host: \r\nUser-Agent: Go-http-client/1.1\r\nAccept: */*\r\n"


@pytest.fixture(scope="module")
def server() -> Iterator[Plugin]:
    """A server that the module shares: each test removes its volumes."""
    with scratch() as folder, serving(folder) as plugin:
        yield plugin


@pytest.fixture
def plugin(server: Plugin) -> Iterator[Plugin]:
    """The server, with no volume before and after."""
    assert server.client.list() == {}
    yield server
    for name in server.client.list():
        while server.client.get(name)["Status"]["mounts"]:
            server.client.unmount(name, ID)
        server.client.remove(name)
    assert server.is_running()


@pytest.fixture
def wire(plugin: Plugin) -> Iterator[Wire]:
    """A connection, kept alive over a test."""
    with connected(plugin.socket) as wire:
        yield wire


def body(**message: object) -> bytes:
    """Return a message as dockerd writes it: compact, with a newline."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def assert_answer(answer: Answer, status: int, content: bytes) -> None:
    """Hold an answer to its bytes and to the headers that every one has."""
    assert (answer.status, answer.body) == (status, content)
    assert answer.headers["Content-Type"] == CONTENT_TYPE
    assert "Transfer-Encoding" not in answer.headers


def test_activate(wire: Wire) -> None:
    """The handshake tells dockerd what we are, without a body to ask for it."""
    answer = wire.ask(post("Plugin.Activate"))
    assert_answer(answer, 200, IMPLEMENTS)


def test_capabilities(wire: Wire) -> None:
    """The scope is local, whatever is asked with."""
    for content in (b"{}\n", b"", b"{}"):
        answer = wire.ask(post("Capabilities", content))
        assert_answer(answer, 200, b'{"Capabilities":{"Scope":"local"}}')


def test_a_life(plugin: Plugin, wire: Wire) -> None:
    """Each call of a volume's life has the bytes that the protocol asks for."""
    path = plugin.root / "local" / "volumes" / "db"
    named, held = body(Name="db"), body(Name="db", ID=ID)
    where = b'{"Mountpoint":"%s"}' % bytes(path)
    listed = b'{"Volumes":[{"Name":"db","Mountpoint":"%s"}]}' % bytes(path)
    for call, sent, content in (
        ("List", b"{}\n", b'{"Volumes":[]}'),
        ("Create", body(Name="db", Opts=None), b"{}"),
        ("List", b"{}\n", listed),
        ("Path", named, where),
        ("Mount", held, where),
        ("Path", named, where),
        ("Unmount", held, b"{}"),
        ("Remove", named, b"{}"),
        ("List", b"{}\n", b'{"Volumes":[]}'),
    ):
        assert_answer(wire.ask(post(call, sent)), 200, content)
    for call in ("Get", "Path", "Mount", "Unmount", "Remove"):
        message = f"{call.lower()} db: no such volume"
        content = json.dumps({"Err": message}, separators=(",", ":")).encode()
        assert_answer(wire.ask(post(call, held)), 500, content)


@pytest.mark.parametrize("driver", ["local", "tmpfs"])
def test_get(plugin: Plugin, wire: Wire, driver: str) -> None:
    """Get has the four fields, in forms that dockerd does not take for "not there"."""
    wire.ask(post("Create", body(Name="db", Opts={"driver": driver})))
    before = wire.ask(post("Get", body(Name="db"))).json
    mounted = wire.ask(post("Mount", body(Name="db", ID=ID))).json
    during = wire.ask(post("Get", body(Name="db"))).json
    for answer in (before, during):
        assert list(answer) == ["Volume"]
        volume = answer["Volume"]
        assert list(volume) == ["Name", "Mountpoint", "CreatedAt", "Status"]
        assert volume["Name"] == "db"
        assert volume["Mountpoint"] == mounted["Mountpoint"]
        rfc3339 = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)"
        assert re.fullmatch(rfc3339, volume["CreatedAt"])
        age = dt.datetime.now(dt.UTC) - dt.datetime.fromisoformat(volume["CreatedAt"])
        assert dt.timedelta() <= age < dt.timedelta(minutes=5)
        # PouchContainer takes "ref" for its own and then refuses to remove the volume.
        assert isinstance(volume["Status"], dict)
        assert "ref" not in volume["Status"]
        assert volume["Status"]["driver"] == driver
    assert before["Volume"]["Status"]["mounts"] == 0
    assert during["Volume"]["Status"]["mounts"] == 1
    assert Path(mounted["Mountpoint"]).is_dir()


@pytest.mark.parametrize(
    "content",
    [
        b'{"Name":"v","Opts":null}\n',
        b'{"Name":"v","Opts":{}}\n',
        b'{"Name":"v"}\n',
        b'{"Name":"v","Opts":{"driver":"local"}}\n',
        b' \r\n\t{ "Opts" : {"opt.driver": "local"}, "Name" : "v" , "More": [1]}',
        b'\xef\xbb\xbf{"Name":"v"}',
        b'{"Name":"w","Name":"v"}',
        b'{"Name":"\\u0076"}',
    ],
)
def test_create_however_it_is_written(
    plugin: Plugin, wire: Wire, content: bytes
) -> None:
    """All ways to write one create make one volume; a repeated key counts last."""
    for _ in range(2):
        assert_answer(wire.ask(post("Create", content)), 200, b"{}")
    assert list(plugin.client.list()) == ["v"]


def test_podman(plugin: Plugin, wire: Wire) -> None:
    """Podman sends a Content-Type, and nothing at all for a list."""
    create = body(Name="v", Opts={})[:-1]
    assert_answer(wire.ask(post("Plugin.Activate", headers=PODMAN)), 200, IMPLEMENTS)
    assert_answer(wire.ask(post("Create", create, headers=PODMAN)), 200, b"{}")
    listed = wire.ask(post("List", headers=PODMAN)).json
    assert [volume["Name"] for volume in listed["Volumes"]] == ["v"]
    got = wire.ask(post("Get", body(Name="v")[:-1], headers=PODMAN))
    assert got.json["Volume"]["Name"] == "v"


def test_pouch(plugin: Plugin, wire: Wire) -> None:
    """Pouch adds its own driver's name and its selectors to a plugin's volume."""
    options = {"backend": "local", "selector.zone": "a", "opt.mode": "0700"}
    create = body(Name="v", Opts=options)
    assert_answer(wire.ask(post("Create", create, headers=POUCH)), 200, b"{}")
    path = wire.ask(post("Path", body(Name="v"), headers=POUCH)).json["Mountpoint"]
    assert Path(path).stat().st_mode & 0o7777 == 0o700


def test_nothing_to_activate(plugin: Plugin) -> None:
    """A server that never saw Plugin.Activate answers: dockerd sends it once only."""
    plugin.restart()
    for call in ("List", "Capabilities"):
        with connected(plugin.socket) as wire:
            assert wire.ask(post(call, b"{}\n")).status == 200


def test_a_connection_is_kept(plugin: Plugin) -> None:
    """One connection takes call after call, errors between them."""
    with connected(plugin.socket) as wire:
        for _ in range(50):
            answer = wire.ask(post("List", b"{}\n"))
            assert answer.headers.get("Connection", "keep-alive") == "keep-alive"
            assert wire.ask(post("Get", body(Name="nobody"))).status == 500
            assert wire.ask(post("Get", b"[]")).status == 400


def test_parallel_connections(plugin: Plugin) -> None:
    """Calls on many connections are answered each with its own answer."""

    def look(number: int) -> None:
        with connected(plugin.socket) as wire:
            for _ in range(10):
                answer = wire.ask(post("Get", body(Name=f"v{number}"))).json
                assert answer == {"Err": f"get v{number}: no such volume"}

    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        list(pool.map(look, range(64)))


def test_pipelining(plugin: Plugin, wire: Wire) -> None:
    """Calls written ahead are answered in their order."""
    names = [f"v{number}" for number in range(20)]
    wire.send(b"".join(post("Get", body(Name=name)) for name in names))
    for name in names:
        answer = wire.answer()
        assert answer is not None
        assert answer.json == {"Err": f"get {name}: no such volume"}


def test_http_1_0(plugin: Plugin) -> None:
    """A client of HTTP/1.0 is answered and its connection closed."""
    with connected(plugin.socket) as wire:
        answer = wire.ask(post("List", b"{}", headers="", version="1.0"))
        assert_answer(answer, 200, b'{"Volumes":[]}')
        assert wire.answer() is None


@pytest.mark.parametrize(
    "path", ["/", "/VolumeDriver.Nothing", "/VolumeDriver.get", "/x%00y", "/../../etc"]
)
def test_unknown_calls(plugin: Plugin, path: str) -> None:
    """What is no call is 404, with the reason where engines look for it."""
    answer = plugin.client.request(path, b"{}")
    assert answer.status == 404
    assert answer.headers["Content-Type"] == CONTENT_TYPE
    assert answer.json["Err"].startswith("there is no call '/")


@pytest.mark.parametrize("verb", ["GET", "PUT", "DELETE", "PATCH"])
def test_other_methods(plugin: Plugin, verb: str) -> None:
    """A call made by another method than POST does nothing."""
    content = body(Name="v")
    answer = plugin.client.request("/VolumeDriver.Create", content, verb=verb)
    assert (answer.status, answer.json) == (
        405,
        {"Err": f"Create takes POST, not {verb}"},
    )
    assert plugin.client.list() == {}


@pytest.mark.parametrize("content", [b"", b"\n", b"  \r\n "])
@pytest.mark.parametrize("call", NEED_A_BODY)
def test_no_body(plugin: Plugin, call: str, content: bytes) -> None:
    """A call without its body is dropped unanswered: dockerd's retry has none.

    An error would read as "no such volume" to its Get.
    """
    plugin.client.create("v", {"driver": "tmpfs"})
    plugin.client.mount("v", ID)
    before = (
        plugin.client.list(),
        plugin.client.get("v"),
        mounts_below(plugin.root.parent),
    )
    with connected(plugin.socket) as wire:
        wire.send(post(call, content))
        assert wire.answer() is None
    after = (
        plugin.client.list(),
        plugin.client.get("v"),
        mounts_below(plugin.root.parent),
    )
    assert before == after


@pytest.mark.parametrize(
    "content",
    [
        b"x",
        b"{",
        b'{"Name":"v"',
        b'{"Name":"v"} {}',
        b"{'Name':'v'}",
        b"null",
        b"[]",
        b'"v"',
        b"1",
        b"NaN",
        b"\xff\xfe\xfd",
        b'{"Name":"\xff"}',
        b"\0" * 20,
        b"[" * 100_000,
        b'{"Name":' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"Opts":' * 2000 + b"1" + b"}" * 2000,
        b'{"Name":' + b"9" * 5000 + b"}",
    ],
    ids=lambda content: repr(content[:24]),
)
@pytest.mark.parametrize("call", ["Create", "Get", "List", "Plugin.Activate"])
def test_no_json(plugin: Plugin, wire: Wire, call: str, content: bytes) -> None:
    """What is not a JSON object is 400, with the reason, on any call."""
    answer = wire.ask(post(call, content))
    assert answer.status == 400
    assert answer.json["Err"].startswith("the body is ")
    assert len(answer.body) < 1000
    assert plugin.client.list() == {}


@pytest.mark.parametrize(
    ("call", "content", "complaint"),
    [
        ("Create", b'{"Name":1}', "Name must be a string, not 1"),
        ("Create", b'{"Name":["v"]}', "Name must be a string, not ['v']"),
        ("Create", b'{"Name":NaN}', "Name must be a string, not nan"),
        ("Create", b'{"Name":' + b"9" * 4000 + b"}", "Name must be a string, not 999"),
        ("Create", b'{"Name":"v","Opts":[]}', "Opts must be an object, not []"),
        ("Create", b'{"Name":"v","Opts":"a"}', "Opts must be an object, not 'a'"),
        ("Create", b'{"Name":"v","Opts":{"mode":1}}', "'mode' must be a string, not 1"),
        ("Create", b'{"Name":"v","Opts":{"mode":null}}', "must be a string, not None"),
        ("Create", b'{"Name":"v","Opts":{"mode":{}}}', "must be a string, not {}"),
        ("Create", b'{"Name":"v","Opts":{"a":"\\ud800"}}', "is not valid UTF-8"),
        ("Create", b'{"Name":"v","Opts":{"\\udfff":"a"}}', "is not valid UTF-8"),
        ("Create", b'{"Name":"\\ud800"}', "volume name '\\ud800': a name begins"),
        ("Create", b'{"Name":null}', "volume name '': a name begins"),
        ("Create", b"{}", "volume name '': a name begins"),
        ("Mount", b'{"Name":"v","ID":7}', "ID must be a string, not 7"),
        ("Mount", b'{"Name":"v","ID":"\\ud800"}', "printable characters"),
        ("Mount", b'{"Name":"v","ID":"a\\nb"}', "printable characters"),
        ("Unmount", b'{"Name":"v","ID":"\\u0000"}', "printable characters"),
        ("Mount", b'{"Name":"v","ID":"%s"}' % (b"i" * 1025), "at most 1024"),
        ("Get", b'{"Name":{}}', "Name must be a string, not {}"),
        ("Path", b'{"Name":"' + b"v" * 256 + b'"}', "255 is the limit"),
    ],
)
def test_wrong_types(
    plugin: Plugin, wire: Wire, call: str, content: bytes, complaint: str
) -> None:
    """JSON of a wrong form is an error of the call, which names the value."""
    answer = wire.ask(post(call, content))
    assert answer.status == 500
    assert answer.json["Err"].startswith(f"{call.lower()}")
    assert complaint in answer.json["Err"]
    assert len(answer.body) < 1500
    assert plugin.client.list() == {}


def test_deep_values(plugin: Plugin, wire: Wire) -> None:
    """At no depth does a value bring the server down, or its stack to light."""
    for depth in (*range(10, 900, 100), *range(900, 1010, 3)):
        for value in (
            b"[" * depth + b"]" * depth,
            b'{"a":' * depth + b"1" + b"}" * depth,
        ):
            answer = wire.ask(post("Create", b'{"Name":' + value + b"}"))
            assert answer.status in {400, 500}
            assert "internal" not in answer.json["Err"]


NAMES: Final = {
    "../evil": "above",
    "/abs": "absolute",
    "a/b": "path",
    ".": "dot",
    "..": "dots",
    ".hidden": "hidden",
    "-o": "flag",
    "_x": "underscore",
    "a\0b": "NUL",
    "a\n": "newline",
    "\na": "newline-first",
    "a b": "blank",
    "é": "accent",
    "²": "digit-that-is-none",
    "a\u0301": "combining",
    "🐳": "emoji",
    "a" * 300: "long",
    "": "empty",
    " ": "only-blank",
}


@pytest.mark.parametrize("name", NAMES, ids=NAMES.values())
def test_names(plugin: Plugin, wire: Wire, name: str) -> None:
    """dockerd checks no name of a plugin's volume, so every call does."""
    for call in NEED_A_BODY:
        answer = wire.ask(post(call, body(Name=name, ID=ID, Opts=None)))
        assert answer.status == 500
        assert f"{call.lower()}" in answer.json["Err"]
        assert "volume name" in answer.json["Err"]
    assert plugin.client.list() == {}


def test_names_that_are_good(plugin: Plugin, wire: Wire) -> None:
    """The grammar of Docker's local driver, up to 255 bytes, and anonymous volumes."""
    for name in ("a", "0", "A_.-z", "a" * 255, "f" * 64):
        assert wire.ask(post("Create", body(Name=name, Opts={}))).status == 200
        got = wire.ask(post("Get", body(Name=name))).json["Volume"]
        assert got["Name"] == name


@pytest.mark.parametrize("size", [(1 << 20) + 1, 2 << 20, 8 << 20])
def test_a_body_too_large(plugin: Plugin, size: int) -> None:
    """Above 1 MiB a body is refused, with an answer, and the server goes on."""
    content = b'{"Name":"%s"}' % (b"v" * (size - 11))
    with connected(plugin.socket) as wire:
        wire.send(post("Create", content))
        answer = wire.answer()
        assert answer is not None
        assert (answer.status, answer.json) == (
            413,
            {"Err": "the body has more than 1048576 bytes"},
        )
    assert plugin.client.list() == {}


def test_a_body_just_small_enough(plugin: Plugin, wire: Wire) -> None:
    """Below 1 MiB it is read, and what is wrong in it told in few words."""
    content = b'{"Name":"v","Opts":{"a":"%s"}}' % (b"v" * ((1 << 20) - 100))
    answer = wire.ask(post("Create", content))
    assert answer.status == 500
    assert "the options have 1048477 bytes, 2048 is the limit" in answer.json["Err"]


def test_a_compressed_body(plugin: Plugin, wire: Wire) -> None:
    """No engine compresses; what says it is compressed is taken as it is."""
    headers = "Host: \r\nContent-Encoding: gzip\r\n"
    answer = wire.ask(post("Create", b"\x1f\x8b\x08junk", headers=headers))
    assert answer.status == 400


def test_chunked_bodies(plugin: Plugin, wire: Wire) -> None:
    """A body in chunks is read whole; dockerd sends none."""
    head = b"POST /VolumeDriver.Create HTTP/1.1\r\nHost: \r\n"
    chunks = b'4\r\n{"Na\r\n8\r\nme":"v"}\r\n0\r\n\r\n'
    answer = wire.ask(head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks)
    assert_answer(answer, 200, b"{}")
    assert list(plugin.client.list()) == ["v"]


def test_a_slow_body(plugin: Plugin, wire: Wire) -> None:
    """A call that comes byte by byte is answered, and others meanwhile."""
    for byte in post("Create", body(Name="slow", Opts=None)):
        wire.send(bytes([byte]))
        time.sleep(0.001)
        plugin.client.list()
    answer = wire.answer()
    assert answer is not None
    assert_answer(answer, 200, b"{}")


def test_a_slow_reader(plugin: Plugin) -> None:
    """A client that reads no answers holds up nobody but itself."""
    with connected(plugin.socket) as wire:
        wire.socket.settimeout(0.5)
        ahead = post("Get", body(Name="nobody")) * 1000
        with contextlib.suppress(TimeoutError):  # current aiohttp stops to read then
            for _ in range(20):
                wire.socket.sendall(ahead)
        assert plugin.client.list() == {}


@pytest.mark.parametrize(
    "garbage",
    [
        b"GARBAGE\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)),
        b"POST /VolumeDriver.List HTTP/1.1\r\nHost: \r\nContent-Length: x\r\n\r\n",
        b"POST /VolumeDriver.List HTTP/1.1\r\nHost: \r\nContent-Length: -1\r\n\r\n",
        b"POST /Volume\0Driver.List HTTP/1.1\r\nHost: \r\n\r\n",
        b"POST /VolumeDriver.List HTTP/1.1\r\nHost: \r\nX: "
        + b"a" * 99_999
        + b"\r\n\r\n",
        b"POST /VolumeDriver.List HTTP/1.1\r\nHost: \r\n"
        b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
    ids=lambda garbage: repr(garbage[-24:]),
)
def test_garbage(plugin: Plugin, garbage: bytes) -> None:
    """What is no HTTP is refused; the log has a line on it, and no stack trace."""
    with connected(plugin.socket) as wire:
        wire.send(garbage)
        answer = wire.answer()
        assert answer is None or answer.status in {400, 505}
        assert wire.answer() is None
    assert plugin.client.list() == {}
    assert "Traceback" not in plugin.log


@pytest.mark.parametrize("call", NEED_A_BODY)
def test_a_client_that_leaves_in_its_body(plugin: Plugin, call: str) -> None:
    """Half a call has no effect; that its client left is no error of ours."""
    whole = post(call, body(Name="v", ID=ID, Opts={}))
    for shut in (True, False):
        with connected(plugin.socket) as wire:
            wire.send(whole[:-5])
            if shut:
                wire.socket.shutdown(socket.SHUT_WR)
                assert wire.answer() is None
    assert plugin.client.list() == {}
    assert "Traceback" not in plugin.log


def test_half_closed(plugin: Plugin) -> None:
    """A client that will write no more may get no answer, and loses nothing by it."""
    with connected(plugin.socket) as wire:
        wire.send(post("Get", body(Name="v")))
        wire.socket.shutdown(socket.SHUT_WR)
        answer = wire.answer()
        assert answer is None or answer.status == 500
        assert wire.answer() is None


def test_idle_connections(plugin: Plugin) -> None:
    """Connections that say nothing cost nobody anything, and end with the server."""
    idle = [Wire(plugin.socket) for _ in range(200)]
    try:
        assert plugin.client.list() == {}
        started = time.monotonic()
        plugin.restart()
        assert time.monotonic() - started < 10
        assert all(wire.answer() is None for wire in idle)
    finally:
        for wire in idle:
            wire.close()


def test_each_call_is_logged(plugin: Plugin) -> None:
    """The log has a line for each call with volume, call, time and outcome."""
    plugin.client.create("logged")
    plugin.client.call("Create", {"Name": "logged", "Opts": {"mode": "0700"}})
    plugin.client.remove("logged")
    seen: list[dict[str, Any]] = []

    def look() -> bool:
        entries = [json.loads(line) for line in plugin.log.splitlines()]
        calls = [e["fields"] for e in entries if e["event"] == "call"]
        seen[:] = [call for call in calls if call["volume"] == "logged"]
        return len(seen) == 3

    deadline = time.monotonic() + 10
    while not look() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert [call["op"] for call in seen] == ["Create", "Create", "Remove"]
    assert [call["outcome"][:14] for call in seen] == ["ok", "already_exists", "ok"]
    assert all(isinstance(call["ms"], float) for call in seen)
