"""The plugin protocol's messages: bodies in, bodies out, nothing else.

Source: Docker's "Volume plugin protocol", and what dockerd 20.10, podman 4 and
PouchContainer really send (no Content-Type, no Host, null for no options, no body for
List from podman).
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any, Final

from volplugin.errors import InvalidArgument
from volplugin.model import Volume

CONTENT_TYPE: Final = "application/vnd.docker.plugins.v1.1+json"
BODY_LIMIT: Final = 1 << 20  # bytes

EMPTY: Final = b"{}"
ACTIVATED: Final = b'{"Implements":["VolumeDriver"]}'  # the case matters to dockerd


class NotJSON(Exception):
    """The body is not a JSON object."""


def decode(body: bytes) -> Mapping[str, Any]:
    """Read a request's body; raise `NotJSON`."""
    try:
        message = json.loads(body)
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else error
        raise NotJSON(f"the body is not JSON: {reason}") from error
    if not isinstance(message, dict):
        raise NotJSON(f"the body is JSON but no object: {body[:40]!r}")
    return message


def text(message: Mapping[str, Any], key: str) -> str:
    """Return the string under ``key``, "" where it is absent or null."""
    value = message.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InvalidArgument(f"{key} must be a string, not {value!r:.80}")
    return value


def options(message: Mapping[str, Any]) -> Mapping[str, str]:
    """Return the options of a Create; dockerd sends null, ``{}`` or strings."""
    value = message.get("Opts")
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InvalidArgument(f"Opts must be an object, not {value!r:.80}")
    for key, item in value.items():
        if not isinstance(item, str):
            raise InvalidArgument(
                f"option {key!r:.80} must be a string, not {item!r:.80}"
            )
        try:
            (key + item).encode()
        except UnicodeEncodeError as error:  # JSON can name half a character
            raise InvalidArgument(f"option {key!r:.80} is not valid UTF-8") from error
    return value


def capabilities(scope: str) -> bytes:
    """Answer Capabilities; ``scope`` is ``local`` or ``global``."""
    return _encode({"Capabilities": {"Scope": scope}})


def mountpoint(path: str) -> bytes:
    """Answer Mount and Path."""
    return _encode({"Mountpoint": path})


def volume(known: Volume, status: Mapping[str, Any]) -> bytes:
    """Answer Get."""
    return _encode(
        {
            "Volume": {
                "Name": known.name,
                "Mountpoint": known.mountpoint,
                "CreatedAt": known.created_at,
                "Status": status,
            }
        }
    )


def volumes(known: Iterable[Volume]) -> bytes:
    """Answer List; never with a null among the volumes, which panics dockerd."""
    return _encode(
        {"Volumes": [{"Name": v.name, "Mountpoint": v.mountpoint} for v in known]}
    )


def failure(message: str) -> bytes:
    """Answer any call that failed."""
    return _encode({"Err": message})


_encoder = json.JSONEncoder(separators=(",", ":"))


def _encode(message: Mapping[str, Any]) -> bytes:
    return _encoder.encode(message).encode()
