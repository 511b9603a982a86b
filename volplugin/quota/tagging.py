"""Giving a whole tree another project id: what is done to each entry.

A directory comes before what it holds, so that what is made meanwhile has the right id
from the start. All of it is idempotent.
"""

import errno
import hashlib
import logging
import os
import time
from typing import Final

import attrs

from volplugin.host import mountinfo, projects
from volplugin.host.projects import Project
from volplugin.logs import log
from volplugin.quota.walk import CHANGED

logger = logging.getLogger(__name__)

_FILE: Final = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
# Immutable, append-only or a swap file; leased by another process.
_REFUSED: Final = frozenset(
    {errno.EPERM, errno.EACCES, errno.ETXTBSY, errno.EWOULDBLOCK, errno.EBUSY}
)
_TELL_ENTRIES: Final = 100_000
_TELL_SECONDS: Final = 30.0


@attrs.frozen
class Job:
    """A tree to be given the id ``target``, where it has one of ``sources``.

    With a ``target`` of 0 ids are taken off, and the inherit flag too. ``disk`` is what
    the tree lies on, for people and to tell a disk that is away.
    """

    path: str
    sources: frozenset[int]
    target: int
    disk: str = ""

    @property
    def name(self) -> str:
        """What its marker is called: one for each tree and project."""
        digest = hashlib.sha256(os.fsencode(self.path)).hexdigest()
        return f"{self.target or max(self.sources)}-{digest[:16]}"


@attrs.define
class Tagger:
    """Gives what a walk meets the id of a job, and counts.

    ``special`` can't carry an id that is set from outside, for they can't be opened:
    symbolic links, pipes, sockets and devices. Those made in a tagged directory have
    its id until they are gone. ``foreign`` has another project's id and keeps it.
    ``refused`` could not be changed.
    """

    job: Job
    seen: int = 0
    changed: int = 0
    special: int = 0
    foreign: int = 0
    refused: int = 0
    _mount: int = 0  # of the top, once it is seen
    _told: float = attrs.field(factory=time.monotonic)

    def directory(self, descriptor: int) -> None:
        """Take a directory."""
        self._mount = self._mount or mountinfo.mount_id(descriptor)
        self._count()
        self._put(descriptor, inherits=self.job.target != 0)

    def entry(self, directory: int, entry: "os.DirEntry[str]") -> None:
        """Take what is no directory; only regular files can be tagged."""
        self._count()
        if not entry.is_file(follow_symlinks=False):
            self.special += 1
            return
        try:
            descriptor = os.open(entry.name, _FILE, dir_fd=directory)
        except OSError as error:
            if error.errno in CHANGED:
                return
            self._refuse(error, entry.name)
            return
        try:
            # A file may be a mountpoint too.
            if mountinfo.mount_id(descriptor) != self._mount:
                self.special += 1
            else:
                self._put(descriptor, inherits=False)
        finally:
            os.close(descriptor)

    def _put(self, descriptor: int, *, inherits: bool) -> None:
        found = projects.of_open(descriptor)
        wanted = Project(self.job.target, inherits)
        if found == wanted or found.id == wanted.id == 0:
            return
        if found.id != wanted.id and found.id not in self.job.sources:
            self.foreign += 1
            if self.foreign == 1:
                self._tell(
                    "project id of someone else kept", descriptor, project=found.id
                )
            return
        try:
            projects.put_open(descriptor, wanted)
        except OSError as error:
            self._refuse(error, descriptor)
        else:
            self.changed += 1

    def _refuse(self, error: OSError, shown: int | str) -> None:
        if error.errno not in _REFUSED:
            raise error
        self.refused += 1
        if self.refused == 1:
            self._tell("project id not set", shown, error=error.strerror)

    def _tell(self, event: str, shown: int | str, **fields: object) -> None:
        if isinstance(shown, int):
            try:
                shown = os.readlink(f"/proc/self/fd/{shown}")
            except OSError:  # the path is too long
                shown = "…"
        log(logger, logging.WARNING, event, path=shown, tree=self.job.path, **fields)

    def _count(self) -> None:
        self.seen += 1
        now = time.monotonic()
        if self.seen % _TELL_ENTRIES == 0 or now - self._told > _TELL_SECONDS:
            self._told = now
            self.report("tagging goes on")

    def report(self, event: str) -> None:
        """Log how far it is."""
        log(
            logger,
            logging.INFO,
            event,
            path=self.job.path,
            project=self.job.target,
            seen=self.seen,
            changed=self.changed,
            special=self.special,
            foreign=self.foreign,
            refused=self.refused,
        )
