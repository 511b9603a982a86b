"""File systems in image files: ext4 and XFS, made, checked and resized.

By e2fsprogs and xfsprogs, on the file itself; no loop device is needed but to grow.
Whatever works on an unmounted image holds its lock (`loops.locked`), and the program
inherits it: one that outlives us keeps a second one, and a mount, away.
"""

import contextlib
import os
import re
import stat
from collections.abc import Container, Iterator, Mapping
from typing import Final

from volplugin.errors import (
    Internal,
    InUse,
    InvalidArgument,
    NoSpace,
    Unavailable,
    Unsupported,
)
from volplugin.host import commands, loops, superblocks
from volplugin.sizes import format_size

MINIMUM: Final[Mapping[str, int]] = {
    # Below 2048 blocks mke2fs leaves the journal out (1.47.0), with exit status 0.
    "ext4": 8 << 20,
    # "Filesystem must be larger than 300MB." (xfsprogs 5.19 and later)
    "xfs": 300 << 20,
}
"""The kinds that there are, with the bytes that the smallest of each takes."""

DEFAULT_BLOCK: Final = 4096

_LABEL_MAX: Final = {"ext4": 16, "xfs": 12}  # bytes
# What each kind lets be chosen, with the words of its mkfs; {} is a number of bytes.
_OPTIONS: Final[Mapping[str, Mapping[str, tuple[str, str]]]] = {
    "ext4": {
        "block-size": ("-b", "{}"),
        "inode-size": ("-I", "{}"),
        "inode-ratio": ("-i", "{}"),
        "journal-size": ("-J", "size={}"),
    },
    "xfs": {
        "block-size": ("-b", "size={}"),
        "inode-size": ("-i", "size={}"),
        "journal-size": ("-l", "size={}"),
    },
}

# Seconds; a large and old file system takes long to check and to resize.
_MAKE_LIMIT: Final = 600.0
_WORK_LIMIT: Final = 3600.0
_LOOK_LIMIT: Final = 60.0

# mke2fs counts its own inodes 1 to 10 and that of lost+found, which we remove.
_EXT4_OWN_INODES: Final = 10


def require_options(kind: str, options: Mapping[str, str]) -> None:
    """Raise `InvalidArgument` for an option that mkfs of ``kind`` doesn't have."""
    for name in options:
        if name not in _OPTIONS[kind]:
            raise InvalidArgument(
                f"mkfs.{name}: {kind} has no such option, only "
                + ", ".join(f"mkfs.{known}" for known in sorted(_OPTIONS[kind]))
            )


def make(
    image: str,
    kind: str,
    *,
    label: str,
    inodes: int | None = None,
    options: Mapping[str, str],
) -> None:
    """Make a file system of ``kind`` that fills the file ``image``, all of it lost.

    ``inodes`` is how many files an ext4 can hold at least; mke2fs rounds up to whole
    blocks of inodes in every group. ``options`` are bytes by name, as in
    `require_options`. Nothing of the file's space is given back. Raise
    `InvalidArgument` when mkfs refuses the options, else as `commands.run`.
    """
    require_options(kind, options)
    asked = dict(options)
    block = int(asked.setdefault("block-size", str(DEFAULT_BLOCK)))
    name = label.encode()[: _LABEL_MAX[kind]].decode("utf-8", "ignore")
    if kind == "ext4":
        # What mke2fs takes for small ones, 1024 and on older systems 128, is too small
        # for our record and for dates after 2038.
        asked.setdefault("inode-size", "256")
        asked = {key: _in_mib(key, value) for key, value in asked.items()}
        # Root is the user: no blocks are kept for it. A damaged one stops writing.
        words = ["mkfs.ext4", "-q", "-F", "-m", "0", "-e", "remount-ro"]
        words += ["-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard"]
        if inodes is not None:
            words += ["-N", str(inodes + _EXT4_OWN_INODES)]
    else:
        words = ["mkfs.xfs", "-q", "-K", "-f"]
        # With direct I/O on a disk of 4096-byte sectors the loop device has these too.
        words += ["-s", f"size={min(block, DEFAULT_BLOCK)}"]
    for key, value in asked.items():
        flag, form = _OPTIONS[kind][key]
        words += [flag, form.format(value)]
    try:
        with _alone(image) as lock:
            commands.run(
                [*words, "-L", name, image],
                limit=_MAKE_LIMIT,
                doing=f"make {kind} in {image}",
                keep=(lock,),
            )
    except Internal as error:
        if not options:
            raise
        given = ", ".join(f"mkfs.{key}={value}" for key, value in options.items())
        raise InvalidArgument(f"{error} (with {given})") from error


def check(image: str, kind: str) -> str:
    """Check and repair the unmounted file system as far as no one need be asked.

    Return what e2fsck said. Nothing is done for XFS, see `superblocks.is_clean`. Raise
    `Unavailable`, with the command to run by hand, where that is not enough.
    """
    return _e2fsck(image) if kind == "ext4" else ""


def grow(device: str, mountpoint: str, kind: str) -> None:
    """Let the mounted file system fill its device. Idempotent; users go on meanwhile.

    ``device`` is ``/dev/loopN``. Raise `Unsupported` without CAP_SYS_RESOURCE, which
    the kernel asks for to grow an ext4 (ext4_resize_begin), else as `commands.run`.
    """
    words = ["resize2fs", device] if kind == "ext4" else ["xfs_growfs", mountpoint]
    doing = f"grow {kind} on {mountpoint}"
    try:
        commands.run(words, limit=_WORK_LIMIT, doing=doing)
    except Internal as error:
        if "Permission denied to resize" not in str(error):
            raise
        raise Unsupported(
            f"{doing}: not permitted: it needs CAP_SYS_RESOURCE, and a file system"
            " without errors (`dmesg` tells)"
        ) from error


def sync(
    mountpoint: str, *, limit: float = _LOOK_LIMIT, ok: Container[int] = (0,)
) -> None:
    """Bring all that was written to the mounted file system to where it is kept.

    In a process of its own, by coreutils' sync, as that may not answer: it is waited
    for ``limit`` seconds. Raise as `commands.run`.
    """
    words = ["sync", "--file-system", mountpoint]
    commands.run(words, limit=limit, doing=f"write back {mountpoint}", ok=ok)


def smallest(image: str) -> int:
    """Return the bytes that the unmounted ext4 could be shrunk to, by its own estimate.

    No effect. Raise `Unavailable` for one that has to be checked first.
    """
    doing = f"ask how small {image} can be"
    if not superblocks.is_clean(image, "ext4"):
        raise Unavailable(f"{doing}: it was not unmounted; mount it once and try again")
    with _alone(image) as lock:
        said = commands.run(
            ["resize2fs", "-P", image], limit=_LOOK_LIMIT, doing=doing, keep=(lock,)
        )
    found = re.search(r"minimum size of the filesystem: (\d+)", said)
    if found is None:
        raise Internal(f"{doing}: resize2fs says {said!r}")
    return int(found[1]) * superblocks.block_size(image)


def shrink(image: str, kind: str, to: int) -> None:
    """Make the unmounted ext4 ``to`` bytes large; the file stays as it is.

    Not for the only copy: when resize2fs is cut short the file system is broken. Raise
    `Unsupported` for XFS, `NoSpace` with both figures when the content does not fit.
    """
    require_shrinkable(kind)
    _e2fsck(image, "-f")
    require_fits(image, to)
    with _alone(image) as lock:
        commands.run(
            ["resize2fs", image, f"{to // 1024}K"],
            limit=_WORK_LIMIT,
            doing=f"shrink {image}",
            keep=(lock,),
        )


def require_shrinkable(kind: str) -> None:
    """Raise `Unsupported` for a kind that can't be made smaller."""
    if kind != "ext4":
        raise Unsupported(
            "XFS can't be made smaller: create a volume of the size you want, and copy"
        )


def require_fits(image: str, to: int) -> None:
    """Raise `NoSpace` when the content of an unmounted ext4 does not fit ``to`` bytes.

    Errors otherwise as `smallest`. No effect.
    """
    needed = smallest(image)
    if to < needed:
        raise NoSpace(
            f"its files need at least {format_size(needed)} ({needed} bytes) and"
            f" {format_size(to)} ({to} bytes) were asked for: delete some, or ask for"
            " more"
        )


@contextlib.contextmanager
def _alone(image: str) -> Iterator[int]:
    with loops.locked(image) as lock:
        # e2fsck keeps others off a device by itself. And each loop device would be
        # asked for its file's attributes, which one with a hung FUSE below never has.
        is_device = stat.S_ISBLK(os.fstat(lock).st_mode)
        devices = [] if is_device else loops.devices_of(image)
        if devices:
            raise InUse(
                f"{image} is in use by {devices[0]}: unmount it (`findmnt {devices[0]}`"
                " tells where, also in containers) and try again"
            )
        yield lock


def _e2fsck(image: str, *flags: str) -> str:
    try:
        with _alone(image) as lock:
            # e2fsck(8): 1 and 2 say that errors were corrected, 4 and more that not.
            said = commands.run(
                ["e2fsck", "-p", *flags, image],
                limit=_WORK_LIMIT,
                doing=f"check {image}",
                ok=(0, 1, 2),
                keep=(lock,),
            )
            if "lost+found not found.  CREATED" in said:
                # Fails, as it should, when something was put into it.
                commands.run(
                    ["debugfs", "-w", "-R", "rmdir lost+found", image],
                    limit=_LOOK_LIMIT,
                    doing=f"remove lost+found from {image}",
                    keep=(lock,),
                )
    except Internal as error:
        raise Unavailable(
            f"{error}; repair it by hand: `e2fsck -f {image}`, or restore a backup"
        ) from error
    return said


def _in_mib(key: str, value: str) -> str:
    # mke2fs(8): -J size= is in megabytes.
    return str(max(int(value) >> 20, 1)) if key == "journal-size" else value
