"""A cluster of the host, for tests of Ceph that run inside a machine: a pytest plugin.

Loaded by ``-p guest_ceph`` there, it makes each `Ceph` that a fixture starts stand for
the one cluster whose folder ``VOLPLUGIN_TEST_CEPH`` names; so there is none in the
machine. What is done to its daemons is asked of the host, which does it (`serving`),
and so are Ceph's commands, which the machine takes seconds for. A request is a file,
and so is its answer, and what a command reads comes along as a file.
"""

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

# Nothing of ``support`` here: this is loaded before pytest can rewrite its asserts.

VARIABLE: Final = "VOLPLUGIN_TEST_CEPH"
_ASKED, _ANSWERED = ".asked", ".answered"
_FILE: Final = "file of the request: "
_DAEMONS: Final = ("pause", "resume", "restart")
_COMMANDS: Final = ("ceph", "rbd", "rados")
_LIMIT: Final = 100.0  # seconds for an answer
_numbers = itertools.count()


def pytest_configure(config: pytest.Config) -> None:
    """Let `Ceph` stand for the host's cluster, before any fixture makes one."""
    from support.ceph import Ceph

    def init(self: Ceph, **_: object) -> None:
        self.folder = Path(os.environ[VARIABLE])
        self.conf = self.folder / "ceph.conf"

    def nothing(self: Ceph) -> None:
        """It is up, and stays."""

    replaced: dict[str, object] = {"__init__": init, "start": nothing, "close": nothing}
    for word in _DAEMONS:
        replaced[word] = _asking(word)
    for word in _COMMANDS:
        replaced[word] = _asking(word, getattr(Ceph, word))
    for name, method in replaced.items():
        setattr(Ceph, name, method)


def _asking(word: str, here: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """Make a method that the host does; but what writes a file is done ``here``."""

    def ask(self: object, *words: str | Path) -> Any:
        given = []
        for each in map(str, words):
            if not each.startswith("/"):
                given.append(each)
            elif os.path.isfile(each):
                given.append(_sent(each))
            else:
                assert here is not None
                return here(self, *words)
        return _ask(word, given)

    return ask


def _sent(path: str) -> str:
    """Put a file where the host sees it; return what names it there."""
    from support.uml import OUTPUT

    name = f"{next(_numbers)}.file"
    shutil.copyfile(path, OUTPUT / name)
    return f"{_FILE}{name}"


def _ask(word: str, words: list[str]) -> Any:
    from support.uml import OUTPUT

    request = OUTPUT / f"{next(_numbers)}{_ASKED}"
    answer = request.with_suffix(_ANSWERED)
    _write(request, {"do": word, "words": words})
    end = time.monotonic() + _LIMIT
    while not answer.exists():
        assert time.monotonic() < end, f"the host does not answer: {word} {words}"
        time.sleep(0.02)
    told = json.loads(answer.read_text())
    answer.unlink()
    if "status" in told:
        raise subprocess.CalledProcessError(
            told["status"], [word, *words], told["output"], told["errors"]
        )
    assert "wrong" not in told, f"{word} {words}: {told['wrong']}"
    return told["result"]


@contextlib.contextmanager
def serving(cluster: object, folder: Path) -> Iterator[None]:
    """Do to ``cluster`` what is asked by files in ``folder``, for the context's time.

    This is the host's side. A daemon that is left stopped goes on at the end.
    """
    ended = threading.Event()
    paused: set[str] = set()

    def serve() -> None:
        while not ended.wait(0.02):
            for request in sorted(folder.glob(f"*{_ASKED}")):
                asked = json.loads(request.read_text())
                request.unlink()
                if asked["do"] == "pause":
                    paused.update(asked["words"])
                words = [
                    str(folder / word.removeprefix(_FILE))
                    if word.startswith(_FILE)
                    else word
                    for word in asked["words"]
                ]
                told = _told(cluster, asked["do"], words)
                _write(request.with_suffix(_ANSWERED), told)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        for daemon in paused:
            _told(cluster, "resume", [daemon])


def _told(cluster: object, word: str, words: list[str]) -> dict[str, object]:
    assert word in (*_DAEMONS, *_COMMANDS), word
    try:
        return {"result": getattr(cluster, word)(*words)}
    except subprocess.CalledProcessError as error:
        said = {"output": error.stdout, "errors": error.stderr}
        return {"status": error.returncode, **said}
    except Exception as error:  # noqa: BLE001  it is the guest's to raise
        return {"wrong": repr(error)}


def _write(path: Path, content: object) -> None:
    """Write a file that the other side sees whole or not at all."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(content))
    new.rename(path)
