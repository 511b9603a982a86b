"""A real Ceph cluster for tests: one monitor, manager, OSD and metadata server.

It runs as plain processes on loopback, below a temporary folder, with cephx on. Its
OSD keeps data in a sparse file. It is made for speed of start, see the settings.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

from support import processes
from support.require import require, require_root
from support.wait import eventually
from volplugin.ceph.bindings import load
from volplugin.ceph.cluster import Access

Daemon: TypeAlias = Literal["mon", "mgr", "osd", "mds"]

POOL: Final = "volumes"
FILESYSTEM: Final = "cephfs"
_GIB: Final = 1 << 30
_LIMIT: Final = 120.0  # seconds for a step of the start, on a busy machine
_ORDER: Final[tuple[Daemon, ...]] = ("mds", "mgr", "osd", "mon")  # as they are ended
_PORTS: Final = range(10_000, 32_000)  # below those that the kernel hands out

# The manager imports all that it finds before it serves: the others take seconds.
_MODULES: Final = Path("/usr/share/ceph/mgr")
_ALWAYS_ON: Final = (
    "balancer",
    "crash",
    "devicehealth",
    "orchestrator",
    "pg_autoscaler",
    "progress",
    "rbd_support",
    "status",
    "telemetry",
    "volumes",
)

# What makes it start fast and stay small: few placement groups, short intervals, no
# cache that grows. What keeps it healthy: one copy of each object is meant; the long
# grace is a lease on reading, which a lone OSD that was paused never renews.
_DAEMONS: Final = """\
[global]
{cluster}
keyring = {folder}/keyring
run dir = {folder}/run
admin socket = {folder}/run/$name.asok
log file = {folder}/log/$name.log
crash dir = {folder}/log
log to stderr = false
err to stderr = true
public addr = {address}
cluster addr = {address}
ms bind ipv6 = false
osd heartbeat grace = 600
auth allow insecure global id reclaim = false
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pgp num = 8
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon allow pool delete = true
mon warn on pool no redundancy = false
mon max pg per osd = 1000
mon data avail warn = 1
mon data avail crit = 0
paxos propose interval = 0.05
[mon]
mon data = {folder}/mon
mon cluster log file = {folder}/log/cluster.log
[mgr]
mgr data = {folder}/mgr
mgr module path = {folder}/modules
mgr initial modules = volumes
mgr stats period = 1
[osd]
osd data = {folder}/osd
osd objectstore = bluestore
bluestore block size = {size}
bluestore fsck on mount = false
bluestore cache autotune = false
bluestore cache size = 67108864
bdev aio poll ms = 10
osd op num shards = 2
osd op num threads per shard = 2
[mds]
mds data = {folder}/mds
mds cache memory limit = 67108864
mds reconnect timeout = 5
"""
_CLIENTS: Final = """\
[global]
{cluster}
[client]
keyring = {folder}/$name.keyring
log file =
log to stderr = false
err to stderr = false
admin socket =
"""
_COMMON: Final = """\
fsid = {fsid}
mon host = {monitors}
auth cluster required = cephx
auth service required = cephx
auth client required = cephx"""

_ALL: Final = "allow *"
# Who the daemons are, and what they may.
_KEYS: Final[Mapping[str, Mapping[str, str]]] = {
    "mon.": {"mon": _ALL},
    "client.admin": {"mon": _ALL, "mgr": _ALL, "osd": _ALL, "mds": _ALL},
    "mgr.x": {"mon": "allow profile mgr", "osd": _ALL, "mds": _ALL},
    "osd.0": {"mon": "allow profile osd", "mgr": "allow profile osd", "osd": _ALL},
    "mds.a": {
        "mon": "allow profile mds",
        "mgr": "allow profile mds",
        "osd": _ALL,
        "mds": _ALL,
    },
}
_IDS: Final[Mapping[Daemon, str]] = {"mon": "a", "mgr": "x", "osd": "0", "mds": "a"}
# What volplugin needs, and not more; README tells users the same.
_LEAST: Final[Mapping[str, str]] = {
    "mon": "profile rbd, allow r",
    "osd": f"profile rbd pool={POOL}, allow rw tag cephfs data={FILESYSTEM}",
    "mgr": f"profile rbd pool={POOL}, allow module volumes rw",
    "mds": f"allow rwps fsname={FILESYSTEM}",
}


class Ceph:
    """A cluster of its own, from `start` to `close`.

    ``conf`` is the configuration of its clients; they find their keyrings by it. The
    daemons end with the thread that started them, should it not come to `close`.
    Its pools are ``volumes`` (for RBD), and with ``filesystem`` ``cephfs_meta`` and
    ``cephfs_data`` with the file system ``cephfs``.
    """

    def __init__(
        self,
        *,
        address: str = "127.0.0.1",
        filesystem: bool = True,
        size: int = 8 * _GIB,
    ) -> None:
        require_root()
        for command in ("ceph-mon", "ceph-mgr", "ceph-osd", "ceph-mds", "rbd"):
            require(command)
        self._address = address
        self._filesystem = filesystem
        self._size = size
        self._fsid = str(uuid.uuid4())
        self._running: dict[Daemon, subprocess.Popen[bytes]] = {}
        # Short, because a socket's path has at most 108 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="ceph-")).resolve()
        self.conf = self.folder / "ceph.conf"
        self._daemons_conf = self.folder / "daemons.conf"

    def start(self) -> None:
        """Bring the cluster up; return when all of it serves."""
        for name in ("mon", "mgr", "osd", "mds", "run", "log"):
            (self.folder / name).mkdir()
        modules = self.folder / "modules"
        modules.mkdir()
        for path in _MODULES.glob("*.py"):
            (modules / path.name).symlink_to(path)
        for name in _ALWAYS_ON:
            (modules / name).symlink_to(_MODULES / name)
        self._start_monitor()
        self._start_rest()

    def close(self) -> None:
        """End the daemons and remove all files; fail if anything is left."""
        for daemon in _ORDER:
            self._kill(daemon)
        shutil.rmtree(self.folder)
        left = [
            processes.command_of(int(pid))
            for pid in os.listdir("/proc")
            if pid.isdigit() and str(self.folder) in processes.command_of(int(pid))
        ]
        assert not left, f"left running of a cluster: {left}"

    def pid(self, daemon: Daemon) -> int:
        """Return the process of ``daemon``."""
        return self._running[daemon].pid

    def pause(self, daemon: Daemon) -> None:
        """Stop ``daemon`` where it is, as a hung host would be."""
        os.kill(self.pid(daemon), signal.SIGSTOP)

    def resume(self, daemon: Daemon) -> None:
        """Let ``daemon`` go on; what it was asked meanwhile takes effect."""
        os.kill(self.pid(daemon), signal.SIGCONT)

    def restart(self, daemon: Daemon) -> None:
        """Kill ``daemon`` and start it again; return when it serves."""
        before = self._incarnation(daemon)
        self._kill(daemon)
        self._run(daemon)
        if daemon == "mon":
            self._wait_for(lambda: self.ceph("mon", "stat"), "the monitor answers")
            return
        self._wait_for(
            lambda: self._incarnation(daemon) not in {before, ""}, f"a new {daemon}"
        )
        self._wait_until_served()

    def ceph(self, *words: str | Path) -> str:
        """Run ``ceph`` as the administrator."""
        return self._command("ceph", "--connect-timeout", "30", *words)

    def rbd(self, *words: str | Path) -> str:
        """Run ``rbd`` as the administrator."""
        return self._command("rbd", *words)

    def rados(self, *words: str | Path) -> str:
        """Run ``rados`` as the administrator."""
        return self._command("rados", *words)

    def user(self, name: str, **caps: str) -> Path:
        """Make the user ``client.NAME``, or change its caps; return its keyring."""
        path = self.folder / f"client.{name}.keyring"
        words = [word for service, cap in caps.items() for word in (service, cap)]
        if path.exists():
            self.ceph("auth", "caps", f"client.{name}", *words)
        else:
            self.ceph("auth", "get-or-create", f"client.{name}", *words, "-o", path)
        return path

    def least(self) -> Path:
        """Return the keyring of ``volplugin``, a user with the rights it needs."""
        path = self.folder / "client.volplugin.keyring"
        return path if path.exists() else self.user("volplugin", **_LEAST)

    def access(self, *, timeout: float = 15.0) -> Access:
        """Return how the user with the least rights reaches the cluster."""
        keyring = str(self.least())
        return Access(
            conf=str(self.conf), user="volplugin", keyring=keyring, timeout=timeout
        )

    def namespace(self) -> str:
        """Make a new RBD namespace in the pool ``volumes``; return its name."""
        name = f"ns-{uuid.uuid4().hex[:8]}"
        self.rbd("namespace", "create", f"{POOL}/{name}")
        return name

    def backend(self, name: str = "ceph", **settings: str) -> str:
        """Return the TOML of a backend on a namespace of its own, by least rights.

        ``settings`` are added, or put in place of those given here; ``_`` is ``-``.
        """
        given = {
            "driver": "rbd",
            "conf": str(self.conf),
            "user": "volplugin",
            "keyring": str(self.least()),
            "pool": POOL,
            **{key.replace("_", "-"): value for key, value in settings.items()},
        }
        if "namespace" not in given:
            given["namespace"] = self.namespace()
        lines = [f"{key} = {json.dumps(value)}" for key, value in given.items()]
        return "\n".join([f"[backend.{name}]", *lines, ""])

    def _start_monitor(self) -> None:
        # A port that is free now may be another's when the monitor comes to bind it.
        for _ in range(5):
            self._write_files()
            self._run("mon")
            if self._answers():
                return
            said = self._end_of_log("mon")
            self._kill("mon")
            shutil.rmtree(self.folder / "mon")
            (self.folder / "mon").mkdir()
        raise AssertionError(f"no monitor: {said}")

    def _write_files(self) -> None:
        first, second = _free_ports(self._address, 2)
        monitors = f"[v2:{self._address}:{first},v1:{self._address}:{second}]"
        common = _COMMON.format(fsid=self._fsid, monitors=monitors)
        given = {"folder": self.folder, "cluster": common}
        self.conf.write_text(_CLIENTS.format(**given))
        self._daemons_conf.write_text(
            _DAEMONS.format(**given, address=self._address, size=self._size)
        )
        keys = {name: _section(name, caps) for name, caps in _KEYS.items()}
        (self.folder / "keyring").write_text("\n".join(keys.values()))
        (self.folder / "client.admin.keyring").write_text(keys["client.admin"])
        for daemon, name in (("mgr", "mgr.x"), ("osd", "osd.0"), ("mds", "mds.a")):
            (self.folder / daemon / "keyring").write_text(keys[name])
        monmap = self.folder / "monmap"
        _tool(
            "monmaptool",
            "--create",
            "--clobber",
            *("--fsid", self._fsid),
            *("--addv", "a", monitors),
            *("--set-min-mon-release", "pacific"),
            monmap,
        )
        _tool(
            "ceph-mon",
            *("-c", self._daemons_conf, "--mkfs", "-i", "a"),
            *("--monmap", monmap, "--keyring", self.folder / "keyring"),
        )

    def _answers(self) -> bool:
        end = time.monotonic() + _LIMIT
        while time.monotonic() < end and self._running["mon"].poll() is None:
            with contextlib.suppress(subprocess.SubprocessError):
                self.ceph("mon", "stat")
                return True
        return False

    def _start_rest(self) -> None:
        rados = load("rados")
        cluster = rados.Rados(conffile=str(self.conf), name="client.admin")
        # Else the first call to a cluster that does not come up waits for ever.
        for option in ("client_mount_timeout", "rados_mon_op_timeout"):
            cluster.conf_set(option, str(int(_LIMIT)))
        cluster.connect()
        try:
            osd = str(uuid.uuid4())
            with self._begin_mkfs(osd) as mkfs:
                try:
                    _ask(cluster, {"prefix": "osd new", "uuid": osd})
                    assert mkfs.wait(_LIMIT) == 0, self._end_of_log("mkfs")
                finally:
                    mkfs.kill()
            self._run("osd")
            self._run("mgr")
            if self._filesystem:
                self._run("mds")
            self._make_pools(cluster)
        finally:
            cluster.shutdown()
        self._wait_until_served()
        self.rbd("pool", "init", POOL)
        self._wait_for(self._is_managed, "the manager serves")

    def _begin_mkfs(self, osd: str) -> subprocess.Popen[bytes]:
        return self._spawn(
            "mkfs",
            *(require("ceph-osd"), "-c", self._daemons_conf, "-i", "0", "--mkfs"),
            *("--osd-uuid", osd, "--keyring", self.folder / "osd" / "keyring"),
            *("--monmap", self.folder / "monmap", "--no-mon-config"),
        )

    def _make_pools(self, cluster: Any) -> None:
        pools = [POOL]
        pools += ["cephfs_meta", "cephfs_data"] if self._filesystem else []
        for pool in pools:
            _ask(cluster, {"prefix": "osd pool create", "pool": pool, "pg_num": 8})
        if self._filesystem:
            _ask(
                cluster,
                {
                    "prefix": "fs new",
                    "fs_name": FILESYSTEM,
                    "metadata": "cephfs_meta",
                    "data": "cephfs_data",
                },
            )

    def _wait_until_served(self) -> None:
        """Return when objects can be written, and the file system can be mounted."""
        # A request made before the OSD is up is sent again only 5 s later.
        self._wait_for(lambda: self._incarnation("osd"), "the OSD is up")
        self._wait_for(lambda: self._touch(POOL), f"the pool {POOL} takes writes")
        if self._filesystem:
            self._wait_for(
                lambda: "up:active" in self.ceph("mds", "stat"), "an active MDS"
            )

    def _touch(self, pool: str) -> bool:
        # Lists every placement group of the pool, so that each of them is active.
        self._command("rados", "-p", pool, "--all", "ls")
        return True

    def _is_managed(self) -> bool:
        shown = json.loads(self.ceph("mgr", "dump", "-f", "json"))
        return bool(shown["available"])

    def _incarnation(self, daemon: Daemon) -> str:
        """Return what tells two lives of ``daemon`` apart; empty while it is down."""
        if daemon == "mon":
            return ""
        if daemon == "osd":
            shown = json.loads(self.ceph("osd", "dump", "-f", "json"))["osds"][0]
            return str(shown["up_from"]) if shown["up"] else ""
        if daemon == "mgr":
            shown = json.loads(self.ceph("mgr", "dump", "-f", "json"))
            return str(shown["active_gid"]) if shown["available"] else ""
        maps = json.loads(self.ceph("fs", "dump", "-f", "json"))["filesystems"]
        infos = [info for each in maps for info in each["mdsmap"]["info"].values()]
        return ",".join(
            str(info["gid"]) for info in infos if info["state"] == "up:active"
        )

    def _run(self, daemon: Daemon) -> None:
        words: list[str | Path] = ["-f", "-i", _IDS[daemon]]
        if daemon != "mon":
            words += ["--keyring", self.folder / daemon / "keyring"]
        self._running[daemon] = self._spawn(
            daemon, require(f"ceph-{daemon}"), "-c", self._daemons_conf, *words
        )

    def _spawn(self, name: str, *words: str | Path) -> subprocess.Popen[bytes]:
        # Not marked as a test's own: a cluster may serve many modules, each of which
        # looks for what it left. So the kernel ends it if this process is killed.
        kept = {k: v for k, v in os.environ.items() if k != processes.SESSION}
        with (self.folder / "log" / f"{name}.out").open("ab") as output:
            return subprocess.Popen(
                [require("setpriv"), "--pdeathsig", "KILL", *map(str, words)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=kept,
                start_new_session=True,
            )

    def _kill(self, daemon: Daemon) -> None:
        process = self._running.pop(daemon, None)
        if process is not None:
            process.kill()
            process.wait(30)

    def _wait_for(self, true: Any, what: str) -> None:
        def holds() -> bool:
            for daemon, process in self._running.items():
                assert process.poll() is None, f"{daemon}: {self._end_of_log(daemon)}"
            with contextlib.suppress(subprocess.SubprocessError):
                return bool(true())
            return False

        eventually(holds, what, seconds=_LIMIT)

    def _end_of_log(self, name: str) -> str:
        return (self.folder / "log" / f"{name}.out").read_text(errors="replace")[-2000:]

    def _command(self, program: str, *words: str | Path) -> str:
        command = [require(program), "-c", self.conf, *words]
        try:
            done = subprocess.run(
                [str(word) for word in command],
                check=True,
                capture_output=True,
                text=True,
                timeout=_LIMIT / 2,
            )
        except subprocess.CalledProcessError as error:
            error.add_note(error.stderr)
            raise
        return done.stdout


def _free_ports(address: str, count: int) -> list[int]:
    found: list[int] = []
    while len(found) < count:
        port = random.choice(_PORTS)
        with contextlib.closing(socket.socket()) as probe, contextlib.suppress(OSError):
            probe.bind((address, port))
            found.append(port)
    return found


def _section(name: str, caps: Mapping[str, str]) -> str:
    key = _tool("ceph-authtool", "--gen-print-key").strip()
    lines = [f'\tcaps {service} = "{cap}"' for service, cap in caps.items()]
    return "\n".join([f"[{name}]", f"\tkey = {key}", *lines, ""])


def _tool(program: str, *words: str | Path) -> str:
    done = subprocess.run(
        [require(program), *map(str, words)],
        check=True,
        capture_output=True,
        text=True,
        timeout=_LIMIT,
    )
    return done.stdout


def _ask(cluster: Any, command: Mapping[str, Any]) -> None:
    status, _, said = cluster.mon_command(json.dumps(command), b"")
    assert status == 0, f"{command}: {said}"
