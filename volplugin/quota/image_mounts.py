"""Image files as mounts: what the life and the resizing of an image share."""

import contextlib
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import attrs

from volplugin.errors import InvalidArgument, Unavailable
from volplugin.failpoints import hit
from volplugin.host import filesystems, loops, mountinfo, mounts, paths, superblocks
from volplugin.host.mountinfo import Mount
from volplugin.host.mounts import MountFlag
from volplugin.host.patience import outwait
from volplugin.logs import log

logger = logging.getLogger(__name__)

DEFAULT_KIND: Final = "ext4"

# As a plain directory, which a volume stands for: set-user-ID programs, file
# capabilities and device nodes (chroots, mock build roots) work in it as they would
# there; what keeps users of the host out is, there as here, the directory above.
_FLAGS: Final = MountFlag(0)

_QUIET_WAIT: Final = 1.0  # seconds for a loop device to clear itself
_UNMOUNT_WAIT: Final = 5.0  # seconds for others to leave our scratch directory
_PAUSE: Final = 0.01


@attrs.frozen(kw_only=True)
class Image:
    """An image as it is asked for: bytes, inodes, and what mkfs is told."""

    path: str
    kind: str = DEFAULT_KIND
    size: int
    inodes: int | None = None
    prealloc: bool = False
    mkfs: Mapping[str, str] = attrs.field(factory=dict)


def is_mounted(path: str, mountpoint: str, table: Sequence[Mount]) -> bool:
    """Tell whether the image is what is mounted at ``mountpoint``. No I/O.

    ``path`` is as the kernel shows it, without symbolic links; the image may have been
    deleted since. Of a server that ran in a mount namespace which has ended since, the
    kernel knows no more than the end of the path.
    """
    found = mountinfo.at(mountpoint, table)
    if found is None or found.root != "/":
        return False
    shown = (loops.backing_file(found.device) or "").removesuffix(" (deleted)")
    return shown == path or (
        path.endswith(shown) and os.path.basename(shown) == os.path.basename(path)
    )


def mount(image: Image, path: str, mountpoint: str) -> str:
    """Mount the file ``path``, ``image`` or its part; return the ``/dev/loopN``."""
    options = [] if image.prealloc else ["discard"]
    if image.kind == "ext4":
        # New images read as zeros. Without lost+found, e2fsck counts fewer inodes in
        # use than the kernel's lazy initialisation takes for possible: it would stop
        # the journal and make the volume read-only.
        options.append("noinit_itable")
    if image.kind == "xfs":
        options.append("nouuid")  # a copy, from a backup, may be mounted beside it
    with loops.attach(path) as loop:
        try:
            mounts.mount(
                loop.device,
                mountpoint,
                image.kind,
                flags=_FLAGS,
                data=",".join(options),
            )
        except InvalidArgument as error:
            raise Unavailable(
                f"{error}: the {image.kind} in {path} is damaged, or this kernel lacks"
                " a feature of it; `dmesg` says which"
            ) from error
        return loop.device


@contextlib.contextmanager
def mounted(image: Image, path: str, scratch: str) -> Iterator[str]:
    """Mount as `mount`, on a directory made for the time of the context."""
    paths.make_directory(scratch, 0o700)
    try:
        device = mount(image, path, scratch)
    except BaseException:
        paths.remove_directory(scratch)
        raise
    try:
        hit("image.mounted")
        yield device
    finally:
        unmount(scratch)
        # A container that starts just now may have taken the mount with it for a
        # moment, or for good; the image is as it should be either way.
        is_quiet(path)
        paths.remove_directory(scratch)


def clear(path: str, scratch: str) -> None:
    """Take away a scratch directory that a death left, with what is mounted there.

    The image ``path`` and its part stay. Idempotent. Raise `InUse` while someone is
    in it.
    """
    for image in (path, part_of(path)):
        while is_mounted(image, scratch, mountinfo.read()):
            unmount(scratch)
            is_quiet(image)
    paths.remove_directory(scratch)


def unmount(scratch: str) -> None:
    """Unmount what is on a directory of ours, once others have left it."""
    outwait(lambda: mounts.unmount(scratch), _UNMOUNT_WAIT)


def is_quiet(path: str) -> bool:
    """Wait shortly for the last loop device to clear itself; tell whether it did."""
    end = time.monotonic() + _QUIET_WAIT
    while loops.devices_of(path):
        if time.monotonic() > end:
            return False
        time.sleep(_PAUSE)
    return True


def ensure_clean(path: str, kind: str) -> None:
    """Check what was not unmounted; never under a mount, be it in a container."""
    if loops.devices_of(path) or superblocks.is_clean(path, kind):
        return
    said = filesystems.check(path, kind)
    event = "an image was not unmounted: checked"
    log(logger, logging.WARNING, event, path=path, e2fsck=" ".join(said.split()))


def part_of(path: str) -> str:
    """Return where an image is as long as it is not ready."""
    return f"{path}.part"


def scratch_of(path: str) -> str:
    """Return the scratch directory beside the image."""
    return f"{path}.mnt"
