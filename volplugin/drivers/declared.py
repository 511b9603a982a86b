"""Options and settings that several drivers declare alike."""

from collections.abc import Mapping
from typing import Any, Final

from volplugin import options
from volplugin.quota.ids import IdRange, parse_range
from volplugin.sizes import format_size

# What mkfs can be told, in bytes: of what, the least, the most, and its own choice.
_MKFS: Final[Mapping[str, tuple[str, int, int, str]]] = {
    "block-size": ("a block", 1024, 65536, "4K"),
    "inode-size": ("an inode", 128, 2048, "256, xfs 512"),
    "inode-ratio": ("space to an inode (ext4)", 1024, 64 << 20, "mkfs's own"),
    "journal-size": ("the journal", 1 << 20, 2 << 30, "mkfs's own"),
}


def uid_option(default: int | None = 0) -> Any:
    """Declare the option for a root's owner; None tells that it was not given."""
    return options.option(
        help="owner of the volume's root",
        parse=options.identity,
        default=default,
        shown="0",
        unit="user id",
    )


def gid_option(default: int | None = 0) -> Any:
    """Declare the option for a root's group; None tells that it was not given."""
    return options.option(
        help="group of the volume's root",
        parse=options.identity,
        default=default,
        shown="0",
        unit="group id",
    )


def mode_option(default: int | None, shown: str = "") -> Any:
    """Declare the option for a root's permissions; None is shown as ``shown``."""
    return options.option(
        help="permissions of the volume's root",
        parse=options.mode,
        default=default,
        shown=shown,
        unit="octal",
        format="{:04o}".format,
    )


def inodes_option() -> Any:
    """Declare the option for a limit on the number of files."""
    return options.option(
        help="how many files, directories and links it can hold",
        parse=options.count,
        default=None,
        shown="no limit",
        unit="number",
    )


def mkfs_option(name: str, thing: str) -> Any:
    """Declare the option ``mkfs.NAME``: bytes of a part of ``thing``."""
    of_what, minimum, maximum, shown = _MKFS[name]
    return options.option(
        name=f"mkfs.{name}",
        help=f"bytes of {of_what} of {thing}",
        parse=options.size(minimum=minimum, maximum=maximum),
        default=None,
        shown=shown,
        unit="bytes",
        format=format_size,
    )


def mkfs_given(parsed: Any) -> Mapping[str, str]:
    """Return what is asked of mkfs, by name without ``mkfs.``.

    ``parsed`` are options with the four attributes ``mkfs_…`` of `mkfs_option`.
    """
    asked = {key: getattr(parsed, f"mkfs_{key.replace('-', '_')}") for key in _MKFS}
    return {key: str(value) for key, value in asked.items() if value is not None}


def root_setting() -> Any:
    """Declare the setting for the directory that a backend's volumes are in."""
    return options.option(
        help="where the volumes are",
        parse=options.absolute_path,
        default=None,
        shown="BACKEND below the root",
        unit="path",
    )


def allow_setting() -> Any:
    """Declare the setting that `directories.require_allowed` takes as ``allow``."""
    return options.option(
        help="directories at or below which mount= may point",
        parse=options.path_list,
        default=None,
        shown="all but system directories",
        unit="list of paths",
    )


def ids_setting() -> Any:
    """Declare the setting for the project ids that volumes get."""
    return options.option(
        help="project ids that volumes may get",
        parse=parse_range,
        default=IdRange(),
        unit="first-last",
    )


def overcommit_setting() -> Any:
    """Declare the setting that `Limits.require_room` holds promises against."""
    return options.option(
        help="the sizes of all volumes together may be so many times the disk's",
        parse=options.ratio,
        default=None,
        shown="no limit; a warning in the log above 1",
        unit="ratio",
    )
