"""A real podman: one mount ID for everything, its own count, no daemon."""

from collections.abc import Iterator

import pytest
from support.host import Host
from support.images import IMAGE
from support.mounts import Mount
from support.plugin import Plugin
from support.podman import Podman, PodmanError

pytestmark = [pytest.mark.root, pytest.mark.engine]

CREATE = ("volume", "create", "--driver", "volplugin")


@pytest.fixture(scope="module")
def podman_host() -> Iterator[Host]:
    """The host of this module."""
    host = Host()
    try:
        yield host
    finally:
        host.close()


@pytest.fixture(scope="module")
def plugin(podman_host: Host) -> Iterator[Plugin]:
    """The plugin, where podman's configuration says."""
    plugin = Plugin(podman_host.folder, host=podman_host, config="sweep-interval = 1\n")
    try:
        plugin.start()
        yield plugin
    finally:
        plugin.close()


@pytest.fixture(scope="module")
def loaded_podman(podman_host: Host, plugin: Plugin) -> Podman:
    """podman with images."""
    podman = Podman(podman_host)
    podman.load_images()
    return podman


@pytest.fixture
def podman(loaded_podman: Podman, plugin: Plugin) -> Iterator[Podman]:
    """podman without containers and volumes before and after."""
    yield loaded_podman
    loaded_podman.close()
    assert plugin.client.list() == {}


def _mounts(host: Host) -> list[Mount]:
    return [mount for mount in host.mounts() if mount.source.startswith("volplugin-")]


def test_podman_reads_back_what_it_wrote(podman: Podman, plugin: Plugin) -> None:
    """A named volume outlives its container; ls and rm agree with the plugin."""
    podman(*CREATE, "web")
    volume = ("-v", "web:/data", IMAGE)
    podman.run("--rm", *volume, "sh", "-c", "echo here > /data/x")
    assert podman.run("--rm", *volume, "cat", "/data/x") == "here"
    assert podman("volume", "ls", "-q") == "web"
    assert set(plugin.client.list()) == {"web"}
    podman("volume", "rm", "web")
    assert plugin.client.list() == {}


def test_two_containers_keep_a_tmpfs_until_the_last(
    podman: Podman, podman_host: Host
) -> None:
    """podman sends one Mount for the first and one Unmount for the last of them."""
    podman(*CREATE, "--opt", "driver=tmpfs", "memory")
    podman.sleeper("one", "-v", "memory:/data")
    podman.sleeper("two", "-v", "memory:/data")
    podman("exec", "one", "sh", "-c", "echo here > /data/x")
    podman("stop", "--time", "0", "one")
    assert podman("exec", "two", "cat", "/data/x") == "here"
    assert len(_mounts(podman_host)) == 1
    podman("stop", "--time", "0", "two")
    assert _mounts(podman_host) == []


def test_a_killed_plugin_leaves_podmans_container_its_mount(
    podman: Podman, podman_host: Host, plugin: Plugin
) -> None:
    """SIGKILL the plugin and start it: content and mount stay, stop ends them."""
    podman(*CREATE, "--opt", "driver=tmpfs", "memory")
    podman.sleeper("app", "-v", "memory:/data")
    podman("exec", "app", "sh", "-c", "echo here > /data/x")
    plugin.kill()
    plugin.start()
    assert podman("exec", "app", "cat", "/data/x") == "here"
    podman("stop", "--time", "0", "app")
    assert _mounts(podman_host) == []


def test_podman_shows_the_plugins_error(podman: Podman) -> None:
    """podman takes an Err with status 200 for success: ours come with 500."""
    with pytest.raises(PodmanError, match="size"):
        podman(*CREATE, "--opt", "driver=tmpfs", "--opt", "sizr=1m", "wrong")
    assert podman("volume", "ls", "-q") == ""
