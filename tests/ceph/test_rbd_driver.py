"""The driver ``rbd`` on a real cluster, with real mounts, on one host."""

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
from rbd_cases import HostCase, Hosts, in_state
from support import processes
from support.capabilities import CAP_SYS_RESOURCE, require_capability
from support.ceph import POOL, Ceph
from support.wait import eventually

from volplugin import failpoints
from volplugin.ceph import image_filling, image_snapshots
from volplugin.ceph.images import Image, Shape
from volplugin.errors import (
    AlreadyExists,
    InUse,
    InvalidArgument,
    NotFound,
    Unavailable,
    Unsupported,
    VolpluginError,
)
from volplugin.host import mountinfo
from volplugin.model import State

pytestmark = pytest.mark.root

ATTACH_STEPS = (*("rbd.hold", "rbd.mapped", "rbd.noted", "rbd.checked", "rbd.mounted"),)


@pytest.fixture
def hosts(ceph: Ceph, namespace: str, tmp_path: Path) -> Iterator[Hosts]:
    """Hosts that share a namespace."""
    made = Hosts(ceph, namespace, tmp_path)
    try:
        yield made
        made.finish()
    finally:
        made.close()


@pytest.fixture
def images(ceph: Ceph, namespace: str, hosts: Hosts) -> Any:
    """Makes images that are none of volplugin's; removes them."""
    made: list[str] = []
    place = f"{POOL}/{namespace}"

    def make(name: str, *, kind: str = "ext4", size: int = 16 << 20) -> str:
        host = hosts("maker")
        image = Image(pool=POOL, name=name)
        driver = host.driver._images
        shape = Shape(size=size, features=("layering",), object_size=4 << 20)
        made.append(name)
        if kind:
            contents = image_filling.Contents(kind=kind, label=name, options={})
            image_filling.make(
                driver,
                image,
                shape,
                contents,
                owner=b"{}",
                secret=None,
                scratch=str(host.folder / "scratch"),
            )
            driver.disclaim(image)
        else:
            driver.create(image, shape)
        return name

    yield make
    hosts.clear()
    for name in dict.fromkeys(made):
        ceph.rbd("rm", f"{place}/{name}")


def shown(ceph: Ceph, host: HostCase, image: str) -> dict[str, Any]:
    """Return what ``rbd info`` says of an image."""
    place = f"{POOL}/{host.namespace}/{image}"
    found: dict[str, Any] = json.loads(ceph.rbd("info", place, "--format", "json"))
    return found


def meta(ceph: Ceph, host: HostCase, image: str) -> dict[str, str]:
    """Return an image's metadata."""
    place = f"{POOL}/{host.namespace}/{image}"
    said = ceph.rbd("image-meta", "ls", place, "--format", "json")
    found: dict[str, str] = json.loads(said or "{}")
    return found


def test_life(hosts: Hosts) -> None:
    """What is written to a volume is there when it is attached again."""
    host = hosts()
    spec = host.make("v")
    host.driver.attach(spec)
    host.file(spec).write_text("text")
    host.driver.detach(spec)
    assert not host.is_attached(spec)
    host.driver.attach(spec)
    assert host.file(spec).read_text() == "text"
    host.driver.detach(spec)
    host.remove(spec)
    assert host.driver.find("v") is None


def test_root(hosts: Hosts) -> None:
    """The root of a new volume is empty, with the owner and mode that were asked."""
    host = hosts()
    spec = host.make("v", uid="7", gid="8", mode="2770", size="16M")
    host.driver.attach(spec)
    status = os.stat(spec.volume.mountpoint)
    assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (7, 8, 0o2770)
    assert os.listdir(spec.volume.mountpoint) == []
    os.chmod(spec.volume.mountpoint, 0o700)
    host.driver.detach(spec)
    host.driver.attach(spec)
    assert os.stat(spec.volume.mountpoint).st_mode & 0o777 == 0o700, "it was the user's"


def test_image(hosts: Hosts, ceph: Ceph) -> None:
    """An image is made as it was asked for, and carries the volume's record."""
    host = hosts()
    spec = host.make(
        "v",
        size="32M",
        object_size="1M",
        image_feature="layering,exclusive-lock",
        mkfs_block_size="1K",
    )
    name = spec.volume.facts["image"]
    info = shown(ceph, host, name)
    assert info["size"] == 32 << 20
    assert info["object_size"] == 1 << 20
    assert set(info["features"]) == {"layering", "exclusive-lock"}
    assert meta(ceph, host, name) == {"volplugin": spec.record.decode()}
    host.driver.attach(spec)
    assert os.statvfs(spec.volume.mountpoint).f_frsize == 1024


def test_default_size(hosts: Hosts, ceph: Ceph) -> None:
    """A volume without a size has 10 GiB, of which next to nothing is taken."""
    host = hosts()
    spec = host.spec("v")
    host.driver.create(spec)
    info = shown(ceph, host, spec.volume.facts["image"])
    assert info["size"] == 10 << 30
    assert info["object_size"] == 4 << 20


def test_other_pool(hosts: Hosts, ceph: Ceph) -> None:
    """An image can be in another pool than its record, and leaves its trash too."""
    host = hosts(user="admin", keyring=f"{ceph.folder}/client.admin.keyring")
    pool = "others"
    ceph.ceph("osd", "pool", "create", pool, "8")
    ceph.rbd("pool", "init", pool)
    try:
        with pytest.raises(InvalidArgument, match=f"rbd namespace create {pool}/"):
            host.spec("v", pool=pool)
        ceph.rbd("namespace", "create", f"{pool}/{host.namespace}")
        spec = host.make("v", pool=pool, size="16M")
        listed = ceph.rbd("ls", f"{pool}/{host.namespace}")
        assert listed.split() == [spec.volume.facts["image"]]
        host.driver.attach(spec)
        host.driver.detach(spec)
        host.remove(spec)
        assert host.driver.purge(lambda: False) is True
        assert not ceph.rbd("trash", "ls", f"{pool}/{host.namespace}").strip()
    finally:
        ceph.ceph("osd", "pool", "rm", pool, pool, "--yes-i-really-really-mean-it")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"size": "4M"}, "too small"),
        ({"size": "100M", "fs": "xfs"}, "too small"),
        ({"mkfs_inode_ratio": "4096", "fs": "xfs", "size": "300M"}, "no such option"),
        ({"pool": "nowhere"}, "no pool 'nowhere'"),
        ({"image": "nowhere"}, "no image"),
        ({"from_": "nowhere"}, "no volume 'nowhere'"),
        ({"conf": "/etc/other.conf"}, r"\[backend.NAME\]"),
        ({"key": "/etc/other.keyring"}, r"\[backend.NAME\]"),
        ({"access": "ro"}, "stay empty"),
        ({"features": "layering,object-map"}, "needs exclusive-lock"),
        ({"features": "layerin"}, "did you mean 'layering'"),
        ({"object_size": "3M"}, "power of 2"),
        ({"from_": "a", "base": "b"}, "mean the same"),
        ({"from_": "a", "image": "b"}, "exclude each other"),
        ({"from_": "@snap"}, "names no volume"),
        ({"image": "a/b"}, "is no name"),
        ({"image": "a", "uid": "1"}, "leave uid out"),
        ({"encryption": "luks2"}, "needs encryption-key"),
        ({"encryption_key": "/etc/key"}, "without encryption"),
        ({"on_conflict": "win"}, "none of fail, wait, fence"),
        ({"sizze": "1G"}, "did you mean 'size'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_options(hosts: Hosts, options: dict[str, str], said: str) -> None:
    """What can't be made is refused when it is planned, with the reason."""
    with pytest.raises(InvalidArgument, match=said):
        hosts().spec("v", **options)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"pool": "nowhere"}, "no pool 'nowhere'"),
        ({"namespace": "nowhere"}, "no namespace 'nowhere'"),
        ({"data-pool": "nowhere"}, "no pool 'nowhere'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_settings(hosts: Hosts, settings: dict[str, str], said: str) -> None:
    """A place in the cluster that isn't there is named, with the way to make it."""
    host = hosts(is_cleared=False, **settings)
    with pytest.raises(InvalidArgument, match=said):
        host.spec("v")


def test_no_conf(hosts: Hosts, tmp_path: Path) -> None:
    """A configuration that is missing makes the cluster unavailable, no more."""
    host = hosts(conf=f"{tmp_path}/none.conf", is_cleared=False)
    with pytest.raises(Unavailable, match=r"none\.conf"):
        host.spec("v")
    assert "none.conf" in host.driver.health()


def test_wrong_key(hosts: Hosts, tmp_path: Path, ceph: Ceph) -> None:
    """A key that the cluster does not know is told as that."""
    keyring = tmp_path / "keyring"
    key = subprocess.check_output(["ceph-authtool", "--gen-print-key"], text=True)
    keyring.write_text(f"[client.volplugin]\n\tkey = {key}")
    host = hosts(keyring=str(keyring), is_cleared=False)
    with pytest.raises(Unavailable, match="volplugin"):
        host.spec("v")


@pytest.mark.parametrize("step", ATTACH_STEPS)
def test_attach_fails(hosts: Hosts, step: str) -> None:
    """An attach that fails at any step leaves nothing, and can be made again."""
    host = hosts()
    spec = host.make("v")
    failpoints.arm(f"{step}=error:5*1")
    try:
        with pytest.raises((OSError, VolpluginError)):
            host.driver.attach(spec)
    finally:
        failpoints.arm("")
    assert not host.is_attached(spec)
    assert host.record("v").holders == ()
    assert host.driver._images.watchers(Image(**image_of(spec))) == ()
    host.driver.attach(spec)
    assert host.is_attached(spec)


def image_of(spec: Any) -> dict[str, str]:
    """Return pool and name of a volume's image."""
    return {"pool": spec.volume.facts["pool"], "name": spec.volume.facts["image"]}


def test_restart(hosts: Hosts) -> None:
    """A plugin that was restarted knows what is attached, and detaches it."""
    host = hosts()
    spec = host.make("v")
    host.driver.attach(spec)
    again = hosts()
    assert again.is_attached(spec)
    again.driver.attach(spec)
    again.driver.detach(spec)
    assert again.record("v").holders == ()


def test_mapper_dies(hosts: Hosts) -> None:
    """A mapper that was killed is told of, and a detach and an attach put it right."""
    host = hosts()
    spec = host.make("v")
    host.driver.attach(spec)
    file = host.file(spec)
    file.write_text("synced")
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
    mapper = host.driver._attacher.mapper_of(spec.volume, mountinfo.read())
    assert mapper is not None
    if mapper.name != "qemu":
        pytest.skip("krbd has no process")
    pid = host.kill_mapper(spec)
    eventually(lambda: not processes.is_alive(pid), "it ended")
    with pytest.raises(Unavailable, match="died"):
        host.driver.attach(spec)
    host.driver.detach(spec)
    assert not host.is_attached(spec)
    host.driver.attach(spec)
    assert host.file(spec).read_text() == "synced"


@pytest.mark.parametrize(
    ("policy", "is_clean", "is_checked"),
    [
        ("auto", True, False),
        ("auto", False, True),
        ("always", True, True),
        ("never", False, False),
    ],
)
def test_fsck(
    hosts: Hosts,
    policy: str,
    is_clean: bool,
    is_checked: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The setting says whether an ext4 is checked before it is mounted."""
    host = hosts(mapper="qemu", fsck=policy)
    spec = host.make("v")
    host.driver.attach(spec)
    host.file(spec).write_text("text")
    subprocess.run(["sync", host.file(spec)], check=True)
    if not is_clean:
        host.kill_mapper(spec)
    host.driver.detach(spec)
    with caplog.at_level("INFO"):
        host.driver.attach(spec)
    assert ("was checked before its mount" in caplog.text) is is_checked
    assert host.file(spec).read_text() == "text"


def test_data_pool(hosts: Hosts, ceph: Ceph) -> None:
    """The data of images can be in another pool than their headers."""
    pool = "data"
    ceph.ceph("osd", "pool", "create", pool, "8")
    ceph.rbd("pool", "init", pool)
    try:
        host = hosts(
            user="admin",
            keyring=f"{ceph.folder}/client.admin.keyring",
            data_pool=pool,
        )
        spec = host.make("v")
        host.driver.attach(spec)
        host.file(spec).write_bytes(os.urandom(1 << 20))
        host.driver.detach(spec)
        image = spec.volume.facts["image"]
        assert shown(ceph, host, image)["data_pool"] == pool
        objects = ceph.rados("-p", pool, "-N", host.namespace, "ls").split()
        assert any(each.startswith("rbd_data.") for each in objects)
        objects = ceph.rados("-p", POOL, "-N", host.namespace, "ls").split()
        assert not any(each.startswith("rbd_data.") for each in objects)
        copy = host.make("copy", from_="v")
        assert shown(ceph, host, copy.volume.facts["image"])["data_pool"] == pool
        host.remove(copy)
        host.remove(spec)
        host.driver.purge(lambda: False)
    finally:
        ceph.ceph("osd", "pool", "rm", pool, pool, "--yes-i-really-really-mean-it")


def test_missing_image(hosts: Hosts, ceph: Ceph) -> None:
    """An image that was removed by hand is told of, and its volume can be removed."""
    host = hosts()
    spec = host.make("v")
    ceph.rbd("rm", f"{POOL}/{host.namespace}/{spec.volume.facts['image']}")
    with pytest.raises(Unavailable, match="is missing"):
        host.driver.attach(spec)
    host.remove(spec)
    assert host.driver.find("v") is None


def test_status(hosts: Hosts) -> None:
    """Status tells image, size, holder and the cluster's health, from memory."""
    host = hosts()
    spec = host.make("v")
    host.driver.attach(spec)
    usage = host.driver.measure([spec])[spec.volume.id]
    assert usage.size == 16 << 20
    assert 0 < usage.available < usage.size
    status = host.driver.status(spec.volume, spec.options, attached=True)
    assert status["size"] == "16M"
    assert status["holder"].startswith("host-a (127.0.0.1:")
    assert status["cluster"] == "ok"
    assert status["image"] == f"{POOL}/{spec.volume.facts['image']}"
    assert status["snapshots"] == 0
    assert status["mapper"] in {"krbd", "rbd-nbd", "qemu"}
    assert "ref" not in status
    assert "error" not in status


# Snapshots and copies


def test_snapshots(hosts: Hosts) -> None:
    """Snapshots are listed oldest first, and deleted by name."""
    host = hosts()
    spec = host.make("v")
    for name in ("one", "two"):
        host.driver.take_snapshot(spec, name, attached=False)
    found = host.driver.snapshots(spec)
    assert [each.name for each in found] == ["one", "two"]
    assert {each.size for each in found} == {16 << 20}
    assert all(each.created_at.endswith("Z") for each in found)
    with pytest.raises(AlreadyExists, match="'one'"):
        host.driver.take_snapshot(spec, "one", attached=False)
    host.driver.drop_snapshot(spec, "one")
    with pytest.raises(NotFound, match="there are two"):
        host.driver.drop_snapshot(spec, "one")
    assert [each.name for each in host.driver.snapshots(spec)] == ["two"]
    for bad in ("", "a@b", "a/b", "volplugin-clone-1"):
        with pytest.raises(InvalidArgument):
            host.driver.take_snapshot(spec, bad, attached=False)
    host.remove(spec)


def test_copy_of_snapshot(hosts: Hosts) -> None:
    """A copy of a snapshot has the files of then, and is a volume of its own."""
    host = hosts()
    spec = host.make("v", uid="7", mode="0750", size="16M")
    host.driver.attach(spec)
    host.file(spec).write_text("then")
    host.driver.take_snapshot(spec, "s", attached=True)
    host.file(spec).write_text("now")
    copy = host.make("copy", from_="v@s")
    host.driver.attach(copy)
    assert host.file(copy).read_text() == "then"
    status = os.stat(copy.volume.mountpoint)
    assert (status.st_uid, status.st_mode & 0o777) == (7, 0o750)
    assert os.getxattr(copy.volume.mountpoint, "trusted.volplugin") == copy.record
    host.file(copy).write_text("copy's")
    assert host.file(spec).read_text() == "now"
    with pytest.raises(InUse, match="copy"):
        host.driver.drop_snapshot(spec, "s")
    host.driver.detach(spec)
    with pytest.raises(InUse, match="copy"):
        host.remove(spec)
    assert host.record("v").volume.state is State.READY
    host.driver.detach(copy)
    host.remove(copy)
    host.remove(spec)
    assert host.driver.purge(lambda: False) is True


def test_copy_of_volume(hosts: Hosts) -> None:
    """A copy of a mounted volume has what was written before, and may be larger."""
    host = hosts()
    spec = host.make("v", fs="xfs", size="300M")
    host.driver.attach(spec)
    host.file(spec).write_text("text")
    copy = host.make("copy", base="v", size="400M", mode="0700")
    host.driver.attach(copy)
    assert host.file(copy).read_text() == "text"
    assert capacity(copy) > 320 << 20
    assert os.stat(copy.volume.mountpoint).st_mode & 0o777 == 0o700
    assert host.driver.snapshots(spec) == [], "its own snapshot is not listed"
    host.driver.detach(copy)
    host.remove(copy)
    assert host.driver.purge(lambda: False) is True
    with host.driver._images.opened(Image(**image_of(spec)), "look") as handle:
        assert list(handle.list_snaps()) == []


def test_copies_in_trash(hosts: Hosts) -> None:
    """A volume and its copy, both removed, leave nothing."""
    host = hosts()
    spec = host.make("v")
    copies = [host.make(f"copy{number}", from_="v") for number in range(2)]
    for each in [*copies, spec]:
        host.remove(each)
    assert host.driver.purge(lambda: False) is True


def test_copy_refused(hosts: Hosts) -> None:
    """A copy can't be smaller or of another kind, nor be of what is not there."""
    host = hosts()
    host.make("v")
    for options, said in (
        ({"from_": "v", "size": "8M"}, "less than its source has, 16M"),
        ({"from_": "v", "fs": "xfs"}, "leave fs out"),
        ({"from_": "v", "encryption": "luks1"}, "leave encryption out"),
        ({"from_": "v@none"}, "no snapshot 'none'"),
        ({"from_": "v", "mkfs_block_size": "1K"}, "leave one of them out"),
    ):
        with pytest.raises(InvalidArgument, match=said):
            host.spec("copy", **options)


def test_xfs_copy_beside_its_source(hosts: Hosts) -> None:
    """A copy of an XFS, which has the same id, is mounted beside it."""
    host = hosts()
    spec = host.make("v", fs="xfs", size="300M")
    host.driver.attach(spec)
    copy = host.make("copy", from_="v")
    host.driver.attach(copy)
    assert host.is_attached(spec)
    assert host.is_attached(copy)


# Adopted images


def test_adopt(hosts: Hosts, ceph: Ceph, images: Any) -> None:
    """An image that was there is attached with its files, and never deleted."""
    host = hosts()
    spec = host.make("v", image=images("theirs"))
    assert "volplugin" in meta(ceph, host, "theirs")
    host.driver.attach(spec)
    assert os.listdir(spec.volume.mountpoint) == ["lost+found"]
    host.file(spec).write_text("text")
    host.driver.detach(spec)
    with pytest.raises(AlreadyExists, match="volume 'v'"):
        host.spec("other", image="theirs")
    host.remove(spec)
    assert host.driver.purge(lambda: False) is True
    assert meta(ceph, host, "theirs") == {}
    again = host.make("again", image="theirs")
    host.driver.attach(again)
    assert host.file(again).read_text() == "text"


def test_adopt_refused(hosts: Hosts, images: Any) -> None:
    """An image without a file system, or of another size or kind, is not adopted."""
    host = hosts()
    images("bare", kind="")
    images("theirs")
    for options, said in (
        ({"image": "bare"}, "neither an ext4 nor an XFS"),
        ({"image": "theirs", "fs": "xfs"}, "has ext4"),
        ({"image": "theirs", "size": "1G"}, "has 16M: leave size out"),
    ):
        with pytest.raises(InvalidArgument, match=said):
            host.spec("v", **options)
    image = Image(pool=POOL, name="theirs")
    with (
        hosts("other").driver._images.opened(image, "use it"),
        pytest.raises(InUse, match=r"127\.0\.0\.1:0/"),
    ):
        host.spec("v", image="theirs")


def test_adopted_image_replaced(hosts: Hosts, ceph: Ceph, images: Any) -> None:
    """An image that took the name of an adopted one is not taken for it."""
    host = hosts()
    spec = host.make("v", image=images("theirs"))
    ceph.rbd("rm", f"{POOL}/{host.namespace}/theirs")
    images("theirs")
    with pytest.raises(Unavailable, match="another one"):
        host.driver.attach(spec)
    host.remove(spec)
    assert meta(ceph, host, "theirs") == {}


# Encryption


def test_encryption(hosts: Hosts, ceph: Ceph, tmp_path: Path) -> None:
    """Nothing of an encrypted volume is in the pool as it was written."""
    key = tmp_path / "key"
    key.write_bytes(b"secret\n")
    key.chmod(0o644)
    host = hosts()
    with pytest.raises(Unavailable, match="0600"):
        host.spec("v", encryption="luks1", encryption_key=str(key), size="16M")
    key.chmod(0o600)
    spec = host.make("v", encryption="luks1", encryption_key=str(key), size="16M")
    host.driver.attach(spec)
    assert capacity(spec) > 10 << 20
    host.file(spec).write_text("plain text" * 1000)
    host.driver.detach(spec)
    image = Image(**image_of(spec))
    with host.driver._images.opened(image, "read", read_only=True) as handle:
        assert b"plain text" not in handle.read(0, handle.size())
    host.driver.attach(spec)
    assert host.file(spec).read_text() == "plain text" * 1000
    host.driver.detach(spec)
    key.write_bytes(b"other")
    with pytest.raises(VolpluginError):
        host.driver.attach(spec)
    assert host.record("v").holders == ()
    key.unlink()
    with pytest.raises(Unavailable, match="copy it to every host"):
        host.driver.attach(spec)


def test_encrypted_copies(hosts: Hosts, tmp_path: Path) -> None:
    """A volume under a key grows; a copy is under the same key, and can't."""
    key = tmp_path / "key"
    key.write_bytes(b"secret\n")
    key.chmod(0o600)
    host = hosts(mapper="qemu")
    words = {"encryption": "luks2", "encryption_key": str(key)}
    spec = host.make("v", fs="xfs", size="300M", **words)
    host.driver.attach(spec)
    host.file(spec).write_text("text")
    image_snapshots.take(host.driver._images, Image(**image_of(spec)), "small")
    larger = resized(host, spec, "400M")
    host.driver.resize(larger, attached=True)
    assert capacity(spec) > 320 << 20
    copy = host.make("copy", from_="v")
    host.driver.attach(copy)
    assert host.file(copy).read_text() == "text"
    assert capacity(copy) == capacity(spec)
    host.file(copy).write_bytes(os.urandom(64 << 20))
    host.driver.detach(copy)
    host.driver.attach(copy)
    assert host.file(spec).read_text() == "text"
    with pytest.raises(Unsupported, match="encrypted copy can't be larger"):
        host.driver.plan_resize(
            copy, resized(host, copy, "500M").options, attached=True
        )
    with pytest.raises(InvalidArgument, match="source has 400M, and an encrypted copy"):
        host.spec("other", from_="v", size="500M")
    with pytest.raises(InvalidArgument, match="taken before volume v grew"):
        host.spec("other", from_="v@small")


# Resizing


@pytest.mark.parametrize(("fs", "size"), [("ext4", "16M"), ("xfs", "300M")])
def test_grow_mounted(hosts: Hosts, ceph: Ceph, fs: str, size: str) -> None:
    """A mounted volume grows while it is used."""
    if fs == "ext4":
        require_capability(CAP_SYS_RESOURCE)
    host = hosts()
    spec = host.make("v", fs=fs, size=size)
    host.driver.attach(spec)
    host.file(spec).write_text("text")
    larger = resized(host, spec, "400M")
    host.driver.plan_resize(spec, larger.options, attached=True)
    for _ in range(2):
        host.driver.resize(larger, attached=True)
        assert capacity(spec) > 320 << 20
    assert shown(ceph, host, spec.volume.facts["image"])["size"] == 400 << 20
    assert host.record("v").volume.options["size"] == "400M"
    assert os.getxattr(spec.volume.mountpoint, "trusted.volplugin") == larger.record
    assert host.file(spec).read_text() == "text"


@pytest.mark.parametrize(("fs", "size"), [("ext4", "16M"), ("xfs", "300M")])
def test_grow_unmounted(hosts: Hosts, fs: str, size: str) -> None:
    """A volume that is not mounted has its new size when it is attached next."""
    if fs == "ext4":
        require_capability(CAP_SYS_RESOURCE)
    host = hosts()
    spec = host.make("v", fs=fs, size=size)
    larger = resized(host, spec, "400M")
    host.driver.resize(larger, attached=False)
    host.driver.attach(larger)
    assert capacity(spec) > 320 << 20


def test_no_shrinking(hosts: Hosts, ceph: Ceph) -> None:
    """A volume is not made smaller; a growth that is taken back leaves the image."""
    host = hosts()
    spec = host.make("v", size="32M")
    smaller = resized(host, spec, "16M")
    with pytest.raises(Unsupported, match="from 32M to 16M"):
        host.driver.plan_resize(spec, smaller.options, attached=False)
    failpoints.arm("rbd.resize=error:5*1")
    try:
        with pytest.raises(OSError, match="failpoint"):
            host.driver.resize(resized(host, spec, "64M"), attached=False)
    finally:
        failpoints.arm("")
    host.driver.resize(spec, attached=False)
    assert shown(ceph, host, spec.volume.facts["image"])["size"] == 64 << 20
    assert host.record("v").volume.options["size"] == "32M"


def capacity(spec: Any) -> int:
    """Return the bytes of a mounted volume's file system."""
    figures = os.statvfs(spec.volume.mountpoint)
    return figures.f_blocks * figures.f_frsize


def resized(host: HostCase, spec: Any, size: str) -> Any:
    """Return the volume as it is to be with another size."""
    options = {**spec.volume.options, "size": size}
    return host.spec_of(attrs.evolve(spec.volume, options=options))


# What is left behind


def test_mountpoint_of_removed_volume(hosts: Hosts) -> None:
    """The mountpoint of a volume that another host removed is no one's any more."""
    host, other = hosts(), hosts("b")
    spec = host.make("v")
    theirs = other.found("v")
    other.driver.attach(theirs)
    other.driver.detach(theirs)
    host.remove(spec)
    assert os.path.isdir(theirs.volume.mountpoint)
    host.make("v")
    again = other.found("v")
    other.driver.attach(again)
    assert other.is_attached(again)
    other.driver.detach(again)
    host.remove(host.found("v"))
    other.driver.purge(lambda: False)
    assert not os.path.exists(theirs.volume.mountpoint)


def test_foreign_trash(hosts: Hosts, ceph: Ceph, namespace: str, images: Any) -> None:
    """What others threw away is not deleted."""
    host = hosts()
    place = f"{POOL}/{namespace}"
    images("theirs.0123456789ab")
    ceph.rbd("trash", "mv", f"{place}/theirs.0123456789ab")
    assert host.driver.purge(lambda: False) is True
    entry = json.loads(ceph.rbd("trash", "ls", place, "--format", "json"))[0]
    ceph.rbd("trash", "restore", f"{place}/{entry['id']}")


def test_undo_of_copy(hosts: Hosts) -> None:
    """A copy that was not finished leaves no snapshot behind."""
    host = hosts()
    source = host.make("v")
    for step in ("rbd.snapshot", "rbd.cloned"):
        spec = host.spec("copy", from_="v")
        failpoints.arm(f"{step}=error:5*1")
        try:
            with pytest.raises(OSError, match="failpoint"):
                host.driver.create(spec)
        finally:
            failpoints.arm("")
        host.driver.remove(spec)
        with host.driver._images.opened(Image(**image_of(source)), "look") as handle:
            assert list(handle.list_snaps()) == []
    with contextlib.suppress(InUse):
        host.driver.remove(in_state(source, State.READY))
    assert host.driver.find("v") is None
