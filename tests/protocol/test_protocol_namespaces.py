"""Clients whose mount namespace does not get our mounts, and those whose does."""

from collections.abc import Iterator, Sequence
from typing import Final

import pytest
from peers import Life, Lives, holders, host_of, lives_of, mount_of, serving_in_host
from support.client import PluginError
from support.mounts import read_mounts
from support.plugin import Plugin

pytestmark = pytest.mark.root

X: Final = "3f2a" * 16
PATH: Final = "/mnt/tmpfs/v"


@pytest.fixture(scope="module")
def server() -> Iterator[Plugin]:
    """A server that the module shares, in a host whose mounts are shared."""
    with serving_in_host() as plugin:
        yield plugin


@pytest.fixture
def plugin(server: Plugin) -> Iterator[Plugin]:
    """The server with one tmpfs volume, ``v``."""
    server.client.create("v", {"driver": "tmpfs"})
    yield server
    for name in server.client.list():
        server.client.remove(name)
    assert mount_of(server, PATH) is None


@pytest.fixture
def lives(plugin: Plugin) -> Iterator[Lives]:
    """Clients of the server."""
    with lives_of(plugin) as lives:
        yield lives


def apart(plugin: Plugin, propagation: str, *more: str) -> Sequence[str]:
    """Return what begins a command that is to have a mount namespace of its own."""
    unshare = ("unshare", "--mount", "--propagation", propagation)
    return host_of(plugin).command(*unshare, *more)


def sees_it(life: Life) -> bool:
    """Tell whether the process has the volume mounted."""
    return PATH in [mount.mountpoint for mount in read_mounts(life.pid)]


def refusal(life: Life, name: str = "v") -> str:
    """Mount what must be refused; return the words."""
    with pytest.raises(PluginError) as caught:
        life.mount(name, X)
    return str(caught.value)


def test_an_engine_cut_off(plugin: Plugin, lives: Lives) -> None:
    """It is told who it is, why its container would find nothing, and what helps."""
    dockerd = lives.begin(enter=apart(plugin, "private"))
    told = refusal(dockerd)
    assert told.startswith(
        f"mount v: dockerd (pid {dockerd.pid}, uid 0) has a mount namespace that does "
        f"not get the mounts of volplugin's: "
    )
    assert f"a container would find the empty directory {PATH}. " in told
    assert "MountFlags=slave or shared" in told
    assert "driver=local" in told
    assert mount_of(plugin, PATH) is None
    assert holders(plugin, "v") == 0
    assert plugin.client.get("v")["Status"]["attached"] is False


@pytest.mark.parametrize("propagation", ["slave", "shared"])
def test_an_engine_that_gets_our_mounts(
    plugin: Plugin, lives: Lives, propagation: str
) -> None:
    """A namespace of its own is no reason by itself."""
    podman = lives.begin("podman", enter=apart(plugin, propagation))
    assert podman.mount("v", X) == PATH
    assert sees_it(podman)
    podman.unmount("v", X)


def test_a_rootless_engine(plugin: Plugin, lives: Lives) -> None:
    """Its user is named; with a user namespace it is a slave, and gets our mounts."""
    # What it may still do is read the tests, wherever they are, and use the socket.
    may = ["--inh-caps=+dac_override", "--ambient-caps=+dac_override"]
    user = ("setpriv", "--reuid=1234", "--clear-groups", *may)
    cut_off = lives.begin("podman", enter=apart(plugin, "private", *user))
    assert f"podman (pid {cut_off.pid}, uid 1234) has a mount" in refusal(cut_off)
    mapped = ("unshare", "--user", "--map-root-user", "--mount")
    rootless = host_of(plugin).command(*mapped, "--propagation", "unchanged")
    podman = lives.begin("podman", enter=rootless)
    assert podman.mount("v", X) == PATH
    assert sees_it(podman)
    podman.unmount("v", X)


def test_a_mount_from_before(plugin: Plugin, lives: Lives) -> None:
    """A copy that came along is the volume, until that is mounted anew."""
    dockerd = lives.begin()
    dockerd.mount("v", X)
    podman = lives.begin("podman", enter=apart(plugin, "private"))
    assert podman.mount("v", "1") == PATH
    podman.unmount("v", "1")
    dockerd.unmount("v", X)
    assert mount_of(plugin, PATH) is None
    assert sees_it(podman)
    assert "does not get the mounts" in refusal(podman)
    assert mount_of(plugin, PATH) is None


def test_others_keep_theirs(plugin: Plugin, lives: Lives) -> None:
    """A Mount that is refused takes nothing from who holds the volume."""
    cut_off = lives.begin(enter=apart(plugin, "private"))
    dockerd = lives.begin()
    dockerd.mount("v", X)
    before = mount_of(plugin, PATH)
    for _ in range(2):
        assert "does not get the mounts" in refusal(cut_off)
    assert mount_of(plugin, PATH) == before is not None
    assert holders(plugin, "v") == 1
    dockerd.unmount("v", X)
    assert mount_of(plugin, PATH) is None


def test_a_directory_is_there_for_all(plugin: Plugin, lives: Lives) -> None:
    """What is not mounted needs no propagation."""
    cut_off = lives.begin(enter=apart(plugin, "private"))
    cut_off.ask("Create", Name="w", Opts={})
    path = cut_off.mount("w", X)
    assert host_of(plugin).path(path).is_dir()
    cut_off.unmount("w", X)


def test_an_engine_in_a_container(plugin: Plugin, lives: Lives) -> None:
    """A pid namespace below ours hides nobody: it has a pid in ours as well."""
    pids = ("unshare", "--pid", "--fork", "--kill-child")
    inner = lives.begin(enter=apart(plugin, "private", *pids))
    told = refusal(inner)
    assert "does not get the mounts" in told
    assert f"(pid {inner.pid}," not in told  # that is its parent
