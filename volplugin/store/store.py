"""The store: an in-memory mirror for reads, one thread that writes behind changes."""

import asyncio
import contextlib
import queue
import threading
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Final

import attrs

from volplugin.errors import StoreCorrupt, Unavailable, VolpluginError
from volplugin.model import Mounts, Volume
from volplugin.store import records
from volplugin.store.database import REMEDY, Database, Write

_GROUP: Final = 256  # changes that share one sync at the most


@attrs.frozen
class PutVolume:
    """Write a volume's record, new or changed."""

    volume: Volume


@attrs.frozen
class DropVolume:
    """Forget a volume and its mounts."""

    name: str


@attrs.frozen
class PutMounts:
    """Write who holds a volume."""

    name: str
    mounts: Mounts


Change = PutVolume | DropVolume | PutMounts


@attrs.frozen(eq=False)
class _Request:
    changes: tuple[Change, ...]
    sync: bool
    done: "asyncio.Future[None]"


class Store:
    """All volumes and mounts of this host.

    Reads come from `volumes` and `mounts`, which show committed changes only and may
    be read at any time on the event loop. `commit` is the one way to change them.
    """

    def __init__(self, path: str) -> None:
        """Open the database in ``path`` and load it; blocks.

        Raise `StoreCorrupt` for a store that cannot be trusted in every record.
        """
        self._database = Database(path)
        self._volumes: dict[str, Volume] = {}
        self._mounts: dict[str, Mounts] = {}
        self._load()
        self.volumes: Mapping[str, Volume] = MappingProxyType(self._volumes)
        self.mounts: Mapping[str, Mounts] = MappingProxyType(self._mounts)
        self.generation = 0
        """Grows with every change of `volumes`: what caches are held against."""
        self._unsure: set[bytes] = set()
        self._queue: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="store", daemon=True)
        self._thread.start()

    def _load(self) -> None:
        for key, value in self._database.load().items():
            try:
                if key.startswith(records.VOLUME_PREFIX):
                    volume = records.decode(value, Volume)
                    self._volumes[volume.name] = volume
                elif key.startswith(records.MOUNTS_PREFIX):
                    name = key.removeprefix(records.MOUNTS_PREFIX).decode()
                    self._mounts[name] = records.decode(value, Mounts)
                else:
                    raise ValueError("unknown kind of record")  # noqa: TRY301  as bad
            except ValueError as error:
                self._database.close()
                raise StoreCorrupt(
                    f"the store {self._database.path} is corrupt: record {key!r}: "
                    f"{error}. {REMEDY}"
                ) from error

    async def commit(self, *changes: Change, sync: bool = True) -> None:
        """Make ``changes`` in one atomic batch; return once they hold.

        With ``sync`` they survive a power cut, without it only the death of the
        process: right for mounts, which a new boot makes void anyway. Changes that
        are asked for at once share one sync. On error nothing has changed. A caller
        that is cancelled leaves the write under way, and `volumes` and `mounts`
        follow it.
        """
        if not self._thread.is_alive():
            raise Unavailable("the store is closed: the server is ending")
        done = asyncio.get_running_loop().create_future()
        self._queue.put(_Request(changes, sync, done))
        await done

    def _run(self) -> None:
        ended = False
        while not ended:
            group = [self._queue.get()]
            while len(group) < _GROUP and not self._queue.empty():
                group.append(self._queue.get())
            ended = None in group
            requests = [request for request in group if request is not None]
            if requests:
                self._write(requests)

    def _write(self, requests: list[_Request]) -> None:
        changes = [change for request in requests for change in request.changes]
        writes = list(_writes(changes))
        # A write that failed may be on disk all the same: what holds goes first.
        restored = [(key, self._current(key)) for key in self._unsure]
        error: BaseException | None = None
        try:
            self._database.write(
                restored + writes, sync=any(request.sync for request in requests)
            )
            self._unsure.clear()
        except Exception as caught:  # noqa: BLE001  each caller gets it as its own
            error = caught
            self._unsure.update(key for key, _ in writes)
            self._put_back()
        loop = requests[0].done.get_loop()
        loop.call_soon_threadsafe(self._settle, requests, error)

    def _put_back(self) -> None:
        """Write again what holds, so that a start does not find what failed.

        If that fails too, the next write begins with it.
        """
        with contextlib.suppress(VolpluginError):
            restored = [(key, self._current(key)) for key in self._unsure]
            self._database.write(restored, sync=True)
            self._unsure.clear()

    def _settle(self, requests: list[_Request], error: BaseException | None) -> None:
        for request in requests:
            if error is None:
                for change in request.changes:
                    self._apply(change)
            if not request.done.done():
                if error is None:
                    request.done.set_result(None)
                else:
                    request.done.set_exception(error)

    def _apply(self, change: Change) -> None:
        match change:
            case PutVolume(volume):
                self._volumes[volume.name] = volume
                self.generation += 1
            case DropVolume(name):
                self._volumes.pop(name, None)
                self._mounts.pop(name, None)
                self.generation += 1
            case PutMounts(name, mounts):
                self._mounts[name] = mounts

    def _current(self, key: bytes) -> bytes | None:
        """Return what the mirror holds for ``key``.

        The mirror cannot lag here: whoever changes a volume holds its lock until the
        change before is settled.
        """
        prefix, _, name = key.decode().partition("/")
        table: Mapping[str, Volume | Mounts] = (
            self._volumes if prefix == "volume" else self._mounts
        )
        record = table.get(name)
        return None if record is None else records.encode(record)

    def close(self) -> None:
        """Finish the writes under way and close the database; blocks."""
        self._queue.put(None)
        self._thread.join()
        self._database.close()


def _writes(changes: Iterable[Change]) -> Iterable[Write]:
    for change in changes:
        match change:
            case PutVolume(volume):
                yield records.volume_key(volume.name), records.encode(volume)
            case DropVolume(name):
                yield records.volume_key(name), None
                yield records.mounts_key(name), None
            case PutMounts(name, mounts):
                yield records.mounts_key(name), records.encode(mounts)
