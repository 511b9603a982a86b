"""What the driver ``cephfs`` is made of, wired from its settings."""

import os
import threading
from collections.abc import Callable

import attrs

from volplugin.ceph import fsmap, identity
from volplugin.ceph.cluster import Cluster
from volplugin.ceph.filesystem import FileSystem
from volplugin.ceph.fsmap import Known, Subvolumes
from volplugin.ceph.fsmounts import Mounts
from volplugin.ceph.fsnotes import Notes
from volplugin.ceph.fsplaces import Directories, Place, SubvolumeDirectories
from volplugin.ceph.fsrecords import Records
from volplugin.ceph.fssession import Session
from volplugin.ceph.registry import Registry
from volplugin.drivers.ceph_settings import access_of
from volplugin.drivers.cephfs_adopted import Adopted
from volplugin.drivers.cephfs_mounting import Mounting
from volplugin.drivers.cephfs_options import CephFSConfig
from volplugin.host import mountinfo, processes
from volplugin.model import Volume


class Parts:
    """The parts of one backend; those that need the cluster come at first use."""

    def __init__(self, config: CephFSConfig, place: str) -> None:
        access = access_of(config)
        self._config = config
        self._lock = threading.Lock()
        self._known: Known | None = None  # guarded by the lock, with the next two
        self._registry: Registry | None = None
        self._place: Place | None = None
        self.cluster = Cluster(access)
        notes = Notes(os.path.join(place, "sessions"), self.cluster.blocklist)
        self.session = Session(access, config.fs, config.base, notes)
        self.files = FileSystem(self.session, access.user)
        self.mounts = Mounts(self.cluster, os.path.join(place, "mounts"), config.mount)
        self.mounting = Mounting(
            self.mounts, place, config.base, config.fs, config.mounts
        )
        self.records = Records(
            self.cluster,
            self.registry,
            lambda: identity.ensure(place),
            processes.boot_id(),
            config.host_name,
        )
        self.adopted = Adopted(self.files, config.base, self._volumes)

    def close(self) -> None:
        """End the connections."""
        self.session.close()
        self.cluster.close()

    def registry(self) -> Registry:
        """Return the records' registry; asks the cluster for its pool, once.

        Its namespace is the base's path: who has the same base has the same volumes.
        """
        with self._lock:
            if self._registry is None:
                pool = self._config.registry_pool or self._file_system().data_pool
                namespace = self._config.base.strip("/")
                self._registry = Registry(self.cluster, pool, namespace)
            return self._registry

    def place(self) -> Place:
        """Return where volumes are; asks the cluster once, for subvolumes alone."""
        group = self._config.subvolume_group
        with self._lock:
            if self._place is None and group is None:
                self._place = Directories(self.files, self._config.base)
            if self._place is None:
                name = self._config.fs or self._file_system().name
                subvolumes = Subvolumes(self.cluster, name, str(group))
                self._place = SubvolumeDirectories(
                    self.files, subvolumes, self._config.base
                )
            return self._place

    def forget_earlier_boots(self, mountpoint: Callable[[str], str]) -> None:
        """Drop holds of this host from before it was booted."""
        table = mountinfo.read()

        def is_attached(volume: Volume) -> bool:
            ours = attrs.evolve(volume, mountpoint=mountpoint(volume.name))
            return self.mounting.is_attached(ours, table)

        self.records.forget_earlier_boots(is_attached)

    def _file_system(self) -> Known:
        if self._known is None:
            self._known = fsmap.find(self.cluster, self._config.fs)
        return self._known

    def _volumes(self) -> list[Volume]:
        return [shared.volume for shared in self.registry().all()]
