"""A process that connects for others: to the server, they are where it is.

``connector.py``, with a socket as its input: a path in, a connected socket out, or the
number of the error. It imports no more than it needs: tests start many.
"""

import socket


def main() -> None:
    """Connect to each path that is asked for, until the input ends."""
    with socket.socket(fileno=0) as asked:
        while path := asked.recv(4096):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                try:
                    connection.connect(path.decode())
                except OSError as error:
                    asked.send(b"%d" % (error.errno or 0))
                else:
                    socket.send_fds(asked, [b"0"], [connection.fileno()])


if __name__ == "__main__":
    main()
