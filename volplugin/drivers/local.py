"""The driver ``local``: a directory below the root, or one that the user names.

In the backend's place: ``volumes/NAME`` are the volumes, ``staging`` those half made,
``trash`` those being deleted, ``adopted`` the markers of ``mount=`` volumes.
"""

import contextlib
import logging
import os
import stat
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import attrs

from volplugin import options as declare
from volplugin.drivers import ownership
from volplugin.drivers.directories import allow_option, require_allowed
from volplugin.drivers.driver import Driver, Found, Plan, Spec
from volplugin.drivers.markers import Markers, found_in
from volplugin.errors import (
    AlreadyExists,
    InvalidArgument,
    Unavailable,
    Unsupported,
    VolpluginError,
)
from volplugin.failpoints import hit
from volplugin.host import attributes, paths, trees
from volplugin.host.mountinfo import Mount
from volplugin.logs import log
from volplugin.model import State, Volume

logger = logging.getLogger(__name__)


def _refuse_size(_text: str) -> NoReturn:
    raise Unsupported(
        "a local volume can't be limited; leave it out, or use "
        "-o driver=tmpfs -o size=… for a limited volume in memory"
    )


@attrs.frozen(kw_only=True)
class LocalOptions:
    """What a user can say of one volume."""

    mount: str | None = declare.option(
        help="use exactly this directory, new or existing; it is never deleted",
        parse=declare.absolute_path,
        default=None,
        shown="a directory below the root",
        unit="path",
    )
    uid: int | None = declare.option(
        help="owner of the volume's root",
        parse=declare.identity,
        default=None,
        shown="0",
        unit="user id",
    )
    gid: int | None = declare.option(
        help="group of the volume's root",
        parse=declare.identity,
        default=None,
        shown="0",
        unit="group id",
    )
    mode: int | None = declare.option(
        help="permissions of the volume's root",
        parse=declare.mode,
        default=None,
        shown="0755",
        unit="octal",
        format="{:04o}".format,
    )
    size: int | None = declare.option(
        help="refused: this driver has no limits",
        parse=_refuse_size,
        default=None,
        unit="bytes",
    )


@attrs.frozen(kw_only=True)
class LocalConfig:
    """What an operator can say of the backend."""

    root: str | None = declare.option(
        help="where the volumes are",
        parse=declare.absolute_path,
        default=None,
        shown="BACKEND below the root",
        unit="path",
    )
    allow: Sequence[str] | None = allow_option()


class Local(Driver):
    """Directories on a file system of the host."""

    name = "local"
    Options = LocalOptions
    Config = LocalConfig

    def __init__(self, config: LocalConfig, place: str) -> None:
        self._root = os.path.realpath(config.root or place)
        self._allow = config.allow
        self._volumes = os.path.join(self._root, "volumes")
        self._staging = os.path.join(self._root, "staging")
        self._trash = os.path.join(self._root, "trash")
        self._markers = Markers(self._root)

    def open(self) -> None:
        # 0711: a container with a user namespace of its own can pass, not look.
        paths.make_directories(self._root, 0o711)
        paths.make_directory(self._volumes, 0o711)
        paths.make_directory(self._staging, 0o700)
        paths.make_directory(self._trash, 0o700)

    def roots(self) -> Sequence[str]:
        return [self._root]

    def plan(self, name: str, volume_id: str, options: LocalOptions) -> Plan:
        if options.mount is None:
            return Plan(mountpoint=os.path.join(self._volumes, name))
        path = options.mount
        require_allowed(path, self._allow)
        missing = paths.missing_directories(path)
        if not missing:
            ownership.require_free(path, volume_id)
            _require_as_asked(path, options)
        # Where a file system has no such attributes the directory can't prove later
        # that it is the volume; where it has, one without the record is another one.
        marked = attributes.are_supported(_nearest_existing(path, missing))
        facts = {"made": ":".join(missing), "marked": "yes" if marked else "no"}
        return Plan(mountpoint=path, chosen=True, facts=facts)

    def create(self, spec: Spec) -> None:
        if spec.options.mount is not None:
            self._adopt(spec)
        else:
            self._make(spec)

    def _make(self, spec: Spec) -> None:
        path = spec.volume.mountpoint
        if ownership.is_of(spec, path):
            return
        # Made aside and moved into place whole: a volume's directory is never without
        # its record, and what is in the way is found by the move, not by a look.
        staged = os.path.join(self._staging, spec.volume.id)
        with contextlib.suppress(FileExistsError):
            os.mkdir(staged, 0o700)  # not synced: the move's own sync covers it
        hit("local.stage")
        os.chown(staged, spec.options.uid or 0, spec.options.gid or 0)
        os.chmod(staged, 0o755 if spec.options.mode is None else spec.options.mode)
        if not attributes.write_record(staged, spec.record):
            log(
                logger,
                logging.WARNING,
                "no record: file system without trusted xattrs; recover won't find it",
                volume=spec.volume.name,
                path=path,
            )
        hit("local.mark")
        try:
            paths.move(staged, path)
        except AlreadyExists as error:
            paths.remove_directory(staged)
            raise AlreadyExists(
                f"{path} exists but no volume of that name is known: run `volplugin "
                f"recover` to take it over, or move it away"
            ) from error
        hit("local.publish")

    def _adopt(self, spec: Spec) -> None:
        path, options = spec.volume.mountpoint, spec.options
        made = paths.make_directories(path, 0o755)
        if path in made:
            os.chown(path, options.uid or 0, options.gid or 0)
            os.chmod(path, 0o755 if options.mode is None else options.mode)
        else:
            ownership.require_free(path, spec.volume.id)
        hit("local.stage")
        attributes.write_record(path, spec.record)
        paths.sync(path)
        hit("local.adopt")
        self._markers.add(spec.volume.name, spec.record)
        hit("local.mark")

    def remove(self, spec: Spec) -> None:
        if spec.options.mount is not None:
            self._release(spec)
            return
        path = spec.volume.mountpoint
        staged = os.path.join(self._staging, spec.volume.id)
        if spec.volume.state is State.CREATING:
            trees.delete(staged, stop=lambda: False)
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
        trashed = os.path.join(self._trash, spec.volume.id)
        paths.move(path, trashed)
        hit("local.trash")
        if spec.volume.state is State.CREATING:
            trees.delete(trashed, stop=lambda: False)  # empty: nobody ever had it

    def _release(self, spec: Spec) -> None:
        path = spec.volume.mountpoint
        if ownership.is_of(spec, path):
            attributes.clear_record(path)
        hit("local.release")
        self._markers.drop(spec.volume.name)
        if spec.volume.state is State.CREATING:
            for made in reversed(spec.volume.facts["made"].split(":")):
                if made and paths.identity(made) and not os.listdir(made):
                    paths.remove_directory(made)

    def attach(self, spec: Spec) -> None:
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

    def detach(self, spec: Spec) -> None:
        pass  # `attaches` says no: there is nothing to take back

    def attaches(self, volume: Volume) -> bool:
        return False

    def is_attached(self, volume: Volume, table: Sequence[Mount]) -> bool:
        return False

    def status(
        self, volume: Volume, options: LocalOptions, *, attached: bool
    ) -> Mapping[str, Any]:
        return {} if options.mount is None else {"mount": options.mount}

    def purge(self, stop: Callable[[], bool]) -> bool:
        done = True
        for entry in os.listdir(self._trash):
            path = os.path.join(self._trash, entry)
            try:
                done = trees.delete(path, stop=stop) and done
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
        yield from found_in(self._volumes, known)
        yield from self._markers.found(known)


def _nearest_existing(path: str, missing: Sequence[str]) -> str:
    return os.path.dirname(missing[0]) if missing else path


def _require_as_asked(path: str, options: LocalOptions) -> None:
    """Refuse to change an existing directory: it is adopted as it is."""
    status = os.stat(path)
    for key, asked, found, shown in (
        ("uid", options.uid, status.st_uid, str),
        ("gid", options.gid, status.st_gid, str),
        ("mode", options.mode, stat.S_IMODE(status.st_mode), "{:04o}".format),
    ):
        if asked is not None and asked != found:
            raise InvalidArgument(
                f"{key}={shown(asked)}: {path} exists with {key} {shown(found)} and is "
                f"adopted as it is; change it yourself, or leave {key} out"
            )
