"""Sizes and counts as users write them: ``10G``, ``10.5MiB``, ``1073741824``; ``64k``.

All units are binary, as Docker's are. Nothing is guessed: a text that is no size, or
one that no disk can hold, is refused. PouchContainer made "no limit" of ``0.5`` and a
negative size of ``99999999999T``.
"""

import re
from typing import Final

from volplugin.errors import InvalidArgument

LARGEST: Final = 2**63 - 1  # what a signed 64-bit off_t holds

_SIZE: Final = re.compile(
    r"([0-9]+)(?:\.([0-9]+))?(?:([kmgtp])(?:i?b)?|b)?", re.IGNORECASE
)
_COUNT: Final = re.compile(r"([0-9]+)([kmg])?", re.IGNORECASE)
_UNITS: Final[dict[str, int]] = {
    unit: 1024**power for power, unit in enumerate(("", "k", "m", "g", "t", "p"))
}
_LONGEST: Final = 64  # characters; more cannot be meant, and costs time to work out

_SIZE_GRAMMAR: Final = (
    "give a number of bytes, or a number with K, M, G, T or P (binary units, "
    "also KB or KiB), such as 512M, 10G or 10.5GiB"
)
_COUNT_GRAMMAR: Final = (
    "give a whole number above 0, or one with k, m or g (binary units), such as 64k"
)


def parse_size(text: str) -> int:
    """Return the bytes that ``text`` stands for, from 1 to 2**63-1.

    A fraction of a byte is rounded down, but never to 0. Raise `InvalidArgument`, with
    the value and the grammar, for everything else: 0, signs, blanks, exponents, sizes
    above 2**63-1.
    """
    match = _SIZE.fullmatch(text) if len(text) <= _LONGEST else None
    if match is None:
        raise InvalidArgument(f"{_shown(text)} is not a size; {_SIZE_GRAMMAR}")
    whole, fraction, unit = match[1], match[2] or "", (match[3] or "").lower()
    size = int(whole + fraction) * _UNITS[unit] // int("1" + "0" * len(fraction))
    if size == 0:
        raise InvalidArgument(f"{_shown(text)} is less than a byte; {_SIZE_GRAMMAR}")
    if size > LARGEST:
        raise InvalidArgument(
            f"{_shown(text)} is more than 2**63-1 bytes; {_SIZE_GRAMMAR}"
        )
    return size


def format_size(size: int) -> str:
    """Return the shortest exact form of ``size`` in bytes: ``64M``, ``1536K``, ``100``.

    `parse_size` reads it back. 0, which is no size to ask for, is ``0``.
    """
    if size > 0:
        for unit, factor in reversed(_UNITS.items()):
            if size % factor == 0:
                return f"{size // factor}{unit.upper()}"
    return str(size)


def parse_count(text: str) -> int:
    """Return the count that ``text`` stands for, from 1 to 2**63-1.

    k, m and g are binary (1024), as in the kernel's own ``nr_inodes=`` (tmpfs(5)).
    Raise `InvalidArgument`, with the value and the grammar, for everything else.
    """
    match = _COUNT.fullmatch(text) if len(text) <= _LONGEST else None
    if match is None:
        raise InvalidArgument(f"{_shown(text)} is not a count; {_COUNT_GRAMMAR}")
    count = int(match[1]) * _UNITS[(match[2] or "").lower()]
    if not 0 < count <= LARGEST:
        raise InvalidArgument(
            f"{_shown(text)} is not between 1 and 2**63-1; {_COUNT_GRAMMAR}"
        )
    return count


def _shown(text: str) -> str:
    return repr(text if len(text) <= _LONGEST else text[:_LONGEST] + "…")
