"""Moments as texts: RFC 3339, in UTC, with the zone."""

import datetime as dt


def rfc3339(moment: dt.datetime, timespec: str = "milliseconds") -> str:
    """Return ``moment``, which is in UTC, as text; ``timespec`` as of `isoformat`.

    dockerd takes a `CreatedAt` of any other form for "no such volume" and purges it.
    """
    return moment.isoformat(timespec=timespec).replace("+00:00", "Z")


def now(timespec: str = "milliseconds") -> str:
    """Return the time as `rfc3339` does."""
    return rfc3339(dt.datetime.now(dt.UTC), timespec)
