"""Making the images of volumes larger and smaller, whatever dies meanwhile."""

from volplugin.errors import InUse, InvalidArgument, Unavailable
from volplugin.failpoints import hit
from volplugin.host import attributes, filesystems, loops, sparse, superblocks
from volplugin.quota import image_mounts
from volplugin.quota.image_mounts import Image
from volplugin.sizes import format_size


def check_resize(image: Image, size: int, *, attached: bool) -> None:
    """Refuse ``size`` for the image if it can't have it. No effect.

    Raise `Unsupported` to make XFS smaller, `InUse` to make a mounted image so, and
    `NoSpace` with both figures when what it holds does not fit.
    """
    require_minimum(image.kind, size)
    if size < image.size:
        _require_shrinkable(image, attached=attached)
        if superblocks.is_clean(image.path, image.kind):
            filesystems.require_fits(image.path, size)


def resize(image: Image, mountpoint: str | None) -> None:
    """Make the image ``image.size`` bytes large; ``mountpoint`` is where it is mounted.

    Idempotent: also finishes or takes back what was cut short. It grows mounted, for a
    moment in a directory beside it where it is not; it is made smaller in a copy that
    takes its place, so the disk must have room for both meanwhile. Errors as for
    `check_resize`, and `Unsupported` for what can't grow.
    """
    path = image.path
    image_mounts.clear(path, image_mounts.scratch_of(path))
    sparse.remove(image_mounts.part_of(path))
    if image.size >= sparse.length(path) or image.size >= _span(image, mountpoint):
        if mountpoint is None:
            image_mounts.ensure_clean(path, image.kind)
        sparse.resize(path, image.size, prealloc=image.prealloc)
        hit("image.resize")
        for device in loops.devices_of(path):
            loops.set_capacity(device)
        if mountpoint is not None:
            device = _device(path, mountpoint)
            filesystems.grow(device, mountpoint, image.kind)
        elif superblocks.size(path, image.kind) < image.size:
            place = image_mounts.scratch_of(path)
            with image_mounts.mounted(image, path, place) as device:
                filesystems.grow(device, place, image.kind)
        return
    _require_shrinkable(image, attached=mountpoint is not None)
    try:
        _shrink(image)
    finally:
        sparse.remove(image_mounts.part_of(path))


def require_minimum(kind: str, size: int) -> None:
    """Raise `InvalidArgument` below the size that ``kind`` can be made with."""
    minimum = filesystems.MINIMUM[kind]
    if size < minimum:
        raise InvalidArgument(
            f"size={format_size(size)} is too small for {kind}: give at least"
            f" {format_size(minimum)}"
        )


def _shrink(image: Image) -> None:
    path, part = image.path, image_mounts.part_of(image.path)
    image_mounts.ensure_clean(path, image.kind)
    filesystems.require_fits(path, image.size)
    sparse.copy(path, part)
    filesystems.shrink(part, image.kind, image.size)
    sparse.resize(part, image.size, prealloc=image.prealloc)
    record = attributes.read_record(path)
    hit("image.shrunk")
    sparse.replace(part, path)
    if record is not None and attributes.write_record(path, record):
        sparse.sync(path)


def _require_shrinkable(image: Image, *, attached: bool) -> None:
    filesystems.require_shrinkable(image.kind)
    if attached or loops.devices_of(image.path):
        raise InUse(
            "an image can't be made smaller while it is mounted: stop the containers"
            " that use it and try again"
        )


def _span(image: Image, mountpoint: str | None) -> int:
    # What must be known for sure before the file is cut: a log that is to be replayed
    # may say more than the superblock.
    path, kind = image.path, image.kind
    if mountpoint is not None:
        return superblocks.size_mounted(_device(path, mountpoint), mountpoint, kind)
    if loops.devices_of(path):
        _require_shrinkable(image, attached=True)
    image_mounts.ensure_clean(path, kind)
    if kind == "ext4":
        return superblocks.size(path, kind)
    place = image_mounts.scratch_of(path)
    with image_mounts.mounted(image, path, place) as device:
        return superblocks.size_mounted(device, place, kind)


def _device(path: str, mountpoint: str) -> str:
    devices = loops.devices_of(path)
    if not devices:
        raise Unavailable(f"{path} is not mounted on {mountpoint}")
    return devices[0]
