"""The driver ``plugin``: what it asks of another plugin, and what it believes."""

import asyncio
import contextlib
import itertools
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import attrs
import pytest
from driver_cases import cleaned
from support.bad_plugin import BadPlugin
from support.rclone import Rclone
from support.wait import eventually

from volplugin import failpoints, options
from volplugin.backends import THREADS, Backend
from volplugin.drivers import plugin_mounting
from volplugin.drivers.driver import Held, Spec
from volplugin.drivers.plugin import Plugin
from volplugin.drivers.plugin_options import PluginConfig, PluginOptions
from volplugin.errors import (
    AlreadyExists,
    InUse,
    InvalidArgument,
    Unavailable,
    VolpluginError,
)
from volplugin.host import mountinfo
from volplugin.model import State, Volume
from volplugin.plugins.client import Lost
from volplugin.store import records

pytestmark = pytest.mark.root

NAME: Final = "bad"
LOST: Final = ("close", "reset", "cut-error", "half")
REFUSED: Final = ("error", "text", "refusal", "redirect")
_numbers = itertools.count(1)


@attrs.frozen
class World:
    """A backend's place, and the folder ``s`` of the plugins that it finds."""

    folder: Path

    def driver(self, **settings: Any) -> Plugin:
        """Begin a life of the backend on the same place."""
        config = PluginConfig(
            sockets=(f"{self.folder}/s",),
            specs=(),
            time_limit=settings.pop("time_limit", 5),
            **settings,
        )
        driver = Plugin(config, f"{self.folder}/place")
        driver.open()
        return driver

    def mounts(self) -> list[str]:
        """Return where something is mounted in the backend's place."""
        table = mountinfo.read()
        place = f"{self.folder}/place"
        return [mount.mountpoint for mount in mountinfo.below(place, table)]

    def notes(self) -> list[str]:
        """Return the notes of mounts."""
        return os.listdir(self.folder / "place" / "mounts")

    def claims(self) -> list[str]:
        """Return what is claimed, of all plugins."""
        return [path.name for path in self.folder.glob("place/claims/*/*")]


def spec_of(driver: Plugin, name: str, **asked: str) -> Spec:
    """Plan a volume, of the bad plugin by default; it is *creating*."""
    raw = {"plugin": NAME, **{key.replace("__", "."): v for key, v in asked.items()}}
    parsed = options.parse(PluginOptions, raw, subject="driver plugin")
    volume_id = f"{next(_numbers):032x}"
    plan = driver.plan(name, volume_id, parsed)
    volume = Volume(
        name=name,
        id=volume_id,
        backend="plugin",
        driver="plugin",
        options=raw,
        facts=plan.facts,
        mountpoint=plan.mountpoint,
        created_at="2024-01-01T00:00:00.000Z",
    )
    record = records.encode(attrs.evolve(volume, state=State.READY))
    return Spec(volume=volume, options=parsed, record=record)


def in_state(spec: Spec, state: State) -> Spec:
    """Return the volume in another state of its life."""
    return attrs.evolve(spec, volume=attrs.evolve(spec.volume, state=state))


def made(driver: Plugin, name: str, **asked: str) -> Spec:
    """Make a volume; it is *ready*."""
    spec = spec_of(driver, name, **asked)
    driver.create(spec)
    return in_state(spec, State.READY)


def removed(driver: Plugin, spec: Spec) -> None:
    """Remove a volume as the core does."""
    driver.remove(in_state(spec, State.REMOVING))


def undone(driver: Plugin, spec: Spec) -> None:
    """Undo a create as the core does."""
    driver.remove(in_state(spec, State.CREATING))


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """A place in which nothing stays mounted or immutable."""
    (tmp_path / "s").mkdir()
    with cleaned(tmp_path):
        yield World(tmp_path)
    failpoints.arm("")


@pytest.fixture
def bad(world: World) -> Iterator[BadPlugin]:
    """The bad plugin, which behaves well until it is told otherwise."""
    with listening(world, NAME) as plugin:
        yield plugin


@contextlib.contextmanager
def listening(world: World, name: str) -> Iterator[BadPlugin]:
    """A bad plugin of this name."""
    plugin = BadPlugin(world.folder / f"there-{name}", f"{world.folder}/s/{name}.sock")
    plugin.start()
    try:
        yield plugin
    finally:
        plugin.close()


def has_nothing(world: World) -> bool:
    """Tell whether the backend's place has nothing of any volume."""
    place = world.folder / "place"
    folders = {"mounts", "expected", "claims", "adopted"}
    left = {path.name for path in place.iterdir()} - folders
    for folder in ("adopted", "expected"):
        left |= {path.name for path in place.glob(f"{folder}/*")}
    return not (left or world.notes() or world.claims())


# Create


def test_what_the_plugin_has_already(world: World, bad: BadPlugin) -> None:
    """A volume of the name is not taken for ours; the error says how to make it so."""
    driver = world.driver()
    Path(bad.path("v")).mkdir()
    (Path(bad.path("v")) / "theirs").write_text("x")
    spec = spec_of(driver, "v", size="1g")
    with pytest.raises(AlreadyExists, match="that volplugin did not make: adopt it"):
        driver.create(spec)
    undone(driver, spec)
    assert (Path(bad.path("v")) / "theirs").read_text() == "x"
    assert bad.count("Create", "Remove", "Mount", "Unmount") == 0
    assert has_nothing(world)


@pytest.mark.parametrize("kind", REFUSED)
def test_a_create_that_is_refused(world: World, bad: BadPlugin, kind: str) -> None:
    """It leads to no Remove: whatever has the name there then is another's."""
    driver = world.driver()
    bad.fail("Create", kind)
    spec = spec_of(driver, "v")
    with pytest.raises(Unavailable, match=r"plugin bad: Create: (it can't|status)"):
        driver.create(spec)
    bad.heal()
    Path(bad.path("v")).mkdir()
    undone(world.driver(), spec)
    assert bad.volumes() == ["v"]
    assert bad.count("Remove") == 0
    assert bad.count("Create") == 1
    assert has_nothing(world)


@pytest.mark.parametrize("done", [True, False])
@pytest.mark.parametrize("kind", LOST)
def test_a_create_that_is_lost(
    world: World, bad: BadPlugin, kind: str, *, done: bool
) -> None:
    """It is undone there, done or not, as soon as the plugin answers."""
    driver = world.driver()
    spec = spec_of(driver, "v")
    bad.fail("Create", kind, after=done)
    with pytest.raises(Lost):
        driver.create(spec)
    assert bad.count("Create") == 1
    assert bad.volumes() == (["v"] if done else [])
    bad.fail("*", "close")
    with pytest.raises(Unavailable):
        undone(driver, spec)
    assert world.claims() == ["=v"]
    bad.heal()
    undone(world.driver(), spec)
    assert bad.volumes() == []
    assert bad.count("Create") == 1
    assert has_nothing(world)


def test_a_create_that_hangs(world: World, bad: BadPlugin) -> None:
    """It ends at the limit, and is undone."""
    driver = world.driver(time_limit=0.3)
    spec = spec_of(driver, "v")
    bad.fail("Create", "hang", after=True)
    begun = time.monotonic()
    with pytest.raises(Lost, match=r"no answer within 0\.3 s"):
        driver.create(spec)
    assert time.monotonic() - begun < 1.5
    bad.heal()
    undone(driver, spec)
    assert bad.volumes() == []
    assert has_nothing(world)


def test_a_create_that_is_carried_on(world: World, bad: BadPlugin) -> None:
    """What was lost is found by the next try, and not made twice."""
    driver = world.driver()
    spec = spec_of(driver, "v", a="b")
    bad.fail("Create", "close", after=True)
    with pytest.raises(Lost):
        driver.create(spec)
    bad.heal()
    world.driver().create(spec)
    assert bad.count("Create") == 1
    removed(driver, spec)
    assert bad.volumes() == []


def test_a_plugin_that_tells_nothing(world: World, bad: BadPlugin) -> None:
    """A create without knowing whether the name is taken is none."""
    driver = world.driver()
    bad.fail("Get", "error")
    bad.fail("List", "error")
    spec = spec_of(driver, "v")
    with pytest.raises(Unavailable, match="does not tell whether it has 'v'"):
        driver.create(spec)
    undone(driver, spec)
    assert bad.count("Create", "Remove") == 0
    assert has_nothing(world)


def test_what_the_plugin_gets(world: World, bad: BadPlugin) -> None:
    """The backend's options, those of the volume above them, and words of ours."""
    driver = world.driver(
        plugin=NAME, prefix="vp-", default_options=(("fs", "ext4"), ("size", "1g"))
    )
    spec = made(driver, "v", size="2g", pass__plugin="x", pass__help="", empty="")
    assert bad.volumes() == ["vp-v"]
    assert bad.made["vp-v"] == {
        "fs": "ext4",
        "size": "2g",
        "plugin": "x",
        "help": "",
        "empty": "",
    }
    assert spec.volume.facts == {"plugin": NAME, "name": "vp-v"}
    driver.attach(spec)
    assert driver.status(spec.volume, spec.options, attached=True) == {
        "plugin": NAME,
        "name-there": "vp-v",
        "plugin-health": "ok",
    }
    driver.detach(spec)
    removed(driver, spec)
    assert {call.name for call in bad.calls} == {"vp-v", ""}
    assert bad.volumes() == []


def test_words_that_contradict(world: World, bad: BadPlugin) -> None:
    """One word with two values is refused, and one with one is not."""
    driver = world.driver()
    with pytest.raises(InvalidArgument, match=r"options size and pass\.size"):
        spec_of(driver, "v", size="1g", pass__size="2g")
    spec = made(driver, "v", size="1g", pass__size="1g")
    assert bad.made["v"] == {"size": "1g"}
    removed(driver, spec)


def test_the_plugin_is_named(world: World, bad: BadPlugin) -> None:
    """By the volume or by its backend; else the error names those that there are."""
    parsed = options.parse(PluginOptions, {}, subject="driver plugin")
    with pytest.raises(InvalidArgument, match=r"plugin is missing: .*; there are bad"):
        world.driver().plan("v", "1", parsed)
    plan = world.driver(plugin=NAME).plan("v", "1", parsed)
    assert plan.facts == {"plugin": NAME, "name": "v"}
    for name, reason in (("bat", "did you mean 'bad'"), ("../s/bad", "no plugin's n")):
        with pytest.raises(InvalidArgument, match=reason):
            spec_of(world.driver(), "v", plugin=name)
    assert bad.calls == []


def test_a_plugin_that_restarts(world: World, bad: BadPlugin) -> None:
    """A create waits for one that was there before, and for no other."""
    driver = world.driver()
    removed(driver, made(driver, "first"))
    bad.stop()
    starting = threading.Timer(0.3, bad.start)
    starting.start()
    spec = made(driver, "v")
    starting.join()
    assert bad.volumes() == ["v"]
    removed(driver, spec)
    bad.stop()
    with pytest.raises(InvalidArgument, match="there is no plugin 'bad'"):
        spec_of(world.driver(), "v")


# Adopt


def test_adopt(world: World, bad: BadPlugin) -> None:
    """Nothing is made there, and nothing is removed; its content is the volume's."""
    driver = world.driver()
    Path(bad.path("theirs")).mkdir()
    (Path(bad.path("theirs")) / "file").write_text("x")
    spec = made(driver, "ours", adopt="theirs")
    driver.create(spec)
    driver.attach(spec)
    assert (Path(spec.volume.mountpoint) / "file").read_text() == "x"
    status = driver.status(spec.volume, spec.options, attached=True)
    assert status["adopted"] == "kept by the plugin when it is removed here"
    driver.detach(spec)
    removed(driver, spec)
    assert bad.volumes() == ["theirs"]
    assert bad.count("Create", "Remove") == 0
    assert has_nothing(world)


def test_adopt_by_its_own_name(world: World, bad: BadPlugin) -> None:
    """Without a name it is that of the volume; the prefix is for those made here."""
    driver = world.driver(prefix="vp-")
    Path(bad.path("v")).mkdir()
    assert made(driver, "v", adopt="").volume.facts == {"plugin": NAME, "name": "v"}


def test_adopt_what_is_not_there(world: World, bad: BadPlugin) -> None:
    """The error names the nearest that is."""
    driver = world.driver()
    Path(bad.path("photos")).mkdir()
    spec = spec_of(driver, "v", adopt="photo")
    with pytest.raises(InvalidArgument) as caught:
        driver.create(spec)
    assert str(caught.value) == (
        "adopt=photo: plugin bad has no such volume; did you mean 'photos'?"
    )
    undone(driver, spec)
    assert has_nothing(world)


def test_adopt_with_options(world: World, bad: BadPlugin) -> None:
    """A volume that is there has its options already."""
    with pytest.raises(InvalidArgument, match="adopt takes a volume as it is, without"):
        spec_of(world.driver(), "v", adopt="theirs", size="1g")
    assert bad.calls == []


def test_adopt_what_is_ours(world: World, bad: BadPlugin) -> None:
    """One volume there is one here, whether it was made or adopted."""
    driver = world.driver()
    Path(bad.path("theirs")).mkdir()
    made_here = made(driver, "made")
    adopted = made(driver, "adopted", adopt="theirs")
    for name, owner in (("made", "made"), ("theirs", "adopted")):
        spec = spec_of(driver, "second", adopt=name)
        wanted = f"volume '{owner}' is '{name}' of plugin bad already"
        with pytest.raises(AlreadyExists, match=wanted):
            driver.create(spec)
        undone(driver, spec)
    assert bad.volumes() == ["made", "theirs"]
    assert sorted(world.claims()) == ["=made", "=theirs"]
    removed(driver, adopted)
    second = made(driver, "second", adopt="theirs")
    removed(driver, second)
    removed(driver, made_here)
    assert bad.volumes() == ["theirs"]
    assert has_nothing(world)


def test_adopt_at_the_same_time(world: World, bad: BadPlugin) -> None:
    """Of many that want it one has it."""
    driver = world.driver()
    Path(bad.path("theirs")).mkdir()
    specs = [spec_of(driver, f"v{number}", adopt="theirs") for number in range(8)]

    def adopt(spec: Spec) -> bool:
        try:
            driver.create(spec)
        except AlreadyExists:
            undone(driver, spec)
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(adopt, specs))
    assert sorted(outcomes) == [False] * 7 + [True]
    assert world.claims() == ["=theirs"]
    removed(driver, specs[outcomes.index(True)])
    assert has_nothing(world)
    assert bad.volumes() == ["theirs"]


def test_names_that_only_others_allow(world: World, bad: BadPlugin) -> None:
    """They are adopted under names of ours, each its own."""
    driver = world.driver()
    long = "x" * 250
    names = ["a/b", "a%2Fb", "../x", ".", "é ü", f"{long}1", f"{long}2", "=a"]
    listed = [{"Name": name} for name in names]
    bad.fail("List", "answer", {"Volumes": listed})
    parsed = options.parse(PluginOptions, {"plugin": NAME}, subject="driver plugin")
    assert [held.name for held in driver.adoptable(parsed)] == names
    specs = [
        made(driver, f"v{number}", adopt=name) for number, name in enumerate(names)
    ]
    assert len(world.claims()) == len(names)
    assert all(len(claim) < 255 for claim in world.claims())
    with pytest.raises(AlreadyExists, match="volume 'v5' is 'xxx"):
        driver.create(spec_of(driver, "again", adopt=f"{long}1"))
    undone(driver, spec_of(driver, "again", adopt=f"{long}1"))
    for spec in specs:
        removed(driver, spec)
    assert world.claims() == []


def test_what_could_be_adopted(world: World, bad: BadPlugin) -> None:
    """All that the plugin has, with the words and facts that a volume then has."""
    driver = world.driver(plugin=NAME)
    Path(bad.path("theirs")).mkdir()
    ours = made(driver, "ours")
    parsed = options.parse(PluginOptions, {}, subject="driver plugin")
    words = {"plugin": NAME, "adopt": "theirs"}
    facts = {"plugin": NAME, "name": "theirs"}
    found = list(driver.adoptable(parsed))
    assert found[1] == Held(name="theirs", options=words, facts=facts)
    assert found[0].facts == ours.volume.facts
    bad.fail("List", "error", "not now")
    with pytest.raises(Unavailable, match="plugin bad: List: not now"):
        driver.adoptable(parsed)


def test_what_is_found_again(world: World, bad: BadPlugin) -> None:
    """A lost store finds the records of what was made and of what was adopted."""
    driver = world.driver()
    Path(bad.path("theirs")).mkdir()
    specs = [made(driver, "a"), made(driver, "b", adopt="theirs")]
    found = [each.record for each in world.driver().discover()]
    assert found == [spec.record for spec in specs]
    assert [each.record for each in driver.discover({"a"})] == [specs[1].record]
    for spec in specs:
        removed(driver, spec)
    assert list(driver.discover()) == []


# Attach


def test_one_mount(world: World, bad: BadPlugin) -> None:
    """The plugin is asked once; a mount that is alive is kept without a question."""
    driver = world.driver()
    spec = made(driver, "v")
    driver.attach(spec)
    (Path(spec.volume.mountpoint) / "file").write_text("x")
    bad.calls.clear()
    bad.fail("*", "close")
    for each in (driver, world.driver()):
        each.attach(spec)
    assert bad.calls == []
    assert world.mounts() == [spec.volume.mountpoint]
    assert (Path(bad.path("v")) / "file").read_text() == "x"
    bad.heal()
    driver.detach(spec)
    driver.detach(spec)
    assert bad.verbs() == ["Unmount"]
    assert bad.held == {"v": []}
    assert world.notes() == []


def test_one_id_a_volume(world: World, bad: BadPlugin) -> None:
    """It is the same for life, whatever was forgotten, and no other volume's."""
    driver = world.driver()
    for name in ("v", "w"):
        spec = made(driver, name)
        for _ in range(2):
            driver.attach(spec)
            driver.detach(spec)
    calls = [call for call in bad.calls if call.verb in {"Mount", "Unmount"}]
    ids = [call.message["ID"] for call in calls]
    assert [len(set(ids[:4])), len(set(ids[4:])), len(set(ids))] == [1, 1, 2]
    assert all(len(each) == 64 for each in ids)


@pytest.mark.parametrize("point", ["mount", "mounted", "bound"])
def test_an_attach_that_dies(world: World, bad: BadPlugin, point: str) -> None:
    """The note outlives it: the next life unmounts by the ID that was used."""
    spec = made(world.driver(), "v")
    failpoints.arm(f"plugin.{point}=error:5*1")
    with pytest.raises(OSError, match="Input/output"):
        world.driver().attach(spec)
    assert len(world.notes()) == 1
    assert bool(bad.held.get("v")) is (point != "mount")
    driver = world.driver()
    driver.detach(spec)
    assert bad.held.get("v", []) == []
    assert world.notes() == []
    assert world.mounts() == []
    driver.attach(spec)
    assert len(bad.held["v"]) == 1


@pytest.mark.parametrize("point", ["mount", "mounted"])
def test_an_attach_after_one_that_died(
    world: World, bad: BadPlugin, point: str
) -> None:
    """It takes back what the other left before it begins."""
    spec = made(world.driver(), "v")
    failpoints.arm(f"plugin.{point}=error:5*1")
    with pytest.raises(OSError, match="Input/output"):
        world.driver().attach(spec)
    world.driver().attach(spec)
    assert len(bad.held["v"]) == 1
    assert world.mounts() == [spec.volume.mountpoint]


@pytest.mark.parametrize("point", ["unbind", "unmount", "unmounted"])
def test_a_detach_that_dies(world: World, bad: BadPlugin, point: str) -> None:
    """The next life carries it on; an ID that was unmounted already is no trouble."""
    driver = world.driver()
    spec = made(driver, "v")
    driver.attach(spec)
    failpoints.arm(f"plugin.{point}=error:5*1")
    with pytest.raises(OSError, match="Input/output"):
        driver.detach(spec)
    assert len(world.notes()) == 1
    driver = world.driver()
    driver.detach(spec)
    assert bad.held == {"v": []}
    assert world.notes() == []
    assert world.mounts() == []


def test_a_mount_that_is_refused(world: World, bad: BadPlugin) -> None:
    """It may be for an older Mount: that is taken back; the first words are told."""
    driver = world.driver()
    spec = made(driver, "v")
    bad.fail("Mount", "error", "no such disk")
    with pytest.raises(Unavailable, match=r"^plugin bad: Mount: no such disk$"):
        driver.attach(spec)
    verbs = [verb for verb in bad.verbs() if verb in {"Mount", "Unmount"}]
    assert verbs == ["Mount", "Unmount"]
    driver.detach(spec)
    assert bad.count("Unmount") == 1
    assert world.notes() == []
    bad.heal()
    driver.attach(spec)


def test_a_mount_that_no_note_tells_of(world: World, bad: BadPlugin) -> None:
    """A power cut took the note: what is mounted there is taken back and made anew."""
    driver = world.driver()
    spec = made(driver, "v")
    failpoints.arm("plugin.mounted=error:5*1")
    with pytest.raises(OSError, match="Input/output"):
        driver.attach(spec)
    (note,) = world.notes()
    (world.folder / "place" / "mounts" / note).unlink()
    driver.attach(spec)
    assert len(bad.held["v"]) == 1
    driver.detach(spec)
    assert bad.held["v"] == []


def test_a_removal_of_what_no_note_says_is_mounted(
    world: World, bad: BadPlugin
) -> None:
    """The plugin refuses it as mounted: it is unmounted there, and then removed."""
    driver = world.driver()
    spec = made(driver, "v")
    failpoints.arm("plugin.mounted=error:5*1")
    with pytest.raises(OSError, match="Input/output"):
        driver.attach(spec)
    (note,) = world.notes()
    (world.folder / "place" / "mounts" / note).unlink()
    removed(driver, spec)
    assert bad.volumes() == []


def test_a_mount_that_was_not_sent(world: World, bad: BadPlugin) -> None:
    """There is nothing to take back: the plugin is not waited for twice."""
    driver = world.driver(time_limit=0.2)
    spec = made(driver, "v")
    for kind in ("stop", "close", "error"):
        if kind == "stop":
            bad.stop()
        else:
            bad.fail("Activate", kind)
        with pytest.raises(Unavailable, match=r"no plugin 'bad'|Activate|not ready"):
            driver.attach(spec)
        assert world.notes() == []
        driver.detach(spec)
        bad.heal()
        if kind == "stop":
            bad.start()
    assert bad.count("Mount", "Unmount") == 0
    driver.attach(spec)


@pytest.mark.parametrize("done", [True, False])
@pytest.mark.parametrize("kind", LOST)
def test_a_mount_that_is_lost(
    world: World, bad: BadPlugin, kind: str, *, done: bool
) -> None:
    """It is taken back and made again, by the one ID."""
    driver = world.driver()
    spec = made(driver, "v")
    bad.fail("Mount", kind, after=done)
    with pytest.raises(Lost):
        driver.attach(spec)
    assert bad.count("Mount") == 1
    assert len(world.notes()) == 1
    assert world.mounts() == []
    bad.heal()
    driver.attach(spec)
    assert len(bad.held["v"]) == 1
    calls = [call for call in bad.calls if call.verb in {"Mount", "Unmount"}]
    ids = [call.message.get("ID") for call in calls]
    assert [call.verb for call in calls] == ["Mount", "Unmount", "Mount"]
    assert ids[0] in {ids[1], None}
    assert ids[1] == ids[2]


def test_what_was_removed_there(world: World, bad: BadPlugin) -> None:
    """The error says so; the removal here is success."""
    driver = world.driver()
    spec = made(driver, "v")
    Path(bad.path("v")).rmdir()
    with pytest.raises(Unavailable, match="has no volume 'v' any more; make it"):
        driver.attach(spec)
    removed(driver, spec)
    assert has_nothing(world)


def lies(world: World, bad: BadPlugin) -> Mapping[str, object]:
    """Return what a plugin could answer to Mount, by a word for it."""
    folder = world.folder
    (folder / "file").write_text("x")
    (folder / "dangling").symlink_to("nowhere")
    (folder / "to-file").symlink_to("file")
    (folder / "to-root").symlink_to("/")
    (folder / "to-place").symlink_to("place")
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")
    return {
        "nothing": {},
        "null": {"Mountpoint": None},
        "number": {"Mountpoint": 5},
        "empty": {"Mountpoint": ""},
        "relative": {"Mountpoint": "s"},
        "here": {"Mountpoint": "."},
        "root": {"Mountpoint": "/"},
        "slashes": {"Mountpoint": "///"},
        "root's dot": {"Mountpoint": "/."},
        "root's dots": {"Mountpoint": "/.."},
        "dots": {"Mountpoint": f"{bad.folder}/.."},
        "missing": {"Mountpoint": f"{folder}/missing"},
        "missing deep": {"Mountpoint": f"{folder}/missing/deep"},
        "file": {"Mountpoint": f"{folder}/file"},
        "in a file": {"Mountpoint": f"{folder}/file/x"},
        "pipe": {"Mountpoint": f"{folder}/pipe"},
        "null device": {"Mountpoint": "/dev/null"},
        "dangling": {"Mountpoint": f"{folder}/dangling"},
        "link to a file": {"Mountpoint": f"{folder}/to-file"},
        "link to root": {"Mountpoint": f"{folder}/to-root"},
        "link to ours": {"Mountpoint": f"{folder}/to-place"},
        "loop": {"Mountpoint": f"{folder}/loop"},
        "NUL": {"Mountpoint": f"{folder}\0/v"},
        "half a character": {"Mountpoint": f"{folder}/\ud800"},
        "long": {"Mountpoint": "/" + "x" * 5000},
        "ours": {"Mountpoint": f"{folder}/place"},
        "in ours": {"Mountpoint": f"{folder}/place/mounts"},
        "above ours": {"Mountpoint": str(folder)},
    }


def test_lies(world: World, bad: BadPlugin, monkeypatch: pytest.MonkeyPatch) -> None:
    """No container is given what is no directory of a plugin; the mount is undone."""
    driver = world.driver()
    spec = made(driver, "v")
    mountpoint = spec.volume.mountpoint
    # What this process is in is no volume, whatever an empty path means.
    monkeypatch.chdir(bad.folder)
    for word, answer in lies(world, bad).items():
        bad.fail("Mount", "answer", answer, after=True)
        with pytest.raises(Unavailable, match=r"plugin bad answers Mount with|look at"):
            driver.attach(spec)
        assert world.mounts() == [], word
        driver.detach(spec)
        assert bad.held == {"v": []}, word
        assert world.notes() == [], word
        assert os.stat(mountpoint).st_mode & 0o7777 == 0, word
    bad.heal()
    driver.attach(spec)


def test_a_link_to_a_directory(world: World, bad: BadPlugin) -> None:
    """It is followed: what is bound, and looked at later, is where it leads."""
    driver = world.driver()
    spec = made(driver, "v")
    real, link = world.folder / "real", world.folder / "link"
    (real / "deep").mkdir(parents=True)
    link.symlink_to(real)
    for answer in (f"{link}", f"{link}/", f"{link}/deep", f"/{link}//deep/."):
        bad.fail("Mount", "answer", {"Mountpoint": answer}, after=True)
        driver.attach(spec)
        (Path(spec.volume.mountpoint) / "file").write_text("x")
        where = real / "deep" if "deep" in answer else real
        assert (where / "file").read_text() == "x"
        (where / "file").unlink()
        with mounted(where):
            bad.fail("Unmount", "error")
            with pytest.raises(Unavailable, match="Unmount: it can't"):
                driver.detach(spec)
        bad.heal()
        driver.detach(spec)
        assert bad.held == {"v": []}


@contextlib.contextmanager
def mounted(place: str | Path) -> Iterator[None]:
    """A file system on a directory."""
    subprocess.run(["mount", "-t", "tmpfs", "there", place], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", place], check=True)


# Detach


def test_a_busy_volume(world: World, bad: BadPlugin) -> None:
    """It stays attached; the plugin is not asked to unmount."""
    driver = world.driver()
    spec = made(driver, "v")
    driver.attach(spec)
    with (Path(spec.volume.mountpoint) / "file").open("w") as file:
        for call in (driver.detach, driver.remove):
            with pytest.raises(InUse, match="files open"):
                call(spec)
        file.write("x")
    assert bad.count("Unmount", "Remove") == 0
    assert (Path(bad.path("v")) / "file").read_text() == "x"
    driver.detach(spec)
    assert bad.held == {"v": []}


def test_mounts_below(world: World, bad: BadPlugin) -> None:
    """What is mounted in a volume goes with it."""
    driver = world.driver()
    spec = made(driver, "v")
    inner = Path(bad.path("v")) / "inner"
    inner.mkdir()
    with mounted(inner):
        driver.attach(spec)
        (Path(spec.volume.mountpoint) / "inner" / "file").touch()
        assert (inner / "file").exists()
        driver.detach(spec)
        assert world.mounts() == []
        assert (inner / "file").exists()


def test_an_unmount_that_is_refused(world: World, bad: BadPlugin) -> None:
    """While it is mounted there it is an error, to be tried again by the same ID."""
    driver = world.driver()
    spec = made(driver, "v")
    with mounted(bad.path("v")):
        driver.attach(spec)
        bad.fail("Unmount", "error", "it is busy")
        for each in (driver, world.driver()):
            with pytest.raises(Unavailable, match="plugin bad: Unmount: it is busy"):
                each.detach(spec)
        assert world.mounts() == []
        assert len(world.notes()) == 1
        for call in (driver.attach, driver.remove):
            with pytest.raises(Unavailable, match="it is busy"):
                call(spec)
        assert bad.count("Mount") == 1
        bad.heal()
        driver.detach(spec)
    ids = {c.message["ID"] for c in bad.calls if c.verb in {"Mount", "Unmount"}}
    assert len(ids) == 1
    assert bad.held == {"v": []}
    assert world.notes() == []


def test_a_plugin_that_has_forgotten(world: World, bad: BadPlugin) -> None:
    """It refuses an ID that it does not know, where nothing is mounted: success."""
    driver = world.driver()
    spec = made(driver, "v")
    driver.attach(spec)
    bad.forget()
    driver.detach(spec)
    assert bad.count("Unmount") == 1
    assert world.notes() == []
    driver.attach(spec)
    driver.detach(spec)


@pytest.mark.parametrize("kind", LOST)
def test_an_unmount_that_is_lost(world: World, bad: BadPlugin, kind: str) -> None:
    """The note stays until the plugin has said something."""
    driver = world.driver()
    spec = made(driver, "v")
    driver.attach(spec)
    bad.fail("Unmount", kind, after=True)
    with pytest.raises(Lost):
        driver.detach(spec)
    assert world.mounts() == []
    assert len(world.notes()) == 1
    assert bad.count("Unmount") == 1
    bad.heal()
    driver.detach(spec)
    assert world.notes() == []


# Remove


@pytest.mark.parametrize("kind", REFUSED)
def test_a_remove_that_is_refused(world: World, bad: BadPlugin, kind: str) -> None:
    """The volume stays here as it stays there, and can be removed later."""
    driver = world.driver()
    spec = made(driver, "v")
    bad.fail("Remove", kind)
    with pytest.raises(Unavailable, match=r"plugin bad: Remove: (it can't|status)"):
        removed(driver, spec)
    assert bad.volumes() == ["v"]
    assert world.claims() == ["=v"]
    bad.heal()
    driver.attach(spec)
    driver.detach(spec)
    removed(driver, spec)
    assert bad.volumes() == []
    assert has_nothing(world)


@pytest.mark.parametrize("kind", LOST)
def test_a_remove_that_is_lost(world: World, bad: BadPlugin, kind: str) -> None:
    """It is sent once and carried on later, though the volume has gone there."""
    driver = world.driver()
    spec = made(driver, "v")
    bad.fail("Remove", kind, after=True)
    with pytest.raises(Lost):
        removed(driver, spec)
    assert bad.count("Remove") == 1
    assert world.claims() == ["=v"]
    bad.heal()
    removed(world.driver(), spec)
    assert has_nothing(world)


def test_a_remove_without_the_plugin(world: World, bad: BadPlugin) -> None:
    """What was made there waits for it; what was adopted does not need it."""
    driver = world.driver(time_limit=0.2)
    Path(bad.path("theirs")).mkdir()
    spec, adopted = made(driver, "v"), made(driver, "w", adopt="theirs")
    bad.stop()
    with pytest.raises(Unavailable, match="there is no plugin 'bad'"):
        removed(driver, spec)
    removed(driver, adopted)
    assert world.claims() == ["=v"]
    bad.start()
    removed(driver, spec)
    assert bad.volumes() == ["theirs"]
    assert has_nothing(world)


# What Status shows


def test_the_status_asks_nobody(world: World, bad: BadPlugin) -> None:
    """It tells from memory how the plugin is, and what it does not list any more."""
    driver = world.driver()
    ours, gone = made(driver, "ours"), made(driver, "gone")
    Path(bad.path("gone")).rmdir()
    driver.measure([ours, gone])
    bad.calls.clear()
    assert dict(driver.status(ours.volume, ours.options, attached=False)) == {
        "plugin": NAME,
        "name-there": "ours",
        "plugin-health": "ok",
    }
    status = driver.status(gone.volume, gone.options, attached=False)
    assert status["missing"] == "plugin bad does not list it any more"
    later = world.driver()
    status = later.status(gone.volume, gone.options, attached=False)
    assert status["plugin-health"] == "not asked yet"
    assert "missing" not in status
    assert bad.calls == []


def test_what_is_missing_comes_back(world: World, bad: BadPlugin) -> None:
    """A list that fails tells nothing; the next that does not puts it right."""
    driver = world.driver(time_limit=0.2)
    spec = made(driver, "v")

    def status() -> Mapping[str, Any]:
        return driver.status(spec.volume, spec.options, attached=False)

    for kind, value in (
        ("error", "x"),
        ("answer", {"Volumes": "v"}),
        ("close", None),
        ("hang", None),
    ):
        bad.fail("List", kind, value)
        assert driver.measure([spec]) == {}
        assert "missing" not in status()
    assert status()["plugin-health"].startswith("down since 2")
    bad.fail("List", "answer", {"Volumes": None})
    driver.measure([spec])
    assert "missing" in status()
    assert status()["plugin-health"] == "ok"
    bad.fail("List", "close")
    driver.measure([spec])
    assert "missing" in status()  # as far as is known
    bad.heal()
    driver.measure([spec])
    assert "missing" not in status()


def test_one_that_is_down_is_measured_beside_others(world: World) -> None:
    """What one plugin does not tell is told of the others."""
    with listening(world, "down") as down, listening(world, "up") as up:
        driver = world.driver(time_limit=0.2)
        of_down = made(driver, "a", plugin="down")
        of_up = made(driver, "b", plugin="up")
        Path(up.path("b")).rmdir()
        down.fail("List", "hang")
        driver.measure([of_down, of_up])
        down.heal()
        status = driver.status(of_up.volume, of_up.options, attached=False)
        assert "missing" in status


# Plugins beside each other


def test_a_plugin_that_hangs_delays_no_other(world: World) -> None:
    """However many calls hang there, those of another have threads of their own."""
    with listening(world, "slow") as slow, listening(world, "quick") as quick:
        driver = world.driver(time_limit=2)
        specs = [made(driver, f"s{n}", plugin="slow") for n in range(THREADS + 4)]
        spec = made(driver, "q", plugin="quick")
        slow.fail("Mount", "hang")

        async def test() -> float:
            backend = Backend("plugin", driver)
            hanging = [
                asyncio.create_task(backend.run(driver.attach, each)) for each in specs
            ]
            async with asyncio.timeout(5):
                while slow.count("Mount") < THREADS:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            took = []
            for call in (driver.attach, driver.detach) * 3:
                begun = time.monotonic()
                await backend.run(call, spec)
                took.append(time.monotonic() - begun)
            begun = time.monotonic()
            plan = await backend.run(
                driver.plan, "r", "1" * 32, attrs.evolve(spec.options, plugin="quick")
            )
            assert plan.facts["name"] == "r"
            took.append(time.monotonic() - begun)
            assert not any(task.done() for task in hanging)
            slow.heal()
            outcomes = await asyncio.gather(*hanging, return_exceptions=True)
            assert all(
                outcome is None or isinstance(outcome, VolpluginError)
                for outcome in outcomes
            )
            assert await backend.close(5)
            return max(took)

        assert asyncio.run(test()) < 0.1
        assert quick.count("Mount") == 3


# A real one


@pytest.fixture
def rclone(world: World) -> Iterator[Rclone]:
    """A real rclone."""
    plugin = Rclone(world.folder / "rclone", world.folder / "s", host=None)
    plugin.start()
    yield plugin
    plugin.close()


def test_a_dead_file_system(world: World, rclone: Rclone) -> None:
    """One whose daemon was killed is noticed by the next attach, and made anew."""
    driver = world.driver()
    spec = made(driver, "v", **rclone.options)
    driver.attach(spec)
    place = Path(spec.volume.mountpoint)
    (place / "file").write_text("x")
    rclone.kill()
    with pytest.raises(OSError, match="Transport endpoint"):
        os.stat(place)
    with pytest.raises(Unavailable, match="plugin rclone: Unmount"):
        driver.attach(spec)
    assert len(world.notes()) == 1
    # What this rclone does not clean up by itself: its mount, and its note of it, by
    # which it would mount before it listens and wait for itself.
    subprocess.run(["umount", rclone.mounts()[0].mountpoint], check=True)
    (rclone.cache / "docker-plugin.state").unlink()
    rclone.start()
    rclone.client.create("v", {"remote": str(rclone.remote)})
    driver.attach(spec)
    assert (place / "file").read_text() == "x"
    assert world.mounts() == [str(place)]
    driver.detach(spec)
    removed(driver, spec)
    assert rclone.client.list() == {}
    assert has_nothing(world)


def test_a_dead_file_system_that_stays(world: World, rclone: Rclone) -> None:
    """Where the plugin left its dead mount, and forgot the volume, that is cleared up.

    The dead one is told at once, also while the kernel still has its attributes.
    """
    driver = world.driver()
    spec = made(driver, "v", **rclone.options)
    driver.attach(spec)
    rclone.kill()
    assert len(rclone.mounts()) == 1
    rclone.start()
    with pytest.raises(Unavailable, match="has no volume 'v' any more"):
        driver.attach(spec)
    assert rclone.mounts() == []
    recreating = world.driver(recreate=True)
    recreating.attach(spec)
    assert len(rclone.mounts()) == 1
    removed(recreating, spec)
    assert has_nothing(world)


def test_a_file_system_that_hangs(
    world: World, rclone: Rclone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who has it may have it back: nobody new is given it, nothing else happens."""
    monkeypatch.setattr(plugin_mounting, "LOOK_LIMIT", 0.3)
    driver = world.driver()
    spec = made(driver, "v", **rclone.options)
    driver.attach(spec)
    # Not this process: what it has open there, each child of it would wait to close.
    writing = ["sh", "-c", "exec > file; echo before; read word; echo after"]
    place = Path(spec.volume.mountpoint)
    with subprocess.Popen(writing, stdin=subprocess.PIPE, cwd=place) as writer:
        eventually((place / "file").exists, "the writer has begun")
        rclone.process.send_signal(signal.SIGSTOP)
        # It goes on while what looks at it is killed, which ends by its answer alone.
        go_on = [signal.SIGCONT]
        going_on = threading.Timer(0.8, rclone.process.send_signal, go_on)
        going_on.start()
        with pytest.raises(Unavailable, match=r"stat did not end within 0\.3 s"):
            driver.attach(spec)
        going_on.join()
        assert world.mounts() == [str(place)]
        driver.attach(spec)
        writer.communicate(b"go on\n")
    assert (rclone.remote / "file").read_text() == "before\nafter\n"
    driver.detach(spec)
    removed(driver, spec)


def test_two_of_one_remote(world: World, rclone: Rclone) -> None:
    """Volumes of one plugin are mounted and unmounted each by itself."""
    driver = world.driver()
    first = made(driver, "a", **rclone.options)
    second = made(driver, "b", **rclone.options)
    for spec in (first, second):
        driver.attach(spec)
    (Path(first.volume.mountpoint) / "file").write_text("x")
    driver.detach(first)
    assert len(rclone.mounts()) == 1
    assert world.mounts() == [second.volume.mountpoint]
    driver.detach(second)
    for spec in (first, second):
        removed(driver, spec)
    assert rclone.mounts() == []
