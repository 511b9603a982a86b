"""Hosts that meet with trouble: real servers on a cluster, started in no time.

Each has a root, sockets and a name of its own. `Cluster` looks at the cluster as its
administrator does, `disagreements` at what cluster, host and API say of the volumes.
"""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, cast

from cephfs_cases import MOUNT, Administrator
from support import processes
from support.ceph import POOL, Ceph
from support.client import PluginError
from support.mounts import Mount, read_mounts
from support.plugin import Plugin, plugin_environment
from support.wait import eventually

from volplugin.ceph.bindings import load

SCRIPT: Final = Path(__file__).parents[1] / "crash" / "forkserver.py"
RECORD: Final = "volplugin.volume."
INDEX: Final = "volplugin.index"


class Child:
    """A process of the fork server, with as much of `subprocess.Popen` as is used."""

    def __init__(self, forks: "Forks", pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._forks = forks

    def poll(self) -> int | None:
        """Return the exit status, or None while it runs."""
        if self.returncode is None:
            self.returncode = self._forks.ask({"poll": self.pid})
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Wait for the end and return the exit status."""
        end = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("volplugin", timeout)
            time.sleep(0.003)
        return status

    def send_signal(self, number: int) -> None:
        """Send a signal unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)


class Forks:
    """A process that has all of volplugin imported, and forks servers."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, SCRIPT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=plugin_environment(),
        )
        self._children: list[Child] = []

    def ask(self, order: Mapping[str, Any]) -> int | None:
        """Give an order and return its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            return cast("int | None", json.loads(self._process.stdout.readline()))

    def fork(
        self, words: Sequence[str], log: Path, environment: Mapping[str, str]
    ) -> Child:
        """Start ``volplugin WORDS``; what it prints is added to ``log``."""
        pid = self.ask({"words": words, "environment": environment, "output": str(log)})
        assert pid is not None
        self._children.append(Child(self, pid))
        return self._children[-1]

    def close(self) -> None:
        """End it, and what a failed test left running."""
        for child in self._children:
            child.kill()
            child.wait(10)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(10)


class Machine(Plugin):
    """A host's server. Its backends are ``ceph``, ``cephfs`` and those of no cluster.

    ``settings`` are those of both backends of the cluster, as TOML has them; those that
    begin with ``rbd_`` or ``cephfs_`` go to one of them, None leaves one out.
    ``backends`` are others by name, which differ from these by what is given. ``only``
    is the one backend that there is.
    """

    def __init__(
        self,
        forks: Forks,
        folder: Path,
        world: "World",
        name: str,
        only: str | None,
        **settings: Any,
    ) -> None:
        folder.mkdir(parents=True)
        self.name = name
        self.folder = folder
        self._forks = forks
        top = {
            "sweep-interval": settings.pop("sweep_interval", 0.5),
            "follow-interval": settings.pop("follow_interval", 1.0),
            "usage-interval": settings.pop("usage_interval", 60.0),
        }
        timeouts = settings.pop("timeouts", {})
        common: dict[str, Any] = {
            "conf": str(world.ceph.conf),
            "user": "volplugin",
            "keyring": str(world.ceph.least()),
            "host-name": f"host-{name}",
            "timeout": 4,
        }
        of_rbd = {"driver": "rbd", "pool": POOL, "namespace": world.namespace}
        of_cephfs = {"directory": world.directory, "mount": MOUNT}
        backends = {"ceph": {**common, **of_rbd}, "cephfs": {**common, **of_cephfs}}
        extra = settings.pop("backends", {})
        for key, value in settings.items():
            kind, _, rest = key.partition("_")
            one = {"rbd": ["ceph"], "cephfs": ["cephfs"]}.get(kind)
            for backend in one or backends:
                backends[backend][(rest if one else key).replace("_", "-")] = value
        for backend, values in extra.items():
            kind = "cephfs" if values.get("driver") == "cephfs" else "ceph"
            backends[backend] = {**backends[kind], **values}
        if only is not None:
            backends = {only: backends[only]}
        self.has_sessions = "cephfs" in backends
        lines = [_line(key, value) for key, value in top.items()]
        lines += ["[timeouts]", *(_line(*each) for each in timeouts.items())]
        for backend, values in backends.items():
            lines.append(f"[backend.{backend}]")
            lines += [_line(*each) for each in values.items() if each[1] is not None]
        super().__init__(folder, config="\n".join(lines))

    def start(
        self,
        *,
        failpoints: str = "",
        environment: Mapping[str, str] | None = None,
        wait: bool = True,
    ) -> None:
        """Do as `Plugin.start`, forked."""
        assert not self.is_running(), "it is running already"
        words = [*self.command("serve")[3:], "--socket", str(self.socket)]
        words += ["--log-format", "json", "-v"]
        variables = {**plugin_environment(), **(environment or {})}
        if failpoints:
            variables["VOLPLUGIN_FAILPOINTS"] = failpoints
        child = self._forks.fork(words, self._log, variables)
        self._process = cast("subprocess.Popen[bytes]", child)
        if wait:
            self.wait_until_ready()

    def place(self, backend: str) -> Path:
        """Return the folder of a backend."""
        return self.root / backend

    def status(self, name: str) -> Mapping[str, Any]:
        """Return the Status of a volume."""
        status: Mapping[str, Any] = self.client.get(name)["Status"]
        return status

    def mounts(self) -> list[Mount]:
        """Return what is mounted below its root."""
        below = f"{self.root}/"
        return [each for each in read_mounts() if each.mountpoint.startswith(below)]

    def helpers(self, word: str = "") -> list[int]:
        """Return its helper processes: those with its root in their command lines."""
        found = []
        # The session's mark is not in their environments.
        for name in filter(str.isdigit, os.listdir("/proc")):
            command = processes.command_of(int(name))
            if f"{self.root}/" in command and word in command:
                found.append(int(name))
        return found


def _line(key: str, value: Any) -> str:
    return f"{key} = {json.dumps(value)}"


class World:
    """A place in a cluster, the hosts on it, and what the cluster has there."""

    def __init__(self, ceph: Ceph, forks: Forks, folder: Path) -> None:
        self.ceph = ceph
        self.forks = forks
        self.namespace = ceph.namespace()
        self.directory = f"/{self.namespace}"
        self.machines: list[Machine] = []
        self.users_images: set[str] = set()
        self._folder = folder
        self._numbers = itertools.count()
        # As the administrator: the least rights end at some of what is looked at.
        self._rados = load("rados").Rados(conffile=str(ceph.conf), name="client.admin")
        self._rados.connect()
        self._files = Administrator(ceph)

    def machine(
        self, name: str = "a", *, only: str | None = None, **settings: Any
    ) -> Machine:
        """Make a host, whose server is still to be started."""
        folder = self._folder / f"{next(self._numbers)}{name}"
        made = Machine(self.forks, folder, self, name, only, **settings)
        self.machines.append(made)
        return made

    def end(self) -> None:
        """End all servers; the log of none may tell of a bug."""
        machines, self.machines = self.machines, []
        try:
            for machine in machines:
                # The metadata server would wait a minute for the client of a dead one.
                if machine.is_running() and not machine.has_sessions:
                    machine.kill()
                machine.close()
        finally:
            for machine in machines:
                clear(machine)

    def wipe(self) -> None:
        """Take away what a failed test left in the cluster, so that none follows it."""
        rbd = load("rbd")
        with self.io() as ioctx:
            for name in sorted(self.images()):
                for address in self.watchers(name):
                    self._rados.blocklist_add(address)
                with contextlib.closing(rbd.Image(ioctx, name)) as handle:
                    for each in list(handle.list_snaps()):
                        with contextlib.suppress(rbd.Error):  # it has clones
                            handle.remove_snap(each["name"])
                rbd.RBD().trash_move(ioctx, name)
            for each in list(rbd.RBD().trash_list(ioctx)):
                with contextlib.suppress(rbd.Error):
                    rbd.RBD().trash_remove(ioctx, each["id"], force=True)
        for pool in (POOL, "cephfs_data"):
            with self.io(pool) as ioctx:
                for each in list(ioctx.list_objects()):
                    if each.key.startswith(RECORD) or each.key == INDEX:
                        ioctx.remove_object(each.key)
        self._remove_directories()
        self.users_images.clear()

    def _remove_directories(self) -> None:
        for name in self.entries("volumes"):
            snapshots = f"{self.directory}/volumes/{name}/.snap"
            for each in self._files.names(snapshots):
                self._files.remove(f"{snapshots}/{each}")
        self._files.remove(self.directory)
        self._files.remove(f"{self.directory}-users")

    def close(self) -> None:
        """Let go of the cluster; nothing may be left there."""
        try:
            self.end()
            left = self.left()
            if left:
                self.wipe()
        finally:
            self._remove_directories()
            self._files.close()
            self._rados.shutdown()
        assert not left, f"left in the cluster: {left}"

    @contextlib.contextmanager
    def io(self, pool: str = POOL, namespace: str | None = None) -> Iterator[Any]:
        """Yield an I/O context of the volumes' place."""
        ioctx = self._rados.open_ioctx(pool)
        try:
            ioctx.set_namespace(self.namespace if namespace is None else namespace)
            yield ioctx
        finally:
            ioctx.close()

    def images(self) -> set[str]:
        """Return the names of all images."""
        with self.io() as ioctx:
            return set(load("rbd").RBD().list(ioctx))

    def trash(self) -> list[str]:
        """Return the names of what is in RBD's trash."""
        with self.io() as ioctx:
            return [each["name"] for each in load("rbd").RBD().trash_list(ioctx)]

    def watchers(self, image: str) -> list[str]:
        """Return who has an image open."""
        rbd = load("rbd")
        with (
            self.io() as ioctx,
            contextlib.closing(rbd.Image(ioctx, image, read_only=True)) as handle,
        ):
            return [str(each["addr"]) for each in handle.watchers_list()]

    def records(self, backend: str) -> dict[str, dict[str, Any]]:
        """Return the records of the volumes of a backend, by name."""
        pool = POOL if backend == "ceph" else "cephfs_data"
        with self.io(pool) as ioctx:
            names = [each.key for each in ioctx.list_objects()]
            return {
                name.removeprefix(RECORD): json.loads(ioctx.read(name, 1 << 16))
                for name in names
                if name.startswith(RECORD)
            }

    def index(self, backend: str) -> dict[str, str]:
        """Return the index of a backend: names and ids."""
        rados = load("rados")
        pool = POOL if backend == "ceph" else "cephfs_data"
        with self.io(pool) as ioctx, rados.ReadOpCtx() as op:
            found, _ = ioctx.get_omap_vals(op, "", "", 1000)
            try:
                ioctx.operate_read_op(op, INDEX)
            except rados.ObjectNotFound:
                return {}
            return {key: value.decode() for key, value in found}

    def entries(self, folder: str) -> list[str]:
        """Return what is in a folder of the CephFS backend: volumes or trash."""
        return self._files.names(f"{self.directory}/{folder}")

    @property
    def files(self) -> Administrator:
        """The file system, as its administrator sees it."""
        return self._files

    def left(self) -> dict[str, Any]:
        """Return what is in the cluster though no volume should be."""
        found: dict[str, Any] = {
            "images": sorted(self.images()),
            "trash": self.trash(),
            "directories": self.entries("volumes"),
            "trash of cephfs": self.entries("trash"),
        }
        for backend in ("ceph", "cephfs"):
            found[f"records of {backend}"] = sorted(self.records(backend))
            found[f"index of {backend}"] = self.index(backend)
        return {what: which for what, which in found.items() if which}

    def disagreements(self, machine: Machine) -> list[str]:
        """Say what cluster, host and API do not agree on; no other host may hold any.

        Images and directories that belong to no record, trash, holders and mappings
        without a mount, helpers, loop devices and files that nobody needs.
        """
        said: list[str] = []
        listed = machine.client.list()
        attached = {name for name in listed if machine.status(name).get("attached")}
        unclear = {
            f"{name}: {error}"
            for name in listed
            if (error := machine.status(name).get("error"))
        }
        _differ(said, "errors in Status", unclear, set())
        records = {kind: self.records(kind) for kind in ("ceph", "cephfs")}
        every = {**records["ceph"], **records["cephfs"]}
        _differ(said, "API and records", set(listed), set(every))
        for kind, of_kind in records.items():
            ids = {name: each["volume"]["id"] for name, each in of_kind.items()}
            _differ(said, f"index of {kind}", self.index(kind).items(), ids.items())
        for name, each in every.items():
            if each["volume"]["state"] != "ready":
                said.append(f"{name} is {each['volume']['state']}")
            hosts = [holder["host"] for holder in each["holders"]]
            wanted = [f"host-{machine.name}"] if name in attached else []
            if hosts != wanted:
                said.append(f"holders of {name}: {hosts}, not {wanted}")
        facts = [each["volume"]["facts"] for each in records["ceph"].values()]
        images = {each["image"] for each in facts} | self.users_images
        _differ(said, "images", self.images(), images)
        places = [each["volume"]["facts"] for each in records["cephfs"].values()]
        own = {os.path.basename(f["path"]) for f in places if "adopted" not in f}
        _differ(said, "directories", set(self.entries("volumes")), own)
        _differ(said, "trash", {*self.trash(), *self.entries("trash")}, set())
        said += host_disagreements(machine, listed, attached)
        return said

    def settled(self, machine: Machine, *, seconds: float = 15) -> None:
        """Wait until all agree, and fail with what they do not agree on."""
        said: list[str] = []

        def agree() -> bool:
            try:
                said[:] = self.disagreements(machine)
            except (PluginError, load("rados").Error, load("rbd").Error) as error:
                said[:] = [f"gone meanwhile: {error}"]
            return not said

        try:
            eventually(agree, "all agree", seconds=seconds)
        except AssertionError:
            lines = machine.log.splitlines()
            log = [line for line in lines if '"event":"call"' not in line][-30:]
            raise AssertionError("\n".join([str(said), *log])) from None


def host_disagreements(
    machine: Machine, listed: Mapping[str, str], attached: set[str]
) -> list[str]:
    """Say what is on a host that no volume needs, or is missing."""
    said: list[str] = []
    where = {listed[name] for name in attached}
    mounted = {
        each.mountpoint
        for each in machine.mounts()
        if "/mappings/" not in each.mountpoint
    }
    _differ(said, "mounts", mounted, where)
    of_rbd = {name for name in attached if "/ceph/" in listed[name]}
    mappings = _names(machine.place("ceph") / "mappings")
    if len(mappings) != len(of_rbd):
        said.append(f"mappings {mappings} of {of_rbd}")
    _differ(said, "staging", _names(machine.place("ceph") / "staging"), [])
    there = set(_names(machine.place("ceph") / "volumes"))
    _differ(said, "mountpoints", there - set(listed), set())
    there = set(_names(machine.place("cephfs") / "volumes"))
    _differ(said, "mountpoints", there - attached, set())
    loops = [each for each in _loops() if f"{machine.root}/" in each]
    if len(loops) != len(of_rbd):
        said.append(f"loop devices: {loops}")
    if len(machine.helpers()) != len(attached):
        commands = [processes.command_of(pid) for pid in machine.helpers()]
        said.append(f"helpers: {commands} of {attached}")
    return said


def clear(machine: Machine) -> None:
    """Take away what a failed test left of a host: mounts, helpers, loop devices."""
    for pid in machine.helpers():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for mount in reversed(machine.mounts()):
        subprocess.run(["umount", "-l", mount.mountpoint], check=False)
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            if f"{machine.root}/" in backing.read_text():
                device = f"/dev/{backing.parts[3]}"
                subprocess.run(["losetup", "-d", device], check=False)
    words = ("chattr", "-R", "-f", "-i", str(machine.root))
    subprocess.run(words, check=False, capture_output=True)


def _loops() -> list[str]:
    found = []
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            found.append(f"{backing.parts[3]} {backing.read_text().strip()}")
    return found


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        return []


def _differ(said: list[str], what: str, found: Any, wanted: Any) -> None:
    found, wanted = set(found), set(wanted)
    if found - wanted:
        said.append(f"{what}: too many: {sorted(found - wanted)}")
    if wanted - found:
        said.append(f"{what}: missing: {sorted(wanted - found)}")
