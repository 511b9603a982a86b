"""What must hold of limits after any death: images, loop devices, qgroups, sizes.

A limit is looked at where it is in force, by the tools of its file system and by the
kernel's tables, and held against what the server shows of it.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from rooms import COMMIT_LIMIT, ForkedPlugin
from support.wait import eventually

_GONE: Final = re.compile(r"<stale>|<under deletion>|DELETED")
_SYS: Final = Path("/sys/dev/block")

Volumes = Mapping[str, Mapping[str, Any]]


def size_of(volume: Mapping[str, Any]) -> int:
    """Return the bytes that a volume's Status says it is limited to."""
    shown = volume["Status"]["size"]
    assert shown.endswith("M"), shown
    return int(shown[:-1]) << 20


def image_of(plugin: ForkedPlugin, volume_id: str) -> Path:
    """Return the image of a volume, as the host sees it."""
    return plugin.root / "quota/images" / f"{volume_id}.img"


def check_loop_devices(plugin: ForkedPlugin, attached: set[str]) -> None:
    """Images of the volumes with the ids ``attached`` have one loop device, no other.

    Right after a process has died, or a mount has gone, a device may still be going.
    """
    images = sorted(str(image_of(plugin, volume_id)) for volume_id in attached)
    eventually(
        lambda: _backing_files(plugin) == images,
        f"loop devices of {images} alone",
        seconds=5,
    )


def _backing_files(plugin: ForkedPlugin) -> list[str]:
    found = []
    for link in Path("/sys/block").glob("loop*"):
        try:
            file = (link / "loop/backing_file").read_text().removesuffix("\n")
        except OSError:  # without a file
            continue
        if file.startswith(f"{plugin.root}/"):
            found.append(file)
    return sorted(found)


def check_image_size(
    plugin: ForkedPlugin, volume: Mapping[str, Any], image: Path
) -> None:
    """File, loop device and file system of a mounted image are as large as is told."""
    size, mountpoint = size_of(volume), volume["Mountpoint"]
    assert plugin.host.path(image).stat().st_size == size
    mount = next(m for m in plugin.host.mounts() if m.mountpoint == mountpoint)
    device = _SYS / mount.device
    assert (device / "loop/backing_file").read_text() == f"{image}\n"
    assert int((device / "size").read_text()) * 512 == size
    if mount.filesystem == "ext4":
        told = plugin.host.run("dumpe2fs", "-h", mount.source)
        blocks = re.search(r"^Block count: +(\d+)$", told, re.MULTILINE)
        each = re.search(r"^Block size: +(\d+)$", told, re.MULTILINE)
    else:
        told = plugin.host.run("xfs_growfs", "-n", mountpoint)
        blocks = re.search(r"^data .* blocks=(\d+)", told, re.MULTILINE)
        each = re.search(r"^data .* bsize=(\d+)", told, re.MULTILINE)
    assert blocks is not None, told
    assert each is not None, told
    assert int(blocks[1]) * int(each[1]) == size


def check_qgroups(plugin: ForkedPlugin, volumes: Volumes) -> None:
    """Each volume on btrfs has its limit, and no other subvolume has one.

    ``volumes`` are those of the backend there, by name. Of removed ones no qgroup is
    left, and no subvolume but one that a user chose.
    """
    rows = _qgroups(plugin)
    if any(_GONE.search(path) for path, _ in rows):
        plugin.host.run("btrfs", "filesystem", "sync", plugin.disk)  # begins cleaning
        eventually(
            lambda: not any(_GONE.search(path) for path, _ in _qgroups(plugin)),
            "the qgroups of deleted subvolumes are gone",
            seconds=COMMIT_LIMIT,
        )
        rows = _qgroups(plugin)
    limits = {volume["Mountpoint"]: volume for volume in volumes.values()}
    seen = set()
    for path, limit in rows:
        place = str(plugin.disk / path)
        if place in limits:
            assert limit == str(size_of(limits[place])), f"{place}: limit {limit}"
            seen.add(place)
        elif place.startswith(f"{plugin.on_btrfs}/"):
            assert limit == "none", f"{place} has a limit of {limit}"
            assert not place.startswith(f"{plugin.fast}/"), f"{place} was left"
    assert seen == set(limits)


def _qgroups(plugin: ForkedPlugin) -> list[tuple[str, str]]:
    # Path and limit of each subvolume.
    told = plugin.host.run("btrfs", "qgroup", "show", "--raw", "-r", plugin.disk)
    rows = [line.split(None, 4) for line in told.splitlines()[2:]]
    return [(path.strip(), limit) for _, _, _, limit, path in rows]
