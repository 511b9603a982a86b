"""What users and operators can say of the driver ``cephfs``."""

import re
from typing import Final

import attrs

from volplugin import options as declare
from volplugin.drivers import ceph_settings, declared
from volplugin.errors import InvalidArgument
from volplugin.parsers import quote
from volplugin.sizes import format_size

# The manager takes these in names of subvolume groups, and `fs new` in those of file
# systems.
_WORD: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_LEAST: Final = 4096  # bytes of a quota; the kernel's client shows them in whole blocks


def _word(text: str) -> str:
    if not _WORD.fullmatch(text) or text.startswith((".", "_")):
        raise InvalidArgument(
            f"{quote(text)} is not a name: letters, digits and ._- may be in it, and a"
            " letter, a digit or - comes first"
        )
    return text


def _directory(text: str) -> str:
    path = declare.absolute_path(text)
    if path == "/":
        raise InvalidArgument("/ is the whole file system: give a directory in it")
    if ".snap" in path.split("/"):
        raise InvalidArgument(f"{quote(text)} is in a snapshot, which never changes")
    return path


@attrs.frozen(kw_only=True)
class CephFSOptions:
    """What a user can say of one volume."""

    size: int | None = declare.option(
        help="how much it can hold",
        parse=declare.size(minimum=_LEAST),
        default=None,
        shown="no limit",
        unit="bytes",
        format=format_size,
    )
    inodes: int | None = declared.inodes_option()
    uid: int | None = declared.uid_option(None)
    gid: int | None = declared.gid_option(None)
    mode: int | None = declared.mode_option(None, "0755")
    access: str = declare.option(
        help="rw, or ro: mounted so that nobody can write",
        parse=declare.choice("rw", "ro"),
        default="rw",
        unit="name",
    )
    path: str | None = declare.option(
        help="take this directory of the file system, with its files; it is never"
        " deleted",
        parse=_directory,
        default=None,
        shown="a new directory",
        unit="path",
    )

    def __attrs_post_init__(self) -> None:
        """Refuse what contradicts itself; `ValueError` as attrs has it."""
        if self.access == "ro" and self.path is None:
            raise ValueError(
                "access=ro: a new volume would stay empty; give path= as well"
            )
        if self.path is not None and (self.uid, self.gid, self.mode) != (None,) * 3:
            raise ValueError(
                "path= takes a directory as it is: leave uid, gid and mode out"
            )


@attrs.frozen(kw_only=True)
class CephFSConfig:
    """What an operator can say of the backend."""

    conf: str = ceph_settings.conf_setting()
    user: str = ceph_settings.user_setting()
    keyring: str | None = ceph_settings.keyring_setting()
    fs: str | None = declare.option(
        help="the file system",
        parse=_word,
        default=None,
        shown="the cluster's default",
        unit="name",
    )
    directory: str = declare.option(
        help="directory in the file system; all hosts with the same share their"
        " volumes",
        parse=_directory,
        default="/volplugin",
        unit="path",
    )
    subvolume_group: str | None = declare.option(
        help="make volumes by ceph fs subvolume in this group, not as directories",
        parse=_word,
        default=None,
        shown="none",
        unit="name",
    )
    registry_pool: str | None = declare.option(
        help="pool of the volumes' records",
        parse=declare.text,
        default=None,
        shown="the file system's first data pool",
        unit="name",
    )
    mount: str = declare.option(
        help="what mounts: kernel, fuse (ceph-fuse), or the first that works",
        parse=declare.choice("auto", "kernel", "fuse"),
        default="auto",
        unit="name",
    )
    mounts: str = declare.option(
        help="volume: one for each, so that df shows its quota; backend: one for all",
        parse=declare.choice("volume", "backend"),
        default="volume",
        unit="name",
    )
    timeout: float = ceph_settings.timeout_setting()
    host_name: str | None = ceph_settings.host_name_setting()
    root: str | None = declared.root_setting()

    @property
    def base(self) -> str:
        """The directory of the file system that all new volumes are in."""
        if self.subvolume_group is not None:
            return f"/volumes/{self.subvolume_group}"
        return self.directory
