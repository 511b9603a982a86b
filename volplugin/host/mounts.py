"""Mounting and unmounting: mount(2) and umount2(2)."""

import ctypes
import errno
import os
from enum import IntFlag
from typing import Final

from volplugin.errors import (
    InUse,
    InvalidArgument,
    NotFound,
    Unavailable,
    Unsupported,
    VolpluginError,
    from_os_error,
)
from volplugin.host import mountinfo, paths

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_ulong,
    ctypes.c_char_p,
)
_libc.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)

_UMOUNT_NOFOLLOW: Final = 8


class MountFlag(IntFlag):
    """The flags of mount(2) that volplugin uses, by the kernel's names."""

    RDONLY = 1
    NOSUID = 2
    NODEV = 4
    NOEXEC = 8
    REMOUNT = 32
    BIND = 4096
    REC = 16384


def mount(
    source: str, target: str, kind: str, *, flags: MountFlag, data: str = ""
) -> None:
    """Mount ``source`` of type ``kind`` on the directory ``target``.

    ``target`` is resolved without symbolic links. Not idempotent: a second call mounts
    once more on top. Raise `InvalidArgument` for what the kernel refuses, `Unsupported`
    for a type that it does not have or a right that is missing, `NotFound` for a
    missing target, `Unavailable` for a damaged file system.
    """
    doing = f"mount {kind or source} on {target}"
    words = [_word(word, doing) for word in (source, kind, data)]
    descriptor = paths.open_directory(target)
    try:
        # mount(2) follows symbolic links; the descriptor is past all of them.
        place = f"/proc/self/fd/{descriptor}".encode()
        if _libc.mount(words[0], place, words[1], flags.value, words[2]) == 0:
            return
        error = _last_error()
    finally:
        os.close(descriptor)
    raise _mount_error(error, doing, kind, data) from error


def bind(source: str, target: str) -> None:
    """Show the directory ``source``, with all that is mounted in it, at ``target``.

    Not idempotent; errors as for `mount`.
    """
    mount(source, target, "", flags=MountFlag.BIND | MountFlag.REC)


def remount(target: str, *, flags: MountFlag) -> None:
    """Give the mount on the directory ``target``, no other of its file system, flags.

    It is writable without `MountFlag.RDONLY`. Idempotent; errors as for `mount`.
    """
    mount("", target, "", flags=MountFlag.REMOUNT | MountFlag.BIND | flags)


def unmount(target: str) -> None:
    """Unmount the topmost mount at ``target``, never lazily.

    Idempotent: where nothing is mounted, or the path is missing, there is nothing to
    do. Raise `InUse` while a process has something open on it or a mount lies below it,
    `Unavailable` for a mount that is there and that the path does not lead to.
    """
    doing = f"unmount {target}"
    try:
        # By the parent's descriptor: one of the mount itself would keep it busy.
        with paths.parent(target) as (directory, name):
            place = f"/proc/self/fd/{directory}/".encode() + os.fsencode(name)
            if _libc.umount2(place, _UMOUNT_NOFOLLOW) == 0:
                return
            error = _last_error()
    except NotFound:
        error = OSError(errno.ENOENT, os.strerror(errno.ENOENT))
    if error.errno in {errno.EINVAL, errno.ENOENT}:
        # umount2(2): EINVAL says "not a mount point", and a locked mount as well.
        if mountinfo.at(target, _own_table()) is None:
            return
        raise Unavailable(
            f"{doing}: the mount is hidden by another one above it or locked;"
            " unmount that one first"
        ) from error
    if error.errno == errno.EBUSY:
        raise InUse(
            f"{doing}: a process has files open there or a mount lies below it;"
            f" end it (fuser -vm {target} lists them) and try again"
        ) from error
    raise from_os_error(error, doing) from error


def _own_table() -> list[mountinfo.Mount]:
    try:
        return mountinfo.read()
    except OSError as error:
        raise from_os_error(error, "read /proc/self/mountinfo") from error


def _last_error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


def _word(word: str, doing: str) -> bytes:
    if "\0" in word:  # C would take the part before it
        raise InvalidArgument(f"{doing}: {word!r} contains a NUL")
    return os.fsencode(word)


def _mount_error(error: OSError, doing: str, kind: str, data: str) -> VolpluginError:
    if error.errno == errno.EINVAL:
        return InvalidArgument(
            f"{doing}: the kernel refuses the options {data!r}"
            if data
            else f"{doing}: {error.strerror}"
        )
    if error.errno == errno.ENODEV:
        return Unsupported(f"{doing}: this kernel has no file system {kind}")
    if error.errno in {errno.EUCLEAN, errno.EBADMSG}:  # a bad tree, a bad checksum
        return Unavailable(
            f"{doing}: the file system is damaged; repair it by hand (e2fsck -f for"
            " ext4, xfs_repair for XFS), or restore a backup"
        )
    if error.errno == errno.EPERM:
        return Unsupported(f"{doing}: {error.strerror}: it needs CAP_SYS_ADMIN")
    return from_os_error(error, doing)
