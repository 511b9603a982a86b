"""What must hold after any death: store, disk, mount table and promises agree.

`check` reads the disk and the mount table itself, and the store by the API of a server
that runs again. `check_nothing_left` is for the end, when every volume was removed.
"""

import datetime as dt
import json
import os
import re
import stat
from collections.abc import Mapping
from typing import Any, Final

import attrs
from rooms import ForkedPlugin
from support.mounts import Mount
from support.wait import eventually

RECORD: Final = "trusted.volplugin"
SOURCE: Final = "volplugin-"


@attrs.define
class Expected:
    """What clients know, having had answers or not."""

    present: dict[str, Mapping[str, str]] = attrs.field(factory=dict)
    """Volumes whose create was answered, with their options."""

    unsure: dict[str, Mapping[str, str]] = attrs.field(factory=dict)
    """Volumes whose create or remove was not answered."""

    content: dict[str, str] = attrs.field(factory=dict)
    """What the file ``kept`` holds, of volumes that were written to."""

    held: dict[str, set[str]] = attrs.field(factory=dict)
    """Mount IDs whose Mount was answered and whose Unmount was not asked for."""

    unsure_held: set[str] = attrs.field(factory=set)
    """Volumes with a Mount or Unmount that was not answered."""

    users: dict[str, tuple[int, int, int]] = attrs.field(factory=dict)
    """Directories that a user had before: mode, uid, gid."""

    made: dict[str, str] = attrs.field(factory=dict)
    """By volume, the directory that its create makes and its undo takes away."""


@attrs.frozen
class _Seen:
    """The volumes as the API shows them, and the mounts of our kind."""

    volumes: Mapping[str, Mapping[str, Any]]
    mounts: tuple[Mount, ...]

    def of(self, plugin: ForkedPlugin, driver: str, *, chosen: bool) -> set[str]:
        """Return the volumes of a driver, in its own place or where a user chose."""
        places = {"local": str(plugin.root), "tmpfs": str(plugin.tmpfs)}
        return {
            name
            for name, volume in self.volumes.items()
            if volume["Status"]["driver"] == driver
            and volume["Mountpoint"].startswith(places[driver] + "/") is not chosen
        }


def check(plugin: ForkedPlugin, expected: Expected) -> None:
    """Assert every invariant; the server runs and nobody else uses it."""
    seen = _look(plugin)
    _check_promises(seen, expected)
    _check_disk(plugin, seen)
    _check_mount_table(plugin, seen, expected)
    _check_users_directories(plugin, seen, expected)
    for name in seen.volumes:
        _check_usable(plugin, name, expected)
    after = _look(plugin)
    assert {m.source for m in after.mounts} == {m.source for m in seen.mounts}


def check_nothing_left(plugin: ForkedPlugin, expected: Expected) -> None:
    """Assert that no trace of any volume is left under the roots."""
    seen = _look(plugin)
    assert seen.volumes == {}
    assert seen.mounts == ()
    _check_disk(plugin, seen)
    _check_users_directories(plugin, seen, expected)


def _look(plugin: ForkedPlugin) -> _Seen:
    listed = plugin.client.list()
    volumes = {name: plugin.client.get(name) for name in listed}
    for name, volume in volumes.items():
        assert volume["Name"] == name
        assert volume["Mountpoint"] == listed[name]
        assert plugin.client.path(name) == listed[name]
        assert dt.datetime.fromisoformat(volume["CreatedAt"]).tzinfo is not None
        assert "error" not in volume["Status"], volume
    ours = tuple(m for m in plugin.host.mounts() if m.source.startswith(SOURCE))
    below = str(plugin.folder) + "/"
    return _Seen(volumes, tuple(m for m in ours if m.mountpoint.startswith(below)))


def _check_promises(seen: _Seen, expected: Expected) -> None:
    """No volume is lost, none comes back."""
    names = set(seen.volumes)
    assert set(expected.present) <= names, "a create was answered and it is gone"
    surplus = names - set(expected.present) - set(expected.unsure)
    assert not surplus, f"removed, or never made, and there: {surplus}"


def _check_disk(plugin: ForkedPlugin, seen: _Seen) -> None:
    """Each volume has its directory and marker with its record, nothing else does."""
    root = str(plugin.root)
    assert _entries(plugin, root) <= {"lock", "store", "local", "tmpfs"} | {
        entry for entry in _entries(plugin, root) if entry.startswith("store.broken-")
    }
    local = f"{root}/local"
    folders = {"volumes", "staging", "trash", "adopted"}
    assert _entries(plugin, local) <= folders
    assert _entries(plugin, f"{local}/staging") == set()
    eventually(
        lambda: not _entries(plugin, f"{local}/trash"),
        "the trash is emptied",
        seconds=5,
    )
    assert _entries(plugin, f"{root}/tmpfs") <= {"adopted"}
    own, adopted = (seen.of(plugin, "local", chosen=chosen) for chosen in (False, True))
    in_memory = seen.of(plugin, "tmpfs", chosen=False)
    all_in_memory = in_memory | seen.of(plugin, "tmpfs", chosen=True)
    assert _entries(plugin, f"{local}/volumes") == own
    assert _entries(plugin, f"{local}/adopted") == adopted
    assert _entries(plugin, f"{root}/tmpfs/adopted") == all_in_memory
    assert _entries(plugin, str(plugin.tmpfs)) == in_memory
    for name, volume in seen.volumes.items():
        record = _record(plugin, volume["Mountpoint"])
        assert record is not None, f"{name} has no record"
        assert record["name"] == name
        assert record["mountpoint"] == volume["Mountpoint"]
        assert record["created_at"] == volume["CreatedAt"]
        assert record["state"] == "ready"
        if name not in own:
            driver = volume["Status"]["driver"]
            assert _record(plugin, f"{root}/{driver}/adopted/{name}") == record
    ids = [_id(plugin, volume) for volume in seen.volumes.values()]
    assert len(set(ids)) == len(ids)


def _check_mount_table(plugin: ForkedPlugin, seen: _Seen, expected: Expected) -> None:
    """A tmpfs is mounted where someone holds it, once, and nowhere else."""
    ids = {_id(plugin, volume): name for name, volume in seen.volumes.items()}
    mounted = [ids.get(mount.source.removeprefix(SOURCE)) for mount in seen.mounts]
    assert None not in mounted, f"a mount of no volume: {seen.mounts}"
    assert len(set(mounted)) == len(mounted), f"mounted twice: {seen.mounts}"
    for name, volume in seen.volumes.items():
        status, path = volume["Status"], volume["Mountpoint"]
        answered = expected.held.get(name, set())
        if name not in expected.unsure_held:
            assert holders(volume) == answered, f"{name} is held by others"
        if status["driver"] != "tmpfs":
            continue
        assert status["attached"] is (name in mounted), f"{name}: {status}"
        assert (status["mounts"] > 0) is (name in mounted), f"{name}: {status}"
        if name in mounted:
            assert path in {mount.mountpoint for mount in seen.mounts}
        else:
            place = plugin.host.path(path)
            assert stat.S_IMODE(place.stat().st_mode) == 0, f"{path} is not guarded"
            assert _entries(plugin, path) == set()


def _check_users_directories(
    plugin: ForkedPlugin, seen: _Seen, expected: Expected
) -> None:
    """What a user had is as it was; what a create made is gone if it failed."""
    used = {volume["Mountpoint"] for volume in seen.volumes.values()}
    for path, (mode, uid, gid) in expected.users.items():
        if path in used:
            continue
        found = plugin.host.path(path).stat()
        assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (
            mode,
            uid,
            gid,
        ), f"{path} was changed"
        assert _record(plugin, path) is None, f"{path} still carries a record"
    for name, path in expected.made.items():
        if name not in seen.volumes:
            assert not plugin.host.path(path).exists(), f"{path} was left"


def _check_usable(plugin: ForkedPlugin, name: str, expected: Expected) -> None:
    """A volume can be mounted, holds what was written, and can be written to."""
    path = plugin.client.mount(name, "check")
    try:
        assert path == plugin.client.path(name)
        place = plugin.host.path(path)
        assert place.is_dir()
        if name in expected.content:
            assert (place / "kept").read_text() == expected.content[name], name
        (place / "probe").write_text("probe")
        assert (place / "probe").read_text() == "probe"
        (place / "probe").unlink()
    finally:
        plugin.client.unmount(name, "check")


def holders(volume: Mapping[str, Any]) -> set[str]:
    """Return the mount IDs that hold a volume, as its Status names them."""
    found = (re.match(r"'(\w+)'", text) for text in volume["Status"].get("holders", ()))
    return {match[1] for match in found if match is not None}


def _entries(plugin: ForkedPlugin, path: str) -> set[str]:
    try:
        return set(os.listdir(plugin.host.path(path)))
    except FileNotFoundError:
        return set()


def _record(plugin: ForkedPlugin, path: str) -> dict[str, Any] | None:
    try:
        value = os.getxattr(plugin.host.path(path), RECORD, follow_symlinks=False)
    except OSError:
        return None
    record = json.loads(value)
    assert isinstance(record, dict)
    return record


def _id(plugin: ForkedPlugin, volume: Mapping[str, Any]) -> str:
    record = _record(plugin, volume["Mountpoint"])
    assert record is not None, f"{volume['Name']} has no record"
    return str(record["id"])
