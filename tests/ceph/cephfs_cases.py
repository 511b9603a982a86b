"""Hosts for the tests of the driver ``cephfs``: drivers with places of their own."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import attrs
from support.ceph import Ceph

from volplugin import options
from volplugin.ceph.bindings import load
from volplugin.drivers.cephfs import CephFS
from volplugin.drivers.cephfs_options import CephFSConfig, CephFSOptions
from volplugin.drivers.driver import Spec
from volplugin.host import mountinfo
from volplugin.host.mountinfo import Mount
from volplugin.model import State, Volume
from volplugin.store import records

MOUNT: Final = os.environ.get("VOLPLUGIN_TEST_CEPHFS_MOUNT", "fuse")
"""What mounts: the machine that ``tests/kernel`` starts has the kernel's client."""

SMALL: Final = {"size": "16m"}


@attrs.define(eq=False)
class HostCase:
    """A host that shares the volumes of a directory with others."""

    name: str
    folder: Path
    driver: CephFS
    config: CephFSConfig

    @classmethod
    def of(
        cls, ceph: Ceph, directory: str, folder: Path, name: str = "a", **settings: Any
    ) -> "HostCase":
        """Open the driver on a host, by the user of least rights."""
        given = {
            "conf": str(ceph.conf),
            "user": "volplugin",
            "keyring": str(ceph.least()),
            "directory": directory,
            "mount": MOUNT,
            "host-name": f"host-{name}",
            "timeout": 20,
            **{key.replace("_", "-"): value for key, value in settings.items()},
        }
        config = options.parse_settings(CephFSConfig, given, subject="a test")
        place = folder / name / "cephfs"
        driver = CephFS(config, str(place))
        driver.open()
        return cls(name, place, driver, config)

    def restarted(self) -> "HostCase":
        """Return the host with a plugin that was started anew, and knows nothing."""
        driver = CephFS(self.config, str(self.folder))
        driver.open()
        return attrs.evolve(self, driver=driver)

    def parsed(self, raw: Mapping[str, str]) -> CephFSOptions:
        """Return options as the driver takes them."""
        return options.parse(CephFSOptions, raw, subject="driver cephfs")

    def spec(self, name: str, **raw: str) -> Spec:
        """Plan a volume and return it, *creating*."""
        parsed = self.parsed(raw)
        volume_id = uuid.uuid4().hex
        plan = self.driver.plan(name, volume_id, parsed)
        return self.spec_of(
            Volume(
                name=name,
                id=volume_id,
                backend="cephfs",
                driver="cephfs",
                options=raw,
                facts=plan.facts,
                mountpoint=plan.mountpoint,
                created_at="2024-01-01T00:00:00.000Z",
            )
        )

    def spec_of(self, volume: Volume) -> Spec:
        """Return a volume as the core gives it to the driver."""
        record = records.encode(attrs.evolve(volume, state=State.READY))
        return Spec(volume=volume, options=self.parsed(volume.options), record=record)

    def made(self, name: str, **raw: str) -> Spec:
        """Make a volume and return it, *ready*."""
        spec = self.spec(name, **raw)
        self.driver.create(spec)
        return in_state(spec, State.READY)

    def attached(self, name: str, **raw: str) -> tuple[Spec, Path]:
        """Make a volume and attach it; return it and its mountpoint."""
        spec = self.made(name, **raw)
        self.driver.attach(spec)
        return spec, Path(spec.volume.mountpoint)

    def found(self, name: str) -> Spec:
        """Return a volume that another host made."""
        volume = self.driver.find(name)
        assert volume is not None
        return self.spec_of(volume)

    def resized(self, spec: Spec, **raw: str) -> Spec:
        """Return the volume with other options."""
        changed = {**spec.volume.options, **raw}
        return self.spec_of(attrs.evolve(spec.volume, options=changed))

    def remove(self, spec: Spec) -> None:
        """Remove the volume, as the core does, and what it leaves."""
        self.driver.remove(in_state(spec, State.REMOVING))
        assert self.driver.purge(lambda: False)

    def is_attached(self, spec: Spec) -> bool:
        """Tell whether the volume is attached here."""
        return self.driver.is_attached(spec.volume, mountinfo.read())

    def mounts(self) -> list[Mount]:
        """Return the mounts of this host."""
        return mountinfo.below(str(self.folder), mountinfo.read())

    def left(self) -> list[str]:
        """Return what is on this host but its identity and empty folders."""
        return sorted(
            str(path.relative_to(self.folder))
            for path in self.folder.rglob("*")
            if path.name not in {"identity", "volumes", "mounts", "sessions"}
            and path.parent.name != "sessions"
        )

    def detach_all(self) -> None:
        """Detach all volumes from this host."""
        for volume in list(self.driver.volumes()):
            self.driver.detach(self.spec_of(volume))

    def clear(self) -> None:
        """Take away all volumes, and end the connections."""
        try:
            for volume in list(self.driver.volumes()):
                self.driver.take_over(self.spec_of(volume))
                self.driver.remove(self.spec_of(volume))
            self.driver.purge(lambda: False)
        finally:
            self.driver.close()


def in_state(spec: Spec, state: State) -> Spec:
    """Return the volume in another state of its life."""
    return attrs.evolve(spec, volume=attrs.evolve(spec.volume, state=state))


class Administrator:
    """The file system as its administrator sees it, without a mount."""

    def __init__(self, ceph: Ceph) -> None:
        self._cephfs = load("cephfs")
        self._files = self._cephfs.LibCephFS(conffile=str(ceph.conf), auth_id="admin")
        self._files.mount()

    def make(self, path: str, mode: int = 0o755) -> None:
        """Make a directory and those above it."""
        self._files.mkdirs(path.encode(), mode)

    def write(self, path: str, text: str) -> None:
        """Write a file."""
        descriptor = self._files.open(path.encode(), "w", 0o644)
        self._files.write(descriptor, text.encode(), 0)
        self._files.close(descriptor)

    def attribute(self, path: str, name: str) -> bytes | None:
        """Return an attribute, None without one."""
        try:
            value: bytes = self._files.getxattr(path.encode(), name.encode(), 4096)
        except (self._cephfs.NoData, self._cephfs.ObjectNotFound):
            return None
        return value

    def set_attribute(self, path: str, name: str, value: str) -> None:
        """Set an attribute."""
        self._files.setxattr(path.encode(), name.encode(), value.encode(), 0)

    def status(self, path: str) -> Any:
        """Return what stat(2) tells of a path."""
        return self._files.stat(path.encode())

    def names(self, path: str) -> list[str]:
        """Return what is in a directory, nothing for one that is not there."""
        try:
            directory = self._files.opendir(path.encode())
        except self._cephfs.ObjectNotFound:
            return []
        found = []
        while (entry := self._files.readdir(directory)) is not None:
            found.append(entry.d_name.decode())
        self._files.closedir(directory)
        return sorted(set(found) - {".", ".."})

    def remove(self, path: str) -> None:
        """Remove a directory with what is in it."""
        for name in self.names(path):
            child = f"{path}/{name}"
            try:
                self._files.unlink(child.encode())
            except self._cephfs.Error:
                self.remove(child)
        with contextlib.suppress(self._cephfs.ObjectNotFound):
            self._files.rmdir(path.encode())

    def close(self) -> None:
        """End the session."""
        self._files.shutdown()


def clean(folder: Path) -> None:
    """Make a test's folder deletable: mountpoints in it are immutable."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            with contextlib.suppress(OSError):
                os.chmod(path, 0o700)
    shutil.rmtree(folder, ignore_errors=True)
