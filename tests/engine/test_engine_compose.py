"""docker-compose: volumes of a project, made, kept, refused and removed with it."""

import shutil
from collections.abc import Iterator

import pytest
from support.compose import Compose, ComposeError
from support.docker import DockerError
from support.engine import Engine
from support.wait import eventually

from volplugin.admin.client import AdminClient

pytestmark = [pytest.mark.root, pytest.mark.engine]

SERVICE = """
version: "3.7"
services:
  app:
    image: {image}
    command: sleep 600
    network_mode: none
    stop_signal: KILL
    volumes: {volumes}
"""
LIMITED = """
volumes:
  data: {{driver: volplugin, driver_opts: {{driver: quota, size: {size}}}}}
"""


def project(volumes: str, declared: str = "", *, image: str = "busybox:local") -> str:
    """Return a project's file with one service."""
    return SERVICE.format(volumes=volumes, image=image) + declared


def limited(size: str) -> str:
    """Return a project's file with a limited volume, mounted on /data."""
    return project("['data:/data']", LIMITED.format(size=size))


@pytest.fixture
def compose(engine: Engine) -> Iterator[Compose]:
    """An empty project; its containers are gone before `engine` is cleared."""
    compose = Compose(engine.docker, engine.host.folder)
    yield compose
    shutil.rmtree(compose.folder)


def test_a_project_has_its_volumes(engine: Engine, compose: Compose) -> None:
    """driver_opts arrive, names carry the project's, labels stay with docker."""
    compose.write(limited("20m"))
    compose("up", "-d")
    assert engine.docker.volumes() == {"shop_data"}
    shown = engine.docker.inspect("volume", "shop_data")
    assert shown["Options"] == {"driver": "quota", "size": "20m"}
    assert (shown["Status"]["size"], shown["Status"]["mounts"]) == ("20M", 1)
    assert shown["Labels"]["com.docker.compose.project"] == "shop"
    fill = ("dd", "if=/dev/zero", "of=/data/x", "bs=1M")
    with pytest.raises(ComposeError, match="No space left on device"):
        compose("exec", "-T", "app", *fill)


def test_down_keeps_volumes_and_down_v_removes_them(
    engine: Engine, compose: Compose
) -> None:
    """Content is there after ``down`` and ``up``; ``down -v`` takes it."""
    compose.write(limited("20m"))
    compose("up", "-d")
    compose("exec", "-T", "app", "sh", "-c", "echo here > /data/x")
    compose("down")
    assert engine.docker.volumes() == {"shop_data"}
    assert engine.plugin.client.get("shop_data")["Status"]["mounts"] == 0
    compose("up", "-d")
    assert compose("exec", "-T", "app", "cat", "/data/x") == "here"
    compose("up", "-d", "--force-recreate")
    assert compose("exec", "-T", "app", "cat", "/data/x") == "here"
    assert "Removing volume shop_data" in compose("down", "-v")
    assert engine.plugin.client.list() == {}


def test_other_options_are_refused(engine: Engine, compose: Compose) -> None:
    """Compose compares with what docker was asked for, and changes nothing."""
    compose.write(limited("20m"))
    compose("up", "-d")
    compose.write(limited("40m"))
    for words in (["up", "-d"], ["up", "-d", "--force-recreate"], ["run", "app"]):
        with pytest.raises(ComposeError, match=r'different "size" driver_opt \(20m\)'):
            compose(*words)
    assert engine.plugin.client.get("shop_data")["Status"]["size"] == "20M"
    compose.write(project("['data:/data']", "volumes: {data: {driver: local}}"))
    with pytest.raises(ComposeError, match=r"a different driver \(volplugin\)"):
        compose("up", "-d")
    assert engine.docker.volumes() == {"shop_data"}


def test_a_resized_volume_keeps_its_options(engine: Engine, compose: Compose) -> None:
    """docker, and so compose, go by the first size; Status has the new one."""
    text = limited("300m").replace("driver: quota", "driver: quota, fs: xfs")
    compose.write(text)
    compose("up", "-d")
    AdminClient(str(engine.plugin.admin_socket)).resize("shop_data", size="400m")
    assert "shop_app_1 is up-to-date" in compose("up", "-d")
    assert engine.docker.inspect("volume", "shop_data")["Status"]["size"] == "400M"
    compose.write(text.replace("300m", "400m"))
    with pytest.raises(ComposeError, match=r'different "size" driver_opt \(300m\)'):
        compose("up", "-d")


def test_options_of_a_volume_that_docker_forgot(
    engine: Engine, compose: Compose
) -> None:
    """To compose, a volume that only the plugin knows has no options: it says so.

    As external the volume can be used all the same.
    """
    engine.plugin.client.create("shop_data", {"driver": "quota", "size": "20m"})
    compose.write(limited("40m"))
    with pytest.raises(ComposeError, match=r'different "\w+" driver_opt \(None\)'):
        compose("up", "-d")
    assert engine.plugin.client.get("shop_data")["Status"]["size"] == "20M"
    external = "volumes: {data: {external: true, name: shop_data}}"
    compose.write(project("['data:/data']", external))
    compose("up", "-d")
    assert engine.docker.inspect("volume", "shop_data")["Status"]["mounts"] == 1


def test_an_external_volume_is_nobodys_to_make_or_remove(
    engine: Engine, compose: Compose
) -> None:
    """It must be there, also when only the plugin knows of it, and it stays."""
    external = "volumes: {data: {external: true, name: outside}}"
    compose.write(project("['data:/data']", external))
    with pytest.raises(ComposeError, match="outside declared as external, but could"):
        compose("up", "-d")
    engine.plugin.client.create("outside")
    compose("up", "-d")
    compose("exec", "-T", "app", "touch", "/data/kept")
    assert "Volume outside is external, skipping" in compose("down", "-v")
    assert set(engine.plugin.client.list()) == {"outside"}


def test_a_volume_may_have_a_name_of_its_own(engine: Engine, compose: Compose) -> None:
    """``name:`` is used as it is, without the project's."""
    named = "volumes: {data: {driver: volplugin, name: plain}}"
    compose.write(project("['data:/data']", named))
    compose("up", "-d")
    assert engine.docker.volumes() == {"plain"}
    compose("down", "-v")
    assert engine.plugin.client.list() == {}


def test_anonymous_volumes_are_dockers_own(engine: Engine, compose: Compose) -> None:
    """A volume without a name can have no driver in a file of version 3."""
    compose.write(project("['/data']", image="seed:local"))
    compose("up", "-d")
    assert compose("exec", "-T", "app", "ls", "/data") == "hello"
    assert len(engine.docker.volumes(driver="local")) == 1
    compose("down", "-v")
    assert engine.docker.volumes(driver="local") == set() == engine.docker.volumes()


def test_a_new_volume_is_filled_from_the_image(
    engine: Engine, compose: Compose
) -> None:
    """Also a limited one; with ``nocopy`` it stays empty."""
    declared = LIMITED.format(size="20m") + "  bare: {driver: volplugin}\n"
    volumes = "['data:/data', {type: volume, source: bare, target: /bare}]"
    compose.write(project(volumes, declared, image="seed:local"))
    compose("up", "-d")
    assert compose("exec", "-T", "app", "ls", "/data", "/bare") == (
        "/bare:\n\n/data:\nhello"
    )
    assert engine.docker.volumes() == {"shop_data", "shop_bare"}


def test_two_services_keep_a_tmpfs_until_the_last(
    engine: Engine, compose: Compose
) -> None:
    """Services share a volume; ``stop`` of all of them ends it, content and all."""
    two = """
  other:
    {image: busybox:local, command: sleep 600, network_mode: none, stop_signal: KILL,
    volumes: ["data:/data:ro"]}
volumes:
  data: {driver: volplugin, driver_opts: {driver: tmpfs, size: 5m}}
"""
    compose.write(project("['data:/data']", two))
    compose("up", "-d")
    compose("exec", "-T", "app", "sh", "-c", "echo here > /data/x")
    compose("stop", "app")
    assert compose("exec", "-T", "other", "cat", "/data/x") == "here"
    with pytest.raises(ComposeError, match="Read-only file system"):
        compose("exec", "-T", "other", "touch", "/data/y")
    compose("start", "app")
    assert compose("exec", "-T", "app", "cat", "/data/x") == "here"
    compose("stop")
    engine.eventually_unmounted("shop_data")


def test_replicas_share_the_volume(engine: Engine, compose: Compose) -> None:
    """``--scale`` starts several containers on one volume, each with its hold."""
    compose.write(limited("20m"))
    compose("up", "-d", "--scale", "app=3")
    status = engine.docker.inspect("volume", "shop_data")["Status"]
    assert (status["mounts"], len(status["holders"])) == (3, 3)
    compose("exec", "-T", "--index=1", "app", "sh", "-c", "echo 1 > /data/x")
    assert compose("exec", "-T", "--index=3", "app", "cat", "/data/x") == "1"


def test_a_wrong_option_stops_the_project(engine: Engine, compose: Compose) -> None:
    """The plugin's error is shown as it is, and nothing is started."""
    wrong = "volumes: {data: {driver: volplugin, driver_opts: {sise: 1g}}}"
    compose.write(project("['data:/data']", wrong))
    with pytest.raises(ComposeError, match="unknown option 'sise'; did you mean"):
        compose("up", "-d")
    assert engine.docker("ps", "-aq") == ""
    assert engine.plugin.client.list() == {}


def test_the_plugin_restarts_under_a_project(engine: Engine, compose: Compose) -> None:
    """Killed and started, it is found by the next ``up``; containers go on."""
    compose.write(limited("20m"))
    compose("up", "-d")
    compose("exec", "-T", "app", "sh", "-c", "echo here > /data/x")
    engine.plugin.kill()
    engine.plugin.start()
    assert compose("exec", "-T", "app", "cat", "/data/x") == "here"
    assert "shop_app_1 is up-to-date" in compose("up", "-d")
    with pytest.raises(DockerError, match="in use"):
        engine.docker("volume", "rm", "shop_data")
    compose("down", "-v")
    eventually(lambda: engine.plugin.client.list() == {}, "the volume is removed")
