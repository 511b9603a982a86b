"""Whatever a client sends: an answer, a server that is up, nothing touched outside."""

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import attrs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.client import Answer
from support.host import Host
from support.mounts import Mount
from support.plugin import Plugin
from wire import CONTENT_TYPE, connected, post

pytestmark = pytest.mark.root

CALLS: Final = (
    "Plugin.Activate",
    *("Create", "Remove", "Mount", "Unmount", "Path", "Get", "List", "Capabilities"),
)
QUICK: Final = settings(
    deadline=None,
    max_examples=250,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
    ],
)


@attrs.frozen
class Fenced:
    """A server with all that it may touch in one folder, and a canary beside it."""

    host: Host
    plugin: Plugin
    before: dict[str, object]
    mounts: list[Mount]

    @property
    def folder(self) -> Path:
        """Where the server, the canary and what may be a volume are."""
        return self.host.folder

    def ask(self, data: bytes) -> Answer | None:
        """Send ``data`` on a connection of its own; None if it was closed."""
        with connected(self.plugin.client) as wire:
            wire.send(data)
            return wire.answer()

    def own_mounts(self) -> list[Mount]:
        """Return what is mounted where the server may mount."""
        allowed = (f"{self.folder}/tmpfs/", f"{self.folder}/allowed/")
        return [m for m in self.host.mounts() if m.mountpoint.startswith(allowed)]

    def check(self) -> None:
        """Hold everything that is not the server's own to how it was."""
        assert self.plugin.is_running()
        assert listing(self.folder) == self.before
        own = self.own_mounts()
        assert [m for m in self.host.mounts() if m not in own] == self.mounts
        assert all(mount.source.startswith("volplugin-") for mount in own)


def listing(folder: Path) -> dict[str, object]:
    """Return all in ``folder`` that the server has no business with."""
    own = {"root", "tmpfs", "allowed", "plugin.log"}
    found: dict[str, object] = {}
    for path, folders, files in os.walk(folder):
        if path == str(folder):
            folders[:] = [name for name in folders if name not in own]
        for name in {*folders, *files} - (own if path == str(folder) else set()):
            entry = os.path.join(path, name)
            status = os.lstat(entry)
            kept = ("st_ino", "st_mode", "st_uid", "st_gid", "st_size", "st_mtime_ns")
            marks = os.listxattr(entry, follow_symlinks=False)
            found[entry] = [*(getattr(status, key) for key in kept), *sorted(marks)]
    return found


@pytest.fixture(scope="module")
def fenced() -> Iterator[Fenced]:
    """The server for all of the module; at its end its volumes must go as any do."""
    host = Host()
    with contextlib.closing(host):
        folder = host.folder
        for inner in ("canary/deep", "allowed/there", "tmpfs"):
            (folder / inner).mkdir(parents=True)
        (folder / "canary" / "file").write_text("precious")
        (folder / "canary" / "deep" / "file").write_text("precious")
        (folder / "allowed" / "link").symlink_to(folder / "canary")
        (folder / "tmpfs" / "link").symlink_to(folder / "canary")
        config = (
            f'[backend.local]\nallow = ["{folder}/allowed"]\n'
            f'[backend.tmpfs]\nroot = "{folder}/tmpfs"\nallow = ["{folder}/allowed"]\n'
        )
        plugin = Plugin(folder, host=host, config=config)
        with contextlib.closing(plugin):
            plugin.start()
            fenced = Fenced(host, plugin, listing(folder), host.mounts())
            yield fenced
            for name in plugin.client.list():
                let_go(plugin, name)
                plugin.client.remove(name)
            fenced.check()
            assert fenced.own_mounts() == []


def let_go(plugin: Plugin, name: str) -> None:
    """Unmount all that the tests have mounted of a volume."""
    for holder in IDS:
        while True:
            before = plugin.client.get(name)["Status"]["mounts"]
            if not before:
                return
            plugin.client.unmount(name, holder)
            if plugin.client.get(name)["Status"]["mounts"] == before:
                break


IDS: Final = ("", "x", "3f2a" * 16, "🐳", "../evil")
ANYWHERE: Final = ("canary", "allowed/link", "allowed/../canary", "allowed/there", ".")
JSON_VALUES: Final = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=30)
    | st.sampled_from(["\ud800", "a\0b", "x" * 5000]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
NAMES: Final = st.sampled_from(
    [
        *("v", "w", "link", "../evil", "../canary", "../../canary", "/abs", "a/b"),
        *(".", "..", "", "a\0b", "a\nb", "a b", "x" * 255, "x" * 300, "🐳", "é"),
        *("-rf", "%2e%2e", "~", "$HOME", "v/../w", "v\\w", "con", "\ud800"),
    ]
) | st.text(max_size=40)
OPTION_KEYS: Final = st.sampled_from(
    [
        *("driver", "mount", "size", "mode", "uid", "gid", "inodes", "exec", "help"),
        *("opt.size", "opt.mount", "backend", "selector.x", "opt.driver", "nothing"),
    ]
) | st.text(max_size=10)
TEXTS: Final = st.sampled_from(
    [
        *("local", "tmpfs", "", "0", "1", "-1", "64m", "10G", "1e3", "99999999999T"),
        *("0755", "7777", "99999", "true", "root", "/", "/etc", "/proc", "a,b=c"),
        *("size=1,mode=777", "../..", "\ud800", "a\0b", "x" * 3000),
    ]
) | st.text(max_size=20)


def paths(folder: Path) -> st.SearchStrategy[str]:
    """Return directories that a user might name for a volume of his."""
    return st.sampled_from(
        [
            *(f"{folder}/{inner}" for inner in ANYWHERE),
            *(f"{folder}/allowed/new", f"{folder}/allowed/new/deep", f"{folder}/tmpfs"),
            *(f"{folder}/root", f"{folder}/root/local/volumes/v", "allowed/there"),
            *(
                f"{folder}/allowed/link/deep",
                f"{folder}/allowed\n",
                f"{folder}//canary",
            ),
        ]
    )


def options(folder: Path) -> st.SearchStrategy[Any]:
    """Return what may stand where a Create's options do."""
    near = st.fixed_dictionaries(
        {},
        optional={
            "driver": st.sampled_from(["local", "tmpfs", "tmpfs", "nothing"]),
            "mount": paths(folder),
            "size": st.sampled_from(["64k", "1m", "0", "10m"]),
            "mode": st.sampled_from(["0755", "1777", "0"]),
        },
    )
    far = st.dictionaries(OPTION_KEYS, TEXTS | paths(folder) | JSON_VALUES, max_size=4)
    return st.none() | near | near | far | JSON_VALUES


def messages(folder: Path) -> st.SearchStrategy[Any]:
    """Return messages that are near to right ones."""
    return st.fixed_dictionaries(
        {"Name": NAMES | NAMES | JSON_VALUES},
        optional={
            "ID": st.sampled_from(IDS) | JSON_VALUES,
            "Opts": options(folder),
            "More": JSON_VALUES,
        },
    )


def assert_sane(answer: Answer | None, *statuses: int) -> None:
    """Hold an answer to the forms that there are."""
    assert answer is not None
    assert answer.status in (statuses or (200, 400, 500))
    assert answer.headers["Content-Type"] == CONTENT_TYPE
    assert len(answer.body) < 8192 or answer.status == 200
    content = answer.json
    assert isinstance(content, dict)
    assert (answer.status == 200) == ("Err" not in content)
    if answer.status != 200:
        assert list(content) == ["Err"]
        assert isinstance(content["Err"], str)
        assert content["Err"]
        assert "internal error" not in content["Err"]


@QUICK
@given(data=st.data(), call=st.sampled_from(CALLS))
def test_messages(fenced: Fenced, data: st.DataObject, call: str) -> None:
    """Messages with a wrong name, ID, option or type, on all calls."""
    message = data.draw(messages(fenced.folder))
    assert_sane(fenced.ask(post(call, json.dumps(message).encode())))
    fenced.check()


@QUICK
@given(data=st.data())
def test_lives(fenced: Fenced, data: st.DataObject) -> None:
    """Create, Mount, Unmount and Remove of one name, with whatever options."""
    message = data.draw(messages(fenced.folder))
    for call in ("Create", "Mount", "Get", "List", "Unmount", "Remove"):
        assert_sane(fenced.ask(post(call, json.dumps(message).encode())))
        fenced.check()


@QUICK
@given(call=st.sampled_from(CALLS), body=st.binary(min_size=1, max_size=300))
def test_bodies(fenced: Fenced, call: str, body: bytes) -> None:
    """Bytes that are mostly no JSON, on all calls."""
    answer = fenced.ask(post(call, body))
    if body.strip():
        assert_sane(answer)
    fenced.check()


@QUICK
@given(data=st.data(), call=st.sampled_from(CALLS))
def test_bodies_that_are_cut_or_bent(
    fenced: Fenced, data: st.DataObject, call: str
) -> None:
    """A right message with a byte changed, or its end missing."""
    message = data.draw(messages(fenced.folder))
    body = bytearray(
        json.dumps(message, ensure_ascii=data.draw(st.booleans())).encode(
            errors="surrogatepass"
        )
    )
    where = data.draw(st.integers(0, len(body) - 1))
    if data.draw(st.booleans()):
        body[where] = data.draw(st.integers(0, 255))
    else:
        del body[where + 1 :]
    answer = fenced.ask(post(call, bytes(body)))
    if body.strip():
        assert_sane(answer)
    fenced.check()


@QUICK
@given(
    head=st.binary(max_size=60)
    | st.sampled_from([b"POST /VolumeDriver.List HTTP/1.1"]),
    rest=st.binary(max_size=60),
)
def test_garbage(fenced: Fenced, head: bytes, rest: bytes) -> None:
    """Bytes that are mostly no HTTP: an answer or the end of the connection."""
    with connected(fenced.plugin.client, limit=5) as wire:
        wire.send(head + b"\r\n" + rest + b"\r\n\r\n")
        wire.socket.shutdown(socket.SHUT_WR)
        answer = wire.answer()
        assert answer is None or answer.status < 600
    fenced.check()


def test_it_told_of_no_bug(fenced: Fenced) -> None:
    """After all of the above the log has no stack trace."""
    calls = {(c.op, c.outcome) for c in fenced.plugin.calls()}
    assert {(call, "ok") for call in ("Create", "Mount", "Unmount", "Remove")} <= calls
    assert "Traceback" not in fenced.plugin.log
