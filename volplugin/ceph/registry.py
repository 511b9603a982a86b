"""The shared volumes of a backend, in its pool and namespace of the cluster.

A *record object*, ``volplugin.volume.NAME``, is the one truth about a volume. It is
created exclusively and changed only by compare and swap, by the version that it was
read at. The *index*, ``volplugin.index``, is an omap of names and ids, and only for
listing. It is written after the record object, in making and in removing; what a host
that died in between left is set right by listing. After each change a *notice* goes to
all who watch the index.

After a time-out nobody knows whether a write took effect. It is looked at again by the
same client: the OSD takes a client's requests for one object in turn, so that an answer
to the later one tells how the earlier one ended.
"""

import contextlib
import errno
import logging
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import attrs

from volplugin.ceph import records
from volplugin.ceph.bindings import load
from volplugin.ceph.cluster import Cluster
from volplugin.ceph.notices import Notices, Watch
from volplugin.ceph.records import Holder, Shared
from volplugin.errors import AlreadyExists, NotFound, Unavailable, VolpluginError
from volplugin.failpoints import hit
from volplugin.logs import log

__all__ = ["Holder", "Registry", "Shared", "Watch"]

logger = logging.getLogger(__name__)

PREFIX: Final = "volplugin.volume."
INDEX: Final = "volplugin.index"

_PAGE: Final = 1024  # omap keys a call; the OSD gives no more, and may give fewer
_BATCH: Final = 128  # records read at the same time
_ATTEMPTS: Final = 40  # of a compare and swap that others win
_LONGEST_PAUSE: Final = 0.2  # seconds between two of them
_RACED: Final = frozenset({errno.ERANGE, errno.EOVERFLOW})  # another version by now


class Registry:
    """The records of the shared volumes in one namespace. Built without effect."""

    def __init__(self, cluster: Cluster, pool: str, namespace: str) -> None:
        self.cluster = cluster
        self._pool = pool
        self._namespace = namespace
        self._notices = Notices(cluster, pool, namespace, INDEX)

    def create(self, shared: Shared) -> None:
        """Write the record of a new volume. Idempotent for one id.

        Raise `AlreadyExists` where there is one of that name with another id.
        """
        rados = load("rados")
        name, data = shared.volume.name, records.encode(shared)
        with self._io() as io:
            for _ in self._attempts(name):
                try:
                    with rados.WriteOpCtx() as op:
                        op.new(rados.LIBRADOS_CREATE_EXCLUSIVE)
                        op.write_full(data)
                        io.operate_write_op(op, PREFIX + name)
                    break
                except (rados.ObjectExists, rados.TimedOut) as error:
                    found = _read(io, name)
                    if found is None and isinstance(error, rados.TimedOut):
                        raise
                if found is not None and found.volume.id != shared.volume.id:
                    raise _taken(found)
                if found is not None:
                    break
            hit("registry.create")
            _write_key(io, name, shared.volume.id)
        self._notices.send(name)

    def read(self, name: str) -> Shared | None:
        """Return the record of the volume ``name``; None where there is none.

        Raise `Unsupported` for one of a newer volplugin, `Unavailable` for a damaged
        one.
        """
        with self._io() as io:
            return _read(io, name)

    def change(
        self, name: str, volume_id: str, change: Callable[[Shared], Shared]
    ) -> Shared:
        """Put what ``change`` makes of the record in its place; return that.

        ``change`` is called again where another host was quicker, or the outcome was
        not known, so it must find nothing left to do when it has taken effect. It may
        raise to refuse; the same value back writes nothing. Raise `NotFound` for a
        missing record, and `AlreadyExists` for one with another id.
        """
        rados = load("rados")
        with self._io() as io:
            for attempt in self._attempts(name):
                before = self._require(io, name, volume_id)
                after = change(before)
                if after == before:
                    # It may be that a write which timed out made it so.
                    if attempt:
                        self._notices.send(name)
                    return before
                hit("registry.change")
                with rados.WriteOpCtx() as op:
                    op.assert_version(before.version)
                    op.write_full(records.encode(after))
                    if _swap(io, op, name):
                        after = attrs.evolve(after, version=io.get_last_version())
                        break
        self._notices.send(name)
        return after

    def remove(self, name: str, volume_id: str) -> None:
        """Remove the record. Idempotent; one with another id stays."""
        rados = load("rados")
        with self._io() as io:
            for _ in self._attempts(name):
                found = _read(io, name)
                if found is None or found.volume.id != volume_id:
                    break
                with rados.WriteOpCtx() as op:
                    op.assert_version(found.version)
                    op.remove()
                    if _swap(io, op, name):
                        break
            hit("registry.remove")
            _replace_key(io, name, volume_id, None)
        self._notices.send(name)

    def names(self) -> dict[str, str]:
        """Return the names that the index has, with the volumes' ids."""
        with self._io() as io:
            return dict(_keys(io))

    def all(self) -> Iterator[Shared]:
        """Yield all volumes' records; those that can't be read are logged and left out.

        They have no ``version``: `change` reads anew what it changes.
        An index that a host left behind when it died is set right by the way.
        """
        names = list(self.names().items())
        for start in range(0, len(names), _BATCH):
            # No request is under way while the caller works on what is yielded.
            with self._io() as io:
                batch = dict(names[start : start + _BATCH])
                read = _read_batch(io, list(batch))
                found = [_listed(io, name, batch[name], read[name]) for name in batch]
            yield from (shared for shared in found if shared is not None)

    def watch(self, changed: Callable[[str | None], None]) -> Watch:
        """Call ``changed`` with the name of each volume that changes from now on.

        None means that some were missed: list them. It is called in a thread of
        librados, and must neither block nor ask the cluster. Our own changes are among
        them. A `Watch` that is no longer alive is to be closed and made anew.
        """
        place = (self.cluster, self._pool, self._namespace)
        return Watch(*place, INDEX, changed)

    @contextlib.contextmanager
    def _io(self) -> Iterator[Any]:
        with self.cluster.io(self._pool, self._namespace) as io:
            # Writes to a full pool would wait for space instead of failing.
            io.set_osdmap_full_try()
            yield io

    def _attempts(self, name: str) -> Iterator[int]:
        end = time.monotonic() + 2 * self.cluster.access.timeout
        for attempt in range(_ATTEMPTS):
            if attempt:
                # All who lost to one winner would otherwise meet again.
                pause = min(0.002 * 2**attempt, _LONGEST_PAUSE)
                time.sleep(random.uniform(0, pause))  # noqa: S311 - no secret
            yield attempt
            if time.monotonic() > end:
                break
        raise Unavailable(
            f"the record of {name} could not be written: other hosts change it all the"
            " time, or the cluster is too slow; ask again"
        )

    def _require(self, io: Any, name: str, volume_id: str) -> Shared:
        found = _read(io, name)
        if found is None:
            raise NotFound(f"the cluster has no record of volume {name} (any more)")
        if found.volume.id != volume_id:
            raise _taken(found)
        return found


def _read(io: Any, name: str) -> Shared | None:
    try:
        data = io.read(PREFIX + name, 2 * records.SIZE_LIMIT)
    except load("rados").ObjectNotFound:
        return None
    return records.decode(name, data, io.get_last_version())


def _swap(io: Any, op: Any, name: str) -> bool:
    """Write ``op`` to a record; return False where it is to be looked at again."""
    rados = load("rados")
    try:
        io.operate_write_op(op, PREFIX + name)
    except (rados.TimedOut, rados.ObjectNotFound):
        return False
    except rados.OSError as error:
        if error.errno not in _RACED:
            raise
        return False
    return True


def _read_batch(io: Any, names: Sequence[str]) -> dict[str, bytes | None]:
    """Read records at the same time, as they are stored; None for a missing one."""
    read: dict[str, bytes | None] = {}

    def keep(name: str) -> Callable[[Any, bytes | None], None]:
        return lambda _, data: read.__setitem__(name, data)

    length = 2 * records.SIZE_LIMIT
    asked = [io.aio_read(PREFIX + name, length, 0, keep(name)) for name in names]
    for each in asked:
        each.wait_for_complete_and_cb()
    for each in asked:
        status = each.get_return_value()
        if status < 0 and status != -errno.ENOENT:
            raise load("rados").OSError("read the records", errno=-status)
    return read


def _listed(io: Any, name: str, volume_id: str, data: bytes | None) -> Shared | None:
    """Decode a record that the index names, and mend the index for it."""
    try:
        found = None if data is None else records.decode(name, data, 0)
    except VolpluginError as error:
        event = "a record in the cluster can't be read"
        log(logger, logging.WARNING, event, volume=name, error=str(error))
        return None
    if found is None or found.volume.id != volume_id:
        by = None if found is None else found.volume.id
        with contextlib.suppress(load("rados").Error):  # the next listing tries again
            _replace_key(io, name, volume_id, by)
    return found


def _keys(io: Any) -> Iterator[tuple[str, str]]:
    rados = load("rados")
    after = ""
    while True:
        with rados.ReadOpCtx() as op:
            found, _ = io.get_omap_vals(op, after, "", _PAGE)
            try:
                io.operate_read_op(op, INDEX)
            except rados.ObjectNotFound:
                return
            page = [(name, value.decode("utf-8", "replace")) for name, value in found]
        if not page:
            return
        yield from page
        after = page[-1][0]


def _write_key(io: Any, name: str, volume_id: str) -> None:
    with load("rados").WriteOpCtx() as op:
        io.set_omap(op, (name,), (volume_id.encode(),))
        io.operate_write_op(op, INDEX)


def _replace_key(io: Any, name: str, volume_id: str, by: str | None) -> None:
    """Put ``by`` in place of ``volume_id``, or nothing; what else is there stays."""
    rados = load("rados")
    try:
        with rados.WriteOpCtx() as op:
            op.omap_cmp(name, volume_id)
            if by is None:
                io.remove_omap_keys(op, (name,))
            else:
                io.set_omap(op, (name,), (by.encode(),))
            io.operate_write_op(op, INDEX)
    except rados.ObjectNotFound:
        return
    except rados.OSError as error:
        if error.errno != errno.ECANCELED:  # a newer volume's key, or none
            raise


def _taken(found: Shared) -> AlreadyExists:
    volume, maker = found.volume, found.maker
    by = f" by {maker}" if maker else ""
    return AlreadyExists(
        f"the cluster has another volume of the name {volume.name}, made{by} at"
        f" {volume.created_at}"
    )
