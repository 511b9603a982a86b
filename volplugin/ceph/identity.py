"""Who this host is to others: a number drawn once, kept in the backend's own place."""

import contextlib
import os
import uuid

from volplugin.errors import Unavailable, from_os_error
from volplugin.host import paths


def ensure(place: str) -> str:
    """Return the identity kept in ``place``, drawn at the first call. Idempotent.

    It goes with the directory: a copy of that on another host would be taken for this
    one, and both would share its volumes.
    """
    path = os.path.join(place, "identity")
    found = _read(path)
    if found is not None:
        return found
    paths.make_directories(place, 0o711)
    fresh = f"{path}.{uuid.uuid4().hex}"
    try:
        with open(fresh, "w", encoding="ascii") as file:
            file.write(f"{uuid.uuid4()}\n")
            file.flush()
            os.fsync(file.fileno())
        # A link, unlike a rename, does not replace what another thread was quicker at.
        with contextlib.suppress(FileExistsError):
            os.link(fresh, path)
        os.unlink(fresh)
    except OSError as error:
        raise from_os_error(error, f"write {path}") from error
    paths.sync(place)
    found = _read(path)
    if found is None:
        raise Unavailable(f"{path} was written and is not there")
    return found


def _read(path: str) -> str | None:
    try:
        with open(path, encoding="ascii") as file:
            text = file.read().strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise Unavailable(f"read {path}: {error}") from error
    try:
        return str(uuid.UUID(text))
    except ValueError as error:
        raise Unavailable(
            f"{path} holds {text[:80]!r}, which is no identity: remove it while no"
            f" volume of the backend is attached on this host"
        ) from error
