"""What must hold after any death: store, disk, mount table and promises agree.

`check` reads the disk and the mount table itself, and the store by the API of a server
that runs again. `check_nothing_left` is for the end, when every volume was removed.
"""

import stat
from collections.abc import Mapping
from typing import Any

import attrs
from limited import (
    check_image_size,
    check_loop_devices,
    check_qgroups,
    image_of,
)
from rooms import COMMIT_LIMIT, ForkedPlugin
from support.wait import eventually
from views import SOURCE, Seen, entries, holders, id_of, look, record_of


@attrs.define
class Expected:
    """What clients know, having had answers or not."""

    present: dict[str, Mapping[str, str]] = attrs.field(factory=dict)
    """Volumes whose create was answered, with their options."""

    unsure: dict[str, Mapping[str, str]] = attrs.field(factory=dict)
    """Volumes whose create or remove was not answered."""

    resizing: dict[str, str] = attrs.field(factory=dict)
    """Volumes whose resize was not answered, with the size it asked for."""

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


def check(plugin: ForkedPlugin, expected: Expected) -> None:
    """Assert every invariant; the server runs and nobody else uses it."""
    seen = look(plugin)
    _check_promises(seen, expected)
    _check_sizes(seen, expected)
    _check_disk(plugin, seen)
    _check_mount_table(plugin, seen, expected)
    _check_users_directories(plugin, seen, expected)
    for name, volume in seen.volumes.items():
        _check_usable(plugin, volume, expected.content.get(name))
    after = look(plugin)
    assert {m.mountpoint for m in after.mounts} == {m.mountpoint for m in seen.mounts}
    _check_loop_devices(plugin, after)


def check_nothing_left(plugin: ForkedPlugin, expected: Expected) -> None:
    """Assert that no trace of any volume is left under the roots."""
    seen = look(plugin)
    assert seen.volumes == {}
    assert seen.mounts == ()
    _check_disk(plugin, seen)
    _check_users_directories(plugin, seen, expected)


def _check_promises(seen: Seen, expected: Expected) -> None:
    """No volume is lost, none comes back."""
    names = set(seen.volumes)
    assert set(expected.present) <= names, "a create was answered and it is gone"
    surplus = names - set(expected.present) - set(expected.unsure)
    assert not surplus, f"removed, or never made, and there: {surplus}"


def _check_sizes(seen: Seen, expected: Expected) -> None:
    """A volume has the size that was told, before or after a resize cut short."""
    asked = {**expected.present, **expected.unsure}
    for name, volume in seen.volumes.items():
        if "size" in asked[name]:
            possible = {asked[name]["size"], expected.resizing.get(name)}
            assert volume["Status"]["size"].lower() in possible, volume


def _check_disk(plugin: ForkedPlugin, seen: Seen) -> None:
    """Each volume has its directory and marker with its record, nothing else does."""
    root = str(plugin.root)
    backends = {"local", "tmpfs", "quota", "rbd", "cephfs", "plugin"}
    assert entries(plugin, root) <= {"lock", "sockets", "store"} | backends | {
        entry for entry in entries(plugin, root) if entry.startswith("store.broken-")
    }
    for backend, place in (("local", f"{root}/local"), ("fast", str(plugin.fast))):
        _check_directories(plugin, seen, backend, place)
    _check_images(plugin, seen)
    in_memory = set(seen.of("tmpfs"))
    assert entries(plugin, f"{root}/tmpfs") <= {"adopted"}
    assert entries(plugin, f"{root}/tmpfs/adopted") == in_memory
    assert entries(plugin, str(plugin.tmpfs)) == seen.below("tmpfs", str(plugin.tmpfs))
    _check_notes(plugin, f"{root}/tmpfs/adopted", seen.of("tmpfs"))
    for name, volume in seen.volumes.items():
        record = record_of(plugin, volume["Mountpoint"])
        assert record is not None, f"{name} has no record"
        _check_record(record, volume)
    ids = [id_of(plugin, volume) for volume in seen.volumes.values()]
    assert len(set(ids)) == len(ids)
    check_qgroups(plugin, seen.of("fast"))


def _check_directories(
    plugin: ForkedPlugin, seen: Seen, backend: str, place: str
) -> None:
    folders = {"volumes", "staging", "trash", "adopted"}
    assert entries(plugin, place) <= folders
    _check_no_rest(plugin, place)
    own = seen.below(backend, place)
    chosen = {n: v for n, v in seen.of(backend).items() if n not in own}
    assert entries(plugin, f"{place}/volumes") == own
    assert entries(plugin, f"{place}/adopted") == set(chosen)
    _check_notes(plugin, f"{place}/adopted", chosen)
    for name, volume in seen.of(backend).items():
        record = record_of(plugin, volume["Mountpoint"])
        assert record is not None, f"{name} has no record"
        _check_recorded_size(record, volume)


def _check_images(plugin: ForkedPlugin, seen: Seen) -> None:
    """Each volume has its image, with the record as of today, and its mountpoint."""
    place, volumes = f"{plugin.root}/quota", seen.of("quota")
    assert entries(plugin, place) == {"volumes", "staging", "trash", "images"}
    _check_no_rest(plugin, place)
    assert entries(plugin, f"{place}/volumes") == set(volumes)
    ids = {name: id_of(plugin, volume) for name, volume in volumes.items()}
    images = {f"{volume_id}.img" for volume_id in ids.values()}
    assert entries(plugin, f"{place}/images") == images
    for name, volume in volumes.items():
        image = image_of(plugin, ids[name])
        record = record_of(plugin, str(image))
        assert record is not None, f"{image} has no record"
        assert record["id"] == ids[name]
        _check_record(record, volume)
        _check_recorded_size(record, volume)
    _check_loop_devices(plugin, seen)


def _check_loop_devices(plugin: ForkedPlugin, seen: Seen) -> None:
    mounted = {mount.mountpoint for mount in seen.mounts}
    attached = {
        id_of(plugin, volume)
        for volume in seen.of("quota").values()
        if volume["Mountpoint"] in mounted
    }
    check_loop_devices(plugin, attached)


def _check_no_rest(plugin: ForkedPlugin, place: str) -> None:
    assert entries(plugin, f"{place}/staging") == set()
    eventually(
        lambda: not entries(plugin, f"{place}/trash"),
        f"the trash of {place} is emptied",
        seconds=COMMIT_LIMIT,
    )


def _check_notes(
    plugin: ForkedPlugin, folder: str, volumes: Mapping[str, Mapping[str, Any]]
) -> None:
    for name, volume in volumes.items():
        record = record_of(plugin, f"{folder}/{name}")
        assert record == record_of(plugin, volume["Mountpoint"])


def _check_record(record: Mapping[str, Any], volume: Mapping[str, Any]) -> None:
    assert record["name"] == volume["Name"]
    assert record["mountpoint"] == volume["Mountpoint"]
    assert record["created_at"] == volume["CreatedAt"]
    assert record["state"] == "ready"
    assert not record.get("pending")


def _check_recorded_size(record: Mapping[str, Any], volume: Mapping[str, Any]) -> None:
    shown = volume["Status"].get("size")
    assert record["options"].get("size") == (shown and shown.lower()), volume


def _check_mount_table(plugin: ForkedPlugin, seen: Seen, expected: Expected) -> None:
    """What is mounted for a volume is so where someone holds it, once, nowhere else."""
    by_place = {volume["Mountpoint"]: name for name, volume in seen.volumes.items()}
    mounted = [by_place.get(mount.mountpoint) for mount in seen.mounts]
    assert None not in mounted, f"a mount of no volume: {seen.mounts}"
    assert len(set(mounted)) == len(mounted), f"mounted twice: {seen.mounts}"
    for mount in seen.mounts:
        if mount.source.startswith(SOURCE):
            volume = seen.volumes[by_place[mount.mountpoint]]
            assert mount.source == SOURCE + id_of(plugin, volume)
    for name, volume in seen.volumes.items():
        status, path = volume["Status"], volume["Mountpoint"]
        answered = expected.held.get(name, set())
        if name not in expected.unsure_held:
            assert holders(volume) == answered, f"{name} is held by others"
        if status["driver"] not in {"tmpfs", "quota"}:
            continue
        assert status["attached"] is (name in mounted), f"{name}: {status}"
        assert (status["mounts"] > 0) is (name in mounted), f"{name}: {status}"
        if name not in mounted:
            place = plugin.host.path(path)
            assert stat.S_IMODE(place.stat().st_mode) == 0, f"{path} is not guarded"
            assert entries(plugin, path) == set()


def _check_users_directories(
    plugin: ForkedPlugin, seen: Seen, expected: Expected
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
        assert record_of(plugin, path) is None, f"{path} still carries a record"
    for name, path in expected.made.items():
        if name not in seen.volumes:
            assert not plugin.host.path(path).exists(), f"{path} was left"


def _check_usable(
    plugin: ForkedPlugin, volume: Mapping[str, Any], content: str | None
) -> None:
    """A volume can be mounted, holds what was written, and can be written to."""
    name = volume["Name"]
    path = plugin.client.mount(name, "check")
    try:
        assert path == plugin.client.path(name)
        place = plugin.host.path(path)
        assert place.is_dir()
        if content is not None:
            assert (place / "kept").read_text() == content, name
        (place / "probe").write_text("probe")
        assert (place / "probe").read_text() == "probe"
        (place / "probe").unlink()
        if volume["Status"]["backend"] == "quota":
            image = image_of(plugin, id_of(plugin, volume))
            check_image_size(plugin, volume, image)
    finally:
        plugin.client.unmount(name, "check")
