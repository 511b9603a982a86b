"""Volumes that are file systems in image files.

Terms: an *image* is a plain file with a file system in it, mounted by a loop device
that vanishes with the mount; the *scratch* directory is where a new image is mounted
once, before anyone sees it. Beside ``ID.img`` there may be ``ID.img.part``, an image
that is not ready, and ``ID.img.mnt``, a scratch directory; both go with
`clear_scratch`. A ``.part`` carries no record, so nobody takes it for a volume.
"""

import contextlib
import logging
import os

import attrs

from volplugin.errors import (
    AlreadyExists,
    InvalidArgument,
    Unavailable,
    Unsupported,
    VolpluginError,
    from_os_error,
)
from volplugin.failpoints import hit
from volplugin.host import (
    attributes,
    filesystems,
    loops,
    mountinfo,
    mounts,
    paths,
    sparse,
    superblocks,
)
from volplugin.logs import log
from volplugin.model import Usage
from volplugin.quota import image_mounts
from volplugin.quota.image_mounts import DEFAULT_KIND, Image, is_mounted
from volplugin.quota.image_sizes import check_resize, require_minimum, resize
from volplugin.sizes import format_size

__all__ = [
    "DEFAULT_KIND",
    "Image",
    "attach",
    "check",
    "check_resize",
    "clear_scratch",
    "detach",
    "is_mounted",
    "make",
    "resize",
    "usage",
]

logger = logging.getLogger(__name__)


@attrs.frozen
class _Root:
    uid: int
    gid: int
    mode: int
    record: bytes


def check(image: Image) -> None:
    """Raise `InvalidArgument` or `Unsupported` for what no image can be. No effect."""
    filesystems.require_options(image.kind, image.mkfs)
    require_minimum(image.kind, image.size)
    block = int(image.mkfs.get("block-size", filesystems.DEFAULT_BLOCK))
    page = os.sysconf("SC_PAGE_SIZE")
    if block > page or block & (block - 1):
        raise InvalidArgument(
            f"mkfs.block-size={block}: give a power of 2 up to {page}, the kernel's"
            " page size"
        )
    if image.inodes is not None and image.kind != "ext4":
        raise Unsupported(
            f"{image.kind} makes inodes as they are needed, their number can't be"
            " limited: leave inodes= away, or use fs=ext4"
        )


def make(
    image: Image, *, uid: int, gid: int, mode: int, record: bytes, scratch: str
) -> None:
    """Make the image with an empty root of this owner and mode; both carry ``record``.

    Made aside and moved into place whole, and on disk at return. Idempotent. Raise
    `AlreadyExists` for an image with another record, `NoSpace` when it does not fit.
    """
    path, part = image.path, image_mounts.part_of(image.path)
    if paths.identity(path) is None:
        clear_scratch(path, scratch)
        try:
            _make_part(image, _Root(uid, gid, mode, record), scratch)
            hit("image.ready")
            paths.move(part, path)
        except BaseException:
            # The error is the one to tell; `clear_scratch` is called again later.
            with contextlib.suppress(Exception):
                clear_scratch(path, scratch)
            raise
    found = attributes.read_record(path)
    if found is not None and found != record:
        raise AlreadyExists(f"{path} is the image of another volume; move it away")
    if attributes.write_record(path, record):
        sparse.sync(path)


def clear_scratch(path: str, scratch: str) -> None:
    """Take away what a `make` or `resize` that was cut short left. Idempotent.

    The image itself stays. Raise `InUse` while someone is in the scratch directory.
    """
    for place in (scratch, image_mounts.scratch_of(path)):
        image_mounts.clear(path, place)
    sparse.remove(image_mounts.part_of(path))


def attach(image: Image, mountpoint: str) -> None:
    """Mount the image; check it before, where it was not unmounted, and let it grow.

    Idempotent. A loop device that others still hold is mounted again instead of a
    second one. Space of deleted files goes back to the disk at once, but for a
    preallocated image. Raise `Unavailable` for an image that is damaged.
    """
    path, kind = image.path, image.kind
    if is_mounted(path, mountpoint, mountinfo.read()):
        return
    hit("image.attach")
    image_mounts.ensure_clean(path, kind)
    spans, length = superblocks.size(path, kind), sparse.length(path)
    if spans > length:
        raise Unavailable(
            f"{path} has {length} bytes and its file system {spans}: it was cut short;"
            " restore it from a backup"
        )
    device = image_mounts.mount(image, path, mountpoint)
    hit("image.attached")
    if not is_mounted(path, mountpoint, mountinfo.read()):
        raise Unavailable(f"{path} was mounted on {mountpoint} and is not there")
    if spans + filesystems.DEFAULT_BLOCK <= length:  # a resize was cut short
        try:
            loops.set_capacity(device)
            filesystems.grow(device, mountpoint, kind)
        except VolpluginError as error:  # smaller than asked for, but there
            event = "an image could not be grown"
            log(logger, logging.WARNING, event, path=path, error=str(error))


def detach(path: str, mountpoint: str) -> None:
    """Unmount the image and wait for its loop device to go.

    Idempotent; what else is mounted there stays. The device lasts, and is waited for
    only shortly, while a container still holds the mount in a namespace of its own.
    Raise `InUse` while a process has files open there.
    """
    detached = False
    while is_mounted(path, mountpoint, mountinfo.read()):
        mounts.unmount(mountpoint)
        detached = True
    if detached and not image_mounts.is_quiet(path):
        log(logger, logging.INFO, "others still hold an image", path=path)


def usage(image: Image, mountpoint: str | None) -> Usage:
    """Return what the image holds, or, unmounted, what it takes of the disk."""
    length, taken = sparse.length(image.path), sparse.taken(image.path)
    if mountpoint is None:
        return Usage(used=taken, available=max(length - taken, 0), size=length)
    try:
        found = os.statvfs(mountpoint)
    except OSError as error:
        raise from_os_error(error, f"measure {mountpoint}") from error
    available = found.f_bavail * found.f_frsize
    return Usage(
        # The file system's own tables count: what is not available is used.
        used=max(length - available, 0),
        available=available,
        size=length,
        inodes_used=found.f_files - found.f_ffree,
        inodes=found.f_files if image.kind == "ext4" else None,
        notes={"on disk": format_size(taken), "direct I/O": _direct_io(mountpoint)},
    )


def _make_part(image: Image, root: _Root, scratch: str) -> None:
    part = image_mounts.part_of(image.path)
    sparse.create(part, image.size, prealloc=image.prealloc)
    hit("image.file")
    filesystems.make(
        part,
        image.kind,
        label=os.path.basename(image.path).removesuffix(".img"),
        inodes=image.inodes,
        options=image.mkfs,
    )
    hit("image.mkfs")
    with image_mounts.mounted(image, part, scratch):
        try:
            # Docker copies an image's files into an empty volume only.
            with contextlib.suppress(FileNotFoundError):
                os.rmdir(os.path.join(scratch, "lost+found"))
            os.chown(scratch, root.uid, root.gid)
            os.chmod(scratch, root.mode)
        except OSError as error:
            raise from_os_error(error, f"set up the root of {image.path}") from error
        attributes.write_record(scratch, root.record)
    # mke2fs punches holes where it wants zeros.
    sparse.resize(part, image.size, prealloc=image.prealloc)


def _direct_io(mountpoint: str) -> str:
    found = mountinfo.at(mountpoint, mountinfo.read())
    return "yes" if found and loops.uses_direct_io(found.device) else "no"
