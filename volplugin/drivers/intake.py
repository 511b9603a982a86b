"""Directories with content that become volumes: moved into place, else copied.

What is moved carries the volume's record before, and is a volume in the moment of the
rename: then it is never taken back, for nothing else has its files. A copy is made
aside, held against the original, and moved into place.

Facts of such a volume: ``origin`` is the path that it had; ``intake`` is ``move`` or
``copy``; ``copied-for`` says what a rename fails of.
"""

import contextlib
import os
from collections.abc import Mapping
from typing import Any, Final

from volplugin.drivers import ownership
from volplugin.drivers.directories import require_takeable
from volplugin.drivers.driver import Spec
from volplugin.drivers.folders import Folders
from volplugin.drivers.limits import Bound
from volplugin.errors import AlreadyExists, InUse, InvalidArgument, Unsupported
from volplugin.failpoints import hit
from volplugin.host import (
    attributes,
    copying,
    mountinfo,
    namespaces,
    paths,
    projects,
    trees,
)

ORIGIN: Final = "origin"


class Intake:
    """What one backend takes in."""

    def __init__(self, folders: Folders) -> None:
        self._folders = folders

    def plan(self, options: Any, origin: str, *, is_limited: bool) -> Mapping[str, str]:
        """Return the facts of a volume made of ``origin``; refuse what can't be one."""
        require_takeable(origin)
        if paths.missing_directories(origin):
            raise InvalidArgument(f"{origin} does not exist")
        for key in ("uid", "gid", "mode"):
            if getattr(options, key) is not None:
                raise InvalidArgument(
                    f"{key}: {origin} is taken as it is; leave {key} out"
                )
        require_unused(origin)
        obstacle = "it gets a limit" if is_limited else self._obstacle(origin)
        facts = {ORIGIN: origin, "intake": "move" if obstacle is None else "copy"}
        return facts if obstacle is None else {**facts, "copied-for": obstacle}

    def _obstacle(self, origin: str) -> str | None:
        """Say what stands against a rename, if anything does."""
        volumes = self._folders.volumes
        while not os.path.isdir(volumes):
            volumes = os.path.dirname(volumes)
        here, there = paths.open_directory(origin), paths.open_directory(volumes)
        try:
            same_mount = mountinfo.mount_id(here) == mountinfo.mount_id(there)
            same_device = os.fstat(here).st_dev == os.fstat(there).st_dev
        finally:
            os.close(here)
            os.close(there)
        if not (same_mount and same_device):
            return "it is on another file system, mount or subvolume"
        if not attributes.are_supported(origin):
            return "its file system has no trusted extended attributes"
        with contextlib.suppress(Unsupported):
            project = projects.of(origin).id
            if project:
                return f"it is in the quota of project {project}"
        return None

    def take(self, spec: Spec, bound: Bound | None) -> None:
        """Make the volume of its origin."""
        if ownership.is_of(spec, spec.volume.mountpoint):
            return
        origin = spec.volume.facts[ORIGIN]
        require_unused(origin)
        if spec.volume.facts["intake"] == "copy":
            self._copy(spec, origin, bound)
            return
        attributes.write_record(origin, spec.record)
        paths.sync(origin)
        hit("intake.mark")
        try:
            paths.move(origin, spec.volume.mountpoint)
        except AlreadyExists as error:
            raise _in_the_way(spec) from error
        hit("intake.move")

    def _copy(self, spec: Spec, origin: str, bound: Bound | None) -> None:
        if paths.identity(spec.volume.mountpoint) is not None:
            raise _in_the_way(spec)  # before hours of copying
        staged = self._folders.staged(spec.volume.id)
        if bound is not None:
            bound.mechanism.make(staged, bound.facts)
            bound.set_limit(staged)
        else:
            paths.make_directory(staged, 0o700)
        copying.copy(origin, staged, share=bound is None)
        hit("intake.copy")
        found = copying.difference(origin, staged)
        if found is not None:
            raise InUse(
                f"the copy of {origin} is not the same: {found}; end who writes to it, "
                f"and look whether the disk of {staged} can hold all that it has"
            )
        attributes.write_record(staged, spec.record)
        hit("intake.compared")
        self._folders.publish(staged, spec.volume.mountpoint)
        hit("intake.publish")

    def undo(self, spec: Spec) -> None:
        """Take away what `take` began; the origin is as it was."""
        staged = self._folders.staged(spec.volume.id)
        if paths.identity(staged) is not None:  # it may be large: a rename is quick
            paths.move(staged, os.path.join(self._folders.trash, spec.volume.id))
        origin = spec.volume.facts[ORIGIN]
        if ownership.is_of(spec, origin):
            attributes.clear_record(origin)

    def drop_origin(self, spec: Spec) -> None:
        """Delete the directory that the volume is a copy of, if it is still the same.

        Renamed first: what an earlier call left is told by its name, and a directory
        that someone made in the place since is not taken for it.
        """
        origin = spec.volume.facts[ORIGIN]
        folder, name = os.path.split(origin)
        aside = os.path.join(folder, f".{name}.volplugin-{spec.volume.id}")
        if paths.identity(aside) is None:
            if paths.identity(origin) is None:
                return
            require_unused(origin)
            found = copying.difference(origin, spec.volume.mountpoint)
            if found is not None:
                raise AlreadyExists(
                    f"{origin} is kept: it is not what was copied any more, or the "
                    f"volume has changed since ({found}); delete it yourself"
                )
            paths.move(origin, aside)
            try:
                require_unused(aside)
            except InUse:  # a container came in between
                paths.move(aside, origin)
                raise
            hit("intake.aside")
        trees.delete(aside, stop=lambda: False)
        paths.sync(folder)
        hit("intake.removed")


def require_unused(path: str) -> None:
    """Raise `InUse` when a container has ``path``, or something is mounted in it."""
    trees.require_unmounted(path)
    found = mountinfo.inside(path, mountinfo.read())
    if found is None:
        return
    users = namespaces.holders(*found)
    if users:
        names = ", ".join(f"pid {user.pid} ({user.program})" for user in users)
        raise InUse(f"{path} is in use by a container: {names}; stop and remove it")


def _in_the_way(spec: Spec) -> AlreadyExists:
    return AlreadyExists(
        f"{spec.volume.mountpoint} exists but no volume of that name is known: run "
        f"`volplugin recover` to take it over, or move it away"
    )
