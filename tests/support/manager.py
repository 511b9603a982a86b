"""A service manager as far as a server knows one: it holds sockets and hears notices.

The protocols are those of sd_listen_fds(3) and sd_notify(3); a real systemd is in
``tests/systemd``.
"""

import contextlib
import select
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

# It becomes the server, so that LISTEN_PID is the server's own. Numbers are moved out
# of the way first: one may be another's place.
_LAUNCH: Final = """
import os, sys
count = int(sys.argv[1])
high = [os.dup2(int(number), 200 + i) for i, number in enumerate(sys.argv[2:2 + count])]
for place, number in enumerate(high, 3):
    os.dup2(number, place)
    os.close(number)
words = sys.argv[2 + count:]
os.execve(words[0], words, {**os.environ, "LISTEN_PID": str(os.getpid())})
"""


class Manager:
    """Holds ``sockets``, listening, and hears what its servers tell.

    ``watchdog`` are seconds. It is told at ``name``: a path, or an ``abstract`` name.
    ``close`` when done with it: the files go with it.
    """

    def __init__(
        self,
        folder: Path,
        *sockets: Path,
        mode: int = 0o660,
        watchdog: float = 0,
        abstract: bool = False,
    ) -> None:
        self._held: list[socket.socket] = []
        self._watchdog = watchdog
        self.paths = sockets
        for path in sockets:
            held = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._held.append(held)
            held.bind(str(path))
            path.chmod(mode)
            held.listen(1024)
        self.address = folder / "notify"
        self.name = f"{'@' if abstract else ''}{self.address}"
        self._heard = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._heard.bind(self.name.replace("@", "\0"))
        self._facts: list[str] = []

    @property
    def descriptors(self) -> list[int]:
        """What a server's process has to inherit."""
        return [held.fileno() for held in self._held]

    def command(self, words: Sequence[str]) -> list[str]:
        """Return the command that becomes ``words`` with the sockets handed on."""
        numbers = [str(number) for number in self.descriptors]
        launch = [sys.executable, "-S", "-c", _LAUNCH, str(len(numbers)), *numbers]
        return [*launch, *words]

    def environment(self) -> Mapping[str, str]:
        """Return the variables that a server gets, LISTEN_PID aside."""
        names = ":".join(f"{path.stem}.socket" for path in self.paths)
        variables = {
            "LISTEN_FDS": str(len(self._held)),
            "LISTEN_FDNAMES": names,
            "NOTIFY_SOCKET": self.name,
        }
        if self._watchdog:
            variables["WATCHDOG_USEC"] = str(int(self._watchdog * 1e6))
        return variables

    def facts(self) -> list[str]:
        """Return all that was told so far, a fact a line, in its order."""
        while select.select([self._heard], [], [], 0)[0]:
            self._facts += self._heard.recv(1 << 16).decode().splitlines()
        return list(self._facts)

    def hears(self, fact: str, *, times: int = 1, seconds: float = 20) -> None:
        """Return once ``fact`` was told ``times``; fail after ``seconds``."""
        end = time.monotonic() + seconds
        while self.facts().count(fact) < times:
            left = end - time.monotonic()
            assert left > 0, f"{fact} was not told {times} times: {self._facts}"
            select.select([self._heard], [], [], left)

    def fill(self) -> None:
        """Fill the queue of what was told, so that nobody can tell more."""
        sent = True
        while sent:  # until one that has sent nothing yet can't
            sent = False
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sending:
                sending.setblocking(False)
                sending.connect(self.name)
                with contextlib.suppress(BlockingIOError):
                    while sending.send(b"STATUS=filler"):
                        sent = True

    def close(self) -> None:
        """Let go of all; who waits in a queue is reset."""
        for held, path in zip(self._held, self.paths, strict=True):
            held.close()
            path.unlink()
        self._heard.close()
        self.address.unlink(missing_ok=True)
