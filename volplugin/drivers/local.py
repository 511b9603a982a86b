"""The driver ``local``: a directory below the root, or one that the user names.

With ``size`` or ``inodes`` it is limited in place, where its file system can do that.
In the backend's place lie the folders of `folders`, and ``adopted``, the markers of
``mount=`` volumes.
"""

import contextlib
import os
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any

import attrs

from volplugin import options as declare
from volplugin.drivers import declared, limits, ownership
from volplugin.drivers.adopted import Adopted
from volplugin.drivers.driver import Driver, Found, Plan, Spec
from volplugin.drivers.folders import Folders, Root, require_present
from volplugin.drivers.intake import ORIGIN, Intake
from volplugin.drivers.limits import FACT, Bound, Limits
from volplugin.errors import InvalidArgument, Unsupported
from volplugin.host.mountinfo import Mount
from volplugin.model import State, Usage, Volume
from volplugin.quota.ids import IdRange
from volplugin.sizes import format_size


@attrs.frozen(kw_only=True)
class LocalOptions:
    """What a user can say of one volume."""

    mount: str | None = declare.option(
        help="use exactly this directory, new or existing; it is never deleted",
        parse=declare.absolute_path,
        default=None,
        shown="a directory below the root",
        unit="path",
    )
    size: int | None = declare.option(
        help="how much it can hold; needs project quota or btrfs below",
        parse=declare.size(),
        default=None,
        shown="no limit",
        unit="bytes",
        format=format_size,
    )
    inodes: int | None = declared.inodes_option()
    quota: str | None = declare.option(
        help="what limits it: project or btrfs",
        parse=declare.choice("project", "btrfs"),
        default=None,
        shown="what works",
        unit="name",
    )
    uid: int | None = declared.uid_option(None)
    gid: int | None = declared.gid_option(None)
    mode: int | None = declared.mode_option(None, "0755")

    @property
    def is_limited(self) -> bool:
        """Whether the user asked for a limit."""
        return self.size is not None or self.inodes is not None


@attrs.frozen(kw_only=True)
class LocalConfig:
    """What an operator can say of the backend."""

    root: str | None = declared.root_setting()
    allow: Sequence[str] | None = declared.allow_setting()
    project_ids: IdRange = declared.ids_setting()
    overcommit: float | None = declared.overcommit_setting()


class Local(Driver):
    """Directories on a file system of the host."""

    name = "local"
    Options = LocalOptions
    Config = LocalConfig

    def __init__(self, config: LocalConfig, place: str) -> None:
        self._root = os.path.realpath(config.root or place)
        self._folders = Folders(self._root)
        self._intake = Intake(self._folders)
        self._limits = Limits(self._root, config.project_ids, config.overcommit)
        self._adopted = Adopted(self._root, config.allow, self._limits)

    def open(self) -> None:
        self._folders.open()

    def roots(self) -> Sequence[str]:
        return [self._root]

    def plan(self, name: str, volume_id: str, options: LocalOptions) -> Plan:
        _require_limit_for_quota(options)
        with _told_of_limits():
            if options.mount is not None:
                return self._adopted.plan(volume_id, options)
            facts = self._plan_limit(options) if options.is_limited else {}
        return Plan(mountpoint=self._folders.place(name), facts=facts)

    def plan_intake(
        self, name: str, volume_id: str, options: LocalOptions, origin: str
    ) -> Plan:
        _require_limit_for_quota(options)
        if options.mount is not None:
            raise InvalidArgument(
                f"mount={options.mount}: {origin} gets a place below the root; leave "
                f"mount out, or create the volume with mount={origin}"
            )
        with _told_of_limits():
            limit = self._plan_limit(options) if options.is_limited else {}
        taken = self._intake.plan(options, origin, is_limited=options.is_limited)
        return Plan(mountpoint=self._folders.place(name), facts={**limit, **taken})

    def _plan_limit(self, options: LocalOptions) -> Mapping[str, str]:
        directory = self._folders.volumes
        limit = limits.limit_of(options)
        mechanism = self._limits.choose(directory, options.quota)
        mechanism.check(limit)
        limits.require_fits(limit, directory)
        return {FACT: mechanism.name, **mechanism.reserve(directory)}

    def create(self, spec: Spec) -> None:
        root, bound = Root.asked(spec.options), self._bound(spec)
        if spec.options.mount is not None:
            self._adopted.adopt(spec, root, bound)
        elif ORIGIN in spec.volume.facts:
            self._intake.take(spec, bound)
        else:
            self._folders.make(spec, root, bound)

    def remove(self, spec: Spec) -> None:
        if spec.options.mount is not None:
            self._adopted.release(spec, self._bound(spec))
        elif spec.volume.state is State.CREATING and ORIGIN in spec.volume.facts:
            self._intake.undo(spec)
            self._folders.forget(self._bound(spec))
        else:
            self._folders.remove(spec, self._bound(spec))

    def is_taken_in(self, spec: Spec) -> bool:
        is_intake = ORIGIN in spec.volume.facts
        return is_intake and bool(ownership.is_of(spec, spec.volume.mountpoint))

    def drop_origin(self, spec: Spec) -> None:
        self._intake.drop_origin(spec)

    def attach(self, spec: Spec) -> None:
        require_present(spec)

    def detach(self, spec: Spec) -> None:
        pass  # `attaches` says no: there is nothing to take back

    def attaches(self, volume: Volume) -> bool:
        return False

    def is_attached(self, volume: Volume, table: Sequence[Mount]) -> bool:
        return False

    def status(
        self, volume: Volume, options: LocalOptions, *, attached: bool
    ) -> Mapping[str, Any]:
        chosen = {} if options.mount is None else {"mount": options.mount}
        return {**chosen, **limits.status_of(volume, options)}

    def plan_resize(self, spec: Spec, options: Any, *, attached: bool) -> None:
        bound = self._bound(spec)
        if bound is None:
            raise Unsupported(
                "it was made without a limit, which can't be given later: create a "
                "volume with size, and copy"
            )
        self._limits.plan_resize(spec, bound, limits.limit_of(options))

    def resize(self, spec: Spec, *, attached: bool) -> None:
        bound = self._bound(spec)
        if bound is not None:
            self._limits.resize(spec, bound)
        if spec.options.mount is not None:
            self._adopted.note(spec)

    def measure(self, specs: Sequence[Spec]) -> Mapping[str, Usage]:
        return self._limits.measure(specs)

    def verify(self, specs: Sequence[Spec]) -> None:
        self._limits.verify(specs)

    def promised(self, spec: Spec) -> int:
        return 0 if spec.options.mount is not None else spec.options.size or 0

    def require_room(self, total: int) -> None:
        self._limits.require_room(total)

    def limited_by(self) -> str:
        return self._limits.describe(self._folders.volumes, "nothing: size is refused")

    def purge(self, stop: Callable[[], bool]) -> bool:
        done = [self._limits.work(stop), self._folders.purge(stop)]
        return all(done)

    def discover(self, known: Container[str] = ()) -> Iterator[Found]:
        yield from self._folders.discover(known)
        yield from self._adopted.discover(known)

    def _bound(self, spec: Spec) -> Bound | None:
        return self._limits.bound(spec.volume, spec.options)


def _require_limit_for_quota(options: LocalOptions) -> None:
    if options.quota is not None and not options.is_limited:
        raise InvalidArgument(
            f"quota={options.quota} says how to limit, not how much: give size or "
            f"inodes as well, or leave it out"
        )


@contextlib.contextmanager
def _told_of_limits() -> Iterator[None]:
    """Say what to do where a directory can't be limited."""
    try:
        yield
    except Unsupported as error:
        raise Unsupported(
            f"this directory can't be limited in place: {error}. Mount its file "
            f"system with quotas, or use -o driver=quota, which limits on any host"
        ) from error
