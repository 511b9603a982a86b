"""Limits through a real server: made, told, resized, kept over restarts, refused."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from peers import scratch, serving
from support.client import PluginError
from support.plugin import Plugin, plugin_environment
from support.wait import eventually

pytestmark = pytest.mark.root

CONFIG: Final = "usage-interval = 0.5\n"
MIB: Final = 1 << 20
XFS: Final = {"fs": "xfs", "size": "300m"}
"""It grows without CAP_SYS_RESOURCE; ext4 is grown in tests/kernel."""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A place for a server."""
    with scratch() as folder:
        yield folder


@pytest.fixture
def plugin(folder: Path) -> Iterator[Plugin]:
    """A server that measures often."""
    with serving(folder, config=CONFIG) as plugin:
        yield plugin


def status(plugin: Plugin, name: str) -> dict[str, Any]:
    """Return the Status of a volume."""
    found = plugin.client.get(name)["Status"]
    assert isinstance(found, dict)
    return found


def create(plugin: Plugin, name: str, **options: str) -> None:
    """Create a quota volume, 16 MiB if nothing else is said."""
    plugin.client.create(name, {"driver": "quota", "size": "16m", **options})


def fill(path: str) -> int:
    """Write as much as goes into a file, and return how much went."""
    file = os.open(f"{path}/fill", os.O_WRONLY | os.O_CREAT)
    written = 0
    try:
        while True:
            written += os.write(file, bytes(256 << 10))
    except OSError:
        return written
    finally:
        os.close(file)


def resize(plugin: Plugin, *words: str) -> subprocess.CompletedProcess[str]:
    """Run `volplugin volume resize`."""
    return run(plugin.resize(*words))


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run volplugin's command line."""
    return subprocess.run(
        command,
        env=plugin_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_limit_holds_and_grows_while_it_is_held(plugin: Plugin) -> None:
    """A writer stops at the size, and goes on after a resize without a new mount."""
    create(plugin, "q", **XFS)
    path = plugin.client.mount("q", "one")
    assert 200 * MIB < fill(path) <= 300 * MIB
    done = resize(plugin, "q", "340m")
    assert (done.returncode, done.stdout) == (0, "q: size 300m -> 340m\n"), done.stderr
    assert 235 * MIB < fill(path) <= 340 * MIB
    assert status(plugin, "q")["size"] == "340M"
    plugin.client.unmount("q", "one")
    plugin.client.remove("q")


def test_status_tells_what_is_used(plugin: Plugin) -> None:
    """Status has size, mechanism, used, available, percent and how old they are."""
    create(plugin, "q")
    path = plugin.client.mount("q", "one")
    fill(path)
    eventually(lambda: status(plugin, "q").get("percent", 0) > 90, "it is measured")
    found = status(plugin, "q")
    assert found["size"] == "16M"
    assert found["mechanism"] == "loop"
    assert found["used"] > 8 * MIB
    assert found["available"] < MIB
    assert found["near-full"] == 95
    assert found["age"] < 5
    eventually(lambda: "nearly full" in plugin.log, "the log warns of it")
    plugin.client.unmount("q", "one")
    plugin.client.remove("q")


def test_size_outlives_restart_and_loss_of_the_store(plugin: Plugin) -> None:
    """After a resize the new size is in the store and in the volume's own record."""
    create(plugin, "q", **XFS)
    assert resize(plugin, "q", "320m").returncode == 0
    plugin.restart()
    assert status(plugin, "q")["size"] == "320M"
    plugin.stop()
    (plugin.root / "store").rename(plugin.root / "lost")
    assert run(plugin.command("recover")).returncode == 0
    plugin.start()
    assert status(plugin, "q")["size"] == "320M"
    create(plugin, "q", fs="xfs", size="320m")  # the same options: success
    with pytest.raises(PluginError, match="size is 320M, asked for 300M"):
        create(plugin, "q", **XFS)
    plugin.client.remove("q")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"size": "0"}, "'0' is less than a byte"),
        ({"size": "1k"}, "at least 8M"),
        ({"size": "4096t"}, "more than the"),
        ({"quota": "project"}, "project quota"),
        ({"quota": "btrfs"}, "btrfs"),
        ({"quota": "project", "fs": "xfs"}, "leave one of them out"),
        ({"fs": "ntfs"}, "none of ext4, xfs"),
        ({"fs": "xfs", "size": "16m"}, "300M"),
        ({"fs": "xfs", "size": "300m", "inodes": "100"}, "xfs"),
        ({"mkfs.block-size": "3000"}, "3000"),
        ({"mkfs.features": "^has_journal"}, "unknown option 'mkfs.features'"),
    ],
    ids=lambda value: "-".join(value.values()) if isinstance(value, dict) else None,
)
def test_bad_options_change_nothing(
    plugin: Plugin, options: dict[str, str], told: str
) -> None:
    """What can't be is refused with the fact that stands against it."""
    with pytest.raises(PluginError, match=told):
        create(plugin, "q", **options)
    assert plugin.client.list() == {}
    for folder in ("volumes", "staging", "images", "trash"):
        assert os.listdir(plugin.root / "quota" / folder) == []


def test_config_tells_what_holds_a_size(plugin: Plugin) -> None:
    """`volplugin config` says for each backend what its file system offers."""
    told = run(plugin.command("config")).stdout
    assert "# backend local: limits by nothing: size is refused (project: " in told
    assert "# backend quota: limits by loop images (project: " in told
    assert "# backend tmpfs" not in told


def test_quota_needs_a_size(plugin: Plugin) -> None:
    """A quota volume without a size is refused with an example."""
    with pytest.raises(PluginError, match="size=10G"):
        plugin.client.create("q", {"driver": "quota"})


def test_local_without_quota_below_names_the_ways_out(plugin: Plugin) -> None:
    """A local volume's size is refused where nothing holds it, never ignored."""
    with pytest.raises(PluginError, match="driver=quota") as told:
        plugin.client.create("l", {"size": "16m"})
    assert "project quotas of" in str(told.value)
    assert plugin.client.list() == {}


def test_resize_is_refused_with_the_reason(plugin: Plugin) -> None:
    """A resize that can't be leaves the volume as it was."""
    create(plugin, "q")
    create(plugin, "x", fs="xfs", size="310m")
    plugin.client.create("l")
    plugin.client.create("t", {"driver": "tmpfs"})
    path = plugin.client.mount("q", "one")
    for words, told in (
        (("q", "8m"), "container"),
        (("q", "1k"), "at least 8M"),
        (("q", "--inodes", "5k"), "inodes"),
        (("q", "-5m"), "size"),
        (("x", "300m"), "XFS"),
        (("l", "1g"), "without a limit"),
        (("t", "1g"), "fixed size"),
        (("none", "1g"), "no such volume"),
        (("../x", "1g"), "volume name"),
        (("q", "4096t"), "more than the"),
    ):
        done = resize(plugin, *words)
        assert done.returncode != 0, words
        assert told in done.stderr, (words, done.stderr)
    assert {name: status(plugin, name).get("size") for name in "qxlt"} == {
        "q": "16M",
        "x": "310M",
        "l": None,
        "t": "64M",
    }
    assert fill(path) <= 16 * MIB
    plugin.client.unmount("q", "one")
    assert resize(plugin, "q", "12m").returncode != 0, "it holds more"
    os.unlink(plugin.client.mount("q", "two") + "/fill")
    plugin.client.unmount("q", "two")
    assert resize(plugin, "q", "12m").returncode == 0
    for name in "qxlt":
        plugin.client.remove(name)


def test_overcommit(folder: Path) -> None:
    """The sizes of all volumes together are held against the configured ratio."""
    capacity = os.statvfs(folder).f_blocks * os.statvfs(folder).f_frsize
    with serving(folder, config="[backend.quota]\novercommit = 0.9\n") as plugin:
        create(plugin, "a", size=str(int(capacity * 0.9) - 320 * MIB))
        with pytest.raises(PluginError, match="overcommit"):
            create(plugin, "b", fs="xfs", size="330m")
        create(plugin, "b", **XFS)
        assert "overcommit" in resize(plugin, "b", "330m").stderr
        plugin.client.remove("a")
        assert resize(plugin, "b", "330m").returncode == 0
        plugin.client.remove("b")


def test_overcommit_is_told_by_default(plugin: Plugin) -> None:
    """Without a setting more than the disk may be promised, and the log says so."""
    capacity = os.statvfs(plugin.root).f_blocks * os.statvfs(plugin.root).f_frsize
    create(plugin, "a", size=str(capacity // 2))
    assert "over-committed" not in plugin.log
    create(plugin, "b", size=str(capacity // 4 * 3))
    eventually(lambda: "over-committed" in plugin.log, "the log warns of it")
    plugin.client.remove("a")
    plugin.client.remove("b")
