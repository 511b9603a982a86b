"""The driver ``cephfs``: a directory of a CephFS for each volume, for many writers.

What a volume is, and which hosts have it, is in its record in the cluster; its root
carries a copy. Nothing but attach and detach changes this host, so what other hosts
make and remove leaves nothing behind on it.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs

from volplugin.ceph.filesystem import Quota
from volplugin.ceph.registry import Shared, Watch
from volplugin.drivers import mountpoints, ownership
from volplugin.drivers.cephfs_limits import limits_of, require_fits, wanted
from volplugin.drivers.cephfs_mounting import ADOPTED, ENTRY
from volplugin.drivers.cephfs_options import CephFSConfig, CephFSOptions
from volplugin.drivers.cephfs_parts import Parts
from volplugin.drivers.driver import Driver, Plan, Snapshot, Spec
from volplugin.errors import (
    AlreadyExists,
    InvalidArgument,
    NotFound,
    Unavailable,
    VolpluginError,
)
from volplugin.failpoints import hit
from volplugin.host import mountinfo
from volplugin.host.mountinfo import Mount
from volplugin.model import State, Usage, Volume
from volplugin.sizes import format_size


class CephFS(Driver):
    """Directories of one file system."""

    name = "cephfs"
    Options = CephFSOptions
    Config = CephFSConfig

    def __init__(self, config: CephFSConfig, place: str) -> None:
        self._conf = config.conf
        self._backend = os.path.basename(place)
        self._place = place
        self._root = os.path.realpath(config.root or os.path.join(place, "volumes"))
        self._parts = Parts(config, place)
        self._hosts: dict[str, tuple[str, ...]] = {}  # that have a volume, by its id

    def open(self) -> None:
        # Nothing is needed before a volume is, and the cluster may be out of reach.
        return

    def close(self) -> None:
        """End the connections."""
        self._parts.close()

    def health(self) -> str:
        """Say how the cluster is, the file system included."""
        trouble = [self._parts.cluster.health, self._parts.session.health]
        return next((each for each in trouble if each != "ok"), "ok")

    def roots(self) -> Sequence[str]:
        return [self._root, self._place]

    def plan(self, name: str, volume_id: str, options: CephFSOptions) -> Plan:
        problem = self._parts.mounts.problem()
        if problem is not None:
            raise Unavailable(problem)
        path = self._mountpoint(name)
        if options.path is not None:
            return Plan(mountpoint=path, facts=self._parts.adopted.plan(options.path))
        place = self._parts.place()
        place.check()
        entry = place.entry(name, volume_id)
        return Plan(mountpoint=path, facts={ENTRY: entry})

    def create(self, spec: Spec) -> None:
        volume = spec.volume
        if not ownership.is_of(spec, volume.mountpoint):
            mountpoints.require_free(volume.mountpoint)
        self._parts.records.make(volume)
        hit("cephfs.record")
        if ADOPTED in volume.facts:
            self._parts.adopted.make(spec)
        else:
            self._parts.place().make(volume.facts[ENTRY], wanted(spec))
        hit("cephfs.made")
        self._parts.records.finish(volume)

    def remove(self, spec: Spec) -> None:
        volume = spec.volume
        # A volume that was never finished has no mount; the cluster may be away.
        self.detach(spec)
        self._parts.records.begin_removal(volume)
        hit("cephfs.removal")
        if ADOPTED in volume.facts:
            self._parts.adopted.release(spec)
        else:
            is_finished = volume.state is not State.CREATING
            entry = volume.facts[ENTRY]
            self._parts.place().remove(entry, is_finished=is_finished)
        self._parts.records.remove(volume)
        self._hosts.pop(volume.id, None)

    def attach(self, spec: Spec) -> None:
        volume = spec.volume
        self._held(volume, self._parts.records.hold(volume, spec.options.access))
        hit("cephfs.hold")
        self._parts.mounting.attach(spec, self._root_of(spec))
        addresses = self._parts.mounting.addresses(volume)
        if addresses:
            shared = self._parts.records.hold(volume, spec.options.access, addresses)
            self._held(volume, shared)

    def detach(self, spec: Spec) -> None:
        self._parts.mounting.detach(spec)
        hit("cephfs.detached")
        self._parts.records.release(spec.volume)

    def attaches(self, volume: Volume) -> bool:
        return True

    def is_attached(self, volume: Volume, table: Sequence[Mount]) -> bool:
        return self._parts.mounting.is_attached(volume, table)

    def status(
        self, volume: Volume, options: CephFSOptions, *, attached: bool
    ) -> Mapping[str, Any]:
        told: dict[str, Any] = {
            "path": volume.facts.get(ENTRY, ""),
            "cluster": self.health(),
        }
        if options.size is not None:
            told["size"] = format_size(options.size)
        if options.inodes is not None:
            told["inodes"] = str(options.inodes)
        hosts = self._hosts.get(volume.id)
        if hosts:
            told["other-hosts"] = list(hosts)
        if attached and not self._parts.mounting.is_alive(volume, mountinfo.read()):
            told["mount"] = (
                "dead: its ceph-fuse has ended; once the containers that have it are"
                " stopped, the next one gets a new one"
            )
        return told

    # Shares

    def find(self, name: str) -> Volume | None:
        """Return the volume of this name, as this host's."""
        shared = self._parts.registry().read(name)
        return None if shared is None else self._ours(shared)

    def volumes(self) -> Iterator[Volume]:
        """Return all volumes of the file system's directory."""
        for shared in self._parts.registry().all():
            yield self._ours(shared)

    def follow(self, changed: Callable[[str | None], None]) -> Watch:
        """Have ``changed`` called for what other hosts do."""
        return self._parts.registry().watch(changed)

    def take_over(self, spec: Spec) -> Sequence[str]:
        """Drop the other hosts that hold the volume; fence what can be."""
        self._hosts.pop(spec.volume.id, None)
        return self._parts.records.take_over(spec.volume)

    # Limits and usage

    def plan_resize(self, spec: Spec, options: Any, *, attached: bool) -> None:
        holds = self._parts.files.holds(self._root_of(spec))
        require_fits(Quota(size=options.size, inodes=options.inodes), holds)

    def resize(self, spec: Spec, *, attached: bool) -> None:
        root = self._root_of(spec)
        limits = limits_of(spec)
        before = self._parts.files.quota(root)
        if limits != before:
            require_fits(limits, self._parts.files.holds(root))
            self._parts.files.set_quota(root, limits)
        hit("cephfs.resize")
        self._parts.files.write_record(root, spec.record)
        self._parts.records.update(spec.volume)

    def measure(self, specs: Sequence[Spec]) -> Mapping[str, Usage]:
        found = {}
        for spec in specs:
            try:
                holds = self._parts.files.holds(self._root_of(spec))
            except Unavailable:
                if self._parts.session.health != "ok":
                    raise  # so will be all others
                continue
            except (VolpluginError, OSError):
                continue  # it is missing: Mount tells
            size = holds.quota.size
            free = holds.free if size is None else max(size - holds.used, 0)
            found[spec.volume.id] = Usage(
                used=holds.used,
                available=min(free, holds.free),
                size=size,
                inodes_used=holds.inodes,
                inodes=holds.quota.inodes,
            )
        return found

    def purge(self, stop: Callable[[], bool]) -> bool:
        if not os.path.exists(self._conf):
            return True  # no cluster: the backend that every driver has by itself
        self._parts.mounting.release_whole()
        self._parts.forget_earlier_boots(self._mountpoint)
        return self._parts.place().purge(stop)

    # Snapshots

    def snapshots(self, spec: Spec) -> Sequence[Snapshot]:
        """Return the volume's snapshots, oldest first."""
        entry = spec.volume.facts[ENTRY]
        inner = self._root_of(spec).removeprefix(entry).strip("/")
        found = self._parts.files.snapshots(entry, inner)
        return [
            Snapshot(name=kept.name, created_at=kept.created_at, size=kept.size)
            for kept in found
        ]

    def take_snapshot(self, spec: Spec, name: str, *, attached: bool) -> None:
        """Keep the volume as it is; its files are below ``.snap/NAME`` in it.

        Hosts hand in what they have written before, as the metadata server asks them,
        but the kernel's client a little late: this one's is waited for.
        """
        if name.startswith("_") or "/" in name or name in {".", ".."}:
            raise InvalidArgument(
                f"{name!r} is no name of a snapshot: it has no / and begins with no _"
            )
        if attached:
            self._parts.mounting.flush(spec.volume)
        try:
            self._parts.files.take_snapshot(spec.volume.facts[ENTRY], name)
        except FileExistsError as error:
            raise AlreadyExists(
                f"there is a snapshot {name!r} of it: drop that first, or use another"
                f" name"
            ) from error

    def drop_snapshot(self, spec: Spec, name: str) -> None:
        """Delete a snapshot; nothing depends on it."""
        try:
            self._parts.files.drop_snapshot(spec.volume.facts[ENTRY], name)
        except FileNotFoundError as error:
            raise NotFound(f"there is no snapshot {name!r} of it") from error

    def _root_of(self, spec: Spec) -> str:
        """Return the volume's root in the file system, and check that it is that."""
        entry = spec.volume.facts[ENTRY]
        adopted = ADOPTED in spec.volume.facts
        root = entry if adopted else self._parts.place().root(entry)
        found = self._parts.files.record(root)
        if found is None:
            raise Unavailable(
                f"{root} is missing in the file system, or has lost its record: restore"
                f" it, or remove the volume"
            )
        if ownership.id_in(found) != spec.volume.id:
            raise Unavailable(
                f"{root} is the directory of another volume,"
                f" {ownership.name_in(found)!r}: look at its trusted.volplugin"
            )
        return root

    def _held(self, volume: Volume, shared: Shared) -> None:
        self._hosts[volume.id] = tuple(self._parts.records.hosts(shared))

    def _ours(self, shared: Shared) -> Volume:
        volume = shared.volume
        self._hosts[volume.id] = tuple(self._parts.records.hosts(shared))
        return attrs.evolve(
            volume,
            backend=self._backend,
            mountpoint=self._mountpoint(volume.name),
        )

    def _mountpoint(self, name: str) -> str:
        return os.path.join(self._root, name)
