"""What goes wrong with a cluster, in our errors.

The bindings raise exceptions of their own, which are no `OSError`, with an errno that
is the cluster's. librados gives a text with its own words, so ours say what it means.
"""

import errno
import math
from typing import Final

import attrs

from volplugin.errors import (
    AlreadyExists,
    Internal,
    InUse,
    InvalidArgument,
    NoSpace,
    NotFound,
    Unavailable,
    Unsupported,
    VolpluginError,
)

BLOCKLISTED: Final = errno.ESHUTDOWN  # EBLOCKLISTED of Ceph

_MODULES: Final = frozenset({"rados", "rbd", "cephfs"})
_KINDS: Final[dict[int, type[VolpluginError]]] = {
    errno.ENOSPC: NoSpace,
    errno.EDQUOT: NoSpace,
    errno.EBUSY: InUse,
    errno.EEXIST: AlreadyExists,
    errno.ENOENT: NotFound,
    errno.EINVAL: InvalidArgument,
    errno.EOPNOTSUPP: Unsupported,
    errno.ENOSYS: Unsupported,
    errno.EIO: Unavailable,
    errno.EROFS: Unavailable,
    errno.ESTALE: Unavailable,
    errno.EINTR: Unavailable,
}


def _whole(seconds: float) -> float:
    return float(max(1, math.ceil(seconds)))  # 0 would be without limit


@attrs.frozen(kw_only=True)
class Access:
    """How a cluster is reached; no secrets, only where they are.

    ``user`` is without ``client.``. ``keyring`` None is where the configuration file
    says. ``timeout`` is in seconds for one operation, rounded up to whole ones, as
    Ceph's settings have no fractions.
    """

    conf: str = "/etc/ceph/ceph.conf"
    user: str = "admin"
    keyring: str | None = None
    timeout: float = attrs.field(default=15.0, converter=_whole)


def number_of(error: BaseException) -> int | None:
    """Return the errno of an exception of the bindings; None for any other."""
    if type(error).__module__ not in _MODULES:
        return None
    number = getattr(error, "errno", None)
    return abs(number) if isinstance(number, int) else 0


def translate(error: BaseException, access: Access, doing: str) -> VolpluginError:
    """Turn an exception of the bindings into ours; chain it by ``raise … from error``.

    ``doing`` names the attempt and what it was about; it may be empty.
    """
    number = number_of(error) or 0
    where = f"the cluster of {access.conf}"
    known = {
        errno.ETIMEDOUT: f"{where} did not answer within {access.timeout:g} s",
        errno.EACCES: f"{where} refused client.{access.user}: see its key and caps"
        f" (ceph auth get client.{access.user})",
        errno.ENOTCONN: f"the connection to {where} is lost; ask again",
        BLOCKLISTED: f"{where} has fenced this host's connection off (blocklisted);"
        " ask again for a new one",
        errno.ENOSPC: f"{where} or its pool is full",
        errno.EDQUOT: f"a quota of {where} is reached",
    }
    known[errno.EPERM] = known[errno.EACCES]
    prefix = f"{doing}: " if doing else ""
    if number in known:
        kind = _KINDS.get(number, Unavailable)
        return kind(f"{prefix}{known[number]}")
    return _KINDS.get(number, Internal)(f"{prefix}{where}: {error}")


def connecting(error: BaseException, access: Access) -> VolpluginError:
    """Turn an exception of a connect into ours: what is to be set right, and where."""
    user, number = f"client.{access.user}", number_of(error) or 0
    keyring = access.keyring or f"the keyring that {access.conf} names"
    texts = {
        errno.ENOENT: f"no key of {user}, or no monitor, is known: set mon_host in"
        f" {access.conf}, and keyring to a file with the key",
        errno.EACCES: f"the cluster of {access.conf} does not know {user} by the key in"
        f" {keyring}: compare with ceph auth get {user}",
        errno.EIO: f"{keyring} is no keyring: write it by ceph auth get {user} -o FILE",
        errno.EINVAL: f"{access.conf} or {keyring} can't be read as what it should be:"
        f" {error}",
        errno.ETIMEDOUT: f"no monitor of {access.conf} answered within"
        f" {access.timeout:g} s: is mon_host right, and do they run?",
    }
    texts[errno.EPERM] = texts[errno.EACCES]
    return Unavailable(texts.get(number, f"connect to {access.conf}: {error}"))
