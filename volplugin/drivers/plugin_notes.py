"""Notes of the mounts that we asked other plugins for, and are to take back.

One JSON file a volume in the backend's place, named by the volume's id, written before
the plugin is asked: whatever dies in between, the next look finds the mount ID. Notes
outlive a boot, as plugins that mount again after one (rclone) still know the ID.
"""

import json
import os
from typing import Final

import attrs

from volplugin.host import paths

_FOLDER: Final = "mounts"


@attrs.frozen(kw_only=True)
class MountNote:
    """A Mount that a plugin was asked for; ``path`` is "" until it has answered."""

    mount_id: str
    path: str = ""


class MountNotes:
    """The notes of one backend."""

    def __init__(self, place: str) -> None:
        self._folder = os.path.join(place, _FOLDER)

    def open(self) -> None:
        """Make the folder of the notes."""
        paths.make_directories(self._folder, 0o700)

    def read(self, volume_id: str) -> MountNote | None:
        """Return the note of a volume, or None."""
        try:
            with open(self._path(volume_id), encoding="utf-8") as file:
                return MountNote(**json.load(file))
        except (FileNotFoundError, ValueError, TypeError):
            return None  # half of one is what a power cut left: nothing was asked yet

    def begin(self, volume_id: str, mount_id: str) -> MountNote:
        """Note, to outlive a power cut, that a mount is about to be asked for."""
        note = MountNote(mount_id=mount_id)
        self._write(volume_id, note, sync=True)
        return note

    def answered(self, volume_id: str, note: MountNote, path: str) -> None:
        """Note where the plugin has mounted it."""
        self._write(volume_id, attrs.evolve(note, path=path), sync=False)

    def drop(self, volume_id: str) -> None:
        """Forget the mount; what is not there is success."""
        try:
            os.unlink(self._path(volume_id))
        except FileNotFoundError:
            return

    def _write(self, volume_id: str, note: MountNote, *, sync: bool) -> None:
        target = self._path(volume_id)
        fresh = f"{target}.new"
        with open(fresh, "w", encoding="utf-8") as file:
            json.dump(attrs.asdict(note), file)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(fresh, target)
        if sync:
            paths.sync(self._folder)

    def _path(self, volume_id: str) -> str:
        return os.path.join(self._folder, volume_id)
