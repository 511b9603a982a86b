"""``serve --record``: what is in the file, and what it never does to a call."""

import contextlib
import json
import os
import re
import signal
import stat
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import pytest
from peers import lives_of, mounts_below, scratch, serving, with_tmpfs
from support.client import Client
from support.commands import run
from support.disks import disk
from support.plugin import Plugin, plugin_environment
from support.wait import eventually
from wire import CONTENT_TYPE, Wire, connected, post

from volplugin import __version__, recorder

pytestmark = pytest.mark.root

TIME: Final = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
DRIVER: Final = "/VolumeDriver."


@pytest.fixture
def folder() -> Iterator[Path]:
    """A place for a server."""
    with scratch() as folder:
        yield folder


@pytest.fixture
def file(folder: Path) -> Path:
    """The recording."""
    return folder / "calls.jsonl"


@pytest.fixture
def plugin(folder: Path, file: Path) -> Iterator[Plugin]:
    """A server that records."""
    with recording_to(folder, file) as plugin:
        yield plugin


@contextlib.contextmanager
def recording_to(folder: Path, file: Path, *, failpoints: str = "") -> Iterator[Plugin]:
    config = f"record = {json.dumps(str(file))}"
    with serving(folder, config=config, failpoints=failpoints) as plugin:
        yield plugin


@pytest.fixture
def wire(plugin: Plugin) -> Iterator[Wire]:
    """A connection."""
    with connected(plugin.socket) as wire:
        yield wire


def lines(file: Path) -> list[Any]:
    """Return the recording's entries; each line must be one."""
    text = file.read_text(encoding="ascii")
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def calls(file: Path) -> list[Any]:
    """Return what was recorded of requests, Plugin.Activate of the tests left out."""
    return [
        entry
        for entry in lines(file)
        if "request" in entry
        and "Plugin.Activate" not in entry["request"].get("line", "")
    ]


def recorded(file: Path, count: int = 1) -> list[Any]:
    """Return the calls, once there are so many."""
    eventually(lambda: len(calls(file)) >= count, f"{count} calls are recorded")
    found = calls(file)
    assert len(found) == count
    return found


# What is in it


def test_a_call(plugin: Plugin, wire: Wire, file: Path) -> None:
    """All of it: when, where, who, the bytes of the request, the answer, how long."""
    request = (
        b"POST /VolumeDriver.Create HTTP/1.1\r\nHost: \r\nuser-AGENT: x\r\n"
        b'X-Two: 1\r\nX-Two:2\r\nContent-Length: 26\r\n\r\n{"Name":"v" ,"Opts":null}\n'
    )
    before = time.time()
    answer = wire.ask(request)
    (call,) = recorded(file)
    assert list(call) == [
        *("time", "socket", "connection", "client", "request", "answer", "ms")
    ]
    assert re.fullmatch(TIME, call["time"])
    assert abs(moment(call["time"]) - before) < 5
    assert call["socket"] == str(plugin.socket)
    started = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
    assert call["client"] == {
        "program": Path("/proc/self/comm").read_text().strip(),
        "pid": os.getpid(),
        "started": int(started),
    }
    assert call["request"] == {
        "line": "POST /VolumeDriver.Create HTTP/1.1",
        "headers": [
            *("Host: ", "user-AGENT: x", "X-Two: 1", "X-Two:2", "Content-Length: 26")
        ],
        "body": '{"Name":"v" ,"Opts":null}\n',
    }
    assert bytes_of(call["request"]) == request
    assert call["answer"] == {
        "status": 200,
        "headers": [f"{name}: {value}" for name, value in answer.headers.items()],
        "body": "{}",
    }
    assert answer.headers["Content-Type"] == CONTENT_TYPE
    assert 0 < call["ms"] < 5000


def moment(text: str) -> float:
    return time.mktime(time.strptime(text[:19], "%Y-%m-%dT%H:%M:%S")) - time.timezone


def bytes_of(request: dict[str, Any]) -> bytes:
    """Return a request as it was sent."""
    head = "\r\n".join([request["line"], *request["headers"], "", ""])
    return f"{head}{request['body']}".encode(errors="surrogateescape")


def test_how_it_begins(plugin: Plugin, file: Path) -> None:
    """The version and the pid stand before the calls of each life of a server."""
    eventually(lambda: file.exists() and lines(file), "it is written")
    begin, *_ = lines(file)
    assert re.fullmatch(TIME, begin.pop("time"))
    assert begin == {"version": __version__, "pid": plugin.pid}


def test_bytes_that_are_no_text(wire: Wire, file: Path) -> None:
    """They can be had back from the text."""
    request = post("Get", b'{"Name":"\xff\xfe\xc3\xb6"}')
    assert wire.ask(request).status == 400
    (call,) = recorded(file)
    assert call["request"]["body"] == '{"Name":"\udcff\udcfe\xf6"}'
    assert bytes_of(call["request"]) == request


def test_connections_are_told_apart(plugin: Plugin, file: Path) -> None:
    """Each has its number, and its client its name and pid."""
    with lives_of(plugin) as lives, connected(plugin.socket) as wire:
        podman = lives.begin("podman")
        wire.ask(post("List"))
        podman.call("Get", {"Name": "w"})
        wire.ask(post("List"))
        mine, others, again = recorded(file, 3)
        assert others["client"]["program"] == "podman"
        assert others["client"]["pid"] == podman.pid
    assert mine["connection"] == again["connection"] != others["connection"]


def test_pipelined_calls(wire: Wire, file: Path) -> None:
    """Each has its own answer."""
    wire.send(post("Get", b'{"Name":"a"}') + post("Get", b'{"Name":"b"}'))
    assert [wire.answer() is not None for _ in "ab"] == [True, True]
    for name, call in zip("ab", recorded(file, 2), strict=True):
        assert json.loads(call["request"]["body"]) == {"Name": name}
        assert call["answer"]["body"] == f'{{"Err":"get {name}: no such volume"}}'


def test_a_call_without_an_answer(wire: Wire, file: Path) -> None:
    """An empty body is answered by a closed connection, and that is told."""
    wire.send(post("Get"))
    assert wire.answer() is None
    (call,) = recorded(file)
    assert (call["answer"], call["closed"]) == (None, "server")
    assert call["request"]["line"] == "POST /VolumeDriver.Get HTTP/1.1"


def test_a_client_that_leaves(folder: Path, file: Path) -> None:
    """A call whose client did not wait has no answer, and it is told who left."""
    with recording_to(folder, file, failpoints="tmpfs.attach=sleep:1*1") as plugin:
        plugin.client.create("v", {"driver": "tmpfs"})
        with connected(plugin.socket) as wire:
            wire.send(post("Mount", b'{"Name":"v","ID":"x"}'))
            time.sleep(0.2)
        _, mount = recorded(file, 2)
        assert (mount["answer"], mount["closed"]) == (None, "client")
        assert 150 < mount["ms"] < 900
        eventually(lambda: not mounts_below(folder), "the mount is taken back")
        plugin.client.remove("v")


def test_half_a_request(plugin: Plugin, file: Path) -> None:
    """What came of it is there."""
    with connected(plugin.socket) as wire:
        wire.send(post("Get", b'{"Name":"v"}')[:-4])
        time.sleep(0.1)
    (call,) = recorded(file)
    assert call["request"]["body"] == '{"Name":'
    assert call["request"]["incomplete"]
    assert (call["answer"], call["closed"]) == (None, "client")


@pytest.mark.parametrize(
    "request_", [b"\x16\x03\x01\x00\xa5\x01\0", b"GET / HTTP/1.1\nHost: x\n\n\xff"]
)
def test_no_http(wire: Wire, file: Path, request_: bytes) -> None:
    """Bytes that are no request are there as they came."""
    wire.send(request_)
    answer = wire.answer()
    (call,) = recorded(file)
    assert call["request"]["unreadable"].encode(errors="surrogateescape") == request_
    assert answer is not None
    assert call["answer"]["status"] == answer.status == 400
    assert call["answer"]["body"].encode() == answer.body


def test_a_body_that_is_too_large(wire: Wire, file: Path) -> None:
    """The recording keeps 64 KiB of it, and counts the rest."""
    size = (2 << 20) + 5
    wire.send(post("Get", b"x" * size))
    answer = wire.answer()
    wire.close()
    (call,) = recorded(file)
    assert answer is not None
    assert call["answer"]["status"] == answer.status == 413
    assert len(call["request"]["body"]) + call["request"]["cut"] <= size
    assert len(call["request"]["body"]) == 64 << 10


def test_parallel_calls(plugin: Plugin, file: Path) -> None:
    """Every one of them is there once, whole."""
    names = [f"v{number}" for number in range(400)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda name: plugin.client.call("Get", {"Name": name}), names))
    found = recorded(file, len(names))
    told = {json.loads(call["request"]["body"])["Name"]: call for call in found}
    assert sorted(told) == sorted(names)
    for name, call in told.items():
        assert call["answer"]["body"] == f'{{"Err":"get {name}: no such volume"}}'
    assert len({call["connection"] for call in found}) == len(names)


def test_the_admin_socket_is_not_recorded(plugin: Plugin, file: Path) -> None:
    """Operators' calls are none of an engine."""
    done = subprocess.run(
        plugin.resize("v", "1G"), env=plugin_environment(), check=False
    )
    assert done.returncode != 0
    plugin.client.list()
    recorded(file, 1)


def test_secrets_are_blanked(plugin: Plugin, file: Path) -> None:
    """Neither the request nor an error that quotes it has them."""
    asked = {"mount": "relative,password=hunter2", "api-key": "hunter3", "uid": "1"}
    status, answer = plugin.client.call("Create", {"Name": "w", "Opts": asked})
    assert (status, "hunter2" in answer["Err"]) == (500, True)
    with connected(plugin.socket) as wire:
        headers = "Host: \r\nAuthorization: Basic hunter4\r\n"
        wire.ask(post("Get", b'{"Name":"v"}', headers=headers))
    create, get = recorded(file, 2)
    assert "hunter" not in file.read_text()
    assert json.loads(create["request"]["body"])["Opts"] == {
        "mount": "relative,password=***",
        "api-key": "***",
        "uid": "1",
    }
    assert "password=***" in json.loads(create["answer"]["body"])["Err"]
    assert get["request"]["headers"][1] == "Authorization: ***"


def test_a_stop_tells_of_calls_under_way(folder: Path, file: Path) -> None:
    """A call that is answered while the server stops is there."""
    with recording_to(folder, file, failpoints="tmpfs.attach=sleep:1*1") as plugin:
        plugin.client.create("v", {"driver": "tmpfs"})
        with connected(plugin.socket) as wire:
            wire.send(post("Mount", b'{"Name":"v","ID":"x"}'))
            time.sleep(0.2)
            plugin.stop()
            answer = wire.answer()
        assert answer is not None
        _, mount = calls(file)
        assert mount["answer"]["body"].encode() == answer.body
        plugin.start()
        plugin.client.unmount("v", "x")
        plugin.client.remove("v")


# The file


def test_it_is_roots_alone(plugin: Plugin, file: Path) -> None:
    """A new file can be read by nobody else, whatever the umask is."""
    found = file.stat()
    assert (stat.S_IMODE(found.st_mode), found.st_uid) == (0o600, 0)


def test_it_is_appended_to(folder: Path, file: Path) -> None:
    """A restart goes on where the last server ended, and begins with its version."""
    for _ in range(2):
        with recording_to(folder, file) as plugin:
            plugin.client.list()
    entries = lines(file)
    begins = [place for place, entry in enumerate(entries) if "version" in entry]
    assert begins[0] == 0
    assert len(begins) == 2
    assert len(calls(file)) == 2


def test_a_torn_line_stays_alone(folder: Path, file: Path) -> None:
    """A recording that ended within a line is gone on with on the next one."""
    file.write_text('{"whole":1}\n{"torn')
    with recording_to(folder, file):
        pass
    text = file.read_text().splitlines()
    assert text[:2] == ['{"whole":1}', '{"torn']
    assert all(json.loads(line) for line in text[2:])


def refusal(folder: Path, file: str | Path) -> str:
    """Return why a server does not start; it has not listened."""
    plugin = Plugin(folder, config=with_tmpfs(folder))
    done = subprocess.run(
        [*plugin.command("serve"), "--socket", str(plugin.socket), "--record", file],
        env=plugin_environment(),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode in {1, 78}, done.stderr
    assert not plugin.socket.exists()
    assert "Traceback" not in done.stderr
    assert "serving" not in done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("fifo", "a FIFO"),
        ("symlink", "a symbolic link"),
        ("dangling", "a symbolic link"),
        ("directory", "a directory"),
        ("device", "a device"),
        ("foreign", "the file there belongs to uid 1000"),
    ],
)
def test_what_is_no_file_of_roots(
    folder: Path, file: Path, kind: str, told: str
) -> None:
    """It is refused with what is there, before anybody is listened to."""
    other = folder / "other"
    other.write_text("kept")
    match kind:
        case "fifo":
            os.mkfifo(file)
        case "symlink":
            file.symlink_to(other)
        case "dangling":
            file.symlink_to(folder / "nothing")
        case "directory":
            file.mkdir()
        case "device":
            os.mknod(file, stat.S_IFCHR | 0o600, os.makedev(1, 3))
        case _:
            file.write_text("kept")
            os.chown(file, 1000, 1000)
    before = file.lstat()
    error = refusal(folder, file)
    assert f"volplugin: record {file}: {told}" in error
    after = file.lstat()
    assert (after.st_ino, after.st_size) == (before.st_ino, before.st_size)
    assert other.read_text() == "kept"
    assert not (folder / "nothing").exists()


def test_no_directory_for_it(folder: Path) -> None:
    """A directory is not made: the name may be misspelt."""
    error = refusal(folder, folder / "no" / "calls")
    assert f"there is no directory {folder}/no: make it, or name another" in error
    assert not (folder / "no").exists()


def test_a_relative_name(folder: Path) -> None:
    """A server is started from anywhere."""
    error = refusal(folder, "calls.jsonl")
    assert "--record: 'calls.jsonl' is not an absolute path; begin with /" in error


def test_by_a_variable(folder: Path, file: Path) -> None:
    """``VOLPLUGIN_RECORD`` does it too."""
    plugin = Plugin(folder, config=with_tmpfs(folder))
    try:
        plugin.start(environment={"VOLPLUGIN_RECORD": str(file)})
        plugin.client.list()
    finally:
        plugin.close()
    assert len(calls(file)) == 1


def test_a_reload_does_not_change_it(plugin: Plugin, folder: Path, file: Path) -> None:
    """SIGHUP tells that another recording needs a restart, and goes on with this."""
    plugin.config.write_text(with_tmpfs(folder, f'record = "{folder}/other"'))
    plugin.signal(signal.SIGHUP)
    eventually(lambda: "configuration reloaded" in plugin.log, "it is reloaded")
    assert "a changed record needs a restart" in plugin.log
    plugin.client.list()
    recorded(file, 1)
    assert not (folder / "other").exists()


# Trouble


@pytest.fixture
def small(folder: Path) -> Iterator[Path]:
    """A tmpfs of 64 KiB."""
    place = folder / "small"
    place.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=64k", "volplugin-test", place)
    yield place
    run("umount", place)


def test_a_full_disk(folder: Path, small: Path) -> None:
    """It ends the recording, is logged once, and no call fails or waits."""
    file = small / "calls"
    with recording_to(folder, file) as plugin:
        for number in range(300):
            plugin.client.create(f"v{number}")
        eventually(lambda: "recording ended" in plugin.log, "it is logged")
        size = file.stat().st_size
        (small / "calls").rename(small / "moved")
        os.truncate(small / "moved", 100)  # there is space again
        for number in range(300):
            plugin.client.remove(f"v{number}")
        plugin.stop()
        assert plugin.log.count("recording ended") == 1
        assert "No space left on device" in plugin.log
        assert size == 64 << 10
        assert (small / "moved").stat().st_size == 100


def test_a_full_disk_leaves_whole_lines(folder: Path, small: Path) -> None:
    """At most the last line is torn."""
    file = small / "calls"
    with recording_to(folder, file) as plugin:
        for _ in range(300):
            plugin.client.list()
        eventually(lambda: "recording ended" in plugin.log, "it is logged")
    *whole, _ = file.read_text().split("\n")
    assert len(whole) > 100
    assert all(json.loads(line) for line in whole)


def test_a_disk_that_hangs(folder: Path) -> None:
    """Calls are answered at once; what is too much is dropped, counted and told."""
    with disk(folder, "ext4", 256 << 20) as place:
        file = place / "calls"
        with recording_to(folder, file) as plugin:
            plugin.client.list()
            recorded(file, 1)
            large = b'{"Name":"%s"}' % (b"x" * (60 << 10))
            count = 2 * recorder.CAPACITY // len(large)
            run("fsfreeze", "--freeze", place)
            try:
                with connected(plugin.socket) as wire:
                    for _ in range(count):
                        assert wire.ask(post("Get", large)).status == 500
                    started = time.monotonic()
                    for _ in range(100):
                        wire.ask(post("List"))
                    assert time.monotonic() - started < 5
            finally:
                run("fsfreeze", "--unfreeze", place)
            dropped = {"dropped"}
            eventually(
                lambda: any(dropped <= set(entry) for entry in whole_lines(file)),
                "the loss is told",
            )
            plugin.client.list()
        entries = lines(file)
        lost = sum(entry.get("dropped", 0) for entry in entries)
        assert lost > 0
        assert len(calls(file)) + lost == 1 + count + 100 + 1


def whole_lines(file: Path) -> list[Any]:
    """Return the entries of a file that is being written."""
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]]


def test_a_server_that_is_killed(folder: Path, file: Path) -> None:
    """At most the last line is torn, and the next server goes on after it."""
    with recording_to(folder, file) as plugin:
        client = Client(plugin.socket)

        def ask() -> None:
            with contextlib.suppress(OSError):
                while True:
                    client.list()

        with ThreadPoolExecutor(4) as pool:
            for _ in range(4):
                pool.submit(ask)
            eventually(lambda: file.stat().st_size > 200_000, "it writes")
            plugin.kill()
        *whole, torn = file.read_text().split("\n")
        assert all("time" in json.loads(line) for line in whole)
        plugin.start()
        client.list()
        plugin.stop()
        text = file.read_text().split("\n")
        after = text[len(whole) + bool(torn) : -1]
        assert text[: len(whole)] == whole
        assert "version" in json.loads(after[0])
        assert all(json.loads(line) for line in after)
