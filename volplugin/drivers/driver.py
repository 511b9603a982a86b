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
