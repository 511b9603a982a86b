"""docker with limited volumes: what a container can write, see and get back."""

import concurrent.futures
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.client import PluginError
from support.docker import DockerError
from support.engine import Engine, running
from support.images import IMAGE, SEED_IMAGE
from support.wait import eventually

from volplugin.admin.client import AdminClient

pytestmark = [pytest.mark.root, pytest.mark.engine]

MIB = 1 << 20
CREATE = ("volume", "create", "-d", "volplugin", "-o", "driver=quota")
BTRFS = """
[backend.fast]
driver = "local"
root = "/mnt/btrfs/volumes"
"""
_SETUP = """
set -e
mkdir -p /mnt/btrfs
truncate -s 1G "$1"
mkfs.btrfs -q "$1"
mount -o loop "$1" /mnt/btrfs
btrfs quota enable /mnt/btrfs
btrfs quota rescan -w /mnt/btrfs
"""


@pytest.fixture
def on_btrfs() -> Iterator[Engine]:
    """dockerd and the plugin, with a backend on a btrfs that has quotas."""
    with running(config=BTRFS) as engine:
        yield engine


def image_of(engine: Engine, name: str) -> Path:
    """Return the image file of a volume, as this process reaches it."""
    volume = engine.plugin.client.get(name)
    images = engine.plugin.root / "quota/images"
    (found,) = [
        image
        for image in images.iterdir()
        if f'"name":"{name}"' in os.getxattr(image, "trusted.volplugin").decode()
    ]
    assert volume["Status"]["mechanism"] == "loop"
    return found


def resize(engine: Engine, name: str, size: str) -> None:
    """Resize a volume as the command line does."""
    AdminClient(str(engine.plugin.admin_socket)).resize(name, size=size)


def test_a_container_stops_at_the_size(engine: Engine) -> None:
    """dd ends with "No space left", the host's disk keeps what is beyond."""
    docker = engine.docker
    docker(*CREATE, "-o", "size=20m", "limited")
    with pytest.raises(DockerError, match="No space left on device"):
        docker.run("-v", "limited:/d", IMAGE, "dd", "if=/dev/zero", "of=/d/x", "bs=1M")
    used = docker.run("-v", "limited:/d", IMAGE, "stat", "-c", "%s", "/d/x")
    assert 12 * MIB < int(used) <= 20 * MIB
    shown = (
        docker.run("-v", "limited:/d", IMAGE, "df", "-m", "/d").splitlines()[-1].split()
    )
    assert int(shown[1]) <= 20


def test_copy_up_finds_an_empty_volume(engine: Engine) -> None:
    """An image's files are copied into a new volume: no lost+found is in the way."""
    docker = engine.docker
    docker(*CREATE, "-o", "size=20m", "seeded")
    plain = docker.run("-v", "plain:/data", SEED_IMAGE, "ls", "-A", "/data")
    found = docker.run("-v", "seeded:/data", SEED_IMAGE, "ls", "-A", "/data")
    assert found == plain != ""


def test_deleted_bytes_come_back_to_the_host(engine: Engine) -> None:
    """What a container deletes leaves the image while it is mounted."""
    docker = engine.docker
    docker(*CREATE, "-o", "size=200m", "limited")
    docker.sleeper("one", "-v", "limited:/d")
    image = image_of(engine, "limited")
    docker(
        "exec", "one", "sh", "-c", "dd if=/dev/urandom of=/d/x bs=1M count=100; sync"
    )
    full = image.stat().st_blocks * 512
    assert full > 100 * MIB
    docker("exec", "one", "sh", "-c", "rm /d/x; sync")
    eventually(
        lambda: image.stat().st_blocks * 512 < full - 90 * MIB,
        "the space is given back",
    )
    docker("rm", "-f", "one")


def test_resize_under_a_running_container(engine: Engine) -> None:
    """A container that is full goes on writing after a resize; it is not restarted."""
    docker = engine.docker
    docker(*CREATE, "-o", "size=300m", "-o", "fs=xfs", "limited")
    docker.sleeper("one", "-v", "limited:/d")
    write = ("exec", "one", "dd", "if=/dev/zero", "of=/d/x", "bs=1M", "count=310")
    with pytest.raises(DockerError, match="No space left"):
        docker(*write)
    resize(engine, "limited", "400m")
    docker(*write)
    assert docker.inspect("volume", "limited")["Status"]["size"] == "400M"
    docker("rm", "-f", "one")


def test_fifty_volumes_at_once(engine: Engine) -> None:
    """Fifty images are mounted at once and gone again, with their loop devices."""
    client = engine.plugin.client
    names = [f"v{number}" for number in range(50)]

    def make(name: str) -> str:
        client.create(name, {"driver": "quota", "size": "16m"})
        return client.mount(name, "one")

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        places = list(pool.map(make, names))
    assert len({engine.host.path(place).stat().st_dev for place in places}) == 50
    for place in places:
        (engine.host.path(place) / "file").write_text(place)
    for name, place in zip(names, places, strict=True):
        assert (engine.host.path(place) / "file").read_text() == place
        client.unmount(name, "one")
        client.remove(name)
    shown = subprocess.run(
        ["losetup", "-a"], capture_output=True, text=True, check=True
    )
    assert str(engine.plugin.root) not in shown.stdout


def test_the_plugin_is_killed_under_a_limited_volume(engine: Engine) -> None:
    """A container keeps its limited volume, and it is taken down after it."""
    docker = engine.docker
    docker(*CREATE, "-o", "size=20m", "limited")
    docker.sleeper("one", "-v", "limited:/d")
    engine.plugin.kill()
    docker("exec", "one", "sh", "-c", "echo kept > /d/file; sync")
    engine.plugin.start()
    assert docker("exec", "one", "cat", "/d/file") == "kept"
    with pytest.raises(PluginError, match="in use"):
        engine.plugin.client.remove("limited")
    docker("rm", "-f", "one")
    engine.eventually_unmounted("limited")
    assert docker.run("-v", "limited:/d", IMAGE, "cat", "/d/file") == "kept"


def test_btrfs_quota(on_btrfs: Engine, tmp_path: Path) -> None:
    """On btrfs a container is stopped with "Disk quota exceeded", and grows online."""
    engine = on_btrfs
    docker = engine.docker
    engine.plugin.stop()
    engine.host.run("sh", "-c", _SETUP, "sh", tmp_path / "image")
    engine.plugin.start()
    try:
        docker(*CREATE[:4], "-o", "driver=fast", "-o", "size=20m", "fast")
        docker.sleeper("one", "-v", "fast:/d")
        write = ("exec", "one", "dd", "if=/dev/urandom", "of=/d/x", "bs=1M", "count=30")
        with pytest.raises(DockerError, match="Disk quota exceeded"):
            docker(*write)
        resize(engine, "fast", "60m")
        docker(*write)
        status = docker.inspect("volume", "fast")["Status"]
        assert (status["size"], status["mechanism"]) == ("60M", "btrfs")
        docker("rm", "-f", "one")
        docker("volume", "rm", "fast")
        left = engine.host.run("btrfs", "subvolume", "list", "/mnt/btrfs")
        assert left == ""
    finally:
        engine.plugin.stop()
        engine.host.run("umount", "/mnt/btrfs")
        engine.plugin.start()
