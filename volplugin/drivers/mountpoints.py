"""Mountpoints of volumes: guarded directories while nothing is mounted there."""

import os
from collections.abc import Sequence

from volplugin.drivers import ownership
from volplugin.drivers.driver import Spec
from volplugin.errors import AlreadyExists, InUse, Unavailable
from volplugin.host import attributes, guard, mountinfo, paths
from volplugin.host.mountinfo import Mount
from volplugin.model import State


def require_free(path: str) -> None:
    """Raise `AlreadyExists` for a directory of ours that is there and not empty."""
    found = ownership.owner(path)
    if found is not None or (paths.identity(path) and os.listdir(path)):
        raise AlreadyExists(
            f"{path} exists but no volume of that name is known: run `volplugin "
            f"recover` to take it over, or move it away"
        )


def require_ready(spec: Spec, table: Sequence[Mount]) -> bool:
    """Check that the volume can be mounted; return whether its mountpoint is there.

    Raise `Unavailable` where something else is mounted, or it is another volume's.
    """
    path = spec.volume.mountpoint
    other = mountinfo.at(path, table)
    if other is not None:
        raise Unavailable(
            f"{path} has a {other.kind} of {other.source!r} mounted on it, which "
            f"is not this volume: unmount it"
        )
    if paths.identity(path) is None:
        return False
    if ownership.is_of(spec, path) is False:
        raise Unavailable(
            f"{path} is the directory of another volume; look at `getfattr -n "
            f"trusted.volplugin {path}` and move it away"
        )
    return True


def is_of_another(spec: Spec) -> bool:
    """Tell whether the mountpoint is another volume's, which refused ours this place.

    Raise `AlreadyExists` where that can't be: ours was made.
    """
    path = spec.volume.mountpoint
    if ownership.is_of(spec, path) is not False:
        return False
    if spec.volume.state is State.CREATING:
        return True
    raise AlreadyExists(f"{path} is the mountpoint of another volume")


def take_back(spec: Spec, made: Sequence[str], mode: int | None = None) -> None:
    """Remove the directories ``made`` for the mountpoint, outermost first.

    A mountpoint that was there before gets its ``mode`` back instead. Where something
    is mounted or written that is not ours, raise `InUse`, or leave it be if the volume
    was never finished.
    """
    path = spec.volume.mountpoint
    if paths.identity(path) is None:
        return
    other = mountinfo.at(path, mountinfo.read())
    if other is not None or os.listdir(path):
        if spec.volume.state is State.CREATING:
            # Not ours, as we only ever leave it empty: it came after the plan.
            if ownership.is_of(spec, path):
                attributes.clear_record(path)
            return
        raise InUse(
            f"{path} holds files that were written while nothing was mounted "
            f"there: move them away and remove the volume again"
            if other is None
            else f"{path} has a {other.kind} of {other.source!r} mounted on it, "
            f"which is not this volume: unmount it"
        )
    guard.unguard(path)
    attributes.clear_record(path)
    if mode is not None:
        os.chmod(path, mode)
        return
    for directory in reversed(made):
        if directory and paths.identity(directory) and not os.listdir(directory):
            paths.remove_directory(directory)
