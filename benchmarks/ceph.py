"""What volumes of a Ceph cluster cost: made, attached, known; and their data path.

A cluster of the tests' kind runs on this host. Beside ours stands what an operator
would type: ``rbd create``, ``qemu-storage-daemon``, ``losetup``, ``mkfs.ext4``,
``mount``, and so the same mapper as ours here. Rounds of both are interleaved.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import attrs

from benchmarks import fio
from benchmarks.client import Connection, drive, request
from benchmarks.progress import tell
from benchmarks.results import Measure, Results
from benchmarks.servers import Kind, Server, start
from volplugin.ceph.cluster import Cluster
from volplugin.ceph.registry import Registry, Shared
from volplugin.model import State, Volume

TABLE: Final = "Ceph"
SHELL: Final = "shell, same mapper"
RECORDS: Final = 1_000
"""Volumes of other hosts that a start loads."""

_POOL: Final = "volumes"
_OPTIONS: Final = {"driver": "ceph", "size": "1G"}
_LIST: Final = request("List")


def measure(home: Path, results: Results, *, quick: bool) -> None:
    """Measure all of it, under ``ceph …``; `machine.is_available` must be true."""
    # Where the cluster is: the tests have the same one, see `machine.is_available`.
    from support.ceph import Ceph  # noqa: PLC0415

    tell("ceph: a cluster")
    ceph = Ceph()
    try:
        ceph.start()
        rounds = 3 if quick else 15
        with _serving(ceph, home / "ceph") as server:
            _measure_lives(ceph, server, rounds, results)
            _measure_many(server, 20 if quick else 100, results)
            _measure_data_path(ceph, server, results, quick=quick)
            _measure_hang(ceph, server, results)
        _measure_records(ceph, home, results)
    finally:
        ceph.close()


def _kind(ceph: Any, namespace: str) -> Kind:
    def command(home: Path) -> list[str]:
        file = home / "volplugin.toml"
        file.write_text(ceph.backend(namespace=namespace, mapper="qemu"))
        words = [sys.executable, "-m", "volplugin", "serve", f"--config={file}"]
        words += [f"--root={home}/root", f"--socket={home}/plugin.sock"]
        return [*words, f"--admin-socket={home}/admin.sock"]

    return Kind("volplugin", command, lambda _: dict(_OPTIONS), lambda *_: None)


@contextmanager
def _serving(ceph: Any, home: Path) -> Iterator[Server]:
    with start(_kind(ceph, ceph.namespace()), home, probe=_LIST) as server:
        yield server


# Made and attached


@attrs.frozen
class _Shell:
    """The commands that make an image a mounted file system, as typed by hand."""

    ceph: Any
    folder: Path

    def create(self, name: str) -> None:
        """Make an image of 1 GiB."""
        self._run("rbd", "-c", str(self.ceph.conf), "create", "-s", "1G", _at(name))

    def map(self, name: str) -> str:
        """Show the image as a device; return it."""
        place = self.folder / name
        place.mkdir(parents=True, exist_ok=True)
        (place / "disk").touch()
        node = {"driver": "rbd", "node-name": "n", "pool": _POOL, "image": name}
        node |= {"conf": str(self.ceph.conf), "user": "admin", "discard": "unmap"}
        self._run(
            "qemu-storage-daemon",
            "--blockdev",
            json.dumps(node | {"cache": {"direct": True}}),
            "--export",
            f"type=fuse,id=e,node-name=n,mountpoint={place}/disk,writable=on",
            f"--pidfile={place}/pid",
            "--daemonize",
        )
        device = self._run("losetup", "-f", "--show", "--direct-io=on", f"{place}/disk")
        return device.strip()

    def mkfs(self, device: str) -> None:
        """Make the file system."""
        self._run("mkfs.ext4", "-q", device)

    def mount(self, name: str, device: str) -> Path:
        """Mount the device; return where."""
        target = self.folder / name / "mnt"
        target.mkdir(exist_ok=True)
        self._run("mount", device, str(target))
        return target

    def undo(self, name: str, device: str) -> None:
        """Unmount and unmap."""
        place = self.folder / name
        self._run("umount", str(place / "mnt"))
        self._run("losetup", "-d", device)
        pid = (place / "pid").read_text().strip()
        self._run("kill", pid)
        while Path(f"/proc/{pid}").exists():
            time.sleep(0.01)

    def remove(self, name: str) -> None:
        """Delete the image."""
        self._run("rbd", "-c", str(self.ceph.conf), "rm", "--no-progress", _at(name))

    def _run(self, *words: str) -> str:
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def _at(name: str) -> str:
    return f"{_POOL}/{name}"


def _measure_lives(ceph: Any, server: Server, rounds: int, results: Results) -> None:
    shell = _Shell(ceph, server.home / "shell")
    times: dict[str, list[float]] = {}
    with Connection(server.socket) as connection:
        for number in range(rounds + 1):
            tell(f"ceph: round {number} of {rounds}")
            ours = _our_life(connection, f"v{number}")
            theirs = _their_life(shell, f"s{number}")
            if number:  # the first warms both up
                for key, seconds in (*ours.items(), *theirs.items()):
                    times.setdefault(key, []).append(seconds)
    for key, what, beside in (
        (
            "made",
            "New 1 GiB ext4 volume, Create to mounted",
            "create, map, mkfs, mount",
        ),
        ("attached", "Existing volume, Mount", "map, mount"),
    ):
        results.measures[f"ceph {key}"] = Measure(
            f"{what} ({beside})",
            "ms",
            statistics.median(times[f"ours {key}"]) * 1000,
            statistics.median(times[f"theirs {key}"]) * 1000,
            SHELL,
            table=TABLE,
        )


def _our_life(connection: Connection, name: str) -> dict[str, float]:
    def call(verb: str, **message: Any) -> None:
        connection.call(request(verb, Name=name, **message))

    def make() -> None:
        call("Create", Opts=_OPTIONS)
        call("Mount", ID="x")

    made = _seconds(make)
    call("Unmount", ID="x")
    attached = _seconds(lambda: call("Mount", ID="y"))
    call("Unmount", ID="y")
    call("Remove")
    return {"ours made": made, "ours attached": attached}


def _their_life(shell: _Shell, name: str) -> dict[str, float]:
    device = ""

    def make() -> None:
        nonlocal device
        shell.create(name)
        device = shell.map(name)
        shell.mkfs(device)
        shell.mount(name, device)

    def attach() -> None:
        nonlocal device
        device = shell.map(name)
        shell.mount(name, device)

    made = _seconds(make)
    shell.undo(name, device)
    attached = _seconds(attach)
    shell.undo(name, device)
    shell.remove(name)
    return {"theirs made": made, "theirs attached": attached}


def _seconds(action: Callable[[], object]) -> float:
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


def _measure_many(server: Server, volumes: int, results: Results) -> None:
    tell(f"ceph: {volumes} volumes by 8 connections")
    names = [f"m{number}" for number in range(volumes)]
    for verb, message in (("Create", {"Opts": _OPTIONS}), ("Remove", {})):
        steps = [(request(verb, Name=name, **message),) for name in names]
        loads = [steps[number::8] for number in range(8)]
        seconds = _seconds(lambda at=loads: drive(server.socket, at, seconds=600))  # type: ignore[misc]
        if verb == "Create":
            results.measures["ceph many"] = Measure(
                f"{volumes} volumes created by 8 connections, each",
                "ms",
                seconds * 1000 / volumes,
                table=TABLE,
            )


# While the cluster hangs


def _measure_hang(ceph: Any, server: Server, results: Results) -> None:
    tell("ceph: Get and List while the cluster hangs")
    with Connection(server.socket) as connection:
        connection.call(request("Create", Name="known", Opts=_OPTIONS))

        def both() -> None:
            connection.call(request("Get", Name="known"))
            connection.call(_LIST)

        def reads() -> float:
            times = [_seconds(both) for _ in range(500)]
            return statistics.median(times) * 1000

        before = reads()
        ceph.pause("osd")
        try:
            during = reads()
        finally:
            ceph.resume("osd")
        connection.call(request("Remove", Name="known"))
    results.measures["ceph hang"] = Measure(
        "Get and List, the cluster hangs", "ms", during, before, "it does not", TABLE
    )


# What other hosts have made


def _measure_records(ceph: Any, home: Path, results: Results) -> None:
    tell(f"ceph: {RECORDS:,} records")
    namespace = ceph.namespace()
    cluster = Cluster(ceph.access())
    registry = Registry(cluster, _POOL, namespace)
    try:
        for number in range(RECORDS):
            registry.create(Shared(volume=_record(f"r{number}")))
        kind = _kind(ceph, namespace)
        for key, what in (
            ("fresh", f"{RECORDS:,} shared volumes known, from a fresh root"),
            ("start", f"{RECORDS:,} shared volumes known, from a known root"),
        ):
            with start(kind, home / "records", probe=_LIST) as server:
                begun = time.perf_counter()
                with Connection(server.socket) as connection:
                    while connection.call(_LIST).count(b'"Name"') < RECORDS:
                        time.sleep(0.005)
                seconds = server.start_seconds + time.perf_counter() - begun
            results.measures[f"ceph {key}"] = Measure(what, "s", seconds, table=TABLE)
    finally:
        cluster.close()


def _record(name: str) -> Volume:
    facts = {"image": name, "pool": _POOL, "fs": "ext4", "size": "1073741824"}
    return Volume(
        name=name,
        id=f"{name:0>32}",
        backend="ceph",
        driver="rbd",
        options={"size": "1G"},
        facts=facts,
        mountpoint=f"/{name}",
        created_at="2024-01-01T00:00:00.000Z",
        state=State.READY,
    )


# The data path


def _measure_data_path(
    ceph: Any, server: Server, results: Results, *, quick: bool
) -> None:
    shell = _Shell(ceph, server.home / "shell")
    plan = fio.Plan(1, 64, 16) if quick else fio.Plan(4, 128, 32)
    shell.create("bare")
    device = shell.map("bare")
    shell.mkfs(device)
    bare = shell.mount("bare", device)
    with Connection(server.socket) as connection:
        connection.call(request("Create", Name="data", Opts=_OPTIONS))
        answer = json.loads(connection.call(request("Mount", Name="data", ID="x")))
        volume = Path(answer["Mountpoint"])
        samples = fio.measure({"limited": volume, SHELL: bare}, plan)
        connection.call(request("Unmount", Name="data", ID="x"))
        connection.call(request("Remove", Name="data"))
    shell.undo("bare", device)
    shell.remove("bare")
    for job, medians in fio.medians(samples).items():
        results.measures[f"ceph data {job}"] = Measure(
            f"rbd volume: {job}",
            "MiB/s",
            medians["limited"],
            medians[SHELL],
            SHELL,
            table=TABLE,
        )
