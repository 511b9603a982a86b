"""The driver ``quota``: a directory with a hard limit, on any host.

It is limited in place where the file system of the root can do that, and is a file
system of its own in an image file where not.
"""

import os
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any

from volplugin.drivers import limits
from volplugin.drivers.driver import Driver, Found, Plan, Spec
from volplugin.drivers.folders import Folders, Root, require_present
from volplugin.drivers.imaged import Imaged
from volplugin.drivers.limits import FACT, Bound, Limits
from volplugin.drivers.quota_options import LOOP, QuotaConfig, QuotaOptions
from volplugin.errors import InvalidArgument, Unavailable, Unsupported
from volplugin.host.mountinfo import Mount
from volplugin.model import Usage, Volume


class Quota(Driver):
    """Directories and images, each with a limit."""

    name = "quota"
    Options = QuotaOptions
    Config = QuotaConfig

    def __init__(self, config: QuotaConfig, place: str) -> None:
        self._root = os.path.realpath(config.root or place)
        self._folders = Folders(self._root)
        self._limits = Limits(self._root, config.project_ids, config.overcommit)
        self._images = Imaged(self._folders)

    def open(self) -> None:
        self._folders.open()
        self._images.open()

    def roots(self) -> Sequence[str]:
        return [self._root]

    def plan(self, name: str, volume_id: str, options: QuotaOptions) -> Plan:
        if options.size is None:
            raise InvalidArgument(
                "a quota volume needs a limit: give size, such as -o size=10G"
            )
        limits.require_fits(limits.limit_of(options), self._folders.volumes)
        facts = self._plan_in_place(options)
        if facts is None:
            self._images.check(options)
            facts = {FACT: LOOP}
        return Plan(mountpoint=self._folders.place(name), facts=facts)

    def _plan_in_place(self, options: QuotaOptions) -> Mapping[str, str] | None:
        """Return the facts of a volume limited in place; None if it is an image."""
        for_images = options.for_images
        if options.quota == LOOP or (options.quota is None and for_images):
            return None
        if for_images:
            raise InvalidArgument(
                f"quota={options.quota} limits a directory, and {for_images[0]} is for "
                f"loop images: leave one of them out"
            )
        directory = self._folders.volumes
        try:
            mechanism = self._limits.choose(directory, options.quota)
            mechanism.check(limits.limit_of(options))
        except Unsupported:
            if options.quota is not None:
                raise
            return None
        return {FACT: mechanism.name, **mechanism.reserve(directory)}

    def create(self, spec: Spec) -> None:
        if self.attaches(spec.volume):
            self._images.make(spec)
        else:
            self._folders.make(spec, Root.asked(spec.options), self._bound(spec))

    def remove(self, spec: Spec) -> None:
        if self.attaches(spec.volume):
            self._images.remove(spec)
        else:
            self._folders.remove(spec, self._bound(spec))

    def attach(self, spec: Spec) -> None:
        bound = self._bound(spec)
        if bound is None:
            self._images.attach(spec)
            return
        require_present(spec)
        problem = bound.mechanism.problem(spec.volume.mountpoint, itself=True)
        if problem is not None:
            raise Unavailable(f"its limit is not in force: {problem}")

    def detach(self, spec: Spec) -> None:
        if self.attaches(spec.volume):
            self._images.detach(spec)

    def attaches(self, volume: Volume) -> bool:
        return volume.facts.get(FACT) == LOOP

    def is_attached(self, volume: Volume, table: Sequence[Mount]) -> bool:
        return self.attaches(volume) and self._images.is_attached(volume, table)

    def status(
        self, volume: Volume, options: QuotaOptions, *, attached: bool
    ) -> Mapping[str, Any]:
        return limits.status_of(volume, options)

    def plan_resize(self, spec: Spec, options: Any, *, attached: bool) -> None:
        bound = self._bound(spec)
        if bound is not None:
            self._limits.plan_resize(spec, bound, limits.limit_of(options))
            return
        limits.require_fits(limits.limit_of(options), self._folders.root)
        self._images.plan_resize(spec, options, attached=attached)

    def resize(self, spec: Spec, *, attached: bool) -> None:
        bound = self._bound(spec)
        if bound is not None:
            self._limits.resize(spec, bound)
        else:
            self._images.resize(spec)

    def measure(self, specs: Sequence[Spec]) -> Mapping[str, Usage]:
        images = [spec for spec in specs if self.attaches(spec.volume)]
        return self._limits.measure(specs) | self._images.measure(images)

    def verify(self, specs: Sequence[Spec]) -> None:
        self._limits.verify(specs)
        self._images.verify(spec for spec in specs if self.attaches(spec.volume))

    def promised(self, spec: Spec) -> int:
        return spec.options.size or 0

    def require_room(self, total: int) -> None:
        self._limits.require_room(total)

    def limited_by(self) -> str:
        return self._limits.describe(self._folders.volumes, "loop images")

    def purge(self, stop: Callable[[], bool]) -> bool:
        done = [self._limits.work(stop), self._folders.purge(stop)]
        return all(done)

    def discover(self, known: Container[str] = ()) -> Iterator[Found]:
        # A mountpoint's record is as old as its volume; the image has today's.
        for found in self._folders.discover(known):
            if not self._images.is_mountpoint(found):
                yield found
        yield from self._images.discover(known)

    def _bound(self, spec: Spec) -> Bound | None:
        return self._limits.bound(spec.volume, spec.options)
