"""A store that can't be trusted: `serve` refuses it, `recover` rebuilds it."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import plyvel
import pytest
from rooms import ForkedPlugin, Room, opened
from views import RECORD
from worlds import KINDS, World

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def room() -> Iterator[Room]:
    """A room for all tests."""
    with opened() as room:
        yield room


@pytest.fixture
def world(room: Room) -> Iterator[World]:
    """A server with a volume of each kind, killed; one tmpfs is held."""
    plugin = ForkedPlugin(room, room.folder())
    plugin.start()
    world = World(plugin)
    for kind in KINDS:
        world.create(kind, world.options(kind, kind))
    world.write("local", world.mount("local", "writer"), "on disk")
    world.unmount("local", "writer")
    world.write("tmpfs", world.mount("tmpfs", "holder"), "in memory")
    plugin.kill()
    yield world
    plugin.close()


def store_of(plugin: ForkedPlugin) -> Path:
    """Return where the store is."""
    return plugin.host.path(plugin.root / "store")


def only(plugin: ForkedPlugin, pattern: str) -> Path:
    """Return the newest file of the store that ``pattern`` fits."""
    return max(store_of(plugin).glob(pattern))


def damage(file: Path, *, within: int = 1 << 20) -> None:
    """Turn over bits in the first half of a file, in its first bytes if ``within``."""
    content = bytearray(file.read_bytes())
    assert len(content) > 40, f"{file} has too little to be damaged"
    for place in range(8, min(within, len(content) // 2), 16):
        content[place] ^= 0xFF
    file.write_bytes(content)


def damage_log(plugin: ForkedPlugin) -> str:
    """Damage the log, which holds what came since the start."""
    plugin.start()
    for number in range(4):
        plugin.client.mount("local", f"id{number}")
        plugin.client.unmount("local", f"id{number}")
    plugin.kill()
    file = only(plugin, "*.log")
    damage(file)
    return file.name


def damage_manifest(plugin: ForkedPlugin) -> str:
    """Damage the list of tables."""
    damage(only(plugin, "MANIFEST-*"))
    return "MANIFEST"


def damage_table(plugin: ForkedPlugin) -> str:
    """Damage a table, which an open makes of the log before."""
    plugin.start()
    plugin.kill()
    file = only(plugin, "*.ldb")
    damage(file, within=200)
    return file.name


def lose_current(plugin: ForkedPlugin) -> str:
    """Lose the file that names the manifest."""
    only(plugin, "CURRENT").unlink()
    return "CURRENT"


def lose_table(plugin: ForkedPlugin) -> str:
    """Lose a table."""
    plugin.start()
    plugin.kill()
    file = only(plugin, "*.ldb")
    file.unlink()
    return file.stem


def lose_store(plugin: ForkedPlugin) -> str:
    """Lose the whole store."""
    subprocess.run(["rm", "-r", store_of(plugin)], check=True)
    return "the store knows no volume"


def spoil_record(plugin: ForkedPlugin) -> str:
    """Write a record that is none."""
    put(plugin, b"volume/local", b'{"name":')
    return "volume/local"


def spoil_key(plugin: ForkedPlugin) -> str:
    """Write a record of a kind that does not exist."""
    put(plugin, b"snapshot/local", b"{}")
    return "snapshot/local"


def put(plugin: ForkedPlugin, key: bytes, value: bytes) -> None:
    """Write a pair into the store, past all code that checks it."""
    database = plyvel.DB(str(store_of(plugin)))
    database.put(key, value, sync=True)
    database.close()


DAMAGES = [
    damage_log,
    damage_manifest,
    damage_table,
    lose_current,
    lose_table,
    lose_store,
    spoil_record,
    spoil_key,
]


def shown(plugin: ForkedPlugin) -> dict[str, dict[str, Any]]:
    """Return what a client sees of each volume, holders and figures left out."""
    passing = {"attached", "content", "holders", "mounts"}
    figures = {"used", "available", "percent", "as-of", "age"}
    volumes = {}
    for name in plugin.client.list():
        volume = plugin.client.get(name)
        for key in passing | figures:
            volume["Status"].pop(key, None)
        volumes[name] = volume
    return volumes


def ids(plugin: ForkedPlugin) -> dict[str, str]:
    """Return the id of each volume by the record that its directory carries."""
    found = {}
    for name, mountpoint in plugin.client.list().items():
        record = json.loads(os.getxattr(plugin.host.path(mountpoint), RECORD))
        found[name] = record["id"]
    return found


@pytest.mark.parametrize("spoil", DAMAGES, ids=lambda spoil: spoil.__name__)
def test_rebuild(world: World, spoil: Callable[[ForkedPlugin], str]) -> None:
    """A broken store is refused by name, rebuilt in full, and kept."""
    plugin = world.plugin
    plugin.start()
    before, ids_before = shown(plugin), ids(plugin)
    plugin.kill()
    culprit = spoil(plugin)
    for _ in range(2):  # a refusal mends nothing
        status, output = plugin.refuse()
        assert status == 78, output
        assert "volplugin recover" in output
        assert culprit in output
        assert "Traceback" not in output
    broken = {path.name for path in store_of(plugin).iterdir()}
    status, output = plugin.recover()
    assert status == 0, output
    for name, volume in before.items():
        assert f"{name}  " in output
        assert volume["Mountpoint"] in output
    kept = next(plugin.host.path(plugin.root).glob("store.broken-*"))
    assert str(plugin.root / kept.name) in output
    assert {path.name for path in kept.iterdir()} & broken
    plugin.start()
    # Nothing but the lost store knew the holder, and no container has the tmpfs.
    world.expected.held.clear()
    del world.expected.content["tmpfs"]
    assert shown(plugin) == before
    assert ids(plugin) == ids_before
    world.check()
    world.destroy()


def test_torn_end_of_log(world: World) -> None:
    """Half a record at the end of the log, as a power cut leaves it, is no damage."""
    plugin = world.plugin
    log = only(plugin, "*.log")
    with log.open("ab") as file:
        file.write(b"\x12\x34\x56\x78\xff\x00\x01only the beginning")
    plugin.start()
    world.check()
    world.destroy()


def test_half_made_store(room: Room) -> None:
    """A first start that was cut short while LevelDB began is just begun again."""
    plugin = ForkedPlugin(room, room.folder())
    store = store_of(plugin)
    store.mkdir(parents=True)
    (store / "MANIFEST-000001").touch()
    (store / "LOCK").touch()
    plugin.start()
    assert plugin.client.list() == {}
    plugin.close()


def test_newer_schema(world: World) -> None:
    """A store of a newer volplugin is left alone, and the versions are named."""
    plugin = world.plugin
    put(plugin, b"schema", b"7")
    status, output = plugin.refuse()
    assert status == 78
    assert "schema 7" in output
    assert "1 to 1" in output
    assert "run the version that wrote it" in output
    assert str(plugin.root / "store") in output
    put(plugin, b"schema", b"1")
    plugin.start()
    world.check()
    world.destroy()


def test_healthy_store(world: World) -> None:
    """`recover` on a store that is well loses nothing, mounts and holders included."""
    plugin = world.plugin
    status, output = plugin.recover()
    assert status == 0, output
    assert "warning" not in output
    plugin.start()
    world.check()
    assert world.expected.held["tmpfs"] == {"holder"}
    world.destroy()


def test_running_server(world: World) -> None:
    """`recover` is refused while a server runs, and names it."""
    plugin = world.plugin
    plugin.start()
    status, output = plugin.recover()
    assert status == 1
    assert f"process {plugin.pid}" in output
    world.check()
    world.destroy()


def test_second_server(world: World) -> None:
    """A second server on one root is refused, and names the first."""
    plugin = world.plugin
    plugin.start()
    first = plugin.process
    plugin._process = None
    status, output = plugin.refuse()
    plugin._process = first
    assert status == 1
    assert f"process {plugin.pid}" in output
    world.check()
    world.destroy()


def test_copied_directory(world: World) -> None:
    """A copy of a volume, record and all, is told of and left out, not a volume."""
    plugin = world.plugin
    volumes = plugin.host.path(plugin.root / "local/volumes")
    subprocess.run(["cp", "-a", volumes / "local", volumes / "copy"], check=True)
    lose_store(plugin)
    status, output = plugin.recover()
    assert status == 0, output
    assert f"warning: {plugin.root}/local/volumes/copy carries the record" in output
    assert "setfattr -x trusted.volplugin" in output
    world.expected.held.clear()
    del world.expected.content["tmpfs"]
    plugin.start()
    assert "copy" not in plugin.client.list()
    assert (volumes / "copy/kept").read_text() == "on disk"
    subprocess.run(["rm", "-r", volumes / "copy"], check=True)
    world.check()
    world.destroy()


def test_unreadable_record_on_disk(world: World) -> None:
    """A directory whose record is garbage is told of, left out and left alone."""
    plugin = world.plugin
    stray = plugin.host.path(plugin.root / "local/volumes/stray")
    stray.mkdir()
    os.setxattr(stray, RECORD, b"garbage")
    status, output = plugin.recover()
    assert status == 0, output
    assert f"warning: {plugin.root}/local/volumes/stray" in output
    assert stray.is_dir()
    stray.rmdir()
    plugin.start()
    world.check()
    world.destroy()


def test_forgotten_volume(world: World) -> None:
    """A volume that the store has lost alone is taken over at the next start."""
    plugin = world.plugin
    database = plyvel.DB(str(store_of(plugin)))
    for key in (b"volume/local", b"volume/tmpfs", b"mounts/tmpfs"):
        database.delete(key, sync=True)
    database.close()
    world.expected.held.clear()
    del world.expected.content["tmpfs"]
    plugin.start()
    world.check()
    plugin.kill()
    plugin.start()
    world.check()
    world.destroy()


def test_container_after_rebuild(world: World) -> None:
    """After a rebuild, what a container has stays mounted and is not removed."""
    plugin = world.plugin
    mountpoint = f"{plugin.tmpfs}/tmpfs"
    container = Container(world, mountpoint)
    try:
        lose_store(plugin)
        assert plugin.recover()[0] == 0
        plugin.start()
        assert plugin.client.get("tmpfs")["Status"]["attached"] is True
        assert (plugin.host.path(mountpoint) / "kept").read_text() == "in memory"
        with pytest.raises(Exception, match="in use by a container"):
            plugin.client.remove("tmpfs")
    finally:
        container.end()
    world.expected.held.clear()
    del world.expected.content["tmpfs"]
    plugin.stop()
    plugin.start()
    world.check()
    world.destroy()


class Container:
    """A process with a root and a mount namespace of its own that has a volume."""

    def __init__(self, world: World, volume: str) -> None:
        root = world.plugin.folder / "container"
        setup = f"""
            set -e
            mkdir {root}
            mount -t tmpfs rootfs {root}
            cd {root}
            mkdir usr data old
            ln -s usr/bin usr/sbin usr/lib usr/lib64 .
            mount --bind /usr usr
            mount --bind {volume} data
            pivot_root . old
            exec chroot . sh -c 'umount -l /old; echo ready; exec sleep 600'
        """
        self._process = subprocess.Popen(
            world.plugin.host.command(
                *("unshare", "-m", "--propagation", "private", "sh", "-c", setup)
            ),
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def end(self) -> None:
        """End it."""
        assert self._process.stdout is not None
        self._process.kill()
        self._process.wait(10)
        self._process.stdout.close()
