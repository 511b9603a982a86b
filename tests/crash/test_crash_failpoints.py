"""The server dies by SIGKILL at each named point; what it promised holds afterwards."""

import contextlib
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest
from rooms import ForkedPlugin, Room, opened
from worlds import KINDS, Died, World

from volplugin import failpoints

pytestmark = pytest.mark.root

KILLED = -signal.SIGKILL
LOCAL = tuple(kind for kind in KINDS if kind.startswith("local"))
BOTH = ("local", "tmpfs")
CHOSEN = ("local-new", "local-existing")
ADOPTED = ("fast-new", "fast-existing")
TMPFS = tuple(kind for kind in KINDS if kind.startswith("tmpfs"))
IMAGES = ("quota", "quota-xfs")
# The sizes to resize to. An image of ext4 can be made smaller where nobody holds it;
# to make it larger takes CAP_SYS_RESOURCE, and is taken back without.
SIZES = {"quota": "12m", "quota-xfs": "340m", "fast": "24m", "fast-existing": "8m"}
LARGER = "24m"


@attrs.frozen
class Scenario:
    """A server dies at ``point`` during ``verb`` on a volume of ``kind``.

    With ``first``, it has died there during the verb, and dies at ``point`` when it is
    started again.
    """

    verb: str
    kind: str
    point: str
    first: str | None = None

    def __str__(self) -> str:
        first = f"{self.first}-" if self.first else ""
        return f"{self.verb}-{self.kind}-{first}{self.point}"


def _all(verb: str, kinds: tuple[str, ...], *points: str) -> list[Scenario]:
    return [Scenario(verb, kind, point) for kind in kinds for point in points]


def _again(verb: str, kind: str, first: str, *points: str) -> list[Scenario]:
    return [Scenario(verb, kind, point, first) for point in points]


SCENARIOS = [
    *_all("create", BOTH, "core.create.intent", "core.create.commit"),
    *_all("create", KINDS, "core.create.driver"),
    *_all("create", LOCAL, "local.stage", "local.mark"),
    *_all("create", ("local",), "local.publish", "store.write", "store.sync"),
    *_all("create", CHOSEN, "local.adopt"),
    *_all("create", TMPFS, "tmpfs.mountpoint", "tmpfs.guard"),
    *_all("mount", BOTH, "core.attach.intent", "core.attach.driver"),
    *_all("mount", BOTH, "core.attach.commit", "store.write"),
    *_all("mount", TMPFS, "tmpfs.attach", "tmpfs.mounted"),
    *_all("unmount", BOTH, "core.detach.intent", "store.sync"),
    *_all("unmount", ("tmpfs",), "core.detach.driver", "core.detach.commit"),
    *_all("unmount", TMPFS, "tmpfs.detach"),
    *_all("remove", BOTH, "core.remove.intent", "core.remove.commit"),
    *_all("remove", KINDS, "core.remove.driver"),
    *_all("remove", ("local",), "local.trash", "local.purge", "store.write"),
    *_all("remove", CHOSEN, "local.release"),
    *_all("remove", TMPFS, "tmpfs.unguard"),
    # Volumes with a limit, and another one.
    *_all("create", ("quota",), "image.file", "image.mkfs", "image.mounted"),
    *_all("create", ("quota",), "image.ready", "quota.mountpoint", "quota.guard"),
    *_all("create", ("quota-xfs",), "image.mounted"),
    *_all("mount", ("quota",), "quota.attach", "image.attach", "image.attached"),
    *_all("mount", ("quota",), "core.attach.driver", "core.attach.commit"),
    *_all("mount", IMAGES, "quota.mounted"),
    *_all("unmount", ("quota",), "quota.detach", "core.detach.driver"),
    *_all("remove", ("quota",), "quota.unguard", "quota.trash"),
    *_all("create", ("fast",), "local.stage", "local.limit", "local.publish"),
    *_all("create", ADOPTED, "local.stage", "local.adopt"),
    *_all("remove", ("fast",), "local.trash", "local.forget", "local.purge"),
    *_all("remove", ADOPTED, "local.limit"),
    *_all("remove", ("fast-existing",), "local.release"),
    *_all("resize", ("quota", "fast"), "core.resize.intent", "core.resize.commit"),
    *_all("resize", tuple(SIZES), "core.resize.driver"),
    *_all("resize", ("quota",), "image.shrunk", "store.write"),
    *_all("resize", ("quota-xfs",), "image.resize", "image.mounted"),
    *_all("resize-held", ("quota-xfs",), "image.resize", "core.resize.driver"),
    *_all("enlarge", ("quota",), "image.resize", "image.mounted"),
    *_all("enlarge-held", ("quota",), "image.resize"),
    # Death in the recovery from a death.
    *[
        s
        for k in KINDS
        for s in _again("create", k, "core.create.driver", "core.recover.create")
    ],
    *[
        s
        for k in KINDS
        for s in _again("remove", k, "core.remove.intent", "core.recover.remove")
    ],
    *_again("create", "local", "local.mark", "local.purge", "store.write"),
    *_again("create", "local", "local.publish", "local.trash", "store.sync"),
    *_again("create", "local-new", "local.mark", "local.release"),
    *_again("create", "tmpfs", "tmpfs.mountpoint", "tmpfs.unguard"),
    *_again("create", "tmpfs-existing", "tmpfs.guard", "tmpfs.unguard"),
    *_again("mount", "local", "core.attach.driver", "core.recover.mounts"),
    *_again("mount", "tmpfs", "core.attach.intent", "core.recover.mounts"),
    *_again("mount", "tmpfs", "tmpfs.mounted", "tmpfs.detach", "core.detach.driver"),
    *_again("unmount", "tmpfs", "core.detach.intent", "core.detach.commit"),
    *_again("unmount", "tmpfs", "core.detach.driver", "core.recover.mounts"),
    *_again("remove", "local", "core.remove.intent", "local.trash", "store.write"),
    *_again("remove", "local", "local.trash", "local.purge"),
    *_again("remove", "tmpfs", "core.remove.intent", "tmpfs.unguard"),
    *_again("create", "quota", "image.mounted", "quota.detach", "quota.unguard"),
    *_again("create", "quota", "quota.guard", "quota.trash"),
    *_again("create", "fast", "local.limit", "local.purge"),
    *_again("mount", "quota", "quota.mounted", "quota.detach", "core.detach.driver"),
    *_again("remove", "quota", "core.remove.intent", "quota.trash"),
    *_again("remove", "fast", "local.trash", "local.forget"),
    *_again("resize", "quota", "core.resize.intent", "image.shrunk"),
    *_again("resize", "quota", "image.shrunk", "core.recover.resize", "store.write"),
    *_again("resize", "fast", "core.resize.intent", "core.recover.resize"),
    *_again("resize", "quota-xfs", "image.resize", "image.mounted"),
    *_again("resize-held", "quota-xfs", "core.resize.intent", "image.resize"),
    *_again("enlarge", "quota", "image.resize", "core.recover.resize"),
]
RECOVER = ("recover.aside", "recover.rebuild")
# Points that take a cluster, or a module of the kernel: see tests/ceph, tests/kernel.
OF_CLUSTERS = ("cephfs.", "export.", "holding.", "krbd.", "nbd.", "rbd.", "registry.")
# Points that take another plugin: see test_crash_plugin.
OF_PLUGINS = ("plugin.",)
# Points of what is taken over from others: see test_crash_migrate.
OF_INTAKE = ("intake.",)
# A managed plugin's: see test_crash_propagated.
OF_MANAGED = ("propagated.",)


@pytest.fixture(scope="module")
def room() -> Iterator[Room]:
    """A room for all scenarios."""
    with opened() as room:
        yield room


@pytest.fixture
def world(room: Room) -> Iterator[World]:
    """A server with a volume of each driver: one with content, one held as well."""
    plugin = ForkedPlugin(room, room.folder())
    plugin.start()
    world = World(plugin)
    world.create("disk", {})
    world.write("disk", world.mount("disk", "writer"), "on disk")
    world.unmount("disk", "writer")
    world.create("memory", {"driver": "tmpfs"})
    world.write("memory", world.mount("memory", "holder"), "in memory")
    yield world
    plugin.close()


def test_every_point_is_killed_at() -> None:
    """Each failpoint of this host alone is the place of a death in a test here."""
    ours = {
        name
        for name in failpoints.NAMES
        if not name.startswith(OF_CLUSTERS + OF_PLUGINS + OF_INTAKE + OF_MANAGED)
    }
    assert {s.point for s in SCENARIOS} | set(RECOVER) == ours


def test_code_has_every_point() -> None:
    """The names that the code hits are the names that can be armed."""
    package = Path(failpoints.__file__).parent
    code = "\n".join(file.read_text() for file in package.rglob("*.py"))
    assert set(re.findall(r'hit\("([a-z.]+)"\)', code)) == failpoints.NAMES


@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
def test_death(world: World, scenario: Scenario) -> None:
    """After a death at the point, what was answered holds and nothing else is left."""
    plugin = world.plugin
    options = world.options(scenario.kind, "victim")
    prepare(world, scenario.verb, options)
    size = LARGER if "enlarge" in scenario.verb else SIZES.get(scenario.kind, "")
    plugin.kill()
    plugin.start(failpoints=f"{scenario.first or scenario.point}=kill")
    with contextlib.suppress(Died):
        drive(world, scenario.verb, options, size)
    assert plugin.wait() == KILLED
    if scenario.first is not None:
        plugin.start(failpoints=f"{scenario.point}=kill", wait=False)
        assert plugin.wait() == KILLED, "the second point was not reached"
    plugin.start()
    world.check()
    if scenario.verb == "create":
        world.create("victim", options)
        world.check()
    elif "resize" in scenario.verb:
        world.resize("victim", size)
        world.check()
    world.destroy()


def prepare(world: World, verb: str, options: dict[str, str]) -> None:
    """Bring the victim to where ``verb`` can be asked for."""
    if verb == "create":
        return
    world.create("victim", options)
    if verb == "mount":
        return
    path = world.mount("victim", "id")
    if "kept" not in world.expected.content:
        world.write("victim", path, "the victim's")
    if verb in {"remove", "resize", "enlarge"}:
        world.unmount("victim", "id")


def drive(world: World, verb: str, options: dict[str, str], size: str) -> None:
    """Ask for ``verb``, which the server does not outlive."""
    if verb == "create":
        world.create("victim", options)
    elif verb == "mount":
        world.mount("victim", "id")
    elif verb == "unmount":
        world.unmount("victim", "id")
    elif verb == "remove":
        world.remove("victim")
    else:
        world.resize("victim", size)


@pytest.mark.parametrize("broken", [False, True], ids=["healthy", "broken"])
@pytest.mark.parametrize("point", RECOVER)
def test_death_of_recover(world: World, point: str, *, broken: bool) -> None:
    """A `recover` that dies half way is begun again and brings all back."""
    plugin = world.plugin
    for kind in KINDS[1:]:
        world.create(kind, world.options(kind, kind))
    plugin.kill()
    store = plugin.host.path(plugin.root / "store")
    if broken:
        (store / "CURRENT").unlink()
        # Who held a volume is known to the store alone.
        world.expected.held.clear()
        del world.expected.content["memory"]
    status, _ = plugin.recover(failpoints=f"{point}=kill")
    assert status == KILLED
    if point == "recover.aside":
        status, output = plugin.refuse()
        assert status == 78
        assert "volplugin recover" in output
    status, output = plugin.recover()
    assert status == 0, output
    plugin.start()
    world.check()
    world.destroy()
