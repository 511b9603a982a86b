"""What a cluster's configuration tells its clients, for one that can't read it itself.

That is the kernel: it wants the monitors' addresses, and the key of the user.
"""

import base64
import binascii
import os
import re
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import attrs

from volplugin.ceph.bindings import load
from volplugin.errors import InvalidArgument, Unavailable

if TYPE_CHECKING:
    from volplugin.ceph.cluster import Access

_PORTS: Final = {"v2": 3300, "v1": 6789}  # as IANA has them
# `v2:10.0.0.1:3300/0`, `[fd00::1]:6789`, `mon.example`; brackets of a group around it.
_ADDRESS: Final = re.compile(
    r"\[?(?:(v1|v2|any):)?"
    r"(?:\[([0-9a-f:.]+)\]|([0-9a-f]*:[0-9a-f]*:[0-9a-f:.]*|[\w.-]+))"
    r"(?::(\d+))?(?:/\d+)?\]?",
    re.IGNORECASE,
)


@attrs.frozen(kw_only=True)
class Settings:
    """The part of a configuration that counts for a client."""

    mon_host: str
    keyrings: tuple[str, ...]
    key: str = attrs.field(repr=False)
    keyfile: str


def read(access: "Access") -> Settings:
    """Return what the configuration file says to the user; no cluster is asked.

    Raise `Unavailable` for one that is missing or wrong.
    """
    if not os.path.exists(access.conf):
        raise Unavailable(
            f"{access.conf} is missing: put the cluster's configuration there"
            " (`ceph config generate-minimal-conf`)"
        )
    rados = load("rados")
    try:
        client = rados.Rados(conffile=access.conf, rados_id=access.user)
    except rados.Error as error:
        raise Unavailable(f"{access.conf} can't be read: {error}") from error
    try:
        said = {
            name: client.conf_get(name) or ""
            for name in ("mon_host", "keyring", "key", "keyfile")
        }
    finally:
        client.shutdown()
    return Settings(
        mon_host=said["mon_host"],
        keyrings=tuple(filter(None, re.split(r"[,;\s]+", said["keyring"]))),
        key=said["key"],
        keyfile=said["keyfile"],
    )


def monitors(settings: Settings, protocol: str) -> list[str]:
    """Return the addresses, ``IP:PORT``, at which monitors speak ``v1`` or ``v2``.

    Host names are looked up; raise `Unavailable` for one that has no address.
    """
    found: dict[str, None] = {}
    for kind, host, port in _listed(settings.mon_host):
        if kind not in {protocol, ""}:
            continue
        for address in _resolved(host):
            ip = f"[{address}]" if ":" in address else address
            found[f"{ip}:{port or _PORTS[protocol]}"] = None
    return list(found)


def secret(access: "Access", settings: Settings) -> bytes:
    """Return the user's key as cephx has it. Raise `Unavailable` where there is none.

    It is read each time: who may read the file is not to be remembered.
    """
    encoded = _from_keyrings(access, settings)
    if encoded is None and settings.keyfile and not access.keyring:
        encoded = _text(settings.keyfile).strip()
    if encoded is None and settings.key and not access.keyring:
        encoded = settings.key
    files = ", ".join(_keyrings(access, settings))
    if encoded is None:
        raise Unavailable(
            f"there is no key of client.{access.user} in {files}: get it by"
            f" `ceph auth get client.{access.user} -o FILE`"
        )
    try:
        return base64.b64decode(encoded, validate=True)
    except binascii.Error as error:
        raise Unavailable(
            f"the key of client.{access.user} in {files} is none"
        ) from error


def _listed(mon_host: str) -> Iterator[tuple[str, str, str]]:
    """Return kind, host and port of each address; no kind: it speaks both."""
    for word in filter(None, re.split(r"[\s,;]+", mon_host)):
        found = _ADDRESS.fullmatch(word)
        if found is None:
            raise InvalidArgument(f"mon host: {word!r} is no address of a monitor")
        kind, bracketed, plain, port = (group or "" for group in found.groups())
        kind = "" if kind.lower() == "any" else kind.lower()
        if not kind and port:
            # As Ceph does: each of the usual ports is that of one protocol.
            kind = "v2" if int(port) == _PORTS["v2"] else "v1"
        yield kind, bracketed or plain, port


def _resolved(host: str) -> list[str]:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise Unavailable(f"mon host: {host} has no address: {error}") from error
    return [str(address[4][0]) for address in found]


def _keyrings(access: "Access", settings: Settings) -> tuple[str, ...]:
    return (access.keyring,) if access.keyring else settings.keyrings


def _from_keyrings(access: "Access", settings: Settings) -> str | None:
    for path in _keyrings(access, settings):
        if not os.path.exists(path):
            continue
        section = ""
        for line in _text(path).splitlines():
            header = re.fullmatch(r"\s*\[(.+)\]\s*", line)
            if header is not None:
                section = header[1].strip()
                continue
            key = re.fullmatch(r'\s*key\s*=\s*"?([^"#;\s]+)"?\s*', line)
            if key is not None and section == f"client.{access.user}":
                return key[1]
    return None


def _text(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError as error:
        raise Unavailable(f"{path}: {error.strerror}") from error
