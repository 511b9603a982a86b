"""Unix sockets to listen on: rightly owned, never taken from a live server."""

import contextlib
import grp
import os
import pwd
import select
import socket
import stat

import attrs

from volplugin.config import SocketConfig
from volplugin.errors import InUse, InvalidArgument, from_os_error


@attrs.frozen(eq=False)
class Listener:
    """A bound socket with the file that names it."""

    path: str
    socket: socket.socket
    identity: tuple[int, int]

    def has_waiting(self) -> bool:
        """Tell whether someone has connected who is not accepted yet."""
        look = select.poll()
        look.register(self.socket, select.POLLIN)
        return any(event & select.POLLIN for _, event in look.poll(0))

    def unlink(self) -> None:
        """Remove the file, unless another server has put its own there since."""
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


def _clear_stale(path: str) -> None:
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    # Before connect(2), which is refused by a plain file as by a socket left behind.
    if not stat.S_ISSOCK(found.st_mode):
        raise InvalidArgument(f"socket {path}: something else is there: move it away")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(2)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except (TimeoutError, BlockingIOError):
            pass  # too busy to accept us, but it lives
    raise InUse(f"socket {path}: another server is listening on it")


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
