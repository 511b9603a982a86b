"""Our systemd units: written, told from what somebody changed, and removed."""

import enum
import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Final

import attrs

from volplugin import __version__
from volplugin.config import Config
from volplugin.errors import AlreadyExists, InvalidArgument, from_os_error
from volplugin.host import commands

DIRECTORY: Final = "/etc/systemd/system"
SERVICE: Final = "volplugin.service"
SOCKET: Final = "volplugin.socket"
NAMES: Final = (SOCKET, SERVICE)

_PROGRAM: Final = "/usr/bin/volplugin"
_MARK: Final = "# By volplugin install-service; sha256 of all lines below: "
# What needs no quoting in ExecStart=, and is no specifier of systemd's.
_PLAIN: Final = re.compile(r"[A-Za-z0-9/_.+@:-]+")
_LIMIT: Final = 20.0  # seconds for a program to tell its version


class State(enum.Enum):
    """What is in the place of a unit's file."""

    ABSENT = "absent"
    CURRENT = "unchanged"
    EARLIER = "written by an earlier install-service"
    CHANGED = "changed by somebody"


@attrs.frozen
class Unit:
    """A unit's file: its path, what belongs there, and what is there."""

    path: str
    text: str
    state: State


def units(directory: str, program: Sequence[str], root: str) -> list[Unit]:
    """Return our units as they are in ``directory``, and as they should be.

    They run ``program`` on ``root``, whose disk has to be mounted first: without it,
    the server would find an empty directory, and engines would forget all volumes.
    """
    found = []
    for name, text in _texts(program, root).items():
        path = os.path.join(directory, name)
        found.append(Unit(path, text, _state(path, text)))
    return found


def check(program: Sequence[str], root: str) -> None:
    """Raise unless ``program`` is this volplugin for whoever starts it.

    It is run as systemd does, without our environment and working directory. Raise
    `InvalidArgument` for paths that systemd would read as something else.
    """
    for path in (*program, root):
        if not _PLAIN.fullmatch(path):
            raise InvalidArgument(
                f"{path!r}: systemd would not read this path as it is; take one that "
                f"has letters, digits and /_.+@:- alone"
            )
    said = commands.run(
        [*program, "--version"],
        limit=_LIMIT,
        doing=f"try {' '.join(program)} as systemd would start it",
    )
    if said.split()[-1:] != [__version__]:
        raise InvalidArgument(
            f"{' '.join(program)} is not volplugin {__version__}; it says: {said:.200}"
        )


def refuse_changed(found: Iterable[Unit], doing: str) -> None:
    """Raise one `AlreadyExists` that names each unit which somebody has changed."""
    changed = [unit.path for unit in found if unit.state is State.CHANGED]
    if changed:
        raise AlreadyExists(
            "\n".join(
                f"{path}: changed, or not written by install-service: nothing was "
                f"done; {doing} it with --force. Changes are safe in {path}.d/"
                for path in changed
            )
        )


def write(found: Iterable[Unit]) -> None:
    """Write each unit that is not there as it should be, whole or not at all."""
    for unit in found:
        if unit.state is State.CURRENT:
            continue
        new = f"{unit.path}.new"
        try:
            os.makedirs(os.path.dirname(unit.path), exist_ok=True)
            with open(new, "w", encoding="utf-8") as file:
                os.fchmod(file.fileno(), 0o644)
                file.write(unit.text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, unit.path)
        except OSError as error:
            raise from_os_error(error, f"write {unit.path}") from error


def remove(found: Iterable[Unit]) -> None:
    """Remove each unit's file that is there."""
    for unit in found:
        if unit.state is State.ABSENT:
            continue
        try:
            os.unlink(unit.path)
        except OSError as error:
            raise from_os_error(error, f"remove {unit.path}") from error


def listened_on() -> str:
    """Return the path that our socket unit listens on."""
    found = re.search(r"^ListenStream=(\S+)$", _packaged(SOCKET), re.MULTILINE)
    if found is None:
        raise AssertionError(f"{SOCKET} has no ListenStream=")
    return found[1]


def _texts(program: Sequence[str], root: str) -> Mapping[str, str]:
    texts = {}
    for name in NAMES:
        text = _packaged(name).replace(_PROGRAM, " ".join(program))
        text = text.replace(f"={Config().root}\n", f"={root}\n")
        texts[name] = f"{_MARK}{_digest(text)}\n{text}"
    return texts


def _packaged(name: str) -> str:
    place = resources.files("volplugin") / "systemd" / name
    return place.read_text(encoding="utf-8")


def _state(path: str, text: str) -> State:
    try:
        if os.path.islink(path):  # such as to /dev/null, which masks the unit
            return State.CHANGED
        with open(path, encoding="utf-8", errors="replace") as file:
            there = file.read()
    except FileNotFoundError:
        return State.ABSENT
    except OSError as error:
        raise from_os_error(error, f"read {path}") from error
    if there == text:
        return State.CURRENT
    mark, _, rest = there.partition("\n")
    is_ours = mark == f"{_MARK}{_digest(rest)}"
    return State.EARLIER if is_ours else State.CHANGED


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
