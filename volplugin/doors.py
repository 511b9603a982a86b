"""What each plugin socket serves."""

from typing import Final

import attrs


@attrs.frozen(kw_only=True)
class Door:
    """What one plugin socket serves.

    ``default_backend`` is for volumes that name none; None means everyone's. Only
    volumes of ``backends`` exist there, None for all: dockerd takes each socket for a
    driver, and shows what two of them have twice. With ``shared_only`` only volumes of
    clusters exist there: the engine is told that they are the same ones on every host.
    """

    default_backend: str | None = None
    backends: tuple[str, ...] | None = None
    shared_only: bool = False

    def allows(self, backend: str) -> bool:
        """Tell whether volumes of this backend may exist here, as far as its name."""
        return self.backends is None or backend in self.backends


ANY_DOOR: Final = Door()
