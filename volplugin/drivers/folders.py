"""Volumes that are directories of ours: made aside, moved into place, thrown away.

Below the root: ``volumes/NAME`` are the volumes, ``staging`` those half made, ``trash``
those being deleted.
"""

import contextlib
import logging
import os
import stat
from collections.abc import Callable, Container, Iterator
from typing import Any

import attrs

from volplugin.drivers import ownership
from volplugin.drivers.driver import Found, Spec
from volplugin.drivers.limits import Bound
from volplugin.drivers.markers import found_in
from volplugin.errors import AlreadyExists, Unavailable, VolpluginError
from volplugin.failpoints import hit
from volplugin.host import attributes, paths, trees
from volplugin.logs import log
from volplugin.model import State

logger = logging.getLogger(__name__)


@attrs.frozen(kw_only=True)
class Root:
    """Who owns the root of a new volume, and what others may do there."""

    uid: int = 0
    gid: int = 0
    mode: int = 0o755

    @classmethod
    def asked(cls, options: Any) -> "Root":
        """Take ``uid``, ``gid`` and ``mode`` of a user's options, or the defaults."""
        return cls(
            uid=options.uid or 0,
            gid=options.gid or 0,
            mode=0o755 if options.mode is None else options.mode,
        )

    def give_to(self, path: str) -> None:
        """Make the directory ``path`` such a root."""
        os.chown(path, self.uid, self.gid)
        os.chmod(path, self.mode)


class Folders:
    """The directories of one backend."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.volumes = os.path.join(root, "volumes")
        self._staging = os.path.join(root, "staging")
        self.trash = os.path.join(root, "trash")

    def open(self) -> None:
        """Make what all volumes need."""
        # 0711: a container with a user namespace of its own can pass, not look.
        paths.make_directories(self.root, 0o711)
        paths.make_directory(self.volumes, 0o711)
        paths.make_directory(self._staging, 0o700)
        paths.make_directory(self.trash, 0o700)

    def place(self, name: str) -> str:
        """Return where the volume ``name`` is."""
        return os.path.join(self.volumes, name)

    def staged(self, volume_id: str) -> str:
        """Return where a volume is made."""
        return os.path.join(self._staging, volume_id)

    def make(self, spec: Spec, root: Root, bound: Bound | None) -> None:
        """Make the volume's directory, limited if ``bound``, with its record.

        Made aside and moved into place whole: it is never without its record or its
        limit, and what is in the way is found by the move, not by a look.
        """
        path = spec.volume.mountpoint
        if ownership.is_of(spec, path):
            return
        staged = self.staged(spec.volume.id)
        if bound is not None:
            bound.mechanism.make(staged, bound.facts)
        else:
            with contextlib.suppress(FileExistsError):
                os.mkdir(staged, 0o700)  # not synced: the move's own sync covers it
        hit("local.stage")
        root.give_to(staged)
        if bound is not None:
            bound.set_limit(staged)
        hit("local.limit")
        if not attributes.write_record(staged, spec.record):
            log(
                logger,
                logging.WARNING,
                "no record: file system without trusted xattrs; recover won't find it",
                volume=spec.volume.name,
                path=path,
            )
        hit("local.mark")
        self.publish(staged, path)
        hit("local.publish")

    def publish(self, staged: str, path: str) -> None:
        """Move a directory made aside to its place; refuse when one is there."""
        try:
            paths.move(staged, path)
        except AlreadyExists as error:
            trees.delete(staged, stop=lambda: False)
            raise AlreadyExists(
                f"{path} exists but no volume of that name is known: run `volplugin "
                f"recover` to take it over, or move it away"
            ) from error

    def remove(self, spec: Spec, bound: Bound | None) -> None:
        """Throw the volume's directory away, or undo what `make` began."""
        self._throw_away(spec)
        self.forget(bound)

    def forget(self, bound: Bound | None) -> None:
        """Give a limit's ids back, where a volume had one."""
        # Last, for a removal that fails leaves the volume as it was. Until the trash
        # is empty what is left of it keeps the ids in use.
        if bound is not None:
            bound.mechanism.forget(self.volumes, bound.facts)
        hit("local.forget")

    def _throw_away(self, spec: Spec) -> None:
        path = spec.volume.mountpoint
        if spec.volume.state is State.CREATING:
            trees.delete(self.staged(spec.volume.id), stop=lambda: False)
            if ownership.is_of(spec, path) is not True:
                return  # what is there was in the way of this volume
        if paths.identity(path) is None:
            return
        if ownership.is_of(spec, path) is False:
            raise AlreadyExists(
                f"{path} is the directory of another volume; look at `getfattr -n "
                f"trusted.volplugin {path}` and move it away"
            )
        trees.require_unmounted(path)
        trashed = os.path.join(self.trash, spec.volume.id)
        paths.move(path, trashed)
        hit("local.trash")
        if spec.volume.state is State.CREATING:
            trees.delete(trashed, stop=lambda: False)  # empty: nobody ever had it

    def purge(self, stop: Callable[[], bool]) -> bool:
        """Delete what is in the trash; return whether it is empty."""
        done = True
        for entry in os.listdir(self.trash):
            path = os.path.join(self.trash, entry)
            try:
                done = _delete(path, stop) and done
            except VolpluginError as error:
                log(
                    logger,
                    logging.WARNING,
                    "trash kept",
                    path=path,
                    error=str(error),
                )
                done = False
        return done

    def discover(self, known: Container[str] = ()) -> Iterator[Found]:
        """Yield the records of the volumes in place."""
        yield from found_in(self.volumes, known)


def require_present(spec: Spec) -> None:
    """Check that the mountpoint is the volume's own root; raise `Unavailable`."""
    volume = spec.volume
    is_ours = ownership.is_of(spec, volume.mountpoint)
    if is_ours:
        return
    if paths.identity(volume.mountpoint) is None:
        raise Unavailable(
            f"{volume.mountpoint} is missing: restore it from a backup, or remove "
            f"the volume"
        )
    if is_ours is False or volume.facts.get("marked") == "yes":
        raise Unavailable(
            f"{volume.mountpoint} is not the directory that this volume was made "
            f"on: is its disk mounted?"
        )
    os.close(paths.open_directory(volume.mountpoint))


def _delete(path: str, stop: Callable[[], bool]) -> bool:
    if stat.S_ISDIR(os.lstat(path).st_mode):
        return trees.delete(path, stop=stop)
    os.unlink(path)
    return True
