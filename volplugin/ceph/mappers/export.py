"""The mapper ``qemu``: a FUSE export of qemu-storage-daemon, and a loop device on it.

It takes neither a kernel module of RBD's nor one of NBD's. A folder for each mapping,
``PLACE/KEY``, has:

- ``disk-XXXXXXXX``, the mountpoint of the export: a file that looks as long as the
  image. Its name is drawn anew for each mapping, so that the path which the kernel
  shows of a loop device proves whose it is, though all is dead, and whichever mount
  namespace looks.
- ``device``, the loop device and its `loops.sequence`: a daemon that is ended by
  someone else detaches its mount, and the loop device's file has no path then.
- ``pid``, the daemon's record (`daemons`), ``ready``, which the daemon makes when it
  listens, ``log``, and ``monitor``, its socket, by which it is told of the image: so it
  can be started while the cluster is still asked for other things.
- ``conf``, the configuration of the daemon's RADOS client. No key is in it that was not
  in the one it is a copy of.

Taken away in the order: loop device, daemon, mount, files. The daemon ends by SIGTERM
only, if it can: else the cluster takes its client for alive for half a minute.
"""

import contextlib
import logging
import os
import secrets
import shutil
import threading
from collections.abc import Iterator
from typing import ClassVar, Final

import attrs

from volplugin.ceph.mappers import Target, growth, qemu
from volplugin.ceph.mappers.qmp import monitor
from volplugin.errors import (
    NotFound,
    Unavailable,
    Unsupported,
    VolpluginError,
    from_os_error,
)
from volplugin.failpoints import hit
from volplugin.host import daemons, loops, mountinfo, mounts, nodes, paths
from volplugin.host.mountinfo import Mount
from volplugin.host.patience import outwait
from volplugin.logs import log

logger = logging.getLogger(__name__)

_DISK: Final = "disk-"
_START_WAIT: Final = 10.0  # seconds for a daemon to start
_GRACE: Final = 5.0  # seconds for what waits for the cluster, before it is ended
_UNMOUNT_WAIT: Final = 5.0  # seconds for others to leave the export


@attrs.frozen
class _Loop:
    device: str
    sequence: str | None


@attrs.frozen
class _Folder:
    """The files of one mapping."""

    path: str

    def file(self, name: str) -> str:
        return os.path.join(self.path, name)

    @property
    def record(self) -> str:
        return self.file("pid")

    def disks(self) -> list[str]:
        """Return the mountpoints, of which more than one is what deaths left."""
        try:
            names = os.listdir(self.path)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise from_os_error(error, f"list {self.path}") from error
        return [self.file(name) for name in sorted(names) if name.startswith(_DISK)]

    def is_prepared(self) -> bool:
        """Tell whether a daemon listens that was told of no image yet."""
        listens = os.path.exists(self.file(qemu.READY))
        return listens and not self.disks() and daemons.find(self.record) is not None

    def recorded(self) -> _Loop | None:
        """Return the loop device that was noted."""
        try:
            with open(self.file("device"), encoding="ascii") as file:
                device, _, sequence = file.read().strip().partition(" ")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise from_os_error(error, f"read {self.file('device')}") from error
        return _Loop(device, sequence) if sequence else None

    def loops(self) -> list[_Loop]:
        """Return the loop devices of this mapping that there are now."""
        disks, noted = set(self.disks()), self.recorded()
        found = []
        for device, file in loops.backing_files().items() if disks or noted else ():
            loop = _Loop(device, loops.sequence(device))
            if file in disks or loop == noted:
                found.append(loop)
        return found


class QemuExport:
    """Maps by a qemu-storage-daemon for each image; see `mappers.Mapper`."""

    name: ClassVar[str] = "qemu"

    def __init__(self, place: str) -> None:
        self._place = place

    def problem(self) -> str | None:
        """Say which program or device is missing, and whose package has it."""
        return qemu.problem()

    def supports(self, target: Target) -> str | None:
        """Take every image, if what is said of its encryption is whole."""
        return qemu.objection(target)

    def prepare(self, target: Target) -> None:
        """Start the daemon, which serves nothing yet."""
        objection = qemu.objection(target)
        if objection is not None:
            raise Unsupported(f"map {target}: {objection}")
        folder = self._folder(target)
        if folder.is_prepared():
            return
        self.unmap(target)
        with self._or_unmap(target):
            paths.make_directories(self._place, 0o700)
            paths.make_directory(folder.path, 0o700)
            _start(target, folder)

    def map(self, target: Target) -> str:
        """Have the daemon export the image, and make a loop device of that."""
        folder = self._folder(target)
        for loop in folder.loops():
            if daemons.find(folder.record) and _suits(loop, target):
                return loop.device
        self.prepare(target)
        with self._or_unmap(target):
            return _map(target, folder)

    def unmap(self, target: Target) -> None:
        """Clear the loop device, end the daemon, unmount what it left."""
        folder = self._folder(target)
        if paths.identity(folder.path) is None:
            return
        hit("export.clear")
        for loop in folder.loops():
            with _unless_stuck(folder.record):
                flushed = loops.clear(loop.device, loop.sequence)
            if not flushed:
                event = "a device could not be flushed: its last writes may be lost"
                log(logger, logging.WARNING, event, image=target.image, id=target.key)
        hit("export.end")
        daemons.end(folder.record, grace=_GRACE)
        hit("export.unmount")
        for disk in folder.disks():
            _unmount(disk)
        hit("export.files")
        try:
            shutil.rmtree(folder.path)
        except FileNotFoundError:
            return
        except OSError as error:
            raise from_os_error(error, f"remove {folder.path}") from error

    def find(self, target: Target) -> str | None:
        """Look the loop device up in sysfs."""
        return next((loop.device for loop in self._folder(target).loops()), None)

    def is_mapped_by(self, target: Target, mount: Mount) -> bool:
        """Compare the mount's device number with that of the loop device."""
        return any(
            _number(loop.device) == mount.device
            for loop in self._folder(target).loops()
        )

    def grow(self, target: Target) -> None:
        """Let the daemon take the new length, then the loop device."""
        folder = self._folder(target)
        device, disks = self.find(target), folder.disks()
        if device is None or not disks:
            raise NotFound(f"the image {target.image} isn't mapped here")
        growth.grow(target, folder.file(qemu.MONITOR), disks[0])
        loops.set_capacity(device)

    def alive(self, target: Target) -> bool:
        """Tell whether the daemon runs, and the loop device is there."""
        folder = self._folder(target)
        return daemons.find(folder.record) is not None and bool(folder.loops())

    @contextlib.contextmanager
    def _or_unmap(self, target: Target) -> Iterator[None]:
        """Take away what the block has made, if it fails."""
        try:
            yield
        except BaseException:
            # The error is the one to tell; what is left is taken away by the next call.
            with contextlib.suppress(VolpluginError):
                self.unmap(target)
            raise

    def _folder(self, target: Target) -> _Folder:
        return _Folder(os.path.join(self._place, target.key))


def _start(target: Target, folder: _Folder) -> None:
    """Start the daemon; return once it can open images."""
    hit("export.daemon")
    ready = folder.file(qemu.READY)
    daemons.start(
        qemu.words(target, folder.path),
        record=folder.record,
        log=folder.file("log"),
        folder=folder.path,
        ready=lambda: os.path.exists(ready),
        limit=_START_WAIT,
        doing=f"map {target}",
        failed=lambda said: qemu.failure(target, said),
    )
    # Fails for its configuration, when librbd and what that needs have been loaded,
    # which takes as long as to open an image.
    with (
        contextlib.suppress(Unavailable),
        monitor(folder.file(qemu.MONITOR), limit=_START_WAIT) as daemon,
    ):
        daemon.run("blockdev-add", **qemu.NO_IMAGE)


def _map(target: Target, folder: _Folder) -> str:
    disk = folder.file(f"{_DISK}{secrets.token_hex(4)}")
    _write(folder.file(qemu.CONF), qemu.configuration(target.access))
    _write(disk, "")
    hit("export.open")
    with monitor(folder.file(qemu.MONITOR), limit=qemu.limit(target)) as daemon:
        try:
            for command, arguments in qemu.requests(target, disk, folder.path):
                daemon.run(command, **arguments)
        except Unavailable as error:
            raise qemu.failure(target, str(error)) from error
    # A loop device of the empty file below would take writes, and keep none.
    found = mountinfo.at(disk, mountinfo.read())
    if found is None or not found.kind.startswith("fuse"):
        raise Unavailable(f"{disk} was exported and is not mounted: map it again")
    hit("export.loop")
    device = loops.make(disk, read_only=target.read_only)
    hit("export.device")
    _write(folder.file("device"), f"{device} {loops.sequence(device) or ''}\n")
    return device


def _suits(loop: _Loop, target: Target) -> bool:
    try:
        with open(f"/sys/block/{loop.device[5:]}/ro", encoding="ascii") as file:
            return (file.read().strip() == "1") is target.read_only
    except OSError:  # it has just gone
        return False


def _number(device: str) -> str | None:
    try:
        return nodes.number_of(device[5:])
    except OSError:  # it has just gone
        return None


@contextlib.contextmanager
def _unless_stuck(record: str) -> Iterator[None]:
    """Kill the daemon if the block lasts too long, which ends all I/O with errors."""

    def kill() -> None:
        with contextlib.suppress(VolpluginError):
            daemons.end(record, grace=0)

    timer = threading.Timer(_GRACE, kill)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _unmount(disk: str) -> None:
    """Unmount what a daemon that was killed left, once others have left it."""

    def unmount() -> None:
        while mountinfo.at(disk, mountinfo.read()) is not None:
            mounts.unmount(disk)

    outwait(unmount, _UNMOUNT_WAIT)


def _write(path: str, text: str) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o600)
        with open(descriptor, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(text)
    except OSError as error:
        raise from_os_error(error, f"write {path}") from error
