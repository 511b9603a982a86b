"""The managed plugin with live-restore: containers and volumes outlive dockerd."""

from collections.abc import Iterator

import pytest
from support.client import PluginError
from support.images import IMAGE
from support.managed import NAME, Built, Managed, running
from support.wait import eventually

pytestmark = [pytest.mark.root, pytest.mark.engine]

CREATE = ("volume", "create", "-d", NAME)
FLAGS = ("-v", "disk:/disk", "-v", "memory:/memory", "-v", "image:/image")
FILES = ("/disk/file", "/memory/file", "/image/file")


@pytest.fixture(scope="module")
def shared_managed(built: Built) -> Iterator[Managed]:
    """A host whose dockerd leaves containers alone when it ends."""
    with running(built, live_restore=True) as managed:
        yield managed


@pytest.mark.parametrize("death", ["kill", "terminate"])
def test_dockerd_ends_and_comes_back(managed: Managed, death: str) -> None:
    """The container keeps its files, a new one has the same, and nothing is left."""
    docker = managed.docker
    docker(*CREATE, "disk")
    docker(*CREATE, "-o", "driver=tmpfs", "memory")
    docker(*CREATE, "-o", "driver=quota", "-o", "size=10m", "image")
    docker.sleeper("app", *FLAGS)
    write = "for name in disk memory image; do echo $name > /$name/file; done"
    docker("exec", "app", "sh", "-c", write)
    getattr(docker, death)()
    docker.start()
    managed.wait_until_ready()
    content = "disk\nmemory\nimage"
    assert docker("exec", "app", "cat", *FILES) == content
    assert docker.run("--rm", *FLAGS, IMAGE, "cat", *FILES) == content
    target = managed.host.folder / "copy"
    docker("cp", "app:/memory/file", str(target))
    assert target.read_text() == "memory\n"
    for name in ("disk", "memory", "image"):
        with pytest.raises(PluginError, match="in use"):
            managed.client.remove(name)
    assert docker("exec", "app", "cat", *FILES) == content
    docker("stop", "-t", "0", "app")
    eventually(lambda: not managed.mounts(), "all is unmounted", seconds=30)
    docker("start", "app")
    assert docker("exec", "app", "cat", "/disk/file", "/image/file") == "disk\nimage"
