"""The closed set of errors that volplugin answers with.

Drivers, core and manager raise only these. Each has a code that maps one to one onto
gRPC's; `OSError` is turned into them in ``host/`` by `from_os_error`, chained. A
message says what was wrong, with the value, and what to do next. The server puts the
operation and the volume in front: ``remove db: in use by 2 mounts``.
"""

import errno
from enum import Enum
from typing import ClassVar


class Code(Enum):
    """A kind of failure; the values are gRPC's status codes."""

    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    NO_SPACE = 8  # RESOURCE_EXHAUSTED
    IN_USE = 9  # FAILED_PRECONDITION
    UNSUPPORTED = 12  # UNIMPLEMENTED
    INTERNAL = 13
    UNAVAILABLE = 14


class VolpluginError(Exception):
    """A failure that a user is told about; its text is the message alone."""

    code: ClassVar[Code] = Code.INTERNAL


class InvalidArgument(VolpluginError):
    """A name, option, body or configuration that can never be right."""

    code = Code.INVALID_ARGUMENT


class NotFound(VolpluginError):
    """There is no such volume."""

    code = Code.NOT_FOUND


class AlreadyExists(VolpluginError):
    """The name or the directory is taken, with other options or by someone else."""

    code = Code.ALREADY_EXISTS


class InUse(VolpluginError):
    """The volume is mounted, or something below it is."""

    code = Code.IN_USE


class Unsupported(VolpluginError):
    """The driver, kernel or file system cannot do this."""

    code = Code.UNSUPPORTED


class NoSpace(VolpluginError):
    """A disk, a quota or a table is full; nothing was changed."""

    code = Code.NO_SPACE


class Unavailable(VolpluginError):
    """A backend, a directory or the store cannot be reached now."""

    code = Code.UNAVAILABLE


class DeadlineExceeded(VolpluginError):
    """The work goes on; the caller's time is up. Asking again joins it."""

    code = Code.DEADLINE_EXCEEDED


class Internal(VolpluginError):
    """A state held to be impossible, or a kernel error without a name."""

    code = Code.INTERNAL


class StoreCorrupt(Exception):
    """The store cannot be trusted: the process ends with 78 and names the way out."""


_BY_ERRNO: dict[int, type[VolpluginError]] = {
    errno.ENOSPC: NoSpace,
    errno.EDQUOT: NoSpace,
    errno.EMFILE: NoSpace,
    errno.ENFILE: NoSpace,
    errno.ENOMEM: NoSpace,
    errno.EBUSY: InUse,
    errno.EEXIST: AlreadyExists,
    errno.ENOTEMPTY: InUse,
    errno.ENOENT: NotFound,
    errno.EOPNOTSUPP: Unsupported,
    errno.ENOSYS: Unsupported,
    errno.EIO: Unavailable,
    errno.ENOTCONN: Unavailable,
    errno.ESTALE: Unavailable,
    errno.EROFS: Unavailable,
    errno.ETIMEDOUT: Unavailable,
}


def from_os_error(error: OSError, doing: str) -> VolpluginError:
    """Turn a system error into ours; chain it by ``raise … from error``.

    ``doing`` names the attempt with its path: ``mount tmpfs on /mnt/tmpfs/v``.
    """
    kind = _BY_ERRNO.get(error.errno or 0, Internal)
    return kind(f"{doing}: {error.strerror or error}")
