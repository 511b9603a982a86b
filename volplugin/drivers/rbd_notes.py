"""What is noted of an RBD volume when it is planned: its image, and how to mount it.

The notes are the volume's facts. They go with its record to every host, so nothing in
them may be one host's alone; none of them ever changes.
"""

from collections.abc import Mapping
from enum import Enum
from typing import Any

import attrs

from volplugin.ceph.images import Image
from volplugin.errors import Unavailable
from volplugin.model import Volume


class Origin(Enum):
    """Where the file system of a volume comes from."""

    NEW = "new"
    CLONE = "clone"
    ADOPTED = "adopted"


@attrs.frozen(kw_only=True)
class Notes:
    """The notes of one volume.

    ``size`` are the bytes it was made with, without the header of an encryption.
    ``image_id`` is RBD's id of an adopted image: one that took its name since is
    another. ``snapshot`` is what a clone was made of, if the user named one.
    """

    pool: str
    image: str
    fs: str
    size: int
    access: str = "rw"
    origin: Origin = Origin.NEW
    image_id: str = ""
    snapshot: str = ""
    encryption: str = ""
    encryption_key: str = ""

    @property
    def place(self) -> Image:
        """The image by pool and name."""
        return Image(pool=self.pool, name=self.image)

    @property
    def is_read_only(self) -> bool:
        """Whether no host may write."""
        return self.access == "ro"

    def facts(self) -> Mapping[str, str]:
        """Return the notes as facts, without those that say nothing."""
        written = {
            field.name.replace("_", "-"): _text(getattr(self, field.name))
            for field in attrs.fields(Notes)
        }
        return {key: text for key, text in written.items() if text}


def notes_of(volume: Volume) -> Notes:
    """Read back the notes of a volume.

    Raise `Unavailable` for facts that are none, as in the record of another driver.
    """
    known = {field.name for field in attrs.fields(Notes)}
    given: dict[str, Any] = {
        name: text
        for key, text in volume.facts.items()
        if (name := key.replace("-", "_")) in known
    }
    try:
        given["size"] = int(given["size"])
        given["origin"] = Origin(given.get("origin", Origin.NEW.value))
        return Notes(**given)
    except (KeyError, ValueError, TypeError) as error:
        raise Unavailable(
            f"the record of {volume.name} is none of an RBD volume: {volume.facts}"
        ) from error


def size_of(notes: Notes, options: Any) -> int:
    """Return how many bytes the volume is to have: as it was resized, or made."""
    asked: int | None = options.size
    return notes.size if asked is None else asked


def _text(value: object) -> str:
    return str(value.value) if isinstance(value, Origin) else str(value)
