"""The admin socket's messages: values to JSON and back, and errors by their codes.

A call is ``POST /admin/v1/VERB`` with a request as a JSON object; the answer is one
too: with status 200 what the verb answers, with any other a `Failure`. An object with
a key that its class does not have is refused: an option must not be lost between a
newer client and an older server.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeVar

import attrs
import cattrs
from cattrs.errors import ForbiddenExtraKeysError

from volplugin import protocol
from volplugin.errors import Internal, InvalidArgument, VolpluginError

T = TypeVar("T", bound=attrs.AttrsInstance)

CONTENT_TYPE: Final = "application/json"
PREFIX: Final = "/admin/v1/"
RESIZE: Final = f"{PREFIX}resize"
RELEASE: Final = f"{PREFIX}release"
TAKE_OVER: Final = f"{PREFIX}take-over"
SNAPSHOTS: Final = f"{PREFIX}snapshots"
TAKE_SNAPSHOT: Final = f"{PREFIX}take-snapshot"
DROP_SNAPSHOT: Final = f"{PREFIX}drop-snapshot"
ADOPTABLE: Final = f"{PREFIX}adoptable"
ADOPT: Final = f"{PREFIX}adopt"
DISOWN: Final = f"{PREFIX}disown"
MIGRATE: Final = f"{PREFIX}migrate"


def _is_text(_: Any, field: "attrs.Attribute[str]", value: object) -> None:
    if not isinstance(value, str):
        raise InvalidArgument(f"{field.name} must be a string, not {value!r:.80}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can name half a character
        raise InvalidArgument(f"{field.name} is not valid UTF-8: {value!r}") from error


def _is_flag(_: Any, field: "attrs.Attribute[bool]", value: object) -> None:
    if not isinstance(value, bool):
        raise InvalidArgument(f"{field.name} must be true or false, not {value!r:.80}")


def _are_texts(
    _: Any, field: "attrs.Attribute[Mapping[str, str]]", value: object
) -> None:
    if not isinstance(value, Mapping) or not all(
        isinstance(text, str) for item in value.items() for text in item
    ):
        raise InvalidArgument(f"{field.name} must hold strings, not {value!r:.80}")


def _are_listed_texts(
    _: Any, field: "attrs.Attribute[Sequence[str]]", value: object
) -> None:
    if not isinstance(value, list | tuple) or not all(
        isinstance(text, str) for text in value
    ):
        raise InvalidArgument(f"{field.name} must be texts, not {value!r:.80}")


def _text(*, optional: bool = False) -> Any:
    if optional:
        return attrs.field(default=None, validator=attrs.validators.optional(_is_text))
    return attrs.field(validator=_is_text)


@attrs.frozen(kw_only=True)
class ResizeRequest:
    """Give the volume ``name`` new limits, in the words of ``docker volume create -o``.

    One that is None stays as it is.
    """

    name: str = _text()
    size: str | None = _text(optional=True)
    inodes: str | None = _text(optional=True)

    def changes(self) -> Mapping[str, str]:
        """Return the options that are asked for; raise `InvalidArgument` for none."""
        asked = {"size": self.size, "inodes": self.inodes}
        found = {key: value for key, value in asked.items() if value is not None}
        if not found:
            raise InvalidArgument("nothing to change: give a size or inodes, or both")
        return found


@attrs.frozen(kw_only=True)
class ResizeAnswer:
    """The volume ``name`` with its options as they were and as they are now."""

    name: str = _text()
    before: Mapping[str, str] = attrs.field(validator=_are_texts)
    after: Mapping[str, str] = attrs.field(validator=_are_texts)


@attrs.frozen(kw_only=True)
class VolumeRequest:
    """Ask something of the volume ``name``: to release it, to list its snapshots."""

    name: str = _text()


@attrs.frozen(kw_only=True)
class SnapshotRequest:
    """Take or drop the snapshot ``snapshot`` of the volume ``name``."""

    name: str = _text()
    snapshot: str = _text()


@attrs.frozen(kw_only=True)
class ReleaseAnswer:
    """The volume ``name``, and who had held it on this host."""

    name: str = _text()
    holders: Sequence[str] = attrs.field(validator=_are_listed_texts)


@attrs.frozen(kw_only=True)
class TakeOverAnswer:
    """The volume ``name``, and the hosts that it was taken from."""

    name: str = _text()
    hosts: Sequence[str] = attrs.field(validator=_are_listed_texts)


@attrs.frozen(kw_only=True)
class SnapshotAnswer:
    """The snapshot ``snapshot`` of the volume ``name`` is there, or is gone."""

    name: str = _text()
    snapshot: str = _text()


@attrs.frozen(kw_only=True)
class SnapshotEntry:
    """One snapshot; ``size`` is in bytes, as text."""

    name: str = _text()
    created_at: str = _text()
    size: str = _text()


@attrs.frozen(kw_only=True)
class SnapshotsAnswer:
    """The snapshots of the volume ``name``, oldest first."""

    name: str = _text()
    snapshots: Sequence[SnapshotEntry] = attrs.field()


@attrs.frozen(kw_only=True)
class AdoptableRequest:
    """Ask what there is to adopt of the driver or backend ``name``.

    ``options`` are those of its driver that say where to look.
    """

    name: str = _text()
    options: Mapping[str, str] = attrs.field(validator=_are_texts)


@attrs.frozen(kw_only=True)
class AdoptableEntry:
    """A volume that is there; ``volume`` is the one of ours that it is, or ""."""

    name: str = _text()
    volume: str = _text()


@attrs.frozen(kw_only=True)
class AdoptableAnswer:
    """The volumes that are there, by name."""

    volumes: Sequence[AdoptableEntry] = attrs.field()


@attrs.frozen(kw_only=True)
class AdoptRequest:
    """Make what is there as ``there`` the volume ``name``; else as `AdoptableRequest`.

    ``driver`` is a driver or a backend.
    """

    name: str = _text()
    driver: str = _text()
    options: Mapping[str, str] = attrs.field(validator=_are_texts)
    there: str = _text()


@attrs.frozen(kw_only=True)
class AdoptAnswer:
    """The volume ``name`` is one of ours now, or is another's and only used by us."""

    name: str = _text()


@attrs.frozen(kw_only=True)
class MigrateRequest:
    """Make the directory ``origin`` the volume ``name``, or tell what that would do.

    ``driver`` is a driver or a backend, "" the default one; ``options`` as for
    ``docker volume create``. ``dry`` has no effect; ``remove_origin`` deletes what
    was copied.
    """

    name: str = _text()
    driver: str = _text()
    options: Mapping[str, str] = attrs.field(validator=_are_texts)
    origin: str = _text()
    dry: bool = attrs.field(validator=_is_flag)
    remove_origin: bool = attrs.field(validator=_is_flag)


@attrs.frozen(kw_only=True)
class MigrateAnswer:
    """How ``name`` became a volume: ``way`` is ``move``, ``copy`` or ``adopt``.

    ``reason`` says why it is a copy; ``earlier`` that it was one before the call.
    """

    name: str = _text()
    way: str = _text()
    mountpoint: str = _text()
    reason: str = _text()
    earlier: bool = attrs.field(validator=_is_flag)


@attrs.frozen(kw_only=True)
class Failure:
    """Why a call failed; ``code`` is the name of a `volplugin.errors.Code`."""

    code: str = _text()
    message: str = _text()

    @classmethod
    def of(cls, error: VolpluginError) -> "Failure":
        """Return what is told of ``error``."""
        return cls(code=error.code.name, message=str(error))

    def error(self) -> VolpluginError:
        """Return the error again; a code that is not known here is `Internal`."""
        return _KINDS.get(self.code, Internal)(self.message)


_KINDS: Final = {kind.code.name: kind for kind in VolpluginError.__subclasses__()}

_converter: Final = cattrs.Converter(forbid_extra_keys=True, detailed_validation=False)
# cattrs would make texts of numbers, flags of texts; the classes' validators refuse.
_converter.register_structure_hook(str, lambda value, _: value)
_converter.register_structure_hook(bool, lambda value, _: value)
_converter.register_structure_hook_func(
    lambda kind: kind in (Mapping[str, str], Sequence[str]), lambda value, _: value
)


def _list_of(kind: type[Any], field: str) -> Callable[[object, Any], list[Any]]:
    def read(value: object, _: Any) -> list[Any]:
        if not isinstance(value, list) or not all(isinstance(v, dict) for v in value):
            raise InvalidArgument(f"{field} must be objects, not {value!r:.80}")
        return [_converter.structure(each, kind) for each in value]

    return read


for _entry, _field in ((SnapshotEntry, "snapshots"), (AdoptableEntry, "volumes")):
    _converter.register_structure_hook_func(
        lambda kind, wanted=Sequence[_entry]: kind == wanted,  # type: ignore[valid-type,misc]
        _list_of(_entry, _field),
    )


def encode(message: attrs.AttrsInstance) -> bytes:
    """Write ``message`` as JSON; what is None is left out."""
    found = attrs.asdict(message, filter=lambda _, value: value is not None)
    return json.dumps(found, separators=(",", ":")).encode()


def decode(body: bytes, kind: type[T]) -> T:
    """Read what `encode` wrote; raise `InvalidArgument` that says what is wrong."""
    try:
        return _converter.structure(protocol.decode(body), kind)
    except protocol.NotJSON as error:
        raise InvalidArgument(str(error)) from error
    except ForbiddenExtraKeysError as error:
        unknown = ", ".join(f"{key!r:.40}" for key in sorted(error.extra_fields)[:5])
        taken = ", ".join(field.name for field in attrs.fields(kind))
        raise InvalidArgument(f"unknown key {unknown}; it takes {taken}") from error
    except KeyError as error:
        raise InvalidArgument(f"{error.args[0]} is missing") from error
