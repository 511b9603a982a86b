"""One long-lived session with a file system of CephFS, safe for threads.

libcephfs has no time limit of its own: a call waits for as long as the metadata server
is away. So each call runs in a thread of its own and is waited for so long. While one
of them is overdue all others are refused at once, so nothing that takes effect late
can cross what came after it.
"""

import errno
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any, Final, Generic, TypeAlias, TypeVar

from volplugin.ceph.bindings import load
from volplugin.ceph.cluster import Access, plain_address
from volplugin.ceph.fsnotes import Note, Notes
from volplugin.errors import Unavailable, VolpluginError
from volplugin.logs import log

T = TypeVar("T")

At: TypeAlias = Callable[[str], bytes]
"""Turns a path of the file system into what libcephfs takes."""

logger = logging.getLogger(__name__)

_PAUSE: Final = 3.0  # seconds during which a failed mount is not tried again
# What libcephfs answers once the cluster has ended our session.
_ENDED: Final = frozenset({errno.ESHUTDOWN, errno.ENOTCONN, errno.ESTALE})
_FORBIDDEN: Final = frozenset({errno.EPERM, errno.EACCES})


class _Call(Generic[T]):
    """A call under way: its thread, and what came of it."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.result: list[T] = []
        self.error: BaseException | None = None


class Session:
    """The session of one backend; begun at the first call and kept."""

    def __init__(
        self, access: Access, filesystem: str | None, directory: str, notes: Notes
    ) -> None:
        """Keep what is needed to mount ``filesystem``, None being the default one.

        ``directory`` is what a user whose rights end there mounts instead of ``/``.
        """
        self._notes = notes
        self._access = access
        self._filesystem = filesystem
        self._directory = directory
        self._lock = threading.Lock()
        self._overdue: set[_Call[Any]] = set()  # guarded by the lock
        self._since = 0.0
        self._mounting = threading.Lock()
        self._mounted: Any = None  # guarded by `_mounting`, with the next four
        self._note: Note | None = None
        self._base = "/"
        self._failed: tuple[float, VolpluginError] | None = None
        self._trouble = ""

    @property
    def health(self) -> str:
        """Say ``ok``, or what is wrong. No I/O."""
        with self._lock:
            if self._overdue:
                seconds = time.monotonic() - self._since
                return f"the file system has not answered for {seconds:.0f} s"
        return self._trouble or "ok"

    def run(self, doing: str, call: Callable[[Any, At], T]) -> T:
        """Return what ``call(libcephfs, at)`` does, which is given a limited time.

        Raise `OSError` as the file system has it, `Unavailable` where it does not
        answer in time: what was asked for may still take effect.
        """
        under_way: _Call[T] = _Call()
        with self._lock:
            if self._overdue:
                waited = time.monotonic() - self._since
                raise Unavailable(
                    f"{doing}: the file system has not answered for {waited:.0f} s:"
                    f" look at `ceph fs status`"
                )
        # A daemon: one that hangs must not hold up the end of the process.
        threading.Thread(
            target=self._work, args=(under_way, call), name="cephfs", daemon=True
        ).start()
        if not under_way.done.wait(self._access.timeout):
            with self._lock:
                if not under_way.done.is_set():
                    if not self._overdue:
                        self._since = time.monotonic() - self._access.timeout
                    self._overdue.add(under_way)
            if not under_way.done.is_set():
                raise Unavailable(
                    f"{doing}: the file system did not answer within"
                    f" {self._access.timeout:g} s, and may still do it: look at"
                    f" `ceph fs status`, then try again"
                )
        if under_way.error is not None:
            raise under_way.error
        return under_way.result[0]

    def close(self) -> None:
        """End the session, or leave it behind where that takes too long."""
        with self._mounting_now():
            mounted, self._mounted = self._mounted, None
            note, self._note = self._note, None
        if mounted is not None:
            self._end(mounted, note).join(self._access.timeout)

    def _mounting_now(self) -> "_Held":
        return _Held(self._mounting, self._access.timeout)

    def _work(self, under_way: _Call[T], call: Callable[[Any, At], T]) -> None:
        try:
            under_way.result.append(self._do(call))
        except BaseException as error:  # noqa: BLE001  raised where it is waited for
            under_way.error = error
        with self._lock:
            under_way.done.set()
            self._overdue.discard(under_way)

    def _do(self, call: Callable[[Any, At], T]) -> T:
        cephfs = load("cephfs")
        mounted = self._mount()
        try:
            return call(mounted, self._at)
        except cephfs.LibCephFSStateError:
            number = errno.ENOTCONN
        except cephfs.Error as error:
            number = error.errno
            if number not in _ENDED:
                raise OSError(number, os.strerror(number)) from error
        # The cluster has ended the session, so the call had no effect.
        log(logger, logging.WARNING, "session ended by the cluster: a new one is begun")
        self._drop(mounted)
        mounted = self._mount()
        try:
            return call(mounted, self._at)
        except cephfs.Error as error:
            number = getattr(error, "errno", errno.ENOTCONN)
            raise OSError(number, os.strerror(number)) from error

    def _at(self, path: str) -> bytes:
        base = self._base
        if base == "/":
            return os.fsencode(path)
        if path != base and not path.startswith(f"{base}/"):
            raise Unavailable(
                f"{path}: client.{self._access.user} has no rights outside of {base}"
            )
        return os.fsencode(path[len(base) :] or "/")

    def _drop(self, mounted: Any) -> None:
        with self._mounting:
            if self._mounted is mounted:
                self._mounted = None
                note, self._note = self._note, None
                self._end(mounted, note)

    def _end(self, mounted: Any, note: Note | None) -> threading.Thread:
        # The thread keeps the last reference: without it, Python would shut a session
        # that hangs down as it frees it, and hang as well.
        def end() -> None:
            try:
                mounted.shutdown()
            except Exception:  # it is given up either way
                logger.debug("a session could not be shut down", exc_info=True)
            if note is not None:
                note.drop()

        thread = threading.Thread(target=end, name="cephfs-end", daemon=True)
        thread.start()
        return thread

    def _mount(self) -> Any:
        with self._mounting:
            if self._mounted is not None:
                return self._mounted
            if self._failed is not None:
                when, failure = self._failed
                if time.monotonic() - when < _PAUSE:
                    raise type(failure)(str(failure))
            try:
                self._notes.fence_dead()
                self._mounted, self._base = self._mount_first()
                self._note = self._notes.add(plain_address(self._mounted.get_addrs()))
            except VolpluginError as error:
                self._failed = time.monotonic(), error
                self._trouble = str(error)
                raise
            self._failed, self._trouble = None, ""
            return self._mounted

    def _mount_first(self) -> tuple[Any, str]:
        error: OSError | None = None
        for base in dict.fromkeys(("/", self._directory)):
            try:
                return self._mount_at(base), base
            except OSError as found:
                # One whose rights end at a directory may mount that alone.
                if error is None or found.errno not in {errno.ENOENT, *_FORBIDDEN}:
                    error = found
                if found.errno not in _FORBIDDEN:
                    break
        assert error is not None  # noqa: S101
        raise _cannot_mount(error, self._access, self._filesystem) from error

    def _mount_at(self, base: str) -> Any:
        cephfs = load("cephfs")
        access = self._access
        seconds = str(max(1, int(access.timeout)))
        settings = {
            "client_mount_timeout": seconds,
            "rados_mon_op_timeout": seconds,
            "rados_osd_op_timeout": seconds,
        }
        if access.keyring is not None:
            settings["keyring"] = access.keyring
        name = None if self._filesystem is None else self._filesystem.encode()
        mounted = None
        try:
            mounted = cephfs.LibCephFS(
                conffile=access.conf, auth_id=access.user, conf=settings
            )
            mounted.mount(mount_root=os.fsencode(base), filesystem_name=name)
        except cephfs.Error as error:
            if mounted is not None:
                self._end(mounted, None)
            number = getattr(error, "errno", errno.EIO)
            raise OSError(number, os.strerror(number)) from error
        return mounted


class _Held:
    """A lock that is taken for so long at most: whoever has it may hang."""

    def __init__(self, lock: threading.Lock, limit: float) -> None:
        self._lock = lock
        self._limit = limit
        self._taken = False

    def __enter__(self) -> None:
        self._taken = self._lock.acquire(timeout=self._limit)

    def __exit__(self, *_: object) -> None:
        if self._taken:
            self._lock.release()


def _cannot_mount(
    error: OSError, access: Access, filesystem: str | None
) -> VolpluginError:
    user, name = f"client.{access.user}", filesystem or "the default one"
    if error.errno in _FORBIDDEN:
        reason = (
            f"{user} has no rights there, or a wrong key: look at"
            f" `ceph auth get {user}`; `ceph fs authorize` gives rights"
        )
    elif error.errno == errno.ENOENT:
        reason = (
            f"there is no such file system, or no key of {user}: look at"
            f" `ceph fs ls` and at {access.keyring or access.conf}"
        )
    elif error.errno == errno.ETIMEDOUT:
        reason = (
            f"it did not answer within {access.timeout:g} s: look at `ceph fs status`"
        )
    else:
        reason = str(error.strerror)
    return Unavailable(f"open the file system {name}: {reason}")
