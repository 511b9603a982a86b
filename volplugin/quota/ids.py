"""Which project ids volumes get: a range, and who has which of it.

What is given out is remembered by this process alone, for each file system, as several
backends may be on one. What volumes have is stored with them and told by `keep`; what
anyone else has is seen from the file system's own quotas.
"""

import contextlib
import os
import re
import threading
from typing import Final

import attrs

from volplugin.errors import InvalidArgument, NoSpace, from_os_error
from volplugin.host import quotactl
from volplugin.parsers import quote

_LARGEST: Final = 2**32 - 2  # 2**32-1 is the kernel's "no project"
_RANGE: Final = re.compile(r"([0-9]{1,10})-([0-9]{1,10})")


@attrs.frozen
class IdRange:
    """Project ids from ``first`` to ``last``, both included.

    The default leaves out what people and other programs use: xfs_quota(8) projects
    are numbered by hand, docker and podman count up from where they start.
    """

    first: int = 2**24 + 1
    last: int = 2**25

    def __contains__(self, number: int) -> bool:
        return self.first <= number <= self.last

    def __str__(self) -> str:
        return f"{self.first}-{self.last}"


def parse_range(text: str) -> IdRange:
    """Parse ``first-last``: from 1 to 2**32-2, the first not above the last."""
    match = _RANGE.fullmatch(text)
    if match is not None:
        found = IdRange(int(match[1]), int(match[2]))
        if 1 <= found.first <= found.last <= _LARGEST:
            return found
    raise InvalidArgument(
        f"{quote(text)} is no range of project ids; give the first and the last, from "
        f"1 to {_LARGEST}, such as {IdRange()}"
    )


@attrs.define
class _Given:
    """What this process knows of the ids of one file system; guarded by its lock.

    Each has its own: a disk that hangs holds up nobody on another one.
    """

    lock: threading.Lock = attrs.field(factory=threading.Lock)
    reserved: set[int] = attrs.field(factory=set)
    next: dict[IdRange, int] = attrs.field(factory=dict)


_lock = threading.Lock()
_given: dict[int, _Given] = {}  # by device number; guarded by the lock


def reserve(directory: str, ids: IdRange) -> int:
    """Return an id of ``ids`` that nobody has on the file system of ``directory``.

    That is one not reserved by this process, without usage and without limit; the
    lowest such after the one given out last, so that an id rests before it is used
    again. Blocks for a system call for each id in use that is met. Raise `NoSpace` when
    there is none, and the errors of `quotactl.get`.
    """
    given = _of(directory)
    with given.lock:
        start = given.next.get(ids, ids.first)
        for first, last in ((start, ids.last), (ids.first, start - 1)):
            number = _free(directory, first, last, given.reserved)
            if number is not None:
                given.reserved.add(number)
                given.next[ids] = number + 1
                return number
    raise NoSpace(
        f"all project ids of {ids} are in use on the file system of {directory}; give "
        f"the backend a wider range in 'project-ids'"
    )


def keep(directory: str, number: int) -> None:
    """Note that an id belongs to a volume in ``directory``; idempotent."""
    given = _of(directory)
    with given.lock:
        given.reserved.add(number)


def release(directory: str, number: int) -> None:
    """Give an id back; idempotent.

    It is not given out again while anything on the file system carries it.
    """
    given = _of(directory)
    with given.lock:
        given.reserved.discard(number)


def _of(directory: str) -> _Given:
    try:
        device = os.stat(directory).st_dev
    except OSError as error:
        raise from_os_error(error, f"look at {directory}") from error
    with _lock:
        return _given.setdefault(device, _Given())


def _free(directory: str, first: int, last: int, reserved: set[int]) -> int | None:
    number = first
    with contextlib.closing(quotactl.each(directory, first)) as quotas:
        for quota in quotas:
            number = _skip(number, quota.id, reserved)
            if number < quota.id or number > last:
                break
            if not quota.is_empty:
                number = quota.id + 1
            elif quota.id not in reserved:
                break
        else:
            number = _skip(number, last + 1, reserved)
    return number if number <= last else None


def _skip(number: int, end: int, reserved: set[int]) -> int:
    while number < end and number in reserved:
        number += 1
    return number
