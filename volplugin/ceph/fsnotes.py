"""Notes of this host's own sessions with file systems, for the day it dies in one.

The metadata server waits a minute for a client that has gone without a word, and lets
no other change what that one had in its hands. So each session's address is noted in a
file that stays locked for as long as the process lives. A note that is not locked is of
one that died: it is kept from the cluster, whose servers then wait for it no more.
"""

import contextlib
import fcntl
import logging
import os
import uuid
from collections.abc import Callable
from typing import Final

from volplugin.errors import VolpluginError
from volplugin.host import paths
from volplugin.logs import log

logger = logging.getLogger(__name__)

_FENCE_SECONDS: Final = 3600  # as Ceph's own default: the dead do not come back


class Note:
    """The note of one session of this process."""

    def __init__(self, path: str, descriptor: int) -> None:
        self._path = path
        self._descriptor = descriptor

    def drop(self) -> None:
        """Forget the session, which has ended in order. Idempotent."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)
            os.close(descriptor)


class Notes:
    """The notes in one folder; ``fence`` takes an address and for how many seconds."""

    def __init__(self, folder: str, fence: Callable[[str, int], None]) -> None:
        self._folder = folder
        self._fence = fence

    def add(self, address: str) -> Note:
        """Note a session that this process has begun."""
        paths.make_directories(self._folder, 0o700)
        path = os.path.join(self._folder, uuid.uuid4().hex)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        os.write(descriptor, address.encode())
        return Note(path, descriptor)

    def fence_dead(self) -> None:
        """Keep the sessions of processes that died from the cluster.

        What fails is logged and tried again with the next session.
        """
        try:
            names = os.listdir(self._folder)
        except FileNotFoundError:
            return
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                self._fence_if_dead(os.path.join(self._folder, name))

    def _fence_if_dead(self, path: str) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            address = os.read(descriptor, 256).decode("ascii", "replace")
            # Without one: it died as it wrote the note, or has not come to it yet.
            if address:
                self._fence(address, _FENCE_SECONDS)
                os.unlink(path)
        except BlockingIOError:
            return  # it lives
        except VolpluginError as error:
            log(
                logger,
                logging.WARNING,
                "a session that died was not fenced: calls may hang for a minute",
                error=str(error),
            )
        finally:
            os.close(descriptor)
