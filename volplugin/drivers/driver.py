"""The contract between the core and a kind of storage.

Terms: a *driver* is code for one kind of storage; a *backend* is a configured driver;
a *volume's root* is the directory that a container sees. *Attach* makes a volume's
bytes available at its mountpoint on this host, *detach* takes that back.

What the core promises a driver:

- One call for one volume at a time. Calls for different volumes run in parallel, in
  threads of the backend's own pool; all of them may block.
- A call is never cancelled. A caller may stop waiting for it; the volume stays locked
  until it returns.
- Before `create` and `remove` the intent is on disk. When the process dies in the
  middle, `remove` is called at the next start, with `Volume.state` as it was.
- `remove` is not called while someone holds the volume.

What a driver promises:

- Every method is idempotent: making what is there, and removing what is not, succeeds.
- A method that raises leaves nothing that a later `remove` would not take away.
- Only errors from `volplugin.errors` are raised, or `OSError`, which the backend
  turns into one of them.
- Nothing that the driver did not make is ever deleted.
- The volume's root carries `Spec.record` as its `trusted.volplugin` xattr from
  `create` on, where its file system has such attributes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import attrs

from volplugin.host.mountinfo import Mount
from volplugin.model import Usage, Volume


@attrs.frozen(kw_only=True)
class Plan:
    """Where a volume will be, decided before anything is done.

    ``chosen`` says that the user named the directory, so it must be held against
    those of all other volumes. ``facts`` are stored with the volume.
    """

    mountpoint: str
    chosen: bool = False
    facts: Mapping[str, str] = attrs.field(factory=dict)


@attrs.frozen(kw_only=True)
class Spec:
    """A volume as a driver gets it: its record, its options parsed, its xattr."""

    volume: Volume
    options: Any  # an instance of the driver's own Options
    record: bytes
    source: Volume | None = None  # what `Clones` is to copy; given to `create` alone


class Driver(ABC):
    """One backend. Built without effect; `open` comes before every other call."""

    name: ClassVar[str]
    Options: ClassVar[type]
    Config: ClassVar[type]

    @abstractmethod
    def __init__(self, config: Any, place: str) -> None:
        """Keep ``config`` (an instance of `Config`) and ``place``.

        ``place`` is the backend's own directory below volplugin's root.
        """

    @abstractmethod
    def open(self) -> None:
        """Make ready what all volumes need.

        Called at start, and again when the configuration was reloaded, while other
        calls run. A backend that is out of reach is no error: `attach` tells it later.
        """

    @abstractmethod
    def roots(self) -> Sequence[str]:
        """Return the directories below which no user may choose one of their own."""

    @abstractmethod
    def plan(self, name: str, volume_id: str, options: Any) -> Plan:
        """Decide where the volume will be; refuse what can't be. No effect."""

    @abstractmethod
    def create(self, spec: Spec) -> None:
        """Make the volume durable: after return it outlives a power cut.

        Raise `AlreadyExists` when something that is not this volume is in its place.
        """

    @abstractmethod
    def remove(self, spec: Spec) -> None:
        """Take the volume away, or release it where its directory is the user's.

        Quick whatever the volume holds: bytes are left to `Purges.purge`. For a volume
        in state *creating* this also undoes what a `create` did that never finished.
        """

    @abstractmethod
    def attach(self, spec: Spec) -> None:
        """Make the bytes available at the mountpoint, and check that they are these.

        Raise `Unavailable` when they are not.
        """

    @abstractmethod
    def detach(self, spec: Spec) -> None:
        """Take back `attach`. Raise `InUse` while a process on the host is in it."""

    @abstractmethod
    def attaches(self, volume: Volume) -> bool:
        """Tell whether attach and detach of this volume change this host. No I/O.

        If not, a volume that is ready is always available, `attach` only checks that it
        is, and `is_attached` is never true.
        """

    @abstractmethod
    def is_attached(self, volume: Volume, table: Sequence[Mount]) -> bool:
        """Tell from a mount table whether the volume is attached.

        No I/O but a look into the kernel's own tables below ``/proc`` and ``/sys``.
        """

    @abstractmethod
    def status(
        self, volume: Volume, options: Any, *, attached: bool
    ) -> Mapping[str, Any]:
        """Return what only this driver knows for Docker's Status. No I/O.

        No key may be named ``ref``: PouchContainer takes it for its own and then
        refuses to remove the volume.
        """


@runtime_checkable
class Resizes(Protocol):
    """A driver whose volumes can be given other limits, also while they are in use."""

    def plan_resize(self, spec: Spec, options: Any, *, attached: bool) -> None:
        """Refuse ``options`` for the volume ``spec`` if it can't have them. No effect.

        ``options`` differ from those of ``spec`` in ``size`` and ``inodes`` alone.
        """

    def resize(self, spec: Spec, *, attached: bool) -> None:
        """Make the limits those of ``spec.options``, and the record ``spec.record``.

        Idempotent: also called to finish, or to take back, what was cut short. Raise
        `NoSpace` when the volume holds more by now.
        """


@runtime_checkable
class Measures(Protocol):
    """A driver that can tell what its volumes hold."""

    def measure(self, specs: Sequence[Spec]) -> Mapping[str, Usage]:
        """Return what the volumes hold, by volume id, in one pass for all of them.

        Those without a limit, and those that can't be measured now, are left out. May
        block; called in the background alone.
        """


@runtime_checkable
class Verifies(Protocol):
    """A driver whose limits can be lost without its doing."""

    def verify(self, specs: Sequence[Spec]) -> None:
        """Hold the limits and ids of all volumes with facts against what is there.

        Called at start, after `Driver.open`. What differs for a volume that is ready is
        put right and logged; ids of the others are only kept from being given again.
        """


@runtime_checkable
class TellsLimits(Protocol):
    """A driver whose limits depend on the file system that its root is on."""

    def limited_by(self) -> str:
        """Say what limits new volumes, or what stands against it, for people.

        Found out by trying; no effect, and `Driver.open` need not come before.
        """


@runtime_checkable
class Promises(Protocol):
    """A driver whose volumes share one disk that may be promised more than once."""

    def promised(self, spec: Spec) -> int:
        """Return the bytes of the backend's disk that the volume may come to hold."""

    def require_room(self, total: int) -> None:
        """Raise `NoSpace` if the backend may not promise ``total`` bytes; warn once.

        No effect but the log.
        """


@runtime_checkable
class Purges(Protocol):
    """A driver whose `remove` leaves bytes to be deleted in the background."""

    def purge(self, stop: Callable[[], bool]) -> bool:
        """Delete what removed volumes left; return whether all of it is gone.

        Blocks for as long as that takes, or until ``stop`` says so. What cannot be
        deleted is logged and left for the next call.
        """


class Following(Protocol):
    """A subscription to what other hosts change."""

    def is_alive(self) -> bool:
        """Tell whether changes still arrive. No I/O."""

    def close(self) -> None:
        """End it; idempotent. May block for as long as an operation of the backend."""


@runtime_checkable
class Shares(Protocol):
    """A driver whose volumes live in a cluster that several hosts use.

    What the cluster says of a volume is the truth, and the store of each host a copy
    that follows. `create` raises `AlreadyExists` when another host was first; `remove`
    raises `InUse`, naming them, while other hosts have the volume. A volume that
    `create` has not finished is the maker's to undo, but its name is free for others
    once nothing of it has moved for a minute (see `find`).

    Volumes are returned as this host's: with its mountpoint, and in the state that the
    cluster has: *removing* is one that a host has begun to remove, or to undo, and so
    is harmed. What is *ready* there is whole, and a create or a removal of it that was
    cut short here long ago is not carried on: others may have written to it since.
    """

    def find(self, name: str) -> Volume | None:
        """Return the volume of this name that the cluster has. Blocks.

        Raise `Unavailable` when the cluster can't be asked.
        """

    def volumes(self) -> Iterable[Volume]:
        """Return all volumes that the cluster has. Blocks; errors as `find`."""

    def follow(self, changed: Callable[[str | None], None]) -> Following:
        """Have ``changed`` called with the name of each volume that a host changes.

        With None when some change may have been missed: then look at all. Called in
        threads that are not ours. Changes may still be missed without a sign: look at
        all now and then. Blocks; errors as `find`.
        """

    def health(self) -> str:
        """Say how the cluster is: ``ok``, or what is wrong. From memory, no I/O."""

    def close(self) -> None:
        """End the connection; called once, at the end, when no other call runs."""


@attrs.frozen(kw_only=True)
class Snapshot:
    """A volume as it was at one moment; ``size`` is its size then, in bytes."""

    name: str
    created_at: str
    size: int | None = None


@runtime_checkable
class Snapshots(Protocol):
    """A driver that can keep a volume as it is at one moment.

    A snapshot holds what was synced before, as a power cut at that moment would leave
    it. What lies in the caches of this host is synced first; that of other hosts is
    not.
    """

    def snapshots(self, spec: Spec) -> Sequence[Snapshot]:
        """Return the snapshots of a volume, oldest first."""

    def take_snapshot(self, spec: Spec, name: str, *, attached: bool) -> None:
        """Keep the volume as it is now under ``name``.

        Raise `AlreadyExists` for a name that is taken: it would be an older state.
        """

    def drop_snapshot(self, spec: Spec, name: str) -> None:
        """Delete a snapshot.

        Raise `NotFound` when there is none, `InUse` naming the clones that need it.
        """


@runtime_checkable
class Clones(Protocol):
    """A driver that can make a volume as a copy of another one of its backend.

    Its Options have an attribute ``source`` in the form ``VOLUME`` or
    ``VOLUME@SNAPSHOT``, or None. The volume is looked up by the core and given to
    `Driver.create` as `Spec.source`.
    """

    def plan_clone(self, source: Spec, snapshot: str | None, options: Any) -> None:
        """Refuse what can't be cloned like this. No effect."""


@runtime_checkable
class TakesOver(Protocol):
    """A driver whose volumes one host at a time has, that can be taken from it."""

    def take_over(self, spec: Spec) -> Sequence[str]:
        """Fence every other host that has the volume; return their names.

        After return no write of theirs reaches it any more, whatever they do. Whoever
        is the first to attach has it next. Nothing happens where no other has it.
        """


@runtime_checkable
class Volatile(Protocol):
    """A driver whose volumes are nowhere but in their mounts."""

    def is_volatile(self, volume: Volume) -> bool:
        """Tell whether the content ends with the last mount of it. No I/O."""


@runtime_checkable
class ServedByOthers(Protocol):
    """A driver whose file systems are served by processes that are not its own."""

    def server_of(self, volume: Volume) -> int | None:
        """Return the process that serves the volume, if that can be told.

        It may live in a container: what it has mounted there is no use of the volume.
        Quick; may look at a socket.
        """


@attrs.frozen(kw_only=True)
class Held:
    """A volume that is where a driver's own are, and may not be one of ours.

    ``options`` are those of a create that adopts it; ``facts`` those that the volume
    then has, by which it is known again.
    """

    name: str
    options: Mapping[str, str]
    facts: Mapping[str, str]


@runtime_checkable
class Adopts(Protocol):
    """A driver that can take over volumes which others made where its own are."""

    def adoptable(self, options: Any) -> Sequence[Held]:
        """Return the volumes that are there, ours among them. Blocks; no effect.

        ``options`` are an instance of the driver's own, and say where to look.
        """


@runtime_checkable
class Disowns(Protocol):
    """A driver whose volumes can be left to those who hold them."""

    def disowned(self, volume: Volume) -> Mapping[str, str]:
        """Return the options that the volume would have if it had been adopted. No I/O.

        A volume with those is left where it is when it is removed here.
        """

    def note_again(self, spec: Spec) -> None:
        """Have what `Discovers.discover` finds of the volume be ``spec.record``."""


@runtime_checkable
class TakesIn(Protocol):
    """A driver that can make a volume of a directory that is there, with its files.

    `Driver.create` makes such a volume by what `plan_intake` has noted in its facts.
    Once its files are in place it is whole, and is never taken back: `Driver.remove`
    of one in state *creating* is asked for only while `is_taken_in` says no, and then
    leaves the directory as it was.
    """

    def plan_intake(self, name: str, volume_id: str, options: Any, origin: str) -> Plan:
        """Decide how ``origin`` becomes the volume; refuse what can't. No effect.

        Facts ``origin`` and ``intake``, which is ``move`` or ``copy``, are for all to
        read; where it is a copy, ``copied-for`` says why. Raise `InUse` when a
        container has the directory.
        """

    def is_taken_in(self, spec: Spec) -> bool:
        """Tell whether the files of a volume in state *creating* are in place."""

    def drop_origin(self, spec: Spec) -> None:
        """Delete the directory that the volume, which is ready, is a copy of.

        Idempotent. Raise `AlreadyExists` where it differs from the volume by now.
        """


@runtime_checkable
class Lanes(Protocol):
    """A driver whose volumes depend on different parties, each of which may hang."""

    def lane(self, volume: Volume) -> str:
        """Return the party that the volume depends on. No I/O.

        Calls for volumes of one party have threads of their own: they starve no other.
        """


@attrs.frozen(kw_only=True)
class Found:
    """A record found on disk; ``path`` is the root that carries it, if that is ours.

    It is None for a note of a volume whose directory its user chose.
    """

    record: bytes
    path: str | None = None


@runtime_checkable
class Discovers(Protocol):
    """A driver that finds its volumes by the records that their roots carry."""

    def discover(self, known: Container[str] = ()) -> Iterable[Found]:
        """Return the records of all volumes that exist but those named in ``known``."""
