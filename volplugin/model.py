"""The values that every layer speaks of: volumes, their states, and who holds them."""

from collections.abc import Mapping
from enum import Enum

import attrs


class State(Enum):
    """Where a volume is in its life; absent before *creating* and after *removing*."""

    CREATING = "creating"
    READY = "ready"
    REMOVING = "removing"


@attrs.frozen(kw_only=True)
class Volume:
    """A volume's record, as the store keeps it and as its root's xattr carries it.

    ``id`` tells two volumes of one name apart, in time and between stores. ``options``
    are the user's own words; the driver parses them. ``facts`` are what the driver
    noted when it planned the volume, for its own later use. ``mountpoint`` is where
    the bytes are once attached; it never changes. ``pending`` are options that a resize
    under way is about to give it.
    """

    name: str
    id: str
    backend: str
    driver: str
    options: Mapping[str, str] = attrs.field(factory=dict)
    facts: Mapping[str, str] = attrs.field(factory=dict)
    mountpoint: str
    created_at: str
    state: State = State.CREATING
    pending: Mapping[str, str] = attrs.field(factory=dict)


@attrs.frozen(kw_only=True)
class Usage:
    """What a volume held when it was measured; bytes, and numbers of inodes.

    ``size`` and ``inodes`` are the limits in force, None where there is none.
    ``available`` is what can still be written, be it for the limit or the disk below.
    ``inodes_used`` is None where nobody counts them. ``notes`` are facts of the moment
    for Status, such as the progress of what runs in the background.
    """

    used: int
    available: int
    size: int | None = None
    inodes_used: int | None = None
    inodes: int | None = None
    notes: Mapping[str, str] = attrs.field(factory=dict)


@attrs.frozen(kw_only=True)
class Client:
    """The process at the other end of a plugin socket, for one life of it.

    ``pid`` is 0 where the kernel cannot name it (another pid namespace). ``started``
    is the process's start in clock ticks after boot, which tells a reused pid apart;
    where ``pid`` is 0 it counts the client's activations instead.
    """

    program: str = ""
    pid: int = 0
    started: int = 0


@attrs.frozen(kw_only=True)
class Holder:
    """One mount ID that holds a volume attached.

    ``count`` is how many Mounts of this ID are to be answered by an Unmount each;
    ``pending`` of them are granted but not answered yet, and a restart takes those
    back. ``server`` is the server process that granted the last one.
    """

    id: str
    count: int = 1
    pending: int = 0
    client: Client = Client()
    since: str = ""
    server: str = ""


@attrs.frozen(kw_only=True)
class Mounts:
    """Who holds a volume on this host, in the boot that ``boot_id`` names.

    ``attached`` says that the driver may have attached it, whoever holds it now: true
    from the intent to attach until a detach has succeeded.
    """

    boot_id: str
    attached: bool = False
    holders: Mapping[str, Holder] = attrs.field(factory=dict)
