"""How volumes and mounts are written down, in the store and in xattrs: JSON."""

from typing import Final, TypeVar

from cattrs.preconf.json import make_converter

from volplugin.model import Mounts, Volume

T = TypeVar("T", Volume, Mounts)

VOLUME_PREFIX: Final = b"volume/"
MOUNTS_PREFIX: Final = b"mounts/"

_converter = make_converter()


def encode(record: Volume | Mounts) -> bytes:
    """Write ``record`` as compact JSON, the same bytes for the same value."""
    text: str = _converter.dumps(record, separators=(",", ":"), sort_keys=True)
    return text.encode()


def decode(data: bytes, kind: type[T]) -> T:
    """Read back what `encode` wrote; raise `ValueError` for anything else."""
    try:
        return _converter.loads(data, kind)
    except Exception as error:  # cattrs raises groups of many kinds
        raise ValueError(f"no record of a {kind.__name__}: {data[:80]!r}") from error


def volume_key(name: str) -> bytes:
    """Return the key of the volume ``name``."""
    return VOLUME_PREFIX + name.encode()


def mounts_key(name: str) -> bytes:
    """Return the key of the mounts of the volume ``name``."""
    return MOUNTS_PREFIX + name.encode()
