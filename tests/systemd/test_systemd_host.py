"""A host with a real systemd, dockerd and the plugin as services: restart to reboot."""

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import pytest
from support.client import Client, PluginError
from support.images import IMAGE, image_archive
from support.mounts import Mount
from support.plugin import DOCKER_SOCKET, REPOSITORY
from support.system import System
from support.wait import eventually

pytestmark = [pytest.mark.root, pytest.mark.engine]

SERVICE: Final = "volplugin.service"
SOCKET: Final = "volplugin.socket"
RESTARTS: Final = 10
CALLS: Final = 1000


@contextlib.contextmanager
def running(*options: str) -> Iterator[System]:
    """A system with both services, enabled, and an image; ``options`` are dockerd's."""
    system = System()
    try:
        system.set_up(options)
        system.start()
        done = system.volplugin("install-service")
        assert done.returncode == 0, done
        system.systemctl("enable", "--now", "docker.service")
        system.load_image()
        yield system
    finally:
        with contextlib.ExitStack() as stack:
            stack.callback(system.close)
            if system.log.exists():
                log = system.log.read_text()
                stack.callback(lambda: _no_bug(log))


def _no_bug(log: str) -> None:
    assert "Traceback" not in log, f"a bug, by its log:\n{log}"


@pytest.fixture(scope="module")
def shared() -> Iterator[System]:
    """A system for the tests of this module that leave it as it was."""
    with running() as system:
        yield system


@pytest.fixture
def system(shared: System) -> Iterator[System]:
    """The module's system, with no container and no volume before and after."""
    yield shared
    containers = shared.docker("ps", "-aq").split()
    if containers:
        shared.docker("rm", "-f", *containers)
    volumes = shared.docker("volume", "ls", "-q").split()
    if volumes:
        shared.docker("volume", "rm", *volumes)
    shared.systemctl("reset-failed")
    shared.systemctl("start", SOCKET, SERVICE)
    assert shared.client.list() == {}


def sleeper(system: System, name: str, *words: str) -> None:
    """Start a container that sleeps for long, with ``words`` as its flags."""
    flags = ["-d", "--name", name, "--network", "none", "--stop-signal", "KILL"]
    system.docker("run", *flags, *words, IMAGE, "sleep", "600")


def keeper(system: System) -> None:
    """Start a container with a tmpfs volume, and write into it what is to be kept."""
    system.docker("volume", "create", "-d", "volplugin", "-o", "driver=tmpfs", "vol")
    sleeper(system, "keeper", "-v", "vol:/data")
    system.docker("exec", "keeper", "sh", "-c", "echo kept >/data/file")


def has_kept(system: System) -> bool:
    """Return whether that container has what it wrote."""
    return system.docker("exec", "keeper", "cat", "/data/file") == "kept"


def tmpfs_mounts(system: System) -> list[Mount]:
    """Return the volumes' tmpfs that are mounted."""
    return [m for m in system.mounts() if m.mountpoint.startswith("/mnt/tmpfs/")]


def main_pid(system: System) -> int:
    """Return the server's process as this machine has it."""
    inside = system.show("MainPID")
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):
            fields = dict(
                line.split(":\t", 1)
                for line in status.read_text().splitlines()
                if ":\t" in line
            )
            if fields["NSpid"].split()[1:] == [inside] and _is_in(
                status.parent, system
            ):
                return int(status.parent.name)
    raise AssertionError(f"there is no process {inside}")


def _is_in(process: Path, system: System) -> bool:
    return os.readlink(process / "ns/pid") == os.readlink(f"/proc/{system.pid}/ns/pid")


def active(system: System) -> bool:
    """Return whether the service has started."""
    return system.show("ActiveState") == "active"


# What the unit leaves as it is


def test_its_mounts_are_the_hosts(system: System) -> None:
    """The service has the host's mount namespace: no line of the unit takes it away."""
    pid = main_pid(system)
    host, service = (os.readlink(f"/proc/{p}/ns/mnt") for p in (system.pid, pid))
    assert service == host
    assert system.show("NeedDaemonReload") == "no"


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["driver=tmpfs", "size=1m"], id="tmpfs"),
        pytest.param(["driver=quota", "size=16m", "quota=loop"], id="ext4 on loop"),
        pytest.param(["driver=quota", "size=320m", "fs=xfs"], id="xfs on loop"),
        pytest.param(["mount=/srv/chosen", "uid=12", "mode=2770"], id="local"),
    ],
)
def test_a_mount_reaches_a_container(system: System, options: list[str]) -> None:
    """With all that the unit takes away, volumes are made, mounted, used, removed."""
    flags = [word for option in options for word in ("-o", option)]
    system.docker("volume", "create", "-d", "volplugin", *flags, "vol")
    sleeper(system, "one", "-v", "vol:/data")
    system.docker("exec", "one", "sh", "-c", "echo x >/data/file; sync")
    source = system.client.mount("vol", "other")
    assert system.path(f"{source}/file").read_text() == "x\n"
    system.client.unmount("vol", "other")
    if "fs=xfs" in options:  # for ext4, this machine's root may lack a capability
        done = system.volplugin("volume", "resize", "vol", "400M")
        assert (done.returncode, done.stderr) == (0, "")
    system.docker("rm", "-f", "one")
    # The image's loop device, the immutable mountpoint, all of it goes.
    system.docker("volume", "rm", "vol")
    assert not system.path("/mnt/tmpfs/vol").exists()


def test_who_calls_is_seen(system: System) -> None:
    """SO_PEERCRED on the held socket names dockerd, and not systemd who listens."""
    keeper(system)
    (holder,) = system.client.get("vol")["Status"]["holders"]
    dockerd = system.show("MainPID", "docker.service")
    assert f"(dockerd, pid {dockerd}," in holder


def test_podman_is_seen(system: System) -> None:
    """So it is by podman, which has no daemon: its holder is podman's one ID."""
    system.podman("import", "-", IMAGE, data=image_archive(seeded=False))
    system.podman("volume", "create", "--driver=volplugin", "-o", "driver=tmpfs", "vol")
    limits = ["--ulimit=nofile=1024:1024", "--ulimit=nproc=1000:1000"]
    flags = ["--rm", "--network=none", "--pids-limit=-1", *limits, "-v", "vol:/data"]
    script = "echo x >/data/file; cat /data/file"
    with ThreadPoolExecutor(1) as pool:
        system.systemctl("stop", SERVICE)  # podman's call starts it
        words = ["run", *flags, IMAGE, "sh", "-c", f"{script}; sleep 2"]
        said = pool.submit(system.podman, *words)
        eventually(lambda: system.client.get("vol")["Status"]["mounts"], "it is held")
        (holder,) = system.client.get("vol")["Status"]["holders"]
        assert "(podman, pid " in holder
        assert said.result(30) == "x"
    assert tmpfs_mounts(system) == []
    system.podman("volume", "rm", "vol")
    system.podman("rmi", "-f", IMAGE)


def test_it_may_do_what_it_needs(system: System) -> None:
    """The limits of the unit hold, and none of those that would hurt."""
    status = Path(f"/proc/{main_pid(system)}/status").read_text()
    (bounding,) = (x.split()[1] for x in status.splitlines() if x.startswith("CapBnd"))
    sys_time, sys_admin = 1 << 25, 1 << 21
    assert int(bounding, 16) & sys_admin
    assert not int(bounding, 16) & sys_time
    assert "Seccomp:\t2" in status  # LockPersonality=, RestrictRealtime=
    assert system.show("OOMPolicy") == "continue"
    assert system.show("TasksMax") == "infinity"
    assert system.show("WatchdogUSec") == "1min"
    assert int(system.show("WatchdogTimestampMonotonic")) > 0


# Restart, stop, death


def test_restarts_under_load(system: System) -> None:
    """``systemctl restart``, ten times in a thousand calls: none is lost or fails."""
    client, done = system.client, threading.Semaphore(0)

    def call(number: int) -> None:
        for turn in range(CALLS // 20):
            name = f"v{number}-{turn}"
            client.create(name)
            assert client.get(name)["Name"] == name
            assert client.path(name).endswith(name)
            assert name in client.list()
            client.remove(name)
            done.release()

    before = system.show("MainPID")
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(call, number) for number in range(4)]
        for _ in range(RESTARTS):
            for _ in range(4 * CALLS // 20 // (RESTARTS + 1)):
                assert done.acquire(timeout=60)
            system.systemctl("restart", SERVICE)
        for each in calls:
            each.result(60)
    assert system.show("MainPID") != before
    assert system.show("NRestarts") == "0"
    assert client.list() == {}
    system.systemctl("reset-failed", SERVICE)  # and its count of starts


def test_restart_with_a_container(system: System) -> None:
    """A container keeps its volume over a restart, and lets go of it afterwards."""
    keeper(system)
    before = tmpfs_mounts(system)
    assert len(before) == 1
    system.systemctl("restart", SERVICE)
    assert has_kept(system)
    assert tmpfs_mounts(system) == before
    # dockerd's own call, made while the service is away, is late and not lost.
    with ThreadPoolExecutor(1) as pool:
        system.systemctl("stop", SERVICE)
        assert pool.submit(system.docker, "volume", "inspect", "vol").result(30)
    system.docker("rm", "-f", "keeper")
    assert tmpfs_mounts(system) == []


def test_stop(system: System) -> None:
    """Stopped, mounts and containers stay; the next call of an engine starts it."""
    keeper(system)
    before = system.path(DOCKER_SOCKET).lstat()
    system.systemctl("stop", SERVICE)
    assert system.show("ActiveState") == "inactive"
    assert system.show("Result") == "success"
    assert has_kept(system)
    assert len(tmpfs_mounts(system)) == 1
    assert system.docker("volume", "ls", "-q") == "vol"
    assert active(system)
    after = system.path(DOCKER_SOCKET).lstat()
    assert (after.st_ino, after.st_ctime) == (before.st_ino, before.st_ctime)


def test_stop_for_good(system: System) -> None:
    """With its socket stopped too nobody starts it; a socket that refuses is there.

    A dockerd that finds no socket at all would make a local volume of that name.
    """
    keeper(system)
    system.systemctl("stop", SOCKET, SERVICE)
    with pytest.raises(ConnectionRefusedError):
        system.client.list()
    assert has_kept(system)
    system.systemctl("start", SERVICE)  # which wants its socket
    assert system.show("ActiveState", SOCKET) == "active"
    assert list(system.client.list()) == ["vol"]


def test_killed(system: System) -> None:
    """After SIGKILL systemd starts it again; nothing is asked of anyone."""
    keeper(system)
    restarts = int(system.show("NRestarts"))
    os.kill(main_pid(system), signal.SIGKILL)
    assert system.client.get("vol")["Status"]["mounts"] == 1  # waits for the next one
    eventually(lambda: active(system), "it is there again")
    assert int(system.show("NRestarts")) == restarts + 1
    assert has_kept(system)


def test_watchdog(system: System) -> None:
    """A server that hangs is ended by systemd and started again."""
    keeper(system)
    drop_in = f"[Service]\nStandardError=append:{system.log}\n"
    system.drop_in(SERVICE, f"{drop_in}WatchdogSec=2\nLimitCORE=0\n")
    system.systemctl("restart", SERVICE)
    pid = main_pid(system)
    time.sleep(3)
    assert main_pid(system) == pid, "one that works was ended"
    os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(system.client.get, "vol")  # waits for it all
        assert call.result(30)["Status"]["mounts"] == 1
    assert 0.5 < time.monotonic() - began < 20
    eventually(lambda: active(system), "it is there again")
    assert main_pid(system) != pid
    assert has_kept(system)
    system.drop_in(SERVICE, drop_in)
    system.systemctl("restart", SERVICE)


def test_helpers_stay(system: System) -> None:
    """What the server has started and left running outlives its stop and its death.

    The helpers that carry FUSE and nbd volumes are such processes.
    """
    group = system.path(f"/sys/fs/cgroup{system.show('ControlGroup')}")
    helper = "exec setsid sleep 600"
    with ThreadPoolExecutor(1) as pool:
        enter = f"echo $$ >/sys/fs/cgroup{system.show('ControlGroup')}/cgroup.procs"
        running = pool.submit(system.attempt, "sh", "-c", f"{enter}; {helper}")
        try:
            eventually(lambda: len(members(group)) == 2, "it is in the service's group")
            (pid,) = members(group) - {main_pid(system)}
            system.systemctl("restart", SERVICE)
            assert pid in members(group)
            os.kill(main_pid(system), signal.SIGKILL)
            eventually(lambda: active(system), "it is there again")
            system.systemctl("stop", SERVICE)
            assert members(group) == {pid}
            system.systemctl("start", SERVICE)
            assert pid in members(group)
        finally:
            os.kill(pid, signal.SIGKILL)
            running.result(20)


def members(group: Path) -> set[int]:
    """Return the processes of a cgroup."""
    return {int(pid) for pid in (group / "cgroup.procs").read_text().split()}


def test_reload(system: System) -> None:
    """``systemctl reload`` takes the file over; a faulty one shows in the status."""
    pid, file = main_pid(system), system.settings / "volplugin.toml"
    serving = f"serving on {DOCKER_SOCKET}"
    try:
        file.write_text("= no TOML")
        system.systemctl("reload", SERVICE)
        eventually(lambda: "not in effect" in system.show("StatusText"), "it is told")
        file.write_text("[timeouts]\ncreate = 60\n")
        system.systemctl("reload", SERVICE)
        eventually(lambda: system.show("StatusText") == serving, "it is told")
    finally:
        file.unlink()
    system.systemctl("reload", SERVICE)
    assert main_pid(system) == pid
    assert active(system)


def test_a_faulty_configuration(system: System) -> None:
    """It is not tried again and again, and engines get an error, no silence."""
    file = system.settings / "volplugin.toml"
    restarts = system.show("NRestarts")
    try:
        file.write_text('log-levle = "debug"')
        assert system.attempt("systemctl", "restart", SERVICE).returncode == 1
        assert system.show("ExecMainStatus") == "78"
        with pytest.raises(OSError):  # noqa: PT011  reset or refused, as it comes
            system.client.list()
        eventually(
            lambda: system.show("ActiveState", SOCKET) == "failed", "systemd gives up"
        )
        assert system.show("NRestarts") == restarts
    finally:
        file.unlink()
    system.systemctl("reset-failed", SERVICE, SOCKET)
    system.systemctl("start", SOCKET, SERVICE)
    assert system.client.list() == {}


def test_the_examples(system: System) -> None:
    """Each drop-in of packaging/examples does what it says: sockets, and settings."""
    ceph = "/run/docker/plugins/ceph.sock"
    system.run("mkdir", "-p", "/srv/site")
    system.path("/srv/site/volplugin.toml").write_text(
        f'[socket.docker]\npath = "{DOCKER_SOCKET}"\n[socket.ceph]\npath = "{ceph}"\n'
    )
    added = []
    try:
        for example in (REPOSITORY / "packaging/examples").glob("*/*.conf"):
            folder = system.units / example.parent.name
            folder.mkdir(exist_ok=True)
            added.append(folder / example.name)
            added[-1].write_text(example.read_text())
        assert len(added) == 2
        system.systemctl("daemon-reload")
        system.systemctl("stop", SOCKET, SERVICE)
        system.systemctl("start", SOCKET, SERVICE)
        system.systemctl("stop", SERVICE)
        assert Client(system.path(ceph)).list() == {}  # which starts it
        assert system.client.list() == {}
        assert system.show("StatusText") == f"serving on {DOCKER_SOCKET}, {ceph}"
        assert ceph in system.show("Listen", SOCKET)
    finally:
        for file in added:
            file.unlink()
        system.systemctl("daemon-reload")
        system.systemctl("stop", SOCKET, SERVICE)
        system.systemctl("start", SOCKET, SERVICE)
    # What systemd left is cleared by the next server, or dockerd would wait for it.
    assert not system.path(ceph).exists()


def test_a_socket_that_is_not_configured(system: System) -> None:
    """It is named, with its unit, and the server does not start without it."""
    system.drop_in(SOCKET, "[Socket]\nListenStream=/run/docker/plugins/other.sock\n")
    try:
        system.systemctl("stop", SOCKET, SERVICE)
        system.systemctl("start", SOCKET)
        known = len(system.log.read_text())
        assert system.attempt("systemctl", "start", SERVICE).returncode == 1
        assert system.show("ExecMainStatus") == "78"
        said = system.log.read_text()[known:]
        assert "'volplugin.socket': /run/docker/plugins/other.sock is not in" in said
    finally:
        system.drop_in(SOCKET, "")
        system.systemctl("stop", SOCKET, SERVICE)
        system.run("rm", "/run/docker/plugins/other.sock")
        system.systemctl("start", SOCKET, SERVICE)


# A boot


@pytest.mark.parametrize("how", ["shut down", "power cut"])
def test_reboot(how: str) -> None:
    """Volumes come back before dockerd, which starts its containers with them."""
    with running() as system:
        system.docker("volume", "create", "-d", "volplugin", "disk")
        system.docker(
            *("volume", "create", "-d", "volplugin", "-o", "driver=quota"),
            *("-o", "size=16m", "limited"),
        )
        system.docker("volume", "create", "-d", "volplugin", "-o", "driver=tmpfs", "m")
        volumes = ["-v", "disk:/disk", "-v", "limited:/limited"]
        sleeper(system, "keeper", "--restart", "always", *volumes)
        system.docker(
            *("exec", "keeper", "sh", "-c"),
            "echo kept >/disk/file; echo kept >/limited/file; sync",
        )
        if how == "shut down":
            system.shut_down()
        else:
            system.cut()
        system.start()
        eventually(lambda: system.show("ActiveState", "docker.service") == "active", "")
        ready = int(system.show("ActiveEnterTimestampMonotonic"))
        begun = int(system.show("InactiveExitTimestampMonotonic", "docker.service"))
        assert 0 < ready < begun, "dockerd was started before the plugin was ready"
        eventually(lambda: keeper_runs(system), "its container runs", seconds=30)
        for place in ("disk", "limited"):
            assert system.docker("exec", "keeper", "cat", f"/{place}/file") == "kept"
        assert set(system.client.list()) == {"disk", "limited", "m"}
        assert system.client.get("disk")["Status"]["mounts"] == 1
        assert system.client.get("m")["Status"]["mounts"] == 0
        system.docker("rm", "-f", "keeper")
        system.docker("volume", "rm", "disk", "limited", "m")


def keeper_runs(system: System) -> bool:
    """Return whether the container is up."""
    shown = system.docker("inspect", "keeper")
    return bool(json.loads(shown)[0]["State"]["Running"])


def test_dockerd_alone_is_started() -> None:
    """Where only dockerd and the socket are started, its first call starts the rest."""
    with running() as system:
        keeper(system)
        system.docker("rm", "-f", "keeper")
        system.systemctl("stop", "docker.service", SERVICE)
        assert not active(system)
        system.systemctl("start", "docker.service")
        assert system.docker("volume", "ls", "-q") == "vol"
        assert active(system)
        # A dockerd with containers to restore calls before it is ready itself.
        sleeper(system, "keeper", "--restart", "always", "-v", "vol:/data")
        system.systemctl("stop", "docker.service", SERVICE)
        system.systemctl("start", "docker.service")
        eventually(lambda: keeper_runs(system), "its container runs", seconds=30)
        assert active(system)
        system.docker("rm", "-f", "keeper")


# Taken away


def test_uninstall() -> None:
    """The units go, and nothing else: mounts, containers, volumes and settings stay."""
    with running() as system:
        keeper(system)
        before = set(os.listdir(system.units))
        done = system.volplugin("uninstall-service")
        assert done.returncode == 0, done
        assert (
            "warning: vol is in use, at /mnt/tmpfs/vol: its mount stays" in done.stderr
        )
        assert "volumes and store in /var/lib/volplugin and settings" in done.stdout
        assert f"{DOCKER_SOCKET}: removed" in done.stdout
        assert f"{system.show('FragmentPath')}" == ""
        gone = before - set(os.listdir(system.units))
        # systemctl removes the folders of links that are empty then.
        assert {x for x in gone if not x.endswith(".wants")} == {SERVICE, SOCKET}
        assert not system.path(DOCKER_SOCKET).exists()
        assert has_kept(system)
        assert len(tmpfs_mounts(system)) == 1
        again = system.volplugin("uninstall-service")
        assert again.returncode == 0
        assert again.stdout.count("was not there") == 2
        # And back: all is as it was.
        done = system.volplugin("install-service")
        assert done.returncode == 0, done
        assert system.client.get("vol")["Status"]["mounts"] == 1
        system.docker("rm", "-f", "keeper")
        eventually(lambda: not tmpfs_mounts(system), "it is unmounted")
        system.docker("volume", "rm", "vol")


def test_install_again(system: System) -> None:
    """Doing it again changes nothing; a changed file is not overwritten."""
    pid = main_pid(system)
    done = system.volplugin("install-service")
    assert done.returncode == 0, done
    assert done.stdout.count(": unchanged") == 2
    assert main_pid(system) == pid
    unit = system.units / SERVICE
    text = unit.read_text()
    try:
        unit.write_text(text + "\n# mine\n")
        done = system.volplugin("install-service")
        assert done.returncode == 1
        assert f"/etc/systemd/system/{SERVICE}: changed" in done.stderr
        assert unit.read_text().endswith("# mine\n")
        assert system.volplugin("uninstall-service").returncode == 1
        assert active(system)
    finally:
        done = system.volplugin("install-service", "--force")
    assert done.returncode == 0
    assert "systemctl restart volplugin" in done.stdout
    assert unit.read_text() == text


def test_install_beside_another_server() -> None:
    """A server that somebody has started by hand keeps its socket."""
    system = System()
    try:
        system.start()
        with ThreadPoolExecutor(1) as pool:
            by_hand = pool.submit(system.volplugin, "serve")
            eventually(lambda: answers(system.client), "it answers")
            done = system.volplugin("install-service")
            assert done.returncode == 1
            assert "a server that systemd did not start listens on" in done.stderr
            assert not (system.units / SERVICE).exists()
            assert answers(system.client)
            system.run("sh", "-c", "kill $(cat /var/lib/volplugin/lock)")
            assert by_hand.result(20).returncode == 0
        done = system.volplugin("install-service", "--no-start")
        assert done.returncode == 0, done
        assert "nothing was started: systemctl enable --now" in done.stdout
        assert system.show("ActiveState") == "inactive"
        assert system.show("UnitFileState") == "disabled"
        assert system.volplugin("install-service").returncode == 0
        assert answers(system.client)
    finally:
        system.close()


def answers(client: Client) -> bool:
    """Return whether a server answers."""
    try:
        return client.list() == {}
    except (OSError, PluginError):
        return False
