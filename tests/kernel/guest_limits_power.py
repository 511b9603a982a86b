"""What runs in the machine of ``test_kernel_limits_power``: a server, and clients.

``guest_limits_power.py SEED work|end``: start the server on both disks, tell what is
there, then either create, resize and remove until the power fails or stop the server.
A volume's name says its kind: ``xfs-0`` and ``ext4-0`` have a project quota on such a
disk, ``loop-0`` is an image on the ext4. The journal is that of ``guest``.
"""

import contextlib
import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Final

from guest import Journal
from guest_disks import DISKS, OPTIONS
from support.client import Client
from support.commands import run
from support.uml import OUTPUT

from volplugin.admin.client import AdminClient
from volplugin.host import projects, quotactl, superblocks
from volplugin.sizes import parse_size

KINDS: Final = ("xfs", "ext4", "loop")
CLIENTS: Final = 2  # of each kind
NAMES: Final = tuple(f"{kind}-{n}" for kind in KINDS for n in range(CLIENTS))
MIB: Final = 1 << 20
SIZES: Final = range(16, 49, 4)  # MiB
PLACES: Final = {kind: Path(f"/{kind}") for kind in DISKS}
CONFIG: Final = """
[backend.xfs]
driver = "quota"
root = "/xfs/volumes"

[backend.ext4]
driver = "quota"
root = "/ext4/volumes"
"""


def kind_of(name: str) -> str:
    """Return what kind of volume a name stands for."""
    return name.partition("-")[0]


class World:
    """The server with its volumes, and where they are."""

    def __init__(self) -> None:
        for kind, place in PLACES.items():
            place.mkdir()
            run("mount", "-t", kind, "-o", OPTIONS[kind], DISKS[kind], place)
        self.journal = Journal()
        self.client = Client(Path("/run/volplugin.sock"))
        self.admin = AdminClient("/run/volplugin-admin.sock")
        config = Path("/run/volplugin.toml")
        config.write_text(CONFIG)
        command = [sys.executable, "-m", "volplugin", "serve", "--config", str(config)]
        command += ["--root", "/ext4/root", "--socket", str(self.client.socket)]
        command += ["--admin-socket", "/run/volplugin-admin.sock"]
        with (OUTPUT / "server.log").open("ab") as log:
            self.server = subprocess.Popen(command, stderr=log)

    def wait(self) -> None:
        """Wait until the server answers."""
        while True:
            try:
                self.client.activate()
            except OSError:
                if self.server.poll() is not None:
                    self.journal.tell("exit", status=self.server.returncode)
                    sys.exit("the server does not start")
                time.sleep(0.02)
            else:
                return

    def look(self) -> None:
        """Tell what the server says of each volume, and what is in force."""
        listed = self.client.list()
        volumes = {name: self._look_at(name, place) for name, place in listed.items()}
        limits = {kind: self._limits(place) for kind, place in PLACES.items()}
        images = os.listdir("/ext4/volumes/images")
        self.journal.tell(
            "state",
            boot=Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            volumes=volumes,
            limits=limits,
            images=images,
        )

    def _look_at(self, name: str, place: str) -> dict[str, Any]:
        status = self.client.get(name)["Status"]
        found: dict[str, Any] = {"status": status, "told": parse_size(status["size"])}
        if kind_of(name) != "loop":
            project = projects.of(place)
            quota = quotactl.get(place, project.id)
            found |= {"id": project.id, "inherits": project.inherits}
            found |= {"size": quota.size, "noted": size_in_record(Path(place))}
            return found
        self.client.mount(name, "look")
        record = json.loads(os.getxattr(place, "trusted.volplugin"))
        self.client.unmount(name, "look")  # its superblock is written by then
        image = Path(f"/ext4/volumes/images/{record['id']}.img")
        found |= {"image": image.name, "length": image.stat().st_size}
        found |= {"size": superblocks.size(str(image), "ext4")}
        found |= {"noted": size_in_record(image)}
        return found

    def _limits(self, place: Path) -> list[int]:
        """Return the ids that have a limit on a disk."""
        with contextlib.closing(quotactl.each(str(place), 1)) as quotas:
            return [
                quota.id
                for quota in quotas
                if quota.size is not None or quota.inodes is not None
            ]


class Worker(threading.Thread):
    """A client with one volume of its own, that works until the end."""

    def __init__(self, world: World, name: str, chance: random.Random) -> None:
        super().__init__(daemon=True)
        self._world = world
        self._name = name
        self._chance = chance
        self._size = 0
        if name in world.client.list():
            status = world.client.get(name)["Status"]
            self._size = parse_size(status["size"]) // MIB
        self._held = False

    def run(self) -> None:
        try:
            while True:
                self._step()
        except BaseException as error:
            kernel = run("dmesg")[-3000:]
            self._world.journal.tell(
                "fault", name=self._name, error=repr(error), kernel=kernel
            )
            raise

    def _step(self) -> None:
        client, name = self._world.client, self._name
        if not self._size:
            size = self._chance.choice(SIZES)
            loop = {"driver": "ext4", "quota": "loop"}
            project = {"driver": kind_of(name), "quota": "project"}
            options = loop if kind_of(name) == "loop" else project
            self._tell("sent", "create", size)
            client.create(name, {**options, "size": f"{size}m"})
            self._size = size
            self._tell("answered", "create", size)
            return
        work = self._chance.choice(("resize", "resize", "resize", "hold", "remove"))
        if work == "hold":
            (client.unmount if self._held else client.mount)(name, "one")
            self._held = not self._held
        elif work == "remove":
            if self._held:
                client.unmount(name, "one")
                self._held = False
            self._tell("sent", "remove", 0)
            client.remove(name)
            self._size = 0
            self._tell("answered", "remove", 0)
        else:
            self._resize()

    def _resize(self) -> None:
        # A mounted image grows, and does not shrink.
        bound = self._held and kind_of(self._name) == "loop"
        sizes = [size for size in SIZES if size > self._size or not bound]
        if not sizes:
            return
        size = self._chance.choice(sizes)
        self._tell("sent", "resize", size)
        self._world.admin.resize(self._name, size=f"{size}m", inodes=None)
        self._size = size
        self._tell("answered", "resize", size)

    def _tell(self, fact: str, work: str, size: int) -> None:
        self._world.journal.tell(fact, work=work, name=self._name, size=size * MIB)


def size_in_record(path: Path) -> int:
    """Return the size that the record on a volume's root or image tells."""
    record = json.loads(os.getxattr(path, "trusted.volplugin"))
    return parse_size(record["options"]["size"])


def main(seed: int, then: str) -> None:
    """Start the server and its clients."""
    world = World()
    world.wait()
    world.look()
    if then == "work":
        chance = random.Random(seed)
        seeds = [random.Random(chance.random()) for _ in NAMES]
        workers = [
            Worker(world, name, own) for name, own in zip(NAMES, seeds, strict=True)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    for name in world.client.list():
        world.journal.tell("sent", work="remove", name=name, size=0)
        world.client.remove(name)
        world.journal.tell("answered", work="remove", name=name, size=0)
    world.look()
    world.server.terminate()
    world.journal.tell("end", status=world.server.wait(30))


if __name__ == "__main__":
    run("modprobe", "loop")
    main(int(sys.argv[1]), sys.argv[2])
