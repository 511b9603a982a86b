"""The configuration's values: sockets, backends, time limits, and all of it.

Their names in the file, defaults, checks and help are declared here, as a driver's
options are. `volplugin.config` reads them from their sources.
"""

import re
from collections.abc import Mapping
from typing import Final

import attrs

from volplugin.errors import InvalidArgument
from volplugin.options import (
    absolute_path,
    choice,
    identity,
    mode,
    name_list,
    option,
    seconds,
    text,
)
from volplugin.parsers import quote

DEFAULT_SOCKET: Final = "/run/docker/plugins/volplugin.sock"
DEFAULT_ADMIN_SOCKET: Final = "/run/volplugin/admin.sock"
MANAGED_ADMIN_SOCKET: Final = "admin.sock"
"""In the root: all that a managed plugin and its host have in common at each boot."""

MANAGED_DRAIN: Final = 8.0
"""Seconds: dockerd kills a managed plugin 10 s after it has asked it to end."""

_LONGEST_SOCKET: Final = 107  # bytes: unix(7)'s sun_path has 108, with the final NUL
_PERCENT: Final = re.compile(r"[1-9][0-9]?|100")
_ACCOUNT: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}\$?")


def _account(given: str) -> str | int:
    if given[:1].isdigit():
        return identity(given)
    if not _ACCOUNT.fullmatch(given):
        raise InvalidArgument(f"{quote(given)} is neither an account's name nor an id")
    return given


def _socket_path(given: str) -> str:
    path = absolute_path(given)
    if len(path.encode()) > _LONGEST_SOCKET:
        raise InvalidArgument(
            f"{quote(given)} is {len(path.encode())} bytes long; "
            f"a socket's path has at most {_LONGEST_SOCKET}"
        )
    return path


def _marks(given: str) -> tuple[int, ...]:
    marks = given.split(",") if given else []
    if not all(_PERCENT.fullmatch(mark) for mark in marks):
        raise InvalidArgument(
            f"{quote(given)} is not a list of marks; give whole percents from 1 to 100 "
            f"with commas between, such as 80,95, or nothing"
        )
    values = [int(mark) for mark in marks]
    if values != sorted(set(values)):
        raise InvalidArgument(f"{quote(given)} does not ascend; give each mark once")
    return tuple(values)


@attrs.frozen(kw_only=True)
class SocketConfig:
    """One socket to listen on. dockerd, podman and pouchd run as root, and so do we."""

    path: str = option(
        help="where it is", parse=_socket_path, default=DEFAULT_SOCKET, unit="path"
    )
    mode: int = option(
        help="its permissions",
        parse=mode,
        default=0o660,
        unit="octal",
        format="{:04o}".format,
    )
    owner: str | int = option(
        help="its owner", parse=_account, default="root", unit="name or uid"
    )
    group: str | int = option(
        help="its group", parse=_account, default="root", unit="name or gid"
    )
    default_backend: str | None = option(
        help="backend of a volume created here without driver=",
        parse=text,
        default=None,
        shown="the one for all sockets",
        unit="name",
    )
    backends: tuple[str, ...] | None = option(
        help="what can be used here, and all that is shown",
        parse=name_list,
        default=None,
        shown="all",
        unit="list of names",
    )
    scope: str = option(
        help="local, or global: serve shared backends alone (rbd, cephfs), and say so",
        parse=choice("local", "global"),
        default="local",
        unit="name",
    )


@attrs.frozen(kw_only=True)
class BackendConfig:
    """A named instance of a driver; ``settings`` are checked, but as TOML had them."""

    name: str
    driver: str
    settings: Mapping[str, object] = attrs.field(factory=dict)


@attrs.frozen(kw_only=True)
class Timeouts:
    """How long a call may take before it is answered as still running.

    dockerd gives up after 120 s for Create and Mount and 60 s for the rest, podman
    after 5 s for everything: the answer comes a little before.
    """

    create: float = option(
        help="for Create", parse=seconds, default=110.0, unit="seconds"
    )
    mount: float = option(
        help="for Mount", parse=seconds, default=110.0, unit="seconds"
    )
    other: float = option(
        help="for every other call", parse=seconds, default=50.0, unit="seconds"
    )
    podman: float = option(
        help="for podman's calls", parse=seconds, default=4.5, unit="seconds"
    )
    managed: float = option(
        help="for every call to a managed plugin; its engine waits 30 s",
        parse=seconds,
        default=28.0,
        unit="seconds",
    )
    drain: float = option(
        help="at shutdown, for calls that run",
        parse=seconds,
        default=30.0,
        unit="seconds",
    )


@attrs.frozen(kw_only=True)
class Config:
    """The whole configuration, checked. ``backends`` has one for each driver at least.

    An empty ``backends`` stands for the drivers' defaults.
    """

    root: str = option(
        help="directory of the store and of local volumes",
        parse=absolute_path,
        default="/var/lib/volplugin",
        unit="path",
    )
    default_backend: str = option(
        help="backend of a volume whose creator names no driver",
        parse=text,
        default="local",
        unit="name",
    )
    log_format: str = option(
        help="text or json", parse=choice("text", "json"), default="text"
    )
    log_level: str = option(
        help="debug, info, warning or error",
        parse=choice("debug", "info", "warning", "error"),
        default="info",
    )
    sweep_interval: float = option(
        help="between looks at mounts that could not be taken down",
        parse=seconds,
        default=5.0,
        unit="seconds",
    )
    admin_socket: str = option(
        help="where operators' commands reach the server; root alone may connect",
        parse=_socket_path,
        default=DEFAULT_ADMIN_SOCKET,
        unit="path",
    )
    usage_interval: float = option(
        help="between measurements of what volumes hold; at least 1 is waited",
        parse=seconds,
        default=60.0,
        unit="seconds",
    )
    follow_interval: float = option(
        help="between looks at all volumes of a cluster; changes come at once as well",
        parse=seconds,
        default=30.0,
        unit="seconds",
    )
    usage_marks: tuple[int, ...] = option(
        help="how full a volume is when a warning is logged; empty for none",
        parse=_marks,
        default=(80, 95),
        unit="percent",
    )
    propagated: str | None = option(
        help="a managed plugin's directory that its host sees: volumes are mounted "
        "there for engines",
        parse=absolute_path,
        default=None,
        unit="path",
    )
    record: str | None = option(
        help="file that all calls of engines are recorded in, with their answers",
        parse=absolute_path,
        default=None,
        unit="path",
    )
    sockets: tuple[SocketConfig, ...] = (SocketConfig(),)
    timeouts: Timeouts = Timeouts()
    backends: Mapping[str, BackendConfig] = attrs.field(factory=dict)

    @property
    def limits(self) -> Timeouts:
        """The ``timeouts`` in force: a managed plugin's calls have one limit more."""
        given = self.timeouts
        if self.propagated is None:
            return given
        return attrs.evolve(
            given,
            create=min(given.create, given.managed),
            mount=min(given.mount, given.managed),
            other=min(given.other, given.managed),
            podman=min(given.podman, given.managed),
            drain=min(given.drain, MANAGED_DRAIN),
        )
