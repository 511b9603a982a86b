"""What each plugin socket serves."""

from typing import Final

import attrs


@attrs.frozen(kw_only=True)
class Door:
    """What one plugin socket serves.

    ``default_backend`` is for volumes that name none; None means everyone's. With
    ``shared_only`` only volumes of clusters exist there: the engine is told that they
    are the same ones on every host.
    """

    default_backend: str | None = None
    shared_only: bool = False


ANY_DOOR: Final = Door()
