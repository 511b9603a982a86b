"""The plugin and dockerd end in every way; no volume is lost, none is left mounted."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.client import PluginError
from support.docker import DockerError
from support.engine import Engine, running
from support.images import IMAGE
from support.wait import eventually

pytestmark = [pytest.mark.root, pytest.mark.engine]

CREATE = ("volume", "create", "-d", "volplugin")
TMPFS = (*CREATE, "-o", "driver=tmpfs")


def _start_writer(engine: Engine) -> None:
    """Start ``app`` with a file x on a tmpfs, /memory, and on a local volume, /disk."""
    docker = engine.docker
    docker(*TMPFS, "memory")
    docker(*CREATE, "disk")
    docker.sleeper("app", "-v", "memory:/memory", "-v", "disk:/disk")
    docker("exec", "app", "sh", "-c", "echo m > /memory/x; echo d > /disk/x")


def _remove_all(engine: Engine) -> None:
    """Stop and remove ``app`` and both volumes; each step must work."""
    docker = engine.docker
    docker("stop", "-t", "0", "app")
    engine.eventually_unmounted("memory")
    docker("rm", "app")
    docker("volume", "rm", "memory", "disk")
    assert engine.plugin.client.list() == {}


def test_a_killed_plugin_leaves_containers_their_mounts(engine: Engine) -> None:
    """SIGKILL the plugin: the mount stays; restarted, stop, rm and volume rm work."""
    _start_writer(engine)
    engine.plugin.kill()
    assert engine.docker("exec", "app", "cat", "/memory/x", "/disk/x") == "m\nd"
    assert len(engine.mounts()) == 1
    engine.plugin.start()
    assert engine.mount_of("memory") is not None
    assert engine.docker("exec", "app", "cat", "/memory/x", "/disk/x") == "m\nd"
    _remove_all(engine)


def test_a_container_stopped_while_the_plugin_is_away(engine: Engine) -> None:
    """dockerd waits for the plugin at stop; once it is back the tmpfs goes."""
    _start_writer(engine)
    engine.plugin.kill()
    with ThreadPoolExecutor() as pool:
        stopping = pool.submit(engine.docker, "stop", "-t", "0", "app")
        time.sleep(1)
        engine.plugin.start()
        stopping.result(60)
    engine.eventually_unmounted("memory")


def test_create_waits_for_a_plugin_that_restarts(engine: Engine) -> None:
    """A plugin that is away for 5 s in a create: dockerd asks again, it succeeds."""
    engine.docker(*CREATE, "known")
    engine.plugin.stop()
    with ThreadPoolExecutor() as pool:
        creating = pool.submit(engine.docker, *CREATE, "patient")
        time.sleep(5)
        assert not creating.done()
        engine.plugin.start()
        assert creating.result(60) == "patient"
    assert engine.docker.volumes() == {"known", "patient"}


def test_a_create_under_way_is_answered_by_a_plugin_that_stops(engine: Engine) -> None:
    """SIGTERM in the middle of a create: it is finished and answered before the end."""
    engine.plugin.restart(failpoints="local.stage=sleep:2*1")
    with ThreadPoolExecutor() as pool:
        creating = pool.submit(engine.docker, *CREATE, "drained")
        time.sleep(1)
        engine.plugin.stop()
        engine.plugin.start()
        assert creating.result(60) == "drained"
    assert engine.docker.volumes() == {"drained"}
    creates = [c for c in engine.plugin.calls("drained") if c.op == "Create"]
    assert [call.outcome for call in creates] == ["ok"]


def test_a_plugin_that_comes_2_s_late_is_found() -> None:
    """docker run waits for a plugin that is not there yet."""
    engine = Engine()
    try:
        engine.docker.start()
        engine.docker.load_images()
        with ThreadPoolExecutor() as pool:
            words = ("-v", "late:/data", "--volume-driver", "volplugin", IMAGE)
            started = pool.submit(engine.docker.run, "--rm", *words, "touch", "/data/x")
            time.sleep(2)
            assert not started.done()
            engine.plugin.start()
            started.result(60)
        assert engine.docker.volumes() == {"late"}
        engine.clear()
    finally:
        engine.close()


def test_a_plugin_that_hangs_does_not_block_other_drivers(engine: Engine) -> None:
    """While our process is stopped, local volumes are made without delay."""
    pid = engine.plugin.pid
    engine.host.run("kill", "-STOP", str(pid))
    try:
        started = time.monotonic()
        engine.docker("volume", "create", "-d", "local", "free")
        assert time.monotonic() - started < 2
    finally:
        engine.host.run("kill", "-CONT", str(pid))
    engine.docker(*CREATE, "after")


def test_volumes_outlive_a_restart_of_dockerd(own_engine: Engine) -> None:
    """A restarted daemon knows its volumes and starts its containers on them."""
    _start_writer(own_engine)
    own_engine.docker.restart()
    assert own_engine.docker.volumes() == {"memory", "disk"}
    own_engine.eventually_unmounted("memory")
    own_engine.docker("start", "app")
    assert own_engine.docker("exec", "app", "cat", "/disk/x") == "d"
    assert own_engine.mount_of("memory") is not None
    _remove_all(own_engine)


def test_a_killed_dockerd_leaks_no_mount(own_engine: Engine) -> None:
    """SIGKILL dockerd, start it and the container again: one Unmount ends the tmpfs."""
    _start_writer(own_engine)
    own_engine.docker.kill()
    assert own_engine.mount_of("memory") is not None
    own_engine.docker.start()
    own_engine.docker("start", "app")
    assert own_engine.docker("exec", "app", "cat", "/disk/x") == "d"
    _remove_all(own_engine)


def test_volumes_of_a_killed_dockerd_can_be_removed(own_engine: Engine) -> None:
    """Holders whose dockerd is gone and whose container is dead block no removal."""
    _start_writer(own_engine)
    own_engine.docker.kill()
    own_engine.docker.start()
    own_engine.docker("rm", "-f", "app")
    own_engine.docker("volume", "rm", "memory", "disk")
    eventually(lambda: not own_engine.mounts(), "the tmpfs is unmounted")


def test_a_killed_dockerd_leaves_no_tmpfs_behind(own_engine: Engine) -> None:
    """A container that nobody starts again: its tmpfs goes with it, without a call."""
    _start_writer(own_engine)
    own_engine.docker.kill()
    time.sleep(2.5)  # two sweeps
    assert own_engine.mount_of("memory") is not None  # the container lives on
    own_engine.docker.start()  # and is ended by the next dockerd, with no Unmount
    own_engine.eventually_unmounted("memory")
    own_engine.docker("rm", "app")
    own_engine.docker("volume", "rm", "memory", "disk")


def test_no_volume_is_removed_under_a_container_of_a_dead_dockerd(
    own_engine: Engine,
) -> None:
    """While the container lives on, its volumes can't be removed by anybody."""
    _start_writer(own_engine)
    client = own_engine.plugin.client
    own_engine.docker.kill()
    for name in ("memory", "disk"):
        with pytest.raises(PluginError, match="in use"):
            client.remove(name)
    own_engine.plugin.restart()
    for name in ("memory", "disk"):
        with pytest.raises(PluginError, match="in use"):
            client.remove(name)
    # Without live-restore the next dockerd ends the container, and sends no Unmount.
    own_engine.docker.start()
    for name in ("memory", "disk"):
        client.remove(name)
    assert own_engine.mounts() == []


def test_both_killed_at_once(own_engine: Engine) -> None:
    """After SIGKILL of dockerd and plugin together everything works as before."""
    _start_writer(own_engine)
    own_engine.docker.kill()
    own_engine.plugin.kill()
    own_engine.plugin.start()
    own_engine.docker.start()
    own_engine.docker("start", "app")
    assert own_engine.docker("exec", "app", "cat", "/disk/x") == "d"
    _remove_all(own_engine)


def test_a_reboot(own_engine: Engine) -> None:
    """A container with a restart policy has its volumes again, each held once.

    dockerd sends no Unmount for what the host's end took down.
    """
    docker, plugin = own_engine.docker, own_engine.plugin
    docker(*CREATE, "-o", "driver=quota", "-o", "size=20m", "limited")
    docker(*TMPFS, "memory")
    docker(*CREATE, "disk")
    volumes = [f"-v{name}:/{name}" for name in ("limited", "memory", "disk")]
    docker.sleeper("app", "--restart", "always", *volumes)
    write = "for each in limited memory disk; do echo here > /$each/x; done; sync"
    docker("exec", "app", "sh", "-c", write)
    own_engine.host.reboot()
    assert own_engine.mounts() == []
    plugin.start()
    assert plugin.client.get("memory")["Status"]["mounts"] == 0
    docker.start()
    eventually(
        lambda: docker.inspect("container", "app")["State"]["Running"], "it is started"
    )
    found = docker("exec", "app", "sh", "-c", "ls -d /limited/x /memory/x /disk/x; :")
    assert set(found.split()) == {"/limited/x", "/disk/x"}
    for name in ("limited", "memory", "disk"):
        assert plugin.client.get(name)["Status"]["mounts"] == 1
    docker("rm", "-f", "app")
    own_engine.eventually_unmounted("memory")


def test_a_create_beyond_its_time_is_joined_by_the_next(own_engine: Engine) -> None:
    """docker is told before its own limit; the volume is made once."""
    docker, plugin = own_engine.docker, own_engine.plugin
    with plugin.config.open("a") as config:
        config.write("[timeouts]\ncreate = 1\n")
    plugin.restart(failpoints="local.stage=sleep:1.7*1")
    with pytest.raises(DockerError, match="still at it after 1 s; it goes on"):
        docker(*CREATE, "slow")
    assert docker.volumes() == set()
    assert docker(*CREATE, "slow") == "slow"
    outcomes = [c.outcome.split(":")[0] for c in plugin.calls("slow") if c.op != "Get"]
    assert outcomes == ["deadline_exceeded", "ok"]


@pytest.mark.parametrize("death", ["kill", "terminate"])
def test_live_restore_and_cp_leave_a_container_its_content(death: str) -> None:
    """dockerd 20.10 sends an Unmount for a cp and none at stop: neither may hurt."""
    with running(live_restore=True) as engine:
        _start_writer(engine)
        getattr(engine.docker, death)()
        engine.docker.start()
        assert engine.docker("exec", "app", "cat", "/memory/x") == "m"
        target = engine.host.folder / "copy"
        for _ in range(2):
            engine.docker("cp", "app:/memory/x", str(target))
            assert target.read_text() == "m\n"
        time.sleep(2.5)  # two sweeps
        assert engine.docker("exec", "app", "cat", "/memory/x", "/disk/x") == "m\nd"
        assert engine.mount_of("memory") is not None
        _remove_all(engine)


def test_a_volume_of_an_absent_plugin_is_not_lost(own_engine: Engine) -> None:
    """While the plugin is down docker fails to run; afterwards all is as it was."""
    docker = own_engine.docker
    docker(*CREATE, "lasting")
    words = ("-v", "lasting:/data", IMAGE, "sh", "-c")
    docker.run("--rm", *words, "echo here > /data/x")
    own_engine.plugin.stop()
    with pytest.raises(DockerError):
        docker.run("--rm", *words, "cat /data/x", limit=60)
    own_engine.plugin.start()
    assert docker.run("--rm", *words, "cat /data/x") == "here"
    assert docker.volumes() == {"lasting"}
