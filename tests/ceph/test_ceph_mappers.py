"""Every mapper that this machine has, against the contract in `ceph.mappers`.

``VOLPLUGIN_TEST_MAPPERS`` names those that have to be there, with commas between.
"""

import secrets
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import attrs
import pytest
from mapping import (
    MIB,
    Bench,
    bench,
    mkfs,
    mount_at,
    names,
    read,
    size,
    write,
)
from support.ceph import Ceph
from support.commands import run
from support.require import missing

from volplugin.ceph.cluster import Access
from volplugin.ceph.mappers import NAMES, choose, mappers
from volplugin.errors import (
    InUse,
    InvalidArgument,
    NotFound,
    Unavailable,
    Unsupported,
    VolpluginError,
)

pytestmark = pytest.mark.root


@pytest.fixture(params=names() or ["none"])
def lab(
    request: pytest.FixtureRequest, ceph: Ceph, namespace: str, scratch: Path
) -> Iterator[Bench]:
    """A bench for each mapper that there is."""
    if request.param == "none":
        missing("no mapper works on this machine")
    with bench(ceph, namespace, scratch, request.param) as made:
        problem = made.mapper.problem()
        assert problem is None, problem
        yield made


def test_a_life(lab: Bench) -> None:
    """What was written is there after unmap and map; no mounted device is unmapped."""
    target = lab.image()
    device = lab.mapper.map(target)
    assert device.startswith("/dev/")
    assert size(device) == 64 * MIB
    mkfs(device)
    data = secrets.token_bytes(3 * MIB)
    with lab.mounted(device) as where:
        (where / "file").write_bytes(data)
        with pytest.raises(InUse, match=device):
            lab.mapper.unmap(target)
        assert (where / "file").read_bytes() == data
        assert lab.mapper.alive(target)
    lab.mapper.unmap(target)
    assert lab.mapper.find(target) is None
    assert lab.watchers("image") == []
    device = lab.mapper.map(target)
    with lab.mounted(device) as where:
        assert (where / "file").read_bytes() == data


def test_again(lab: Bench) -> None:
    """Mapping what is mapped, and unmapping what is not, is success."""
    target = lab.image()
    lab.mapper.unmap(target)
    device = lab.mapper.map(target)
    assert lab.mapper.map(target) == device
    assert len(lab.watchers("image")) <= 1
    lab.mapper.unmap(target)
    lab.mapper.unmap(target)
    assert lab.mapper.find(target) is None
    assert not lab.mapper.alive(target)


def test_after_a_restart(lab: Bench) -> None:
    """A new mapper finds what an earlier one mapped, and tells it from other mounts."""
    target, other = lab.image(), lab.image("other")
    device = lab.mapper.map(target)
    mkfs(device)
    assert lab.mapper.find(target) == device
    assert lab.mapper.find(other) is None
    with lab.mounted(device) as where:
        mount = mount_at(where)
        assert lab.mapper.is_mapped_by(target, mount)
        assert not lab.mapper.is_mapped_by(other, mount)
        assert not lab.mapper.is_mapped_by(target, mount_at(Path("/")))
    lab.mapper.unmap(target)
    assert not lab.mapper.is_mapped_by(target, mount)


def test_two_at_once(lab: Bench) -> None:
    """Each mapping is a device and a client of its own."""
    one, two = lab.image("one"), lab.image("two")
    devices = [lab.mapper.map(target) for target in (one, two)]
    assert len(set(devices)) == 2
    for device, letter in zip(devices, (b"1", b"2"), strict=True):
        write(device, letter * 4096)
    assert [read(device, 1) for device in devices] == [b"1", b"2"]
    assert len({*lab.watchers("one"), *lab.watchers("two")}) == 2
    lab.mapper.unmap(one)
    assert lab.mapper.find(two) == devices[1]
    write(devices[1], b"3" * 4096)
    assert read(devices[1], 1) == b"3"


def test_by_threads(lab: Bench) -> None:
    """Several threads map and unmap at once, each its own image."""
    targets = [lab.image(f"image-{number}") for number in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(2):
            devices = list(pool.map(lab.mapper.map, targets))
            assert len(set(devices)) == 4
            assert [lab.mapper.find(target) for target in targets] == devices
            list(pool.map(lab.mapper.unmap, targets))
            assert [lab.mapper.find(target) for target in targets] == [None] * 4


def test_discard(lab: Bench) -> None:
    """What the file system discards is freed in the cluster."""
    target = lab.image()
    device = lab.mapper.map(target)
    mkfs(device)
    with lab.mounted(device) as where:
        before = lab.objects(target)
        (where / "file").write_bytes(secrets.token_bytes(32 * MIB))
        run("sync", "-f", where)
        full = lab.objects(target)
        assert full >= before + 6
        (where / "file").unlink()
        run("sync", "-f", where)
        run("fstrim", where)
        assert lab.objects(target) <= full - 6


def test_grow(lab: Bench) -> None:
    """A device in use gets the length of its image."""
    target = lab.image()
    device = lab.mapper.map(target)
    mkfs(device)
    with lab.mounted(device) as where:
        (where / "file").write_text("kept")
        lab.ceph.rbd("resize", "--no-progress", "-s", "96M", lab.path("image"))
        lab.mapper.grow(target)
        assert size(device) == 96 * MIB
        lab.mapper.grow(target)
        assert size(device) == 96 * MIB
        assert (where / "file").read_text() == "kept"
    write(device, b"end", 96 * MIB - 3)
    assert read(device, 3, 96 * MIB - 3) == b"end"
    shown = lab.ceph.rbd("info", lab.path("image"))
    assert "size 96 MiB" in shown


def test_grow_what_is_not_mapped(lab: Bench) -> None:
    """Only what is mapped here can be made to grow here."""
    with pytest.raises(NotFound, match="image"):
        lab.mapper.grow(lab.image())


def test_read_only(lab: Bench) -> None:
    """A read-only device takes no writes, and is a writable one when mapped anew."""
    target = lab.image()
    device = lab.mapper.map(target)
    mkfs(device)
    with lab.mounted(device) as where:
        (where / "file").write_text("kept")
    lab.mapper.unmap(target)
    reader = attrs.evolve(target, read_only=True)
    device = lab.mapper.map(reader)
    assert run("blockdev", "--getro", device).strip() == "1"
    with pytest.raises(OSError, match=r"not permitted|Read-only"):
        write(device, b"x" * 4096)
    with lab.mounted(device, "ro") as where:
        assert (where / "file").read_text() == "kept"
    lab.mapper.unmap(reader)
    device = lab.mapper.map(target)
    assert run("blockdev", "--getro", device).strip() == "0"


def test_two_readers(lab: Bench) -> None:
    """An image can be mapped more than once, as by several hosts, read-only."""
    one = lab.image(read_only=True)
    two = lab.target(read_only=True)
    assert lab.mapper.map(one) != lab.mapper.map(two)


def test_fenced(lab: Bench) -> None:
    """A client that was fenced gets errors, and can be unmapped and mapped again."""
    target, other = lab.image(), lab.image("other")
    device, beside = lab.mapper.map(target), lab.mapper.map(other)
    write(device, b"before")
    lab.fence("image")
    with pytest.raises(OSError, match=r"error|shutdown"):
        write(device, b"behind" * 4096)
    assert lab.mapper.find(target) == device
    write(beside, b"not fenced")
    lab.mapper.unmap(target)
    assert lab.mapper.find(target) is None
    device = lab.mapper.map(target)
    assert read(device, 6) == b"before"
    write(device, b"again")


def test_fenced_and_mounted(lab: Bench) -> None:
    """A fenced client with a file system can be unmounted and unmapped in time."""
    target = lab.image()
    device = lab.mapper.map(target)
    mkfs(device)
    with lab.mounted(device) as where:
        (where / "old").write_text("kept")
        run("sync", "-f", where)
        lab.fence("image")
        with pytest.raises(OSError, match=r"error|Read-only|shutdown"):  # noqa: PT012
            for _ in range(100):
                write(str(make(where / "new")), secrets.token_bytes(MIB))
        assert lab.mapper.is_mapped_by(target, mount_at(where))
    begin = time.monotonic()
    lab.mapper.unmap(target)
    assert time.monotonic() - begin < 40
    device = lab.mapper.map(target)
    with lab.mounted(device) as where:
        assert (where / "old").read_text() == "kept"


def test_what_is_missing(lab: Bench) -> None:
    """A missing image or pool is named, and nothing is left of the attempt."""
    for target in (
        lab.target("nope"),
        lab.target(pool="nopool"),
        lab.target(namespace="nospace"),
    ):
        with pytest.raises((NotFound, InvalidArgument), match=r"nope|nopool|nospace"):
            lab.mapper.map(target)
        assert lab.mapper.find(target) is None
    lab.assert_nothing_left()


def test_a_wrong_access(lab: Bench) -> None:
    """A user without a key, a wrong key, or no rights is told, and so is no conf."""
    keyring = lab.scratch / "keyring"
    keyring.write_text(
        "[client.volplugin]\n\tkey = AQDcpsRnAAAAABAAnYrMBnXl6WDM3WWyCGxzFQ==\n"
    )
    poor = lab.ceph.user("poor", mon="profile rbd", osd="profile rbd pool=other")
    lab.image()
    for access in (
        attrs.evolve(lab.access, user="nobody"),
        attrs.evolve(lab.access, keyring=str(keyring)),
        attrs.evolve(lab.access, keyring=str(lab.scratch / "missing")),
        attrs.evolve(lab.access, user="poor", keyring=str(poor)),
        attrs.evolve(lab.access, conf=str(lab.scratch / "missing")),
    ):
        target = lab.target(access=access)
        with pytest.raises(Unavailable, match=r"client\.|keyring|conf"):
            lab.mapper.map(target)
        assert lab.mapper.find(target) is None
    lab.assert_nothing_left()


def test_no_cluster(lab: Bench) -> None:
    """A cluster that can't be reached is told within the time that was given."""
    conf = lab.scratch / "conf"
    lines = lab.ceph.conf.read_text().splitlines()
    away = ["mon host = 127.0.0.1:1" if "mon host" in line else line for line in lines]
    conf.write_text("\n".join(away))
    keyring = str(lab.ceph.least())
    access = Access(conf=str(conf), user="volplugin", keyring=keyring, timeout=2)
    target = lab.target(access=access)
    begin = time.monotonic()
    with pytest.raises(Unavailable):
        lab.mapper.map(target)
    assert time.monotonic() - begin < 30
    lab.assert_nothing_left()


@pytest.mark.parametrize("kind", ["luks1", "luks2"])
def test_encryption(lab: Bench, kind: str) -> None:
    """An encrypted image is read with its passphrase alone, and has no plain text."""
    target = lab.image()
    key = lab.scratch / "key"
    key.write_bytes(b"a pass\nphrase")
    wrong = lab.scratch / "wrong"
    wrong.write_bytes(b"a pass")
    locked = attrs.evolve(target, encryption=kind, key_file=str(key))
    if lab.mapper.supports(locked) is not None:
        return
    lab.ceph.rbd("encryption", "format", lab.path("image"), kind, key)
    device = lab.mapper.map(locked)
    length = size(device)
    assert 40 * MIB < length < 64 * MIB
    word = secrets.token_hex(512).encode()
    write(device, word)
    lab.mapper.unmap(locked)
    refused = attrs.evolve(locked, key_file=str(wrong))
    with pytest.raises(InvalidArgument, match=r"passphrase in .*wrong"):
        lab.mapper.map(refused)
    assert lab.mapper.find(locked) is None
    device = lab.mapper.map(locked)
    assert read(device, len(word)) == word
    lab.mapper.unmap(locked)
    device = lab.mapper.map(target)
    assert word[:64] not in read(device, 64 * MIB)


def test_not_encrypted(lab: Bench) -> None:
    """An image without encryption is not taken for one with."""
    key = lab.scratch / "key"
    key.write_bytes(b"phrase")
    target = lab.image(encryption="luks2", key_file=str(key))
    if lab.mapper.supports(target) is None:
        with pytest.raises(VolpluginError, match="luks2"):
            lab.mapper.map(target)


def test_odd_names(lab: Bench) -> None:
    """Commas, blanks and the like in names are no obstacle, or told before."""
    for name in ("a,b", "c d", 'e"f', "g=h", "ü"):
        target = lab.image(name)
        if lab.mapper.supports(target) is None:
            assert size(lab.mapper.map(target)) == 64 * MIB
            lab.mapper.unmap(target)


def test_a_long_place(lab: Bench) -> None:
    """A place with a path longer than a socket's may be is no obstacle."""
    deep = lab.scratch / ("x" * 100) / ("y" * 100)
    deep.mkdir(parents=True)
    mapper = mappers(str(deep / "mappings"))[lab.name]
    target = lab.image()
    try:
        device = mapper.map(target)
        assert mapper.find(target) == device
        lab.ceph.rbd("resize", "--no-progress", "-s", "96M", lab.path("image"))
        mapper.grow(target)
        assert size(device) == 96 * MIB
    finally:
        mapper.unmap(target)
    assert mapper.find(target) is None


def test_choice(lab: Bench) -> None:
    """The mapper that is asked for is taken, or the first that works."""
    target = lab.image()
    known = mappers(str(lab.place))
    assert choose(known, lab.name, target).name == lab.name
    assert choose(known, None, target).name == names()[0]
    with pytest.raises(InvalidArgument, match=r"no mapper 'krdb'.*krbd, rbd-nbd, qemu"):
        choose(known, "krdb", target)
    for name in NAMES:
        problem = known[name].problem()
        if problem is not None:
            with pytest.raises(Unsupported) as told:
                choose(known, name, target)
            assert f"{name}: {problem}" in str(told.value)


def make(path: Path) -> Path:
    subprocess.run(["touch", path], check=False, capture_output=True)
    return path
