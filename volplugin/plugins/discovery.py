"""Where a plugin of a name listens, found as dockerd and PouchContainer find it.

First a socket, ``NAME.sock`` or ``NAME/NAME.sock``; then a file that says where:
``NAME.spec``, one URL, or ``NAME.json``, an address with TLS settings.
"""

import json
import os
import re
import stat
from collections.abc import Iterator, Sequence
from typing import Any, Final
from urllib.parse import urlsplit

import attrs

from volplugin.errors import InvalidArgument, NotFound
from volplugin.parsers import nearest, quote

SOCKETS: Final = ("/run/docker/plugins", "/run/pouch/plugins")
SPECS: Final = (
    "/etc/docker/plugins",
    "/usr/lib/docker/plugins",
    "/etc/pouch/plugins",
    "/var/lib/pouch/plugins",
    "/var/lib/docker/plugins",
)

_NAME: Final = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.:-]{0,254}", re.ASCII)
_LARGEST: Final = 64 << 10  # bytes of a file that says where
_PORTS: Final = {"tcp": 80, "http": 80, "https": 443}


@attrs.frozen(kw_only=True)
class TLS:
    """How a plugin on another machine is proved, and how we are; paths of PEM files."""

    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""
    insecure_skip_verify: bool = False


@attrs.frozen(kw_only=True)
class Address:
    """Where a plugin listens: on a unix socket ``path``, or on ``host`` and ``port``.

    ``found_in`` is the file that says so.
    """

    found_in: str
    path: str = ""
    host: str = ""
    port: int = 0
    tls: TLS | None = None

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return self.path or f"{host}:{self.port}"


@attrs.frozen(kw_only=True)
class Folders:
    """Where plugins are looked for, in this order."""

    sockets: Sequence[str] = SOCKETS
    specs: Sequence[str] = SPECS

    def find(self, name: str) -> Address:
        """Return where the plugin ``name`` listens, by what is there now.

        Raise `NotFound`, with the nearest name and where was looked, when there is
        none; `InvalidArgument` for a file that can't be understood.
        """
        if not _NAME.fullmatch(name):
            raise InvalidArgument(
                f"{quote(name)} is no plugin's name: it is letters, digits, '_', '.', "
                f"':' and '-', the first a letter or a digit"
            )
        for path in _named(self.sockets, name, (".sock",)):
            if _is_socket(path):
                return Address(found_in=path, path=path)
        for path in _named(self.specs, name, (".spec", ".json")):
            if os.path.isfile(path):
                return _read(path)
        known = self.names()
        raise NotFound(
            f"there is no plugin {name!r}{nearest(name, known)}; looked for "
            f"{name}.sock in {', '.join(self.sockets)} and for {name}.spec and "
            f"{name}.json in {', '.join(self.specs)}"
            + (f"; there are {', '.join(known)}" if known else "")
        )

    def names(self) -> list[str]:
        """Return the names of all plugins that `find` would find."""
        found = set()
        for folders, ends, is_one in (
            (self.sockets, (".sock",), _is_socket),
            (self.specs, (".spec", ".json"), os.path.isfile),
        ):
            for path in _all(folders, ends):
                if is_one(path):
                    found.add(os.path.splitext(os.path.basename(path))[0])
        return sorted(found)


def _named(folders: Sequence[str], name: str, ends: Sequence[str]) -> Iterator[str]:
    for folder in folders:
        for end in ends:
            yield os.path.join(folder, name + end)
            yield os.path.join(folder, name, name + end)


def _all(folders: Sequence[str], ends: Sequence[str]) -> Iterator[str]:
    for folder in folders:
        for entry in _entries(folder):
            if entry.endswith(tuple(ends)):
                yield os.path.join(folder, entry)
            else:
                for end in ends:
                    yield os.path.join(folder, entry, entry + end)


def _entries(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:
        return False


def _read(path: str) -> Address:
    """Read a file that says where a plugin is."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(_LARGEST + 1)
    except (OSError, ValueError) as error:
        raise InvalidArgument(f"{path}: can't be read: {error}") from error
    if len(text) > _LARGEST:
        raise InvalidArgument(f"{path}: more than {_LARGEST} bytes are no address")
    if not path.endswith(".json"):
        return _address(path, text.strip(), {})
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"{path}: not JSON: {error}") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("Addr"), str):
        raise InvalidArgument(f'{path}: it must be an object with "Addr", a URL')
    return _address(path, fields["Addr"].strip(), fields.get("TLSConfig"))


def _address(found_in: str, url: str, tls: object) -> Address:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise InvalidArgument(f"{found_in}: {quote(url)}: {error}") from error
    if parts.scheme == "unix":
        if not parts.path.startswith("/") or parts.netloc:
            raise InvalidArgument(
                f"{found_in}: {quote(url)} names no socket; give unix:///path"
            )
        return Address(found_in=found_in, path=parts.path)
    if parts.scheme not in _PORTS or not host:
        raise InvalidArgument(
            f"{found_in}: {quote(url)} is no address of a plugin; give "
            f"unix:///path, tcp://host:port or https://host:port"
        )
    return Address(
        found_in=found_in,
        host=host,
        port=port or _PORTS[parts.scheme],
        # As in moby's transport: whatever TLSConfig says, tcp:// is plain HTTP.
        tls=_tls(found_in, tls) if parts.scheme == "https" else None,
    )


def _tls(found_in: str, fields: Any) -> TLS:
    if fields is None:  # as dockerd: proved by the authorities that the host trusts
        return TLS()
    kinds = {
        "CAFile": str,
        "CertFile": str,
        "KeyFile": str,
        "InsecureSkipVerify": bool,
    }
    if not isinstance(fields, dict) or not all(
        isinstance(fields.get(key, kind()), kind) for key, kind in kinds.items()
    ):
        raise InvalidArgument(
            f"{found_in}: TLSConfig takes the paths CAFile, CertFile and KeyFile, and "
            f"InsecureSkipVerify, true or false"
        )
    ca_file = fields.get("CAFile", "")
    cert_file, key_file = fields.get("CertFile", ""), fields.get("KeyFile", "")
    if bool(cert_file) is not bool(key_file):
        raise InvalidArgument(
            f"{found_in}: TLSConfig has one of CertFile and KeyFile; give both"
        )
    return TLS(
        ca_file=ca_file,
        cert_file=cert_file,
        key_file=key_file,
        # dockerd proves no plugin whose TLSConfig names no authority, nor one of a
        # .spec: those that work with it have certificates of their own making.
        insecure_skip_verify=fields.get("InsecureSkipVerify", False) or not ca_file,
    )
