"""Volumes of driver plugin through a real server, whose other plugin is a bad one."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import attrs
import pytest
from peers import mounts_below, scratch, serving
from support.bad_plugin import BadPlugin
from support.client import PluginError
from support.plugin import Plugin, plugin_environment
from support.wait import eventually
from wire import Wire, post

pytestmark = pytest.mark.root

INSTANT: Final = 0.5  # seconds; each hang that it is held against takes far longer
OPTIONS: Final = {"driver": "plugin", "plugin": "bad"}


@attrs.frozen
class World:
    """A server, and the bad plugin that it finds in the folder ``s``."""

    folder: Path
    server: Plugin
    bad: BadPlugin

    def create(self, name: str, **asked: str) -> None:
        """Create a volume of the bad plugin."""
        self.server.client.create(name, {**OPTIONS, **asked})

    def there(self, name: str) -> Path:
        """Make a volume at the plugin, past the server."""
        path = Path(self.bad.path(name))
        path.mkdir()
        return path

    def adopt(self, *words: str, driver: str = "plugin=bad") -> tuple[int, str, str]:
        """Run the real command; return its status and what it printed."""
        command = [sys.executable, "-m", "volplugin", "volume", "adopt", *words]
        command += ["--driver", driver]
        command += ["--admin-socket", str(self.server.admin_socket)]
        return run(command)

    def clear(self) -> None:
        """Remove all volumes; nothing may be held at the plugin."""
        for name in self.server.client.list():
            self.server.client.remove(name)
        assert not any(self.bad.held.values()), "a mount was left there"
        for name in self.bad.volumes():
            shutil.rmtree(self.bad.path(name))

    def status(self, name: str) -> dict[str, object]:
        """Return a volume's Status."""
        status = self.server.client.get(name)["Status"]
        assert isinstance(status, dict)
        return status


def run(command: Sequence[str]) -> tuple[int, str, str]:
    """Run a command; return its status and what it printed."""
    done = subprocess.run(
        command,
        env=plugin_environment(),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def configuration(folder: Path, *, limit: float = 20) -> str:
    """Return that of a server that finds plugins in ``folder``/s alone."""
    return f"""
sweep-interval = 0.2
[backend.plugin]
sockets = ["{folder}/s"]
specs = ["{folder}/s"]
time-limit = {limit}
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A place for a test, with nothing left mounted in it."""
    with scratch() as folder:
        (folder / "s").mkdir()
        yield folder
        assert mounts_below(folder) == []


@contextlib.contextmanager
def beside(folder: Path, *, limit: float = 20) -> Iterator[World]:
    """A server beside the bad plugin."""
    bad = BadPlugin(folder / "there", f"{folder}/s/bad.sock")
    bad.start()
    try:
        with serving(folder, config=configuration(folder, limit=limit)) as server:
            world = World(folder, server, bad)
            yield world
            world.clear()
    finally:
        bad.close()


@pytest.fixture
def world(folder: Path) -> Iterator[World]:
    """A server beside the bad plugin, for a test that ends either or has it hang."""
    with beside(folder) as world:
        yield world


@pytest.fixture(scope="module")
def running() -> Iterator[World]:
    """As `world`, for all tests that do not."""
    with scratch() as folder:
        (folder / "s").mkdir()
        with beside(folder) as world:
            yield world


@pytest.fixture
def shared(running: World) -> Iterator[World]:
    """The one of all tests, with no volume before and after."""
    running.bad.calls.clear()
    running.bad.made.clear()
    yield running
    running.bad.heal()
    running.clear()


@contextlib.contextmanager
def at_once(seconds: float = INSTANT) -> Iterator[None]:
    """Hold what is done to being done at once."""
    begun = time.monotonic()
    yield
    taken = time.monotonic() - begun
    assert taken < seconds, f"it took {taken:.2f} s"


# Reads


def test_reads_never_wait(world: World) -> None:
    """Get, List and Path of all volumes are instant while the plugin hangs."""
    world.create("v")
    world.create("w")
    mountpoint = world.server.client.get("v")["Mountpoint"]
    world.bad.fail("*", "hang")
    with ThreadPoolExecutor(12) as pool:
        changes: list[Callable[[], object]] = [
            *[lambda: world.server.client.mount("v", "id")] * 4,
            *[lambda: world.create("x")] * 4,
            *[lambda: world.server.client.remove("w")] * 4,
        ]
        hanging = [pool.submit(change) for change in changes]
        eventually(lambda: world.bad.count("Mount", "Remove") == 2, "they hang")
        for _ in range(20):
            with at_once(0.2):
                assert set(world.server.client.list()) == {"v", "w"}
                assert world.server.client.get("v")["Mountpoint"] == mountpoint
                assert world.server.client.path("v") == mountpoint
        assert not any(each.done() for each in hanging)
        world.bad.heal()
        for each in hanging:
            with contextlib.suppress(PluginError):
                each.result()
    while world.status("v")["mounts"]:
        world.server.client.unmount("v", "id")


def test_reads_never_ask(shared: World) -> None:
    """However many: the plugin is not called, up or down, mounted or not."""
    shared.create("v")
    shared.server.client.mount("v", "id")
    # The background's own look at what there is, which comes after a create.
    eventually(lambda: shared.bad.count("List") > 1, "volumes are measured")
    time.sleep(0.1)
    asked = len(shared.bad.calls)
    for _ in range(50):
        shared.server.client.get("v")
        shared.server.client.list()
        shared.server.client.path("v")
        with pytest.raises(PluginError, match="no such volume"):
            shared.server.client.get("never")
    assert len(shared.bad.calls) == asked
    shared.server.client.unmount("v", "id")


# Changes


def test_many_holders(shared: World) -> None:
    """The plugin sees the first come and the last leave."""
    shared.create("v", size="1g")
    client = shared.server.client
    with ThreadPoolExecutor(8) as pool:
        paths = set(pool.map(lambda n: client.mount("v", f"id{n}"), range(16)))
        (path,) = paths
        (Path(path) / "file").write_text("x")
        client.mount("v", "id3")
        client.unmount("v", "id3")
        assert shared.bad.count("Mount", "Unmount") == 1
        list(pool.map(lambda n: client.unmount("v", f"id{n}"), range(15)))
        assert shared.bad.count("Unmount") == 0
        client.unmount("v", "id15")
    assert shared.bad.count("Mount", "Unmount") == 2
    assert shared.bad.made == {"v": {"size": "1g"}}
    assert (Path(shared.bad.path("v")) / "file").read_text() == "x"


def test_the_words_of_the_plugin(shared: World) -> None:
    """An error of its is the answer's, in the form that every engine understands."""
    shared.bad.fail("Create", "refusal", "the array is full")
    with pytest.raises(PluginError) as caught:
        shared.create("v")
    assert caught.value.status == 500
    assert str(caught.value) == ("create v: plugin bad: Create: the array is full")
    assert shared.server.client.list() == {}
    assert shared.bad.count("Remove") == 0


def test_the_same_create_again(shared: World) -> None:
    """It is success without a call; one with other words names them, but no secret."""
    shared.create("v", size="1g", secret_key="hidden1")
    asked = shared.bad.count("Create")
    shared.create("v", size="1g", secret_key="hidden1")
    assert shared.bad.count("Create") == asked
    with pytest.raises(PluginError) as caught:
        shared.create("v", size="2g", secret_key="hidden2")
    assert "size is '1g', asked for '2g'" in str(caught.value)
    assert "secret_key is a secret, asked for a secret" in str(caught.value)
    told = str(caught.value) + json.dumps(shared.status("v")) + shared.server.log
    assert "hidden" not in told


@pytest.mark.parametrize("kind", ["close", "hang"])
def test_a_lost_create_is_undone(folder: Path, kind: str) -> None:
    """As soon as the plugin answers again; until then nobody is shown the volume."""
    with beside(folder, limit=0.5) as world:
        world.bad.fail("Create", kind, after=True, times=1)
        world.bad.fail("Remove", "error")
        with pytest.raises(PluginError, match="plugin bad: Create"):
            world.create("v")
        assert world.server.client.list() == {}
        assert world.bad.volumes() == ["v"]
        world.bad.heal()
        eventually(lambda: world.bad.volumes() == [], "it is undone")
        eventually(
            lambda: not list((folder / "root" / "plugin" / "adopted").iterdir()),
            "its marker is gone",
        )
        world.create("v")


def test_a_lost_mount_is_taken_back(folder: Path) -> None:
    """By the sweep, with its own ID, without another call of an engine."""
    with beside(folder, limit=0.5) as world:
        world.create("v")
        world.bad.fail("Mount", "hang", after=True, times=1)
        world.bad.fail("Unmount", "close", times=1)
        with pytest.raises(PluginError, match="no answer within"):
            world.server.client.mount("v", "id")
        (held,) = world.bad.held["v"]
        eventually(lambda: not world.bad.held["v"], "it is taken back")
        ids = {c.message["ID"] for c in world.bad.calls if c.verb == "Unmount"}
        assert ids == {held}


def test_stopping_while_it_hangs(folder: Path) -> None:
    """A server that is told to end does not wait for a plugin for ever."""
    with beside(folder) as world:
        world.server.stop()
        text = world.server.config.read_text()
        world.server.config.write_text(f"timeouts.drain = 0.5\n{text}")
        world.server.start()
        world.create("v")
        world.bad.fail("Mount", "hang")
        with ThreadPoolExecutor(1) as pool:
            hanging = pool.submit(world.server.client.mount, "v", "id")
            eventually(lambda: world.bad.count("Mount") == 1, "it hangs")
            with at_once(10):
                world.server.process.terminate()
                world.server.wait()
            with contextlib.suppress(OSError, PluginError, ConnectionError):
                hanging.result()
        world.bad.heal()
        world.server.start()


# In a circle


@contextlib.contextmanager
def two(folder: Path) -> Iterator[tuple[Plugin, Plugin]]:
    """Two servers, a and b, that find each other."""
    with contextlib.ExitStack() as stack:
        servers = []
        for name in ("a", "b"):
            own = folder / name
            own.mkdir()
            socket = folder / "s" / f"{name}.sock"
            config = configuration(folder)
            server = Plugin(own, socket=socket, config=config)
            stack.callback(server.close)
            server.start()
            servers.append(server)
        yield servers[0], servers[1]


def test_a_circle(folder: Path) -> None:
    """It is refused with what it is, and nothing of it is left anywhere."""
    with two(folder) as (a, b):
        back = {"pass.driver": "plugin", "pass.plugin": "a"}
        with at_once(5), pytest.raises(PluginError) as caught:
            a.client.create("v", {"driver": "plugin", "plugin": "b", **back})
        assert "this volplugin asks itself" in str(caught.value)
        assert "give that volume another plugin" in str(caught.value)
        for server in (a, b):
            assert server.client.list() == {}
            place = server.root / "plugin"
            assert list(place.glob("adopted/*")) == []
            assert list(place.glob("claims/*/*")) == []
        a.client.create("v", {"driver": "plugin", "plugin": "b"})
        path = Path(a.client.mount("v", "id"))
        (path / "file").write_text("x")
        assert (Path(b.client.path("v")) / "file").read_text() == "x"
        a.client.unmount("v", "id")
        a.client.remove("v")
        assert b.client.list() == {}


def test_a_circle_of_adopted_volumes(folder: Path) -> None:
    """It can be made, as each half is right; the mount says what it is."""
    with two(folder) as (a, b):
        a.client.create("x")
        b.client.create("y", {"driver": "plugin", "plugin": "a", "adopt": "x"})
        a.client.create("z", {"driver": "plugin", "plugin": "b", "adopt": "y"})
        with at_once(5), pytest.raises(PluginError, match="asks itself"):
            a.client.mount("z", "id")
        path = Path(b.client.mount("y", "id"))
        (path / "file").write_text("x")
        assert (Path(a.client.path("x")) / "file").read_text() == "x"
        b.client.unmount("y", "id")
        a.client.remove("z")
        b.client.remove("y")
        a.client.remove("x")


def test_itself(folder: Path) -> None:
    """By whatever name it finds its own socket, it is refused at once."""
    sockets = folder / "s"
    own = sockets / "own.sock"
    server = Plugin(folder, socket=own, config=configuration(folder))
    try:
        server.start()
        (sockets / "link.sock").symlink_to(own)
        (sockets / "moved.sock").hardlink_to(own)
        (sockets / "url.spec").write_text(f"unix://{own}\n")
        (sockets / "file.json").write_text(json.dumps({"Addr": f"unix://{own}"}))
        command = [sys.executable, "-m", "volplugin", "volume", "adopt", "--list"]
        command += ["--admin-socket", str(server.admin_socket)]
        for name in ("own", "link", "moved", "url", "file"):
            words = {"driver": "plugin", "plugin": name}
            for more in ({}, {"adopt": "v"}, {"pass.driver": "plugin"}):
                with at_once(), pytest.raises(PluginError, match="is this volplugin i"):
                    server.client.create("v", {**words, **more})
        status, _, told = run([*command, "--driver", "plugin=link"])
        assert status == 1
        assert "is this volplugin itself" in told
        assert server.client.list() == {}
        assert list((server.root / "plugin").glob("*/*")) == []
    finally:
        (sockets / "moved.sock").unlink(missing_ok=True)
        server.close()


def test_a_way_of_several_lines(shared: World) -> None:
    """A proxy may add a line of its own above or below."""
    shared.create("v")
    own = shared.bad.calls[0].via.split()[-1]
    for lines in (["1.1 proxy", f"1.1 {own}"], [f"1.1 {own}", "1.1 proxy"]):
        headers = "Host: \r\n" + "".join(f"Via: {line}\r\n" for line in lines)
        wire = Wire(shared.server.socket)
        wire.send(post("Get", b'{"Name":"v"}', headers=headers))
        answer = wire.answer()
        wire.close()
        assert answer is not None
        assert answer.status == 500
        assert "this volplugin asks itself" in answer.json["Err"]


# The command


def test_the_list(shared: World) -> None:
    """All that the plugin has, with what each is here."""
    assert shared.adopt("--list") == (0, "VOLUME  ADOPTED AS\n", "")
    shared.there("photos")
    shared.there("a")
    shared.create("ours")
    assert shared.adopt("photos", "--as", "holiday") == (0, "holiday\n", "")
    assert shared.adopt("--list") == (
        0,
        "VOLUME  ADOPTED AS\na\nours    ours\nphotos  holiday\n",
        "",
    )
    shared.server.client.remove("holiday")
    assert shared.adopt("--list")[1].endswith("\nphotos\n")
    shared.bad.fail("List", "error", "not now")
    assert shared.adopt("--list") == (
        1,
        "",
        "volplugin: adopt from plugin=bad: plugin bad: List: not now\n",
    )


def test_adopting(shared: World) -> None:
    """Its content is there by the same name; a removal leaves it at the plugin."""
    (shared.there("photos") / "file").write_text("x")
    assert shared.adopt("photos") == (0, "photos\n", "")
    assert shared.adopt("photos") == (0, "photos\n", "")
    shared.create("photos", adopt="photos")
    path = Path(shared.server.client.mount("photos", "id"))
    assert (path / "file").read_text() == "x"
    assert shared.status("photos")["adopted"]
    shared.server.client.unmount("photos", "id")
    shared.server.client.remove("photos")
    assert shared.bad.volumes() == ["photos"]
    assert shared.bad.count("Create", "Remove") == 0


def test_adopting_several(shared: World) -> None:
    """Of several, and of all, each that can be is; status and stderr tell the rest."""
    for name in ("a", "b", "c", "no name", "z"):
        shared.there(name)
    assert shared.adopt("b", "a") == (0, "b\na\n", "")
    status, shown, told = shared.adopt("--all")
    assert (status, shown) == (1, "c\nz\n")
    assert told.startswith("volplugin: adopt no name: ")
    assert len(told.splitlines()) == 1
    assert set(shared.server.client.list()) == {"a", "b", "c", "z"}
    assert shared.adopt("no name", "--as", "name") == (0, "name\n", "")
    assert shared.adopt("--all") == (0, "", "")
    shared.server.client.remove("name")


def test_adopting_in_vain(shared: World) -> None:
    """The error says what is wrong and what to do; nothing is changed."""
    shared.there("photos")
    shared.create("ours")
    shared.server.client.create("local")
    for words, driver, reason in (
        (["photo"], "plugin=bad", "no volume 'photo' to adopt; did you mean 'photos'"),
        (["photos", "--as", "local"], "plugin=bad", "driver is local, asked for plug"),
        (["photos", "--as", "../x"], "plugin=bad", "a name begins with a letter"),
        (["photos", "--as", ""], "plugin=bad", "a name begins with a letter"),
        (["ours", "--as", "again"], "plugin=bad", "is 'ours' of plugin bad already"),
        (["photos"], "plugin=bat", "there is no plugin 'bat'; did you mean 'bad'"),
        (["photos"], "plugin", "plugin is missing: say which one"),
        (["photos"], "plugin=../bad", "is no plugin's name"),
        (["photos"], "plugins=bad", "driver=plugins: there is no such driver"),
        (["photos"], "local", "driver local adopts nothing by list"),
        (["photos"], "tmpfs=bad", "driver tmpfs adopts nothing by list"),
    ):
        status, shown, told = shared.adopt(*words, driver=driver)
        assert (status, shown) == (1, ""), words
        assert reason in told
        assert told.startswith(f"volplugin: adopt {words[0]}: "), told
    assert set(shared.server.client.list()) == {"ours", "local"}
    assert shared.bad.volumes() == ["ours", "photos"]


# Deaths


def test_a_death_while_it_is_held(world: World) -> None:
    """The next life has the mount, its holders, and the ID to unmount by."""
    world.create("v")
    path = Path(world.server.client.mount("v", "id"))
    (path / "file").write_text("x")
    with (path / "open").open("w") as file:
        world.server.kill()
        world.server.start()
        file.write("still")
    assert (path / "file").read_text() == "x"
    assert world.server.client.mount("v", "other") == str(path)
    assert world.status("v")["mounts"] == 2
    assert world.bad.count("Mount", "Unmount") == 1
    world.server.client.unmount("v", "id")
    world.server.client.unmount("v", "other")
    assert world.bad.held == {"v": []}


@pytest.mark.parametrize("done", [True, False])
def test_a_death_while_it_hangs(world: World, *, done: bool) -> None:
    """The next life serves at once; what hung is settled when the plugin answers."""
    world.create("mounted")
    world.create("removed")
    world.bad.fail("*", "hang", after=done)
    with ThreadPoolExecutor(3) as pool:
        hanging: list[Future[Any]] = [
            pool.submit(world.server.client.mount, "mounted", "id"),
            pool.submit(world.server.client.remove, "removed"),
        ]
        eventually(lambda: world.bad.count("Mount", "Remove") == 2, "they hang")
        world.bad.fail("Create", "hang", after=done)
        world.bad._faults.pop("*")
        hanging.append(pool.submit(world.create, "made"))
        eventually(lambda: world.bad.count("Create") == 3, "it hangs")
        world.bad.fail("*", "hang")
        world.server.kill()
        for each in hanging:
            with pytest.raises(OSError, match=r"closed|reset|Reset"):
                each.result()
    with at_once(5):
        world.server.start()
    with at_once():
        assert set(world.server.client.list()) == {"mounted", "removed"}
    world.bad.heal()
    eventually(
        lambda: set(world.server.client.list()) == {"mounted"}, "the removal goes on"
    )
    eventually(lambda: world.bad.volumes() == ["mounted"], "the create is undone")
    eventually(lambda: not world.bad.held.get("mounted"), "the mount is taken back")
    notes = world.server.root / "plugin" / "mounts"
    eventually(lambda: not os.listdir(notes), "and forgotten")
    path = Path(world.server.client.mount("mounted", "again"))
    (path / "file").touch()
    world.server.client.unmount("mounted", "again")


def test_a_plugin_that_is_not_there_at_start(world: World) -> None:
    """Its volumes are known, and work when it comes."""
    world.create("v")
    world.server.stop()
    world.bad.stop()
    with at_once(5):
        world.server.start()
    assert list(world.server.client.list()) == ["v"]
    assert world.status("v")["plugin-health"] != "ok"
    with at_once(5), pytest.raises(PluginError, match="there is no plugin 'bad'"):
        world.server.client.mount("v", "id")
    world.bad.start()
    world.server.client.mount("v", "id")
    world.server.client.unmount("v", "id")


def test_recover(world: World) -> None:
    """A lost store is rebuilt from the notes: what was made, and what was adopted."""
    (world.there("theirs") / "file").write_text("x")
    world.create("made", size="1g")
    world.create("adopted", adopt="theirs")
    before = {name: world.server.client.get(name) for name in ("made", "adopted")}
    world.server.stop()
    shutil.rmtree(world.server.root / "store")
    world.server.start(wait=False)
    assert world.server.wait() == 78
    assert "volplugin recover" in world.server.log
    status, shown, told = run(world.server.command("recover"))
    assert status == 0, told
    assert "made" in shown + told
    world.server.start()
    for name, known in before.items():
        found = world.server.client.get(name)
        for key in ("Name", "Mountpoint", "CreatedAt"):
            assert found[key] == known[key]
    world.create("made", size="1g")
    path = Path(world.server.client.mount("adopted", "id"))
    assert (path / "file").read_text() == "x"
    world.server.client.unmount("adopted", "id")
    world.server.client.remove("adopted")
    world.server.client.remove("made")
    assert world.bad.volumes() == ["theirs"]
    assert world.bad.count("Create") == 1


def test_a_removal_that_the_plugin_refuses(shared: World) -> None:
    """The volume stays as it was."""
    shared.create("v")
    shared.bad.fail("Remove", "error", "it has snapshots")
    with pytest.raises(PluginError, match="plugin bad: Remove: it has snapshots"):
        shared.server.client.remove("v")
    shared.server.client.mount("v", "id")
    shared.server.client.unmount("v", "id")
    assert list(shared.server.client.list()) == ["v"]
    assert shared.bad.volumes() == ["v"]


# What is left to the plugin


def disown(world: World, name: str) -> tuple[int, str, str]:
    """Run the real command; return its status and what it printed."""
    return run(world.server.operate("volume", "disown", name))


def test_disowning(shared: World) -> None:
    """A volume that was made here stays at the plugin when it is removed here."""
    shared.create("v")
    for _ in range(2):
        assert disown(shared, "v") == (0, "v: its plugin's own\n", "")
    assert "adopted" in shared.status("v")
    path = Path(shared.server.client.mount("v", "id"))
    (path / "file").write_text("kept")
    shared.server.client.unmount("v", "id")
    shared.server.client.remove("v")
    assert shared.bad.count("Remove") == 0
    assert (Path(shared.bad.path("v")) / "file").read_text() == "kept"
    shared.server.client.create("v", {**OPTIONS, "adopt": "v"})


def test_a_plugin_that_is_gone_for_good(world: World) -> None:
    """Its volumes can be removed once they are left to it, mounted ones too."""
    world.create("v")
    world.create("held")
    world.server.client.mount("held", "id")
    world.bad.stop()
    for name in ("v", "held"):
        assert disown(world, name)[0] == 0
    with pytest.raises(PluginError, match="in use"):
        world.server.client.remove("held")
    with pytest.raises(PluginError, match=r"no plugin 'bad'|is down since"):
        world.server.client.unmount("held", "id")
    for name in ("v", "held"):
        world.server.client.remove(name)
    assert world.server.client.list() == {}
    assert mounts_below(world.folder) == []
    world.bad.forget()
    world.bad.start()
    assert world.bad.volumes() == ["held", "v"]


def test_disowning_outlives_the_store(world: World) -> None:
    """`recover` knows that the volume is its plugin's own."""
    world.create("v")
    assert disown(world, "v")[0] == 0
    world.server.kill()
    shutil.rmtree(world.server.root / "store")
    status, _, error = run(world.server.command("recover"))
    assert status == 0, error
    world.server.start()
    world.server.client.remove("v")
    assert world.bad.volumes() == ["v"]


def test_disowning_in_vain(shared: World) -> None:
    """Of a volume that is volplugin's own, or of none, nothing is changed."""
    shared.server.client.create("own")
    status, _, error = disown(shared, "own")
    assert status == 1
    assert "is volplugin's own" in error
    status, _, error = disown(shared, "none")
    assert status == 1
    assert "no such volume" in error
