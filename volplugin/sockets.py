"""Unix sockets to listen on: rightly owned, never taken from a live server.

Those that a server which was killed has left are replaced where they are configured
still, and removed where they are not.
"""

import contextlib
import errno
import grp
import logging
import os
import pwd
import select
import socket
import stat
from collections.abc import Iterable, Sequence

import attrs

from volplugin.config import SocketConfig
from volplugin.errors import InUse, InvalidArgument, from_os_error
from volplugin.logs import log
from volplugin.parsers import absolute_path

logger = logging.getLogger(__name__)


@attrs.frozen(eq=False)
class Listener:
    """A bound socket with the file that names it.

    ``identity`` is the file's device and inode; None where another process, which has
    handed the socket on, listens on it before and after us: then the file is its own.
    """

    path: str
    socket: socket.socket
    identity: tuple[int, int] | None

    @property
    def is_held(self) -> bool:
        """Tell whether who connects after our end waits for the next server."""
        return self.identity is None

    def has_waiting(self) -> bool:
        """Tell whether someone has connected who is not accepted yet."""
        look = select.poll()
        look.register(self.socket, select.POLLIN)
        return any(event & select.POLLIN for _, event in look.poll(0))

    def unlink(self) -> None:
        """Remove the file, unless it is another's, or another's by now."""
        if self.is_held:
            return
        with contextlib.suppress(FileNotFoundError):
            status = os.lstat(self.path)
            if (status.st_dev, status.st_ino) == self.identity:
                os.unlink(self.path)

    def close(self) -> None:
        """Stop listening and remove the file; doing it again does nothing."""
        self.socket.close()
        self.unlink()


def bind(config: SocketConfig) -> Listener:
    """Bind a socket and make its file the owner's; the caller listens.

    A socket file that nobody listens on is replaced. Raise `InUse` when a live server
    has it, `InvalidArgument` when something else is there.
    """
    path = config.path
    uid, gid = _user_id(config.owner), _group_id(config.group)
    try:
        os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
        _clear_stale(path)
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # dockerd lists every socket in its folder as a plugin, so there can be no
            # temporary name; until it listens, connecting is refused and retried.
            listening.bind(path)
            os.chmod(path, config.mode)
            os.chown(path, uid, gid)
            status = os.lstat(path)
        except OSError:
            listening.close()
            raise
    except OSError as error:
        raise from_os_error(error, f"socket {path}") from error
    listening.setblocking(False)
    return Listener(path, listening, (status.st_dev, status.st_ino))


def is_served(path: str) -> bool:
    """Tell whether someone listens on the socket ``path``."""
    try:
        return stat.S_ISSOCK(os.lstat(path).st_mode) and not _refuses(path)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise from_os_error(error, f"socket {path}") from error


def remove_refusing(path: str) -> bool:
    """Remove a socket that nobody listens on; return whether there was one."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode) or not _refuses(path):
            return False
        os.unlink(path)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise from_os_error(error, f"socket {path}") from error
    return True


def clear_left(note: str, configured: Sequence[str]) -> None:
    """Remove the sockets of earlier servers that are not ``configured`` any more.

    One of them costs dockerd 15 s in each call. ``note`` is the file in which servers
    of one root, one after the other, keep what they bind; call it before that. Only a
    socket that refuses connections is removed, and nothing but a socket. No trouble
    here keeps a server down: it is logged, and such a socket is looked at again at the
    next start.
    """
    try:
        noted = _read_note(note)
        doubtful = [
            path for path in noted if path not in configured and not _is_settled(path)
        ]
        wanted = [*configured, *doubtful]
        if wanted != noted:
            _write_note(note, wanted)
    except OSError as error:
        reason = error.strerror or str(error)
        log(logger, logging.WARNING, "sockets not noted", path=note, error=reason)


def _clear_stale(path: str) -> None:
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    # Before connect(2), which is refused by a plain file as by a socket left behind.
    if not stat.S_ISSOCK(found.st_mode):
        raise InvalidArgument(f"socket {path}: something else is there: move it away")
    if not _refuses(path):
        raise InUse(f"socket {path}: another server is listening on it")
    os.unlink(path)


def _refuses(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(2)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
        except (TimeoutError, BlockingIOError):
            pass  # too busy to accept us, but it lives
    return False


def _read_note(note: str) -> list[str]:
    try:
        with open(note, encoding="utf-8", errors="replace") as file:
            lines = file.read().split("\n")
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        with contextlib.suppress(InvalidArgument):
            found.append(absolute_path(line))
    return found


def _write_note(note: str, wanted: Iterable[str]) -> None:
    with open(f"{note}.new", "w", encoding="utf-8") as file:
        file.writelines(f"{path}\n" for path in wanted)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{note}.new", note)


def _is_settled(path: str) -> bool:
    """Remove a socket that was left; return whether there is nothing left to do.

    What is alive, or no socket of the kind that we bind, is somebody else's by now.
    """
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode) or not _refuses(path):
            return True
        os.unlink(path)
    except OSError as error:
        if error.errno in {errno.ENOENT, errno.ENOTDIR, errno.EPROTOTYPE}:
            return True
        reason = error.strerror or str(error)
        log(
            logger, logging.WARNING, "stale socket not removed", path=path, error=reason
        )
        return False
    log(logger, logging.WARNING, "stale socket removed: not configured", path=path)
    return True


def _user_id(owner: str | int) -> int:
    if isinstance(owner, int):
        return owner
    try:
        return pwd.getpwnam(owner).pw_uid
    except KeyError as error:
        raise InvalidArgument(f"socket owner {owner!r}: no such user") from error


def _group_id(group: str | int) -> int:
    if isinstance(group, int):
        return group
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError as error:
        raise InvalidArgument(f"socket group {group!r}: no such group") from error
