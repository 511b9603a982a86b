"""The records of volumes that many hosts may write at once: who has which.

CephFS keeps the hosts' views of one directory the same, so that no host keeps another
out. Holders are noted all the same: a volume that another host has is not removed.
"""

import logging
import socket
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import attrs

from volplugin.ceph.cluster import Cluster
from volplugin.ceph.registry import Holder, Registry, Shared
from volplugin.errors import AlreadyExists, InUse, NotFound, Unavailable
from volplugin.logs import log
from volplugin.model import State, Volume
from volplugin.times import now

logger = logging.getLogger(__name__)

_FENCE_SECONDS: Final = 7 * 24 * 3600


class Records:
    """The records of one backend, as one host changes them."""

    def __init__(
        self,
        cluster: Cluster,
        registry: Callable[[], Registry],
        identity: Callable[[], str],
        boot_id: str,
        host: str | None,
    ) -> None:
        self._cluster = cluster
        self._registry = registry
        self._identity = identity
        self._boot_id = boot_id
        self._host = host or socket.gethostname()

    def make(self, volume: Volume) -> None:
        """Claim the volume's name. Raise `AlreadyExists` where another has it."""
        shared = Shared(
            volume=attrs.evolve(volume, state=State.CREATING), maker=self._host
        )
        self._registry().create(shared)

    def finish(self, volume: Volume) -> None:
        """Say that the volume can be used. Idempotent."""

        def change(shared: Shared) -> Shared:
            if shared.volume.state is State.REMOVING:
                raise AlreadyExists(
                    f"{shared.maker} has begun to remove what was made here, as it took"
                    f" so long: create it again"
                )
            ready = attrs.evolve(shared.volume, state=State.READY)
            return attrs.evolve(shared, volume=ready)

        self._registry().change(volume.name, volume.id, change)

    def update(self, volume: Volume) -> None:
        """Give the record the volume's options."""

        def change(shared: Shared) -> Shared:
            changed = attrs.evolve(shared.volume, options=volume.options)
            return attrs.evolve(shared, volume=changed)

        self._registry().change(volume.name, volume.id, change)

    def hold(
        self, volume: Volume, access: str, addresses: Sequence[str] | None = None
    ) -> Shared:
        """Note that this host has the volume, by the clients at ``addresses``.

        None leaves those that are noted. Idempotent. Raise `Unavailable` for a volume
        that is not ready, or is another by now, `NotFound` for one that is gone.
        """

        def change(shared: Shared) -> Shared:
            if shared.volume.state is not State.READY:
                doing = "made" if shared.volume.state is State.CREATING else "removed"
                raise Unavailable(
                    f"it is being {doing} by {shared.maker}: remove it, also if that"
                    f" host has died in the middle"
                )
            mine = self._mine(shared)
            kept = mine if mine is not None else self._me(access)
            if addresses is not None:
                kept = attrs.evolve(kept, addresses=tuple(addresses))
            kept = attrs.evolve(kept, access=access)
            return attrs.evolve(shared, holders=(*self._others(shared), kept))

        try:
            return self._registry().change(volume.name, volume.id, change)
        except AlreadyExists as error:
            raise Unavailable(
                f"it was removed by another host, and made anew: {error}"
            ) from error

    def release(self, volume: Volume) -> None:
        """Note that this host has the volume no more. Idempotent."""

        def change(shared: Shared) -> Shared:
            return attrs.evolve(shared, holders=tuple(self._others(shared)))

        try:
            self._registry().change(volume.name, volume.id, change)
        except (NotFound, AlreadyExists):
            return  # it is gone, and with it what we noted

    def begin_removal(self, volume: Volume) -> None:
        """Take the volume from all hosts; raise `InUse` naming those that have it.

        Raise it also where this is to undo what another host was making, and has made.
        No effect on what is not there, or is another volume.
        """

        def change(shared: Shared) -> Shared:
            if shared.was_finished_for(self._host, volume):
                raise InUse(f"another host has made {volume.name}")
            others = self._others(shared)
            if others and shared.volume.state is State.READY:
                raise InUse(
                    f"in use by {_named(others)}: stop its containers there, or, if"
                    f" such a host is dead: volplugin volume takeover {volume.name}"
                )
            going = attrs.evolve(shared.volume, state=State.REMOVING)
            return attrs.evolve(shared, volume=going, holders=(), maker=self._host)

        try:
            self._registry().change(volume.name, volume.id, change)
        except (NotFound, AlreadyExists):
            return

    def remove(self, volume: Volume) -> None:
        """Free the volume's name. Idempotent."""
        self._registry().remove(volume.name, volume.id)

    def take_over(self, volume: Volume) -> list[str]:
        """Drop all other hosts that hold the volume; return their names.

        Their clients are kept from the cluster first, where we know them: those of
        ceph-fuse, with a mount for each volume. The others are only forgotten, which
        does no harm as CephFS has many writers.
        """
        read = self._registry().read(volume.name)
        if read is None or read.volume.id != volume.id:
            raise NotFound("the cluster has no such volume any more")
        dropped = self._others(read)
        for holder in dropped:
            for address in holder.addresses:
                self._cluster.blocklist(address, _FENCE_SECONDS)
        when = now()

        def change(shared: Shared) -> Shared:
            left = [
                holder
                for holder in shared.holders
                if not any(holder.is_same(other) for other in dropped)
            ]
            if len(left) == len(shared.holders):
                return shared
            taken = f"{self._host} at {when}"
            return attrs.evolve(shared, holders=tuple(left), taken_by=taken)

        self._registry().change(volume.name, volume.id, change)
        for holder in dropped:
            log(
                logger,
                logging.WARNING,
                "holder dropped",
                volume=volume.name,
                host=holder.host,
                fenced=",".join(holder.addresses) or "none",
            )
        return [holder.host for holder in dropped]

    def forget_earlier_boots(self, is_attached: Callable[[Volume], bool]) -> None:
        """Drop what this host held before it was booted, and has no more."""
        for shared in self._registry().all():
            mine = self._mine(shared, any_boot=True)
            if mine is None or mine.boot_id == self._boot_id:
                continue
            if not is_attached(shared.volume):
                self._release_earlier(shared.volume)

    def hosts(self, shared: Shared) -> list[str]:
        """Name the other hosts that have the volume."""
        return sorted(holder.host for holder in self._others(shared))

    def _release_earlier(self, volume: Volume) -> None:
        def change(shared: Shared) -> Shared:
            mine = self._mine(shared)
            kept = (*self._others(shared), *([mine] if mine is not None else ()))
            return attrs.evolve(shared, holders=kept)

        try:
            self._registry().change(volume.name, volume.id, change)
        except (NotFound, AlreadyExists):
            return

    def _me(self, access: str) -> Holder:
        return Holder(
            identity=self._identity(),
            boot_id=self._boot_id,
            host=self._host,
            address=next(iter(sorted(self._cluster.addresses())), ""),
            since=now(),
            access=access,
        )

    def _mine(self, shared: Shared, *, any_boot: bool = False) -> Holder | None:
        identity = self._identity()
        for holder in shared.holders:
            if holder.identity == identity and (
                any_boot or holder.boot_id == self._boot_id
            ):
                return holder
        return None

    def _others(self, shared: Shared) -> list[Holder]:
        # An earlier boot of this host is no other: what it had mounted is gone.
        identity = self._identity()
        return [each for each in shared.holders if each.identity != identity]


def _named(holders: Iterable[Holder]) -> str:
    return ", ".join(f"{each.host} (since {each.since})" for each in holders)
