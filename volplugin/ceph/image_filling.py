"""File systems put into new images without mapping them.

mkfs works on a sparse file of this host, and what it wrote is sent through librbd: a
few hundred KiB for any size, as all that is zero is left out. So a volume can be made
on a host that has no mapper, and no device that could hang is involved.
"""

import collections
import errno
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import attrs

from volplugin.ceph.images import (
    OWNER,
    Image,
    Images,
    Secret,
    Shape,
    format_encryption,
)
from volplugin.errors import NoSpace, from_os_error
from volplugin.failpoints import hit
from volplugin.host import filesystems, sparse, superblocks

_BLOCK: Final = 64 << 10  # bytes that are left out together where all are zero
_ZEROS: Final = bytes(_BLOCK)
_RUN: Final = 1 << 20  # bytes of one write at most
_AT_ONCE: Final = 16  # writes under way


@attrs.frozen(kw_only=True)
class Contents:
    """The file system that an image is to get; its ``options`` are bytes by name."""

    kind: str
    label: str
    options: Mapping[str, str]


def make(
    images: Images,
    image: Image,
    shape: Shape,
    contents: Contents,
    *,
    owner: bytes,
    secret: Secret | None,
    scratch: str,
) -> None:
    """Make an image with a file system of ``shape.size`` bytes; on disk at return.

    The header of an encryption comes on top of that. ``scratch`` is a path for a file
    meanwhile, taken away at the end and, where a death left it, before. Not idempotent:
    after a failure the image is to be removed. Raise `AlreadyExists` where the image is
    there, else as `filesystems.make`.
    """
    sparse.remove(scratch)
    try:
        sparse.create(scratch, shape.size, prealloc=False)
        with ThreadPoolExecutor(1) as beside:
            formatted = beside.submit(
                filesystems.make,
                scratch,
                contents.kind,
                label=contents.label,
                options=contents.options,
            )
            images.create(image, shape)
            hit("rbd.image")
            formatted.result()
            hit("rbd.mkfs")
        images.write_through()
        with images.opened(image, f"fill image {image}") as handle:
            handle.metadata_set(OWNER, owner.decode())
            if secret is not None:
                header = format_encryption(handle, secret)
                handle.resize(shape.size + header)
            _send(scratch, handle)
            handle.flush()
        hit("rbd.filled")
    finally:
        sparse.remove(scratch)


def inspect(
    images: Images, image: Image, secret: Secret | None
) -> tuple[str | None, int]:
    """Return the kind of the file system in an image, and the bytes there are for it.

    The kind is ``ext4`` or ``xfs``, by the first bytes, or None. No effect.
    """
    doing = f"look for a file system in {image}"
    with images.opened(image, doing, read_only=True, secret=secret) as handle:
        size = handle.size()
        least = superblocks.TELLING
        begin: bytes = handle.read(0, least) if size >= least else bytes(least)
    return superblocks.kind_of(begin), size


def _send(path: str, handle: Any) -> None:
    under_way: collections.deque[Any] = collections.deque()
    try:
        for offset, data in _runs(path):
            if len(under_way) == _AT_ONCE:
                _finish(under_way.popleft())
            under_way.append(handle.aio_write(data, offset, lambda _: None))
        while under_way:
            _finish(under_way.popleft())
    finally:
        for completion in under_way:  # none may outlive the handle
            completion.wait_for_complete_and_cb()


def _finish(completion: Any) -> None:
    completion.wait_for_complete_and_cb()
    result = completion.get_return_value()
    if result >= 0:
        return
    error = OSError(-result, os.strerror(-result))
    doing = "write the file system into the image"
    if error.errno == errno.EDQUOT:
        raise NoSpace(f"{doing}: the pool is full") from error
    raise from_os_error(error, doing) from error


def _runs(path: str) -> Iterator[tuple[int, bytes]]:
    """Yield offset and bytes of all that is not zero, by runs."""
    start, run = 0, bytearray()
    for offset, block in _blocks(path):
        is_next = offset == start + len(run)
        if run and (not is_next or len(run) + len(block) > _RUN):
            yield start, bytes(run)
            run.clear()
        if not run:
            start = offset
        run += block
    if run:
        yield start, bytes(run)


def _blocks(path: str) -> Iterator[tuple[int, bytes]]:
    with open(path, "rb", buffering=0) as file:
        descriptor = file.fileno()
        for begin, end in sparse.extents(descriptor, os.fstat(descriptor).st_size):
            offset = begin
            while offset < end:
                block = os.pread(descriptor, min(_BLOCK, end - offset), offset)
                if block != _ZEROS[: len(block)]:
                    yield offset, block
                offset += len(block)
