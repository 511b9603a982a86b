"""Telling all hosts which volumes changed, by RADOS watch and notify.

A notice may be lost: whoever follows lists all volumes at intervals besides.
"""

import contextlib
import logging
import threading
from collections.abc import Callable
from typing import Any, Final

from volplugin.ceph.bindings import load
from volplugin.ceph.cluster import Cluster
from volplugin.errors import VolpluginError
from volplugin.logs import log

logger = logging.getLogger(__name__)

# The others have a notice at once; who died lately holds up its end, and so the next.
_PATIENCE: Final = 1000  # milliseconds
_SEPARATOR: Final = "\n"
_BATCH: Final = 200  # names in one notice

# Watches whose end failed. Their destructors would end them a second time, by a handle
# that librados has freed.
_unended: list[Any] = []


class Notices:
    """Sends notices of changes from a thread of its own, which ends when all are out.

    Changes that come while one is under way go together in the next.
    """

    def __init__(self, cluster: Cluster, pool: str, namespace: str, index: str) -> None:
        self._place = (cluster, pool, namespace, index)
        self._lock = threading.Lock()
        self._names: dict[str, None] = {}
        self._is_sending = False

    def send(self, name: str) -> None:
        """Tell all who watch that the volume ``name`` changed; return at once."""
        with self._lock:
            self._names[name] = None
            if self._is_sending:
                return
            self._is_sending = True
        threading.Thread(target=self._run, name="ceph-notices", daemon=True).start()

    def _run(self) -> None:
        while True:
            with self._lock:
                names = list(self._names)[:_BATCH]
                for name in names:
                    del self._names[name]
                if not names:
                    self._is_sending = False
                    return
            try:
                self._notify(_SEPARATOR.join(names))
            except Exception as error:  # noqa: BLE001 - a notice may be lost, not the thread
                event = "a notice could not be sent"
                log(logger, logging.DEBUG, event, error=str(error), volumes=len(names))

    def _notify(self, text: str) -> None:
        cluster, pool, namespace, index = self._place
        rados = load("rados")
        # A watcher that did not answer is no error of ours: its host may be dead.
        silent = contextlib.suppress(rados.TimedOut, rados.ObjectNotFound)
        with cluster.io(pool, namespace) as io, silent:
            io.notify(index, text, _PATIENCE)


class Watch:
    """Hears of changes until it is closed, or lost.

    It uses the connection that it was made by, and is lost with it.
    """

    def __init__(
        self,
        cluster: Cluster,
        pool: str,
        namespace: str,
        index: str,
        changed: Callable[[str | None], None],
    ) -> None:
        self._cluster = cluster
        self._changed = changed
        self._lost = False
        self._lock = threading.Lock()
        self._watch: Any = None
        rados = load("rados")
        with contextlib.ExitStack() as undo:
            io = undo.enter_context(cluster.io(pool, namespace))
            with rados.WriteOpCtx() as op:
                op.new(rados.LIBRADOS_CREATE_IDEMPOTENT)
                io.operate_write_op(op, index)
            self._watch = io.watch(index, self._on_notice, self._on_error)
            self._undo = undo.pop_all()

    def is_alive(self) -> bool:
        """Tell whether changes are still heard of. No I/O."""
        with self._lock:
            if self._lost or self._watch is None:
                return False
            try:
                self._watch.check()  # from librados' memory
            except load("rados").Error:
                self._lost = True
            return not self._lost

    def close(self) -> None:
        """End the watch. Idempotent; not to be called from within ``changed``."""
        with self._lock:
            watch, self._watch = self._watch, None
        if watch is None:
            return
        try:
            # With an eye on what failed: a new watch may need a new connection.
            with self._cluster.errors("end a watch"):
                watch.close()
        except VolpluginError:  # the cluster ends it when it hears no more of it
            _unended.append(watch)
        with contextlib.suppress(VolpluginError):
            self._undo.close()

    def _on_notice(
        self, notify_id: int, notifier: int, watch_id: int, data: bytes
    ) -> None:
        del notify_id, notifier, watch_id
        for name in data.decode("utf-8", "replace").split(_SEPARATOR):
            self._tell(name or None)

    def _on_error(self, *what: int) -> None:
        # (watch id, errno). Notices were missed, and may go on being so.
        self._lost = True
        log(logger, logging.INFO, "a watch was lost", errno=what[-1] if what else 0)
        self._tell(None)

    def _tell(self, name: str | None) -> None:
        try:
            self._changed(name)
        except Exception:
            logger.exception("a change could not be taken note of")
