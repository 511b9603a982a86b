"""What runs inside the machine whose power is cut: the server, and its clients.

``guest.py FOLDER SEED work|end``: start the server, tell what is there, then either
work until the power fails or try everything once more and stop the server. ``FOLDER``
is a disk. All is told in the journal, a line of JSON a fact, which is on the host's
side as soon as it is written: a call's ``sent`` before it, ``answered`` after it.
"""

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from support.client import Client
from support.uml import OUTPUT

JOURNAL: Final = "journal"
CLIENTS: Final = 3
LOCAL, CHOSEN, TMPFS = KINDS = ("local", "chosen", "tmpfs")
CONFIG: Final = """
[backend.tmpfs]
root = "{folder}/tmpfs"
"""


def kind_of(name: str) -> str:
    """Return what kind of volume a name stands for."""
    return name.partition("-")[0]


def content_of(name: str, file: str) -> str:
    """Return what is written to a file of a volume."""
    return f"{file} of {name}\n" * 400


class Journal:
    """Facts for the host's side, in the order in which they happened."""

    def __init__(self) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        self._file = os.open(OUTPUT / JOURNAL, flags, 0o644)
        self._lock = threading.Lock()

    def tell(self, fact: str, **details: object) -> None:
        line = json.dumps({"fact": fact, **details}).encode() + b"\n"
        with self._lock:  # hostfs has a position of its own for appending
            os.write(self._file, line)


class World:
    """The server's volumes, and where they are."""

    def __init__(self, folder: Path, journal: Journal) -> None:
        self.folder = folder
        self.root = folder / "root"
        self.journal = journal
        self.client = Client(Path("/run/volplugin.sock"))
        config = folder.parent / "volplugin.toml"
        config.write_text(CONFIG.format(folder=folder))
        command = [sys.executable, "-m", "volplugin", "serve", "--config", str(config)]
        command += ["--root", str(self.root), "--socket", str(self.client.socket)]
        command += ["--admin-socket", "/run/volplugin-admin.sock"]
        with (OUTPUT / "server.log").open("ab") as log:
            self.server = subprocess.Popen(command, stderr=log)

    def wait(self) -> None:
        # The socket's file is there a moment before the server listens on it.
        while not self.answers():
            if self.server.poll() is not None:
                self.journal.tell("exit", status=self.server.returncode)
                sys.exit("the server does not start")
            time.sleep(0.02)

    def answers(self) -> bool:
        try:
            self.client.activate()
        except OSError:
            return False
        return True

    def options(self, name: str) -> Mapping[str, str] | None:
        kind = kind_of(name)
        if kind == CHOSEN:
            return {"mount": str(self.folder / "data" / name)}
        return {"driver": "tmpfs", "size": "1m"} if kind == TMPFS else None

    def look(self) -> None:
        """Tell what the server and the disk say, before anything is changed."""
        listed = self.client.list()
        status = {name: self.client.get(name)["Status"] for name in listed}
        folders = {
            place: sorted(os.listdir(self.folder / place))
            for place in (
                "root/local/staging",
                "root/local/volumes",
                "root/local/adopted",
                "tmpfs",
                "data",
            )
            if (self.folder / place).exists()
        }
        records = {
            place: [e for e in entries if record_of(self.folder / place / e)]
            for place, entries in folders.items()
        }
        data = self.folder / "data"
        kept = {chosen: os.listdir(data / chosen) for chosen in folders["data"]}
        mounts = [
            line.split()[4]
            for line in Path("/proc/self/mountinfo").read_text().splitlines()
            if line.split()[4].startswith(f"{self.folder}/")
        ]
        volumes = {name: self.look_into(name, listed[name]) for name in listed}
        self.journal.tell(
            "state",
            boot=Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            status=status,
            folders=folders,
            records=records,
            kept=kept,
            mounts=mounts,
            volumes=volumes,
        )

    def look_into(self, name: str, listed: str) -> dict[str, Any]:
        place = self.client.mount(name, "look")
        found = {
            "listed": listed,
            "mountpoint": place,
            "record": record_of(Path(place)),
            "mounted": os.path.ismount(place),
            "files": {file.name: file.read_text() for file in Path(place).iterdir()},
        }
        self.client.unmount(name, "look")
        return found

    def try_all(self) -> None:
        """Do everything once more with new volumes of each kind."""
        for kind in KINDS:
            name = f"{kind}-new"
            self.client.create(name, self.options(name))
            place = self.client.mount(name, "new")
            write(Path(place), "file", "new")
            self.client.unmount(name, "new")
            self.client.remove(name)
            assert name not in self.client.list()


class Worker(threading.Thread):
    """A client with volumes of its own, one of each kind, that works until the end."""

    def __init__(self, world: World, number: int, chance: random.Random) -> None:
        super().__init__(daemon=True)
        self._world = world
        self._chance = chance
        self._names = [f"{kind}-{number}" for kind in KINDS]
        self._places = {
            name: place
            for name, place in world.client.list().items()
            if name in self._names
        }
        self._held: set[str] = set()
        self._written = 0

    def run(self) -> None:
        try:
            while True:
                self._step(self._chance.choice(self._names))
        except BaseException as error:
            self._world.journal.tell("fault", error=repr(error))
            raise

    def _step(self, name: str) -> None:
        client = self._world.client
        if name not in self._places:
            self._tell("sent", "create", name)
            client.create(name, self._world.options(name))
            self._tell("answered", "create", name)
            self._places[name] = client.path(name)
            return
        works = ["unmount"] if name in self._held else ["mount", "mount", "remove"]
        if kind_of(name) != TMPFS:
            works += ["write", "write"]
        work = self._chance.choice(works)
        if work == "write":
            self._write(name)
            return
        self._tell("sent", work, name)
        if work == "mount":
            self._places[name] = client.mount(name, "one")
            self._held.add(name)
        elif work == "unmount":
            client.unmount(name, "one")
            self._held.remove(name)
        else:
            client.remove(name)
            del self._places[name]
        self._tell("answered", work, name)

    def _write(self, name: str) -> None:
        self._written += 1
        file = f"{os.getpid()}-{time.time_ns()}-{self._written}"
        self._tell("sent", "write", name, file)
        write(Path(self._places[name]), file, content_of(name, file))
        self._tell("answered", "write", name, file)

    def _tell(self, fact: str, work: str, name: str, file: str = "") -> None:
        self._world.journal.tell(fact, work=work, name=name, file=file)


def write(folder: Path, name: str, text: str) -> None:
    """Write a file such that it outlives a power cut: fsync(2) of it and its folder."""
    with (folder / name).open("x") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(directory)
    os.close(directory)


def record_of(path: Path) -> str | None:
    """Return the name in the record that a directory carries."""
    try:
        record = json.loads(os.getxattr(path, "trusted.volplugin"))
    except OSError:
        return None
    return str(record["name"])


def main(folder: Path, seed: int, then: str) -> None:
    journal = Journal()
    world = World(folder, journal)
    (folder / "data").mkdir(exist_ok=True)
    world.wait()
    world.look()
    if then == "work":
        chance = random.Random(seed)
        seeds = [random.Random(chance.random()) for _ in range(CLIENTS)]
        workers = [Worker(world, n, own) for n, own in enumerate(seeds)]
        journal.tell("work")
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    world.try_all()
    world.server.terminate()
    journal.tell("end", status=world.server.wait(30))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
