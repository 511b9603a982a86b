"""Trees to be tagged in the background and across restarts.

A job is noted as a marker, ``tagging/NAME`` in the place given, before anything is
changed, and its marker goes when it is done. After a restart it runs again from the
beginning.
"""

import json
import logging
import os
import threading
from collections.abc import Callable

import attrs

from volplugin.errors import NotFound, Unsupported, VolpluginError
from volplugin.host import attributes, mountinfo, paths, projects
from volplugin.logs import log
from volplugin.quota.tagging import Job, Tagger
from volplugin.quota.walk import walk

logger = logging.getLogger(__name__)


@attrs.define
class _Turn:
    """Who works on one tree: a lock, and a wish that whoever has it stops."""

    lock: threading.Lock = attrs.field(factory=threading.Lock)
    cancelled: threading.Event = attrs.field(factory=threading.Event)
    tagger: Tagger | None = None


class Jobs:
    """The jobs noted in one place; safe for threads."""

    def __init__(self, place: str) -> None:
        self._folder = os.path.join(place, "tagging")
        self._lock = threading.Lock()
        self._turns: dict[str, _Turn] = {}  # guarded by the lock
        self._waiting: set[str] = set()

    def note(self, job: Job) -> None:
        """Note ``job`` on disk, in place of one for the same tree and project.

        One that runs is stopped first. Raise `Unsupported` in a place without xattrs.
        """
        mount = mountinfo.covering(job.path, mountinfo.read())
        job = attrs.evolve(job, disk=mount.source if mount else "")
        turn = self._turn(job.name)
        turn.cancelled.set()
        with turn.lock:
            turn.cancelled.clear()
            marker = os.path.join(self._folder, job.name)
            paths.make_directories(marker, 0o700)
            if not attributes.write_record(marker, _record(job)):
                raise Unsupported(
                    f"{self._folder} is on a file system without trusted xattrs; give "
                    f"the backend a 'root' on one that has them"
                )
            paths.sync(marker)

    def run(self, name: str, stop: Callable[[Tagger], bool], *, wait: bool) -> bool:
        """Do the job ``name`` until it is done or ``stop`` says so; return which.

        Nothing to do is done. One that another thread is at is not waited for unless
        ``wait``. A job whose tree is away is kept.
        """
        turn = self._turn(name)
        if not turn.lock.acquire(blocking=wait):
            return False
        try:
            job = self._read(name)
            done = True  # a marker without its job: nothing was begun
            if job is not None:
                turn.tagger = Tagger(job)
                done = self._run(job, turn.tagger, turn, stop)
            if done:
                paths.remove_directory(os.path.join(self._folder, name))
            return done
        finally:
            turn.tagger = None
            turn.lock.release()

    def run_all(self, stop: Callable[[], bool]) -> bool:
        """Do all jobs; return whether none is left. Errors are logged."""
        done = True
        for name in self._names():
            if stop():
                return False
            try:
                done = self.run(name, lambda _: stop(), wait=False) and done
            except VolpluginError as error:
                log(logger, logging.WARNING, "tagging failed", error=str(error))
                done = False
        return done

    def has(self, job: Job) -> bool:
        """Tell whether a job is noted for this tree and project, of either kind."""
        return paths.identity(os.path.join(self._folder, job.name)) is not None

    def removals(self, path: str) -> list[Job]:
        """Return the jobs that take ids off where ``path`` is, above it or below."""
        jobs = [self._read(name) for name in self._names()]
        return [
            job
            for job in jobs
            if job is not None
            and job.target == 0
            and any(
                mountinfo.is_within(*pair)
                for pair in ((path, job.path), (job.path, path))
            )
        ]

    def progress(self, path: str) -> int | None:
        """Return how many entries of ``path`` the job at work has seen; no I/O."""
        with self._lock:
            taggers = [turn.tagger for turn in self._turns.values()]
        for tagger in taggers:
            if tagger is not None and tagger.job.path == path:
                return tagger.seen
        return None

    def _run(
        self, job: Job, tagger: Tagger, turn: _Turn, stop: Callable[[Tagger], bool]
    ) -> bool:
        try:
            # The top was tagged when the job was noted: without it, it's another tree.
            if job.target and projects.of(job.path).id != job.target:
                return self._wait(job, "another directory is in its place")
            done = walk(
                job.path, tagger, lambda: turn.cancelled.is_set() or stop(tagger)
            )
        except NotFound:
            mount = mountinfo.covering(job.path, mountinfo.read())
            if mount is not None and mount.source == job.disk:
                return True  # deleted
            return self._wait(job, f"it is missing, and so is {job.disk}")
        if done:
            tagger.report("tagging done")
        return done

    def _wait(self, job: Job, why: str) -> bool:
        if job.name not in self._waiting:
            self._waiting.add(job.name)
            log(logger, logging.WARNING, "tagging waits", path=job.path, found=why)
        return False

    def _turn(self, name: str) -> _Turn:
        with self._lock:
            return self._turns.setdefault(name, _Turn())

    def _names(self) -> list[str]:
        try:
            return sorted(os.listdir(self._folder))
        except FileNotFoundError:
            return []

    def _read(self, name: str) -> Job | None:
        record = attributes.read_record(os.path.join(self._folder, name))
        return None if record is None else _job(record)


def _record(job: Job) -> bytes:
    words = {**attrs.asdict(job), "sources": sorted(job.sources)}
    return json.dumps(words, separators=(",", ":")).encode()


def _job(record: bytes) -> Job:
    words = json.loads(record)
    return Job(**{**words, "sources": frozenset(words["sources"])})
