"""Volumes made available and taken back: what holders, containers and mounts decide.

As in `core`, the caller holds the volume's lock and lets no cancellation through.
Mounts are written without a sync: a power cut makes them void, and everything short of
that leaves the write with the kernel.
"""

import asyncio
import logging
import uuid
from collections.abc import Sequence

import attrs

from volplugin import accounting, propagated
from volplugin.catalog import Catalog
from volplugin.drivers.driver import ServedByOthers
from volplugin.errors import InUse, Unsupported
from volplugin.failpoints import hit
from volplugin.host import mountinfo, namespaces, processes
from volplugin.host.mountinfo import Mount
from volplugin.host.namespaces import Process
from volplugin.logs import log
from volplugin.model import Client, Holder, Mounts, Volume
from volplugin.store.store import PutMounts

logger = logging.getLogger(__name__)


class Attachments:
    """The volumes that are, or may be, attached on this host."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._kept: set[str] = set()  # volumes that `release` has told of
        self.torn: set[str] = set()  # names of those to be mounted for the host again
        self.server_id = uuid.uuid4().hex

    async def attach(self, volume: Volume, claimed: Mounts, holder_id: str) -> None:
        """Make the volume available for one more mount, pending in ``claimed``.

        Return once it is attached and the claim is on record. On error, and when
        nobody else held it, what was attached is detached again.
        """
        before = self._catalog.mounts(volume.name)
        backend = self._catalog.backend(volume)
        spec = self._catalog.spec(volume)
        intent = attrs.evolve(claimed, attached=True)
        await self._write(volume, intent)
        hit("core.attach.intent")
        try:
            await backend.run(backend.attach, spec)
            hit("core.attach.driver")
            await self._write(volume, accounting.confirm(intent, holder_id))
        except BaseException:
            await self.release_quietly(
                volume, attrs.evolve(intent, holders=before.holders)
            )
            raise
        hit("core.attach.commit")

    async def require_seen(self, volume: Volume, client: Client) -> None:
        """Raise `Unsupported` where ``client`` can't see the mount of the volume.

        An engine in a mount namespace that our mounts do not reach would give its
        containers the empty directory below. What is not mounted is there for all; and
        for a client of another pid namespace, or one that has ended, nothing is known.
        """
        backend = self._catalog.backend(volume)
        if client.pid == 0 or not backend.driver.attaches(volume):
            return
        if namespaces.is_ours(client.pid):
            return
        path = volume.mountpoint
        if await asyncio.to_thread(namespaces.sees, client.pid, path):
            return
        if not processes.is_alive(client):
            return  # and what has its pid by now is somebody else
        uid = processes.owner(client.pid)
        raise Unsupported(
            f"{client.program or 'the client'} (pid {client.pid}, uid {uid}) has a "
            f"mount namespace that does not get the mounts of volplugin's: a container "
            f"would find the empty directory {path}. Let mounts reach it: by `mount "
            f"--make-rshared /` before it starts, where no systemd has done so; by "
            f"MountFlags=slave or shared in the engine's unit, and no PrivateMounts=, "
            f"PrivateTmp= or Protect…= in volplugin's. An engine that gets none can "
            f"use volumes that are not mounted: driver=local, and driver=quota where "
            f"it limits in place"
        )

    async def release(self, volume: Volume, mounts: Mounts) -> None:
        """Make ``mounts`` true, which has fewer holders; detach after the last.

        While a container's mount namespace still holds the file system, the volume
        stays attached: after a live-restore and a `docker cp`, dockerd 20.10 counts
        no mount for a container that lives on. `VolumeManager.sweep` looks again.
        """
        backend = self._catalog.backend(volume)
        if not backend.attaches(volume) and not mounts.holders:
            mounts = attrs.evolve(mounts, attached=False)
        if mounts != self._catalog.mounts(volume.name):
            await self._write(volume, mounts)
        hit("core.detach.intent")
        if mounts.holders or not mounts.attached:
            return
        users = await self.containers_using(volume)
        if users:
            if volume.id not in self._kept:  # once, not with each sweep
                log(
                    logger,
                    logging.INFO,
                    "kept attached: a container has it without a mount",
                    volume=volume.name,
                    users=_names(users),
                )
            self._kept.add(volume.id)
            return
        self._kept.discard(volume.id)
        await backend.run(backend.detach, self._catalog.spec(volume))
        hit("core.detach.driver")
        await self._write(volume, attrs.evolve(mounts, attached=False))
        hit("core.detach.commit")

    async def release_quietly(self, volume: Volume, mounts: Mounts) -> None:
        """`release`, with an error logged: for undoing after another error."""
        try:
            await self.release(volume, mounts)
        except Exception as error:  # noqa: BLE001  the first error is what is raised
            log(
                logger,
                logging.ERROR,
                "detach failed, to be tried again",
                volume=volume.name,
                error=str(error),
            )

    async def drop_claim(self, volume: Volume, before: Mounts) -> None:
        """Go back to the holders of ``before``, attached or not as it now is."""
        now = self._catalog.mounts(volume.name)
        await self._write(volume, attrs.evolve(now, holders=before.holders))

    async def take_back(self, volume: Volume, before: Mounts) -> None:
        """Go back to the holders of ``before``, and detach if there are none."""
        now = self._catalog.mounts(volume.name)
        await self.release_quietly(volume, attrs.evolve(now, holders=before.holders))

    async def put_right(
        self, volume: Volume, mounts: Mounts, *, at_once: bool = True
    ) -> None:
        """Write what the mount table has shown, and detach what nobody holds.

        The latter only ``at_once``; else it is left to the next sweep.
        """
        if at_once and mounts.attached and not mounts.holders:
            await self.release_quietly(volume, mounts)
        else:
            await self._write(volume, mounts)

    def look_for_torn(self) -> None:
        """Note held volumes whose mounts the engine has taken from a managed plugin.

        It does so as it takes the plugin down, and may do so late.
        """
        backends = self._catalog.backends
        if backends.tree is None:
            return
        mounted = {mount.mountpoint for mount in mountinfo.read()}
        for name, mounts in self._catalog.store.mounts.items():
            volume = self._catalog.find(name)
            backend = None if volume is None else backends.get(volume.backend)
            if volume is None or backend is None or name in self.torn:
                continue
            needed = {backends.path(volume)}
            if backend.driver.attaches(volume):
                needed.add(volume.mountpoint)
            pending = any(holder.pending for holder in mounts.holders.values())
            if mounts.holders and not pending and not needed <= mounted:
                self.torn.add(name)
                log(
                    logger,
                    logging.WARNING,
                    "its mount has gone, to be mounted again",
                    volume=name,
                    path=backends.path(volume),
                )

    async def restore(self, volume: Volume) -> None:
        """Attach a held volume again whose mounts the engine has taken down."""
        backend = self._catalog.backend(volume)
        mounts = attrs.evolve(self._catalog.mounts(volume.name), attached=True)
        await self._write(volume, mounts)
        await backend.run(backend.attach, self._catalog.spec(volume))
        self.torn.discard(volume.name)
        log(logger, logging.INFO, "mounted again", volume=volume.name)

    async def without_left_behind(
        self, volume: Volume, mounts: Mounts, program: str = ""
    ) -> Mounts:
        """Return ``mounts`` without the holders that dead engines left behind.

        These are an earlier life of ``program`` and of any engine that is a daemon; a
        command such as podman is never alive afterwards. Holders stay unless all of
        them are such and no container has the volume.
        """
        holders = mounts.holders.values()
        programs = {program, *accounting.DAEMONS} - {""}
        if not holders or not all(
            holder.client.program in programs and not processes.is_alive(holder.client)
            for holder in holders
        ):
            return mounts
        if await self.containers_using(volume):
            return mounts
        return attrs.evolve(mounts, holders={})

    def doubtful(self) -> list[str]:
        """Name the volumes that nobody may need attached any more.

        Quick however many there are: each client is looked at once.
        """
        known = self._catalog.store.mounts
        clients = {
            holder.client
            for mounts in known.values()
            for holder in mounts.holders.values()
            if holder.client.program in accounting.DAEMONS
        }
        gone = {client for client in clients if not processes.is_alive(client)}
        return [
            name
            for name, mounts in known.items()
            if (mounts.attached or mounts.holders)
            and all(holder.client in gone for holder in mounts.holders.values())
        ]

    async def require_unused(self, volume: Volume) -> None:
        """Raise `InUse`, naming who has the volume, unless nobody can.

        A holder whose Unmount may never come does not count if no container has the
        volume: else what a dead engine held could never be removed. That a container
        has it is looked up always: a holder may have been lost, with the end of a
        damaged store or by a sequence of calls that no rule covers.
        """
        holders = self._catalog.mounts(volume.name).holders.values()
        names = ", ".join(accounting.describe(holder) for holder in holders)
        if not all(self._is_doubtful(holder) for holder in holders):
            total = sum(holder.count for holder in holders)
            raise InUse(
                f"in use by {total} mount{'s' * (total != 1)}: {names}; stop the "
                f"containers that have it"
            )
        users = await self.containers_using(volume)
        if users:
            raise InUse(f"in use by a container: {_names(users)}; stop it")
        if holders:
            log(
                logger,
                logging.WARNING,
                "dropped holders: their clients are gone, no container has it",
                volume=volume.name,
                holders=names,
            )

    async def release_all(self, volume: Volume) -> list[Holder]:
        """Drop all holders of the volume, detach it, and return them.

        For an operator, who knows what no rule does: that their Unmounts never come.
        Raise `InUse`, naming the processes, while a container has the volume; nothing
        is changed then.
        """
        self._catalog.backend(volume)  # or nothing can be done, and nothing is
        users = await self.containers_using(volume)
        if users:
            raise InUse(f"in use by a container: {_names(users)}; stop it")
        holders = list(self._catalog.mounts(volume.name).holders.values())
        if holders:
            log(
                logger,
                logging.WARNING,
                "dropped holders: released by an operator",
                volume=volume.name,
                holders=", ".join(map(accounting.describe, holders)),
            )
        await self.let_go(volume)
        return holders

    async def let_go(self, volume: Volume) -> None:
        """Detach the volume whoever holds it; raise `InUse` if a container begins."""
        mounts = self._catalog.mounts(volume.name)
        if not mounts.attached:
            return
        await self.release(volume, attrs.evolve(mounts, holders={}))
        if self._catalog.mounts(volume.name).attached:
            raise InUse("in use by a container that has just begun; stop it")

    def _is_doubtful(self, holder: Holder) -> bool:
        """Tell whether the Unmount of this holder may never come.

        So it is when its client's life is over, when the server that granted it died
        (then the answer may not have reached the client), and for PouchContainer, whose
        last release never unmounts.
        """
        return (
            holder.server != self.server_id
            or holder.client.program in accounting.NEVER_UNMOUNT
            or not processes.is_alive(holder.client)
        )

    async def containers_using(self, volume: Volume) -> list[Process]:
        """Return processes whose own mount namespace has the volume in it."""

        def look() -> list[Process]:
            users = self._users(volume, mountinfo.read())
            return self._besides_servers(volume, users) if users else users

        return await asyncio.to_thread(look)

    def _users(self, volume: Volume, table: Sequence[Mount]) -> list[Process]:
        backends = self._catalog.backends
        backend = backends.get(volume.backend)
        if (
            backends.tree is not None
            and backend is not None
            and backend.driver.attaches(volume)
            and not backend.driver.is_attached(volume, table)
        ):
            # The engine has taken all of our mounts down, not those of containers.
            is_of = propagated.identity(volume, backend.driver)
            return [process for process, _ in namespaces.showing(is_of)]
        where = mountinfo.inside(volume.mountpoint, table)
        if where is None:
            return []
        ours = [
            mountinfo.at(path, table)
            for path in {volume.mountpoint, backends.path(volume)}
        ]
        places = [mountinfo.place_of(mount, table) for mount in ours if mount]
        return namespaces.holders(*where, [place for place in places if place])

    def _besides_servers(self, volume: Volume, users: list[Process]) -> list[Process]:
        """Leave out who serves the volume from a container of its own."""
        backend = self._catalog.backends.get(volume.backend)
        if backend is None or not isinstance(backend.driver, ServedByOthers):
            return users
        server = backend.driver.server_of(volume)
        return users if server is None else namespaces.besides(users, server)

    async def _write(self, volume: Volume, mounts: Mounts) -> None:
        await self._catalog.store.commit(PutMounts(volume.name, mounts), sync=False)


def _names(users: list[Process]) -> str:
    return ", ".join(f"pid {user.pid} ({user.program})" for user in users)
