"""rclone behind the plugin, with a real dockerd: its faults are not the containers'."""

import contextlib
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.client import PluginError
from support.docker import DockerError
from support.engine import Engine
from support.images import IMAGE
from support.plugin import DOCKER_SOCKET, plugin_environment
from support.rclone import Rclone
from support.wait import eventually

pytestmark = [pytest.mark.root, pytest.mark.engine]

CONFIG = """
[backend.plugin]
time-limit = 3
recreate = true
"""


@pytest.fixture(scope="module")
def loaded() -> Iterator[tuple[Engine, Rclone]]:
    """An engine with rclone beside the plugin."""
    engine = Engine(config=CONFIG)
    with contextlib.ExitStack() as stack:
        stack.callback(engine.host.close)
        rclone = Rclone(
            engine.host.folder / "rclone", DOCKER_SOCKET.parent, host=engine.host
        )
        stack.callback(rclone.close)
        rclone.start()
        stack.callback(engine.plugin.close)
        stack.callback(engine.docker.close)
        engine.start()
        yield engine, rclone


@pytest.fixture
def engine(loaded: tuple[Engine, Rclone]) -> Iterator[Engine]:
    """The engine, with no container and no volume before and after."""
    engine, rclone = loaded
    yield engine
    engine.clear()
    eventually(lambda: rclone.mounts() == [], "rclone has nothing mounted")
    assert rclone.client.list() == {}
    for file in rclone.remote.iterdir():
        file.unlink()


@pytest.fixture
def rclone(loaded: tuple[Engine, Rclone]) -> Rclone:
    """The other plugin."""
    return loaded[1]


def create(engine: Engine, rclone: Rclone, name: str) -> None:
    """Create a volume of rclone's through the plugin."""
    options = [f"{k}={v}" for k, v in rclone.options.items()]
    words = [word for option in ("driver=plugin", *options) for word in ("-o", option)]
    engine.docker("volume", "create", "-d", "volplugin", *words, name)


def test_a_container_writes_through_both(engine: Engine, rclone: Rclone) -> None:
    """What a container writes is at the remote; nothing stays mounted afterwards."""
    create(engine, rclone, "photos")
    engine.docker.run("--rm", "-v", "photos:/d", IMAGE, "sh", "-c", "echo a > /d/b")
    assert (rclone.remote / "b").read_text() == "a\n"
    assert rclone.mounts() == []
    status = engine.docker.inspect("volume", "photos")["Status"]
    assert status["plugin"] == "rclone"
    assert status["plugin-health"] == "ok"
    assert set(rclone.client.list()) == {"photos"}
    engine.docker("volume", "rm", "photos")
    assert rclone.client.list() == {}
    assert (rclone.remote / "b").exists(), "a volume's end is no end of its remote"


def test_docker_cp_while_a_container_runs(
    engine: Engine, rclone: Rclone, tmp_path: Path
) -> None:
    """`docker cp` repeats a mount ID: rclone refuses that, and never sees it here."""
    (rclone.remote / "x").write_text("copied")
    copy = str(tmp_path / "copy")
    direct = ["-d", "rclone", "-o", f"remote={rclone.remote}"]
    engine.docker("volume", "create", *direct, "direct")
    engine.docker.sleeper("one", "-v", "direct:/d")
    with pytest.raises(DockerError, match="already mounted"):
        engine.docker("cp", "one:/d/x", copy)
    engine.docker("rm", "-f", "one")
    create(engine, rclone, "through")
    engine.docker.sleeper("two", "-v", "through:/d")
    engine.docker("cp", "two:/d/x", copy)
    assert Path(copy).read_text() == "copied"
    assert engine.docker("exec", "two", "cat", "/d/x") == "copied"
    assert len(rclone.mounts()) == 1


def test_many_containers_are_one_mount(engine: Engine, rclone: Rclone) -> None:
    """Three containers have it, and it stays until the last one stops."""
    create(engine, rclone, "photos")
    for name in ("one", "two", "three"):
        engine.docker.sleeper(name, "-v", "photos:/d")
    assert len(rclone.mounts()) == 1
    engine.docker("rm", "-f", "one", "two")
    engine.docker("exec", "three", "sh", "-c", "echo still > /d/x")
    engine.docker("rm", "-f", "three")
    assert rclone.mounts() == []


def test_a_hung_plugin_costs_its_own_volumes_alone(
    engine: Engine, rclone: Rclone
) -> None:
    """While rclone hangs, ls, inspect and other volumes are as quick as before."""
    create(engine, rclone, "photos")
    engine.docker("volume", "create", "-d", "volplugin", "own")
    rclone.process.send_signal(signal.SIGSTOP)
    try:
        # dockerd asks rclone itself too, as it is a plugin in its folder: ask us alone.
        start = time.monotonic()
        assert set(engine.plugin.client.list()) == {"photos", "own"}
        assert engine.plugin.client.get("photos")["Name"] == "photos"
        assert time.monotonic() - start < 0.5
        with pytest.raises(DockerError, match="no answer within 3 s"):
            engine.docker.run("--rm", "-v", "photos:/d", IMAGE, "true")
        engine.docker.run("--rm", "-v", "own:/d", IMAGE, "touch", "/d/x")
        health = engine.plugin.client.get("photos")["Status"]["plugin-health"]
        assert health.startswith("down since"), health
    finally:
        rclone.process.send_signal(signal.SIGCONT)

    def works() -> bool:
        with contextlib.suppress(DockerError):
            engine.docker.run("--rm", "-v", "photos:/d", IMAGE, "touch", "/d/y")
            return True
        return False

    eventually(works, "the volume works again", seconds=30)


def test_plugin_killed_under_a_container(engine: Engine, rclone: Rclone) -> None:
    """A dead FUSE is the running container's trouble; the next one has a new mount."""
    create(engine, rclone, "photos")
    engine.docker.sleeper("one", "-v", "photos:/d")
    rclone.kill()
    with pytest.raises(DockerError, match="not connected"):
        engine.docker("exec", "one", "ls", "/d")
    assert set(engine.plugin.client.list()) == {"photos"}
    rclone.start()
    engine.docker.run("--rm", "-v", "photos:/d", IMAGE, "touch", "/d/x")
    engine.docker("rm", "-f", "one")
    assert (rclone.remote / "x").exists()


@pytest.mark.parametrize("order", ["plugin first", "rclone first"])
def test_both_killed(engine: Engine, rclone: Rclone, order: str) -> None:
    """Both die under a container and come back: what is held and made is known."""
    create(engine, rclone, "photos")
    engine.docker.sleeper("one", "-v", "photos:/d")
    if order == "plugin first":
        engine.plugin.kill()
        rclone.kill()
        engine.plugin.start()
        rclone.start()
    else:
        rclone.kill()
        engine.plugin.kill()
        rclone.start()
        engine.plugin.start()
    assert engine.plugin.client.get("photos")["Status"]["mounts"] == 1
    with pytest.raises(DockerError, match="in use"):
        engine.docker("volume", "rm", "photos")
    engine.docker("rm", "-f", "one")
    engine.docker.run("--rm", "-v", "photos:/d", IMAGE, "touch", "/d/x")
    assert (rclone.remote / "x").exists()


def test_plugin_server_killed_under_a_container(engine: Engine, rclone: Rclone) -> None:
    """Our own death leaves a container its mount, and the mount its end."""
    create(engine, rclone, "photos")
    engine.docker.sleeper("one", "-v", "photos:/d")
    engine.plugin.kill()
    engine.docker("exec", "one", "sh", "-c", "echo on > /d/x")
    engine.plugin.start()
    engine.docker("exec", "one", "sh", "-c", "echo on > /d/y")
    assert len(rclone.mounts()) == 1
    engine.docker("rm", "-f", "one")
    assert rclone.mounts() == []


def test_adopted_volume(engine: Engine, rclone: Rclone) -> None:
    """A volume made directly is taken over, used, and kept when it is removed here."""
    direct = ["-d", "rclone", "-o", f"remote={rclone.remote}"]
    engine.docker("volume", "create", *direct, "theirs")
    with pytest.raises(PluginError, match="adopt"):
        engine.plugin.client.create("theirs", {"driver": "plugin", **rclone.options})
    words = ("volume", "adopt", "--driver", "plugin=rclone", "theirs", "--as", "ours")
    done = subprocess.run(
        engine.host.command(*engine.plugin.operate(*words)),
        capture_output=True,
        text=True,
        check=True,
        env=plugin_environment(),
    )
    assert done.stdout == "ours\n"
    engine.docker.run("--rm", "-v", "ours:/d", IMAGE, "touch", "/d/x")
    engine.docker("volume", "rm", "ours")
    assert set(rclone.client.list()) == {"theirs"}
    engine.docker("volume", "rm", "theirs")


def test_plugin_in_a_container(engine: Engine) -> None:
    """What a plugin has mounted in a container of its own is no use of the volume."""
    contained = Rclone(
        engine.host.folder / "contained",
        DOCKER_SOCKET.parent,
        name="contained",
        host=engine.host,
        contained=True,
    )
    contained.start()
    try:
        create(engine, contained, "photos")
        engine.docker.sleeper("one", "-v", "photos:/d")
        engine.docker("exec", "one", "touch", "/d/x")
        assert len(contained.mounts()) == 1
        with pytest.raises(DockerError, match="in use"):
            engine.docker("volume", "rm", "photos")
        engine.docker("rm", "-f", "one")
        assert contained.mounts() == []
        engine.docker("volume", "rm", "photos")
    finally:
        contained.close()
        engine.host.run("umount", contained.base)
