"""What users and operators get wrong: told with its value and a way out, no trace."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import pytest
from support.ceph import POOL, Ceph
from support.client import PluginError
from support.plugin import REPOSITORY
from support.wait import eventually
from trouble import Forks, Machine, World

from volplugin.admin.client import AdminClient
from volplugin.ceph.bindings import load
from volplugin.ceph.mappers import mappers
from volplugin.errors import VolpluginError
from volplugin.host import cephmount

pytestmark = pytest.mark.root

SMALL: Final = {"driver": "ceph", "size": "16m"}
SHARED: Final = {"driver": "cephfs", "size": "16m"}


@pytest.fixture(scope="module")
def world(ceph: Ceph, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A place in the cluster, which these tests leave empty."""
    forks = Forks()
    made = World(ceph, forks, tmp_path_factory.mktemp("bad"))
    yield made
    try:
        made.close()
    finally:
        forks.close()


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """Files with a passphrase, by their permissions."""
    folder, made = tmp_path_factory.mktemp("keys"), {}
    for mode in (0o600, 0o644):
        file = folder / f"{mode:o}.key"
        file.write_text("secret")
        file.chmod(mode)
        made[mode] = str(file)
    return made


@pytest.fixture(scope="module")
def machine(
    world: World, keys: dict[int, str], tmp_path_factory: pytest.TempPathFactory
) -> Machine:
    """A host with a good backend of each driver, and others that are not."""
    folder = tmp_path_factory.mktemp("files")
    wrong = folder / "wrong.keyring"
    text = world.ceph.least().read_text()
    key = next(line for line in text.splitlines() if "key =" in line)
    none = world.ceph.user("none", mon="allow r")
    other = next(line for line in none.read_text().splitlines() if "key =" in line)
    wrong.write_text(text.replace(key, other))
    no_keyring = folder / "empty.keyring"
    no_keyring.write_text("")
    caps = {"mon": "profile rbd, allow r", "osd": "allow rwx"}
    user = world.ceph.user
    no_manager = str(user("no-manager", mds="allow rwps", **caps))
    no_mds = str(user("no-mds", **caps))
    reads = str(user("reads", mds="allow r", **caps))
    made = world.machine(
        backends={
            "no-pool": {"pool": "nothing"},
            "no-namespace": {"namespace": "nothing"},
            "no-data-pool": {"data-pool": "nothing"},
            "wrong-key": {"keyring": str(wrong)},
            "no-user": {"user": "nobody"},
            "no-key": {"keyring": str(no_keyring)},
            "no-keyring": {"keyring": f"{folder}/nothing"},
            "no-conf": {"conf": f"{folder}/nothing"},
            "no-rights": {"user": "none", "keyring": str(none)},
            "krbd": {"mapper": "krbd"},
            "rbd-nbd": {"mapper": "rbd-nbd"},
            "keyed": {"encryption-key": keys[0o644]},
            "no-fs": {"driver": "cephfs", "fs": "nothing"},
            "fs-wrong-key": {"driver": "cephfs", "keyring": str(wrong)},
            "fs-no-conf": {"driver": "cephfs", "conf": f"{folder}/nothing"},
            "fs-no-rights": {"driver": "cephfs", "user": "none", "keyring": str(none)},
            "no-mds": {"driver": "cephfs", "user": "no-mds", "keyring": no_mds},
            "mds-reads": {"driver": "cephfs", "user": "reads", "keyring": reads},
            "no-manager": {
                "driver": "cephfs",
                "user": "no-manager",
                "keyring": no_manager,
                "subvolume-group": world.namespace,
            },
            "no-registry": {"driver": "cephfs", "registry-pool": "nothing"},
            "fs-kernel": {"driver": "cephfs", "mount": "kernel"},
        }
    )
    made.start()
    return made


def refused(machine: Machine, options: Mapping[str, str], *words: str) -> str:
    """Have a create refused with these words in the error; return the whole of it."""
    with pytest.raises(PluginError) as raised:
        machine.client.create("v", options)
    told = str(raised.value)
    missing = [word for word in words if word not in told]
    assert not missing, f"{missing} not in {told!r}"
    assert "v" not in machine.client.list()
    return told


@pytest.fixture(autouse=True)
def nothing_made(world: World, machine: Machine) -> Iterator[None]:
    """Fail a test that leaves anything in the cluster."""
    yield
    try:
        eventually(
            lambda: not world.left() and not machine.client.list(), "all is gone"
        )
    except AssertionError:
        left = {**world.left(), "volumes": machine.client.list()}
        for name in left["volumes"]:
            with contextlib.suppress(PluginError):
                machine.client.unmount(name, "id")
                machine.client.remove(name)
        world.wipe()
        raise AssertionError(f"left: {left}") from None


@pytest.mark.parametrize(
    ("backend", "words"),
    [
        ("no-pool", ("no pool 'nothing'", POOL, "ceph osd pool create nothing")),
        ("no-namespace", ("namespace 'nothing'", "rbd namespace create")),
        ("no-data-pool", ("no pool 'nothing'", "ceph osd pool create nothing")),
        ("wrong-key", ("wrong.keyring", "ceph auth get client.volplugin")),
        ("no-user", ("client.nobody", "ceph auth get client.nobody")),
        ("no-key", ("empty.keyring", "ceph auth get client.volplugin")),
        ("no-keyring", ("/nothing: no such file", "keyring")),
        ("no-conf", ("/nothing: no such file", "conf")),
        ("no-rights", ("client.none", "caps")),
        ("no-fs", ("fs=nothing", "there are cephfs")),
        ("fs-wrong-key", ("wrong.keyring", "ceph auth get client.volplugin")),
        ("fs-no-conf", ("/nothing: no such file", "conf")),
        ("fs-no-rights", ("client.none", "caps")),
        ("no-mds", ("client.no-mds", "ceph auth get client.no-mds")),
        ("mds-reads", ("client.reads", "'w' is missing", "ceph auth caps")),
        ("no-manager", ("mgr caps", "ceph auth")),
        ("no-registry", ("no pool 'nothing'", "cephfs_data")),
    ],
)
def test_backend(machine: Machine, backend: str, words: tuple[str, ...]) -> None:
    """A setting that is wrong is told when the backend is used, and how to mend it."""
    refused(machine, {"driver": backend, "size": "16m"}, *words)


def test_others_unhurt(machine: Machine) -> None:
    """Beside wrong backends the others work, and Get and List tell of them."""
    for options in (SMALL, SHARED, {"driver": "tmpfs"}):
        machine.client.create("good", options)
        assert "error" not in machine.status("good")
        machine.client.remove("good")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": "16q"}, ("size", "16q")),
        ({"size": "64k"}, ("64", "ext4", "size")),
        ({"size": "16m", "fs": "xfs"}, ("16M", "xfs", "300M")),
        ({"fs": "zfs"}, ("zfs", "ext4", "xfs")),
        ({"features": "exlusive-lock"}, ("exlusive-lock", "exclusive-lock")),
        ({"features": "fast-diff"}, ("fast-diff needs object-map",)),
        ({"image-feature": "layering", "features": "journaling"}, ("features",)),
        ({"object-size": "3m"}, ("3m", "power of 2")),
        ({"pool": "nothing"}, ("no pool 'nothing'",)),
        ({"pool": "a/b"}, ("a/b", "pool")),
        ({"conf": "/other.conf"}, ("/other.conf", "[backend.NAME]")),
        ({"key": "/other.key"}, ("/other.key", "[backend.NAME]")),
        ({"image": "nothing"}, ("no image", "nothing")),
        ({"image": "nothing", "size": "1g", "mode": "0700"}, ("mode", "leave")),
        ({"from": "nothing"}, ("'nothing'", "from=nothing")),
        ({"from": "nothing@snap"}, ("'nothing'",)),
        ({"from": "a@"}, ("VOLUME@SNAPSHOT",)),
        ({"from": "a", "base": "b"}, ("from", "base", "give one")),
        ({"from": "a", "image": "b"}, ("exclude each other",)),
        ({"access": "ro"}, ("access=ro", "from=", "image=")),
        ({"access": "wo"}, ("wo", "rw", "ro")),
        ({"on-conflict": "steal"}, ("steal", "fence")),
        ({"encryption": "rot13"}, ("rot13", "luks2")),
        ({"encryption": "luks2"}, ("encryption-key",)),
        ({"encryption-key": "/x"}, ("encryption=luks1 or luks2",)),
        ({"encryption": "luks2", "encryption-key": "/nothing"}, ("/nothing",)),
        ({"sise": "1g"}, ("sise", "size")),
    ],
    ids=str,
)
def test_rbd_options(
    machine: Machine, options: Mapping[str, str], words: tuple[str, ...]
) -> None:
    """An option that can't be is refused with its value, and what can be."""
    refused(machine, {"driver": "ceph", **options}, *words)


def test_key_for_all(machine: Machine, keys: dict[int, str]) -> None:
    """A passphrase that others can read is no secret: refused with the way out."""
    given = {"encryption": "luks2", "encryption-key": keys[0o644]}
    refused(machine, {**SMALL, **given}, "644.key", "chmod")
    refused(machine, {"driver": "keyed", "encryption": "luks2"}, "644.key")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"path": "/nothing"}, ("/nothing", "make it first")),
        ({"path": "/"}, ("/ is the whole file system",)),
        ({"path": "relative"}, ("relative",)),
        ({"path": "/../etc"}, ("/../etc",)),
        ({"path": "/x/.snap/y"}, ("/x/.snap/y", "snapshot")),
        ({"path": "/x", "uid": "5"}, ("uid", "leave")),
        ({"access": "ro"}, ("access=ro", "path=")),
        ({"size": "1"}, ("size", "1")),
        ({"inodes": "-1"}, ("inodes", "-1")),
        ({"from": "x"}, ("from",)),
    ],
    ids=str,
)
def test_cephfs_options(
    machine: Machine, options: Mapping[str, str], words: tuple[str, ...]
) -> None:
    """A directory, or a limit, that can't be is refused with its value."""
    refused(machine, {"driver": "cephfs", **options}, *words)


def test_own_directory(machine: Machine, world: World) -> None:
    """Nothing in or above the backend's own directory can be made a volume."""
    client = machine.client
    client.create("there", SHARED)
    for path in (world.directory, f"{world.directory}/volumes"):
        refused(machine, {"driver": "cephfs", "path": path}, path, "volplugin's own")
    client.remove("there")


def test_directory_twice(machine: Machine, world: World) -> None:
    """A directory is one volume's at a time, which the error names."""
    path = f"{world.directory}-users"
    world.files.make(f"{path}/inner")
    options = {"driver": "cephfs", "path": path}
    machine.client.create("first", options)
    refused(machine, options, path, "'first'")
    refused(machine, {"driver": "cephfs", "path": f"{path}/inner"}, "'first'")
    machine.client.remove("first")
    assert world.files.names(path) == ["inner"]
    world.files.remove(path)


@contextlib.contextmanager
def image(world: World, name: str, *, begin: bytes = b"") -> Iterator[None]:
    """Have an image of someone else in the pool."""
    rbd = load("rbd")
    with world.io() as ioctx:
        rbd.RBD().create(ioctx, name, 16 << 20)
        if begin:
            with contextlib.closing(rbd.Image(ioctx, name)) as handle:
                handle.write(begin, 0)
        yield
        rbd.RBD().remove(ioctx, name)


def test_empty_image(machine: Machine, world: World) -> None:
    """An image without a file system is not formatted but refused."""
    with image(world, "theirs", begin=b"data"):
        refused(machine, {"driver": "ceph", "image": "theirs"}, "theirs", "ext4")
        with (
            world.io() as ioctx,
            contextlib.closing(
                load("rbd").Image(ioctx, "theirs", read_only=True)
            ) as handle,
        ):
            assert handle.read(0, 4) == b"data"
            assert list(handle.metadata_list()) == []


def test_image_of_another(machine: Machine, world: World) -> None:
    """The image of a volume is not made another's, and the owner is named."""
    machine.client.create("owner", SMALL)
    (name,) = world.images()
    refused(machine, {"driver": "ceph", "image": name}, name, "'owner'")
    machine.client.remove("owner")


def test_image_twice(machine: Machine, world: World) -> None:
    """An image is one volume's at a time; it outlives the volume."""
    client = machine.client
    client.create("first", SMALL)
    (name,) = world.images()
    rbd = load("rbd")
    with world.io() as ioctx:
        with contextlib.closing(rbd.Image(ioctx, name)) as handle:
            handle.copy(ioctx, "theirs")
        with contextlib.closing(rbd.Image(ioctx, "theirs")) as handle:
            handle.metadata_remove("volplugin")
    client.remove("first")
    options = {"driver": "ceph", "image": "theirs"}
    client.create("taker", options)
    refused(machine, options, "theirs", "'taker'")
    refused(machine, {**options, "fs": "xfs"}, "theirs")
    client.remove("taker")
    refused(machine, {**options, "fs": "xfs"}, "ext4", "fs=xfs")
    refused(machine, {**options, "size": "32m"}, "16M", "size=32M")
    with world.io() as ioctx:
        with contextlib.closing(rbd.Image(ioctx, "theirs")):
            refused(machine, options, "theirs", "127.0.0.1:0/", "unmap")
        rbd.RBD().remove(ioctx, "theirs")


def test_image_gone(machine: Machine, world: World) -> None:
    """A volume whose image someone removed is told of at Mount, and can be removed."""
    client = machine.client
    client.create("v", SMALL)
    (name,) = world.images()
    with world.io() as ioctx:
        load("rbd").RBD().remove(ioctx, name)
    with pytest.raises(PluginError, match=f"image {POOL}.*{name} is missing: restore"):
        client.mount("v", "id")
    client.remove("v")


def test_directory_gone(machine: Machine, world: World) -> None:
    """A volume whose directory someone removed is told of, and can be removed."""
    client = machine.client
    client.create("v", SHARED)
    (name,) = world.entries("volumes")
    world.files.remove(f"{world.directory}/volumes/{name}")
    with pytest.raises(PluginError, match=f"{name} is missing in the file system"):
        client.mount("v", "id")
    client.remove("v")


@pytest.mark.parametrize("other", ["local", "tmpfs"])
@pytest.mark.parametrize("options", [SMALL, SHARED], ids=["rbd", "cephfs"])
def test_name_clash(machine: Machine, options: Mapping[str, str], other: str) -> None:
    """A name is one volume's, whatever its driver; the error tells which has it."""
    client = machine.client
    client.create("v", options)
    with pytest.raises(PluginError, match=f"driver is {options['driver']}.*{other}"):
        client.create("v", {"driver": other})
    client.remove("v")
    client.create("v", {"driver": other})
    with pytest.raises(PluginError, match=f"driver is {other}.*{options['driver']}"):
        client.create("v", options)
    client.remove("v")


def test_name_clash_with_other_host(machine: Machine, world: World) -> None:
    """A local volume hides the cluster's of its name, which stays for other hosts."""
    machine.client.create("v", {"driver": "local"})
    other = world.machine("b")
    other.start()
    other.client.create("v", SMALL)
    eventually(lambda: "hidden by the volume" in machine.log, "the log tells")
    assert machine.status("v")["driver"] == "local"
    machine.client.remove("v")
    eventually(lambda: "v" in machine.client.list(), "the other comes to light")
    assert machine.status("v")["driver"] == "rbd"
    other.client.remove("v")
    other.stop()
    eventually(lambda: "v" not in machine.client.list(), "it is gone here too")


def test_resize(machine: Machine) -> None:
    """A volume is not made smaller than it is, or than what it holds."""
    client, admin = machine.client, AdminClient(str(machine.admin_socket))
    client.create("v", SMALL)
    with pytest.raises(VolpluginError, match="from 16M to 8M: create one"):
        admin.resize("v", size="8m")
    with pytest.raises(VolpluginError, match="inodes"):
        admin.resize("v", inodes="100")
    assert machine.status("v")["size"] == "16M"
    client.remove("v")
    client.create("v", SHARED)
    path = Path(client.mount("v", "id"))
    with (path / "file").open("wb") as file:
        file.write(bytes(6 << 20))
        os.fsync(file.fileno())

    def is_refused() -> bool:
        # What a directory holds is summed up in the background.
        with contextlib.suppress(VolpluginError):
            admin.resize("v", size="4m")
            admin.resize("v", size="16m")
            return False
        return True

    eventually(is_refused, "it is refused")
    with pytest.raises(VolpluginError, match="delete files first, or give more"):
        admin.resize("v", size="4m")
    client.unmount("v", "id")
    client.remove("v")


def test_clones(machine: Machine) -> None:
    """A copy is not smaller than, or other than, its source; snapshots are named."""
    client, admin = machine.client, AdminClient(str(machine.admin_socket))
    client.create("source", SMALL)
    admin.take_snapshot("source", "one")
    copy = {"driver": "ceph", "from": "source"}
    refused(machine, {**copy, "size": "8m"}, "size=8M", "16M")
    refused(machine, {**copy, "fs": "xfs"}, "fs=xfs", "ext4")
    refused(machine, {**copy, "mkfs.block-size": "1024"}, "mkfs.block-size")
    refused(machine, {**copy, "from": "source@two"}, "'two'", "one")
    refused(machine, {**copy, "from": "sauce"}, "'sauce'", "source")
    with pytest.raises(VolpluginError, match="one"):
        admin.take_snapshot("source", "one")
    with pytest.raises(VolpluginError, match="two"):
        admin.drop_snapshot("source", "two")
    with pytest.raises(VolpluginError, match="a/b"):
        admin.take_snapshot("source", "a/b")
    client.create("copy", {**copy, "from": "source@one"})
    with pytest.raises(PluginError, match="copy"):
        client.remove("source")
    with pytest.raises(VolpluginError, match="copy"):
        admin.drop_snapshot("source", "one")
    client.remove("copy")
    client.remove("source")


@pytest.mark.parametrize("backend", ["krbd", "rbd-nbd", "fs-kernel"])
def test_missing_kernel(machine: Machine, tmp_path: Path, backend: str) -> None:
    """Where the kernel lacks what is asked for, the error says what that is."""
    if backend == "fs-kernel":
        if cephmount.has_kernel_client():
            pytest.skip("this kernel has CephFS")
        refused(machine, {"driver": backend}, "kernel", "ceph")
        return
    if mappers(str(tmp_path))[backend].problem() is None:
        pytest.skip(f"this kernel has {backend}")
    machine.client.create("v", {"driver": backend, "size": "16m"})
    with pytest.raises(PluginError, match=backend):
        machine.client.mount("v", "id")
    machine.client.remove("v")


def test_encryption_with_krbd(machine: Machine, keys: dict[int, str]) -> None:
    """Encryption is refused where the one mapper that is set has none."""
    given = {"encryption": "luks2", "encryption-key": keys[0o600]}
    refused(machine, {"driver": "krbd", **given}, "luks2", "krbd", "rbd-nbd or qemu")


def test_unknown_mapper(world: World, tmp_path: Path) -> None:
    """A mapper that is none is a fault of the configuration, which tells the others."""
    file = tmp_path / "volplugin.toml"
    file.write_text('[backend.ceph]\ndriver = "rbd"\nmapper = "magic"\n')
    words = [sys.executable, "-m", "volplugin", "config"]
    done = subprocess.run(
        [*words, "--config", str(file)],
        capture_output=True,
        text=True,
        check=False,
        cwd=REPOSITORY,
    )
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert "backend.ceph.mapper" in said
    assert "magic" in said
    assert "rbd-nbd" in said


_WITHOUT: Final = """
import importlib.machinery
from volplugin.ceph import bindings
from volplugin.errors import Unsupported
bindings._FOLDER = "/nothing"
try:
    bindings.load("rbd")
except Unsupported as error:
    print(error)
"""


def test_missing_bindings() -> None:
    """Without Debian's bindings the error says which package to install."""
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "apt-get install python3-rados" in done.stdout
