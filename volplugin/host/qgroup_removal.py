"""Removing the qgroups of deleted subvolumes of btrfs.

A deleted subvolume is taken apart by a thread of the kernel, within seconds after the
next commit or, for a large one, later. Kernels refuse to remove its qgroup before; some
then remove it themselves (Linux 6.11 and later), others leave it (Debian's 6.1), with
its limit, to whoever gets the subvolume's id after a remount.
"""

import errno
import struct
import threading
import time
from collections.abc import Callable
from typing import Final

from volplugin.host import btrfs, qgroups
from volplugin.host.qgroups import NONE

CREATE_ARGS: Final = struct.Struct("2Q")  # struct btrfs_ioctl_qgroup_create_args

_PATIENCE: Final = 10.0  # seconds; what takes longer is left to the next deletion
_PAUSE: Final = 0.05

_lock: Final = threading.Lock()
_left: Final[dict[bytes, set[int]]] = {}  # qgroups to remove, by file system


def note_at(descriptor: int, number: int) -> None:
    """Note that the qgroup of subvolume ``number``, which was deleted, is to go.

    ``descriptor`` is any open file of the file system. Nothing is done yet, and the
    note ends with the process. Raise `OSError` as it comes.
    """
    uuid = btrfs.file_system(descriptor)
    with _lock:
        _left.setdefault(uuid, set()).add(number)


def remove_at(descriptor: int, stop: Callable[[], bool]) -> bool:
    """Remove the qgroups noted on this file system; return whether all are gone.

    Waits for the kernel, up to 10 seconds or until ``stop`` says so. What is left is
    tried again by the next call. Raise `OSError` as it comes.
    """
    uuid = btrfs.file_system(descriptor)
    end = time.monotonic() + _PATIENCE
    with _lock:
        numbers = set(_left.get(uuid, ()))
    while numbers:
        btrfs.commit_at(descriptor)
        gone = {number for number in numbers if _is_removed(descriptor, number)}
        numbers -= gone
        with _lock:
            _left[uuid] -= gone
        if not numbers:
            break
        if stop() or time.monotonic() > end:
            return False
        time.sleep(_PAUSE)
    return True


def _is_removed(descriptor: int, number: int) -> bool:
    # Linux 6.18 takes one that still counts something away, and then holds all counts
    # of the file system for wrong.
    if qgroups.referenced_at(descriptor, number):
        return False
    try:
        # BTRFS_IOC_QGROUP_CREATE
        btrfs.ioctl(descriptor, btrfs.WRITE, 42, CREATE_ARGS, 0, number)
    except OSError as error:
        if error.errno == errno.EBUSY:
            return False
        if error.errno not in NONE:
            raise
    return True
