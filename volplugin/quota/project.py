"""Limiting directories by project quotas: XFS and ext4.

Each volume's directory carries a project id of its own, which all that is made in it
inherits; the file system counts what carries the id and stops it at the limit. On XFS
that holds for everyone, with ENOSPC; on ext4 for all without CAP_SYS_RESOURCE, with
EDQUOT.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Mapping
from typing import Final

from volplugin.errors import (
    AlreadyExists,
    Internal,
    InvalidArgument,
    NoSpace,
    NotFound,
    Unsupported,
    VolpluginError,
)
from volplugin.host import paths, projects, quotactl
from volplugin.host.projects import Project
from volplugin.host.quotactl import Quota, Switches
from volplugin.logs import log
from volplugin.model import Usage
from volplugin.quota import ids, places, walk
from volplugin.quota.figures import is_kept, require_within, told
from volplugin.quota.ids import IdRange
from volplugin.quota.jobs import Jobs
from volplugin.quota.mechanism import Facts, Limit, Limited, Mechanism
from volplugin.quota.tagging import Job
from volplugin.sizes import format_size

logger = logging.getLogger(__name__)

_FACT: Final = "project"
# On XFS with 4K blocks no file can be made below 188K: a create takes the worst case.
_LEAST_SIZE: Final = 1 << 20
_LEAST_INODES: Final = 2  # the directory itself is one
_AT_ONCE: Final = 20_000  # entries that `adopt` tags before it leaves the rest
_LOOKED_AT: Final = 100_000  # entries that `require_adoptable` counts


class ProjectQuota(Mechanism):
    """Project quotas for one backend, whose ``place`` keeps the jobs left to do."""

    name = "project"

    def __init__(self, place: str, ids: IdRange) -> None:
        """Keep where jobs are noted, and the ids that volumes get. No effect."""
        self._jobs = Jobs(place)
        self._ids = ids

    def problem(self, directory: str, *, itself: bool = False) -> str | None:
        """Say why not: no ids, itself in a project, quotas off, or rights missing."""
        try:
            own = projects.of(directory)
            switches = quotactl.state(directory)
        except Unsupported:
            own, switches = Project(0), Switches()
        if own.id != 0 and not itself:
            name = projects.name_of(own.id)
            shown = f"{own.id} ({name})" if name else str(own.id)
            return (
                f"{directory} is itself in project {shown}: nothing of another project "
                f"can be moved into it; give a directory that is in none"
            )
        if not (switches.accounting and switches.enforced):
            mount = places.mount_of(directory)
            off = "are not enforced" if switches.accounting else "are off"
            remedy = places.remedy(mount, counted=switches.accounting)
            if remedy is None:
                return (
                    f"{places.shown(mount)} has no project quotas; XFS and ext4 have "
                    f"them"
                )
            return f"project quotas of {places.shown(mount)} {off}: {remedy}"
        try:  # the rest needs rights
            with contextlib.closing(quotactl.each(directory, 1)) as quotas:
                next(quotas, None)
        except VolpluginError as error:
            return str(error)
        return None

    def check(self, limit: Limit) -> None:
        """Refuse less than 1M or 2 inodes."""
        if limit.size is not None and limit.size < _LEAST_SIZE:
            raise InvalidArgument(
                f"size={format_size(limit.size)} is below the minimum of a project "
                f"quota, {format_size(_LEAST_SIZE)}"
            )
        if limit.inodes is not None and limit.inodes < _LEAST_INODES:
            raise InvalidArgument(
                f"inodes={limit.inodes} is below the minimum of a project quota, "
                f"{_LEAST_INODES}: the volume's root counts as one"
            )

    def reserve(self, directory: str) -> Facts:
        """Return the project id that a new volume gets."""
        return {_FACT: str(ids.reserve(directory, self._ids))}

    def keep(self, directory: str, facts: Facts) -> None:
        """Note the id of a volume that exists."""
        ids.keep(directory, _id_of(facts))

    def make(self, path: str, facts: Facts) -> None:
        """Make the directory, and put it into its project."""
        paths.make_directory(path, 0o700)
        self._require_free(path, frozenset({0, _id_of(facts)}))
        projects.put(path, Project(_id_of(facts), inherits=True))

    def require_adoptable(self, path: str, facts: Facts, limit: Limit) -> None:
        """Look at the top's project, and count up to 100,000 entries."""
        leaving = {
            number for job in self._jobs.removals(path) for number in job.sources
        }
        self._require_free(path, frozenset({0, _id_of(facts)} | leaving))
        count = walk.Count()
        whole = walk.walk(path, count, lambda: count.seen >= _LOOKED_AT)
        at_least = "" if whole else "at least "
        require_within(path, limit, count.size, count.inodes, at_least)

    def adopt(self, path: str, facts: Facts, limit: Limit) -> bool:
        """Tag the top, set the limit, and tag the first 20,000 entries.

        Ids that an earlier volume left are taken off first, however long that takes.
        """
        number = _id_of(facts)
        for earlier in self._jobs.removals(path):
            self._jobs.run(earlier.name, lambda _: False, wait=True)
        self._require_free(path, frozenset({0, number}))
        job = Job(path, frozenset({0}), number)
        self._jobs.note(job)
        projects.put(path, Project(number, inherits=True))
        self._limit(path, number, limit)
        projects.sync(path, Project(number, inherits=True))
        done = self._jobs.run(
            job.name, lambda tagger: tagger.seen >= _AT_ONCE, wait=False
        )
        if done:
            held = quotactl.get(path, number)
            require_within(path, limit, held.used, held.inodes_used)
        return done

    def set_limit(self, path: str, facts: Facts, limit: Limit) -> None:
        """Set the limit, read it back, and sync the directory with it."""
        number = _id_of(facts)
        self._require_free(path, frozenset({0, number}))
        before = quotactl.get(path, number)
        require_within(path, limit, before.used, before.inodes_used)
        self._limit(path, number, limit)
        held = quotactl.get(path, number)
        try:
            require_within(path, limit, held.used, held.inodes_used)
        except NoSpace:  # filled meanwhile
            quotactl.set_limit(path, number, size=before.size, inodes=before.inodes)
            raise
        projects.sync(path, Project(number, inherits=True))

    def usage(self, path: str, facts: Facts) -> Usage:
        """Return usage and limit of the project."""
        return self._usage(path, quotactl.get(path, _id_of(facts)), places.free(path))

    def measure(self, volumes: Mapping[str, Limited]) -> Mapping[str, Usage]:
        """Go through the quotas of each file system once."""
        disks: dict[int, dict[int, list[str]]] = {}
        for volume, limited in volumes.items():
            with contextlib.suppress(OSError):
                device = os.stat(limited.path, follow_symlinks=False).st_dev
                numbers = disks.setdefault(device, {})
                numbers.setdefault(_id_of(limited.facts), []).append(volume)
        found: dict[str, Usage] = {}
        for numbers in disks.values():
            path = volumes[next(iter(numbers.values()))[0]].path
            with contextlib.suppress(VolpluginError, OSError):
                free, last = places.free(path), max(numbers)
                with contextlib.closing(quotactl.each(path, min(numbers))) as quotas:
                    for quota in quotas:
                        if quota.id > last:
                            break
                        for volume in numbers.get(quota.id, ()):
                            place = volumes[volume].path
                            found[volume] = self._usage(place, quota, free)
        return found

    def verify(self, path: str, facts: Facts, limit: Limit) -> str | None:
        """Tag a top that lost its id, and the tree again; set a limit that differs."""
        number = _id_of(facts)
        self._require_free(path, frozenset({0, number}))
        wrong = []
        top = projects.of(path)
        wanted = Project(number, inherits=True)
        if top != wanted:
            wrong.append(
                f"not in project {number}" if top.id == 0 else "project not inherited"
            )
            self._jobs.note(Job(path, frozenset({0}), number))
            projects.put(path, wanted)
        found = quotactl.get(path, number)
        if not is_kept(path, found, limit):
            had = Limit(size=found.size, inodes=found.inodes)
            wrong.append(f"limit {told(had)} instead of {told(limit)}")
            self._limit(path, number, limit)
        if not wrong:
            return None
        projects.sync(path, wanted)
        return "; ".join(wrong)

    def release(self, path: str, facts: Facts) -> None:
        """Drop the limit, untag the top, and note a job for the rest."""
        number = _id_of(facts)
        try:
            own = projects.of(path).id
        except NotFound:
            own = None
        except Unsupported:  # its disk is away, or mounted without quotas
            own = None
        job = Job(path, frozenset({number}), 0)
        # An `adopt` that died early has left a job, and the top as it was.
        if own == number or (own == 0 and self._jobs.has(job)):
            self._jobs.note(job)
        with contextlib.suppress(NotFound):
            directory = os.path.dirname(path) if own is None else path
            self.forget(directory, facts)
        if own == number:
            projects.sync(path, Project(0))

    def forget(self, directory: str, facts: Facts) -> None:
        """Set the limit to none, on disk; where quotas are off there is none to set."""
        number = _id_of(facts)
        try:
            quotactl.set_limit(directory, number, size=None, inodes=None)
        except Unsupported as error:
            log(
                logger,
                logging.WARNING,
                "limit not dropped",
                directory=directory,
                project=number,
                error=str(error),
            )
        else:
            # The store, which forgets the volume next, may be on another disk.
            projects.sync(directory, projects.of(directory))
        ids.release(directory, number)

    def work(self, stop: Callable[[], bool]) -> bool:
        """Tag and untag."""
        return self._jobs.run_all(stop)

    def _limit(self, path: str, number: int, limit: Limit) -> None:
        quotactl.set_limit(path, number, size=limit.size, inodes=limit.inodes)
        kept = quotactl.get(path, number)
        if not is_kept(path, kept, limit):
            had = Limit(size=kept.size, inodes=kept.inodes)
            raise Internal(
                f"limit {path} to {told(limit)}: the kernel kept {told(had)}"
            )

    def _require_free(self, path: str, allowed: frozenset[int]) -> None:
        number = projects.of(path).id
        if number in allowed:
            return
        if name := projects.name_of(number):
            whose = f"which /etc/projid names {name!r}"
        elif number in self._ids:
            whose = "which looks like a volume of volplugin"
        else:
            whose = "set by someone else: xfs_quota, docker or podman"
        raise AlreadyExists(f"{path} is in project {number} already, {whose}")

    def _usage(self, path: str, quota: Quota, free: int) -> Usage:
        left = free if quota.size is None else quota.size - quota.used
        seen = self._jobs.progress(path)
        return Usage(
            used=quota.used,
            available=max(0, min(left, free)),
            size=quota.size,
            inodes_used=quota.inodes_used,
            inodes=quota.inodes,
            notes={} if seen is None else {"tagging": f"{seen} entries so far"},
        )


def _id_of(facts: Facts) -> int:
    return int(facts[_FACT])
