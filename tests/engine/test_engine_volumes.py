"""docker volume …, and what moby's own suite asserts of external volume drivers."""

import datetime as dt
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.client import PluginError
from support.docker import DockerError
from support.engine import Engine
from support.images import IMAGE

pytestmark = [pytest.mark.root, pytest.mark.engine]


def test_a_created_volume_is_listed_and_removed(engine: Engine) -> None:
    """Create, ls and rm go through the plugin and agree with it."""
    docker, client = engine.docker, engine.plugin.client
    assert docker("volume", "create", "-d", "volplugin", "web") == "web"
    docker("volume", "create", "-d", "volplugin", "-o", "driver=tmpfs", "scratch")
    assert docker.volumes() == {"web", "scratch"} == set(client.list())
    docker("volume", "rm", "web", "scratch")
    assert docker.volumes() == set() == set(client.list())


def test_inspect_shows_the_mountpoint_the_time_and_the_status(engine: Engine) -> None:
    """Docker shows Get's Mountpoint, CreatedAt and Status as the plugin gives them."""
    docker = engine.docker
    docker("volume", "create", "-d", "volplugin", "--label", "a=b", "seen")
    docker("volume", "create", "-d", "volplugin", "-o", "driver=tmpfs", "memory")
    shown = docker.inspect("volume", "seen")
    told = engine.plugin.client.get("seen")
    assert shown["Driver"] == "volplugin"
    assert shown["Scope"] == "local"
    assert shown["Labels"] == {"a": "b"}
    assert shown["Mountpoint"] == told["Mountpoint"]
    assert engine.host.path(told["Mountpoint"]).is_dir()
    # docker shows whole seconds.
    created = dt.datetime.fromisoformat(told["CreatedAt"])
    shown_at = dt.datetime.fromisoformat(shown["CreatedAt"])
    assert shown_at == created.replace(microsecond=0)
    assert shown["Status"]["driver"] == "local"
    assert docker.inspect("volume", "memory")["Status"]["driver"] == "tmpfs"


def test_creating_twice_with_the_same_options_succeeds(engine: Engine) -> None:
    """A repeated create is success for docker and for the plugin."""
    options = ("-o", "driver=tmpfs", "-o", "size=10m")
    for _ in range(2):
        engine.docker("volume", "create", "-d", "volplugin", *options, "twice")
    engine.plugin.client.create("twice", {"driver": "tmpfs", "size": "10m"})
    assert engine.docker.volumes() == {"twice"}


def test_other_options_are_an_error_that_names_them(engine: Engine) -> None:
    """What docker's Get hides the plugin refuses: a create with another size."""
    options = ("-o", "driver=tmpfs", "-o", "size=10m")
    engine.docker("volume", "create", "-d", "volplugin", *options, "drift")
    with pytest.raises(PluginError, match=r"size.*10"):
        engine.plugin.client.create("drift", {"driver": "tmpfs", "size": "20m"})


def test_a_name_of_another_drivers_volume_is_refused(engine: Engine) -> None:
    """docker keeps names unique over drivers; the plugin is not even asked."""
    docker = engine.docker
    docker("volume", "create", "-d", "local", "taken")
    with pytest.raises(DockerError, match="must be unique"):
        docker("volume", "create", "-d", "volplugin", "taken")
    docker("volume", "create", "-d", "volplugin", "ours")
    with pytest.raises(DockerError, match="must be unique"):
        docker("volume", "create", "-d", "local", "ours")
    assert set(engine.plugin.client.list()) == {"ours"}


def test_create_and_ls_ask_no_path(engine: Engine) -> None:
    """dockerd takes mountpoints from Get and List; Path is not called."""
    docker = engine.docker
    docker("volume", "create", "-d", "volplugin", "pathless")
    docker("volume", "ls")
    docker("volume", "inspect", "pathless")
    docker("volume", "rm", "pathless")
    assert engine.plugin.operations("pathless") == ["Create", "Remove"]
    assert "Path" not in {call.op for call in engine.plugin.calls()}


def test_capabilities_are_asked_once(engine: Engine) -> None:
    """dockerd 20.10 keeps the scope that it was told."""
    for name in ("one", "two", "three"):
        engine.docker("volume", "create", "-d", "volplugin", name)
        engine.docker("volume", "inspect", name)
    asked = [call for call in engine.plugin.calls() if call.op == "Capabilities"]
    assert len(asked) == 1


def test_a_volume_removed_behind_dockers_back_can_be_made_again(engine: Engine) -> None:
    """After a removal out of band the name is free, for the plugin and for others."""
    docker, client = engine.docker, engine.plugin.client
    docker("volume", "create", "-d", "volplugin", "band")
    client.remove("band")
    with pytest.raises(DockerError, match=r"(?i)no such volume"):
        docker("volume", "inspect", "band")
    docker("volume", "create", "-d", "volplugin", "band")
    assert set(client.list()) == {"band"}
    client.remove("band")
    docker("volume", "create", "-d", "local", "band")
    assert docker.volumes(driver="local") == {"band"}


def test_a_volume_that_is_nowhere_is_not_shown(engine: Engine) -> None:
    """Get of an unknown name is docker's "no such volume", and makes no phantom."""
    with pytest.raises(DockerError, match=r"(?i)no such volume: nowhere"):
        engine.docker("volume", "inspect", "nowhere")
    with pytest.raises(DockerError, match=r"(?i)no such volume: nowhere"):
        engine.docker("volume", "rm", "nowhere")
    assert engine.docker.volumes() == set() == set(engine.plugin.client.list())


def test_each_container_has_a_mount_id_of_its_own(engine: Engine) -> None:
    """64 hex digits come with every Mount; Status shows who holds the volume."""
    docker = engine.docker
    docker("volume", "create", "-d", "volplugin", "held")
    for name in ("one", "two"):
        docker.sleeper(name, "-v", "held:/data")
    status = docker.inspect("volume", "held")["Status"]
    assert status["mounts"] == 2
    holder = re.compile(r"'([0-9a-f]{12})…' \(dockerd, pid (\d+), since [^ ]+Z\)")
    found = [holder.fullmatch(text) for text in status["holders"]]
    ids = {match[1] for match in found if match}
    assert len(ids) == 2


def test_prune_leaves_volumes_of_a_plugin(engine: Engine) -> None:
    """``volume prune`` of dockerd 20.10 takes those of its local driver alone."""
    docker = engine.docker
    docker("volume", "create", "-d", "volplugin", "--label", "a=b", "ours")
    docker("volume", "create", "-d", "local", "theirs")
    assert "theirs" in docker("volume", "prune", "--force")
    assert docker.volumes() == {"ours"}
    assert docker("volume", "ls", "-qf", "label=a=b") == "ours"
    assert docker("volume", "ls", "-qf", "dangling=true") == "ours"


def test_system_df_does_not_count_volumes_of_a_plugin(engine: Engine) -> None:
    """Their sizes are in Status; ``system df`` shows local volumes."""
    docker = engine.docker
    docker("volume", "create", "-d", "volplugin", "ours")
    docker("volume", "create", "-d", "local", "theirs")
    shown = docker("system", "df", "-v")
    assert "theirs" in shown
    assert "ours" not in shown


@pytest.mark.parametrize("options", [[], ["-o", "driver=tmpfs"]])
def test_help_is_the_text_of_the_error(engine: Engine, options: list[str]) -> None:
    """``-o help`` shows a driver's options with their defaults and makes nothing."""
    with pytest.raises(DockerError) as caught:
        engine.docker("volume", "create", "-d", "volplugin", *options, "-o", "help")
    for word in ("mount", "mode", "uid", *(["size", "64"] if options else [])):
        assert word in caught.value.stderr
    assert engine.plugin.client.list() == {}


def test_an_unknown_option_is_refused(engine: Engine) -> None:
    """A misspelt option is an error that names the right one; nothing is made."""
    with pytest.raises(DockerError, match="size"):
        engine.docker(
            "volume", "create", "-d", "volplugin", "-o", "driver=tmpfs", "-o", "sizr=1m"
        )
    assert engine.plugin.client.list() == {}


@pytest.mark.parametrize(
    "name", ["../evil", "/abs", "a/b", ".", "..", "a\0b", "a\nb", "x" * 300, "é"]
)
def test_names_that_docker_lets_through_are_refused(engine: Engine, name: str) -> None:
    """dockerd checks no names for plugins; nothing is made and nothing is touched."""
    api, root = engine.docker.client, engine.plugin.root
    before = sorted(root.rglob("*"))
    body = json.dumps({"Name": name, "Driver": "volplugin"}).encode()
    headers = {"Content-Type": "application/json"}
    answer = api.request("/v1.41/volumes/create", body, headers=headers)
    assert answer.status == 500
    assert "name" in answer.json["message"]
    mount = {"Type": "volume", "Source": name, "Target": "/x"}
    mount["VolumeOptions"] = {"DriverConfig": {"Name": "volplugin"}}  # type: ignore[assignment]
    body = json.dumps({"Image": IMAGE, "HostConfig": {"Mounts": [mount]}}).encode()
    answer = api.request("/v1.41/containers/create", body, headers=headers)
    assert answer.status >= 400
    assert engine.plugin.client.list() == {}
    after = [path for path in sorted(root.rglob("*")) if path.parent.name != "store"]
    assert after == [path for path in before if path.parent.name != "store"]
    assert not engine.host.path("/abs").exists()


def test_rm_of_a_volume_in_use_is_refused(engine: Engine) -> None:
    """docker refuses by its references, the plugin by its mounts, naming the holder."""
    docker, client = engine.docker, engine.plugin.client
    docker("volume", "create", "-d", "volplugin", "used")
    docker.sleeper("user", "-v", "used:/data")
    with pytest.raises(DockerError, match="in use"):
        docker("volume", "rm", "used")
    with pytest.raises(PluginError, match=r"in use by 1 mount: '?[0-9a-f]+.*dockerd"):
        client.remove("used")
    docker("rm", "-f", "user")
    docker("volume", "rm", "used")


def test_rm_f_of_a_volume_in_use_is_refused_by_the_plugin(engine: Engine) -> None:
    """``volume rm -f`` makes docker forget a volume, but the plugin keeps it.

    docker finds it again, without its labels and options.
    """
    docker, client = engine.docker, engine.plugin.client
    words = ("--label", "a=b", "-o", "mode=0700")
    docker("volume", "create", "-d", "volplugin", *words, "kept")
    client.mount("kept", "somebody")
    with pytest.raises(DockerError, match="in use by 1 mount"):
        docker("volume", "rm", "-f", "kept")
    assert set(client.list()) == {"kept"} == docker.volumes()
    shown = docker.inspect("volume", "kept")
    assert (shown["Labels"], shown["Options"]) == (None, None)
    client.unmount("kept", "somebody")


@pytest.fixture
def hanging_plugin(engine: Engine) -> Iterator[None]:
    """A plugin ``down`` that accepts and never answers."""
    path = engine.host.path("/run/docker/plugins/down.sock")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        yield
        path.unlink()


def test_a_hanging_plugin_does_not_block_ours(
    engine: Engine, hanging_plugin: None
) -> None:
    """A create for a driver that never answers delays no create of volplugin."""
    with ThreadPoolExecutor() as pool:
        stuck = pool.submit(
            engine.docker, "volume", "create", "-d", "down", "stuck", limit=4
        )
        time.sleep(0.5)
        started = time.monotonic()
        engine.docker("volume", "create", "-d", "volplugin", "free")
        assert time.monotonic() - started < 2
        assert not stuck.done()
        assert stuck.exception() is not None
    assert set(engine.plugin.client.list()) == {"free"}


def test_requests_from_many_clients_at_once(engine: Engine) -> None:
    """Parallel creates of different names and of one name all succeed."""
    names = [f"many{number % 8}" for number in range(16)]
    ready = threading.Barrier(8)

    def create(name: str) -> str:
        ready.wait(10)
        return engine.docker("volume", "create", "-d", "volplugin", name)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(create, names)) == names
    assert engine.docker.volumes() == set(names)
