"""Sockets of some backends alone: to dockerd each is a driver of its own."""

import contextlib
from collections.abc import Iterator

import pytest
from support.docker import DockerError
from support.engine import Engine
from support.images import IMAGE
from support.plugin import DOCKER_SOCKET
from support.wait import eventually

pytestmark = [pytest.mark.root, pytest.mark.engine]

_MEMORY = DOCKER_SOCKET.with_name("tmpfs.sock")
_CONFIG = f"""
[socket.disk]
path = "{DOCKER_SOCKET}"
backends = ["local"]

[socket.memory]
path = "{_MEMORY}"
backends = ["tmpfs"]
"""


@pytest.fixture
def engine() -> Iterator[Engine]:
    """A dockerd, and the plugin with two sockets where it looks for them."""
    engine = Engine(config=_CONFIG, arguments=["--socket", str(_MEMORY)])
    with contextlib.closing(engine):
        engine.start()
        yield engine
        engine.clear()


def test_a_socket_is_a_driver(engine: Engine) -> None:
    """Each volume is shown once, by the driver that has it, and works as any other."""
    docker = engine.docker
    docker("volume", "create", "-d", "tmpfs", "-o", "size=1m", "scratch")
    docker("volume", "create", "-d", "volplugin", "web")
    assert docker.volumes(driver="tmpfs") == {"scratch"}
    assert docker.volumes(driver="volplugin") == {"web"}
    assert docker("volume", "ls", "-q").split() == ["scratch", "web"]
    shown = docker.run(
        *("--rm", "-v", "scratch:/s", "-v", "web:/w", IMAGE),
        *("sh", "-c", "stat -f -c %T /s; echo kept > /w/file; cat /w/file"),
    )
    assert shown == "tmpfs\nkept"
    eventually(lambda: not engine.mounts(), "it is unmounted")
    with pytest.raises(DockerError, match=r"this socket serves volumes of tmpfs alone"):
        docker("volume", "create", "-d", "tmpfs", "-o", "driver=local", "other")
    # dockerd asks all drivers for a name before it makes one.
    with pytest.raises(DockerError, match="driver 'volplugin' already has volume"):
        docker("volume", "create", "-d", "tmpfs", "web")
