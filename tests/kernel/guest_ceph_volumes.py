"""Volumes that the kernel's own clients map: krbd, and rbd-nbd.

Runs in the machine of ``test_kernel_ceph``. Hosts are those of ``tests/ceph``, whose
tests say the rest; here is what depends on the mapper.
"""

import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import attrs
import pytest
from support import processes
from support.ceph import Ceph
from support.commands import run
from support.wait import eventually

sys.path.append(str(Path(__file__).parents[1] / "ceph"))

from rbd_cases import SMALL, HostCase, Hosts

from volplugin.drivers.driver import Spec
from volplugin.errors import InUse, Unavailable
from volplugin.host import mountinfo, nbd, rbdbus

pytestmark = pytest.mark.root

TIMEOUT: Final = 40  # seconds; a machine like this takes its time
KERNEL: Final = ("krbd", "rbd-nbd")

Make = Callable[..., HostCase]


@pytest.fixture
def hosts(ceph: Ceph, namespace: str, tmp_path: Path) -> Iterator[Make]:
    """Make hosts that share a namespace; nothing may be left of their volumes."""
    made = Hosts(ceph, namespace, tmp_path)

    def make(name: str = "a", mapper: str = "auto") -> HostCase:
        return made(name, mapper=mapper, timeout=TIMEOUT)

    try:
        yield make
        made.finish()
    finally:
        made.close()
    assert rbdbus.devices() == []


def mapper_of(host: HostCase, spec: Spec) -> str:
    """Return the name of what maps a volume now."""
    found = host.driver._attacher.mapper_of(spec.volume, mountinfo.read())
    return "" if found is None else found.name


def write(file: Path, text: str) -> int:
    """Write and sync a file; return the error's number, or 0."""
    try:
        with file.open("w") as opened:
            opened.write(text)
            opened.flush()
            os.fsync(opened.fileno())
    except OSError as error:
        return error.errno or -1
    return 0


@pytest.mark.parametrize("mapper", KERNEL)
def test_life(hosts: Make, mapper: str) -> None:
    """A volume is mapped as asked for, found again by a new plugin, and grows."""
    host = hosts(mapper=mapper)
    spec = host.make("v", fs="xfs", size="300M")
    host.driver.attach(spec)
    assert mapper_of(host, spec) == mapper
    assert write(host.file(spec), "here") == 0
    again = hosts(mapper="auto")
    assert mapper_of(again, spec) == mapper
    again.driver.attach(spec)
    options = {**spec.volume.options, "size": "400M"}
    larger = again.spec_of(attrs.evolve(spec.volume, options=options))
    again.driver.resize(larger, attached=True)
    figures = os.statvfs(spec.volume.mountpoint)
    assert figures.f_blocks * figures.f_frsize > 320 << 20
    again.driver.measure([larger])
    status = again.driver.status(larger.volume, larger.options, attached=True)
    assert (status["mapper"], status["cluster"]) == (mapper, "ok")
    again.driver.detach(spec)
    assert not again.is_attached(spec)
    again.driver.attach(larger)
    assert again.file(spec).read_text() == "here"


@pytest.mark.parametrize("mapper", KERNEL)
def test_take_over(hosts: Make, mapper: str) -> None:
    """Who is fenced writes no more to that volume, and goes on with its others."""
    a, b = hosts("a", mapper), hosts("b", mapper)
    taken, kept = a.make("taken"), a.make("kept")
    for spec in (taken, kept):
        a.driver.attach(spec)
        assert write(a.file(spec), "before") == 0
    there = b.found("taken")
    with pytest.raises(InUse, match="attached on host-a"):
        b.driver.attach(there)
    assert any("host-a" in each for each in b.driver.take_over(there))
    b.driver.attach(there)
    assert b.file(there).read_text() == "before"
    assert write(b.file(there, "new"), "b") == 0
    assert write(a.file(taken), "late") in {errno.EIO, errno.EROFS}
    assert write(a.file(kept), "after") == 0
    with pytest.raises(Unavailable, match="taken over by host-b"):
        a.driver.attach(taken)
    a.driver.detach(taken)
    assert not a.is_attached(taken)
    assert a.is_attached(kept)
    b.driver.detach(there)
    a.driver.attach(taken)
    assert a.file(taken).read_text() == "before"
    assert a.file(taken, "new").read_text() == "b"


def test_copies(hosts: Make) -> None:
    """A snapshot of a mounted volume has what was written; a copy of it is mounted.

    Read-only copies are on many hosts at once.
    """
    a, b = hosts("a", "krbd"), hosts("b", "krbd")
    spec = a.make("v")
    a.driver.attach(spec)
    a.file(spec).write_text("old")
    a.driver.take_snapshot(spec, "monday", attached=True)
    a.file(spec).write_text("new")
    copy = a.make("copy", from_="v@monday")
    a.driver.attach(copy)
    assert a.file(copy).read_text() == "old"
    assert write(a.file(copy), "mine") == 0
    view = a.make("view", from_="v@monday", access="ro")
    for host, here in ((a, view), (b, b.found("view"))):
        host.driver.attach(here)
        assert host.file(here).read_text() == "old"
        assert write(host.file(here), "mine") == errno.EROFS
    b.driver.detach(b.found("view"))
    assert a.is_attached(view)


def test_choice(hosts: Make, tmp_path: Path) -> None:
    """The kernel's client is the first choice, and rbd-nbd where it has no encryption.

    Both may be in use at a time.
    """
    key = tmp_path / "key"
    key.write_bytes(b"secret")
    key.chmod(0o600)
    host = hosts()
    plain = host.make("plain")
    options = {"encryption": "luks1", "encryption_key": str(key), "size": "16M"}
    secret = host.make("secret", **options)
    for spec, mapper in ((plain, "krbd"), (secret, "rbd-nbd")):
        host.driver.attach(spec)
        assert mapper_of(host, spec) == mapper
        assert write(host.file(spec), mapper) == 0


def test_dead_nbd(hosts: Make) -> None:
    """An rbd-nbd that was killed is told of; a detach and an attach put it right."""
    host = hosts(mapper="rbd-nbd")
    spec = host.make("v", **SMALL)
    host.driver.attach(spec)
    assert write(host.file(spec), "synced") == 0
    device = run("findmnt", "-no", "SOURCE", spec.volume.mountpoint).strip()
    server = nbd.server_of(Path(device).name)
    assert server is not None
    os.kill(server, signal.SIGKILL)
    eventually(lambda: not processes.is_alive(server), "it has ended")
    with pytest.raises(Unavailable, match="died"):
        host.driver.attach(spec)
    host.driver.detach(spec)
    host.driver.attach(spec)
    assert host.file(spec).read_text() == "synced"
