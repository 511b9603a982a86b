"""Who holds a volume: the rules that turn Mounts and Unmounts into holders.

No pure rule covers what engines send, so the rules know the client. dockerd gives each
container an ID of its own and sends an Unmount for each Mount, but loses Unmounts when
it dies, and repeats an ID for `docker cp`. Podman has one constant ID, PouchContainer a
random one in every call; both count for themselves and send the one Unmount that
matters. All functions here are pure; `core` makes their results true.

- Mounts are counted per ID within one life of the client. The same ID from a new life
  starts at 1: the old life's Unmounts never come.
- A client that counts for itself holds a volume once by each ID, however often it asks,
  and one Unmount releases all of its IDs.
- An Unmount of an unknown ID is success. Unless it comes from dockerd, whose IDs are
  stable, it releases the one other ID of that program, if there is exactly one.
"""

from collections.abc import Iterable
from typing import Final

import attrs

from volplugin.model import Client, Holder, Mounts

COUNT_FOR_THEMSELVES: Final = frozenset({"podman", "pouchd"})
"""Podman mounts at its own 0→1 and unmounts at 1→0. Pouch 1.0.0 repeats one ID at
create and start and unmounts once; its last release sends random IDs."""

DAEMONS: Final = frozenset({"dockerd", "pouchd"})
"""Clients that live as long as they hold a volume; Podman's process ends at once."""

NEVER_UNMOUNT: Final = frozenset({"pouchd"})
"""Its last release sends a Mount for every start and no Unmount at all."""

FORGET_NO_FAILED_UNMOUNT: Final = frozenset({"podman"})
"""Podman 4 keeps its count when an Unmount fails, and sends no Mount while it has one:
its next container would get the bare mountpoint of what was detached meanwhile."""

HAVE_STABLE_IDS: Final = frozenset({"dockerd", "podman"})


def claim(
    mounts: Mounts, holder_id: str, client: Client, *, now: str, server: str
) -> Mounts:
    """Count one more Mount, still to be answered (see `confirm`)."""
    known = mounts.holders.get(holder_id)
    count, pending = 1, 1
    if (
        known is not None
        and known.client == client
        and client.program not in COUNT_FOR_THEMSELVES
    ):
        count, pending = known.count + 1, known.pending + 1
    holder = Holder(
        id=holder_id,
        count=count,
        pending=pending,
        client=client,
        since=now,
        server=server,
    )
    return _with(mounts, {**mounts.holders, holder_id: holder})


def confirm(mounts: Mounts, holder_id: str) -> Mounts:
    """Note that one pending Mount of the ID was answered."""
    holder = mounts.holders[holder_id]
    settled = attrs.evolve(holder, pending=max(0, holder.pending - 1))
    return _with(mounts, {**mounts.holders, holder_id: settled})


def release(mounts: Mounts, holder_id: str, client: Client) -> Mounts:
    """Count one Unmount; unknown IDs change nothing, or release by the rules above."""
    holders = dict(mounts.holders)
    if client.program in COUNT_FOR_THEMSELVES:
        own = {i for i, h in holders.items() if h.client.program == client.program}
        return _with(mounts, {i: h for i, h in holders.items() if i not in own})
    known = holders.get(holder_id)
    if known is not None:
        if known.client == client and known.count > 1:
            pending = min(known.pending, known.count - 1)
            holders[holder_id] = attrs.evolve(
                known, count=known.count - 1, pending=pending
            )
        else:
            del holders[holder_id]
    elif client.program not in HAVE_STABLE_IDS:
        others = [i for i, h in holders.items() if h.client.program == client.program]
        if len(others) == 1:
            del holders[others[0]]
    return _with(mounts, holders)


def is_held_by(mounts: Mounts, program: str) -> bool:
    """Tell whether a client of this name holds the volume."""
    return any(holder.client.program == program for holder in mounts.holders.values())


def drop_pending(mounts: Mounts) -> Mounts:
    """Take back all Mounts that a dead server granted and never answered."""
    holders = {
        i: attrs.evolve(h, count=h.count - h.pending, pending=0)
        for i, h in mounts.holders.items()
        if h.count > h.pending
    }
    return _with(mounts, holders)


def describe(holder: Holder) -> str:
    """Say who a holder is, for an error or a Status."""
    short = holder.id if len(holder.id) <= 12 else holder.id[:12] + "…"
    program = holder.client.program or "a client"
    pid = f", pid {holder.client.pid}" if holder.client.pid else ""
    return f"{short!r} ({program}{pid}, since {holder.since})"


def never_released(name: str, holders: Iterable[Holder]) -> str | None:
    """Say by whom the volume is held for longer than its containers live, if it is."""
    programs = {holder.client.program for holder in holders} & NEVER_UNMOUNT
    if not programs:
        return None
    return (
        f"by {', '.join(sorted(programs))}, whose last release never unmounts: until "
        f"it ends, or `volplugin volume release {name}`"
    )


def _with(mounts: Mounts, holders: dict[str, Holder]) -> Mounts:
    return attrs.evolve(mounts, holders=holders)
