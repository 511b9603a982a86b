"""A client process: named as it is told, it makes the calls that its input names.

``peer.py SOCKET PROGRAM``; a line ``[call, body]`` of JSON in, ``[status, answer]``
out, or ``[0, null]`` when there was none. It imports no more than it needs: tests start
many.
"""

import json
import socket
import sys


def main() -> None:
    """Take the name, say so, and make calls until the input ends."""
    path, program = sys.argv[1:]
    # SO_PEERCRED gives the server our pid, /proc/PID/stat this name.
    with open("/proc/self/comm", "w", encoding="utf-8") as comm:
        comm.write(program)
    say("ready")
    for line in sys.stdin:
        call, message = json.loads(line)
        say(json.dumps(ask(path, call, json.dumps(message).encode())))


def say(line: str) -> None:
    """Write a line to whoever started us."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def ask(path: str, call: str, body: bytes) -> tuple[int, object]:
    """Make one call on a connection of its own."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(60)
        connection.connect(path)
        head = f"POST /VolumeDriver.{call} HTTP/1.1\r\nHost: \r\nConnection: close\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        answer = b""
        while data := connection.recv(65536):
            answer += data
    head_bytes, _, content = answer.partition(b"\r\n\r\n")
    if not head_bytes:
        return 0, None
    return int(head_bytes.split()[1]), json.loads(content)


if __name__ == "__main__":
    main()
