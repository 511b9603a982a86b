"""One writer: which host has a volume attached, and how it loses it to another.

A *holder* is an entry in the volume's record. A *watcher* is a client that has the
volume's image open for writing, as the OSD of the image's header sees it; it stays for
about 30 s after its client died. A *stranger* is a watcher that is neither ours nor
left over from what was fenced.

Nothing but *fencing* displaces a holder: its clients are blocklisted first, so that no
write of theirs is taken any more, and only then is it taken out of the record. That is
done also when it seems dead, as a host that was cut off may come back and write; to
blocklist an address that is no more costs nothing.
"""

import time
from collections.abc import Callable, Sequence
from typing import Final, Literal, TypeAlias

import attrs

from volplugin.ceph.cluster import plain_address
from volplugin.ceph.fencing import Fence
from volplugin.ceph.records import Holder, Shared
from volplugin.ceph.registry import Registry
from volplugin.errors import AlreadyExists, InUse, NotFound, Unavailable
from volplugin.failpoints import hit
from volplugin.times import now

Conflict: TypeAlias = Literal["fail", "wait", "fence"]
Watchers: TypeAlias = Callable[[], Sequence[str]]

DEAD_AFTER: Final = 2.0  # seconds without a watcher, where nothing is waited for
DEAD_AFTER_WAIT: Final = 5.0  # the same, where waiting is allowed
_LOOK_AGAIN: Final = 0.5  # seconds between looks
_ATTEMPTS: Final = 20  # to become a holder, against others who also try


class Holding:
    """Becomes and ceases to be a holder of volumes, for one backend of one host."""

    def __init__(
        self, registry: Registry, identity: str, boot_id: str, host: str
    ) -> None:
        self._registry = registry
        self._identity = identity
        self._boot_id = boot_id
        self._host = host

    def me(self, access: str) -> Holder:
        """Return this host's entry, as from now."""
        return Holder(
            identity=self._identity,
            boot_id=self._boot_id,
            host=self._host,
            address=", ".join(sorted(self._registry.cluster.addresses())),
            since=now("seconds"),
            access=access,
        )

    def hold(
        self,
        name: str,
        volume_id: str,
        *,
        access: str,
        conflict: Conflict,
        watchers: Watchers,
        limit: float,
    ) -> Shared:
        """Become a holder of the volume, a writer only alone. Idempotent.

        To be called before the image is mapped. ``watchers`` looks at who has the image
        open now. Where another is in the way, ``conflict`` decides:

        - ``fail`` raises `InUse`, unless the other is a writer without a watcher for
          `DEAD_AFTER`: then it is dead, and fenced.
        - ``wait`` waits until it is gone or, without a watcher for `DEAD_AFTER_WAIT`,
          dead, and raises `InUse` after ``limit`` seconds.
        - ``fence`` fences it at once.

        Readers have no watchers, so none is ever held to be dead. What this host held
        in an earlier boot is fenced without asking.
        """
        me = self.me(access)
        fence = Fence(self._registry, me)
        patience = DEAD_AFTER_WAIT if conflict == "wait" else DEAD_AFTER
        end = time.monotonic() + limit
        alone: tuple[tuple[Holder, ...], float] | None = None
        attempt = 0
        while attempt < _ATTEMPTS:
            shared = self._read(name, volume_id)
            others = _in_the_way(shared, me)
            strangers = fence.strangers(shared, watchers())
            if not others and not (strangers and _minds(shared, me)):
                attempt += 1
                if (held := self._enter(name, volume_id, me)) is not None:
                    return held
                continue
            if conflict == "fence" or _is_past(others, strangers, me):
                attempt += 1
                fence.displace(name, volume_id, watchers)
                continue
            moment = time.monotonic()
            if strangers or not all(each.access == "rw" for each in others):
                alone = None
                if conflict == "fail" or moment > end:
                    raise _in_use(name, others, strangers)
            elif alone is None or alone[0] != others:
                alone = (others, moment)
            elif moment - alone[1] >= patience:
                attempt += 1
                fence.displace(name, volume_id, watchers)
                continue
            time.sleep(_LOOK_AGAIN)
        raise Unavailable(
            f"the hold on {name} changes hands all the time: see which hosts want it,"
            " and ask again"
        )

    def note_addresses(
        self, name: str, volume_id: str, addresses: Sequence[str]
    ) -> Shared:
        """Note by which clients this host maps the volume, before it writes anything.

        Raise `Unavailable` where it is held no more: the mapping is to be undone.
        """
        noted = tuple(sorted({plain_address(address) for address in addresses}))

        def change(shared: Shared) -> Shared:
            if (reason := self.lost(shared)) is not None:
                raise Unavailable(f"{name} is {reason}")
            return _put(
                shared,
                [
                    attrs.evolve(each, addresses=noted) if self._is_us(each) else each
                    for each in shared.holders
                ],
            )

        return self._registry.change(name, volume_id, change)

    def release(
        self, name: str, volume_id: str, *, watchers: Watchers | None = None
    ) -> None:
        """Be a holder no more. Idempotent; to be called once it is unmapped.

        With ``watchers``, this host's own clients that are still seen are cut off: they
        were killed, and their locks would hold up the next writer for half a minute.
        """
        if watchers is not None:
            self._cut_off_dead(name, volume_id, set(map(plain_address, watchers())))

        def change(shared: Shared) -> Shared:
            left = [each for each in shared.holders if not self._is_us(each)]
            return _put(shared, left)

        try:
            self._registry.change(name, volume_id, change)
        except (NotFound, AlreadyExists):  # removed, and maybe made anew
            return

    def fence(self, name: str, volume_id: str, watchers: Watchers) -> list[str]:
        """Displace everyone else who has the volume; return who that was, in words.

        Idempotent. No effect while this host holds it. Afterwards nobody holds it, and
        no write of theirs is taken any more.
        """
        shared = self._read(name, volume_id)
        if self.lost(shared) is None:
            return []
        return Fence(self._registry, self.me("rw")).displace(name, volume_id, watchers)

    def lost(self, shared: Shared) -> str | None:
        """Return None while this host holds the volume, else why it does not."""
        if any(self._is_us(each) for each in shared.holders):
            return None
        if shared.taken_by:
            return f"taken over by {shared.taken_by}"
        if shared.holders:
            return f"held by {', '.join(each.host for each in shared.holders)}"
        return "not held by this host"

    def _cut_off_dead(self, name: str, volume_id: str, seen: set[str]) -> None:
        shared = self._registry.read(name)
        if shared is None or shared.volume.id != volume_id:
            return
        for each in filter(self._is_us, shared.holders):
            for address in seen.intersection(each.addresses):
                self._registry.cluster.blocklist(address)

    def _is_us(self, holder: Holder) -> bool:
        return (holder.identity, holder.boot_id) == (self._identity, self._boot_id)

    def _read(self, name: str, volume_id: str) -> Shared:
        # It has the checks of name and id; the same value back writes nothing.
        return self._registry.change(name, volume_id, lambda shared: shared)

    def _enter(self, name: str, volume_id: str, me: Holder) -> Shared | None:
        """Write this host down as a holder; None where another came first."""
        raced = False

        def change(shared: Shared) -> Shared:
            nonlocal raced
            raced = bool(_in_the_way(shared, me))
            if raced:
                return shared
            for each in shared.holders:
                if each.is_same(me):
                    kept = attrs.evolve(each, access=me.access)
                    break
            else:
                kept = me
            rest = [each for each in shared.holders if not each.is_same(me)]
            return _put(shared, [*rest, kept])

        hit("holding.hold")
        held = self._registry.change(name, volume_id, change)
        return None if raced else held


def _in_the_way(shared: Shared, me: Holder) -> tuple[Holder, ...]:
    """Return the holders beside whom ``me`` can't be one: a writer is alone."""
    return tuple(
        each
        for each in shared.holders
        if not each.is_same(me) and "rw" in {each.access, me.access}
    )


def _minds(shared: Shared, me: Holder) -> bool:
    """Tell whether strangers matter.

    Once we are the writer, they are clients of our own that are not noted yet. Beside
    readers, they may be such a client of theirs.
    """
    if me.access == "ro":
        return not shared.holders
    return not any(each.is_same(me) and each.access == "rw" for each in shared.holders)


def _is_past(others: Sequence[Holder], strangers: Sequence[str], me: Holder) -> bool:
    """Tell whether only this host's earlier boots are in the way, and they ended.

    By name as well: a host that was cloned has the other's identity.
    """
    known = {address for each in others for address in each.addresses}
    return (
        bool(others)
        and all((e.identity, e.host) == (me.identity, me.host) for e in others)
        and known.issuperset(strangers)
    )


def _put(shared: Shared, holders: Sequence[Holder]) -> Shared:
    return attrs.evolve(shared, holders=tuple(holders))


def _in_use(name: str, others: Sequence[Holder], strangers: Sequence[str]) -> InUse:
    if others:
        who = ", ".join(
            f"attached on {each.host} (address {each.address or 'unknown'}) since"
            f" {each.since}" + (", read-only" if each.access == "ro" else "")
            for each in others
        )
        way = (
            "stop its container there or, if that host is dead: volplugin volume"
            f" takeover {name}"
        )
    else:
        who = f"its image is open by clients that no host holds: {', '.join(strangers)}"
        way = (
            "unmap it there or, if they are dead, wait 30 s, or: volplugin volume"
            f" takeover {name}"
        )
    return InUse(f"{who}: {way}")
