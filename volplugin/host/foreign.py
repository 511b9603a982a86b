"""Mounts that only another mount namespace has, brought into ours.

By open_tree(2) and move_mount(2), of Linux 5.2: a copy of the mount is made in its own
namespace, which a thread enters for that and never leaves, and is put in its place in
ours. It is the same file system, with what is in it.
"""

import ctypes
import errno
import os
import threading
from typing import Final

from volplugin.errors import Unavailable, Unsupported, VolpluginError, from_os_error
from volplugin.host import paths
from volplugin.host.mountinfo import Mount
from volplugin.host.mounts import MountFlag, remount

_libc = ctypes.CDLL(None, use_errno=True)

_CLONE_FS: Final = 0x200
_CLONE_NEWNS: Final = 0x20000
# The same numbers on every architecture but alpha.
_OPEN_TREE: Final = 428
_MOVE_MOUNT: Final = 429
_OPEN_TREE_CLONE: Final = 1
_OPEN_TREE_CLOEXEC: Final = os.O_CLOEXEC
_EMPTY_PATH: Final = 0x1000
_FROM_EMPTY_PATH: Final = 0x4
_TO_EMPTY_PATH: Final = 0x40

_FLAGS: Final = {
    "nosuid": MountFlag.NOSUID,
    "nodev": MountFlag.NODEV,
    "noexec": MountFlag.NOEXEC,
}


def bring(pid: int, mount: Mount, target: str) -> None:
    """Mount on ``target`` what process ``pid`` has as ``mount``, a line of its table.

    Writable, also where that one is not. Not idempotent. Raise `Unavailable` when the
    process has ended or has something else there by now, `Unsupported` for a kernel
    before 5.2.
    """
    doing = f"mount on {target} what process {pid} has on {mount.mountpoint}"
    try:
        copy = _copy(pid, mount.mountpoint)
    except OSError as error:
        raise _failed(error, doing) from error
    try:
        found = os.fstat(copy).st_dev
        if f"{os.major(found)}:{os.minor(found)}" != mount.device:
            raise Unavailable(f"{doing}: it has something else there by now")
        place = paths.open_directory(target)
        try:
            flags = _FROM_EMPTY_PATH | _TO_EMPTY_PATH
            _call(_MOVE_MOUNT, copy, b"", place, b"", flags)
        finally:
            os.close(place)
    except OSError as error:
        raise _failed(error, doing) from error
    finally:
        os.close(copy)
    kept = MountFlag(0)
    for option in mount.options.split(","):
        kept |= _FLAGS.get(option, MountFlag(0))
    remount(target, flags=kept)


def _copy(pid: int, mountpoint: str) -> int:
    """Return a descriptor of a copy of the mount that is on no directory."""
    root = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    namespace = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    result: list[int | OSError] = []

    def enter() -> None:
        try:
            # setns(2): a thread that shares its root directory with others can't.
            _check(_libc.unshare(_CLONE_FS))
            _check(_libc.setns(namespace, _CLONE_NEWNS))
            path = os.fsencode(mountpoint.lstrip("/"))
            flags = _OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC | (0 if path else _EMPTY_PATH)
            result.append(_call(_OPEN_TREE, root, path, flags))
        except OSError as error:
            result.append(error)

    try:
        thread = threading.Thread(target=enter, name="foreign-mount")
        thread.start()
        thread.join()
    finally:
        os.close(root)
        os.close(namespace)
    (found,) = result
    if isinstance(found, OSError):
        raise found
    return found


def _call(number: int, *arguments: int | bytes) -> int:
    words = [
        ctypes.c_char_p(word) if isinstance(word, bytes) else ctypes.c_long(word)
        for word in arguments
    ]
    return _check(_libc.syscall(ctypes.c_long(number), *words))


def _check(answer: int) -> int:
    if answer < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return answer


def _failed(error: OSError, doing: str) -> VolpluginError:
    if isinstance(error, FileNotFoundError | ProcessLookupError):
        return Unavailable(f"{doing}: it has ended, or has it no more")
    if error.errno == errno.ENOSYS:
        return Unsupported(f"{doing}: the kernel is too old, it takes 5.2")
    return from_os_error(error, doing)
