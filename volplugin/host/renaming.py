"""Renaming without replacing: renameat2(2)."""

import ctypes
import errno
import os
from typing import Final

_libc = ctypes.CDLL(None, use_errno=True)

_RENAME_NOREPLACE: Final = 1


def rename_unless_there(here: int, old: str, there: int, new: str) -> None:
    """Rename ``old`` in directory ``here`` to ``new`` in ``there``, atomically.

    Raise `OSError` as it comes; EEXIST when ``new`` exists, of any kind. Where the file
    system or the C library has no such call, look first and rename then.
    """
    try:
        renameat2 = _libc.renameat2
    except AttributeError:
        number = errno.ENOSYS
    else:
        arguments = (here, os.fsencode(old), there, os.fsencode(new))
        if renameat2(*arguments, _RENAME_NOREPLACE) == 0:
            return
        number = ctypes.get_errno()
    # renameat2(2): EINVAL where the file system does not know the flag.
    if number not in {errno.ENOSYS, errno.EINVAL}:
        raise OSError(number, os.strerror(number))
    look_and_rename(here, old, there, new)


def look_and_rename(here: int, old: str, there: int, new: str) -> None:
    """Do as `rename_unless_there`, in two steps: for file systems without the flag."""
    try:
        os.stat(new, dir_fd=there, follow_symlinks=False)
    except FileNotFoundError:
        os.rename(old, new, src_dir_fd=here, dst_dir_fd=there)
    else:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
