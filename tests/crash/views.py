"""What there is to be seen of volumes: by the API, in the mount table, on the disk."""

import datetime as dt
import json
import os
import re
from collections.abc import Mapping
from typing import Any, Final

import attrs
from rooms import ForkedPlugin
from support.mounts import Mount

RECORD: Final = "trusted.volplugin"
SOURCE: Final = "volplugin-"


@attrs.frozen
class Seen:
    """The volumes as the API shows them, and the mounts of our kind."""

    volumes: Mapping[str, Mapping[str, Any]]
    mounts: tuple[Mount, ...]

    def of(self, backend: str) -> dict[str, Mapping[str, Any]]:
        """Return the volumes of a backend."""
        return {
            name: volume
            for name, volume in self.volumes.items()
            if volume["Status"]["backend"] == backend
        }

    def below(self, backend: str, place: str) -> set[str]:
        """Return the volumes of a backend that are below ``place``."""
        return {
            name
            for name, volume in self.of(backend).items()
            if volume["Mountpoint"].startswith(place + "/")
        }


def look(plugin: ForkedPlugin) -> Seen:
    """Read it all; what the calls of the API say of a volume must agree."""
    listed = plugin.client.list()
    volumes = {name: plugin.client.get(name) for name in listed}
    for name, volume in volumes.items():
        assert volume["Name"] == name
        assert volume["Mountpoint"] == listed[name]
        assert plugin.client.path(name) == listed[name]
        assert dt.datetime.fromisoformat(volume["CreatedAt"]).tzinfo is not None
        assert "error" not in volume["Status"], volume
    below = f"{plugin.folder}/"
    ours = tuple(m for m in plugin.host.mounts() if m.mountpoint.startswith(below))
    # Of images any mount, be it in a place that no volume has.
    images = f"{plugin.root}/quota/"
    return Seen(
        volumes,
        tuple(
            mount
            for mount in ours
            if mount.source.startswith(SOURCE) or mount.mountpoint.startswith(images)
        ),
    )


def holders(volume: Mapping[str, Any]) -> set[str]:
    """Return the mount IDs that hold a volume, as its Status names them."""
    found = (re.match(r"'(\w+)'", text) for text in volume["Status"].get("holders", ()))
    return {match[1] for match in found if match is not None}


def entries(plugin: ForkedPlugin, path: str) -> set[str]:
    """Return the names in a directory of the host, none if it is missing."""
    try:
        return set(os.listdir(plugin.host.path(path)))
    except FileNotFoundError:
        return set()


def record_of(plugin: ForkedPlugin, path: str) -> dict[str, Any] | None:
    """Return the record that a path in the host carries, None if it has none."""
    try:
        value = os.getxattr(plugin.host.path(path), RECORD, follow_symlinks=False)
    except OSError:
        return None
    record = json.loads(value)
    assert isinstance(record, dict)
    return record


def id_of(plugin: ForkedPlugin, volume: Mapping[str, Any]) -> str:
    """Return the id of a volume, as the record at its mountpoint says."""
    record = record_of(plugin, volume["Mountpoint"])
    assert record is not None, f"{volume['Name']} has no record"
    return str(record["id"])
