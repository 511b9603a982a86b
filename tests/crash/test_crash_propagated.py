"""Volumes mounted for a managed plugin's host: SIGKILL at each step, and torn mounts.

Here the server is no container: what takes the driver's own mount away with the
plugin's namespace, or all of them with an engine's `disable`, is an ``umount``.
"""

import contextlib
import http.client
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from rooms import ForkedPlugin, Room, opened
from support.client import PluginError
from support.commands import wait_for_program
from support.require import require
from support.wait import eventually

from volplugin import failpoints

pytestmark = pytest.mark.root

KILLED: Final = -signal.SIGKILL
OPTIONS: Final = {
    "local": {},
    "tmpfs": {"driver": "tmpfs", "size": "1m"},
    "quota": {"driver": "quota", "size": "8m"},
}
MOUNTING: Final = ("tmpfs", "quota")
POINTS: Final = {
    "mount": ("propagated.expose", "propagated.exposed"),
    "unmount": ("propagated.withdraw", "propagated.withdrawn"),
}
STEPS: Final = [
    (kind, verb, point) for kind in OPTIONS for verb in POINTS for point in POINTS[verb]
]


class World:
    """A server whose volumes are mounted for its host below ``out``."""

    def __init__(self, room: Room) -> None:
        folder = room.folder()
        self.host = room.host
        self.out = folder / "out"
        self.out.mkdir()
        self.plugin = ForkedPlugin(
            room,
            folder,
            config=f"propagated = '{self.out}'\nsweep-interval = 0.2",
        )
        self.client = self.plugin.client

    def file(self, name: str) -> Path:
        """Return a file in the volume, by the path that engines get."""
        return self.host.path(self.out / name / "file")

    def mounts(self) -> list[str]:
        """Return what is mounted below the server's folder."""
        where = [mount.mountpoint for mount in self.host.mounts()]
        return [each for each in where if each.startswith(f"{self.out.parent}/")]

    def own_mountpoint(self, kind: str, name: str) -> Path:
        """Return where the driver has mounted a volume."""
        if kind == "tmpfs":
            return self.plugin.tmpfs / name
        return self.plugin.root / kind / "volumes" / name

    @contextlib.contextmanager
    def container(self, name: str, *, read_only: bool = False) -> Iterator[Path]:
        """Run a container that has the volume; yield the volume as it sees it."""
        root = self.plugin.folder / "container"
        root.mkdir()
        setup = f"""
            set -e
            mount -t tmpfs rootfs {root}
            mkdir {root}/bin {root}/data
            cp {require("busybox")} {root}/bin/busybox
            mount --bind {self.out / name} {root}/data
            {f"mount -o remount,bind,ro {root}/data" if read_only else ""}
            exec chroot {root} /bin/busybox sleep 600
        """
        words = ("unshare", "--mount", "--propagation", "private", "sh", "-c", setup)
        log = self.plugin.folder / "container.log"
        process = self.host.start(*words, log=log)
        try:
            wait_for_program(process.pid, "busybox")
            yield Path(f"/proc/{process.pid}/root/data")
        finally:
            process.kill()
            process.wait(10)

    def tear(self, *paths: Path) -> None:
        """Unmount as an engine does, whoever uses it."""
        for path in paths:
            self.host.run("umount", "--lazy", path)


@pytest.fixture(scope="module")
def room() -> Iterator[Room]:
    """A room for all tests."""
    with opened() as room:
        yield room


@pytest.fixture
def world(room: Room) -> Iterator[World]:
    """A server that runs; at the end it has no volume, and nothing is mounted."""
    world = World(room)
    world.plugin.start()
    yield world
    for name in world.client.list():
        world.client.remove(name)
    assert world.mounts() == []
    assert os.listdir(world.host.path(world.out)) == [".data"]
    world.plugin.close()


def test_every_point_is_killed_at() -> None:
    """Each failpoint of `propagated` is the place of a death in a test here."""
    ours = {each for each in failpoints.NAMES if each.startswith("propagated.")}
    others = {"propagated.fetched", "propagated.return"}
    assert {point for *_, point in STEPS} | others == ours


@pytest.mark.parametrize("kind", OPTIONS)
def test_engines_get_the_path_below_the_shared_directory(
    world: World, kind: str
) -> None:
    """Mount, Path, List and Get agree on it, and it has the volume's files."""
    path = str(world.out / "v")
    world.client.create("v", OPTIONS[kind])
    assert world.client.list() == {"v": path}
    assert world.client.path("v") == path
    assert world.client.get("v")["Mountpoint"] == path
    assert not world.host.path(path).exists()
    assert world.client.mount("v", "one") == path
    assert world.client.get("v")["Status"]["attached"] is True
    world.file("v").write_text("kept")
    assert world.client.mount("v", "two") == path
    world.client.unmount("v", "one")
    assert world.file("v").read_text() == "kept"
    with pytest.raises(PluginError, match="in use by 1 mount"):
        world.client.remove("v")
    world.client.unmount("v", "two")
    assert world.mounts() == []
    assert not world.host.path(path).exists()
    world.client.mount("v", "three")
    assert world.file("v").exists() == (kind != "tmpfs")
    world.client.unmount("v", "three")


def test_what_a_user_has_mounted_in_his_directory_comes_along(world: World) -> None:
    """A ``mount=`` directory is what it is to a server that is no plugin."""
    directory = world.plugin.folder / "of-user"
    inner = directory / "inner"
    inner.mkdir(parents=True)
    world.host.run("mount", "-t", "tmpfs", "of-user", inner)
    # As the host's directories are bound into a plugin.
    world.host.run("mount", "--rbind", directory, directory)
    world.host.run("mount", "--make-rslave", directory)
    world.client.create("v", {"mount": str(directory)})
    world.host.path(inner / "file").write_text("deep")
    world.client.mount("v", "id")
    assert world.host.path(world.out / "v" / "inner" / "file").read_text() == "deep"
    world.client.unmount("v", "id")
    world.client.remove("v")
    assert world.host.path(inner / "file").read_text() == "deep"
    world.host.run("umount", "--recursive", directory)
    world.host.run("umount", inner)


@pytest.mark.parametrize(("kind", "verb", "point"), STEPS)
def test_death(world: World, kind: str, verb: str, point: str) -> None:
    """After a death at the point the call can be repeated, and no file is lost."""
    plugin, client = world.plugin, world.client
    client.create("v", OPTIONS[kind])
    client.mount("v", "first")
    world.file("v").write_text("kept")
    if verb == "mount":
        client.unmount("v", "first")
    plugin.kill()
    plugin.start(failpoints=f"{point}=kill")
    with contextlib.suppress(OSError, http.client.HTTPException):
        if verb == "mount":
            client.mount("v", "second")
        else:
            client.unmount("v", "first")
    assert plugin.wait() == KILLED
    plugin.start()
    assert len(set(world.mounts())) <= 2
    client.mount("v", "third")
    if kind != "tmpfs":
        assert world.file("v").read_text() == "kept"
    client.unmount("v", "third")
    client.unmount("v", "first")
    eventually(lambda: not world.mounts(), "nothing is mounted any more")


@pytest.mark.parametrize("kind", MOUNTING)
@pytest.mark.parametrize("dies", [False, True])
def test_a_mount_that_outlived_the_plugin_is_used_again(
    world: World, kind: str, *, dies: bool
) -> None:
    """The namespace is gone, the host's mount is not: the files are the same ones."""
    plugin, client = world.plugin, world.client
    client.create("v", OPTIONS[kind])
    client.mount("v", "first")
    world.file("v").write_text("kept")
    device = world.file("v").stat().st_dev
    plugin.kill()
    world.tear(world.own_mountpoint(kind, "v"))
    if dies:
        plugin.start(failpoints="propagated.return=kill", wait=False)
        assert plugin.wait() == KILLED
    plugin.start()
    assert "gone" not in plugin.log
    client.mount("v", "second")
    assert world.file("v").read_text() == "kept"
    assert world.file("v").stat().st_dev == device
    client.unmount("v", "first")
    client.unmount("v", "second")
    assert world.mounts() == []


@pytest.mark.parametrize("kind", OPTIONS)
def test_what_the_engine_has_torn_down_is_told_and_mounted_again(
    world: World, kind: str
) -> None:
    """A volume that is held is there again soon after the start, without a call."""
    plugin, client = world.plugin, world.client
    client.create("v", OPTIONS[kind])
    client.create("idle", OPTIONS[kind])
    client.mount("v", "id")
    world.file("v").write_text("kept")
    plugin.kill()
    torn = [world.out / "v"]
    if kind in MOUNTING:
        torn.append(world.own_mountpoint(kind, "v"))
    world.tear(*torn)
    plugin.start()
    eventually(lambda: str(world.out / "v") in world.mounts(), "it is mounted")
    for event in ("its mount has gone, to be mounted again", '"mounted again"'):
        eventually(lambda: event in plugin.log, "it is told")  # noqa: B023  at once
    if kind != "tmpfs":
        assert world.file("v").read_text() == "kept"
    assert client.get("v")["Status"]["attached"] is True
    assert str(world.out / "idle") not in world.mounts()
    client.unmount("v", "id")


def test_what_the_engine_tears_down_late_is_mounted_again(world: World) -> None:
    """The sweep sees what is taken while the server runs, and an idle one stays so."""
    world.client.create("v", OPTIONS["quota"])
    world.client.mount("v", "id")
    world.file("v").write_text("kept")
    world.tear(world.out / "v")
    eventually(lambda: str(world.out / "v") in world.mounts(), "it is mounted")
    assert world.file("v").read_text() == "kept"
    world.client.unmount("v", "id")
    assert world.mounts() == []


def test_another_root_without_volumes_is_refused(world: World) -> None:
    """Where the data was elsewhere, an empty store is no reason to begin anew."""
    plugin = world.plugin
    world.client.create("v")
    root, moved = world.host.path(plugin.root), plugin.folder / "moved"
    plugin.kill()
    root.rename(world.host.path(moved))
    plugin.root.symlink_to(world.plugin.folder / "other")
    (plugin.folder / "other").mkdir()
    status, output = plugin.refuse()
    assert status == 1
    assert f"the plugin's data was in {plugin.root} of the host" in output
    assert f"data.source={plugin.root}" in output
    # With volumes in it, it has been moved there.
    plugin.root.unlink()
    plugin.root.symlink_to(moved)
    plugin.start()
    assert set(world.client.list()) == {"v"}
    plugin.kill()
    plugin.root.unlink()
    moved.rename(plugin.root)
    plugin.start()


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize("dies", [False, True])
def test_what_a_container_alone_has_is_fetched_from_it(
    world: World, *, read_only: bool, dies: bool
) -> None:
    """A tmpfs whose mounts were all torn down is the container's, not a new one."""
    plugin, client = world.plugin, world.client
    client.create("v", OPTIONS["tmpfs"])
    client.mount("v", "id")
    world.file("v").write_text("kept")
    with world.container("v", read_only=read_only) as seen:
        plugin.kill()
        world.tear(world.out / "v", world.own_mountpoint("tmpfs", "v"))
        if dies:
            plugin.start(failpoints="propagated.fetched=kill", wait=False)
            assert plugin.wait() == KILLED
        plugin.start()
        eventually(lambda: str(world.out / "v") in world.mounts(), "it is mounted")
        world.file("v").write_text("written")
        assert (seen / "file").read_text() == "written"
        (mount,) = [
            each
            for each in world.host.mounts()
            if each.mountpoint == str(world.out / "v")
        ]
        assert {"rw", "nosuid", "nodev", "noexec"} <= mount.options
        with pytest.raises(PluginError, match="in use"):
            client.remove("v")
    client.unmount("v", "id")
    eventually(lambda: not world.mounts(), "it is unmounted")


def test_what_a_container_alone_has_is_not_removed(world: World) -> None:
    """Nobody holds the volume by a call and it is not mounted: it is in use."""
    plugin, client = world.plugin, world.client
    for kind in MOUNTING:
        client.create("v", OPTIONS[kind])
        client.mount("v", "id")
        world.file("v").write_text("kept")
        with world.container("v") as seen:
            client.unmount("v", "id")
            plugin.kill()
            world.tear(world.out / "v", world.own_mountpoint(kind, "v"))
            plugin.start()
            with pytest.raises(PluginError, match=r"in use by a container: .*busybox"):
                client.remove("v")
            client.mount("v", "id")
            assert world.file("v").read_text() == "kept"
            world.file("v").write_text("written")
            assert (seen / "file").read_text() == "written"
        client.unmount("v", "id")
        client.remove("v")
        (plugin.folder / "container").rmdir()


def test_what_an_earlier_volume_has_left_is_replaced(world: World) -> None:
    """A mount that is another file system's is never handed out as the volume."""
    world.client.create("v")
    place = world.out / "v"
    world.host.path(place).mkdir()
    world.host.run("mount", "-t", "tmpfs", "of-another", place)
    world.host.path(place / "file").write_text("of another")
    world.client.mount("v", "id")
    assert not world.file("v").exists()
    assert world.mounts() == [str(place)]
    world.client.unmount("v", "id")


def test_a_volume_that_a_process_of_the_host_is_in_is_taken_down_later(
    world: World,
) -> None:
    """An open file makes the Unmount fail; the sweep does it once that is closed."""
    world.client.create("v", OPTIONS["tmpfs"])
    world.client.mount("v", "id")
    with world.file("v").open("w"):
        with pytest.raises(PluginError, match="a process has files open there"):
            world.client.unmount("v", "id")
        assert str(world.out / "v") in world.mounts()
    eventually(lambda: not world.mounts(), "it is unmounted")


def test_another_shared_directory_needs_a_restart(world: World) -> None:
    """A reload with another ``propagated`` is refused as a whole."""
    plugin = world.plugin
    text = plugin.config.read_text()
    plugin.config.write_text(text.replace(str(world.out), f"{world.out}-2"))
    plugin.signal(signal.SIGHUP)
    eventually(
        lambda: "propagated: a change needs a restart" in plugin.log, "it is refused"
    )
    plugin.config.write_text(text)
