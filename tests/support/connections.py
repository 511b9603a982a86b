"""Connections that a process in other namespaces makes, as an engine there would."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Final

_SCRIPT: Final = Path(__file__).with_name("connector.py")


class Connector:
    """Connects from within the namespaces that ``enter`` brings a command into.

    A server asks the kernel who has connected: it is this process, for as long as it
    lives.
    """

    def __init__(self, enter: Sequence[str]) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._asked = ours
        self._lock = threading.Lock()
        with theirs:
            self._process = subprocess.Popen(
                [*enter, sys.executable, "-I", "-S", str(_SCRIPT)],
                stdin=theirs.fileno(),
            )

    @property
    def pid(self) -> int:
        """The process that the server sees."""
        return self._process.pid

    def connect(self, path: Path) -> socket.socket:
        """Connect to the unix socket ``path``; raise `OSError` as connect(2) does."""
        with self._lock:
            self._asked.send(os.fsencode(path))
            told, descriptors, _, _ = socket.recv_fds(self._asked, 16, 1)
        if not descriptors:
            assert told, "the connector has ended"
            raise OSError(int(told), os.strerror(int(told)), str(path))
        return socket.socket(fileno=descriptors[0])

    def close(self) -> None:
        """End it."""
        self._asked.close()
        self._process.wait(10)
