"""What the cluster knows of a shared volume: its record, and who holds it. JSON.

Each is one RADOS object, so that it is read, and changed, as a whole. A form that a
newer volplugin wrote is refused, never half understood.
"""

import json
from typing import Any, Final

import attrs
from cattrs.preconf.json import make_converter

from volplugin.errors import InvalidArgument, Unavailable, Unsupported
from volplugin.model import State, Volume

SIZE_LIMIT: Final = 16 << 10  # bytes; one read gets the whole

_FORM: Final = 1
_FORM_KEY: Final = "version"
_converter = make_converter(forbid_extra_keys=True)


@attrs.frozen(kw_only=True)
class Holder:
    """A host that has a volume attached.

    ``identity`` is the backend's on that host, and outlives the plugin; with
    ``boot_id`` it tells which host it is. ``host`` and ``address`` (of the plugin's own
    connection) are for people. ``addresses`` are those of the clients that the volume
    is mapped by: what fencing blocklists. ``access`` is ``rw`` or ``ro``.
    """

    identity: str
    boot_id: str
    host: str
    address: str = ""
    since: str
    access: str = "rw"
    addresses: tuple[str, ...] = ()

    def is_same(self, other: "Holder") -> bool:
        """Tell whether both are one host, in one boot of it."""
        return (self.identity, self.boot_id) == (other.identity, other.boot_id)


@attrs.frozen(kw_only=True)
class Shared:
    """A shared volume.

    ``volume``'s ``backend`` and ``mountpoint`` are those of the host that made it;
    others put their own in. ``unclean`` says that its last writer was displaced and
    did not unmount: its file system is to be checked. ``maker`` is the host that makes
    or removes it. ``taken_by`` tells who displaced a holder, and when. ``version`` is
    the object's when it was read; it is not written, and makes no difference.
    """

    volume: Volume
    holders: tuple[Holder, ...] = ()
    unclean: bool = False
    maker: str = ""
    taken_by: str = ""
    version: int = attrs.field(default=0, eq=False)

    def was_finished_for(self, host: str, volume: Volume) -> bool:
        """Tell whether what is *creating* in the eyes of ``host`` is another's by now.

        To undo it would then take a whole volume away. What a host has finished itself
        is its own to undo.
        """
        is_made = self.volume.state is not State.CREATING
        return volume.state is State.CREATING and is_made and self.maker != host


def encode(shared: Shared) -> bytes:
    """Write ``shared`` as compact JSON, the same bytes for the same value.

    Raise `InvalidArgument` for what would be longer than `SIZE_LIMIT`.
    """
    written: dict[str, Any] = _converter.unstructure(shared)
    written[_FORM_KEY] = _FORM
    data = json.dumps(written, separators=(",", ":"), sort_keys=True).encode()
    if len(data) > SIZE_LIMIT:
        raise InvalidArgument(
            f"the record of {shared.volume.name} takes {len(data)} bytes, the limit is"
            f" {SIZE_LIMIT}: give it shorter options"
        )
    return data


def decode(name: str, data: bytes, version: int) -> Shared:
    """Read back what `encode` wrote.

    Raise `Unsupported` for a newer form and `Unavailable` for what is none.
    """
    try:
        written = json.loads(data)
        form = written.pop(_FORM_KEY)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise _damaged(name, data) from error
    if form != _FORM:
        raise Unsupported(
            f"the record of {name} in the cluster is of form {form!r}, this volplugin"
            f" knows form {_FORM}: upgrade it on this host"
        )
    try:
        shared = _converter.structure(written, Shared)
    except Exception as error:  # cattrs raises groups of many kinds
        raise _damaged(name, data) from error
    if shared.volume.name != name:
        raise _damaged(name, data)
    return attrs.evolve(shared, version=version)


def _damaged(name: str, data: bytes) -> Unavailable:
    return Unavailable(
        f"the record of {name} in the cluster is damaged, or a newer volplugin wrote"
        f" it: {data[:80]!r}"
    )
