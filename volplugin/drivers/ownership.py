"""Whose a directory is, told by the record in its xattr."""

import json

from volplugin.drivers.driver import Spec
from volplugin.errors import AlreadyExists
from volplugin.host import attributes


def owner(path: str) -> tuple[str, str] | None:
    """Return name and id of the volume that ``path`` is the root of, if it says so."""
    record = attributes.read_record(path)
    return None if record is None else _named(record)


def name_in(record: bytes) -> str:
    """Return the name in a record."""
    return _named(record)[0]


def id_in(record: bytes) -> str:
    """Return the id in a record, "" if it can't be read."""
    return _named(record)[1]


def _named(record: bytes) -> tuple[str, str]:
    try:
        fields = json.loads(record)
        return str(fields["name"]), str(fields["id"])
    except (ValueError, KeyError, TypeError):
        return "(unreadable)", ""


def is_of(spec: Spec, path: str) -> bool | None:
    """Tell whether ``path`` is the root of this volume; None if it does not say."""
    found = owner(path)
    return None if found is None else found[1] == spec.volume.id


def require_free(path: str, volume_id: str) -> None:
    """Raise `AlreadyExists` if ``path`` is the root of another volume."""
    found = owner(path)
    if found is not None and found[1] != volume_id:
        raise AlreadyExists(
            f"{path} is already the directory of volume {found[0]!r}; remove that "
            f"volume first, or, if it is known nowhere, `setfattr -x "
            f"trusted.volplugin {path}`"
        )
