"""The driver ``rbd``: volumes in a Ceph cluster that follow the container to its host.

A volume is an image with a file system, mapped and mounted on the one host that has it.
Its record is an object of the cluster, and says who has it; see ``volplugin.ceph``.
"""

import contextlib
import json
import os
import socket
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs
from cattrs.preconf.json import make_converter

from volplugin.ceph import identity, image_snapshots, image_trash
from volplugin.ceph.cluster import Cluster
from volplugin.ceph.holding import Holding
from volplugin.ceph.images import Images
from volplugin.ceph.registry import Holder, Registry, Shared, Watch
from volplugin.drivers.ceph_settings import access_of
from volplugin.drivers.driver import Driver, Found, Plan, Snapshot, Spec
from volplugin.drivers.rbd_attaching import Attacher
from volplugin.drivers.rbd_making import Maker
from volplugin.drivers.rbd_notes import notes_of
from volplugin.drivers.rbd_options import RbdConfig, RbdOptions
from volplugin.drivers.rbd_planning import Planner
from volplugin.drivers.rbd_resizing import Resizer
from volplugin.drivers.rbd_roots import Mountpoints
from volplugin.drivers.rbd_watching import Overview
from volplugin.errors import InvalidArgument, VolpluginError
from volplugin.host import filesystems, mountinfo, paths, processes, sparse
from volplugin.host.mountinfo import Mount
from volplugin.model import State, Usage, Volume
from volplugin.times import rfc3339

_converter = make_converter()


class Rbd(Driver):
    """One pool and namespace of a cluster."""

    name = "rbd"
    Options = RbdOptions
    Config = RbdConfig

    def __init__(self, config: RbdConfig, place: str) -> None:
        self._config = config
        self._place = os.path.realpath(place)
        self._backend = os.path.basename(place)
        self._root = os.path.realpath(config.root or place)
        self._cluster = Cluster(access_of(config))
        namespace = config.namespace or ""
        self._images = Images(self._cluster, namespace)
        self._registry = Registry(self._cluster, config.pool, namespace)
        self._mountpoints = Mountpoints(self._root, self._backend)
        self._holding_made: Holding | None = None
        self._planner = Planner(config, self._images, self._registry)
        self._maker = Maker(config, self._images, self._registry, self._me)
        self._attacher = Attacher(
            config,
            self._images,
            self._registry,
            self._holding,
            os.path.join(self._place, "mappings"),
        )
        self._resizer = Resizer(self._images, self._registry, self._attacher, self._me)
        self._overview = Overview(self._images, self._holding, self._attacher)
        self._is_swept = False

    def open(self) -> None:
        paths.make_directories(self._place, 0o711)
        for name in ("staging", "mappings"):
            paths.make_directory(os.path.join(self._place, name), 0o700)
        self._mountpoints.open()

    def roots(self) -> Sequence[str]:
        return [self._root, self._place]

    def plan(self, name: str, volume_id: str, options: RbdOptions) -> Plan:
        notes = self._planner.plan(name, volume_id, options)
        return Plan(mountpoint=self._mountpoints.of(name), facts=notes.facts())

    def plan_clone(self, source: Spec, snapshot: str | None, options: Any) -> None:
        self._planner.check_clone(source.volume, snapshot, options)

    def create(self, spec: Spec) -> None:
        self._mountpoints.require_free(spec)
        scratch = self._scratch(spec.volume)
        self._maker.make(spec, scratch, self._mounted(spec.source))
        self._mountpoints.make(spec)

    def remove(self, spec: Spec) -> None:
        volume = spec.volume
        self._attacher.detach(volume)
        self._note_pool(notes_of(volume).pool)
        sparse.remove(self._scratch(volume))
        self._maker.remove(volume)
        self._mountpoints.remove(spec)
        self._overview.forget(volume.id)

    def attach(self, spec: Spec) -> None:
        self._mountpoints.clear_stale(spec.volume.mountpoint, spec.volume.id)
        shared = self._attacher.attach(spec, lambda: self._mountpoints.make(spec))
        self._overview.note(shared)

    def detach(self, spec: Spec) -> None:
        self._attacher.detach(spec.volume)

    def attaches(self, volume: Volume) -> bool:
        return True

    def is_attached(self, volume: Volume, table: Sequence[Mount]) -> bool:
        return self._attacher.mapper_of(volume, table) is not None

    def status(
        self, volume: Volume, options: RbdOptions, *, attached: bool
    ) -> Mapping[str, Any]:
        return {
            **self._overview.status(volume, options, attached=attached),
            "cluster": self.health(),
        }

    # Sharing

    def find(self, name: str) -> Volume | None:
        shared = self._registry.read(name)
        if shared is None:
            # Where another host has removed it, it has left its mountpoint on this one.
            self._mountpoints.clear_stale(self._mountpoints.of(name), "")
            return None
        if shared.volume.driver != self.name:
            return None
        self._overview.note(shared)
        return self._localised(shared)

    def volumes(self) -> Iterable[Volume]:
        found = []
        for shared in self._registry.all():
            if shared.volume.driver == self.name:
                self._overview.note(shared)
                found.append(self._localised(shared))
        return found

    def follow(self, changed: Callable[[str | None], None]) -> Watch:
        return self._registry.watch(changed)

    def health(self) -> str:
        return self._cluster.health

    def close(self) -> None:
        self._cluster.close()

    def take_over(self, spec: Spec) -> Sequence[str]:
        volume, notes = spec.volume, notes_of(spec.volume)
        return self._holding().fence(
            volume.name, volume.id, lambda: self._images.watchers(notes.place)
        )

    def discover(self, known: Container[str] = ()) -> Iterator[Found]:
        for volume in self.volumes():
            if volume.name not in known and volume.state is State.READY:
                yield Found(record=_encoded(volume))

    # Sizes, usage and snapshots

    def plan_resize(self, spec: Spec, options: Any, *, attached: bool) -> None:
        self._resizer.plan(spec, options)

    def resize(self, spec: Spec, *, attached: bool) -> None:
        self._resizer.resize(spec)

    def measure(self, specs: Sequence[Spec]) -> Mapping[str, Usage]:
        with contextlib.suppress(VolpluginError):  # its health tells
            self.volumes()
        return self._overview.measure(specs)

    def snapshots(self, spec: Spec) -> Sequence[Snapshot]:
        notes = notes_of(spec.volume)
        found = [
            Snapshot(
                name=each.name,
                created_at=rfc3339(each.created_at, "auto"),
                size=each.size,
            )
            for each in image_snapshots.snapshots(self._images, notes.place)
        ]
        self._overview.note_snapshots(spec.volume.id, len(found))
        return found

    def take_snapshot(self, spec: Spec, name: str, *, attached: bool) -> None:
        image_snapshots.require_name(name)
        mountpoint = self._mounted(spec.volume)
        if mountpoint is not None:
            filesystems.sync(mountpoint)
        image_snapshots.take(self._images, notes_of(spec.volume).place, name)

    def drop_snapshot(self, spec: Spec, name: str) -> None:
        image_snapshots.require_name(name)
        image_snapshots.drop(self._images, notes_of(spec.volume).place, name)

    # What is left to be done in the background

    def purge(self, stop: Callable[[], bool]) -> bool:
        there = self._mountpoints.names()
        volumes = list(self.volumes())
        self._mountpoints.sweep(set(self._registry.names().values()), there)
        pools = {self._config.pool, *self._noted_pools()}
        done = [self._empty(pool, stop) for pool in sorted(pools)]
        if not self._is_swept:
            for volume in volumes:
                if stop():
                    return False
                with contextlib.suppress(VolpluginError):
                    image_snapshots.sweep(self._images, notes_of(volume).place)
            self._is_swept = True
        return all(done)

    def _empty(self, pool: str, stop: Callable[[], bool]) -> bool:
        try:
            return image_trash.empty(self._images, pool, stop)
        except InvalidArgument:
            if pool == self._config.pool:
                raise
            # The pool is gone, and its trash with it.
            paths.remove_directory(os.path.join(self._place, "pools", pool))
            return True

    def _localised(self, shared: Shared) -> Volume:
        return attrs.evolve(
            shared.volume,
            backend=self._backend,
            mountpoint=self._mountpoints.of(shared.volume.name),
        )

    def _scratch(self, volume: Volume) -> str:
        return os.path.join(self._place, "staging", f"{volume.id}.img")

    def _mounted(self, volume: Volume | None) -> str | None:
        """Return where the volume is mounted on this host, or None."""
        if volume is None:
            return None
        here = attrs.evolve(volume, mountpoint=self._mountpoints.of(volume.name))
        is_here = self.is_attached(here, mountinfo.read())
        return here.mountpoint if is_here else None

    def _holding(self) -> Holding:
        if self._holding_made is None:
            self._holding_made = Holding(
                self._registry,
                identity.ensure(self._place),
                processes.boot_id(),
                self._config.host_name or socket.gethostname(),
            )
        return self._holding_made

    def _me(self) -> Holder:
        return self._holding().me("rw")

    def _note_pool(self, pool: str) -> None:
        # Its trash is to be emptied, and no record will tell of it then.
        if pool != self._config.pool:
            paths.make_directories(os.path.join(self._place, "pools", pool), 0o700)

    def _noted_pools(self) -> list[str]:
        try:
            return os.listdir(os.path.join(self._place, "pools"))
        except FileNotFoundError:
            return []


def _encoded(volume: Volume) -> bytes:
    # As the store writes records, see `volplugin.store.records`.
    written = _converter.unstructure(volume)
    return json.dumps(written, separators=(",", ":"), sort_keys=True).encode()
