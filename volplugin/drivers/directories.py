"""Which directories a user may give to a volume with ``mount=``."""

import re
from collections.abc import Iterable, Sequence
from typing import Final

from volplugin.errors import InvalidArgument
from volplugin.host import paths
from volplugin.host.mountinfo import is_within

# Nothing at, above or below these may be a volume: a container that writes there, or a
# chown by its image, breaks the host.
_HOST: Final = (
    *("/bin", "/boot", "/dev", "/etc", "/lib", "/lib32", "/lib64", "/libx32", "/proc"),
    *("/run", "/sbin", "/sys", "/usr"),
)
# The engines' own state.
_ENGINES: Final = (
    *("/var/lib/docker", "/var/lib/containerd", "/var/lib/containers"),
    *("/var/lib/pouch", "/var/lib/kubelet", "/var/lib/rancher"),
)
_SYSTEM: Final = (*_HOST, *_ENGINES)
_ENGINE_VOLUME: Final = re.compile(r"/volumes/[^/]+/_data$")
# These hold other people's directories: not volumes themselves, but what is below is.
_SHARED: Final = (
    *("/", "/home", "/media", "/mnt", "/opt", "/root", "/srv", "/var", "/var/lib"),
    *("/var/log", "/var/cache", "/var/spool", "/var/opt"),
    *("/tmp", "/var/tmp"),  # noqa: S108  they are refused, not used
)


def overlap(path: str, directories: Iterable[str]) -> str | None:
    """Return the first of ``directories`` that is, contains or lies in ``path``."""
    for directory in directories:
        if is_within(path, directory) or is_within(directory, path):
            return directory
    return None


def require_takeable(path: str) -> None:
    """Refuse ``path`` as a directory that is moved away to become a volume.

    Of the engines' own directories only ``volumes/NAME/_data`` is one: a volume of
    Docker's local driver. Raise `InvalidArgument`, also for a symbolic link on the way.
    """
    engine = overlap(path, _ENGINES)
    if (
        path in _SHARED
        or overlap(path, _HOST) is not None
        or (engine is not None and not _ENGINE_VOLUME.search(path))
    ):
        raise InvalidArgument(
            f"{path} is, or has a part in, a system directory: it can't become a volume"
        )
    paths.missing_directories(path)


def require_allowed(path: str, allow: Sequence[str] | None) -> None:
    """Refuse ``path`` as a volume's directory unless it is safe and allowed.

    ``allow`` lists the directories at or below which it must lie; None allows all.
    A path that leads through a symbolic link is refused too: what it means can change
    between the check and the mount. Raise `InvalidArgument`.
    """
    system = overlap(path, _SYSTEM)
    if path in _SHARED or system is not None:
        why = "is" if system in (path, None) else f"overlaps {system},"
        raise InvalidArgument(
            f"mount={path} {why} a system directory: give the volume a directory of "
            f"its own, such as /mnt/NAME"
        )
    if allow is not None and not any(is_within(path, place) for place in allow):
        raise InvalidArgument(
            f"mount={path} is not allowed on this host: the backend's 'allow' names "
            f"{', '.join(allow) or 'no directory'}"
        )
    paths.missing_directories(path)  # refuses symbolic links and files on the way
