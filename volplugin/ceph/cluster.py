"""The connection to a Ceph cluster: one for a backend, made at first use.

It is shared by all threads. A cluster that does not answer costs each operation its
time-out at most, and those that come right after a failed connect nothing. After a
time-out nobody knows whether an operation took effect: who asked has to look again.
"""

import contextlib
import datetime as dt
import json
import os
import threading
import time
from collections.abc import Iterator
from typing import Any, Final

from volplugin.ceph.bindings import load
from volplugin.ceph.failures import (
    BLOCKLISTED,
    Access,
    connecting,
    number_of,
    translate,
)
from volplugin.errors import InvalidArgument, Unavailable, VolpluginError

__all__ = ["BLOCKLIST_SECONDS", "Access", "Cluster", "plain_address"]

# A host that was suspended for so long finds nothing left of what it had under way.
BLOCKLIST_SECONDS: Final = 30 * 24 * 3600
_QUIET: Final = 3.0  # seconds after a failed connect without a new attempt


def plain_address(address: str) -> str:
    """Return a client's address as watchers are shown: ``10.0.0.1:0/123``.

    Other places put the messenger's version before it, and brackets around several.
    """
    first = address.strip().split(",")[0]
    if first.startswith(("[v", "[any")):
        first = first[1:].rstrip("]")
    kind, _, rest = first.partition(":")
    return rest if kind in {"v1", "v2", "any"} else first


class _Connection:
    """A connected client, and by how many it is in use just now."""

    def __init__(self, rados: Any) -> None:
        self.rados = rados
        self.users = 0
        self.is_lent = False  # given out without a sign of when it is done with
        self.address: frozenset[str] = frozenset()


class Cluster:
    """A cluster, reached by one long-lived client. Built without effect."""

    def __init__(self, access: Access) -> None:
        self.access = access
        self._lock = threading.Lock()  # the fields below, never held during I/O
        self._idle = threading.Condition(self._lock)
        self._connecting = threading.Lock()
        self._connection: _Connection | None = None
        self._retired: list[_Connection] = []
        self._failed: tuple[float, VolpluginError] | None = None
        self._trouble = "not connected yet"
        self._since = ""
        self._closed = False

    @contextlib.contextmanager
    def io(self, pool: str, namespace: str = "") -> Iterator[Any]:
        """Yield a ``rados.Ioctx`` for one operation, or several in a row.

        Errors of the bindings that leave the block are turned into ours. Raise
        `InvalidArgument` for a pool that is not there.
        """
        with self.errors(f"pool {pool}"), self._used() as connection:
            self._require_pool(connection.rados, pool)
            ioctx = connection.rados.open_ioctx(pool)
            try:
                ioctx.set_namespace(namespace)
                yield ioctx
            finally:
                ioctx.close()

    @contextlib.contextmanager
    def errors(self, doing: str = "") -> Iterator[None]:
        """Turn errors of the bindings into ours, and remember them for `health`.

        A block that ends well shows the cluster well. ``doing`` comes first in the
        message. After this host's client was blocklisted, the next use connects anew.
        """
        try:
            yield
        except Exception as error:
            number = number_of(error)
            if number is None:
                raise
            told = translate(error, self.access, doing)
            if number == BLOCKLISTED:
                self._retire()
            if isinstance(told, Unavailable):
                self._note(str(told))
            raise told from error
        else:
            self._note("")

    def rados(self) -> Any:
        """Return the connected ``rados.Rados``; it is good until `close`.

        Raise `Unavailable` where the cluster can't be reached.
        """
        with self._used() as connection:
            connection.is_lent = True
            return connection.rados

    def addresses(self) -> frozenset[str]:
        """Return our own client's addresses, as an object's watchers are shown."""
        with self.errors(), self._used() as connection:
            return connection.address

    def blocklist(self, address: str, seconds: int = BLOCKLIST_SECONDS) -> None:
        """Take from the client at ``address`` all access to the cluster's OSDs.

        Its writes under way fail, or are done when this returns. Idempotent: the time
        begins anew. A client that connects from now on is told of it by the monitors.
        Raise `InvalidArgument` for our own address. Needs ``mon 'profile rbd'``.
        """
        plain = plain_address(address)
        with self.errors(f"blocklist {plain}"), self._used() as connection:
            if plain in connection.address:
                raise InvalidArgument(f"{plain} is this plugin's own connection")
            connection.rados.blocklist_add(plain, seconds)
            # Our own requests reach no OSD that does not know of it by now.
            connection.rados.wait_for_latest_osdmap()

    @property
    def health(self) -> str:
        """``ok``, or why the last operation failed and since when; from memory."""
        with self._lock:
            since = f"unreachable since {self._since}: " if self._since else ""
            return f"{since}{self._trouble}" if self._trouble else "ok"

    def close(self) -> None:
        """End the connection, once nobody is in the middle of an operation.

        What is still in use after the time-out is left to the end of the process.
        """
        self._retire()
        with self._idle:
            self._closed = True
            end = time.monotonic() + self.access.timeout
            while any(each.users for each in self._retired):
                left = end - time.monotonic()
                if left <= 0 or not self._idle.wait(left):
                    break
            ended = [each for each in self._retired if not each.users]
            self._retired = [each for each in self._retired if each.users]
        for each in ended:
            each.rados.shutdown()

    @contextlib.contextmanager
    def _used(self) -> Iterator[_Connection]:
        connection = self._enter()
        try:
            yield connection
        finally:
            with self._idle:
                connection.users -= 1
                self._idle.notify_all()
                ended = (
                    connection in self._retired
                    and not connection.users
                    and not connection.is_lent
                    and not self._closed
                )
                if ended:
                    self._retired.remove(connection)
            if ended:
                connection.rados.shutdown()

    def _enter(self) -> _Connection:
        if (connection := self._current()) is not None:
            return connection
        # Others that come meanwhile wait for this attempt, and share how it ends.
        with self._connecting:
            if (connection := self._current()) is not None:
                return connection
            with self._lock:
                if self._failed is not None:
                    moment, earlier = self._failed
                    if time.monotonic() - moment < _QUIET:
                        raise type(earlier)(str(earlier)) from earlier
            try:
                made = _connect(self.access)
            except VolpluginError as error:
                with self._lock:
                    self._failed = (time.monotonic(), error)
                self._note(str(error))
                raise
            with self._lock:
                self._failed = None
                self._connection = made
                made.users += 1
            return made

    def _current(self) -> _Connection | None:
        with self._lock:
            if self._closed:
                raise Unavailable(f"the cluster of {self.access.conf} was let go of")
            if self._connection is not None:
                self._connection.users += 1
            return self._connection

    def _retire(self) -> None:
        """Use the present connection no more; its last user ends it."""
        with self._lock:
            if self._connection is not None:
                self._retired.append(self._connection)
                self._connection = None

    def _note(self, trouble: str) -> None:
        with self._lock:
            if trouble and not self._since:
                now = dt.datetime.now(dt.UTC)
                self._since = now.isoformat(timespec="seconds")
            elif not trouble:
                self._since = ""
            self._trouble = trouble

    def _require_pool(self, rados: Any, pool: str) -> None:
        if pool in rados.list_pools():  # from memory
            return
        # librados would ask a monitor for newer maps, and wait for it without limit.
        command = json.dumps({"prefix": "osd pool ls", "format": "json"})
        status, found, said = rados.mon_command(command, b"")
        if status:
            failure = load("rados").OSError(said or "osd pool ls", errno=abs(status))
            raise failure
        pools = json.loads(found)
        if pool not in pools:
            raise InvalidArgument(
                f"the cluster of {self.access.conf} has no pool {pool!r}, but"
                f" {', '.join(sorted(pools)) or 'none at all'}: name one that is"
                f" there, or make it by ceph osd pool create {pool}"
            )


def _connect(access: Access) -> _Connection:
    for path in (access.conf, access.keyring):
        if path is not None and not os.path.exists(path):
            raise Unavailable(
                f"{path}: no such file: copy it from a host of the cluster, or set conf"
                " and keyring"
            )
    # In seconds; without them librados waits for ever (connect's own timeout is none).
    limit = str(int(access.timeout))
    settings = {
        "client_mount_timeout": limit,
        "rados_mon_op_timeout": limit,
        "rados_osd_op_timeout": limit,
        # Clones need no protected snapshots then, also where the cluster still lets
        # clients from before Mimic (2018) in; those can't open such clones.
        "rbd_default_clone_format": "2",
        # Our log has lines of its own form.
        "log_to_stderr": "false",
        "err_to_stderr": "false",
    }
    if access.keyring is not None:
        settings["keyring"] = access.keyring
    rados = None
    binding = load("rados")
    try:
        rados = binding.Rados(
            conffile=access.conf, name=f"client.{access.user}", conf=settings
        )
        rados.connect()
        made = _Connection(rados)
        made.address = frozenset({plain_address(rados.get_addrs())})
    except binding.Error as error:
        if rados is not None:
            rados.shutdown()  # it has threads by now
        raise connecting(error, access) from error
    return made
