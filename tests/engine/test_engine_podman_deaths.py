"""podman's five seconds, and podman, plugin and host that end: nothing is left."""

import contextlib
import os
import signal
import time
from collections.abc import Callable

import pytest
from support import processes
from support.images import IMAGE
from support.podman import PodmanEngine, PodmanError
from support.wait import eventually

pytestmark = [pytest.mark.root, pytest.mark.engine]

CREATE = ("volume", "create", "--driver", "volplugin")
TMPFS = (*CREATE, "--opt", "driver=tmpfs")
STILL = "still at it after 4.5 s; it goes on, and the same call again waits for it"


def fails_in_time(call: Callable[[], object], error: str) -> None:
    """Fail unless the call is refused with ``error`` before podman gives up."""
    started = time.monotonic()
    with pytest.raises(PodmanError, match=error):
        call()
    assert 4 < time.monotonic() - started < 5


def start_writer(engine: PodmanEngine) -> None:
    """Start ``app`` with a file x on a tmpfs, /memory, and on a local volume, /disk."""
    podman = engine.podman
    podman(*TMPFS, "memory")
    podman(*CREATE, "disk")
    podman.sleeper("app", "-v", "memory:/memory", "-v", "disk:/disk")
    podman("exec", "app", "sh", "-c", "echo m > /memory/x; echo d > /disk/x; sync")


def kill_all(engine: PodmanEngine, *programs: str) -> None:
    """SIGKILL the processes of these programs that run in the host."""
    for pid in engine.host.processes():
        program = processes.command_of(pid).split(" ")[0].rpartition("/")[2]
        if program in programs:
            os.kill(pid, signal.SIGKILL)


# Five seconds


def test_a_slow_create_is_joined_by_the_next(podman_engine: PodmanEngine) -> None:
    """It fails in podman's time and goes on; asked again, podman has one volume."""
    podman, plugin = podman_engine.podman, podman_engine.plugin
    plugin.restart(failpoints="local.stage=sleep:5.5*1")
    fails_in_time(lambda: podman(*CREATE, "slow"), f"create slow: {STILL}")
    assert podman.volumes() == set()
    assert podman(*CREATE, "slow") == "slow"
    assert podman.volumes() == {"slow"} == set(plugin.client.list())
    folders = [path.name for path in (plugin.root / "local/volumes").iterdir()]
    assert folders == ["slow"]
    outcomes = [c.outcome.split(":")[0] for c in plugin.calls("slow") if c.op != "Get"]
    assert outcomes == ["deadline_exceeded", "ok"]


def test_a_slow_mount_is_joined_by_the_next(podman_engine: PodmanEngine) -> None:
    """``run`` fails in podman's time, the next one runs; it ends, nothing is left."""
    podman, plugin = podman_engine.podman, podman_engine.plugin
    podman(*TMPFS, "slow")
    plugin.restart(failpoints="tmpfs.attach=sleep:5.5*1")
    run = ("--rm", "-v", "slow:/data", IMAGE, "sh", "-c", "echo 1 > /data/x")
    fails_in_time(lambda: podman.run(*run), f"mount slow: {STILL}")
    podman.run(*run)
    assert podman_engine.mounts() == []
    assert podman.inspect("slow")["MountCount"] == 0


def test_a_slow_mount_that_nobody_repeats_is_taken_back(
    podman_engine: PodmanEngine,
) -> None:
    """podman that was told of no Mount sends no Unmount."""
    podman, plugin = podman_engine.podman, podman_engine.plugin
    podman(*TMPFS, "slow")
    plugin.restart(failpoints="tmpfs.mounted=sleep:5*1")
    run = ("--rm", "-v", "slow:/data", IMAGE, "ls")
    fails_in_time(lambda: podman.run(*run), f"mount slow: {STILL}")
    eventually(lambda: not podman_engine.mounts(), "the mount is taken back")
    assert plugin.client.get("slow")["Status"]["mounts"] == 0


def test_a_slow_detach_leaves_podman_and_plugin_in_step(
    podman_engine: PodmanEngine,
) -> None:
    """The next container has the volume, not the mountpoint below it.

    podman would keep its count for an Unmount that fails, and never mount again.
    """
    podman, plugin = podman_engine.podman, podman_engine.plugin
    podman(*CREATE, "--opt", "driver=quota", "--opt", "size=20m", "slowly")
    plugin.restart(failpoints="quota.detach=sleep:5.5*1")
    volume = ("--rm", "-v", "slowly:/data", IMAGE, "sh", "-c")
    podman.run(*volume, "echo kept > /data/x")
    assert podman.inspect("slowly")["MountCount"] == 0
    assert podman.run(*volume, "cat /data/x") == "kept"
    assert plugin.operations("slowly") == [
        "Create",
        *["Mount", "Unmount"] * 2,
    ]


def test_podmans_time_can_be_longer(podman_engine: PodmanEngine) -> None:
    """With ``volume_plugin_timeout`` and ``timeouts.podman`` a slow create succeeds."""
    podman, plugin = podman_engine.podman, podman_engine.plugin
    usual = plugin.config.read_text()
    podman.configure("volume_plugin_timeout = 20")
    plugin.config.write_text(f"{usual}[timeouts]\npodman = 19\n")
    try:
        plugin.restart(failpoints="local.stage=sleep:5.5*1")
        assert podman(*CREATE, "slow") == "slow"
    finally:
        podman.configure()
        plugin.config.write_text(usual)
        plugin.restart()


# Deaths


def test_a_killed_plugin_leaves_podmans_container_its_mount(
    podman_engine: PodmanEngine,
) -> None:
    """SIGKILL the plugin and start it: content and mount stay, stop ends them."""
    podman, plugin = podman_engine.podman, podman_engine.plugin
    start_writer(podman_engine)
    plugin.kill()
    plugin.start()
    assert podman("exec", "app", "cat", "/memory/x", "/disk/x") == "m\nd"
    podman("stop", "--time", "0", "app")
    assert podman_engine.mounts() == []


def test_a_container_stopped_while_the_plugin_is_away(
    podman_engine: PodmanEngine,
) -> None:
    """podman then keeps its count, and the plugin its mount: they stay in step."""
    podman, plugin = podman_engine.podman, podman_engine.plugin
    start_writer(podman_engine)
    plugin.stop()
    with contextlib.suppress(PodmanError):  # unless conmon's clean-up was first
        podman("stop", "--time", "0", "app")
    plugin.start()
    assert podman.inspect("memory")["MountCount"] == 1
    assert len(podman_engine.mounts()) == 1
    podman("start", "app")
    assert podman("exec", "app", "cat", "/memory/x", "/disk/x") == "m\nd"
    podman("rm", "--force", "--time", "0", "app")
    podman("volume", "unmount", "memory")
    assert podman_engine.mounts() == []


def test_an_absent_plugin_loses_no_volume(podman_engine: PodmanEngine) -> None:
    """While it is away podman runs nothing; a volume that it forgets is reloaded."""
    podman, plugin = podman_engine.podman, podman_engine.plugin
    podman(*CREATE, "kept")
    volume = ("--rm", "-v", "kept:/data", IMAGE, "sh", "-c")
    podman.run(*volume, "echo here > /data/x")
    plugin.stop()
    with pytest.raises(PodmanError, match="required plugin missing"):
        podman.run(*volume, "cat /data/x")
    with pytest.raises(PodmanError, match="cannot access plugin volplugin socket"):
        podman(*CREATE, "other")
    with pytest.raises(PodmanError, match="it has been removed from Podman"):
        podman("volume", "rm", "kept")
    plugin.start()
    assert podman.volumes() == set()  # the rm made it forget
    assert podman("volume", "reload") == "Added:\nkept"
    assert podman.run(*volume, "cat /data/x") == "here"


def test_a_killed_run_leaves_its_container_the_volume(
    podman_engine: PodmanEngine,
) -> None:
    """SIGKILL ``podman run``: the container goes on, and stop ends its mount."""
    podman = podman_engine.podman
    podman(*TMPFS, "memory")
    words = ("--name", "app", "-v", "memory:/data", IMAGE)
    script = "echo here > /data/x; sleep 600"
    running = podman.start_run(*words, "sh", "-c", script)
    file = podman_engine.host.path("/mnt/tmpfs/memory/x")
    eventually(lambda: file.exists() and file.read_text(), "the container runs")
    running.kill()
    running.wait(10)
    time.sleep(2.5)  # two sweeps
    assert podman("exec", "app", "cat", "/data/x") == "here"
    podman("stop", "--time", "0", "app")
    assert podman_engine.mounts() == []


def test_a_run_killed_in_its_mount_leaves_none(podman_engine: PodmanEngine) -> None:
    """SIGKILL ``podman run`` while Mount is under way: it is taken back."""
    podman, plugin = podman_engine.podman, podman_engine.plugin
    podman(*TMPFS, "memory")
    plugin.restart(failpoints="tmpfs.mounted=sleep:2*1")
    running = podman.start_run("--name", "app", "-v", "memory:/data", IMAGE, "ls")
    eventually(podman_engine.mounts, "the mount is under way")
    running.kill()
    running.wait(10)
    eventually(lambda: not podman_engine.mounts(), "the mount is taken back")
    assert plugin.client.get("memory")["Status"]["mounts"] == 0
    for mount in podman_engine.host.mounts():
        if mount.mountpoint.endswith("/userdata/shm"):  # podman forgets its own
            podman_engine.host.run("umount", mount.mountpoint)
    podman("rm", "--force", "app")
    podman.run("--rm", "-v", "memory:/data", IMAGE, "touch", "/data/x")
    assert podman_engine.mounts() == []


def test_a_container_whose_monitor_dies_too(podman_engine: PodmanEngine) -> None:
    """SIGKILL conmon and the container: ``rm`` sends the Unmount that was not sent."""
    podman = podman_engine.podman
    start_writer(podman_engine)
    kill_all(podman_engine, "conmon", "sleep")
    with contextlib.suppress(PodmanError):  # so podman 4 finds that it is not running
        podman("rm", "--force", "--time", "0", "app")
    podman("rm", "--force", "--ignore", "app")
    assert podman_engine.mounts() == []
    volumes = ("-v", "memory:/memory", "-v", "disk:/disk", IMAGE)
    assert podman.run("--rm", *volumes, "ls", "/memory", "/disk") == (
        "/disk:\nx\n\n/memory:"
    )


def test_a_reboot(podman_engine: PodmanEngine) -> None:
    """podman mounts again with no Unmount: one hold each, gone with the container."""
    podman, plugin = podman_engine.podman, podman_engine.plugin
    start_writer(podman_engine)
    podman(*CREATE, "--opt", "driver=quota", "--opt", "size=20m", "limited")
    volume = ("-v", "limited:/data", IMAGE)
    podman.run("-d", "--name", "two", *volume, "sh", "-c", "echo q > /data/x; sync")
    podman.sleeper("three", "-v", "limited:/data")
    podman_engine.host.reboot()
    assert podman_engine.mounts() == []
    plugin.start()
    assert podman.inspect("memory")["Status"]["mounts"] == 0
    podman("start", "app", "three")
    assert podman("exec", "app", "ls", "/memory") == ""
    assert podman("exec", "app", "cat", "/disk/x") == "d"
    assert podman("exec", "three", "cat", "/data/x") == "q"
    for name in ("memory", "disk", "limited"):
        assert podman.inspect(name)["Status"]["mounts"] == 1
    podman("stop", "--time", "0", "app", "three")
    assert podman_engine.mounts() == []
    for name in ("memory", "disk", "limited"):
        assert podman.inspect(name)["Status"]["mounts"] == 0
