"""File systems of CephFS as mounts of this host: ceph-fuse's processes, the kernel's.

ceph-fuse outlives us, see `daemons`. Its admin socket tells by what address the cluster
knows it, which is noted for the day that it dies.
"""

import contextlib
import json
import os
import socket
import struct
import time
from collections.abc import Callable
from typing import Any, Final

from volplugin.errors import Unavailable
from volplugin.host import commands, daemons, modules

# GNU's stat(1) has no status that tells them apart; the words are the C library's.
_DEAD: Final = (
    "Transport endpoint is not connected",
    "Software caused connection abort",
)
_PAUSE: Final = 0.02
_LONGEST_ANSWER: Final = 1 << 20


def has_kernel_client() -> bool:
    """Tell whether this kernel has CephFS, and load its module if it is one."""
    if not _is_known():
        modules.load("ceph")
    return _is_known()


def has_fuse() -> bool:
    """Tell whether ceph-fuse is installed, and the kernel has FUSE."""
    return os.path.exists("/dev/fuse") and commands.find("ceph-fuse") is not None


def is_dead(mountpoint: str, limit: float) -> bool:
    """Tell whether the mount's process has gone, by a look in a child process.

    Raise `Unavailable` for a mount that does not answer within ``limit`` seconds.
    """
    doing = f"look at the mount on {mountpoint}"
    said = commands.run(
        ["stat", "--file-system", mountpoint], limit=limit, doing=doing, ok=(0, 1)
    )
    return any(words in said for words in _DEAD)


class FuseProcess:
    """The ceph-fuse of one mount: its files in ``place``, its name in the mount table.

    ``key`` names both, and must be a word of its own for each mount.
    """

    def __init__(self, place: str, key: str) -> None:
        self.source = f"volplugin-{key}"
        self._place = place
        self._record = os.path.join(place, f"{key}.run")
        self._log = os.path.join(place, f"{key}.log")
        self._socket = f"{key}.asok"
        self._note = os.path.join(place, f"{key}.address")

    def start(
        self,
        words: list[str],
        mountpoint: str,
        *,
        read_only: bool,
        ready: Callable[[], bool],
        limit: float,
    ) -> None:
        """Mount by ceph-fuse with the options ``words``; return once ``ready()``.

        It is gone after an error. Raise `Unavailable` with what it says where it ends.
        """
        options = f"fsname={self.source},subtype=ceph-fuse"
        if read_only:
            options += ",ro"
        # The socket's name is relative: its path may be longer than unix(7) takes.
        own = ["-f", "--log-file=", f"--admin-socket={self._socket}", "-o", options]
        doing = f"mount by ceph-fuse on {mountpoint}"
        daemons.start(
            ["ceph-fuse", *words, *own, mountpoint],
            record=self._record,
            log=self._log,
            folder=self._place,
            ready=ready,
            limit=limit,
            doing=doing,
            failed=lambda said: Unavailable(f"{doing}: {said or 'it says nothing'}"),
        )
        told = self._ask()
        if told is not None:
            with open(self._note, "w", encoding="ascii") as file:
                file.write(str(told.get("addr_str", "")))

    def pid(self) -> int | None:
        """Return the process if it runs."""
        found = daemons.find(self._record)
        return None if found is None else found.pid

    def address(self) -> str | None:
        """Return the address by which the cluster knows it, or knew it at its end."""
        try:
            with open(self._note, encoding="ascii") as file:
                return file.read() or None
        except FileNotFoundError:
            return None

    def is_fenced(self) -> bool:
        """Tell whether the cluster takes no more from it: it never will again."""
        told = self._ask()
        return told is not None and told.get("blocklisted") is True

    def wait(self, limit: float) -> bool:
        """Return whether it has ended, waiting at most ``limit`` seconds for that."""
        end = time.monotonic() + limit
        while self.pid() is not None:
            if time.monotonic() > end:
                return False
            time.sleep(_PAUSE)
        return True

    def kill(self) -> None:
        """End it at once; what it has not written is lost."""
        daemons.end(self._record, grace=0)

    def forget(self) -> None:
        """Remove its files."""
        socket_path = os.path.join(self._place, self._socket)
        for path in (self._record, self._log, socket_path, self._note):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    def _ask(self) -> dict[str, Any] | None:
        """Ask its admin socket for its status; None where that does not answer."""
        try:
            folder = os.open(self._place, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
                peer.settimeout(2.0)
                peer.connect(f"/proc/self/fd/{folder}/{self._socket}")
                request = {"prefix": "status", "format": "json"}
                peer.sendall(json.dumps(request).encode() + b"\0")
                with peer.makefile("rb") as answer:
                    (length,) = struct.unpack(">I", answer.read(4))
                    told = json.loads(answer.read(min(length, _LONGEST_ANSWER)))
        except (OSError, ValueError, struct.error):
            return None
        finally:
            os.close(folder)
        return told if isinstance(told, dict) else None


def _is_known() -> bool:
    with open("/proc/filesystems", encoding="ascii") as table:
        return any(line.split()[-1:] == ["ceph"] for line in table)
