"""A PostgreSQL on a volume that is taken over in the middle of its work."""

import contextlib
import os
import pwd
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from hosts import Hosts, sharing
from support.ceph import Ceph
from support.require import missing, require
from support.wait import eventually

pytestmark = pytest.mark.root

_DATABASE: Final = "postgres"
_USER: Final = "postgres"
# On the command line: what a file got without a sync may be lost with the host.
_SETTINGS: Final = {
    "listen_addresses": "",
    "max_wal_size": "32MB",
    "min_wal_size": "8MB",
    "shared_buffers": "16MB",
}


def program(name: str) -> str:
    """Return a program of Debian's server packages, which are in no PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    if not found:
        missing(f"{name} is missing: apt-get install postgresql")
    return str(found[-1])


def as_postgres(*words: str | Path) -> list[str]:
    """Return a command line that is run as the user who may run servers.

    Tests' folders are for root alone: it may pass through them.
    """
    who = [f"--reuid={_USER}", f"--regid={_USER}", "--clear-groups"]
    may = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    return [require("setpriv"), *who, *may, *map(str, words)]


class Postgres:
    """A server on the data in a volume, from `start` to `stop`."""

    def __init__(self, volume: Path) -> None:
        self.data = volume / "data"
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  it is closed with it
        self._process: subprocess.Popen[bytes] | None = None

    def initialise(self) -> None:
        """Make the data."""
        words = ["-A", "trust", "-U", _USER, "--locale=C", "--wal-segsize=1"]
        run(program("initdb"), *words, "-D", self.data)

    def start(self) -> None:
        """Start the server; return when it takes queries."""
        words = [f"--{name}={value}" for name, value in _SETTINGS.items()]
        self._process = subprocess.Popen(
            as_postgres(program("postgres"), "-D", self.data, "-k", self.data, *words),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            cwd="/",
        )
        eventually(self._answers, "PostgreSQL answers", seconds=60)

    def has_ended(self) -> bool:
        """Tell whether the server has given up."""
        return self._process is None or self._process.poll() is not None

    def client(self, name: str, *words: str) -> list[str]:
        """Return the command line of one of its clients."""
        where = ["-h", str(self.data), "-U", _USER]
        return as_postgres(program(name), *where, *words, _DATABASE)

    def query(self, text: str) -> str:
        """Return what a query gives, a row a line."""
        done = subprocess.run(
            self.client("psql", "-XqAt", "-c", text),
            capture_output=True,
            text=True,
            check=False,
            cwd="/",
            timeout=60,
        )
        assert done.returncode == 0, done.stderr + self.log
        return done.stdout.strip()

    def stop(self) -> None:
        """End the server in order."""
        assert self._process is not None
        self._process.send_signal(signal.SIGINT)
        assert self._process.wait(60) == 0, self.log

    def close(self) -> None:
        """End the server, if it is still there."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGQUIT)
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(30)
        self._log.close()

    @property
    def log(self) -> str:
        """What the server said."""
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), size, 0).decode(errors="replace")

    def _answers(self) -> bool:
        assert not self.has_ended(), self.log
        done = subprocess.run(
            self.client("psql", "-XqAt", "-c", "SELECT 1"),
            capture_output=True,
            check=False,
            cwd="/",
            timeout=60,
        )
        return done.returncode == 0


class Committer:
    """A client that inserts number after number, and knows which were committed."""

    def __init__(self, server: Postgres) -> None:
        self.committed: list[int] = []
        self._client = subprocess.Popen(
            server.client("psql", "-XqAt"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            bufsize=1,
            cwd="/",
        )
        self._thread = threading.Thread(target=self._go_on)
        self._thread.start()

    def close(self) -> None:
        """End it."""
        self._client.kill()
        self._client.wait(60)
        self._thread.join(60)
        for stream in (self._client.stdin, self._client.stdout):
            assert stream is not None
            with contextlib.suppress(OSError):  # there is nobody to write to
                stream.close()

    def _go_on(self) -> None:
        # psql prints a row when the server has said that its statement is committed.
        assert self._client.stdin is not None
        assert self._client.stdout is not None
        number = 0
        with contextlib.suppress(OSError):
            while True:
                text = f"INSERT INTO committed VALUES ({number}) RETURNING number;\n"
                self._client.stdin.write(text)
                if self._client.stdout.readline().strip() != str(number):
                    return
                self.committed.append(number)
                number += 1


def run(*words: str | Path) -> None:
    """Run a program as the database's user; it must succeed."""
    done = subprocess.run(
        as_postgres(*words),
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def hosts(ceph: Ceph, namespace: str) -> Iterator[Hosts]:
    """Hosts that share a namespace."""
    with sharing(ceph, namespace) as made:
        yield made


@pytest.mark.timeout(300)
def test_take_over(hosts: Hosts) -> None:
    """PostgreSQL has every committed row after another host took its volume over."""
    program("initdb")
    user = pwd.getpwnam(_USER)
    a, b = hosts("a"), hosts("b")
    a.client.create(
        "pg",
        {
            "driver": "ceph",
            "size": "512M",
            "uid": str(user.pw_uid),
            "gid": str(user.pw_gid),
        },
    )
    hosts.all_know("pg")
    with contextlib.ExitStack() as stack:
        first = Postgres(a.mount("pg"))
        stack.callback(first.close)
        first.initialise()
        first.start()
        first.query("CREATE TABLE committed (number int PRIMARY KEY)")
        subprocess.run(
            first.client("pgbench", "-i", "-q"),
            capture_output=True,
            check=True,
            cwd="/",
            timeout=100,
        )
        load = subprocess.Popen(
            first.client("pgbench", "-n", "-c", "2", "-T", "200"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
        )
        stack.callback(load.wait, 60)
        stack.callback(load.kill)
        committer = Committer(first)
        stack.callback(committer.close)
        count = "SELECT count(*) FROM pgbench_history"
        eventually(lambda: len(committer.committed) > 100, "rows are committed")
        eventually(lambda: int(first.query(count)) > 20, "pgbench is at work")
        b.told("volume", "takeover", "pg")
        volume = b.mount("pg")
        # Its process id is of the same machine here, so the other must have ended.
        eventually(first.has_ended, "the fenced server gives up", seconds=100)
        committer.close()
        assert load.wait(60) != 0
        second = Postgres(volume)
        stack.callback(second.close)
        second.start()
        found = second.query("SELECT number FROM committed").split()
        lost = set(committer.committed) - set(map(int, found))
        assert not lost, f"{len(lost)} of {len(committer.committed)}: {sorted(lost)}"
        sums = second.query(
            "SELECT (SELECT sum(abalance) FROM pgbench_accounts),"
            " (SELECT sum(bbalance) FROM pgbench_branches),"
            " (SELECT sum(tbalance) FROM pgbench_tellers),"
            " (SELECT sum(delta) FROM pgbench_history)"
        )
        assert len(set(sums.split("|"))) == 1, sums
        assert int(second.query(count)) > 20
        second.query("INSERT INTO committed VALUES (-1)")
        second.stop()
    b.unmount("pg")
    a.unmount("pg")
    hosts.assert_whole("pg")
