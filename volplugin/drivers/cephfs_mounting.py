"""Volumes of CephFS as mounts: one for each, or bound from one of the whole backend."""

import os
import threading
from collections.abc import Sequence
from typing import Final

from volplugin.ceph.fsmounts import Mounts, Target
from volplugin.drivers import mountpoints, ownership
from volplugin.drivers.driver import Spec
from volplugin.errors import Unavailable
from volplugin.failpoints import hit
from volplugin.host import attributes, guard, mountinfo, mounts, paths
from volplugin.host.mountinfo import Mount
from volplugin.host.mounts import MountFlag
from volplugin.model import Volume

ENTRY: Final = "path"
"""The fact that tells where in the file system a volume's entry is."""

ADOPTED: Final = "adopted"
"""The fact that says that the entry is a directory of its user's."""

_BACKEND: Final = "backend"


class Mounting:
    """The mounts of one backend's volumes. Safe for threads."""

    def __init__(
        self, mounts_: Mounts, place: str, base: str, filesystem: str | None, how: str
    ) -> None:
        self._mounts = mounts_
        self._base = base
        self._filesystem = filesystem
        self._binds = how == "backend"
        self._whole = os.path.join(place, "mount")
        # Of the backend's one mount: volumes come and go in parallel.
        self._lock = threading.Lock()
        # Two backends may show the same directory at places of their own.
        self._key = f"{_BACKEND}-{os.path.basename(place)}"

    def is_attached(self, volume: Volume, table: Sequence[Mount]) -> bool:
        """Tell whether the volume is what is mounted where it is to be. No I/O."""
        return self._at(volume, table) is not None

    def is_alive(self, volume: Volume, table: Sequence[Mount]) -> bool:
        """Tell whether the process lives that a mounted volume needs."""
        found = self._at(volume, table)
        return found is None or self._mounts.is_alive(found[0], found[1])

    def addresses(self, volume: Volume) -> Sequence[str]:
        """Return by what addresses the cluster knows the volume's own mount.

        Not those of a mount for all: to fence one volume would take all of them.
        """
        address = self._mounts.address(self._own(volume, "", read_only=False))
        return () if address is None else (address,)

    def flush(self, volume: Volume) -> None:
        """Return once the cluster has what was written here; errors as `Mounts.flush`.

        No effect on a volume that is not mounted.
        """
        if self._at(volume, mountinfo.read()) is not None:
            self._mounts.flush(volume.mountpoint)

    def attach(self, spec: Spec, root: str) -> None:
        """Mount the volume's ``root``; what is mounted already is seen to work."""
        volume, path = spec.volume, spec.volume.mountpoint
        table = mountinfo.read()
        found = self._at(volume, table)
        if found is not None:
            if not self._revived(found[0], path):
                return
            table = mountinfo.read()
        if not mountpoints.require_ready(spec, table):
            self._make_mountpoint(spec)
        guard.guard(path)
        hit("cephfs.mountpoint")
        read_only = spec.options.access == "ro"
        if self._is_bound(root) and not read_only:
            self._bind(root, path)
        else:
            self._mounts.mount(self._own(volume, root, read_only=read_only), path)
        if not self.is_attached(volume, mountinfo.read()):
            raise Unavailable(f"{path}: {root} was mounted and is not there")

    def detach(self, spec: Spec) -> None:
        """Take back `attach`, and the mountpoint with it."""
        volume, path = spec.volume, spec.volume.mountpoint
        found = self._at(volume, mountinfo.read())
        if found is not None and found[0].key == self._key:
            while self.is_attached(volume, mountinfo.read()):
                mounts.unmount(path)
                hit("cephfs.unmounted")
        else:
            own = self._own(volume, "", read_only=False)
            self._mounts.unmount(own if found is None else found[0], path)
        if self._binds:
            self._release_whole()
        if not mountpoints.is_of_another(spec):
            mountpoints.take_back(spec, [path])

    def release_whole(self) -> None:
        """Unmount the backend's one mount if no volume has it. Idempotent."""
        if self._binds:
            self._release_whole()

    def _make_mountpoint(self, spec: Spec) -> None:
        path = spec.volume.mountpoint
        paths.make_directories(os.path.dirname(path), 0o711)
        paths.make_directory(path, 0o700)
        if not ownership.is_of(spec, path):
            attributes.write_record(path, spec.record)

    def _at(
        self, volume: Volume, table: Sequence[Mount]
    ) -> tuple[Target, Mount] | None:
        """Return what is mounted for the volume: its own target, or the backend's."""
        found = mountinfo.at(volume.mountpoint, table)
        if found is None:
            return None
        entry = volume.facts.get(ENTRY, "")
        if ADOPTED not in volume.facts and not entry.endswith(volume.id[:12]):
            return None  # of an earlier volume of this name
        if found.root != "/":
            shown = self._base + found.root
            if _is_in(shown, entry) and self._mounts.shows(self._all(), found):
                return self._all(), found
            return None
        own = self._own(volume, _shown_by(found), read_only=False)
        # The kernel's source ends with the root, which the entry has in its name.
        if self._mounts.shows(own, found) and _is_in(own.path, entry):
            return own, found
        return None

    def _own(self, volume: Volume, root: str, *, read_only: bool) -> Target:
        return Target(
            filesystem=self._filesystem,
            path=root or volume.facts.get(ENTRY, ""),
            key=volume.id,
            read_only=read_only,
        )

    def _all(self) -> Target:
        return Target(filesystem=self._filesystem, path=self._base, key=self._key)

    def _is_bound(self, root: str) -> bool:
        return self._binds and _is_in(root, self._base) and root != self._base

    def _revived(self, target: Target, path: str) -> bool:
        """Take a dead mount down; return whether it was one."""
        if target.key != self._key:
            return self._mounts.revive(target, path)
        with self._lock:
            return self._mounts.revive(target, path, bound=True)

    def _bind(self, root: str, path: str) -> None:
        whole = self._all()
        with self._lock:
            table = mountinfo.read()
            there = self._mounts.is_mounted(whole, self._whole, table)
            if there and self._mounts.revive(whole, self._whole):
                there = False
            if not there:
                paths.make_directories(self._whole, 0o700)
                guard.guard(self._whole)
                self._mounts.mount(whole, self._whole)
            source = self._whole + root.removeprefix(self._base)
            mounts.mount(source, path, "", flags=MountFlag.BIND)
            hit("cephfs.mounted")

    def _release_whole(self) -> None:
        whole = self._all()
        with self._lock:
            table = mountinfo.read()
            if any(
                self._mounts.shows(whole, mount) and mount.mountpoint != self._whole
                for mount in table
            ):
                return
            self._mounts.unmount(whole, self._whole)
            if mountinfo.at(self._whole, mountinfo.read()) is None:
                guard.unguard(self._whole)
                paths.remove_directory(self._whole)


def _is_in(path: str, directory: str) -> bool:
    return bool(directory) and mountinfo.is_within(path, directory)


def _shown_by(mount: Mount) -> str:
    """Return the path that a kernel's source names; ceph-fuse's names none."""
    return mount.source.partition(":/")[2] and "/" + mount.source.partition(":/")[2]
