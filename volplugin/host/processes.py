"""Processes: this boot, the one at the other end of a socket, and whether it lives."""

import socket
import struct

import attrs

from volplugin.errors import from_os_error
from volplugin.model import Client

_CREDENTIALS = struct.Struct("3i")  # struct ucred of unix(7): pid, uid, gid


@attrs.frozen
class _Stat:
    program: str
    state: str
    started: int


def boot_id() -> str:
    """Return the identifier that the kernel drew when it booted."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError as error:
        raise from_os_error(error, "read the boot id") from error


def client_of(sock: socket.socket) -> Client:
    """Return the process that connected ``sock``, as `peer_of`.

    Where the kernel cannot name it (another pid namespace: pid 0), or it has ended
    since, the client has what is known.
    """
    pid = peer_of(sock)
    found = _stat(pid) if pid else None
    if found is None:
        return Client(pid=pid)
    return Client(program=found.program, pid=pid, started=found.started)


def peer_of(sock: socket.socket) -> int:
    """Return the process at the other end of a unix socket, by SO_PEERCRED.

    To who listens that is who connected, to who connected who began to listen. 0 is one
    of another pid namespace.
    """
    try:
        answer = sock.getsockopt(
            socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size
        )
    except OSError as error:
        raise from_os_error(error, "ask for the peer of a socket") from error
    return int(_CREDENTIALS.unpack(answer)[0])


def is_alive(client: Client) -> bool:
    """Tell whether ``client`` still runs: its pid, with its start time, no zombie.

    A client with pid 0 counts as alive, as it cannot be known.
    """
    if client.pid == 0:
        return True
    found = _stat(client.pid)
    return (
        found is not None
        and found.started == client.started
        and found.state not in {"Z", "X", "x"}
    )


def owner(pid: int) -> int | None:
    """Return the real user id of a process, None when it has ended.

    Its folder in /proc may be root's whoever it is of, see proc_pid(5).
    """
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            lines = file.read().split(b"\n")
    except (FileNotFoundError, ProcessLookupError):
        return None
    except OSError as error:
        raise from_os_error(error, f"look at process {pid}") from error
    (uids,) = (line.split()[1:] for line in lines if line.startswith(b"Uid:"))
    return int(uids[0])


def _stat(pid: int) -> _Stat | None:
    # One read, so that name and start time are those of one process.
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            line = file.read()
    except (FileNotFoundError, ProcessLookupError):
        return None
    except OSError as error:
        raise from_os_error(error, f"look at process {pid}") from error
    # proc_pid_stat(5): the name stands in parentheses and may contain more of them.
    head, _, tail = line.rpartition(b")")
    fields = tail.split()
    name = head.partition(b"(")[2].decode("utf-8", "replace")
    # State is field 3, start time field 22; the list begins with field 3.
    return _Stat(name, fields[0].decode("ascii"), int(fields[19]))
