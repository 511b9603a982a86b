"""Volumes that reach the host out of a managed plugin.

dockerd runs a managed plugin in a mount namespace of its own, with one directory that
is shared: what is mounted below it is mounted on the host too, and nothing else is.
So each volume that is attached is bound there, whatever its driver, and that is the
path that engines get. (dockerd puts the host's path in the place of the plugin's.)

Both mounts are of one file system. When the plugin's process dies, its namespace and
with it the driver's own mount goes, and the bound one stays: the next server binds it
back. When the engine takes the plugin down, all of them go, but for those that
containers have: what is nowhere else is fetched from there.
"""

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Final

import attrs

from volplugin.drivers.driver import Driver, Volatile
from volplugin.errors import Unavailable, from_os_error
from volplugin.failpoints import hit
from volplugin.host import foreign, mountinfo, mounts, namespaces, paths, surroundings
from volplugin.host.mountinfo import Mount
from volplugin.model import Volume

_DATA: Final = ".data"  # no volume's name


class Tree:
    """The shared directory ``root``: a directory for each volume that is attached."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._on_host = surroundings.path_on_host(root) or root

    def path(self, name: str) -> str:
        """Return where engines find the volume ``name`` once it is mounted."""
        return os.path.join(self.root, name)

    def path_on_host(self, name: str) -> str:
        """Return the same as the host sees it, or as we do where that can't be told."""
        return os.path.join(self._on_host, name)

    def require_same_data(self, root: str, *, is_empty: bool) -> None:
        """Refuse an empty ``root`` where the plugin has had another one; note it.

        `docker plugin upgrade` puts the source of each mount back to its default: all
        volumes would seem lost, and dockerd forgets what it finds no more. The note is
        in the shared directory, which lasts as long as the plugin is installed. Raise
        `Unavailable`.
        """
        note = os.path.join(self.root, _DATA)
        place = surroundings.path_on_host(root) or root
        try:
            with contextlib.suppress(FileNotFoundError), open(note) as file:
                noted = file.read()
                if noted != place and is_empty:
                    raise Unavailable(
                        f"the plugin's data was in {noted} of the host, and is in "
                        f"{place} now, where there is none: an upgrade puts the "
                        f"setting back; `docker plugin set PLUGIN data.source={noted}`"
                        f", or `docker plugin rm` and install it to begin anew"
                    )
            with open(f"{note}.new", "w") as file:
                file.write(place)
            os.replace(f"{note}.new", note)
        except OSError as error:
            raise from_os_error(error, f"note where the data is in {note}") from error

    def shows(self, volume: Volume, driver: Driver, table: Sequence[Mount]) -> bool:
        """Tell whether the volume, and nothing else, is mounted for the host."""
        place = self.path(volume.name)
        mount = mountinfo.at(place, table)
        if mount is None:
            return False
        if (mount.device, mount.root) == mountinfo.inside(volume.mountpoint, table):
            return True
        # The driver's own mount may be gone; some are told by what is mounted alone.
        there = attrs.evolve(volume, mountpoint=place)
        return driver.attaches(volume) and driver.is_attached(there, table)

    def expose(self, volume: Volume, driver: Driver) -> None:
        """Mount the attached volume for the host too. Idempotent.

        Raise `Unavailable` when something else can't be got out of its way.
        """
        if self.shows(volume, driver, mountinfo.read()):
            return
        place = self.path(volume.name)
        self.withdraw(volume.name)
        # Nothing is written there while nothing is mounted. Not immutable, as other
        # mountpoints are: `docker plugin rm` could not delete it.
        paths.make_directory(place, 0)
        hit("propagated.expose")
        # With what a user has mounted in a directory of his, as dockerd itself binds
        # it. The plugin gets the host's directories as slaves: else `withdraw` would
        # unmount there what it unmounts here.
        mounts.bind(volume.mountpoint, place)
        hit("propagated.exposed")
        if not self.shows(volume, driver, mountinfo.read()):
            raise Unavailable(f"{place}: the volume was mounted there and is not")

    def withdraw(self, name: str) -> None:
        """Take the volume from the host again. Idempotent.

        Raise `InUse` while a process of the host has files open there.
        """
        place = self.path(name)
        hit("propagated.withdraw")
        while paths_left := mountinfo.to_unmount(place, mountinfo.read()):
            for path in paths_left:
                mounts.unmount(path)
        hit("propagated.withdrawn")
        paths.remove_directory(place)

    def fetch(self, volume: Volume, driver: Driver) -> None:
        """Get back from a container what it alone still has mounted.

        Nothing happens for a volume that is attached, that its driver can attach again,
        or that no container has.
        """
        if not isinstance(driver, Volatile) or not driver.is_volatile(volume):
            return
        if driver.is_attached(volume, mountinfo.read()):
            return
        for process, mount in namespaces.showing(identity(volume, driver)):
            if mount.root == "/":
                foreign.bring(process.pid, mount, volume.mountpoint)
                hit("propagated.fetched")
                return

    def take_back(self, volume: Volume, driver: Driver) -> None:
        """Give a driver the mount back that its volume lost with a dead plugin.

        Idempotent. Nothing happens for a volume that the host does not have either.
        """
        table = mountinfo.read()
        if (
            driver.attaches(volume)
            and not driver.is_attached(volume, table)
            and self.shows(volume, driver, table)
        ):
            hit("propagated.return")
            mounts.bind(self.path(volume.name), volume.mountpoint)


def identity(
    volume: Volume, driver: Driver
) -> Callable[[Mount, Sequence[Mount]], bool]:
    """Return what tells whether a mount, in any namespace, is of this volume.

    For drivers that mount: a directory is told by its place in its file system.
    """

    def is_of(mount: Mount, table: Sequence[Mount]) -> bool:
        there = attrs.evolve(volume, mountpoint=mount.mountpoint)
        return driver.is_attached(there, table)

    return is_of
