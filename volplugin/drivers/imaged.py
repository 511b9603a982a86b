"""Volumes that are file systems in image files, mounted from the first to the last use.

Below the root: ``images/ID.img``, whose guarded mountpoints are ``volumes/NAME``.
"""

import logging
import os
from collections.abc import Container, Iterable, Iterator, Sequence

from volplugin.drivers import mountpoints, ownership
from volplugin.drivers.driver import Found, Spec
from volplugin.drivers.folders import Folders, Root
from volplugin.drivers.markers import found_in
from volplugin.drivers.quota_options import QuotaOptions
from volplugin.errors import Unavailable, Unsupported, VolpluginError
from volplugin.failpoints import hit
from volplugin.host import attributes, guard, mountinfo, paths, sparse
from volplugin.host.mountinfo import Mount
from volplugin.logs import log
from volplugin.model import State, Usage, Volume
from volplugin.quota import images
from volplugin.quota.images import Image

logger = logging.getLogger(__name__)


class Imaged:
    """The images of one backend."""

    def __init__(self, folders: Folders) -> None:
        self._folders = folders
        self.directory = os.path.join(folders.root, "images")

    def open(self) -> None:
        """Make what all images need."""
        paths.make_directory(self.directory, 0o700)

    def check(self, options: QuotaOptions) -> None:
        """Refuse what no image can be."""
        images.check(self._image("new", options))

    def make(self, spec: Spec) -> None:
        """Make the image, and the mountpoint that claims the volume's name."""
        path = spec.volume.mountpoint
        if not ownership.is_of(spec, path):
            mountpoints.require_free(path)
        root = Root.asked(spec.options)
        images.make(
            self._image(spec.volume.id, spec.options),
            uid=root.uid,
            gid=root.gid,
            mode=root.mode,
            record=spec.record,
            scratch=self._folders.staged(spec.volume.id),
        )
        self._make_mountpoint(spec)

    def _make_mountpoint(self, spec: Spec) -> None:
        path = spec.volume.mountpoint
        paths.make_directory(path, 0o700)
        hit("quota.mountpoint")
        if not ownership.is_of(spec, path):  # else it is guarded, from an earlier call
            attributes.write_record(path, spec.record)
        guard.guard(path)
        hit("quota.guard")

    def remove(self, spec: Spec) -> None:
        """Throw the image away, or undo what `make` began."""
        volume = spec.volume
        self.detach(spec)
        images.clear_scratch(self._path(volume.id), self._folders.staged(volume.id))
        if not mountpoints.is_of_another(spec):
            mountpoints.take_back(spec, [volume.mountpoint])
        hit("quota.unguard")
        image = self._path(volume.id)
        if paths.identity(image) is not None:
            trashed = os.path.join(self._folders.trash, os.path.basename(image))
            paths.move(image, trashed)
            if volume.state is State.CREATING:
                os.unlink(trashed)
        hit("quota.trash")

    def attach(self, spec: Spec) -> None:
        """Mount the image, and check that it is this volume's."""
        volume = spec.volume
        table = mountinfo.read()
        if self.is_attached(volume, table):
            return
        image = self._path(volume.id)
        if paths.identity(image) is None:
            raise Unavailable(
                f"{image} is missing: restore it from a backup, or remove the volume"
            )
        if not mountpoints.require_ready(spec, table):
            self._make_mountpoint(spec)
        hit("quota.attach")
        images.attach(self._image(volume.id, spec.options), volume.mountpoint)
        hit("quota.mounted")
        if ownership.is_of(spec, volume.mountpoint) is False:
            images.detach(image, volume.mountpoint)
            raise Unavailable(f"{image} holds the files of another volume")

    def detach(self, spec: Spec) -> None:
        """Unmount the image; its loop device goes with the mount."""
        hit("quota.detach")
        images.detach(self._path(spec.volume.id), spec.volume.mountpoint)

    def is_attached(self, volume: Volume, table: Sequence[Mount]) -> bool:
        """Tell whether the image is mounted where the volume is."""
        return images.is_mounted(self._path(volume.id), volume.mountpoint, table)

    def plan_resize(self, spec: Spec, options: QuotaOptions, *, attached: bool) -> None:
        """Refuse what the image can't become."""
        if options.inodes != spec.options.inodes:
            raise Unsupported(
                "the inodes of an image were made with it and can't be changed: "
                "create a volume with more, and copy"
            )
        images.check_resize(
            self._image(spec.volume.id, spec.options),
            options.size or 0,
            attached=attached,
        )

    def resize(self, spec: Spec) -> None:
        """Make image and file system as large as the options say."""
        image = self._image(spec.volume.id, spec.options)
        place = spec.volume.mountpoint
        mounted = images.is_mounted(image.path, place, mountinfo.read())
        images.resize(image, place if mounted else None)
        if attributes.write_record(image.path, spec.record):
            sparse.sync(image.path)
        if mounted and attributes.write_record(place, spec.record):
            paths.sync(place)

    def measure(self, specs: Iterable[Spec]) -> dict[str, Usage]:
        """Return what the images hold, by volume id."""
        table = mountinfo.read()
        found = {}
        for spec in specs:
            place = spec.volume.mountpoint
            mounted = self.is_attached(spec.volume, table)
            image = self._image(spec.volume.id, spec.options)
            try:
                usage = images.usage(image, place if mounted else None)
            except (VolpluginError, OSError):
                continue  # it is missing: Mount tells, and `verify` did
            found[spec.volume.id] = usage
        return found

    def verify(self, specs: Iterable[Spec]) -> None:
        """Warn of images that are missing."""
        for spec in specs:
            image = self._path(spec.volume.id)
            if spec.volume.state is State.READY and paths.identity(image) is None:
                log(
                    logger,
                    logging.WARNING,
                    "its image is missing",
                    volume=spec.volume.name,
                    path=image,
                )

    def discover(self, known: Container[str]) -> Iterator[Found]:
        """Yield the records of the images but those of ``known`` names."""
        for found in found_in(self.directory, ()):
            if ownership.name_in(found.record) not in known:
                yield Found(record=found.record)

    def is_mountpoint(self, found: Found) -> bool:
        """Tell whether a record was found on the mountpoint of an image."""
        return paths.identity(self._path(ownership.id_in(found.record))) is not None

    def _path(self, volume_id: str) -> str:
        return os.path.join(self.directory, f"{volume_id}.img")

    def _image(self, volume_id: str, options: QuotaOptions) -> Image:
        return Image(
            path=self._path(volume_id),
            kind=options.fs or images.DEFAULT_KIND,
            size=options.size or 0,
            inodes=options.inodes,
            prealloc=options.prealloc,
            mkfs=options.mkfs,
        )
