"""Disk space that the store keeps back, so that it can write when the disk is full.

Without it a disk that containers have filled could not be freed again by removing
volumes, no container could be started or stopped, and a restarted server would not come
up: LevelDB writes a new manifest and log each time it is opened.
"""

import contextlib
import os
from typing import Final

# LevelDB collects up to 4 MiB in its log before it writes a table of that size. It is
# given in pieces, as whatever has filled the disk may take what is left of each.
SIZE: Final = 4 << 20
PIECE: Final = 64 << 10


class Reserve:
    """A file in the store's directory that takes up space; LevelDB leaves it alone."""

    def __init__(self, directory: str) -> None:
        self._path = os.path.join(directory, "reserve")
        self._kept = False

    def keep(self) -> None:
        """Take the space, unless it is taken or hardly more than that is free."""
        if self._kept:
            return
        with contextlib.suppress(OSError):  # to be tried again with the next write
            flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
            descriptor = os.open(self._path, flags, 0o600)
            try:
                found = os.fstatvfs(descriptor)
                if os.fstat(descriptor).st_size >= SIZE:
                    self._kept = True
                elif found.f_bavail * found.f_frsize >= 2 * SIZE:
                    os.posix_fallocate(descriptor, 0, SIZE)
                    self._kept = True
            finally:
                os.close(descriptor)

    def give(self) -> bool:
        """Give a piece back to the disk; return False when there is none to give."""
        self._kept = False
        try:
            size = os.stat(self._path).st_size
            if size == 0:
                return False
            os.truncate(self._path, max(0, size - PIECE))
        except OSError:
            return False
        return True
