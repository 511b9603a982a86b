"""Volumes that are directories of the user's, given with ``mount=``: never deleted."""

import os
import stat
from collections.abc import Container, Iterator, Sequence
from typing import Any

from volplugin.drivers import ownership
from volplugin.drivers.directories import require_allowed
from volplugin.drivers.driver import Found, Plan, Spec
from volplugin.drivers.folders import Root
from volplugin.drivers.limits import FACT, Bound, Limits, limit_of, require_fits
from volplugin.drivers.markers import Markers
from volplugin.errors import AlreadyExists, InvalidArgument
from volplugin.failpoints import hit
from volplugin.host import attributes, paths, trees
from volplugin.model import State


class Adopted:
    """The directories of users that are volumes of one backend."""

    def __init__(self, root: str, allow: Sequence[str] | None, limits: Limits) -> None:
        self._allow = allow
        self._limits = limits
        self._markers = Markers(root)

    def plan(self, volume_id: str, options: Any) -> Plan:
        """Decide that the volume will be the directory that its user named."""
        path = options.mount
        require_allowed(path, self._allow)
        missing = paths.missing_directories(path)
        nearest = os.path.dirname(missing[0]) if missing else path
        if not missing:
            ownership.require_free(path, volume_id)
            _require_as_asked(path, options)
        # Where a file system has no such attributes the directory can't prove later
        # that it is the volume; where it has, one without the record is another one.
        marked = attributes.are_supported(nearest)
        facts = {"made": ":".join(missing), "marked": "yes" if marked else "no"}
        return Plan(
            mountpoint=path,
            chosen=True,
            facts=facts | self._plan_limit(nearest, options, is_new=bool(missing)),
        )

    def _plan_limit(
        self, directory: str, options: Any, *, is_new: bool
    ) -> dict[str, str]:
        limit = limit_of(options)
        if limit.size is None and limit.inodes is None:
            return {}
        mechanism = self._limits.choose(directory, options.quota, itself=not is_new)
        mechanism.check(limit)
        require_fits(limit, directory)
        facts = mechanism.reserve(directory)
        if not is_new:
            mechanism.require_adoptable(directory, facts, limit)
        return {FACT: mechanism.name, **facts}

    def adopt(self, spec: Spec, root: Root, bound: Bound | None) -> None:
        """Make the directory if need be, limit it, and give it the record."""
        path = spec.volume.mountpoint
        made = spec.volume.facts["made"].split(":")
        if path in made:
            paths.make_directories(os.path.dirname(path), 0o755)
            self._make(spec, root, bound)
        else:
            ownership.require_free(path, spec.volume.id)
            if bound is not None:
                bound.mechanism.adopt(path, bound.facts, bound.limit)
        hit("local.stage")
        attributes.write_record(path, spec.record)
        paths.sync(path)
        hit("local.adopt")
        self._markers.add(spec.volume.name, spec.record)
        hit("local.mark")

    def _make(self, spec: Spec, root: Root, bound: Bound | None) -> None:
        path = spec.volume.mountpoint
        is_new = paths.identity(path) is None
        if not is_new:
            ownership.require_free(path, spec.volume.id)
        if bound is not None:
            if not is_new and os.listdir(path):
                raise AlreadyExists(f"{path} was made and filled by someone just now")
            bound.mechanism.make(path, bound.facts)
            bound.set_limit(path)
        elif is_new:
            paths.make_directory(path, 0o755)
        if is_new or bound is not None:
            root.give_to(path)

    def release(self, spec: Spec, bound: Bound | None) -> None:
        """Give the directory back: without limit and record, with all it holds."""
        path = spec.volume.mountpoint
        is_creating = spec.volume.state is State.CREATING
        if bound is not None and (is_creating or ownership.is_of(spec, path)):
            bound.mechanism.release(path, bound.facts)
        hit("local.limit")
        if ownership.is_of(spec, path):
            attributes.clear_record(path)
        hit("local.release")
        self._markers.drop(spec.volume.name)
        if is_creating:
            for made in reversed(spec.volume.facts["made"].split(":")):
                if not made or paths.identity(made) is None or os.listdir(made):
                    continue
                if made == path and bound is not None:  # maybe a subvolume
                    trees.delete(made, stop=lambda: False)
                else:
                    paths.remove_directory(made)

    def note(self, spec: Spec) -> None:
        """Replace the record in the volume's marker."""
        self._markers.add(spec.volume.name, spec.record)

    def discover(self, known: Container[str] = ()) -> Iterator[Found]:
        """Yield the records of the volumes noted."""
        yield from self._markers.found(known)


def _require_as_asked(path: str, options: Any) -> None:
    """Refuse to change an existing directory: it is adopted as it is."""
    status = os.stat(path)
    for key, asked, found, shown in (
        ("uid", options.uid, status.st_uid, str),
        ("gid", options.gid, status.st_gid, str),
        ("mode", options.mode, stat.S_IMODE(status.st_mode), "{:04o}".format),
    ):
        if asked is not None and asked != found:
            raise InvalidArgument(
                f"{key}={shown(asked)}: {path} exists with {key} {shown(found)} and is "
                f"adopted as it is; change it yourself, or leave {key} out"
            )
