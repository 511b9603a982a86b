"""Images thrown away: RBD's trash at once, their bytes in the background.

In the trash an image keeps its id, name, owner and snapshots, and no client can open it
by its name. Any host may empty it; two that do so at once only get in each other's way.
"""

import contextlib
import logging
import re
from collections.abc import Callable, Iterator
from typing import Final

from volplugin.ceph import image_snapshots
from volplugin.ceph.bindings import load
from volplugin.ceph.images import Image, Images
from volplugin.errors import InUse, NotFound, VolpluginError
from volplugin.failpoints import hit
from volplugin.logs import log

logger = logging.getLogger(__name__)

_OURS: Final = re.compile(r".+\.[0-9a-f]{12}")


def throw_away(images: Images, image: Image) -> None:
    """Move the image into the trash. Idempotent.

    Raise `InUse` naming the clients that have it open: librbd would take it from under
    them.
    """
    rbd = load("rbd")
    described = images.describe(image)
    if described is None:
        return
    if described.watchers:
        raise InUse(
            f"image {image} is open at {', '.join(described.watchers)}: unmap it there;"
            " a client that died is forgotten by the cluster after half a minute"
        )
    doing = f"move image {image} to the trash"
    try:
        with images.pool(image.pool, doing) as context:
            rbd.RBD().trash_move(context, image.name)
    except NotFound:
        return


def empty(images: Images, pool: str, stop: Callable[[], bool]) -> bool:
    """Delete the images in the trash of a pool that were volumes; True if all went.

    What can't be deleted yet, such as what has clones, is left for the next call.
    Blocks for as long as that takes, or until ``stop`` says so.
    """
    done = True
    # Clones before what they were made of, in as many rounds as that needs.
    left = list(_thrown_away(images, pool))
    while left:
        kept = []
        for image in left:
            if stop():
                return False
            if not _delete(images, image):
                kept.append(image)
        if len(kept) == len(left):
            done = False
            break
        left = kept
    return done


def _thrown_away(images: Images, pool: str) -> Iterator[Image]:
    rbd = load("rbd")
    with images.pool(pool, f"list the trash of pool {pool}") as context:
        entries = list(rbd.RBD().trash_list(context))
    for entry in entries:
        if not _OURS.fullmatch(entry["name"]):
            continue
        image = Image(pool=pool, name=entry["name"], id=entry["id"])
        described = images.describe(image)
        # One without a header was deleted half way, by a host that died of it.
        if described is None or described.owner is not None:
            yield image


def _delete(images: Images, image: Image) -> bool:
    rbd = load("rbd")
    try:
        origin = None
        with contextlib.suppress(NotFound):  # its header is gone, and all in it
            if not image_snapshots.clear(images, image):
                return False
            origin = image_snapshots.origin_of(images, image)
        hit("rbd.purge")
        with images.pool(image.pool, f"delete image {image}") as context:
            rbd.RBD().trash_remove(context, image.id)
        if origin is not None:
            image_snapshots.drop_unneeded(images, origin)
    except NotFound:
        return True  # another host was first
    except VolpluginError as error:
        event = "a removed image can't be deleted yet"
        log(logger, logging.WARNING, event, image=str(image), error=str(error))
        return False
    return True
