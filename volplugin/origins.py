"""Volumes of others as they lie on disk: Docker's own, local-persist's, folders.

Read as files, so that neither the engine nor the plugin need run. What can't be taken
over is told of with its reason and not left out.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import attrs

from volplugin.errors import InvalidArgument, from_os_error
from volplugin.parsers import quote

DOCKER_ROOT: Final = "/var/lib/docker"
STATE: Final = os.path.join("plugin-data", "local-persist.json")
"""Where local-persist keeps what it knows, below Docker's root."""

# As a driver names what it is about to delete.
_GOING: Final = re.compile(r"\.(.+)\.volplugin-[0-9a-f]{32}", re.DOTALL)


@attrs.frozen(kw_only=True)
class Origin:
    """A directory that others have as the volume ``name``.

    ``options`` are those that the new volume needs; ``refusal`` is why it can't be one.
    """

    name: str
    path: str
    options: Mapping[str, str] = attrs.field(factory=dict)
    refusal: str | None = None


def of_docker(docker_root: str) -> Sequence[Origin]:
    """Return the volumes of Docker's local driver, by name.

    They lie in ``volumes/NAME/_data``; ``opts.json`` beside that has what a user gave
    with ``-o``. Those that a container has, be it stopped, are refused: it would not
    start any more, and Docker would not forget the volume.
    """
    root = _resolved(docker_root, "--docker-root")
    folder = os.path.join(root, "volumes")
    users = _containers(root, "local")
    found = []
    for name in _folders(folder):
        path = os.path.join(folder, name, "_data")
        options = _read_object(os.path.join(folder, name, "opts.json"), optional=True)
        origin = Origin(name=name, path=path, options=_limit(options))
        refusal = _mounted(options) or _used(name, users)
        found.append(attrs.evolve(origin, refusal=refusal))
    return found


def of_local_persist(docker_root: str) -> Sequence[Origin]:
    """Return the volumes of the plugin local-persist, by name; as for `of_docker`.

    They are directories that their users chose, and stay where they are.
    """
    root = _resolved(docker_root, "--docker-root")
    file = os.path.join(root, STATE)
    state = _read_object(file).get("state")
    if not isinstance(state, dict) or not all(
        isinstance(p, str) for p in state.values()
    ):
        raise InvalidArgument(f"{file}: it has no table 'state' of names and paths")
    users = _containers(root, "local-persist")
    return [
        Origin(
            name=name,
            path=os.path.realpath(path),
            options={"mount": os.path.realpath(path)},
            refusal=_used(name, users),
        )
        for name, path in sorted(state.items())
    ]


def of_folder(path: str) -> Sequence[Origin]:
    """Return the subdirectories of ``path``, by name; also those that began to go.

    Left out are files, and other directories whose names begin with a dot.
    """
    folder = _resolved(path, "--directory")
    names = set()
    for name in _folders(folder):
        going = _GOING.fullmatch(name)
        if going or not name.startswith("."):
            names.add(going[1] if going else name)
    return [in_folder(folder, name) for name in sorted(names)]


def in_folder(path: str, name: str) -> Origin:
    """Return the subdirectory ``name`` of ``path``, which need not be there."""
    folder = _resolved(path, "--directory")
    return Origin(name=name, path=os.path.join(folder, name))


def _resolved(path: str, option: str) -> str:
    # Resolved once: /var/lib/docker is a link on many hosts, and no link is followed
    # where a volume is made.
    found = os.path.realpath(path)
    if not os.path.isdir(found):
        raise InvalidArgument(f"{option} {path}: there is no such directory")
    return found


def _folders(path: str) -> Sequence[str]:
    try:
        with os.scandir(path) as entries:
            return sorted(e.name for e in entries if e.is_dir(follow_symlinks=False))
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise from_os_error(error, f"look into {path}") from error


def _containers(docker_root: str, driver: str) -> Mapping[str, Sequence[str]]:
    """Return the names of Docker's containers, stopped ones too, by their volumes."""
    folder = os.path.join(docker_root, "containers")
    users: dict[str, list[str]] = {}
    for container in _folders(folder):
        file = os.path.join(folder, container, "config.v2.json")
        config = _read_object(file, optional=True)
        for mount in (config.get("MountPoints") or {}).values():
            if mount.get("Type") == "volume" and mount.get("Driver") == driver:
                name = config.get("Name", "").removeprefix("/") or container[:12]
                users.setdefault(mount.get("Name", ""), []).append(name)
    return users


def _used(name: str, users: Mapping[str, Sequence[str]]) -> str | None:
    if name not in users:
        return None
    names = " ".join(users[name])
    return (
        f"containers have it, running or stopped: `docker rm -f {names}` (without -v), "
        f"and create them again afterwards"
    )


def _mounted(options: Mapping[str, Any]) -> str | None:
    device, kind = options.get("MountDevice"), options.get("MountType")
    if not device and not kind:
        return None
    told = f"it is a mount of {quote(device or '')}, type {quote(kind or '')}"
    if "bind" in str(options.get("MountOpts", "")).split(","):
        return (
            f"{told}, with no files of its own: docker volume rm it, which keeps them, "
            f"and create one with -d volplugin -o mount={device}"
        )
    return (
        f"{told}: its files are elsewhere, and Docker mounts them. Have the host mount "
        f"that (fstab), and create one with -d volplugin -o mount=DIRECTORY; for a "
        f"tmpfs there is -o driver=tmpfs"
    )


def _limit(options: Mapping[str, Any]) -> Mapping[str, str]:
    size = (options.get("Quota") or {}).get("Size", 0)
    return {"size": str(size)} if size else {}


def _read_object(file: str, *, optional: bool = False) -> dict[str, Any]:
    try:
        with open(file, encoding="utf-8") as text:
            found = json.load(text)
    except FileNotFoundError as error:
        if optional:
            return {}
        raise InvalidArgument(f"there is no {file}: is --docker-root right?") from error
    except OSError as error:
        raise from_os_error(error, f"read {file}") from error
    except ValueError as error:
        raise InvalidArgument(f"{file} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise InvalidArgument(f"{file} holds no object of JSON")
    return found
