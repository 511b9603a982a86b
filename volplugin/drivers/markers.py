"""Notes of volumes that live outside our root, so that a lost store can find them.

A marker is an empty directory ``adopted/NAME`` in the backend's place that carries the
volume's record as its xattr. The volume's own root carries it too, but `recover` could
not know where to look.
"""

import contextlib
import os
from collections.abc import Container, Iterator

from volplugin.drivers.driver import Found
from volplugin.host import attributes, paths


class Markers:
    """The markers of one backend."""

    def __init__(self, place: str) -> None:
        self._folder = os.path.join(place, "adopted")

    def add(self, name: str, record: bytes) -> None:
        """Note the volume ``name``; noting it again replaces the record."""
        paths.make_directories(self._folder, 0o711)
        marker = os.path.join(self._folder, name)
        paths.make_directory(marker, 0o700)
        attributes.write_record(marker, record)
        paths.sync(marker)

    def drop(self, name: str) -> None:
        """Forget the volume ``name``; unknown names are no error."""
        paths.remove_directory(os.path.join(self._folder, name))

    def found(self, known: Container[str]) -> Iterator[Found]:
        """Yield the records of all volumes noted but those named in ``known``."""
        for found in found_in(self._folder, known):
            yield Found(record=found.record)


def found_in(folder: str, known: Container[str]) -> Iterator[Found]:
    """Yield the records that directories in ``folder`` carry, but for ``known`` names.

    Names first, so that a start with thousands of volumes reads no record of any.
    """
    with contextlib.suppress(FileNotFoundError):
        for entry in sorted(os.listdir(folder)):
            if entry in known:
                continue
            path = os.path.join(folder, entry)
            record = attributes.read_record(path)
            if record is not None:
                yield Found(record=record, path=path)
