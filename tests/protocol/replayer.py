"""A client process that sends what it is given, and tells what came back, as bytes.

``replayer.py SOCKET PROGRAM``; a line ``[connection, request]`` of JSON in, the answer
out, or null when the connection was closed instead. Bytes are written as Latin-1. It
imports no more than it needs, and connects when a number comes for the first time.
"""

import json
import socket
import sys


def main() -> None:
    """Take the name, say so, and send requests until the input ends."""
    path, program = sys.argv[1:]
    # SO_PEERCRED gives the server our pid, /proc/PID/stat this name.
    with open("/proc/self/comm", "w", encoding="utf-8") as comm:
        comm.write(program)
    say("ready")
    connections: dict[int, socket.socket] = {}
    for line in sys.stdin:
        number, request = json.loads(line)
        if number not in connections:
            connections[number] = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connections[number].settimeout(60)
            connections[number].connect(path)
        connections[number].sendall(request.encode("latin-1"))
        answer = receive(connections[number])
        say(json.dumps(answer.decode("latin-1") if answer else None))


def say(line: str) -> None:
    """Write a line to whoever started us."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def receive(connection: socket.socket) -> bytes:
    """Return one answer, or nothing where the connection is closed."""
    answer = b""
    while not is_whole(answer):
        try:
            data = connection.recv(65536)
        except ConnectionResetError:
            return b""
        if not data:
            return b""
        answer += data
    return answer


def is_whole(answer: bytes) -> bool:
    """Tell whether the answer has the length that its head says."""
    head, end, body = answer.partition(b"\r\n\r\n")
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return bool(end) and len(body) >= int(value)
    return False


if __name__ == "__main__":
    main()
