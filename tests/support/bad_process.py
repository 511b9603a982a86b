"""The bad plugin as a process, alone or in a `Host`, told by its control file."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from support.bad_plugin import KINDS, Call
from support.client import Client
from support.host import Host
from support.wait import eventually

_SCRIPT: Final = Path(__file__).with_name("bad_plugin.py")


class BadProcess:
    """A bad plugin named ``name`` in the folder ``sockets``, in ``host`` if given.

    ``sockets`` is a path inside the host; all else is in ``folder``. What it knows of
    mounts ends with its process, its volumes do not.
    """

    def __init__(
        self, folder: Path, sockets: Path, *, name: str = "bad", host: Host | None
    ) -> None:
        self.name = name
        self.socket = sockets / f"{name}.sock"
        self.volumes = folder / "volumes"
        self.log = folder / f"{name}.log"
        self._control = folder / f"{name}.json"
        self._faults: dict[str, Any] = {}
        self._host = host
        self._process: subprocess.Popen[bytes] | None = None
        self.client = Client(host.path(self.socket) if host else self.socket)

    @property
    def process(self) -> "subprocess.Popen[bytes]":
        """Its process, also after its end."""
        assert self._process is not None, "it was never started"
        return self._process

    def start(self) -> None:
        """Start it and return when it listens."""
        self._write()
        command = [sys.executable, "-I", "-S", str(_SCRIPT)]
        command += [str(self.socket), str(self._control)]
        if self._host is not None:
            self._process = self._host.start(*command, log=self.log)
        else:
            with self.log.open("ab") as output:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=output, stderr=output
                )
        eventually(self._answers, f"{self.name} listens")

    def _answers(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            self.client.activate()
        except OSError:
            return False
        return True

    def fail(
        self,
        verb: str,
        kind: str,
        value: Any = "it can't",
        *,
        times: int | None = None,
        after: bool = False,
    ) -> None:
        """Have calls of ``verb`` fail from now on, as `BadPlugin.fail`."""
        assert kind in KINDS, kind
        self._faults[verb] = {
            "kind": kind,
            "value": value,
            "times": times,
            "after": after,
        }
        self._write()

    def listen(self, how: str) -> None:
        """Be ``open``, or ``refuse`` connections, or ``remove`` the socket too."""
        self._faults["listen"] = how
        self._write()
        if how == "open":
            eventually(self._answers, f"{self.name} listens")
        else:
            eventually(lambda: not self._listens(how), f"{self.name}: {how}")

    def _listens(self, but: str) -> bool:
        try:
            self.client.activate()
        except ConnectionRefusedError:
            return but == "remove"
        except FileNotFoundError:
            return False
        except OSError:
            return True
        return True

    def heal(self) -> None:
        """Behave well and listen."""
        self._faults.clear()
        self._write()
        eventually(self._answers, f"{self.name} listens")

    def calls(self) -> list[Call]:
        """Return all calls that have come, in all its lives, but for Activate."""
        try:
            lines = Path(f"{self._control}.calls").read_text().splitlines()
        except FileNotFoundError:
            return []
        calls = [Call(**fields) for fields in map(_fields, lines)]
        return [call for call in calls if call.verb != "Activate"]

    def count(self, *verbs: str) -> int:
        """Return how many calls of these verbs have come, or of all."""
        return sum(not verbs or call.verb in verbs for call in self.calls())

    def kill(self) -> None:
        """End it by SIGKILL; its socket stays and refuses."""
        self.process.kill()
        self.process.wait(10)

    def close(self) -> None:
        """End it; its socket is gone."""
        if self._process is not None and self._process.poll() is None:
            self.kill()
        self.client.socket.unlink(missing_ok=True)

    def _write(self) -> None:
        fresh = self._control.with_suffix(".new")
        fresh.write_text(json.dumps(self._faults))
        os.replace(fresh, self._control)


def _fields(line: str) -> Mapping[str, Any]:
    fields = json.loads(line)
    assert isinstance(fields, dict)
    return fields
