"""Volumes of other plugins made available: one Mount there, one bind mount here.

The plugin's mountpoint is bound to one of ours, which never changes and is guarded
while nothing is there. However many holders a volume has here, its plugin is asked to
mount it once, by an ID that is the volume's own for life: an Unmount can be asked for
again whatever was forgotten in between.
"""

import contextlib
import hashlib
import logging
import os
from collections.abc import Sequence
from typing import Final

from volplugin.drivers import mountpoints, ownership
from volplugin.drivers.directories import overlap
from volplugin.drivers.driver import Spec
from volplugin.drivers.plugin_notes import MountNotes
from volplugin.errors import Unavailable, VolpluginError
from volplugin.failpoints import hit
from volplugin.host import (
    attributes,
    commands,
    guard,
    mountinfo,
    mounts,
    paths,
    patience,
)
from volplugin.host.mountinfo import Mount
from volplugin.logs import log
from volplugin.model import Volume
from volplugin.parsers import quote
from volplugin.plugins.client import Lost, PluginClient, Refused

logger = logging.getLogger(__name__)

LOOK_LIMIT: Final = 5.0  # seconds in which a file system must answer

_DEAD: Final = ("Transport endpoint is not connected", "Stale file handle")
"""What a file system says that will never answer again: ENOTCONN, ESTALE."""

_FOUND: Final = "found"
_BUSY_LIMIT: Final = 1.0  # seconds that someone may look into a volume being detached


class Mounting:
    """Mounts the volumes of one backend."""

    def __init__(self, place: str) -> None:
        self._place = place
        self._notes = MountNotes(place)

    def open(self) -> None:
        """Make ready what all volumes need."""
        self._notes.open()

    def make_mountpoint(self, spec: Spec) -> None:
        """Make the volume's guarded mountpoint; what is there is success."""
        path = spec.volume.mountpoint
        if not ownership.is_of(spec, path):
            paths.make_directories(os.path.dirname(path), 0o711)
            mountpoints.require_free(path)
            paths.make_directory(path, 0o700)
            hit("plugin.mountpoint")
            attributes.write_record(path, spec.record)
        if not self.is_attached(spec.volume, mountinfo.read()):
            guard.guard(path)
        hit("plugin.guard")

    def take_mountpoint(self, spec: Spec) -> None:
        """Take the mountpoint back; what is not ours there stays."""
        path = spec.volume.mountpoint
        above = os.path.dirname(path)
        mountpoints.take_back(spec, [above, path])
        if paths.identity(above) is not None and not os.listdir(above):
            paths.remove_directory(above)

    def attach(self, spec: Spec, client: PluginClient, name: str) -> None:
        """Have the plugin mount its volume ``name``, and bind that to ours.

        A mount that is there and alive is kept, without a call to the plugin. One that
        is dead, as a FUSE file system whose daemon was killed, is made anew. One that
        hangs may answer again, and containers may have it: that is an error alone.
        """
        volume = spec.volume
        table = mountinfo.read()
        if self.is_attached(volume, table):
            death = _death(volume.mountpoint)
            if death is None:
                return
            log(
                logger,
                logging.WARNING,
                "its mount is dead and is made anew",
                volume=volume.name,
                reason=death,
            )
            self.detach(spec, client, name)
            table = mountinfo.read()
        elif self._notes.read(volume.id) is not None:
            self.detach(spec, client, name)
        if not mountpoints.require_ready(spec, table):
            self.make_mountpoint(spec)  # where the root is in memory, a boot empties it
        self._notes.write(volume.id, "")
        hit("plugin.mount")
        answered = self._mount_there(volume, client, name)
        hit("plugin.mounted")
        found = self._open_there(answered, client)
        try:
            self._notes.write(volume.id, _path_of(found))
            self._bind(found, volume)
        finally:
            os.close(found)
        hit("plugin.bound")

    def _mount_there(self, volume: Volume, client: PluginClient, name: str) -> str:
        try:
            return client.mount(name, mount_id(volume))
        except Refused as refused:
            said = refused
        except Lost:
            raise
        except VolpluginError:  # it was not sent: there is nothing to take back
            self._notes.drop(volume.id)
            raise
        try:
            # Perhaps for an earlier Mount by this ID, whose note a power cut took.
            client.unmount(name, mount_id(volume))
            return client.mount(name, mount_id(volume))
        except Refused:
            self._notes.drop(volume.id)
            raise Unavailable(f"plugin {client.name}: Mount: {said}") from said

    def _open_there(self, answered: str, client: PluginClient) -> int:
        """Open what the plugin answered; refuse what is no directory of its own.

        By a descriptor, which asks no file system whose daemon may hang. An engine
        would take whatever it is told: for no path at all, its own bundle.
        """
        said = f"plugin {client.name} answers Mount with {quote(answered)}"
        if not answered.startswith("/") or "\0" in answered:
            raise Unavailable(f"{said}, which is no absolute path")
        try:
            found = os.open(answered, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise Unavailable(f"{said}: {error.strerror}") from error
        if overlap(_path_of(found), [self._place]) is not None:
            os.close(found)
            raise Unavailable(f"{said}, which is, or is around, volplugin's own")
        return found

    def _bind(self, found: int, volume: Volume) -> None:
        path = _path_of(found)
        mounts.bind(f"/proc/self/fd/{found}", volume.mountpoint)
        table = mountinfo.read()
        bound = mountinfo.at(volume.mountpoint, table)
        if bound is None or mountinfo.inside(path, table) != (bound.device, bound.root):
            raise Unavailable(f"{path}: it changed while it was being attached")

    def detach(self, spec: Spec, client: PluginClient, name: str) -> None:
        """Take back `attach`, whatever of it was done."""
        self.unbind(spec.volume)
        self.unmount_there(spec.volume, client, name)

    def unmount_there(self, volume: Volume, client: PluginClient, name: str) -> None:
        """Have the plugin unmount what it was asked to mount, if it was."""
        path = self._notes.read(volume.id)
        if path is None:
            return
        hit("plugin.unmount")
        try:
            client.unmount(name, mount_id(volume))
        except Refused as error:
            # It knows nothing of this mount: it has started anew, or never made it.
            where = path or self._notes.expected(volume.id)
            if _is_left_alive(where):
                raise Unavailable(
                    f"plugin {client.name}: Unmount: {error}; it is still mounted at "
                    f"{where}"
                ) from error
        hit("plugin.unmounted")
        self._notes.drop(volume.id)

    def note_place(self, volume: Volume, client: PluginClient, name: str) -> None:
        """Note where the plugin will mount the volume, if it says so beforehand."""
        with contextlib.suppress(Refused, Unavailable):
            place = client.get(name).mountpoint
            if place:
                self._notes.expect(volume.id, place)

    def forget(self, volume: Volume) -> None:
        """Drop all notes of a volume that is gone."""
        self._notes.forget(volume.id)

    def let_go(self, spec: Spec, client: PluginClient, name: str) -> None:
        """Have the plugin unmount what it may still have mounted without a note."""
        try:
            client.unmount(name, mount_id(spec.volume))
        except Refused:
            return

    def unbind(self, volume: Volume) -> None:
        """Unmount what is bound here; what is not is success."""
        while self.is_attached(volume, table := mountinfo.read()):
            hit("plugin.unbind")
            for path in mountinfo.to_unmount(volume.mountpoint, table):
                _unmount(path)

    def is_attached(self, volume: Volume, table: Sequence[Mount]) -> bool:
        """Tell from a mount table whether the volume is attached."""
        # The mountpoint holds the id, so nobody else's mount is there.
        mountpoint = volume.mountpoint
        return (
            os.path.basename(os.path.dirname(mountpoint)) == volume.id
            and mountinfo.at(mountpoint, table) is not None
        )


def mount_id(volume: Volume) -> str:
    """Return the volume's mount ID, in the form of a container's."""
    return hashlib.sha256(f"volplugin {volume.id}".encode()).hexdigest()


def _path_of(descriptor: int) -> str:
    """Return the path of an open directory, without links."""
    return os.readlink(f"/proc/self/fd/{descriptor}")


def _unmount(path: str) -> None:
    patience.outwait(lambda: mounts.unmount(path), _BUSY_LIMIT)


def _is_left_alive(path: str) -> bool:
    """Tell whether a plugin has a mount at ``path`` that lives; unmount a dead one.

    That keeps the plugin from mounting there again (rclone: "non-empty mountpoint").
    """
    if not path or mountinfo.at(path, mountinfo.read()) is None:
        return False
    if _death(path) is None:
        return True
    _unmount(path)
    return False


def _death(path: str) -> str | None:
    """Say why a mount that is there is dead, None where it lives.

    Raise `Unavailable` where that can't be told. In a child process: a file system
    whose daemon hangs holds whoever looks at it.
    """
    # Of its file system, which is asked each time: the kernel may know the directory
    # for a while after its daemon has died.
    words = ["stat", "--file-system", f"--format={_FOUND}", "--", path]
    doing = f"look at {path}"
    try:
        said = commands.run(words, limit=LOOK_LIMIT, doing=doing, ok=(0, 1)).strip()
    except VolpluginError as error:
        raise Unavailable(str(error)) from error
    if said.startswith(_FOUND):
        return None
    if not said.endswith(_DEAD):
        raise Unavailable(f"{doing}: {said.rpartition(': ')[2]}")
    return said.rpartition(": ")[2]
