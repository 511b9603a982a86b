"""The guarded mountpoint: an empty directory that nothing can be written into.

A backend that did not mount then never fills the host's disk. The mode keeps all but
root out, the immutable flag, where the file system has it, root as well; a mount covers
both.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from volplugin.errors import InUse, NotFound, from_os_error
from volplugin.host import attributes, paths


def guard(path: str) -> None:
    """Make the empty directory ``path`` a guarded mountpoint: mode 0000, immutable.

    Idempotent. Raise `InUse` where it is not empty or something is mounted on it,
    `NotFound` where it is missing.
    """
    with _unmounted(path) as descriptor:
        if os.listdir(descriptor):
            raise InUse(f"guard {path}: it is not empty; move its content away")
        _set_mode(descriptor, 0)
        attributes.set_immutable_at(descriptor, on=True)


def unguard(path: str) -> None:
    """Make ``path`` an ordinary directory again, of mode 0700.

    Idempotent; a missing path is success. Raise `InUse` where something is mounted on
    it: the mode would be that of the mounted file system.
    """
    try:
        with _unmounted(path) as descriptor:
            attributes.set_immutable_at(descriptor, on=False)
            _set_mode(descriptor, 0o700)
    except NotFound:
        return


@contextmanager
def _unmounted(path: str) -> Iterator[int]:
    with paths.parent(path) as (parent, _):
        descriptor = paths.open_directory(path)
        try:
            if os.fstat(descriptor).st_dev != os.fstat(parent).st_dev:
                raise InUse(f"{path} is mounted; unmount it first")
            yield descriptor
        except OSError as error:
            raise from_os_error(error, f"change the mountpoint {path}") from error
        finally:
            os.close(descriptor)


def _set_mode(descriptor: int, mode: int) -> None:
    if stat.S_IMODE(os.fstat(descriptor).st_mode) == mode:
        return
    # chmod(2) answers EPERM for an immutable file, even to root.
    attributes.set_immutable_at(descriptor, on=False)
    os.fchmod(descriptor, mode)
