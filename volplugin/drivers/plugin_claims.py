"""Which volume of another plugin is which of ours: never one of two.

A claim is a symbolic link ``claims/PLUGIN/NAME`` in the backend's place, to
``ID/NAME`` of the volume that has it: made in one step, or not where there is one. It
stands before the plugin is asked to make the volume, so what a plugin has by a claimed
name is ours to remove.
"""

import hashlib
import os
from typing import Final
from urllib.parse import quote

from volplugin.errors import AlreadyExists
from volplugin.host import paths
from volplugin.model import Volume

_LONGEST: Final = 250  # bytes of a name that is written as it is


class Claims:
    """The claims of one backend."""

    def __init__(self, place: str) -> None:
        self._folder = os.path.join(place, "claims")

    def take(self, volume: Volume) -> None:
        """Claim what the volume's facts name; again is success.

        Raise `AlreadyExists`, naming it, where another volume has it.
        """
        path = self._path(volume)
        paths.make_directories(os.path.dirname(path), 0o700)
        try:
            os.symlink(f"{volume.id}/{volume.name}", path)
        except FileExistsError:
            owner, _, name = os.readlink(path).partition("/")
            if owner != volume.id:
                raise AlreadyExists(
                    f"volume {name!r} is {volume.facts['name']!r} of plugin "
                    f"{volume.facts['plugin']} already: use that one, or remove it "
                    f"first"
                ) from None
        paths.sync(os.path.dirname(path))

    def is_taken(self, volume: Volume) -> bool:
        """Tell whether the volume has its claim."""
        try:
            return os.readlink(self._path(volume)).startswith(f"{volume.id}/")
        except FileNotFoundError:
            return False

    def drop(self, volume: Volume) -> None:
        """Give the claim back; one that is not the volume's stays."""
        if self.is_taken(volume):
            path = self._path(volume)
            os.unlink(path)
            paths.sync(os.path.dirname(path))

    def _path(self, volume: Volume) -> str:
        facts = volume.facts
        # Names of other plugins may hold anything; at most 255 bytes are a file's name.
        name = quote(facts["name"], safe="")
        if len(name) > _LONGEST:
            digest = hashlib.sha256(name.encode()).hexdigest()
            name = f"{name[: _LONGEST - len(digest)]}{digest}"
        return os.path.join(self._folder, facts["plugin"], f"={name}")
