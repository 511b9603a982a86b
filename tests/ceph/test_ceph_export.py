"""The mapper by qemu-storage-daemon, and the deaths of all that it is made of."""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest
from mapping import MIB, Bench, bench, loops, mkfs, mount_at, number, read, size, write
from support.ceph import Ceph
from support.commands import run
from support.require import require
from support.wait import eventually

from volplugin import failpoints
from volplugin.ceph.mappers import Target, mappers
from volplugin.errors import InUse, Unavailable
from volplugin.host import daemons, mountinfo
from volplugin.host.daemons import Helper

pytestmark = pytest.mark.root

POINTS = sorted(name for name in failpoints.NAMES if name.startswith("export."))


@pytest.fixture
def lab(ceph: Ceph, namespace: str, scratch: Path) -> Iterator[Bench]:
    require("qemu-storage-daemon")
    with bench(ceph, namespace, scratch, "qemu") as made:
        yield made


@pytest.fixture
def own_lab(own_ceph: Ceph, scratch: Path) -> Iterator[Bench]:
    """A bench on a cluster that may be stopped."""
    require("qemu-storage-daemon")
    with bench(own_ceph, own_ceph.namespace(), scratch, "qemu") as made:
        yield attrs.evolve(made, timeout=3)


def daemon_of(lab: Bench, target: Target) -> Helper:
    found = daemons.find(str(lab.place / target.key / "pid"))
    assert found is not None
    return found


def kill(lab: Bench, target: Target, number: int = signal.SIGKILL) -> None:
    """End the daemon from outside."""
    os.kill(daemon_of(lab, target).pid, number)
    eventually(lambda: not lab.mapper.alive(target), "the daemon has ended")


def in_another_process(lab: Bench, target: Target, call: str, points: str = "") -> int:
    """Call the mapper in a process of its own; return how that ended."""
    code = f"""
import sys
sys.path[:0] = {sys.path!r}
from volplugin import failpoints
from volplugin.ceph.cluster import Access
from volplugin.ceph.mappers import Target, mappers
failpoints.arm({points!r})
mappers({str(lab.place)!r})["qemu"].{call}({target!r})
"""
    return subprocess.run([sys.executable, "-c", code], check=False).returncode


@pytest.mark.parametrize("point", POINTS)
def test_death_while_mapping(lab: Bench, point: str) -> None:
    """Mapping goes through after a death at any point of it."""
    target = lab.image()
    status = in_another_process(lab, target, "map", f"{point}=kill")
    assert status == (-signal.SIGKILL if point in MAPPING else 0)
    device = lab.mapper.map(target)
    write(device, b"whole")
    assert lab.mapper.find(target) == device
    assert loops().count(str(lab.place)) == 1
    mounts = mountinfo.below(str(lab.place), mountinfo.read())
    assert len(mounts) == 1
    assert len(lab.watchers("image")) <= 1


MAPPING = {"export.daemon", "export.open", "export.loop", "export.device"}


@pytest.mark.parametrize("point", POINTS)
def test_death_while_mapping_then_unmap(lab: Bench, point: str) -> None:
    """What a death while mapping left is taken away by unmap."""
    target = lab.image()
    in_another_process(lab, target, "map", f"{point}=kill")
    lab.mapper.unmap(target)
    lab.assert_nothing_left()


@pytest.mark.parametrize("point", POINTS)
def test_death_while_unmapping(lab: Bench, point: str) -> None:
    """Unmapping goes through after a death at any point of it."""
    target = lab.image()
    write(lab.mapper.map(target), b"whole")
    status = in_another_process(lab, target, "unmap", f"{point}=kill")
    assert status == (0 if point in MAPPING else -signal.SIGKILL)
    lab.mapper.unmap(target)
    lab.assert_nothing_left()
    assert lab.watchers("image") == []
    assert read(lab.mapper.map(target), 5) == b"whole"


def test_errors_while_mapping(lab: Bench) -> None:
    """An error at any point of mapping leaves nothing."""
    target = lab.image()
    for point in MAPPING:
        failpoints.arm(f"{point}=error:5")
        try:
            with pytest.raises(OSError, match=point):
                lab.mapper.map(target)
        finally:
            failpoints.arm("")
        lab.assert_nothing_left()


def test_it_outlives_the_plugin(lab: Bench) -> None:
    """A mapping goes on after the process that made it."""
    target = lab.image()
    assert in_another_process(lab, target, "map") == 0
    device = lab.mapper.find(target)
    assert device is not None
    assert lab.mapper.alive(target)
    write(device, b"on")
    assert lab.mapper.map(target) == device


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_daemon_dies(lab: Bench, number: int) -> None:
    """Synced data outlive the daemon; what is left of it can be taken away."""
    target = lab.image()
    device = lab.mapper.map(target)
    mkfs(device)
    data = secrets.token_bytes(4 * MIB)
    with lab.mounted(device) as where:
        (where / "file").write_bytes(data)
        run("sync", "-f", where)
        kill(lab, target, number)
        assert lab.mapper.find(target) == device
        assert lab.mapper.is_mapped_by(target, mount_at(where))
        for call in (lab.mapper.unmap, lab.mapper.map):
            with pytest.raises(InUse, match=device):
                call(target)
        with pytest.raises(OSError, match="error"):  # noqa: PT012
            for _ in range(100):
                write(str(where / "file"), secrets.token_bytes(MIB), 8 * MIB)
    lab.fence("image")
    if number == signal.SIGKILL:
        lab.mapper.unmap(target)
        lab.assert_nothing_left()
    device = lab.mapper.map(target)
    with lab.mounted(device) as where:
        assert (where / "file").read_bytes()[: len(data)] == data


def test_a_flush_reaches_the_cluster(lab: Bench) -> None:
    """What fsync returned for is in the image, whoever dies at once."""
    target = lab.image()
    device = lab.mapper.map(target)
    for turn in range(5):
        write(device, secrets.token_bytes(4096) + bytes([turn]) * 512, turn * MIB)
    kill(lab, target)
    lab.fence("image")
    device = lab.mapper.map(target)
    for turn in range(5):
        assert read(device, 512, turn * MIB + 4096) == bytes([turn]) * 512


WRITER = """
import os, sys
descriptor = os.open(sys.argv[1], os.O_WRONLY)
os.pwrite(descriptor, b"late" * 4096, 0)
print("written", flush=True)
os.fsync(descriptor)
"""


def test_a_stopped_daemon(lab: Bench) -> None:
    """A daemon that hangs with data in its way is ended by force, in time."""
    target = lab.image()
    device = lab.mapper.map(target)
    os.kill(daemon_of(lab, target).pid, signal.SIGSTOP)
    with writer(device) as stuck:
        begin = time.monotonic()
        lab.mapper.unmap(target)
        assert time.monotonic() - begin < 60
        assert stuck.wait(10) != 0


def test_a_hung_cluster(own_lab: Bench) -> None:
    """A cluster that hangs is told by map, and unmap ends all the same."""
    lab = own_lab
    target, other = lab.image(), lab.image("other")
    device = lab.mapper.map(target)
    write(device, b"kept")
    lab.ceph.pause("osd")
    try:
        begin = time.monotonic()
        with pytest.raises(Unavailable, match="did not answer in time"):
            lab.mapper.map(other)
        assert time.monotonic() - begin < 30
        assert lab.mapper.find(other) is None
        assert lab.mapper.find(target) == device
        assert lab.mapper.alive(target)
        with writer(device) as stuck:
            begin = time.monotonic()
            lab.mapper.unmap(target)
            assert time.monotonic() - begin < 60
            assert stuck.wait(10) != 0
    finally:
        lab.ceph.resume("osd")
    lab.fence("image")
    assert read(lab.mapper.map(target), 4) in {b"kept", b"late"}


def test_io_waits_for_the_cluster(own_lab: Bench) -> None:
    """A file system's I/O waits for a cluster that is away, and goes through then."""
    lab = own_lab
    # As some have it for their command lines.
    text = lab.ceph.conf.read_text()
    lab.ceph.conf.write_text(
        f"{text}rados osd op timeout = 2\n"
        "[client.volplugin]\nrados_osd_op_timeout = 2\n"
    )
    target = lab.image()
    device = lab.mapper.map(target)
    lab.ceph.pause("osd")
    try:
        with writer(device) as waiting:
            with pytest.raises(subprocess.TimeoutExpired):
                waiting.wait(6)
            lab.ceph.resume("osd")
            assert waiting.wait(60) == 0
    finally:
        lab.ceph.resume("osd")
    assert read(device, 4) == b"late"


def test_encrypted_growth(lab: Bench) -> None:
    """An encrypted device in use grows by what its image has grown, and stays whole."""
    key = lab.scratch / "key"
    key.write_bytes(b"phrase")
    target = lab.image(encryption="luks2", key_file=str(key))
    lab.ceph.rbd("encryption", "format", lab.path("image"), "luks2", key)
    device = lab.mapper.map(target)
    before = size(device)
    mkfs(device)
    data = secrets.token_bytes(4 * MIB)
    with lab.mounted(device) as where:
        (where / "file").write_bytes(data)
        lab.ceph.rbd("resize", "--no-progress", "-s", "96M", lab.path("image"))
        lab.mapper.grow(target)
        assert size(device) == before + 32 * MIB
    write(device, b"end", size(device) - 3)
    assert "size 96 MiB" in lab.ceph.rbd("info", lab.path("image"))
    lab.mapper.unmap(target)
    device = lab.mapper.map(target)
    assert size(device) == before + 32 * MIB
    assert read(device, 3, size(device) - 3) == b"end"
    with lab.mounted(device) as where:
        assert (where / "file").read_bytes() == data


def test_the_daemon_keeps_no_secret(lab: Bench) -> None:
    """No key is in the mapping's files, nor on the daemon's command line."""
    target = lab.image()
    lab.mapper.map(target)
    secret = lab.ceph.least().read_text().partition("key = ")[2].split()[0]
    command = Path(f"/proc/{daemon_of(lab, target).pid}/cmdline").read_text()
    assert secret not in command
    for name in ("conf", "log", "pid", "device", "ready"):
        path = lab.place / target.key / name
        assert secret not in path.read_text()
        assert path.stat().st_mode & 0o077 == 0
    assert lab.place.stat().st_mode & 0o077 == 0


def test_direct_io(lab: Bench) -> None:
    """The device bypasses the page cache of the export: nothing is kept twice."""
    device = lab.mapper.map(lab.image())
    shown = Path(f"/sys/dev/block/{number(device)}/loop/dio").read_text()
    assert shown.strip() == "1"


@pytest.mark.parametrize(
    ("hidden", "package"),
    [
        ("mount --bind /dev/null $(command -v qemu-storage-daemon)", "system-common"),
        ("mount -t tmpfs none $(dirname /usr/lib/*/qemu/block-rbd.so)", "block-extra"),
        ("true", None),
    ],
)
def test_what_is_not_installed(hidden: str, package: str | None) -> None:
    """A missing program or module is told with the package that has it."""
    require("qemu-storage-daemon")
    code = f"""
import sys
sys.path[:0] = {sys.path!r}
from volplugin.ceph.mappers import mappers
print(mappers("/nonexistent")["qemu"].problem())
"""
    script = f'{hidden} && exec "$0" -c "$1"'
    words = ["unshare", "-m", "sh", "-c", script, sys.executable, code]
    said = run(*words).strip()
    assert (said == "None") if package is None else (f"qemu-{package}" in said)


def test_the_same_place_elsewhere(lab: Bench) -> None:
    """Another mount namespace's mapping of the same place and key is not ours."""
    target = lab.image()
    device = lab.mapper.map(target)
    code = f"""
import sys
sys.path[:0] = {sys.path!r}
from volplugin.ceph.cluster import Access
from volplugin.ceph.mappers import Target, mappers
mapper, target = mappers({str(lab.place)!r})["qemu"], {target!r}
assert mapper.find(target) is None
mapper.unmap(target)
"""
    script = f'mount -t tmpfs none {lab.place} && exec "$0" -c "$1"'
    run("unshare", "-m", "sh", "-c", script, sys.executable, code)
    assert lab.mapper.find(target) == device
    write(device, b"ours")
    assert mappers(str(lab.place))["qemu"].alive(target)


@contextlib.contextmanager
def writer(device: str) -> Iterator[subprocess.Popen[bytes]]:
    """Write to a device, and wait for that in a process of its own."""
    words = [sys.executable, "-c", WRITER, device]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"written\n"
        yield process
