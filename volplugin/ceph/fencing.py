"""Cutting other hosts off a volume, before another writes to it."""

import logging
from collections.abc import Callable, Sequence
from typing import Final

import attrs

from volplugin.ceph.cluster import plain_address
from volplugin.ceph.records import Holder, Shared
from volplugin.ceph.registry import Registry
from volplugin.errors import Unavailable
from volplugin.failpoints import hit
from volplugin.logs import log
from volplugin.times import now

logger = logging.getLogger(__name__)

_ROUNDS: Final = 10  # of clients that come while others are cut off


class Fence:
    """Displaces holders and clients of volumes, in the name of ``me``.

    It remembers whom it cut off: they may be seen as watchers for a moment longer.
    """

    def __init__(self, registry: Registry, me: Holder) -> None:
        self._registry = registry
        self._cluster = registry.cluster
        self._me = me
        self._cut: set[str] = set()

    def strangers(self, shared: Shared, watchers: Sequence[str]) -> list[str]:
        """Return those of ``watchers`` that are not ours and not cut off."""
        ours = set(self._cluster.addresses()) | self._cut
        for each in shared.holders:
            if each.is_same(self._me):
                ours.update(each.addresses)
        return sorted({plain_address(each) for each in watchers} - ours)

    def displace(
        self, name: str, volume_id: str, watchers: Callable[[], Sequence[str]]
    ) -> list[str]:
        """Cut all others off the volume, and take them out of its record.

        Return who that was, in words. Idempotent, also when cut short.
        """
        told: dict[str, None] = {}
        for _ in range(_ROUNDS):
            shared = self._registry.change(name, volume_id, lambda same: same)
            strangers = self.strangers(shared, watchers())
            told.update(dict.fromkeys(_words(self._others(shared), strangers)))
            noted = {a for each in self._others(shared) for a in each.addresses}
            # First nobody can write, then nobody holds: never the other way round.
            for address in sorted(noted | set(strangers)):
                self._cut_off(name, address)
            hit("holding.fence")
            done = self._take_out(name, volume_id, shared, bool(strangers))
            if done and not self.strangers(shared, watchers()):
                return list(told)
        raise Unavailable(
            f"others map {name} again and again while they are cut off: stop what does"
            f" so on {', '.join(told)}"
        )

    def _others(self, shared: Shared) -> list[Holder]:
        return [each for each in shared.holders if not each.is_same(self._me)]

    def _cut_off(self, name: str, address: str) -> None:
        if address in self._cut:
            return
        self._cluster.blocklist(address)
        self._cut.add(address)
        log(logger, logging.WARNING, "a client was fenced", volume=name, client=address)

    def _take_out(self, name: str, volume_id: str, seen: Shared, wrote: bool) -> bool:
        """Take the holders that were cut off out of the record; False if it changed."""
        others = self._others(seen)
        is_current = True

        def change(shared: Shared) -> Shared:
            nonlocal is_current
            is_current = self._others(shared) == others
            if not is_current or not (others or wrote):
                return shared
            wrote_last = wrote or any(each.access == "rw" for each in others)
            return attrs.evolve(
                shared,
                holders=tuple(e for e in shared.holders if e.is_same(self._me)),
                unclean=shared.unclean or wrote_last,
                taken_by=f"{self._me.host} at {now('seconds')}",
            )

        self._registry.change(name, volume_id, change)
        return is_current


def _words(holders: Sequence[Holder], strangers: Sequence[str]) -> list[str]:
    known = {address for each in holders for address in each.addresses}
    words = [
        f"{each.host} ({', '.join(each.addresses) or 'not mapped yet'})"
        for each in holders
    ]
    return words + [f"client {each}" for each in strangers if each not in known]
