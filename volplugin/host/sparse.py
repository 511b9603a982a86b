"""Files that take less room on the disk than they are long: made, grown and copied."""

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import Final

from volplugin.errors import AlreadyExists, from_os_error
from volplugin.host import paths

_CHUNK: Final = 1 << 30  # bytes a copy_file_range(2) call is asked for


def create(path: str, size: int, *, prealloc: bool) -> None:
    """Make the file ``path`` of ``size`` bytes that all read as zero, mode 0600.

    With ``prealloc`` its space is taken on the disk. What a failure made is taken back.
    Raise `AlreadyExists` when the path is there, `NoSpace` when the disk is too small.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o600)
    except FileExistsError as error:
        raise AlreadyExists(f"make {path}: it exists; move it away") from error
    except OSError as error:
        raise from_os_error(error, f"make {path}") from error
    try:
        os.ftruncate(descriptor, size)
        if prealloc:
            os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        os.unlink(path)
        raise from_os_error(error, f"make {path} with {size} bytes") from error
    finally:
        os.close(descriptor)


def resize(path: str, size: int, *, prealloc: bool) -> None:
    """Make the file ``path`` ``size`` bytes long and bring that onto the disk.

    Idempotent. With ``prealloc`` all of its space is taken on the disk, holes in it
    too; the content stays. A file that grew is as long as before when that fails.
    """
    doing = f"make {path} {size} bytes long"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise from_os_error(error, doing) from error
    try:
        before = os.fstat(descriptor).st_size
        try:
            if before != size:
                os.ftruncate(descriptor, size)
            if prealloc:
                os.posix_fallocate(descriptor, 0, size)
        except OSError:
            if before < size:
                os.ftruncate(descriptor, before)
            raise
        os.fsync(descriptor)
    except OSError as error:
        raise from_os_error(error, doing) from error
    finally:
        os.close(descriptor)


def copy(source: str, target: str) -> None:
    """Copy the file ``source`` to the new file ``target``, holes as holes, and sync it.

    File systems that can share the blocks do. Errors as for `create`.
    """
    doing = f"copy {source} to {target}"
    try:
        with open(source, "rb") as old:
            length = os.fstat(old.fileno()).st_size
            create(target, length, prealloc=False)
            with open(target, "r+b") as new:
                _copy_data(old.fileno(), new.fileno(), length)
                os.fsync(new.fileno())
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(target)
        raise from_os_error(error, doing) from error


def length(path: str) -> int:
    """Return the bytes that the file is long. Raise `NotFound` for a missing one."""
    return _status(path).st_size


def taken(path: str) -> int:
    """Return the bytes that the file takes on the disk. Raise as `length`."""
    return _status(path).st_blocks * 512  # stat(2): in these units everywhere


def sync(path: str) -> None:
    """Bring the file's content and attributes onto the disk."""
    try:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    except OSError as error:
        raise from_os_error(error, f"sync {path}") from error


def replace(source: str, target: str) -> None:
    """Rename ``source`` over ``target`` in the same directory, and sync that."""
    try:
        with paths.parent(target) as (directory, name):
            os.replace(
                os.path.basename(source),
                name,
                src_dir_fd=directory,
                dst_dir_fd=directory,
            )
            os.fsync(directory)
    except OSError as error:
        raise from_os_error(error, f"move {source} to {target}") from error


def remove(path: str) -> None:
    """Remove the file and sync its directory; a missing one is success."""
    try:
        os.unlink(path)
        paths.sync(os.path.dirname(path))
    except FileNotFoundError:
        return
    except OSError as error:
        raise from_os_error(error, f"remove {path}") from error


def _status(path: str) -> os.stat_result:
    try:
        return os.lstat(path)
    except OSError as error:
        raise from_os_error(error, f"look at {path}") from error


def extents(descriptor: int, length: int) -> Iterator[tuple[int, int]]:
    """Yield begin and end of each part of an open file that is no hole.

    In the first ``length`` bytes; `OSError` as it comes.
    """
    end = 0
    while end < length:
        try:
            begin = os.lseek(descriptor, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # lseek(2): only a hole is left
                return
            raise
        end = os.lseek(descriptor, begin, os.SEEK_HOLE)
        yield begin, end


def _copy_data(source: int, target: int, length: int) -> None:
    for begin, end in extents(source, length):
        offset = begin
        while offset < end:
            count = min(end - offset, _CHUNK)
            done = os.copy_file_range(source, target, count, offset, offset)
            if done == 0:
                raise OSError(errno.EIO, "the file became shorter meanwhile")
            offset += done
