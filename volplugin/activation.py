"""Sockets that systemd listens on and hands on to us: sd_listen_fds(3).

It has them before and after us, so nobody who connects while we are away is refused:
calls wait in the socket's queue for the next server.
"""

import contextlib
import logging
import os
import socket
import stat
from collections.abc import Iterator, MutableMapping
from typing import Final

from volplugin.config import Config
from volplugin.errors import InvalidArgument
from volplugin.logs import log
from volplugin.parsers import quote
from volplugin.sockets import Listener

logger = logging.getLogger(__name__)

_FIRST: Final = 3  # SD_LISTEN_FDS_START: the rest follows without a gap
_MOST: Final = 1024
_VARIABLES: Final = ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES")


def take_over(config: Config, environ: MutableMapping[str, str]) -> dict[str, Listener]:
    """Return the listening sockets that were handed on to this process, by path.

    No child gets one: the variables in ``environ`` are unset, the descriptors close at
    exec. What was meant for another process is left alone. Their files and modes are
    systemd's, and stay. Raise one `InvalidArgument` that names each that is not
    configured or can't be served; it holds none then.
    """
    modes = {each.path: each.mode for each in config.sockets}
    taken: dict[str, Listener] = {}
    faults: list[str] = []
    for name, descriptor in _handed_on(environ):
        try:
            listener = _listener(descriptor, [*modes, config.admin_socket])
        except InvalidArgument as error:
            faults.append(f"handed on by systemd as {quote(name)}: {error}")
            continue
        if listener.path in taken:
            listener.socket.close()
            faults.append(f"handed on by systemd: {listener.path} is there twice")
        else:
            taken[listener.path] = listener
    if not faults:
        faults += _open_to_others(taken.get(config.admin_socket))
    if faults:
        for listener in taken.values():
            listener.socket.close()
        raise InvalidArgument("\n".join(faults))
    for path, listener in taken.items():
        _tell(listener, modes.get(path))
    return taken


def _handed_on(environ: MutableMapping[str, str]) -> Iterator[tuple[str, int]]:
    """Yield the name (its unit's, by default) and the descriptor of each."""
    count, pid, names = (environ.pop(name, "") for name in _VARIABLES)
    if not count or pid != str(os.getpid()):
        return
    if not (count.isascii() and count.isdigit() and int(count) <= _MOST):
        raise InvalidArgument(
            f"LISTEN_FDS: {quote(count)} is no number of descriptors up to {_MOST}"
        )
    name_of = dict(enumerate(names.split(":"), _FIRST)) if names else {}
    for descriptor in range(_FIRST, _FIRST + int(count)):
        # Before anything else is done: what we start must not have it.
        with contextlib.suppress(OSError):
            os.set_inheritable(descriptor, False)
        yield name_of.get(descriptor, f"descriptor {descriptor}"), descriptor


def _listener(descriptor: int, configured: list[str]) -> Listener:
    try:
        handed = socket.socket(fileno=descriptor)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InvalidArgument(f"no socket: {reason}: use ListenStream=") from error
    try:
        path = _path(handed)
        _check(path, configured)
    except InvalidArgument:
        handed.close()
        raise
    handed.setblocking(False)
    return Listener(path, handed, identity=None)


def _check(path: str, configured: list[str]) -> None:
    if path not in configured:
        raise InvalidArgument(
            f"{path} is not in the configuration, which has {', '.join(configured)}: "
            f"add a [socket.NAME] with this path, or take it out of the .socket unit"
        )


def _path(handed: socket.socket) -> str:
    """Return where a listening unix socket is; raise `InvalidArgument` for others."""
    name = handed.getsockname()
    if handed.family != socket.AF_UNIX:
        raise InvalidArgument(f"{name} is no unix socket: engines call on those alone")
    if handed.type != socket.SOCK_STREAM or not handed.getsockopt(
        socket.SOL_SOCKET, socket.SO_ACCEPTCONN
    ):
        raise InvalidArgument(
            f"{quote(str(name))} does not listen for connections: use ListenStream= "
            f"with Accept=no"
        )
    if not isinstance(name, str) or not name.startswith("/"):
        raise InvalidArgument(
            f"{name!r} is no absolute path: engines know none but that"
        )
    return name


def _open_to_others(admin: Listener | None) -> Iterator[str]:
    """Tell if others than root may connect: they could change any volume."""
    if admin is None:
        return
    status = _status(admin)
    if status and (status.st_uid != 0 or stat.S_IMODE(status.st_mode) & 0o077):
        mode = stat.S_IMODE(status.st_mode)
        yield (
            f"handed on by systemd: the admin socket {admin.path} has mode {mode:04o} "
            f"and uid {status.st_uid}, and it is for root alone: give it a .socket "
            f"unit of its own with SocketMode=0600"
        )


def _tell(listener: Listener, mode: int | None) -> None:
    fields = {"path": listener.path}
    status = _status(listener)
    if status is None:
        log(logger, logging.WARNING, "handed on, and its file has gone", **fields)
        return
    found = stat.S_IMODE(status.st_mode)
    if mode is not None and found != mode:
        fields |= {"mode": f"{found:04o}", "configured": f"{mode:04o}"}
        log(logger, logging.WARNING, "handed on with a mode of its own", **fields)
    else:
        log(logger, logging.INFO, "handed on", **fields)


def _status(listener: Listener) -> os.stat_result | None:
    try:
        return os.lstat(listener.path)
    except OSError:
        return None
