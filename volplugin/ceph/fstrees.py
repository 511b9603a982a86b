"""Directory trees deleted from a file system of CephFS, bit by bit."""

import contextlib
from collections.abc import Callable

from volplugin.ceph.filesystem import FileSystem


def remove(files: FileSystem, path: str, stop: Callable[[], bool]) -> bool:
    """Remove a directory with all that is in it, its snapshots first.

    Others may be at the same. Return False if ``stop`` said so before the end.
    """
    for kept in files.snapshots(path):
        with contextlib.suppress(FileNotFoundError):
            files.drop_snapshot(path, kept.name)
    pending = [path]
    while pending:
        if stop():
            return False
        directory = pending[-1]
        try:
            directories = _empty(files, directory, stop)
        except FileNotFoundError:
            directories = []
        if directories is None:
            return False
        if directories:
            pending += directories
            continue
        files.remove_empty(directory)
        pending.pop()
    return True


def _empty(
    files: FileSystem, directory: str, stop: Callable[[], bool]
) -> list[str] | None:
    """Delete the files of a directory; return some directories in it, if any.

    None if ``stop`` said so.
    """
    while not stop():
        entries = files.some(directory)
        names = [name for name, is_directory in entries if not is_directory]
        if not names:
            return [f"{directory}/{name}" for name, _ in entries]
        files.unlink(directory, names)
    return None
