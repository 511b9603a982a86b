"""`PluginClient` against a plugin that does all that a plugin should not."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest
from support import bad_plugin
from support.bad_plugin import BadPlugin
from support.bad_process import BadProcess
from support.host import Host
from support.require import require, require_root

from volplugin import route
from volplugin.errors import InvalidArgument, Unavailable
from volplugin.plugins import breaker
from volplugin.plugins.client import Held, Lost, PluginClient, Refused
from volplugin.plugins.discovery import Folders

REPOSITORY: Final = Path(__file__).resolve().parents[2]
NAME: Final = "bad"

Ask = Callable[[PluginClient], object]

READS: Final[dict[str, Ask]] = {
    "Get": lambda client: client.get("v"),
    "List": lambda client: client.volumes(),
}
CHANGES: Final[dict[str, Ask]] = {
    "Create": lambda client: client.create("w", {}),
    "Remove": lambda client: client.remove("v"),
    "Mount": lambda client: client.mount("v", "id"),
    "Unmount": lambda client: client.unmount("v", "id"),
}

# What comes of each, and whether a read is made once more.
NO_ANSWERS: Final = {
    "close": "closed the connection without an answer",
    "reset": "Connection reset by peer|cut off",
    "cut": "its answer was cut off",
    "cut-error": "its answer was cut off",
    "cut-chunks": "its answer was cut off",
    "garbage": "its answer is no HTTP",
}
SENSELESS: Final = ("empty", "half", "array", "deep")
REFUSALS: Final = {
    "text": "status 500: it can't$",
    "error": "^it can't$",
    "refusal": "^it can't$",
    "redirect": "status 307: no reason given",
}


@pytest.fixture(params=["unix", "tcp"])
def bad(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BadPlugin]:
    """A bad plugin with the volume v, on a socket or a port."""
    with running(tmp_path, tcp=request.param == "tcp") as plugin:
        yield plugin


@pytest.fixture
def one(tmp_path: Path) -> Iterator[BadPlugin]:
    """As `bad`, on a socket alone."""
    with running(tmp_path) as plugin:
        yield plugin


@contextlib.contextmanager
def running(folder: Path, *, tcp: bool = False) -> Iterator[BadPlugin]:
    """A bad plugin in a folder, found there by `client_of`."""
    (folder / "s").mkdir()
    place = ("127.0.0.1", 0) if tcp else f"{folder}/s/{NAME}.sock"
    plugin = BadPlugin(folder / "there", place)
    plugin.start()
    if tcp:
        assert not isinstance(plugin.address, str)
        host, port = plugin.address
        (folder / "s" / f"{NAME}.spec").write_text(f"tcp://{host}:{port}\n")
    (folder / "there" / "v").mkdir()
    try:
        yield plugin
    finally:
        plugin.close()


def client_of(plugin: BadPlugin, *, limit: float | None = None) -> PluginClient:
    """Return a client that is not activated yet."""
    sockets = os.path.join(os.path.dirname(plugin.folder), "s")
    folders = Folders(sockets=[sockets], specs=[sockets])
    return PluginClient(NAME, folders, limit=limit)


@contextlib.contextmanager
def within(least: float, most: float) -> Iterator[None]:
    """Hold what is done to the seconds that it takes."""
    begun = time.monotonic()
    yield
    taken = time.monotonic() - begun
    assert least <= taken <= most, f"it took {taken:.2f} s"


# Each fault


@pytest.mark.parametrize("kind", NO_ANSWERS)
def test_no_answer(bad: BadPlugin, kind: str) -> None:
    """The outcome is unknown. What changes is sent once, what reads once more."""
    for verb, ask in {**READS, **CHANGES}.items():
        client = client_of(bad)
        bad.fail(verb, kind)
        with within(0, 3), pytest.raises(Lost, match=NO_ANSWERS[kind]) as caught:
            ask(client)
        assert str(caught.value).startswith(f"plugin {NAME}: {verb}: ")
        assert bad.count(verb) == (2 if verb in READS else 1), verb
        assert client.health().startswith("down since 2")


@pytest.mark.parametrize("kind", SENSELESS)
def test_no_sense(bad: BadPlugin, kind: str) -> None:
    """The outcome is unknown too; asked again it would say the same."""
    client = client_of(bad)
    for verb, ask in {**READS, **CHANGES}.items():
        bad.fail(verb, kind)
        with pytest.raises(Lost, match="its answer makes no sense: b'"):
            ask(client)
        assert bad.count(verb) == 1
        assert client.health() == "ok"  # it is there


@pytest.mark.parametrize("kind", REFUSALS)
def test_a_refusal(bad: BadPlugin, kind: str) -> None:
    """It is the plugin's own word, whatever its form."""
    client = client_of(bad)
    for verb, ask in {**READS, **CHANGES}.items():
        bad.fail(verb, kind)
        with pytest.raises(Refused, match=REFUSALS[kind]):
            ask(client)
        assert bad.count(verb) == 1
        assert client.health() == "ok"


@pytest.mark.parametrize("verb", ["Get", "Create"])
@pytest.mark.parametrize("kind", ["huge", "endless", "endless-chunk"])
def test_more_than_anyone_says(one: BadPlugin, kind: str, verb: str) -> None:
    """What has no end is not read to it."""
    client = client_of(one)
    one.fail(verb, kind)
    wanted = "its answer has more than 33554432 bytes"
    with within(0, 5), pytest.raises(Lost, match=wanted):
        {**READS, **CHANGES}[verb](client)
    assert one.count(verb) == (2 if verb in READS else 1)


@pytest.mark.parametrize("verb", ["Get", "Mount"])
@pytest.mark.parametrize("kind", ["hang", "drip"])
def test_the_limit(bad: BadPlugin, kind: str, verb: str) -> None:
    """It bounds the whole call, and what took all of it is not asked again."""
    client = client_of(bad, limit=0.3)
    bad.fail(verb, kind)
    wanted = "no answer within 0.3 s"
    with within(0.3, 0.7), pytest.raises(Lost, match=wanted):
        {**READS, **CHANGES}[verb](client)
    assert bad.count(verb) == 1


@pytest.mark.parametrize("kind", ["chunked", "http10"])
def test_strange_forms(bad: BadPlugin, kind: str) -> None:
    """HTTP allows them all: they are answers."""
    client = client_of(bad)
    for verb in ("Activate", *READS, *CHANGES):
        bad.fail(verb, kind)
    client.create("w", {"a": "b"})
    assert client.get("v") == Held(name="v")
    assert client.mount("w", "id") == bad.path("w")
    assert client.get("w") == Held(name="w", mountpoint=bad.path("w"))
    client.unmount("w", "id")
    client.remove("w")
    assert client.volumes() == [Held(name="v")]
    assert bad.made == {"w": {"a": "b"}}


def test_a_slow_answer(one: BadPlugin, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte now and then is an answer, if all of it is there in time."""
    client = client_of(one, limit=30)
    client.volumes()
    monkeypatch.setattr(bad_plugin, "DRIP", 0.005)
    one.fail("Get", "drip")
    assert client.get("v") == Held(name="v")


def test_an_answer_before_the_question(bad: BadPlugin) -> None:
    """Who answers and closes before it has read the body has answered."""
    client = client_of(bad)
    client.volumes()
    bad.fail("Create", "early", times=1)
    with pytest.raises(Refused, match="no name"):
        client.create("v" * 200, {"a": "b" * 2000})
    assert bad.count("Create") == 1


# A plugin that is not there


def test_one_that_refuses(one: BadPlugin) -> None:
    """It is tried for 3 s; nothing was sent, and the error says so."""
    client = client_of(one)
    one.stop(unlink=False)
    with within(2, 3.5), pytest.raises(Unavailable, match="Connection refused") as e:
        client.create("w", {})
    assert not isinstance(e.value, Lost)
    assert client.health().startswith("down since 2")


def test_one_that_is_not_there(one: BadPlugin) -> None:
    """Where was looked is said. The limit is the limit here too."""
    client = client_of(one, limit=0.3)
    one.stop()
    with within(0, 0.5), pytest.raises(Unavailable, match="no plugin 'bad'") as e:
        client.create("w", {})
    assert not isinstance(e.value, Lost)
    assert f"looked for bad.sock in {Path(str(one.address)).parent}" in str(e.value)


@pytest.mark.parametrize("unlink", [True, False])
@pytest.mark.parametrize("verb", ["Get", "Create"])
def test_one_that_restarts(one: BadPlugin, verb: str, *, unlink: bool) -> None:
    """It is waited for, and asked once; what it was told before it is told again."""
    client = client_of(one)
    client.volumes()
    one.stop(unlink=unlink)
    starting = threading.Timer(0.3, one.start)
    starting.start()
    with within(0.2, 2):
        {**READS, **CHANGES}[verb](client)
    starting.join()
    assert one.count(verb) == 1


def test_one_that_dies_in_a_call(one: BadPlugin) -> None:
    """A change is not made again by the one that comes after it."""
    client = client_of(one)
    one.fail("Create", "hang", after=True)

    def restart() -> None:
        one.stop()
        one.heal()
        one.start()

    starting = threading.Timer(0.3, restart)
    starting.start()
    with within(0.2, 2), pytest.raises(Lost):
        client.create("w", {})
    starting.join()
    assert one.verbs() == ["Activate", "Create"]
    client.create("x", {})
    assert one.verbs() == ["Activate", "Create", "Activate", "Create"]


# Activation


def test_activation(bad: BadPlugin) -> None:
    """It comes before the first call, and again after one was lost."""
    client = client_of(bad)
    assert client.health() == "not asked yet"
    client.get("v")
    client.volumes()
    with pytest.raises(Refused):
        client.create("v", {})
    assert bad.verbs() == ["Activate", "Get", "List", "Create"]
    bad.calls.clear()
    bad.fail("Mount", "close")
    with pytest.raises(Lost):
        client.mount("v", "id")
    client.get("v")
    client.get("v")
    assert bad.verbs() == ["Mount", "Activate", "Get", "Get"]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("error", "is not ready: it can't"),
        ("text", "is not ready: status 500: it can't"),
        ("empty", "is not ready: .* its answer makes no sense"),
        ("close", "Activate: .* closed the connection"),
        ("hang", "Activate: .* no answer within 0.3 s"),
    ],
)
def test_activation_that_fails(one: BadPlugin, kind: str, reason: str) -> None:
    """The call is not sent: it has had no effect, and the error says so."""
    client = client_of(one, limit=0.3)
    one.fail("Activate", kind)
    with within(0, 0.7), pytest.raises(Unavailable, match=reason) as caught:
        client.create("w", {})
    assert not isinstance(caught.value, Lost)
    assert one.count("Create") == 0
    one.heal()
    client.create("w", {})


@pytest.mark.parametrize(
    "implements", [[], ["NetworkDriver"], None, "VolumeDriver", {"VolumeDriver": 1}]
)
def test_no_volume_plugin(one: BadPlugin, implements: object) -> None:
    """A plugin for networks, say, is told from one for volumes."""
    one.implements = implements
    client = client_of(one)
    with pytest.raises(Unavailable, match="is no volume plugin: it implements"):
        client.create("w", {})
    assert one.verbs() == ["Activate"]
    one.implements = ["NetworkDriver", "VolumeDriver"]
    client.create("w", {})


# The breaker


def test_the_breaker(one: BadPlugin, monkeypatch: pytest.MonkeyPatch) -> None:
    """After three calls without an answer others fail at once, until one has one."""
    monkeypatch.setattr(breaker, "PAUSE", 0.4)
    client = client_of(one, limit=0.2)
    one.fail("Get", "hang")
    for _ in range(breaker.FAILURES):
        with pytest.raises(Lost):
            client.get("v")
    asked = one.count("Get")
    assert asked == breaker.FAILURES
    with within(0, 0.1):
        for ask in (*READS.values(), *CHANGES.values()):
            with pytest.raises(Unavailable, match="is down since 2") as caught:
                ask(client)
            assert not isinstance(caught.value, Lost)
    assert "no answer within 0.2 s; it is tried again every 0.4 s" in str(caught.value)
    assert one.count("Get") == asked
    one.heal()
    time.sleep(0.4)
    assert client.get("v") == Held(name="v")
    assert client.health() == "ok"
    client.volumes()


def test_a_refusal_is_an_answer(one: BadPlugin) -> None:
    """A plugin that refuses all is not down."""
    client = client_of(one)
    one.fail("*", "error")
    for _ in range(breaker.FAILURES + 2):
        with pytest.raises(Unavailable, match="is not ready"):
            client.get("v")
    assert one.count("Activate") == breaker.FAILURES + 2


def test_a_plugin_that_is_activated_and_hangs(one: BadPlugin) -> None:
    """That it answers Activate does not make it one that answers."""
    client = client_of(one, limit=0.1)
    one.fail("Mount", "hang")
    for _ in range(breaker.FAILURES):
        with pytest.raises(Lost):
            client.mount("v", "id")
    with pytest.raises(Unavailable, match="is down since"):
        client.mount("v", "id")


def test_one_call_tries(one: BadPlugin, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long it hangs, no other is let through beside it."""
    monkeypatch.setattr(breaker, "PAUSE", 0.1)
    client = client_of(one, limit=0.1)
    one.fail("Get", "hang")
    for _ in range(breaker.FAILURES):
        with pytest.raises(Lost):
            client.get("v")
    one.calls.clear()
    client._limit = 1.0
    time.sleep(0.1)
    ended: list[float] = []

    def ask() -> None:
        begun = time.monotonic()
        with pytest.raises(Unavailable):
            client.get("v")
        ended.append(time.monotonic() - begun)

    asking = []
    for _ in range(8):
        asking.append(threading.Thread(target=ask))
        asking[-1].start()
        time.sleep(0.05)
    for thread in asking:
        thread.join()
    assert one.count("Get") == 1
    assert sorted(taken > 0.5 for taken in ended) == [False] * 7 + [True]


# What it answers


def test_a_volume_of_another_name(one: BadPlugin) -> None:
    """It is not taken for the one that was asked for; List then tells."""
    client = client_of(one)
    one.fail("Get", "answer", {"Volume": {"Name": "V", "Mountpoint": "/x"}})
    with pytest.raises(Refused, match="asked for 'v' it answers with 'V'"):
        client.get("v")
    assert client.has("v")
    assert not client.has("w")


@pytest.mark.parametrize(
    "answer",
    [{}, {"Volume": None}, {"Volume": {}}, {"Volume": []}, {"Volume": {"Name": ""}}],
)
def test_no_volume(one: BadPlugin, answer: object) -> None:
    """An answer without one is an error, and no proof that there is none."""
    client = client_of(one)
    one.fail("Get", "answer", answer)
    with pytest.raises(Refused, match="its answer to Get has no volume"):
        client.get("v")
    assert client.has("v")


@pytest.mark.parametrize("answer", [{}, {"Volumes": None}, {"Volumes": []}])
def test_an_empty_list(one: BadPlugin, answer: object) -> None:
    """Go writes none as null, or leaves it out."""
    client = client_of(one)
    one.fail("List", "answer", answer)
    assert client.volumes() == []


def test_a_list_with_holes(one: BadPlugin) -> None:
    """What is no volume is left out, and what no name can be."""
    client = client_of(one)
    holes: list[object] = [
        None,
        5,
        "v",
        [],
        {},
        {"Name": None},
        {"Name": 7},
        {"Name": ""},
    ]
    names = ["a", "a/b", "\x00", "\ud800", "é"]
    volumes = [*holes, *({"Name": name, "Mountpoint": 5} for name in names)]
    one.fail("List", "answer", {"Volumes": volumes})
    found = client.volumes()
    assert [held.name for held in found] == ["a", "a/b", "\x00", "é"]
    assert {held.mountpoint for held in found} == {""}


@pytest.mark.parametrize("volumes", [{}, "v", 5, {"v": {}}])
def test_no_list(one: BadPlugin, volumes: object) -> None:
    """It is an error: an empty one would read as "all are lost"."""
    client = client_of(one)
    one.fail("List", "answer", {"Volumes": volumes})
    if volumes:
        with pytest.raises(Refused, match="its answer to List has no volumes"):
            client.volumes()


def test_neither_tells(one: BadPlugin) -> None:
    """That there is no such volume takes List's word beside the error of Get."""
    client = client_of(one)
    assert client.has("v")
    one.fail("Get", "error", "the disk is slow")
    assert client.has("v")
    assert not client.has("w")
    one.fail("List", "error", "and the list")
    wanted = "does not tell whether it has 'v': the disk is slow; and the list"
    with pytest.raises(Unavailable, match=wanted):
        client.has("v")


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("a\n  b\tc", "a b c"),
        ("\x1b[2Jgone", "?[2Jgone"),
        ("\ud800", "?"),
        ({"a": 1}, "{'a': 1}"),
        ("x" * 5000, "x" * 400),
    ],
)
def test_the_words_of_a_plugin(one: BadPlugin, said: object, told: str) -> None:
    """They are told on one line, without what a terminal would obey."""
    client = client_of(one)
    one.fail("Get", "refusal", said)
    with pytest.raises(Refused) as caught:
        client.get("v")
    assert str(caught.value) == told


def test_a_mountpoint_that_is_no_text(one: BadPlugin) -> None:
    """It is as none; whoever mounts looks at it."""
    client = client_of(one)
    for value in (None, 5, ["/x"], "\ud800"):
        one.fail("Mount", "answer", {"Mountpoint": value})
        assert client.mount("v", "id") == ""


# Who asks


def test_the_way_of_a_call(bad: BadPlugin) -> None:
    """Each call says which servers it has come through, this one last."""
    client = client_of(bad)
    client.get("v")
    route._before.set("1.1 other\udcff")
    try:
        client.get("v")
    finally:
        route._before.set("")
    own = f"1.1 {route.SELF}"
    ways = [call.via for call in bad.calls]
    assert ways == [own, own, f"1.1 other\xff, {own}"]


@pytest.mark.parametrize("how", ["socket", "link", "spec", "json"])
def test_itself(tmp_path: Path, how: str) -> None:
    """A plugin whose socket is this process's own is refused before it is asked."""
    own, folder = tmp_path / "own.sock", tmp_path / "s"
    folder.mkdir()
    match how:
        case "socket":
            own = folder / f"{NAME}.sock"
        case "link":
            (folder / f"{NAME}.sock").symlink_to(own)
        case "spec":
            (folder / f"{NAME}.spec").write_text(f"unix://{own}\n")
        case "json":
            (folder / f"{NAME}.json").write_text(f'{{"Addr": "unix://{own}"}}')
    folders = Folders(sockets=[str(folder)], specs=[str(folder)])
    client = PluginClient(NAME, folders)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(own))
        listener.listen()
        for _ in range(5):
            with within(0, 0.2), pytest.raises(InvalidArgument, match="is this volp"):
                client.create("w", {})
        connection = listener.accept()[0]
        assert connection.recv(1) == b""
        connection.close()
    assert client.health() == "not asked yet"


def test_a_full_backlog(tmp_path: Path) -> None:
    """Who accepts nothing any more is not reached: nothing was sent."""
    (tmp_path / "s").mkdir()
    plugin = BadPlugin(tmp_path / "there", f"{tmp_path}/s/{NAME}.sock")
    client = client_of(plugin, limit=0.5)
    script = (
        "import socket, sys, time; s = socket.socket(socket.AF_UNIX); "
        "s.bind(sys.argv[1]); s.listen(0); print('ready', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-I", "-S", "-c", script, str(plugin.address)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with socket.socket(socket.AF_UNIX) as first:
            first.connect(str(plugin.address))
            with within(0.2, 0.9), pytest.raises(Unavailable) as caught:
                client.create("w", {})
        process.kill()
    assert not isinstance(caught.value, Lost)
    assert "Resource temporarily unavailable" in str(caught.value)


_LOOK_UP: Final = """
import sys, time
from volplugin.errors import Unavailable
from volplugin.plugins.client import PluginClient
from volplugin.plugins.discovery import Folders
client = PluginClient("bad", Folders(sockets=[], specs=[sys.argv[1]]), limit=0.5)
begun = time.monotonic()
try:
    client.create("w", {})
except Unavailable as error:
    print(time.monotonic() - begun, type(error).__name__, error)
"""


@pytest.mark.root
def test_a_name_that_nobody_looks_up(tmp_path: Path) -> None:
    """A resolver that does not answer has limits of its own, above ours."""
    require_root()
    (tmp_path / "bad.spec").write_text("tcp://nowhere.example:1\n")
    (tmp_path / "resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:9\n")
    setup = (
        "ip link set lo up && mount --bind $1/resolv.conf /etc/resolv.conf && "
        'exec "$2" -c "$3" "$1"'
    )
    # What is bound and not read from is a server that is silent.
    silent = (
        "import socket\n"
        "server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "server.bind(('127.0.0.1', 53))\n"
    )
    command = [require("unshare"), "--mount", "--net", "sh", "-c", setup, "sh"]
    done = subprocess.run(
        [*command, str(tmp_path), sys.executable, silent + _LOOK_UP],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    seconds, kind, reason = done.stdout.split(maxsplit=2)
    assert float(seconds) < 0.9, done.stdout
    assert kind == "Unavailable"
    assert "can't be looked up in time" in reason


# The bad plugin as a process


@pytest.mark.root
@pytest.mark.parametrize("where", ["here", "host"])
def test_as_a_process(
    tmp_path: Path, request: pytest.FixtureRequest, where: str
) -> None:
    """It is told by its file how to behave, and tells what it was asked."""
    host: Host | None = request.getfixturevalue("host") if where == "host" else None
    sockets = Path("/run/docker/plugins") if host else tmp_path / "s"
    if host is None:
        sockets.mkdir()
    folder = host.folder if host else tmp_path
    process = BadProcess(folder, sockets, host=host)
    reach = str(host.path(sockets)) if host else str(sockets)
    client = PluginClient(NAME, Folders(sockets=[reach], specs=[]), limit=0.5)
    try:
        process.start()
        client.create("v", {"a": "b"})
        assert client.mount("v", "1") == str(folder / "volumes" / "v")
        process.fail("Unmount", "error", "no", times=1)
        with pytest.raises(Refused, match=r"^no$"):
            client.unmount("v", "1")
        client.unmount("v", "1")
        process.fail("Mount", "hang")
        with within(0.5, 0.9), pytest.raises(Lost):
            client.mount("v", "2")
        process.listen("refuse")
        with pytest.raises(Unavailable, match="Connection refused"):
            client.mount("v", "3")
        process.listen("remove")
        assert not process.client.socket.exists()
        process.heal()
        client.mount("v", "4")
        process.kill()
        process.start()
        with pytest.raises(Refused, match="mount ID 4 is unknown"):
            client.unmount("v", "4")
        client.remove("v")
        told = [call.verb for call in process.calls()]
    finally:
        process.close()
    assert told == [
        *("Create", "Mount", "Unmount", "Unmount", "Mount", "Mount", "Unmount"),
        "Remove",
    ]
    assert process.calls()[0].message == {"Name": "v", "Opts": {"a": "b"}}
    assert process.calls()[0].via == f"1.1 {route.SELF}"
