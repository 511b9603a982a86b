"""Volumes of other plugins made available: one Mount there, one bind mount here.

The plugin's mountpoint is bound to one of ours, which never changes and is guarded
while nothing is there. However many holders a volume has here, its plugin is asked to
mount it once, by an ID of its own for each time.
"""

import logging
import os
import secrets
from collections.abc import Sequence
from typing import Final

from volplugin.drivers import mountpoints, ownership
from volplugin.drivers.directories import overlap
from volplugin.drivers.driver import Spec
from volplugin.drivers.plugin_notes import MountNote, MountNotes
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
from volplugin.host.mounts import MountFlag
from volplugin.logs import log
from volplugin.model import Volume
from volplugin.parsers import quote
from volplugin.plugins.client import PluginClient, Refused

logger = logging.getLogger(__name__)

LOOK_LIMIT: Final = 5.0  # seconds until a file system that does not answer is dead
_DEAD: Final = "Transport endpoint is not connected"  # ENOTCONN: FUSE without a daemon
_FOUND: Final = "found: "
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
        is dead, as a FUSE file system whose daemon was killed, is made anew.
        """
        volume = spec.volume
        if self.is_attached(volume, mountinfo.read()):
            trouble = _trouble(volume.mountpoint)
            if trouble is None:
                return
            log(
                logger,
                logging.WARNING,
                "its mount is dead and is made anew",
                volume=volume.name,
                reason=trouble,
            )
        self.detach(spec, client, name)
        if not mountpoints.require_ready(spec, mountinfo.read()):
            self.make_mountpoint(spec)  # where the root is in memory, a boot empties it
        note = self._notes.begin(volume.id, secrets.token_hex(32))
        hit("plugin.mount")
        try:
            answered = client.mount(name, note.mount_id)
        except Refused as error:
            self._notes.drop(volume.id)
            raise Unavailable(f"plugin {client.name}: Mount: {error}") from error
        hit("plugin.mounted")
        self._notes.answered(volume.id, note, answered)
        source = self._checked(answered, client)
        self._bind(source, volume)
        hit("plugin.bound")

    def _checked(self, answered: str, client: PluginClient) -> str:
        """Return the path of the plugin's mountpoint without links; look whether it is.

        An engine would bind whatever it is told: its own bundle for no path at all.
        """
        said = f"plugin {client.name} answers Mount with {quote(answered)}"
        if not answered.startswith("/") or "\0" in answered:
            raise Unavailable(f"{said}, which is no absolute path")
        path = os.path.join(
            os.path.realpath(os.path.dirname(answered.rstrip("/"))),
            os.path.basename(answered.rstrip("/")),
        )
        kind = _kind(path)
        if kind == "symbolic link":
            path = os.path.realpath(path)
            kind = _kind(path)
        if kind != "directory":
            raise Unavailable(f"{said}, which is {kind or 'not there'}, no directory")
        if overlap(path, [self._place]) is not None:
            raise Unavailable(f"{said}, which is volplugin's own")
        return path

    def _bind(self, source: str, volume: Volume) -> None:
        flags = MountFlag.BIND | MountFlag.REC
        mounts.mount(source, volume.mountpoint, "", flags=flags)
        table = mountinfo.read()
        wanted = mountinfo.inside(source, table)
        found = mountinfo.at(volume.mountpoint, table)
        if found is None or wanted != (found.device, found.root):
            raise Unavailable(f"{source}: it changed while it was being attached")

    def detach(self, spec: Spec, client: PluginClient, name: str) -> None:
        """Take back `attach`, whatever of it was done."""
        volume = spec.volume
        self._unbind(volume)
        note = self._notes.read(volume.id)
        if note is None:
            return
        hit("plugin.unmount")
        try:
            client.unmount(name, note.mount_id)
        except Refused as error:
            # It knows nothing of this mount: it has started anew, or never made it.
            self._clear_dead(note, f"plugin {client.name}: Unmount: {error}")
        hit("plugin.unmounted")
        self._notes.drop(volume.id)

    def _clear_dead(self, note: MountNote, refusal: str) -> None:
        """Unmount what a plugin that died has left at its mountpoint.

        It keeps the next one from mounting there (rclone: "non-empty mountpoint").
        Raise `Unavailable` where the mount is alive: then the refusal counts.
        """
        path = note.path.rstrip("/")
        path = os.path.join(
            os.path.realpath(os.path.dirname(path)), os.path.basename(path)
        )
        if not note.path or mountinfo.at(path, mountinfo.read()) is None:
            return
        trouble = _trouble(path)
        if trouble != _DEAD:
            raise Unavailable(refusal)
        _unmount(path)

    def _unbind(self, volume: Volume) -> None:
        path = volume.mountpoint
        while self.is_attached(volume, table := mountinfo.read()):
            hit("plugin.unbind")
            for mount in reversed(mountinfo.below(path, table)):
                _unmount(mount.mountpoint)
            _unmount(path)

    def is_attached(self, volume: Volume, table: Sequence[Mount]) -> bool:
        """Tell from a mount table whether the volume is attached."""
        # The mountpoint holds the id, so nobody else's mount is there.
        mountpoint = volume.mountpoint
        return (
            os.path.basename(os.path.dirname(mountpoint)) == volume.id
            and mountinfo.at(mountpoint, table) is not None
        )


def _unmount(path: str) -> None:
    patience.outwait(lambda: mounts.unmount(path), _BUSY_LIMIT)


def _trouble(path: str) -> str | None:
    """Say what is wrong with a mount that is there, None for nothing."""
    # Of its file system, which is asked each time: the kernel may know the directory
    # for a while after its daemon has died.
    found, reason = _look(path, "--file-system", "%T")
    return None if found else reason


def _kind(path: str) -> str:
    """Return what kind of file ``path`` is, "" for none."""
    found, reason = _look(path, "%F")
    if not found and reason != "No such file or directory":
        raise Unavailable(f"look at {path}: {reason}")
    return found


def _look(path: str, *words: str) -> tuple[str, str]:
    """Return what stat(1) finds by its format, the last of ``words``, or why nothing.

    In a child process: a file system whose daemon hangs holds whoever looks at it.
    Raise `Unavailable` if it takes too long.
    """
    *options, wanted = words
    command = ["stat", *options, f"--format={_FOUND}{wanted}", "--", path]
    doing = f"look at {path}"
    try:
        said = commands.run(command, limit=LOOK_LIMIT, doing=doing, ok=(0, 1)).strip()
    except VolpluginError as error:
        raise Unavailable(str(error)) from error
    if said.startswith(_FOUND):
        return said.removeprefix(_FOUND), ""
    return "", said.rpartition(": ")[2]
