"""Images of a test, mapped by one mapper, and what may not be left of them."""

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
from support.ceph import POOL, Ceph
from support.commands import run

from volplugin.ceph.cluster import Access
from volplugin.ceph.mappers import Mapper, Target, mappers
from volplugin.host import mountinfo

MIB = 1 << 20


@attrs.frozen
class Bench:
    """A mapper under test, and images for it in a namespace.

    ``mapper`` is a new object each time, as after a restart of the plugin.
    """

    ceph: Ceph
    namespace: str
    scratch: Path
    name: str
    timeout: float = 15
    targets: list[Target] = attrs.field(factory=list)

    @property
    def place(self) -> Path:
        return self.scratch / "mappings"

    @property
    def mapper(self) -> Mapper:
        return mappers(str(self.place))[self.name]

    @property
    def access(self) -> Access:
        keyring = str(self.ceph.least())
        conf = str(self.ceph.conf)
        return Access(
            conf=conf, user="volplugin", keyring=keyring, timeout=self.timeout
        )

    def path(self, image: str) -> str:
        return f"{POOL}/{self.namespace}/{image}"

    def target(self, image: str = "image", **changes: Any) -> Target:
        """Return a target for what is not made yet; it is unmapped in the end."""
        given = {
            "access": self.access,
            "pool": POOL,
            "namespace": self.namespace,
            "image": image,
            "key": f"key-{len(self.targets)}",
            **changes,
        }
        target = Target(**given)
        self.targets.append(target)
        return target

    def image(self, image: str = "image", *, size: int = 64, **changes: Any) -> Target:
        """Make an image of ``size`` MiB, and return its target."""
        self.ceph.rbd("create", "--size", f"{size}M", self.path(image))
        return self.target(image, **changes)

    def watchers(self, image: str) -> list[str]:
        """Return the addresses of those who have it mapped."""
        shown = json.loads(
            self.ceph.rbd("status", self.path(image), "--format", "json")
        )
        return [each["address"] for each in shown["watchers"]]

    def fence(self, image: str) -> None:
        for address in self.watchers(image):
            self.ceph.ceph("osd", "blocklist", "add", address)

    def objects(self, target: Target) -> int:
        """Return the number of objects that have the data of an image."""
        shown = json.loads(
            self.ceph.rbd("info", self.path(target.image), "--format", "json")
        )
        words = ("-p", POOL, "-N", self.namespace, "ls")
        names = self.ceph.rados(*words).split()
        return sum(name.startswith(shown["block_name_prefix"]) for name in names)

    def remove_images(self) -> None:
        """Remove the images, fencing who a killed helper still watches as."""
        place = f"{POOL}/{self.namespace}"
        for image in json.loads(self.ceph.rbd("ls", place, "--format", "json")):
            self.fence(image)
            self.ceph.rbd("rm", "--no-progress", f"{place}/{image}")

    def assert_nothing_left(self) -> None:
        for target in self.targets:
            assert self.mapper.find(target) is None
            assert not self.mapper.alive(target)
        left = os.listdir(self.place) if self.place.exists() else []
        assert not left, f"left in {self.place}: {left}"
        assert not mountinfo.below(str(self.scratch), mountinfo.read())
        assert str(self.scratch) not in loops()

    @contextlib.contextmanager
    def mounted(self, device: str, *options: str) -> Iterator[Path]:
        """Mount a device for the time of the context."""
        where = self.scratch / f"mnt{device.replace('/', '-')}"
        where.mkdir(exist_ok=True)
        run("mount", *(("-o", ",".join(options)) if options else ()), device, where)
        try:
            yield where
        finally:
            run("umount", where)


@contextlib.contextmanager
def bench(ceph: Ceph, namespace: str, scratch: Path, name: str) -> Iterator[Bench]:
    """Yield a bench; leave none of its mappings and images."""
    made = Bench(ceph, namespace, scratch, name)
    try:
        yield made
        for target in made.targets:
            made.mapper.unmap(target)
        made.assert_nothing_left()
    finally:
        # After a failure, so that the next test finds its place clean.
        for mount in reversed(mountinfo.below(str(scratch), mountinfo.read())):
            if "mnt" in mount.mountpoint.rpartition("/")[2]:
                subprocess.run(["umount", "-l", mount.mountpoint], check=False)
        for target in made.targets:
            made.mapper.unmap(target)
        made.remove_images()


def mkfs(device: str) -> None:
    # With blocks of 1 KiB, its groups lie across the image's objects.
    run("mkfs.ext4", "-q", "-b", "4096", device)


def size(device: str) -> int:
    with open(device, "rb") as file:
        return file.seek(0, os.SEEK_END)


def write(device: str, data: bytes, offset: int = 0) -> None:
    """Write to a device so that it is there when this returns."""
    descriptor = os.open(device, os.O_WRONLY)
    try:
        assert os.pwrite(descriptor, data, offset) == len(data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(device: str, length: int, offset: int = 0) -> bytes:
    with open(device, "rb") as file:
        file.seek(offset)
        return file.read(length)


def number(device: str) -> str:
    status = os.stat(device)
    return f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"


def mount_at(where: Path) -> mountinfo.Mount:
    found = mountinfo.at(str(where), mountinfo.read())
    assert found is not None
    return found


def loops() -> str:
    return run("losetup", "-a")


def names() -> Sequence[str]:
    """Return the mappers to be tested: those of the environment, or that work here."""
    asked = os.environ.get("VOLPLUGIN_TEST_MAPPERS")
    if asked is not None:
        return asked.split(",")
    known = mappers("/nonexistent")
    return [name for name, mapper in known.items() if mapper.problem() is None]
