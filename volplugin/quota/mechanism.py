"""The contract of a mechanism that limits a directory in place.

Terms: a *mechanism* is the file system's own means to limit what lies below one
directory; a *limit* counts bytes, inodes or both, is hard, and holds for root too as
far as the file system goes. *Facts* are texts that a mechanism notes when a volume is
planned (the project id); they are stored with the volume and given back with each call.

A mechanism promises a driver what a driver promises the core (see `drivers.driver`):
idempotence, errors of ours or `OSError`, nothing left that `forget` or `release` would
not take away. It never remounts a file system, never switches quotas on, and never
changes a limit or a project id that someone else has set.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar

import attrs

from volplugin.model import Usage

Facts = Mapping[str, str]


@attrs.frozen(kw_only=True)
class Limit:
    """What a directory may hold: bytes, and a number of inodes; None is no limit."""

    size: int | None = None
    inodes: int | None = None


@attrs.frozen
class Limited:
    """A directory that carries a limit, with the facts of its volume."""

    path: str
    facts: Facts


class Mechanism(ABC):
    """One way to limit directories; without state of its own but ids given out."""

    name: ClassVar[str]

    @abstractmethod
    def problem(self, directory: str, *, itself: bool = False) -> str | None:
        """Say why what lies in ``directory`` can't be limited this way; None if it can.

        With ``itself``, the directory is meant and not what lies in it: whether limits
        are in force there. That it is free to be adopted is for `require_adoptable`.

        It exists. No effect, and nothing is remembered: a remount shows at
        once. The text fits behind "project quota: ".
        """

    @abstractmethod
    def check(self, limit: Limit) -> None:
        """Raise `InvalidArgument` below the mechanism's minimum, naming it.

        Raise `Unsupported` for what it can't count.
        """

    @abstractmethod
    def reserve(self, directory: str) -> Facts:
        """Return the facts of a new volume in ``directory``; an id is given only once.

        No effect on disk. An id is free again after `forget` or `release`, and after
        the end of the process if no volume came of it.
        """

    @abstractmethod
    def keep(self, directory: str, facts: Facts) -> None:
        """Note that the ids in ``facts`` belong to a volume in ``directory``."""

    @abstractmethod
    def make(self, path: str, facts: Facts) -> None:
        """Make the empty directory ``path`` with mode 0700, ready to be limited.

        One that an earlier call made is success. It may be renamed afterwards.
        """

    @abstractmethod
    def require_adoptable(self, path: str, facts: Facts, limit: Limit) -> None:
        """Raise unless the existing directory ``path`` can be adopted. No effect.

        Raise `AlreadyExists`, saying whose it looks like, for one that someone else
        limits, `NoSpace` with both figures for one that holds more than ``limit``, as
        far as a bounded look can tell.
        """

    @abstractmethod
    def adopt(self, path: str, facts: Facts, limit: Limit) -> bool:
        """Count what the existing directory ``path`` holds, and set ``limit``.

        Return False if counting a large tree was only begun: `work` goes on with it,
        also after a restart.
        """

    @abstractmethod
    def set_limit(self, path: str, facts: Facts, limit: Limit) -> None:
        """Make ``limit`` the limit of ``path``; in force, and on disk, at return.

        Raise `NoSpace`, with both figures and nothing changed, when ``path`` holds
        more.
        """

    @abstractmethod
    def usage(self, path: str, facts: Facts) -> Usage:
        """Return what ``path`` holds now, and the limit in force."""

    @abstractmethod
    def measure(self, volumes: Mapping[str, Limited]) -> Mapping[str, Usage]:
        """Do as `usage` for many in one pass; what can't be measured is left out."""

    @abstractmethod
    def verify(self, path: str, facts: Facts, limit: Limit) -> str | None:
        """Put the limit of ``path`` right; say what was wrong, None if nothing was."""

    @abstractmethod
    def release(self, path: str, facts: Facts) -> None:
        """Take the limit off an adopted directory, which stays with all it holds.

        Quick: what takes long is left to `work`. The ids are free once that is done.
        """

    @abstractmethod
    def forget(self, directory: str, facts: Facts) -> None:
        """Drop the limit of a directory that was in ``directory`` and is gone.

        Called when it is in the trash. Its ids are not given again as long as anything
        on the file system still carries them.
        """

    @abstractmethod
    def work(self, stop: Callable[[], bool]) -> bool:
        """Go on with what `adopt` and `release` left; return whether all is done.

        Blocks as long as that takes or until ``stop`` says so. Progress is logged.
        """
