"""Notes of the mounts that we asked other plugins for, and are to take back.

One file a volume in the backend's place, named by the volume's id, made before the
plugin is asked; it holds the path of what the plugin answered, once it has. Notes
outlive a boot, for plugins that mount again after one (rclone). None is synced: where a
power cut takes one, the plugin refuses the next Mount or Remove, and is asked to
unmount.
"""

import contextlib
import os
from typing import Final

from volplugin.host import paths

_MOUNTS: Final = "mounts"
_EXPECTED: Final = "expected"


class MountNotes:
    """The notes of one backend."""

    def __init__(self, place: str) -> None:
        self._folder = os.path.join(place, _MOUNTS)
        self._expectations = os.path.join(place, _EXPECTED)

    def open(self) -> None:
        """Make the folders of the notes."""
        paths.make_directories(self._folder, 0o700)
        paths.make_directories(self._expectations, 0o700)

    def read(self, volume_id: str) -> str | None:
        """Return where the plugin has mounted a volume, "" if it did not say, or None.

        None is for a volume that it was not asked to mount.
        """
        return _read(self._path(volume_id))

    def write(self, volume_id: str, path: str) -> None:
        """Note that a mount is about to be asked for, or was answered with ``path``."""
        _write(self._path(volume_id), path)

    def drop(self, volume_id: str) -> None:
        """Forget the mount; what is not there is success."""
        _unlink(self._path(volume_id))

    def expect(self, volume_id: str, path: str) -> None:
        """Note where the plugin will mount a volume, as it says beforehand."""
        _write(self._expected(volume_id), path)

    def expected(self, volume_id: str) -> str:
        """Return where the plugin will mount a volume, "" if it did not say."""
        return _read(self._expected(volume_id)) or ""

    def forget(self, volume_id: str) -> None:
        """Drop all notes of a volume."""
        self.drop(volume_id)
        _unlink(self._expected(volume_id))

    def _expected(self, volume_id: str) -> str:
        return os.path.join(self._expectations, volume_id)

    def _path(self, volume_id: str) -> str:
        return os.path.join(self._folder, volume_id)


def _read(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (FileNotFoundError, UnicodeDecodeError):
        return None


def _write(path: str, text: str) -> None:
    # In one write(2), of which a death leaves all or nothing.
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
