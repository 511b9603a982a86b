"""Directories with content made volumes, as operators ask: moved, copied, adopted."""

from collections.abc import Mapping
from typing import Any

import attrs

from volplugin import options
from volplugin.backends import Backend
from volplugin.changes import Caller, Changes
from volplugin.core import Core
from volplugin.drivers.directories import overlap
from volplugin.drivers.driver import Plan, TakesIn
from volplugin.drivers.intake import ORIGIN, require_unused
from volplugin.errors import AlreadyExists, InvalidArgument, Unsupported
from volplugin.host import paths
from volplugin.manager import require_name
from volplugin.model import State, Volume
from volplugin.parsers import quote


@attrs.frozen(kw_only=True)
class Migration:
    """A directory that is to become the volume ``name`` of ``backend``.

    ``options`` are as for ``docker volume create``; with ``mount`` among them, which
    must be ``origin`` itself, nothing is moved. ``remove_origin`` deletes what was
    copied, once it has been.
    """

    name: str
    backend: str
    options: Mapping[str, str]
    origin: str
    remove_origin: bool = False


@attrs.frozen(kw_only=True)
class Outcome:
    """What became of a migration, or would: ``way`` is ``move``, ``copy`` or ``adopt``.

    ``reason`` says why it is a copy. ``earlier`` says that the volume was there.
    """

    way: str
    mountpoint: str
    reason: str = ""
    earlier: bool = False


class Migrations:
    """What operators take over. All methods raise `VolpluginError` only."""

    def __init__(self, core: Core, changes: Changes) -> None:
        self._core = core
        self._changes = changes

    async def plan(self, wanted: Migration) -> Outcome:
        """Tell what `migrate` would do; refuse what it would. No effect."""
        require_name(wanted.name)
        known = self._core.catalog.store.volumes.get(wanted.name)
        if known is not None and known.state is State.READY:
            return _require_same(wanted, known)
        backend, parsed = self._parse(wanted)
        self._require_free(wanted)
        driver: Any = backend.driver
        plan: Plan
        if "mount" in wanted.options:
            await backend.run(_require_adoptable, wanted)
            plan = await backend.run(driver.plan, wanted.name, "", parsed)
            return Outcome(way="adopt", mountpoint=plan.mountpoint)
        plan = await backend.run(
            driver.plan_intake, wanted.name, "", parsed, wanted.origin
        )
        if paths.identity(plan.mountpoint) is not None:
            raise AlreadyExists(f"{plan.mountpoint} exists: move it away")
        return _told(plan.facts, plan.mountpoint)

    async def migrate(self, wanted: Migration, caller: Caller) -> Outcome:
        """Make the directory the volume; success where it is that volume already."""
        require_name(wanted.name)
        return await self._changes.run(
            wanted.name, lambda: self._migrate(wanted), limit=None, caller=caller
        )

    async def _migrate(self, wanted: Migration) -> Outcome:
        volumes = self._core.catalog.store.volumes
        known = volumes.get(wanted.name)
        if known is not None and known.state is not State.READY:
            await self._core.settle_unfinished(known)
            known = volumes.get(wanted.name)
        if known is not None:
            outcome = _require_same(wanted, known)
        else:
            await self._make(wanted)
            outcome = attrs.evolve(
                _require_same(wanted, volumes[wanted.name]), earlier=False
            )
        volume = volumes[wanted.name]
        backend = self._core.catalog.backend(volume)
        if wanted.remove_origin and outcome.way == "copy":
            driver: Any = backend.driver
            spec = self._core.catalog.spec(volume)
            await backend.run(driver.drop_origin, spec)
        return outcome

    async def _make(self, wanted: Migration) -> None:
        backend, parsed = self._parse(wanted)
        self._require_free(wanted)
        if "mount" in wanted.options:
            await backend.run(_require_adoptable, wanted)
            asked = {"driver": backend.name, **wanted.options}
            await self._core.create(wanted.name, asked)
            return
        await self._core.creator.make(
            wanted.name, backend, wanted.options, parsed, wanted.origin
        )

    def _parse(self, wanted: Migration) -> tuple[Backend, Any]:
        backend = self._core.catalog.backends.pick(wanted.backend or None)
        if not isinstance(backend.driver, TakesIn):
            raise Unsupported(
                f"driver {backend.driver.name} takes in no directories: give --driver "
                f"local, or a backend with it, or create the volume and copy into it"
            )
        subject = f"driver {backend.driver.name}"
        return backend, options.parse(
            backend.driver.Options, wanted.options, subject=subject
        )

    def _require_free(self, wanted: Migration) -> None:
        """Refuse a directory that is, has or lies in one of volplugin's own."""
        origin, mount = wanted.origin, wanted.options.get("mount", wanted.origin)
        if mount != origin:
            raise InvalidArgument(f"mount={mount}: it is not {origin}")
        own = overlap(origin, self._core.catalog.backends.reserved())
        if own is not None:
            raise InvalidArgument(f"{origin}: {own} is volplugin's own")
        for other in self._core.catalog.volumes():
            if overlap(origin, [other.mountpoint]) is not None:
                raise AlreadyExists(
                    f"{origin}: volume {other.name!r} has {other.mountpoint}"
                )


def _require_adoptable(wanted: Migration) -> None:
    if paths.missing_directories(wanted.origin):
        raise InvalidArgument(f"{wanted.origin} does not exist: is its disk mounted?")
    require_unused(wanted.origin)


def _require_same(wanted: Migration, known: Volume) -> Outcome:
    """Return what an earlier migration did; refuse a volume that is another one."""
    if wanted.origin not in {known.facts.get(ORIGIN), known.options.get("mount")}:
        raise AlreadyExists(
            f"there is a volume {quote(known.name)} that was not made of "
            f"{wanted.origin}: give it another name (--as), or remove that one first"
        )
    outcome = attrs.evolve(_told(known.facts, known.mountpoint), earlier=True)
    if outcome.way == "move" and paths.identity(wanted.origin) is not None:
        raise AlreadyExists(
            f"volume {quote(known.name)} was made of {wanted.origin}, and by now there "
            f"is another directory in that place: give it another name (--as)"
        )
    return outcome


def _told(facts: Mapping[str, str], mountpoint: str) -> Outcome:
    return Outcome(
        way=facts.get("intake", "adopt"),
        mountpoint=mountpoint,
        reason=facts.get("copied-for", ""),
    )
