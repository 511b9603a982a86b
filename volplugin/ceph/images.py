"""Images of a cluster: made, looked at, claimed, resized and thrown away.

Terms: an *image* is RBD's block device, known by pool and name; its *owner* is the
record of the volume whose it is, kept in the image itself under one metadata key, so
that an image tells whose it is without the record object. An image that has no owner
is none of ours.

Nothing is kept in memory: each call opens the image it is about. All may block for the
cluster's timeout, a few times over where one call is several operations; each says of
itself whether it can be repeated.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Final

import attrs

from volplugin.ceph.bindings import load
from volplugin.ceph.cluster import Cluster
from volplugin.errors import (
    AlreadyExists,
    InUse,
    InvalidArgument,
    NotFound,
    Unavailable,
    Unsupported,
)

OWNER: Final = "volplugin"
"""The metadata key of an image's owner. RBD keeps ``conf_`` for itself."""

_ENCRYPTION: Final = {"luks1": "LUKS1", "luks2": "LUKS2"}


@attrs.frozen(kw_only=True)
class Image:
    """An image's name; ``id`` is RBD's own, for images in the trash, which have it."""

    pool: str
    name: str
    id: str = ""

    def __str__(self) -> str:
        return f"{self.pool}/{self.name}"


@attrs.frozen(kw_only=True)
class Shape:
    """What a new image is made like; ``features`` are RBD's names of them."""

    size: int
    features: Sequence[str]
    object_size: int
    data_pool: str | None = None


@attrs.frozen(kw_only=True)
class Secret:
    """How an image is encrypted: ``luks1`` or ``luks2``, and by which passphrase."""

    format: str
    passphrase: bytes = attrs.field(repr=False)


@attrs.frozen(kw_only=True)
class Description:
    """What an image tells of itself. ``size`` includes the header of an encryption.

    ``watchers`` are the addresses of clients that have it open to write, without ours.
    """

    id: str
    size: int
    owner: bytes | None
    watchers: tuple[str, ...]
    is_clone: bool


class Images:
    """The images of one cluster, in one RBD namespace of each pool."""

    def __init__(self, cluster: Cluster, namespace: str) -> None:
        self.cluster = cluster
        self.namespace = namespace

    @contextlib.contextmanager
    def pool(self, name: str, doing: str) -> Iterator[Any]:
        """Yield the I/O context of a pool, with all errors in the body made ours."""
        with (
            self.cluster.io(name, self.namespace) as context,
            self.cluster.errors(doing),
            _of_images(doing),
        ):
            yield context

    @contextlib.contextmanager
    def opened(
        self,
        image: Image,
        doing: str,
        *,
        read_only: bool = False,
        secret: Secret | None = None,
        snapshot: str | None = None,
    ) -> Iterator[Any]:
        """Yield the open `rbd.Image`, and close it; errors in the body are made ours.

        Opened read-only it has no watcher and no lock of ours. Raise `NotFound` where
        it is missing, `InvalidArgument` for a wrong passphrase.
        """
        rbd = load("rbd")
        by = {"image_id": image.id} if image.id else {"name": image.name}
        with (
            self.pool(image.pool, doing) as context,
            contextlib.closing(
                rbd.Image(context, **by, snapshot=snapshot, read_only=read_only)
            ) as handle,
        ):
            if secret is not None:
                _load_encryption(handle, image, secret)
            yield handle

    def write_through(self) -> None:
        """Have images opened from now on report each write that fails.

        In librbd's cache, which is on by default, a failed write would be told to
        nobody: neither by the flush nor by the close.
        """
        self.cluster.rados().conf_set("rbd_cache", "false")

    @contextlib.contextmanager
    def view(self, image: Image) -> Iterator["View"]:
        """Yield the image open to be looked at, as often as one likes. No effect.

        Opening takes longer than all the looks. Raise `NotFound` where it is missing.
        """
        with self.opened(image, f"look at image {image}", read_only=True) as handle:
            yield View(self, image, handle)

    def describe(self, image: Image) -> Description | None:
        """Return what the image tells, or None if it is missing. No effect."""
        try:
            with self.view(image) as view:
                return view.describe()
        except NotFound:
            return None

    def watchers(self, image: Image) -> tuple[str, ...]:
        """Return who has the image open to write, without this connection. No effect.

        A missing image has none.
        """
        try:
            with self.view(image) as view:
                return view.watchers()
        except NotFound:
            return ()

    def require_place(self, pool: str) -> None:
        """Raise `InvalidArgument` unless images can be made in the pool. No effect."""
        rbd = load("rbd")
        doing = f"look at pool {pool}"
        if not self.namespace:
            with self.pool(pool, doing):
                return
        with self.cluster.io(pool) as context, self.cluster.errors(doing):
            if not rbd.RBD().namespace_exists(context, self.namespace):
                place = f"{pool}/{self.namespace}"
                raise InvalidArgument(
                    f"pool {pool} has no namespace {self.namespace!r}: make it by `rbd"
                    f" namespace create {place}`"
                )

    def create(self, image: Image, shape: Shape) -> None:
        """Make the image, all zeros, without an owner.

        Not idempotent: raise `AlreadyExists` for one that is there.
        """
        rbd = load("rbd")
        doing = f"make image {image}"
        with self.pool(image.pool, doing) as context:
            rbd.RBD().create(
                context,
                image.name,
                shape.size,
                order=shape.object_size.bit_length() - 1,
                old_format=False,
                features=feature_bits(shape.features),
                data_pool=shape.data_pool,
            )

    def claim(self, image: Image, owner: bytes) -> None:
        """Write the owner of the image. Idempotent."""
        with self.opened(image, f"mark image {image}") as handle:
            if _owner(handle) != owner:
                handle.metadata_set(OWNER, owner.decode())

    def disclaim(self, image: Image) -> None:
        """Take the owner off the image; a missing one, or none, is success."""
        try:
            with self.opened(image, f"release image {image}") as handle:
                if _owner(handle) is not None:
                    handle.metadata_remove(OWNER)
        except NotFound:
            return

    def grow(self, image: Image, size: int, secret: Secret | None = None) -> None:
        """Make the image hold at least ``size`` bytes beside an encryption's header.

        Idempotent; it never gets smaller. Also while another client has it open.
        """
        doing = f"grow image {image}"
        with self.opened(image, doing, read_only=True, secret=secret) as handle:
            missing = size - handle.size()
        if missing <= 0:
            return
        with self.opened(image, doing) as handle:
            handle.resize(handle.size() + missing)

    def remove(self, image: Image) -> None:
        """Delete an image that never was of use, at once, however much of it is made.

        Idempotent. Raise `InUse` while a client has it open.
        """
        rbd = load("rbd")
        doing = f"remove image {image}"
        with self.pool(image.pool, doing) as context:
            with contextlib.suppress(rbd.ImageNotFound):
                rbd.RBD().remove(context, image.name)
            # A create that was cut short may have made the object of its name alone.
            with contextlib.suppress(load("rados").ObjectNotFound):
                context.remove_object(f"rbd_id.{image.name}")


class View:
    """An image that is open to be looked at; each look asks the cluster."""

    def __init__(self, images: Images, image: Image, handle: Any) -> None:
        self._cluster = images.cluster
        self._image = image
        self._handle = handle

    @property
    def id(self) -> str:
        """RBD's own name of the image, which no other ever has."""
        found: str = self._handle.id()
        return found

    def describe(self) -> Description:
        """Return what the image tells; its size is that from when it was opened."""
        return Description(
            id=self.id,
            size=self._handle.size(),
            owner=_owner(self._handle),
            watchers=self.watchers(),
            is_clone=_is_clone(self._handle),
        )

    def watchers(self) -> tuple[str, ...]:
        """Return as `Images.watchers`; an image that was deleted meanwhile has none."""
        doing = f"ask who has image {self._image}"
        try:
            with self._cluster.errors(doing), _of_images(doing):
                found = {each["addr"] for each in self._handle.watchers_list()}
        except NotFound:
            return ()
        return tuple(sorted(found - self._cluster.addresses()))


@contextlib.contextmanager
def _of_images(doing: str) -> Iterator[None]:
    """Make errors of ours of what librbd alone says; `Cluster.errors` has the rest."""
    rbd = load("rbd")
    try:
        yield
    except rbd.ImageNotFound as error:
        raise NotFound(f"{doing}: it is missing") from error
    except rbd.ImageExists as error:
        raise AlreadyExists(f"{doing}: it exists") from error
    except rbd.ImageHasSnapshots as error:
        raise InUse(f"{doing}: it has snapshots that clones need") from error
    except rbd.ImageBusy as error:
        raise InUse(
            f"{doing}: a client has it open; one that died is forgotten by the cluster"
            " after half a minute"
        ) from error
    except rbd.ReadOnlyImage as error:
        # What librbd says when it can't get the image's lock in time.
        raise Unavailable(
            f"{doing}: its lock was not to be had; another client holds it, or the"
            " cluster does not answer"
        ) from error
    except rbd.FunctionNotSupported as error:
        raise Unsupported(f"{doing}: {error}") from error
    except rbd.InvalidArgument as error:
        raise InvalidArgument(f"{doing}: the cluster refuses it") from error


def feature_bits(names: Sequence[str]) -> int:
    """Return RBD's number for features by name."""
    rbd = load("rbd")
    bits = 0
    for name in names:
        bits |= getattr(rbd, f"RBD_FEATURE_{name.upper().replace('-', '_')}")
    return bits


def format_encryption(handle: Any, secret: Secret) -> int:
    """Encrypt an empty open image; what is written by ``handle`` is, from now on.

    Return the bytes that the header takes of it.
    """
    rbd = load("rbd")
    before = handle.size()
    handle.encryption_format(
        getattr(rbd, f"RBD_ENCRYPTION_FORMAT_{_ENCRYPTION[secret.format]}"),
        secret.passphrase,
    )
    header: int = before - handle.size()
    return header


def _load_encryption(handle: Any, image: Image, secret: Secret) -> None:
    rbd = load("rbd")
    try:
        handle.encryption_load(
            getattr(rbd, f"RBD_ENCRYPTION_FORMAT_{_ENCRYPTION[secret.format]}"),
            secret.passphrase,
        )
    except (rbd.PermissionError, rbd.InvalidArgument) as error:
        raise InvalidArgument(
            f"image {image} is not encrypted by {secret.format} with this passphrase:"
            " look at encryption= and encryption-key="
        ) from error


def _owner(handle: Any) -> bytes | None:
    try:
        found: str = handle.metadata_get(OWNER)
    except KeyError:
        return None
    return found.encode()


def _is_clone(handle: Any) -> bool:
    rbd = load("rbd")
    try:
        handle.parent_info()
    except rbd.ImageNotFound:
        return False
    return True
