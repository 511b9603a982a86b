"""What is special about the mappers of the kernel: krbd, and rbd-nbd.

Runs in the machine of ``test_kernel_ceph``; what all mappers have in common is in
``tests/ceph/test_ceph_mappers.py``.
"""

import json
import os
import re
import signal
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import attrs
import pytest
from support.ceph import POOL, Ceph
from support.commands import run
from support.wait import eventually

from volplugin.ceph.cluster import Access
from volplugin.ceph.mappers import Target
from volplugin.ceph.mappers.krbd import Krbd
from volplugin.ceph.mappers.nbd import RbdNbd
from volplugin.errors import InUse, NotFound, Unavailable, Unsupported
from volplugin.host import mountinfo, nbd, nodes, rbdbus

pytestmark = pytest.mark.root

MIB: Final = 1 << 20
# A machine like this takes its time.
TIMEOUT: Final = 40.0

Make = Callable[..., Target]


@pytest.fixture(scope="module")
def ceph() -> Ceph:
    """The cluster of the host."""
    return Ceph()


@pytest.fixture
def krbd(tmp_path: Path) -> Krbd:
    """The mapper, on a kernel that has the module."""
    mapper = Krbd(str(tmp_path / "mappings"))
    assert mapper.problem() is None
    return mapper


@pytest.fixture
def rbd_nbd(tmp_path: Path) -> RbdNbd:
    """The mapper, on a kernel that has the module."""
    mapper = RbdNbd(str(tmp_path / "mappings"))
    assert mapper.problem() is None
    return mapper


@pytest.fixture
def make(ceph: Ceph) -> Iterator[Make]:
    """Make an image and return it as a target; ``features`` are the image's."""
    namespace = ceph.namespace()
    place = f"{POOL}/{namespace}"
    made: list[str] = []

    def make(features: str = "layering,exclusive-lock,object-map,fast-diff") -> Target:
        name = f"image{len(made)}"
        ceph.rbd("create", "-s", "64M", "--image-feature", features, f"{place}/{name}")
        made.append(name)
        access = Access(
            conf=str(ceph.conf),
            user="volplugin",
            keyring=str(ceph.least()),
            timeout=TIMEOUT,
        )
        key = uuid.uuid4().hex
        return Target(
            access=access, pool=POOL, namespace=namespace, image=name, key=key
        )

    yield make
    left = rbdbus.devices()
    for device in left:
        rbdbus.remove(device.number, limit=TIMEOUT, doing="clean up")
    for name in made:
        ceph.rbd("rm", "--no-progress", f"{place}/{name}")
    ceph.rbd("namespace", "rm", place)
    assert left == []


def watchers(ceph: Ceph, target: Target) -> list[str]:
    """Return the addresses of those that have the image open."""
    shown = ceph.rbd("status", f"{target.pool}/{target.namespace}/{target.image}")
    return re.findall(r"watcher=(\S+)", shown)


def mounted(device: str, folder: Path) -> Path:
    """Make a file system on the device and mount it."""
    run("mkfs.ext4", "-q", device)
    folder.mkdir(exist_ok=True)
    run("mount", device, folder)
    return folder


# The kernel's own client


def test_the_kernel_shows_no_key(ceph: Ceph, krbd: Krbd, make: Make) -> None:
    """Neither its devices, its log nor a keyring that others see has it."""
    target = make()
    krbd.map(target)
    found = re.search(r"key = (\S+)", ceph.least().read_text())
    assert found is not None
    shown = Path("/sys/bus/rbd/devices/0/config_info").read_text()
    assert re.search(rf"key=volplugin\.\w+\.{target.key},", shown)
    assert "noshare" in shown
    assert found[1] not in shown + run("dmesg")
    assert target.key not in Path("/proc/keys").read_text()
    krbd.unmap(target)


def test_each_mapping_is_a_client_of_its_own(
    ceph: Ceph, krbd: Krbd, make: Make
) -> None:
    """A client that is fenced takes no other with it, and its image can be unmapped."""
    fenced, other = make(), make()
    devices = [krbd.map(fenced), krbd.map(other)]
    addresses = [device.address for device in rbdbus.devices()]
    assert len(set(addresses)) == 2
    assert watchers(ceph, fenced) + watchers(ceph, other) == addresses
    ceph.ceph("osd", "blocklist", "add", addresses[0])
    # What is written to no object yet would be read as zeros without asking an OSD.
    write = "dd if=/dev/zero of={} bs=4k count=1 oflag=direct"
    eventually(
        lambda: os.system(write.format(devices[0])) != 0,
        "the fenced client's writes fail",
    )
    run(*write.format(devices[1]).split())
    for target in (fenced, other):
        krbd.unmap(target)
        assert krbd.find(target) is None


@pytest.mark.parametrize("protocol", ["v1", "v2"])
def test_it_speaks_either_protocol(
    ceph: Ceph, krbd: Krbd, make: Make, tmp_path: Path, protocol: str
) -> None:
    """Where the configuration has the addresses of one protocol alone."""
    found = re.search(rf"{protocol}:([0-9.:]+)", ceph.conf.read_text())
    assert found is not None
    conf = tmp_path / "ceph.conf"
    conf.write_text(f"[global]\nmon host = [{protocol}:{found[1]}/0]\n")
    target = make()
    target = attrs.evolve(target, access=attrs.evolve(target.access, conf=str(conf)))
    krbd.map(target)
    shown = Path("/sys/bus/rbd/devices/0/config_info").read_text()
    assert shown.startswith(f"{found[1]} ")
    assert ("ms_mode=prefer-crc" in shown) is (protocol == "v2")
    assert krbd.find(target) == "/dev/rbd0"
    krbd.unmap(target)


def test_other_mappings_are_let_alone(
    ceph: Ceph, krbd: Krbd, make: Make, tmp_path: Path
) -> None:
    """What others have mapped, be it the same volume for another root, is not ours."""
    target = attrs.evolve(make(), read_only=True)
    other = Krbd(str(tmp_path / "other"))
    device = other.map(target)
    assert krbd.find(target) is None
    krbd.unmap(target)
    assert krbd.map(target) != device
    krbd.unmap(target)
    assert other.find(target) == device
    other.unmap(target)


def test_a_feature_that_the_kernel_lacks(krbd: Krbd, make: Make) -> None:
    """Is told, with those that it has; nothing is mapped."""
    target = make(features="layering,exclusive-lock,journaling")
    with pytest.raises(Unsupported, match="which has layering, striping, excl"):
        krbd.map(target)
    assert rbdbus.devices() == []


def test_words_that_the_kernel_would_take_apart(krbd: Krbd, make: Make) -> None:
    """A name with a blank or a comma, and encryption, are no target of its own."""
    target = make()
    assert krbd.supports(target) is None
    for wrong in (
        attrs.evolve(target, image="a b"),
        attrs.evolve(target, namespace="a,b"),
        attrs.evolve(target, pool="a\nb"),
    ):
        assert "takes no" in str(krbd.supports(wrong))
    secret = attrs.evolve(target, encryption="luks2", key_file="/key")
    assert "has no encryption" in str(krbd.supports(secret))
    with pytest.raises(Unsupported, match="has no encryption"):
        krbd.map(secret)


def test_what_is_wrong_with_the_access(krbd: Krbd, make: Make, tmp_path: Path) -> None:
    """A user without a key, a wrong key, and a missing image are told apart."""
    target = make()
    with pytest.raises(NotFound, match="no such pool, namespace or image"):
        krbd.map(attrs.evolve(target, image="other"))
    access = attrs.evolve(target.access, user="nobody")
    with pytest.raises(Unavailable, match=r"no key of client\.nobody in .*keyring"):
        krbd.map(attrs.evolve(target, access=access))
    keyring = tmp_path / "keyring"
    key = "AQDb6VRlAAAAABAAb1qQ5mZ4JvJmqgU2dXcVQw=="
    keyring.write_text(f"[client.volplugin]\n\tkey = {key}\n")
    access = attrs.evolve(target.access, keyring=str(keyring))
    with pytest.raises(Unavailable, match=r"the cluster refuses client\.volplugin"):
        krbd.map(attrs.evolve(target, access=access))
    assert rbdbus.devices() == []


def test_a_cluster_that_hangs(ceph: Ceph, krbd: Krbd, make: Make) -> None:
    """Mapping gives up in time and leaves nothing; what is mapped can be unmapped."""
    target, other = make(), make()
    krbd.map(other)
    ceph.pause("osd")
    try:
        hasty = attrs.evolve(target, access=attrs.evolve(target.access, timeout=3))
        with pytest.raises(Unavailable, match="not done within 3 s"):
            krbd.map(hasty)
        assert krbd.find(target) is None
        krbd.unmap(other)
        assert krbd.find(other) is None
    finally:
        ceph.resume("osd")
    krbd.map(target)
    krbd.unmap(target)
    eventually(lambda: not watchers(ceph, other), "its watch has ended", seconds=60)


def test_discard_frees_space(
    ceph: Ceph, krbd: Krbd, make: Make, tmp_path: Path
) -> None:
    """The kernel cuts its discards by size, not by object: objects stay, but empty."""
    target = make()

    def used() -> int:
        pools = json.loads(ceph.ceph("df", "--format", "json"))["pools"]
        return sum(p["stats"]["bytes_used"] for p in pools if p["name"] == POOL)

    folder = mounted(krbd.map(target), tmp_path / "m")
    (folder / "file").write_bytes(os.urandom(32 * MIB))
    run("sync", "-f", folder)
    eventually(lambda: used() > 32 * MIB, "it takes space", seconds=60)
    (folder / "file").unlink()
    run("sync", "-f", folder)
    run("fstrim", folder)
    eventually(lambda: used() < 16 * MIB, "the space is free", seconds=60)
    run("umount", folder)
    krbd.unmap(target)


def test_a_mounted_device_stays(krbd: Krbd, make: Make, tmp_path: Path) -> None:
    """Who has it mounted is named."""
    target = make()
    folder = mounted(krbd.map(target), tmp_path / "m")
    with pytest.raises(InUse, match=f"mounted on {folder}"):
        krbd.unmap(target)
    run("umount", folder)
    krbd.unmap(target)


# rbd-nbd


def test_a_mounted_nbd_stays(rbd_nbd: RbdNbd, make: Make, tmp_path: Path) -> None:
    """The program itself would let it go from under the file system."""
    target = make()
    device = rbd_nbd.map(target)
    folder = mounted(device, tmp_path / "m")
    with pytest.raises(InUse, match=f"mounted on {folder}"):
        rbd_nbd.unmap(target)
    (folder / "file").write_text("here")
    os.sync()
    run("umount", folder)
    with (
        open(device, "rb"),
        pytest.raises(InUse, match=rf"process {os.getpid()} \(.*\) has it open"),
    ):
        rbd_nbd.unmap(target)
    rbd_nbd.unmap(target)


def test_a_passphrase_with_a_newline(
    rbd_nbd: RbdNbd, make: Make, tmp_path: Path
) -> None:
    """What the program would cut short is left to other mappers."""
    key = tmp_path / "key"
    target = attrs.evolve(make(), encryption="luks2", key_file=str(key))
    key.write_text("secret")
    assert rbd_nbd.supports(target) is None
    key.write_text("secret\n")
    assert "ends with a newline" in str(rbd_nbd.supports(target))
    with pytest.raises(Unsupported, match="ends with a newline"):
        rbd_nbd.map(target)


def test_a_dead_server_keeps_its_device(
    rbd_nbd: RbdNbd, make: Make, tmp_path: Path
) -> None:
    """While it is mounted no other image comes there; then it can be mapped again."""
    target, other = make(), make()
    device = rbd_nbd.map(target)
    folder = mounted(device, tmp_path / "m")
    (folder / "file").write_text("synced")
    os.sync()
    server = nbd.server_of(Path(device).name)
    assert server is not None
    os.kill(server, signal.SIGKILL)
    eventually(lambda: not rbd_nbd.alive(target), "the server has died")
    mount = mountinfo.at(str(folder), mountinfo.read())
    assert mount is not None
    assert rbd_nbd.is_mapped_by(target, mount)
    assert not rbd_nbd.is_mapped_by(other, mount)
    assert rbd_nbd.map(other) != device
    for work in (rbd_nbd.unmap, rbd_nbd.map):
        with pytest.raises(InUse, match=f"mounted on {folder}"):
            work(target)
    run("umount", folder)
    device = rbd_nbd.map(target)
    run("mount", device, folder)
    assert (folder / "file").read_text() == "synced"
    run("umount", folder)
    for each in (target, other):
        rbd_nbd.unmap(each)
        assert rbd_nbd.find(each) is None


def test_it_grows_while_mounted(
    ceph: Ceph, rbd_nbd: RbdNbd, make: Make, tmp_path: Path
) -> None:
    """The device shows the image's new length when `grow` returns."""
    target = make()
    device = rbd_nbd.map(target)
    folder = mounted(device, tmp_path / "m")
    image = f"{target.pool}/{target.namespace}/{target.image}"
    ceph.rbd("resize", "--no-progress", "-s", "96M", image)
    rbd_nbd.grow(target)
    assert nodes.size_of(Path(device).name) == 96 * MIB
    run("resize2fs", device)
    run("umount", folder)
    rbd_nbd.unmap(target)


def test_no_trace_is_left(rbd_nbd: RbdNbd, make: Make, tmp_path: Path) -> None:
    """Neither a file nor a process nor a device, also when there is no such image."""
    target = make()
    rbd_nbd.map(target)
    rbd_nbd.unmap(target)
    with pytest.raises(NotFound):
        rbd_nbd.map(attrs.evolve(target, image="other"))
    assert list((tmp_path / "mappings").iterdir()) == []
    running = subprocess.run(["pgrep", "-x", "rbd-nbd"], check=False)
    assert running.returncode == 1
    assert nbd.server_of("nbd0") is None
