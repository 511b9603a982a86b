"""Sockets that an earlier server left and that are not configured any more."""

import contextlib
import logging
import os
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from volplugin.sockets import clear_left


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A place with a name that is short enough for sockets."""
    folder = tmp_path_factory.mktemp("s")
    with contextlib.chdir(folder):
        yield folder


@pytest.fixture
def note(folder: Path) -> Path:
    """Where the note is."""
    return folder / "note"


def bind(path: Path, kind: int = socket.SOCK_STREAM) -> socket.socket:
    """Bind a socket and do not listen; relative, so that no path is too long."""
    bound = socket.socket(socket.AF_UNIX, kind)
    bound.bind(path.name)
    return bound


def leave(path: Path) -> None:
    """Leave a socket as a server that was killed does."""
    bind(path).close()
    assert stat.S_ISSOCK(path.lstat().st_mode)


def noted(note: Path) -> list[str]:
    """Return what the note holds."""
    return note.read_text().splitlines()


def test_what_is_configured_is_noted(note: Path, folder: Path) -> None:
    """Before anything is bound: a server may die at once."""
    clear_left(str(note), ["/run/a", "/run/\u2028 b"])
    assert note.read_text() == "/run/a\n/run/\u2028 b\n"
    clear_left(str(note), ["/run/\u2028 b"])
    assert note.read_text() == "/run/\u2028 b\n"
    assert os.listdir(folder) == ["note"]


def test_what_is_left_is_removed(
    note: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One of the note that is not configured any more goes, others stay."""
    ours, kept, theirs = (folder / name for name in ("ours", "kept", "theirs"))
    for path in (ours, kept, theirs):
        leave(path)
    clear_left(str(note), [str(ours), str(kept)])
    assert ours.exists()
    with caplog.at_level(logging.WARNING):
        clear_left(str(note), [str(kept)])
    assert not ours.exists()
    assert kept.exists()
    assert theirs.exists()
    assert noted(note) == [str(kept)]
    assert [r.getMessage() for r in caplog.records] == [
        "stale socket removed: not configured"
    ]


def test_what_is_gone_is_forgotten(note: Path, folder: Path) -> None:
    """A server that ended well left nothing, be its folder gone or a file by now."""
    (folder / "file").touch()
    gone = [folder / "a", folder / "no" / "b", folder / "file" / "c"]
    clear_left(str(note), list(map(str, gone)))
    clear_left(str(note), [])
    assert noted(note) == []


def _listen(path: Path) -> Callable[[], None]:
    listening = bind(path)
    listening.listen()
    return listening.close


def _overrun(path: Path) -> Callable[[], None]:
    listening = bind(path)
    listening.listen(0)
    waiting = [socket.socket(socket.AF_UNIX) for _ in range(4)]
    for each in waiting:
        each.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            each.connect(path.name)

    def close() -> None:
        for each in (listening, *waiting):
            each.close()

    return close


def _datagrams(path: Path) -> Callable[[], None]:
    return bind(path, socket.SOCK_DGRAM).close


def _file(path: Path) -> Callable[[], None]:
    path.write_text("precious")
    return lambda: None


def _folder(path: Path) -> Callable[[], None]:
    path.mkdir()
    return lambda: None


def _fifo(path: Path) -> Callable[[], None]:
    os.mkfifo(path)
    return lambda: None


def _link(path: Path) -> Callable[[], None]:
    leave(path.with_name("target"))
    path.symlink_to("target")
    return lambda: None


@pytest.mark.parametrize(
    "make", [_listen, _overrun, _datagrams, _file, _folder, _fifo, _link]
)
def test_what_is_somebody_elses_stays(
    note: Path, folder: Path, make: Callable[[Path], Callable[[], None]]
) -> None:
    """A live socket, however busy, and what is no socket of ours; it is forgotten."""
    path = folder / "p"
    end = make(path)
    try:
        before = path.lstat()
        clear_left(str(note), [str(path)])
        clear_left(str(note), [])
        assert path.lstat().st_ino == before.st_ino
        assert noted(note) == []
    finally:
        end()


def test_one_that_can_not_be_removed_is_tried_again(
    note: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It stays on the note until it is gone."""
    # Too long to connect to: no server could have bound it, which is why it stays.
    path = folder / ("x" * 120)
    leave(folder / "short")
    (folder / "short").rename(path)
    clear_left(str(note), [str(path)])
    with caplog.at_level(logging.WARNING):
        clear_left(str(note), ["/run/a"])
    assert path.exists()
    assert noted(note) == ["/run/a", str(path)]
    assert [r.getMessage() for r in caplog.records] == ["stale socket not removed"]
    path.unlink()
    clear_left(str(note), ["/run/a"])
    assert noted(note) == ["/run/a"]


@pytest.mark.parametrize("content", [b"", b"\xff\0/\n..\nrel\n\n", b"/a\0b\n/../x\n"])
def test_a_note_of_something_else(note: Path, content: bytes) -> None:
    """What can't be the path of a socket is left out."""
    note.write_bytes(content)
    clear_left(str(note), ["/run/a"])
    assert noted(note) == ["/run/a"]


def test_a_note_that_can_not_be_written(
    note: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is told of, and keeps no server down."""
    note.mkdir()
    with caplog.at_level(logging.WARNING):
        clear_left(str(note), ["/run/a"])
    assert [r.getMessage() for r in caplog.records] == ["sockets not noted"]
