"""The monitor of a qemu-storage-daemon: JSON lines on a unix socket.

See QEMU's "QMP protocol specification" and "Storage daemon QMP reference".
"""

import contextlib
import json
import os
import socket
from collections.abc import Iterator, Mapping
from typing import Any, Final

from volplugin.errors import Internal, Unavailable, from_os_error
from volplugin.host import paths

_GREETING: Final = "QMP"


class Monitor:
    """An open conversation: one command, one answer."""

    def __init__(self, connection: socket.socket, name: str) -> None:
        self._lines = connection.makefile("rwb")
        self._name = name

    def close(self) -> None:
        """End the conversation; the daemon listens on."""
        with contextlib.suppress(OSError):
            self._lines.close()

    def greet(self) -> None:
        """Read the greeting, and enter the mode that takes commands."""
        if _GREETING not in self._answer():
            raise Internal(f"{self._name} is no monitor of qemu")
        self.run("qmp_capabilities")

    def run(self, command: str, **arguments: Any) -> Any:
        """Run a command and return what it returned.

        Raise `Unavailable` with the daemon's words when it refuses, or when it does not
        answer in time.
        """
        asked = {"execute": command, "arguments": arguments}
        try:
            self._lines.write(json.dumps(asked).encode() + b"\n")
            self._lines.flush()
        except OSError as error:
            raise from_os_error(error, f"ask {self._name} for {command}") from error
        while True:
            answer = self._answer()
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise Unavailable(f"{command}: {answer['error'].get('desc')}")
            # What is left are events.

    def _answer(self) -> Mapping[str, Any]:
        try:
            line = self._lines.readline()
        except TimeoutError as error:
            raise Unavailable(f"{self._name} does not answer") from error
        except OSError as error:
            raise from_os_error(error, f"read from {self._name}") from error
        if not line:
            raise Unavailable(f"{self._name} has ended the conversation")
        answer: Mapping[str, Any] = json.loads(line)
        return answer


@contextlib.contextmanager
def monitor(path: str, *, limit: float) -> Iterator[Monitor]:
    """Talk to the daemon that listens at ``path``, waiting ``limit`` s for each answer.

    Raise `Unavailable` when none does.
    """
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(limit)
    try:
        # By a descriptor of the folder: a socket's path has at most 107 bytes.
        with paths.parent(path) as (folder, name):
            try:
                connection.connect(os.path.join(f"/proc/self/fd/{folder}", name))
            except OSError as error:
                raise Unavailable(f"no daemon answers at {path}: {error}") from error
        found = Monitor(connection, path)
        try:
            found.greet()
            yield found
        finally:
            found.close()
    finally:
        connection.close()
