"""SIGKILL of the server, of the plugin behind it, and of both, at each step of either.

The other plugin is a real rclone, which forgets volumes that were mounted when it died.
"""

import contextlib
import http.client
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Final

import pytest
from rooms import ForkedPlugin, Room, opened
from support.client import PluginError
from support.rclone import Rclone
from support.wait import eventually

from volplugin import failpoints

pytestmark = pytest.mark.root

KILLED: Final = -signal.SIGKILL
POINTS: Final = {
    "create": ("mountpoint", "guard", "intent", "created"),
    "mount": ("mount", "mounted", "bound"),
    "unmount": ("unbind", "unmount", "unmounted"),
    "remove": ("removed", "unguard"),
}
STEPS: Final = [
    (verb, f"plugin.{p}") for verb, points in POINTS.items() for p in points
]


class World:
    """A server, its rclone, and what a client knows of both."""

    def __init__(self, room: Room) -> None:
        self.folder = room.folder()
        sockets = self.folder / "s"
        sockets.mkdir()
        self.rclone = Rclone(self.folder / "rclone", sockets, host=room.host)
        self.plugin = ForkedPlugin(
            room,
            self.folder,
            config=f"""
                sweep-interval = 0.2
                [backend.plugin]
                sockets = ["{sockets}"]
                recreate = true
            """,
        )
        self.host = room.host

    @property
    def options(self) -> dict[str, str]:
        """The options of a volume."""
        return {"driver": "plugin", **self.rclone.options}

    def prepare(self, verb: str) -> None:
        """Bring the volume to where ``verb`` can be asked for."""
        if verb != "create":
            self.plugin.client.create("victim", self.options)
        if verb == "unmount":
            self.plugin.client.mount("victim", "id")

    def drive(self, verb: str) -> None:
        """Ask for ``verb``, which the server may not outlive."""
        client = self.plugin.client
        calls: dict[str, Callable[[], object]] = {
            "create": lambda: client.create("victim", self.options),
            "mount": lambda: client.mount("victim", "id"),
            "unmount": lambda: client.unmount("victim", "id"),
            "remove": lambda: client.remove("victim"),
        }
        with contextlib.suppress(OSError, http.client.HTTPException, PluginError):
            calls[verb]()

    def check(self) -> None:
        """Assert that both sides agree, and that what is there can be used."""
        client = self.plugin.client
        eventually(self._is_settled, "nothing is half removed", seconds=10)
        names = set(client.list())
        assert names <= {"victim"}
        for name in names:
            for holder in client.get(name)["Status"].get("holders", ()):
                client.unmount(name, holder.split("'")[1])
            path = self.host.path(client.mount(name, "check"))
            assert len(self.rclone.mounts()) == 1
            (path / "file").write_text("text")
            assert (path / "file").read_text() == "text"
            client.unmount(name, "check")
        eventually(lambda: self.rclone.mounts() == [], "nothing is mounted", seconds=10)
        eventually(
            lambda: set(self.rclone.client.list()) == names,
            "both have the same volumes",
            seconds=10,
        )

    def _is_settled(self) -> bool:
        client = self.plugin.client
        with contextlib.suppress(PluginError):  # it has just gone
            return not any("error" in client.get(n)["Status"] for n in client.list())
        return False

    def destroy(self) -> None:
        """Remove the volume; no trace of it may be left on either side."""
        client = self.plugin.client
        if "victim" not in client.list():
            client.create("victim", self.options)
        client.remove("victim")
        assert self.rclone.client.list() == {}
        place = self.host.path(self.plugin.root / "plugin")
        left = [str(p.relative_to(place)) for p in place.rglob("*")]
        assert set(left) <= {
            "adopted",
            "claims",
            "claims/rclone",
            "expected",
            "mounts",
        }, left
        assert not [m for m in self.host.mounts() if str(place) in m.mountpoint]


@pytest.fixture(scope="module")
def room() -> Iterator[Room]:
    """A room for all scenarios."""
    with opened() as room:
        yield room


@pytest.fixture
def world(room: Room) -> Iterator[World]:
    """A server with rclone behind it."""
    world = World(room)
    with contextlib.ExitStack() as stack:
        stack.callback(_unmount_left, world)
        stack.callback(world.rclone.close)
        world.rclone.start()
        stack.callback(world.plugin.close)
        world.plugin.start()
        yield world


def _unmount_left(world: World) -> None:
    for mount in world.rclone.mounts():  # of a test that failed
        world.host.run("umount", "-l", mount.mountpoint, check=False)


def test_every_point_is_killed_at() -> None:
    """Each failpoint of the driver is the place of a death here."""
    ours = {name for name in failpoints.NAMES if name.startswith("plugin.")}
    assert {point for _, point in STEPS} == ours


@pytest.mark.parametrize(
    "dying", ["server", "server, then rclone", "rclone, then server"]
)
@pytest.mark.parametrize(("verb", "point"), STEPS)
def test_death(world: World, verb: str, point: str, dying: str) -> None:
    """Whoever died, and in whichever order they come back, both agree in the end."""
    plugin, rclone = world.plugin, world.rclone
    world.prepare(verb)
    plugin.kill()
    plugin.start(failpoints=f"{point}=kill")
    world.drive(verb)
    assert plugin.wait() == KILLED
    if dying == "server":
        plugin.start()
    else:
        rclone.kill()
        first, second = (
            (plugin, rclone) if dying == "server, then rclone" else (rclone, plugin)
        )
        first.start()
        second.start()
    world.check()
    world.destroy()


@pytest.mark.parametrize("verb", POINTS)
def test_rclone_dies_in_the_middle(world: World, verb: str) -> None:
    """Its death during a call is an error at most, and nothing is left by it."""
    plugin, rclone = world.plugin, world.rclone
    world.prepare(verb)
    rclone.process.send_signal(signal.SIGSTOP)  # the call is sent, and not answered
    plugin.kill()
    plugin.start()
    asking = threading.Thread(target=world.drive, args=(verb,))
    asking.start()
    asking.join(0.3)
    rclone.kill()
    asking.join(30)
    assert not asking.is_alive()
    rclone.start()
    world.check()
    world.destroy()
