"""Snapshots of images, and images that are clones of them.

A clone made of a volume as it is needs a snapshot of its own, which nobody asked for:
it is named for the clone, is not listed, and goes with it (`drop_unneeded`).
"""

import contextlib
import datetime as dt
import json
from collections.abc import Sequence
from typing import Any, Final

import attrs

from volplugin.ceph.bindings import load
from volplugin.ceph.images import Image, Images, Shape, feature_bits
from volplugin.errors import (
    AlreadyExists,
    InUse,
    InvalidArgument,
    NotFound,
)
from volplugin.failpoints import hit

OWN_PREFIX: Final = "volplugin-clone-"
"""How the names of snapshots begin that clones of a whole volume need."""

_YOUNG: Final = dt.timedelta(minutes=10)  # a clone of it may be under way on any host


@attrs.frozen(kw_only=True)
class ImageSnapshot:
    """A snapshot as the cluster tells it; ``created_at`` is in UTC."""

    name: str
    created_at: dt.datetime
    size: int


@attrs.frozen(kw_only=True)
class Origin:
    """What an image is a clone of."""

    image: Image
    snapshot: str


def require_name(name: str) -> None:
    """Raise `InvalidArgument` for what no snapshot of a user can be called."""
    if not name or len(name) > 128 or not name.isprintable() or {"@", "/"} & set(name):
        raise InvalidArgument(
            f"{name!r} is no name for a snapshot: give 1 to 128 characters without @"
            " and /"
        )
    if name.startswith(OWN_PREFIX):
        raise InvalidArgument(f"names that begin with {OWN_PREFIX} are volplugin's own")


def snapshots(images: Images, image: Image) -> list[ImageSnapshot]:
    """Return the snapshots that users made, oldest first. No effect."""
    doing = f"list the snapshots of {image}"
    with images.opened(image, doing, read_only=True) as handle:
        return [each for each in _all(handle) if _is_users(each.name)]


def take(images: Images, image: Image, name: str) -> None:
    """Make a snapshot, also while another client has the image open.

    Raise `AlreadyExists` for a name that is taken.
    """
    with images.opened(image, f"take snapshot {image}@{name}") as handle:
        if name in {each.name for each in _all(handle)}:
            raise AlreadyExists(
                f"there is a snapshot {name!r} already: delete it, or choose another"
                " name"
            )
        handle.create_snap(name)


def drop(images: Images, image: Image, name: str) -> None:
    """Delete a snapshot. Raise `NotFound`, or `InUse` naming the clones of it."""
    with images.opened(image, f"delete snapshot {image}@{name}") as handle:
        known = [each.name for each in _all(handle)]
        if name not in known:
            raise NotFound(
                f"there is no snapshot {name!r}; there are"
                f" {', '.join(each for each in known if _is_users(each)) or 'none'}"
            )
        clones = _children(handle, name)
        if clones:
            raise InUse(
                f"snapshot {name!r} is needed by its clones"
                f" {', '.join(owners(images, clones))}: remove them first"
            )
        _remove(handle, name)


def clones_of(images: Images, image: Image) -> list[str]:
    """Name the volumes that are clones of an image, or of a snapshot of it.

    Those that were removed and wait in the trash are not counted. No effect.
    """
    doing = f"look for clones of {image}"
    try:
        with images.opened(image, doing, read_only=True) as handle:
            clones = [
                clone
                for each in _all(handle)
                for clone in _children(handle, each.name)
                if not clone["trash"]
            ]
    except NotFound:
        return []
    return owners(images, clones)


def owners(images: Images, clones: Sequence[Any]) -> list[str]:
    """Return the names of the volumes that clones are, or of images that are none."""
    names = set()
    for clone in clones:
        image = Image(pool=clone["pool"], name=clone["image"], id=clone["id"])
        try:
            described = images.describe(image)
            record = json.loads((described and described.owner) or b"{}")
            names.add(str(record["name"]))
        except (ValueError, KeyError, TypeError):
            names.add(str(image))
    return sorted(names)


def clone(images: Images, origin: Origin, image: Image, shape: Shape) -> None:
    """Make ``image`` a clone of a snapshot, as large as that; its owner isn't set.

    Raise `AlreadyExists` for an image that is there, `NotFound` for a snapshot or image
    that is not.
    """
    rbd = load("rbd")
    doing = f"clone {origin.image}@{origin.snapshot}"
    # The snapshot needs no protection, see `cluster`: librbd 16 was seen to abort when
    # an image that is mapped elsewhere was opened to write right after a snapshot.
    with (
        images.pool(origin.image.pool, doing) as theirs,
        images.cluster.io(image.pool, images.namespace) as ours,
    ):
        rbd.RBD().clone(
            theirs,
            origin.image.name,
            origin.snapshot,
            ours,
            image.name,
            features=feature_bits(shape.features) | rbd.RBD_FEATURE_LAYERING,
            order=shape.object_size.bit_length() - 1,
            data_pool=shape.data_pool,
        )


def origin_of(images: Images, image: Image) -> Origin | None:
    """Return what an image is a clone of; None for one that is none, or is missing."""
    rbd = load("rbd")
    try:
        with images.opened(image, f"look at image {image}", read_only=True) as handle:
            try:
                found = handle.get_parent_image_spec()
                parent = handle.parent_id()
            except rbd.ImageNotFound:
                return None
    except NotFound:
        return None
    return Origin(
        image=Image(pool=found["pool_name"], name=found["image_name"], id=parent),
        snapshot=found["snap_name"],
    )


def drop_unneeded(images: Images, origin: Origin) -> None:
    """Delete the snapshot that a clone had for itself, once nobody needs it.

    Idempotent; one that a user made stays.
    """
    if _is_users(origin.snapshot):
        return
    hit("rbd.unneeded")
    with contextlib.suppress(NotFound, InUse):
        _drop_own(images, origin.image, origin.snapshot)


def sweep(images: Images, image: Image) -> None:
    """Delete the snapshots in ``image`` whose clones a death took or never let be."""
    doing = f"look for left snapshots of {image}"
    try:
        with images.opened(image, doing, read_only=True) as handle:
            before = dt.datetime.now(dt.UTC) - _YOUNG
            left = [
                each.name
                for each in _all(handle)
                if not _is_users(each.name) and each.created_at < before
            ]
    except NotFound:
        return
    for name in left:
        drop_unneeded(images, Origin(image=image, snapshot=name))


def clear(images: Images, image: Image) -> bool:
    """Delete all snapshots of an image; return False where clones need one."""
    done = True
    with images.opened(image, f"delete the snapshots of {image}") as handle:
        for each in _all(handle):
            if _children(handle, each.name):
                done = False
            else:
                _remove(handle, each.name)
    return done


def _drop_own(images: Images, image: Image, name: str) -> None:
    doing = f"delete snapshot {image}@{name}"
    with images.opened(image, doing) as handle:
        known = {each.name for each in _all(handle)}
        if name in known and not _children(handle, name):
            _remove(handle, name)


def _is_users(name: str) -> bool:
    return not name.startswith(OWN_PREFIX)


def _all(handle: Any) -> list[ImageSnapshot]:
    user = load("rbd").RBD_SNAP_NAMESPACE_TYPE_USER
    found = [
        ImageSnapshot(
            name=each["name"],
            created_at=handle.get_snap_timestamp(each["id"]).replace(tzinfo=dt.UTC),
            size=each["size"],
        )
        for each in handle.list_snaps()
        if each["namespace"] == user
    ]
    return sorted(found, key=lambda each: each.created_at)


def _children(handle: Any, snapshot: str) -> list[Any]:
    handle.set_snap(snapshot)
    try:
        return list(handle.list_children2())
    finally:
        handle.set_snap(None)


def _remove(handle: Any, name: str) -> None:
    if handle.is_protected_snap(name):
        handle.unprotect_snap(name)
    handle.remove_snap(name)
