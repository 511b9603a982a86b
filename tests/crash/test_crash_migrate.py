"""SIGKILL of the server at each step of a migration: nothing lost, again finishes."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import attrs
import pytest
from rooms import ForkedPlugin, Room, opened
from support.wait import eventually

from volplugin import failpoints
from volplugin.admin.client import AdminClient
from volplugin.admin.messages import MigrateRequest
from volplugin.errors import Unavailable

pytestmark = pytest.mark.root

KILLED: Final = -signal.SIGKILL
CORE: Final = ("core.create.intent", "core.create.driver", "core.create.commit")
POINTS: Final = {
    "move": (*CORE, "intake.mark", "intake.move", "store.write", "store.sync"),
    "copy": (
        *CORE,
        *("intake.copy", "intake.compared", "intake.publish"),
        *("intake.aside", "local.purge", "intake.removed"),
    ),
    "limited": ("intake.copy", "intake.compared", "intake.publish"),
    "adopt": ("core.create.intent", "local.stage", "local.adopt", "local.mark"),
}
DEATHS: Final = [(way, point) for way, points in POINTS.items() for point in points]
# Death in the recovery from a death.
AGAIN: Final = [
    ("move", "intake.mark", "core.recover.create"),
    ("copy", "intake.copy", "core.recover.create"),
    ("copy", "intake.copy", "local.purge"),
    ("move", "intake.move", "store.write"),
    ("copy", "intake.publish", "store.sync"),
]
TEXT: Final = "what must not be lost"


@attrs.frozen
class World:
    """A server, and a directory that is to become its volume ``web``."""

    plugin: ForkedPlugin
    origin: Path  # inside the host
    way: str

    @property
    def outside(self) -> Path:
        """How this process reaches the origin."""
        return self.plugin.host.path(self.origin)

    def make_origin(self) -> None:
        """Make what others have."""
        (self.outside / "folder").mkdir(parents=True)
        (self.outside / "folder" / "file").write_text(TEXT)
        os.link(self.outside / "folder" / "file", self.outside / "again")
        os.chown(self.outside, 5, 6)

    def migrate(self) -> None:
        """Ask for the migration."""
        options = {
            "adopt": {"mount": str(self.origin)},
            "limited": {"size": "16m"},
        }.get(self.way, {})
        socket = self.plugin.host.path(self.plugin.admin_socket)
        AdminClient(str(socket)).migrate(
            MigrateRequest(
                name="web",
                driver="fast" if self.way == "limited" else "local",
                options=options,
                origin=str(self.origin),
                dry=False,
                remove_origin=self.way in {"copy", "limited"},
            )
        )

    def content(self, path: Path) -> str | None:
        """Return the file's text below a directory, None where it is not all there."""
        try:
            assert (path / "again").samefile(path / "folder" / "file")
            return (path / "folder" / "file").read_text()
        except FileNotFoundError:
            return None

    def volume(self) -> Path | None:
        """Return where the volume is, if there is one."""
        found = self.plugin.client.list().get("web")
        return None if found is None else self.plugin.host.path(found)


@pytest.fixture(scope="module")
def room() -> Iterator[Room]:
    """A room for all tests."""
    with opened() as room:
        yield room


def world(room: Room, way: str) -> Iterator[World]:
    """A server with another volume, and a directory of its user's."""
    plugin = ForkedPlugin(room, room.folder())
    disk = plugin.on_btrfs if way in {"copy", "limited"} else plugin.folder
    plugin.start()
    plugin.client.create("other", {})
    plugin.kill()
    found = World(plugin, disk / "theirs" / "web", way)
    found.make_origin()
    yield found
    plugin.close()


@pytest.fixture
def opened_world(room: Room, request: pytest.FixtureRequest) -> Iterator[World]:
    """The world of the way that the test is given."""
    yield from world(room, request.getfixturevalue("way"))


def test_every_point_is_killed_at() -> None:
    """Each failpoint of the intake is the place of a death here."""
    ours = {name for name in failpoints.NAMES if name.startswith("intake.")}
    assert {p for _, p in DEATHS if p.startswith("intake.")} == ours


def die(world: World, point: str) -> None:
    """Have the server die at ``point`` of the migration."""
    world.plugin.start(failpoints=f"{point}=kill")
    with pytest.raises(Unavailable):
        world.migrate()
    assert world.plugin.wait() == KILLED
    assert_whole_somewhere(world)


def assert_whole_somewhere(world: World) -> None:
    """The files are whole in one place at least, whatever happened."""
    places = [
        world.outside,
        world.plugin.host.path(world.plugin.root / "local" / "volumes" / "web"),
        world.plugin.host.path(world.plugin.fast / "volumes" / "web"),
    ]
    assert TEXT in [world.content(place) for place in places]


def finish(world: World) -> None:
    """Migrate again; all must be there, once, and nothing else left."""
    plugin = world.plugin
    before = world.volume()
    if before is not None:
        assert world.content(before) == TEXT, "a volume that is not whole"
    world.migrate()
    path = world.volume()
    assert path is not None
    assert world.content(path) == TEXT
    assert (path.stat().st_uid, path.stat().st_gid) == (5, 6)
    assert "error" not in plugin.client.get("web")["Status"]
    if world.way != "adopt":
        left = [entry.name for entry in world.outside.parent.iterdir()]
        assert left == [], f"left where it came from: {left}"
    for place in (plugin.root / "local", plugin.fast):
        assert list(plugin.host.path(place / "staging").iterdir()) == []
        trash = plugin.host.path(place / "trash")
        eventually(
            lambda folder=trash: not list(folder.iterdir()),  # type: ignore[misc]
            "the trash is emptied",
            seconds=45,
        )
    mounted = plugin.host.path(plugin.client.mount("web", "check"))
    (mounted / "probe").write_text("probe")
    plugin.client.unmount("web", "check")
    plugin.client.remove("web")
    if world.way == "adopt":
        assert world.content(world.outside) == TEXT
    assert set(plugin.client.list()) == {"other"}


@pytest.mark.parametrize(("way", "point"), DEATHS)
def test_death(opened_world: World, way: str, point: str) -> None:
    """After a death at the point the files are whole, and a second run finishes."""
    die(opened_world, point)
    opened_world.plugin.start()
    assert_whole_somewhere(opened_world)
    finish(opened_world)


@pytest.mark.parametrize(("way", "first", "point"), AGAIN)
def test_death_again(opened_world: World, way: str, first: str, point: str) -> None:
    """The next start dies too; the one after it settles all."""
    plugin = opened_world.plugin
    die(opened_world, first)
    plugin.start(failpoints=f"{point}=kill", wait=False)
    assert plugin.wait() == KILLED, "the second point was not reached"
    assert_whole_somewhere(opened_world)
    plugin.start()
    finish(opened_world)


@pytest.mark.parametrize("way", ["copy"])
def test_the_copying_ends_with_the_server(opened_world: World, way: str) -> None:
    """No cp goes on behind a server that died."""
    plugin = opened_world.plugin
    with (opened_world.outside / "large").open("wb") as large:
        for _ in range(24):
            large.write(os.urandom(1 << 20))
    die(opened_world, "intake.copy")
    names = {
        Path(f"/proc/{pid}/comm").read_text().strip()
        for pid in plugin.host.processes()
        if Path(f"/proc/{pid}/comm").exists()
    }
    assert "cp" not in names
    plugin.start()
    finish(opened_world)


@pytest.mark.parametrize(
    ("way", "point"), [("move", "intake.move"), ("copy", "intake.publish")]
)
def test_death_with_the_first_volume(opened_world: World, way: str, point: str) -> None:
    """A server without another volume starts too: its store was not lost."""
    plugin = opened_world.plugin
    plugin.start()
    plugin.client.remove("other")
    plugin.kill()
    die(opened_world, point)
    plugin.start()
    assert set(plugin.client.list()) == {"web"}
    eventually(lambda: "create finished" in plugin.log, "the log tells")
    plugin.client.create("other", {})
    finish(opened_world)


@pytest.mark.parametrize("way", ["move"])
def test_recover_after_a_death(opened_world: World, way: str) -> None:
    """A store that is lost after the move is rebuilt with the volume."""
    plugin = opened_world.plugin
    die(opened_world, "intake.move")
    store = plugin.host.path(plugin.root / "store")
    (store / "CURRENT").unlink()
    status, output = plugin.recover()
    assert status == 0, output
    plugin.start()
    path = opened_world.volume()
    assert path is not None
    assert opened_world.content(path) == TEXT
    finish(opened_world)
