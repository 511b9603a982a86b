"""A volume plugin of the tests' own, which fails in the ways that it is told to.

In between it keeps volumes as directories, and is strict as bad plugins are: it refuses
a Create of what it has, a mount ID that it has seen, one that it has not, and a Remove
of what is mounted; what it knows of mounts ends with it.

In this process it is a `BadPlugin`, with threads. As a process of its own it is
``bad_plugin.py SOCKET CONTROL``: CONTROL is a JSON file, read again when it was
replaced, with faults by call (see `Fault`), such as ``{"Mount": {"kind": "hang"}}``;
``times`` counts from then on. ``"listen": "refuse"`` or ``"remove"`` ends listening,
with the socket left or taken away. Volumes are in the folder ``volumes`` beside it, and
each call is a line of JSON in ``CONTROL.calls``. By the standard library alone.
"""

import contextlib
import json
import os
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

ANY: Final = "*"  # every call
DRIP = 0.2  # seconds between two bytes of a slow answer
_LOOK: Final = 0.02  # seconds between two looks at what may have changed
_HUGE: Final = 40 << 20  # bytes; a client takes 32M

Address = str | tuple[str, int]


@dataclass(kw_only=True)
class Fault:
    """How a call fails: ``kind`` is one of `KINDS`.

    ``times`` is for how many calls, None for all. The call has its effect only
    ``after`` is true, or where the kind is but a strange form of the right answer.
    ``value`` is what is answered by the kinds *answer*, *error* and *text*.
    """

    kind: str
    times: int | None = None
    value: Any = None
    after: bool = False


@dataclass(frozen=True, kw_only=True)
class Call:
    """A call as it came."""

    verb: str  # the last word, such as Mount or Activate
    message: Mapping[str, Any] = field(default_factory=dict)
    via: str = ""

    @property
    def name(self) -> str:
        """The volume's name."""
        return str(self.message.get("Name", ""))


class _Refusal(Exception):
    """What a plugin says of a call that it can't do."""


def _http(status: int, body: bytes, *lines: str, length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    head = [f"HTTP/1.1 {status} So", *lines, f"Content-Length: {size}"]
    return "\r\n".join([*head, "", ""]).encode() + body


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


def _drip(answer: bytes) -> Iterator[bytes]:
    for byte in _http(200, answer):
        yield bytes([byte])
        time.sleep(DRIP)


def _endless() -> Iterator[bytes]:
    yield b"HTTP/1.1 200 So\r\n\r\n{"
    while True:
        yield b" " * 65536


def _huge() -> Iterator[bytes]:
    yield _http(200, b"", length=_HUGE)
    for _ in range(_HUGE >> 16):
        yield b" " * 65536


def _chunked(answer: bytes, *, end: bool = True) -> bytes:
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in answer)
    head = b"HTTP/1.1 200 So\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + chunks + (b"0\r\n\r\n" if end else b"")


_Form = Callable[[bytes, Any], bytes | Iterator[bytes]]

# Strange forms of the right answer, which is their first argument.
_FORMS: Final[dict[str, _Form]] = {
    "drip": lambda answer, _: _drip(answer),
    "chunked": lambda answer, _: _chunked(answer),
    "http10": lambda answer, _: b"HTTP/1.0 200 So\r\n\r\n" + answer,
    "early": lambda answer, _: _http(200, answer),  # before the body was read
}

# What is no right answer; their second argument is the fault's value.
_ANSWERS: Final[dict[str, _Form]] = {
    "close": lambda *_: b"",
    "hang": lambda *_: b"",
    "reset": lambda *_: _http(200, b'{"Mountp', length=99),
    "cut": lambda *_: _http(200, b'{"Mountp', length=99),
    "cut-error": lambda *_: _http(500, b'{"Er', length=99),
    "cut-chunks": lambda *_: _chunked(b"{}", end=False),
    "garbage": lambda *_: b"SSH-2.0-OpenSSH\r\n\r\n",
    "text": lambda _, value: _http(500, str(value).encode()),
    "error": lambda _, value: _http(500, _json({"Err": value})),
    "refusal": lambda _, value: _http(200, _json({"Err": value})),
    "answer": lambda _, value: _http(200, _json(value)),
    "empty": lambda *_: _http(200, b""),
    "half": lambda *_: _http(200, b'{"Mountpoint": "/'),
    "array": lambda *_: _http(200, b"[1]"),
    "deep": lambda *_: _http(200, b"[" * 100_000),
    "huge": lambda *_: _huge(),
    "endless": lambda *_: _endless(),
    "endless-chunk": lambda *_: iter(
        [
            b"HTTP/1.1 200 So\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n",
            *([b" " * 65536] * 2048),
        ]
    ),
    "redirect": lambda *_: _http(307, b"", "Location: http://localhost/elsewhere"),
}
KINDS: Final = frozenset({*_FORMS, *_ANSWERS})


class BadPlugin:
    """A plugin at ``address``, a socket's path or host and port (0 for any).

    ``calls`` are all that came, also those that failed; ``held`` the mount IDs by
    volume, ``made`` the options that came with each Create.
    """

    _is_in_test = True

    def __init__(
        self,
        folder: str | os.PathLike[str],
        address: Address,
        *,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.folder = str(folder)
        self.address = address
        self.calls: list[Call] = []
        self.held: dict[str, list[str]] = {}
        self.made: dict[str, Mapping[str, str]] = {}
        self.implements: object = ["VolumeDriver"]
        self._tls = tls
        self._faults: dict[str, Fault] = {}
        self._lock = threading.RLock()
        self._listener: socket.socket | None = None
        self._stopped = threading.Event()
        self._threads: list[threading.Thread] = []
        self._open: set[socket.socket] = set()
        os.makedirs(self.folder, exist_ok=True)

    # How it behaves

    def fail(
        self,
        verb: str,
        kind: str,
        value: Any = "it can't",
        *,
        times: int | None = None,
        after: bool = False,
    ) -> None:
        """Have calls of ``verb`` fail, for ``times`` of them or until `heal`."""
        assert kind in KINDS, kind
        fault = Fault(kind=kind, times=times, value=value, after=after)
        with self._lock:
            self._faults[verb] = fault

    def heal(self) -> None:
        """Behave well; what hangs ends without an answer."""
        self.set_faults({})

    def set_faults(self, faults: Mapping[str, Fault]) -> None:
        """Fail by these faults alone."""
        with self._lock:
            self._faults = dict(faults)

    def count(self, *verbs: str) -> int:
        """Return how many calls of these verbs have come, or of all."""
        with self._lock:
            return sum(not verbs or call.verb in verbs for call in self.calls)

    def verbs(self) -> list[str]:
        """Return the verbs of all calls that have come, in their order."""
        with self._lock:
            return [call.verb for call in self.calls]

    def forget(self) -> None:
        """Forget all mounts, as by a restart."""
        with self._lock:
            self.held.clear()

    def path(self, name: str) -> str:
        """Return the directory of a volume."""
        return os.path.join(self.folder, name)

    def volumes(self) -> list[str]:
        """Return the names of its volumes."""
        return sorted(os.listdir(self.folder))

    # Its life

    def start(self) -> None:
        """Listen, with what is left of an earlier socket replaced."""
        self._stopped.clear()
        if isinstance(self.address, str):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.address)
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        else:
            listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(self.address)
        if self._is_in_test:
            _listen_elsewhere(listener)
        else:
            listener.listen(64)
        if not isinstance(self.address, str):
            self.address = listener.getsockname()
        self._listener = listener
        self._run(self._accept, listener)

    def stop(self, *, unlink: bool = True) -> None:
        """End listening and all connections; the socket refuses then, or is gone."""
        listener, self._listener = self._listener, None
        if listener is not None:
            self._end(listener)
        if unlink and isinstance(self.address, str):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.address)

    def close(self) -> None:
        """End it; its socket is gone."""
        self.stop()

    def _end(self, listener: socket.socket) -> None:
        self._stopped.set()
        # A close alone leaves accept(2) waiting.
        listener.shutdown(socket.SHUT_RDWR)
        with self._lock:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        assert not any(thread.is_alive() for thread in self._threads)
        self._threads.clear()
        listener.close()

    def _run(self, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        while not self._stopped.is_set():
            try:
                connection = listener.accept()[0]
            except OSError:
                return
            self._run(self._serve, connection)

    def _serve(self, plain: socket.socket) -> None:
        connection = plain
        with self._lock:
            self._open.add(plain)
        try:
            if self._tls is not None:
                connection = self._tls.wrap_socket(plain, server_side=True)
            if not self._stopped.is_set():
                self._converse(connection)
        except (OSError, EOFError):
            pass  # the client has left
        finally:
            with self._lock:
                self._open.discard(plain)
            connection.close()
            plain.close()

    def _converse(self, connection: socket.socket) -> None:
        head = b""
        # Without its last byte: what closes with a byte unread resets a unix socket.
        while not head.endswith(b"\r\n\r"):
            head += _received(connection, 1)
        words = head.decode("latin-1").split("\r\n")
        fields = dict(line.lower().split(": ", 1) for line in words[1:] if ": " in line)
        verb = words[0].split()[1].rpartition(".")[2]
        size = int(fields["content-length"])
        fault = self._next_fault(verb)
        kind = fault.kind if fault else ""
        body = b"\n{}"
        if kind not in {"early", "reset"} or (fault and fault.after):
            # The first byte is the head's last.
            body = b"".join(_received(connection, 1) for _ in range(size + 1))
        message = json.loads(body) if body.strip() else {}
        call = Call(verb=verb, message=message, via=fields.get("via", ""))
        self._note(call)
        answer = b""
        if fault is None or fault.after or kind in _FORMS:
            try:
                answer = _json(self._do(call))
            except _Refusal as refusal:
                connection.sendall(_http(500, _json({"Err": str(refusal)})))
                return
        self._answer(connection, fault, answer)

    def _answer(
        self, connection: socket.socket, fault: Fault | None, answer: bytes
    ) -> None:
        if fault is None:
            connection.sendall(_http(200, answer))
            return
        if fault.kind == "hang":
            while self._is_hanging() and not self._stopped.is_set():
                time.sleep(_LOOK)
        form = {**_FORMS, **_ANSWERS}[fault.kind](answer, fault.value)
        for part in [form] if isinstance(form, bytes) else form:
            if self._stopped.is_set():
                return
            connection.sendall(part)
        if fault.kind == "reset" and connection.family != socket.AF_UNIX:
            linger = struct.pack("ii", 1, 0)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)

    def _is_hanging(self) -> bool:
        with self._lock:
            return any(fault.kind == "hang" for fault in self._faults.values())

    def _next_fault(self, verb: str) -> Fault | None:
        with self._lock:
            for key in (verb, ANY):
                fault = self._faults.get(key)
                if fault is None or fault.times == 0:
                    continue
                if fault.times is not None:
                    fault.times -= 1
                return fault
        return None

    def _note(self, call: Call) -> None:
        with self._lock:
            self.calls.append(call)

    # What it does when it behaves well

    def _do(self, call: Call) -> Mapping[str, Any]:
        with self._lock:
            if call.verb in {"Get", "Path", "Remove", "Mount", "Unmount"}:
                self._require(call.name)
            match call.verb:
                case "Activate":
                    return {"Implements": self.implements}
                case "List":
                    return {"Volumes": [self._told(each) for each in self.volumes()]}
                case "Get":
                    return {"Volume": self._told(call.name)}
                case "Path":
                    return {"Mountpoint": self._told(call.name)["Mountpoint"]}
                case "Create" | "Remove" | "Mount" | "Unmount":
                    return self._change(call)
        raise _Refusal(f"no such call {call.verb}")

    def _change(self, call: Call) -> Mapping[str, Any]:
        changes = {
            "Create": self._create,
            "Remove": self._remove,
            "Mount": self._mount,
            "Unmount": self._unmount,
        }
        return changes[call.verb](call)

    def _require(self, name: str) -> None:
        if name not in self.volumes():
            raise _Refusal(f"no such volume {name}")

    def _told(self, name: str) -> Mapping[str, str]:
        mountpoint = self.path(name) if self.held.get(name) else ""
        return {"Name": name, "Mountpoint": mountpoint}

    def _create(self, call: Call) -> Mapping[str, Any]:
        if not call.name:
            raise _Refusal("no name")
        if call.name in self.volumes():
            raise _Refusal(f"volume {call.name} exists")
        os.mkdir(self.path(call.name))
        self.made[call.name] = call.message.get("Opts") or {}
        return {}

    def _remove(self, call: Call) -> Mapping[str, Any]:
        if self.held.get(call.name):
            raise _Refusal(f"volume {call.name} is mounted")
        os.rename(self.path(call.name), f"{self.folder}.removed-{time.time_ns()}")
        return {}

    def _mount(self, call: Call) -> Mapping[str, Any]:
        held = self.held.setdefault(call.name, [])
        if call.message["ID"] in held:
            raise _Refusal(f"mount ID {call.message['ID']} twice")
        held.append(call.message["ID"])
        return {"Mountpoint": self.path(call.name)}

    def _unmount(self, call: Call) -> Mapping[str, Any]:
        held = self.held.get(call.name, [])
        if call.message["ID"] not in held:
            raise _Refusal(f"mount ID {call.message['ID']} is unknown")
        held.remove(call.message["ID"])
        return {}


def _listen_elsewhere(listener: socket.socket) -> None:
    """Have another process listen: to SO_PEERCRED it is the plugin, and not this one.

    volplugin takes what listens in its own process for itself.
    """
    script = "import socket, sys; socket.socket(fileno=int(sys.argv[1])).listen(64)"
    number = listener.fileno()
    command = [sys.executable, "-I", "-S", "-c", script, str(number)]
    subprocess.run(command, pass_fds=[number], check=True)


def _received(connection: socket.socket, size: int) -> bytes:
    data = connection.recv(size)
    if not data:
        raise EOFError
    return data


class _Told(BadPlugin):
    """A plugin that a file tells how to behave, and that writes down its calls."""

    _is_in_test = False

    def __init__(self, folder: str, path: str, control: str) -> None:
        super().__init__(folder, path)
        self._control = control
        self._read = (0, 0)
        self.listen = "open"

    def look(self) -> None:
        """Read the file again where it was replaced."""
        with self._lock, contextlib.suppress(FileNotFoundError):
            status = os.stat(self._control)
            if (status.st_ino, status.st_mtime_ns) == self._read:
                return
            self._read = (status.st_ino, status.st_mtime_ns)
            with open(self._control, encoding="utf-8") as file:
                said = json.load(file)
            self.listen = said.pop("listen", "open")
            self.set_faults({verb: Fault(**each) for verb, each in said.items()})

    def follow(self) -> None:
        """Listen or not, as the file says; for ever."""
        now = "remove"
        while True:
            self.look()
            if self.listen != now:
                now = self.listen
                self.stop(unlink=now == "remove")
                if now == "open":
                    self.start()
            time.sleep(_LOOK)

    def _next_fault(self, verb: str) -> Fault | None:
        self.look()  # whoever replaced the file need not wait
        return super()._next_fault(verb)

    def _note(self, call: Call) -> None:
        line = {"verb": call.verb, "message": call.message, "via": call.via}
        with self._lock, open(f"{self._control}.calls", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    place, told_by = sys.argv[1:]
    beside = os.path.join(os.path.dirname(os.path.abspath(told_by)), "volumes")
    _Told(beside, place, told_by).follow()
