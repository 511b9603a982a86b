"""The server dies by SIGKILL at each point of a change to a volume of a cluster.

Afterwards, by one more start of it, the volume is as it was told or gone, and nothing
is left, in the cluster or on the host, that has no owner.
"""

import contextlib
import http.client
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import attrs
import pytest
from support.ceph import Ceph
from support.wait import eventually
from trouble import Forks, World

from volplugin import failpoints
from volplugin.admin.client import AdminClient
from volplugin.ceph.bindings import load
from volplugin.errors import Unavailable

pytestmark = pytest.mark.root

KILLED: Final = -signal.SIGKILL
# Those of krbd and rbd-nbd are reached in tests/kernel, on kernels that have them.
OURS: Final = ("rbd.", "cephfs.", "export.", "registry.", "holding.")


@attrs.frozen
class Scenario:
    """A server dies at ``point`` during ``verb`` on a volume of ``backend``."""

    verb: str
    backend: str
    point: str

    def __str__(self) -> str:
        return f"{self.backend}-{self.verb}-{self.point}"


def _all(verb: str, backend: str, *points: str) -> list[Scenario]:
    return [Scenario(verb, backend, point) for point in points]


SCENARIOS: Final = [
    *_all("create", "ceph", "core.create.intent", "registry.create", "rbd.recorded"),
    *_all("create", "ceph", "rbd.mkfs", "rbd.image", "rbd.filled", "rbd.ready"),
    *_all("create", "ceph", "registry.change", "rbd.mountpoint", "rbd.guard"),
    *_all("create", "ceph", "core.create.driver", "core.create.commit"),
    *_all("clone", "ceph", "rbd.snapshot", "rbd.cloned", "rbd.ready"),
    *_all("adopt", "ceph", "rbd.adopted", "rbd.ready"),
    *_all("mount", "ceph", "core.attach.intent", "holding.hold", "rbd.hold"),
    *_all("mount", "ceph", "export.daemon", "export.open", "export.loop"),
    *_all("mount", "ceph", "export.device"),
    *_all("mount", "ceph", "rbd.mapped", "rbd.noted", "rbd.checked", "rbd.mounted"),
    *_all("mount", "ceph", "core.attach.driver", "core.attach.commit"),
    *_all("unmount", "ceph", "core.detach.intent", "rbd.detach", "rbd.unmounted"),
    *_all("unmount", "ceph", "export.clear", "export.end", "export.unmount"),
    *_all("unmount", "ceph", "export.files", "rbd.unmapped", "core.detach.driver"),
    *_all("unmount", "ceph", "core.detach.commit"),
    *_all("remove", "ceph", "core.remove.intent", "rbd.removing", "rbd.trash"),
    *_all("remove", "ceph", "registry.remove", "rbd.forgotten", "rbd.unguard"),
    *_all("remove", "ceph", "core.remove.driver", "core.remove.commit", "rbd.purge"),
    *_all("remove-clone", "ceph", "rbd.unneeded"),
    *_all("remove-adopted", "ceph", "rbd.trash"),
    *_all("resize", "ceph", "core.resize.intent", "rbd.resize", "core.resize.driver"),
    *_all("resize", "ceph", "core.resize.commit"),
    *_all("resize-held", "ceph", "rbd.grown"),
    *_all("create", "cephfs", "cephfs.record", "cephfs.directory", "cephfs.quota"),
    *_all("create", "cephfs", "cephfs.made", "core.create.driver"),
    *_all("adopt", "cephfs", "cephfs.directory", "cephfs.quota"),
    *_all("mount", "cephfs", "cephfs.hold", "cephfs.mountpoint", "cephfs.mounted"),
    *_all("mount", "cephfs", "core.attach.driver"),
    *_all("unmount", "cephfs", "cephfs.unmounted", "cephfs.detached"),
    *_all("remove", "cephfs", "cephfs.removal", "cephfs.trash", "core.remove.driver"),
    *_all("remove-adopted", "cephfs", "cephfs.release"),
    *_all("resize", "cephfs", "cephfs.resize"),
]

FENCING: Final = frozenset({"holding.fence"})
SMALL: Final = {"size": "16m"}
LARGER: Final = "32m"
# Slow; but it can grow mounted without CAP_SYS_RESOURCE.
XFS: Final = {"fs": "xfs", "size": "300m"}
XFS_LARGER: Final = "340m"


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    """The servers' fork server."""
    made = Forks()
    yield made
    made.close()


@pytest.fixture(scope="module")
def place(
    ceph: Ceph, forks: Forks, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    """A place in the cluster that each test leaves empty."""
    made = World(ceph, forks, tmp_path_factory.mktemp("crash"))
    yield made
    made.close()


@pytest.fixture
def world(place: World) -> Iterator[World]:
    """The place, with servers that end with the test."""
    yield place
    place.end()
    if place.left():  # of a test that failed
        place.wipe()


class Victim:
    """The volume that a server dies of, and what was there before."""

    def __init__(self, world: World, scenario: Scenario) -> None:
        self.world = world
        self.backend = scenario.backend
        self.verb, _, self.kind = scenario.verb.partition("-")
        self.machine = world.machine(only=self.backend)
        self.options = {"driver": self.backend, **SMALL}
        self.larger = LARGER
        if self.kind == "held":
            self.options = {"driver": self.backend, **XFS}
            self.larger = XFS_LARGER
        self.text = ""
        self.was_there = self.verb not in {"create", "clone", "adopt"}
        # Another volume is made, or removed, to begin with.
        self.reaches_it_before = scenario.verb not in {
            *("create", "mount", "unmount", "remove", "resize", "resize-held")
        }

    def prepare(self) -> None:
        """Bring the volume into the state in which the verb finds it."""
        client = self.machine.client
        if self.verb == "clone" or self.kind == "clone":
            client.create("source", self.options)
            self.options = {"driver": self.backend, "from": "source"}
        if self.verb == "adopt" or self.kind == "adopted":
            self._make_adoptable()
        if self.was_there:
            client.create("v", self.options)
        if self.verb == "unmount" or self.kind == "held":
            path = client.mount("v", "before")
            self.text = "before"
            (Path(path) / "kept").write_text(self.text)

    def _make_adoptable(self) -> None:
        if self.backend == "cephfs":
            path = f"{self.world.directory}-users"
            self.world.files.make(path)
            self.options = {"driver": "cephfs", "path": path}
            return
        client, rbd = self.machine.client, load("rbd")
        client.create("made", self.options)
        (name,) = self.world.images()
        with self.world.io() as ioctx:
            with contextlib.closing(rbd.Image(ioctx, name)) as handle:
                handle.copy(ioctx, "users")
            with contextlib.closing(rbd.Image(ioctx, "users")) as handle:
                handle.metadata_remove("volplugin")
        client.remove("made")
        self.world.users_images.add("users")
        self.options = {"driver": "ceph", "image": "users"}

    def clean(self) -> None:
        """Take away what is the user's."""
        for name in list(self.world.users_images):
            with self.world.io() as ioctx:
                load("rbd").RBD().remove(ioctx, name)
            self.world.users_images.discard(name)
        self.world.files.remove(f"{self.world.directory}-users")

    def act(self) -> None:
        """Do what the server dies of."""
        client = self.machine.client
        if self.verb in {"create", "clone", "adopt"}:
            client.create("v", self.options)
        elif self.verb == "mount":
            client.mount("v", "id")
        elif self.verb == "unmount":
            client.unmount("v", "before")
        elif self.verb == "remove":
            client.remove("v")
        elif self.verb == "resize":
            admin = AdminClient(str(self.machine.admin_socket))
            admin.resize("v", size=self.larger)
        else:
            raise AssertionError(self.verb)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
def test_death(world: World, scenario: Scenario) -> None:
    """After a death in the middle all agree, and the volume can be used and removed."""
    victim = Victim(world, scenario)
    machine = victim.machine
    armed = f"{scenario.point}=kill"
    machine.start(failpoints="" if victim.reaches_it_before else armed)
    victim.prepare()
    if victim.reaches_it_before:
        machine.stop()
        machine.start(failpoints=armed)
    with contextlib.suppress(OSError, http.client.HTTPException, Unavailable):
        victim.act()
    assert machine.wait(20) == KILLED, f"{scenario.point} was never reached"
    machine.start()
    world.settled(machine)
    use(victim)


def test_death_of_fencing(world: World) -> None:
    """A take-over that was cut short is done by the next one."""
    a, b = (world.machine(name, only="ceph") for name in "ab")
    for machine in (a, b):
        machine.start()
    a.client.create("v", {"driver": "ceph", **SMALL})
    eventually(lambda: "v" in b.client.list(), "b knows v")
    b.client.mount("v", "id")
    a.kill()
    a.start(failpoints="holding.fence=kill")
    with pytest.raises(Unavailable):
        AdminClient(str(a.admin_socket)).take_over("v")
    assert a.wait(20) == KILLED
    a.start()
    (told,) = AdminClient(str(a.admin_socket)).take_over("v").hosts
    assert "host-b" in told
    a.client.mount("v", "id")
    b.client.unmount("v", "id")
    assert not b.mounts()
    a.client.unmount("v", "id")
    a.client.remove("v")
    world.settled(a)


def test_half_deleted_image(world: World) -> None:
    """An image of which a death left an entry in the trash, and no more, is deleted."""
    machine = world.machine(only="ceph")
    machine.start()
    machine.client.create("v", {"driver": "ceph", **SMALL})
    machine.client.create("w", {"driver": "ceph", **SMALL})
    machine.stop()
    rbd = load("rbd")
    with world.io() as ioctx:
        (name,) = (each for each in world.images() if each.startswith("v."))
        with contextlib.closing(rbd.Image(ioctx, name, read_only=True)) as handle:
            header = f"rbd_header.{handle.id()}"
        rbd.RBD().trash_move(ioctx, name)
        ioctx.remove_object(header)
    machine.start()
    eventually(lambda: not world.trash(), "the entry goes")
    machine.client.remove("v")
    machine.client.remove("w")
    world.settled(machine)


def test_every_point_is_reached() -> None:
    """There is a scenario for each point of the two drivers and of what they share."""
    ours = {name for name in failpoints.NAMES if name.startswith(OURS)}
    assert ours == {each.point for each in SCENARIOS if each.point in ours} | FENCING


def use(victim: Victim) -> None:
    """Have the volume used and removed; nothing may be left."""
    machine, client = victim.machine, victim.machine.client
    is_there = "v" in client.list()
    assert is_there or not victim.was_there or victim.verb == "remove"
    if not is_there:
        client.create("v", victim.options)
    path = Path(client.mount("v", "after"))
    if is_there and victim.text:
        assert (path / "kept").read_text() == victim.text
    (path / "more").write_text("more")
    for holder in ("before", "id", "after"):
        client.unmount("v", holder)
    client.remove("v")
    if "source" in client.list():
        client.remove("source")
    victim.world.settled(machine)
    victim.clean()
