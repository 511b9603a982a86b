"""The driver ``tmpfs``: volumes in memory, there from the first container to the last.

A volume is a guarded mountpoint ``ROOT/NAME``; attach mounts a tmpfs on it whose source
is ``volplugin-ID``, by which the mount table tells whose it is.
"""

import os
import stat
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

import attrs

from volplugin import options as declare
from volplugin.drivers import declared, mountpoints, ownership
from volplugin.drivers.directories import require_allowed
from volplugin.drivers.driver import Driver, Found, Plan, Spec
from volplugin.drivers.markers import Markers
from volplugin.errors import InvalidArgument, Unavailable
from volplugin.failpoints import hit
from volplugin.host import attributes, guard, mountinfo, mounts, paths
from volplugin.host.mountinfo import Mount
from volplugin.host.mounts import MountFlag
from volplugin.model import Volume
from volplugin.sizes import format_size


@attrs.frozen(kw_only=True)
class TmpfsOptions:
    """What a user can say of one volume; the defaults are PouchContainer's."""

    size: int = declare.option(
        help="how much it can hold; counts against the host's memory",
        parse=declare.size(minimum=4096),
        default=64 << 20,
        unit="bytes",
        format=format_size,
    )
    inodes: int | None = declare.option(
        help="how many files it can hold",
        parse=declare.count,
        default=None,
        shown="half the host's pages",
        unit="number",
    )
    mode: int = declared.mode_option(0o1777)
    uid: int = declared.uid_option()
    gid: int = declared.gid_option()
    exec: bool = declare.option(
        help="allow programs in it to be run",
        parse=declare.boolean,
        default=False,
        unit="true, false",
    )
    mount: str | None = declare.option(
        help="mount it on exactly this directory, new or empty",
        parse=declare.absolute_path,
        default=None,
        shown="a directory below the backend's root",
        unit="path",
    )


@attrs.frozen(kw_only=True)
class TmpfsConfig:
    """What an operator can say of the backend."""

    root: str = declare.option(
        help="where the mountpoints are",
        parse=declare.absolute_path,
        default="/mnt/tmpfs",
        unit="path",
    )
    allow: Sequence[str] | None = declared.allow_setting()


class Tmpfs(Driver):
    """One tmpfs a volume."""

    name = "tmpfs"
    Options = TmpfsOptions
    Config = TmpfsConfig

    def __init__(self, config: TmpfsConfig, place: str) -> None:
        self._root = os.path.realpath(config.root)
        self._allow = config.allow
        self._markers = Markers(place)
        self._place = place

    def open(self) -> None:
        paths.make_directories(self._place, 0o711)

    def roots(self) -> Sequence[str]:
        return [self._root, self._place]

    def plan(self, name: str, volume_id: str, options: TmpfsOptions) -> Plan:
        if options.mount is None:
            return Plan(mountpoint=os.path.join(self._root, name))
        path = options.mount
        require_allowed(path, self._allow)
        missing = paths.missing_directories(path)
        if missing:
            return Plan(mountpoint=path, chosen=True, facts={"made": ":".join(missing)})
        ownership.require_free(path, volume_id)
        if os.listdir(path):
            raise InvalidArgument(
                f"mount={path} is not empty, and a tmpfs would hide what is there: "
                f"choose an empty or new directory"
            )
        other = mountinfo.at(path, mountinfo.read())
        if other is not None:
            raise InvalidArgument(
                f"mount={path} has a {other.kind} mounted on it: unmount it, or choose "
                f"another directory"
            )
        status = os.stat(path)
        mode = f"{stat.S_IMODE(status.st_mode):04o}"
        return Plan(mountpoint=path, chosen=True, facts={"made": "", "mode": mode})

    def create(self, spec: Spec) -> None:
        path = spec.volume.mountpoint
        if ownership.is_of(spec, path):
            return
        if spec.options.mount is None:
            paths.make_directories(self._root, 0o711)
            mountpoints.require_free(path)
            paths.make_directory(path, 0o700)
        else:
            paths.make_directories(path, 0o755)
            ownership.require_free(path, spec.volume.id)
        hit("tmpfs.mountpoint")
        attributes.write_record(path, spec.record)
        self._markers.add(spec.volume.name, spec.record)
        guard.guard(path)
        hit("tmpfs.guard")

    def remove(self, spec: Spec) -> None:
        facts = spec.volume.facts
        self.detach(spec)
        if mountpoints.is_of_another(spec):
            return
        made = [spec.volume.mountpoint]
        if "made" in facts:
            made = facts["made"].split(":")
        mode = int(facts["mode"], 8) if "mode" in facts else None
        mountpoints.take_back(spec, made, mode)
        hit("tmpfs.unguard")
        self._markers.drop(spec.volume.name)

    def attach(self, spec: Spec) -> None:
        volume, path = spec.volume, spec.volume.mountpoint
        table = mountinfo.read()
        if self.is_attached(volume, table):
            return
        if not mountpoints.require_ready(spec, table):
            self.create(spec)  # where the root itself is in memory, a boot empties it
        hit("tmpfs.attach")
        options = spec.options
        data = f"size={options.size},mode={options.mode:o}"
        data += f",uid={options.uid},gid={options.gid}"
        if options.inodes is not None:
            data += f",nr_inodes={options.inodes}"
        flags = MountFlag.NOSUID | MountFlag.NODEV
        if not options.exec:
            flags |= MountFlag.NOEXEC
        mounts.mount(_source(volume), path, "tmpfs", flags=flags, data=data)
        hit("tmpfs.mounted")
        if not self.is_attached(volume, mountinfo.read()):
            raise Unavailable(f"{path}: the tmpfs was mounted and is not there")
        attributes.write_record(path, spec.record)

    def detach(self, spec: Spec) -> None:
        while self.is_attached(spec.volume, mountinfo.read()):
            hit("tmpfs.detach")
            mounts.unmount(spec.volume.mountpoint)

    def attaches(self, volume: Volume) -> bool:
        return True

    def is_attached(self, volume: Volume, table: Sequence[Mount]) -> bool:
        found = mountinfo.at(volume.mountpoint, table)
        return (
            found is not None
            and found.kind == "tmpfs"
            and found.source == _source(volume)
        )

    def is_volatile(self, volume: Volume) -> bool:
        return True

    def status(
        self, volume: Volume, options: TmpfsOptions, *, attached: bool
    ) -> Mapping[str, Any]:
        content = "kept until the last container stops" if attached else "none"
        return {"size": format_size(options.size), "content": content}

    def discover(self, known: Container[str] = ()) -> Iterator[Found]:
        # Not by a look into the root, which volumes of another server may share.
        yield from self._markers.found(known)


def _source(volume: Volume) -> str:
    return f"volplugin-{volume.id}"
