"""Who is at the other end of a socket, and whether it still lives."""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import attrs
import pytest
from support.commands import wait_for_program

from volplugin.host import processes
from volplugin.model import Client


def test_boot_id() -> None:
    """The boot id is the kernel's and does not change."""
    assert len(processes.boot_id()) == 36
    assert processes.boot_id() == processes.boot_id()


def test_client_of_a_connection(scratch: Path) -> None:
    """The peer of an accepted connection is named with pid and start."""
    path = str(scratch / "socket")
    with (
        socket.socket(socket.AF_UNIX) as server,
        socket.socket(socket.AF_UNIX) as client,
    ):
        server.bind(path)
        server.listen()
        client.connect(path)
        accepted, _ = server.accept()
        with accepted:
            found = processes.client_of(accepted)
    assert found.pid == os.getpid()
    assert found.program == Path("/proc/self/comm").read_text().rstrip("\n")
    assert found.started > 0
    assert processes.is_alive(found)


CONNECT = """
import socket, sys, time
s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); print(flush=True)
sys.stdin.read()
"""


@pytest.mark.root
def test_a_client_that_ends(scratch: Path) -> None:
    """A client is alive until it ends, a zombie is not; then only pid is known."""
    path = str(scratch / "socket")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        child = subprocess.Popen(
            [sys.executable, "-c", CONNECT, path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        accepted, _ = server.accept()
        with accepted:
            found = processes.client_of(accepted)
            assert found.pid == child.pid
            assert processes.is_alive(found)
            child.kill()
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
            assert not processes.is_alive(found)
            child.communicate()
            assert not processes.is_alive(found)
            assert processes.client_of(accepted) == Client(pid=child.pid)
    assert not processes.is_alive(Client(pid=child.pid))


@pytest.mark.parametrize("name", ["a) S 1 (b", "((", "))", "two words"])
def test_parentheses_in_a_name(scratch: Path, name: str) -> None:
    """A program's name may look like the rest of the line."""
    program = scratch / name
    shutil.copy("/bin/sleep", program)
    with subprocess.Popen([program, "600"]) as child:
        wait_for_program(child.pid, name)
        found = processes._stat(child.pid)
        child.kill()
    assert found is not None
    assert found.program == name
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - found.started / os.sysconf(
        "SC_CLK_TCK"
    )
    assert -0.1 < age < 30


def test_a_reused_pid_is_another_process() -> None:
    """The start time tells two processes with one pid apart."""
    found = processes._stat(os.getpid())
    assert found is not None
    client = Client(pid=os.getpid(), started=found.started)
    assert processes.is_alive(client)
    assert not processes.is_alive(attrs.evolve(client, started=client.started - 1))


def test_an_unknown_client_counts_as_alive() -> None:
    """A process of another pid namespace cannot be known to have ended."""
    assert processes.is_alive(Client(pid=0, started=3))


@pytest.mark.root
def test_the_owner_of_a_process() -> None:
    """It is the user that it runs as, though its folder in /proc may be root's."""
    assert processes.owner(os.getpid()) == os.getuid()
    with subprocess.Popen(["setpriv", "--reuid=1234", "sleep", "600"]) as child:
        wait_for_program(child.pid, "sleep")
        assert processes.owner(child.pid) == 1234
        child.kill()
    assert processes.owner(child.pid) is None
