"""A client of the volume-plugin protocol, as careful as an engine should be.

Source: Docker's "Volume plugin protocol"; what plugins really answer (an error with
status 200, plain text, nothing at all) as moby's pkg/plugins takes it.
"""

import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

import attrs

from volplugin import __version__, route
from volplugin.errors import NotFound, Unavailable, VolpluginError
from volplugin.logs import log
from volplugin.parsers import quote
from volplugin.plugins.breaker import Breaker
from volplugin.plugins.discovery import Address, Folders
from volplugin.plugins.transport import (
    Answer,
    NoAnswer,
    NotSent,
    exchange,
    listener_of,
)

logger = logging.getLogger(__name__)

CREATE_LIMIT: Final = 100.0  # seconds; dockerd waits 120 for us, we answer after 110
OTHER_LIMIT: Final = 45.0  # seconds; dockerd waits 60, we answer after 50

_RESTART: Final = 3.0  # seconds in which a plugin that can't be reached may come back
_PAUSES: Final = (0.05, 0.1, 0.2, 0.4)  # seconds between tries to reach it
_LOOK: Final = 1.0  # seconds
_SHOWN: Final = 400  # characters of what it says

_READS: Final = frozenset({"Get", "List"})
"""Calls that may be made again though an earlier one was sent: they change nothing."""


class Refused(Exception):
    """The plugin answered with an error; the text is its own."""


class Lost(Unavailable):
    """A call was sent and not answered: it may have had its effect, or have it yet."""


@attrs.frozen(kw_only=True)
class Held:
    """A volume as a plugin tells of it; ``mountpoint`` is "" when it does not say."""

    name: str
    mountpoint: str = ""


class PluginClient:
    """Calls the plugin ``name``; each call is a connection of its own.

    Safe in threads. A method raises `Refused` with the plugin's own error; `Lost` when
    a call was sent and its outcome is not known; `Unavailable` when it had no effect:
    the plugin is not there, can't be reached, or is down by the breaker. ``limit``
    seconds bound each call, tries to reach a plugin that is just restarting included;
    None stands for the defaults, which are below an engine's.
    """

    def __init__(
        self, name: str, folders: Folders | None = None, *, limit: float | None = None
    ) -> None:
        self.name = name
        self._folders = folders or Folders()
        self._limit = limit
        self._breaker = Breaker(name)
        self._activated = False
        self._failed_at = (0, 0)

    def create(self, name: str, options: Mapping[str, str]) -> None:
        """Have the plugin make a volume."""
        self._call("Create", {"Name": name, "Opts": dict(options)})

    def remove(self, name: str) -> None:
        """Have the plugin remove a volume."""
        self._call("Remove", {"Name": name})

    def mount(self, name: str, mount_id: str) -> str:
        """Have the plugin mount a volume; return the path it answers, unchecked."""
        answer = self._call("Mount", {"Name": name, "ID": mount_id})
        return _text(answer, "Mountpoint")

    def unmount(self, name: str, mount_id: str) -> None:
        """Have the plugin unmount a volume."""
        self._call("Unmount", {"Name": name, "ID": mount_id})

    def get(self, name: str) -> Held:
        """Return a volume. That there is none is `Refused`, and so is other trouble."""
        found = self._call("Get", {"Name": name}).get("Volume")
        if not isinstance(found, dict) or not found.get("Name"):
            raise Refused(f"its answer to Get has no volume: {found!r:.80}")
        if found["Name"] != name:
            raise Refused(
                f"asked for {quote(name)} it answers with {quote(str(found['Name']))}"
            )
        return Held(name=name, mountpoint=_text(found, "Mountpoint"))

    def volumes(self) -> Sequence[Held]:
        """Return all volumes that the plugin tells of."""
        found = self._call("List", {}).get("Volumes")
        if found is None:  # Go's empty slice
            return []
        if not isinstance(found, list):
            raise Refused(f"its answer to List has no volumes: {found!r:.80}")
        return [
            Held(name=each["Name"], mountpoint=_text(each, "Mountpoint"))
            for each in found
            if isinstance(each, dict) and _text(each, "Name")
        ]

    def has(self, name: str) -> bool:
        """Tell whether the plugin has the volume ``name``.

        An error of Get is no proof that it has not: List must say so too. Raise
        `Unavailable` when neither tells.
        """
        try:
            self.get(name)
        except Refused as refused:
            try:
                return any(held.name == name for held in self.volumes())
            except Refused as error:
                raise Unavailable(
                    f"plugin {self.name} does not tell whether it has {quote(name)}: "
                    f"{refused}; {error}"
                ) from error
        return True

    def server(self) -> int | None:
        """Return the plugin's process, if it is on this host and listens."""
        try:
            return listener_of(self._address(), limit=_LOOK)
        except (NotSent, VolpluginError):
            return None

    def health(self) -> str:
        """Say how the plugin is: from memory, no I/O."""
        return self._breaker.health()

    def _call(self, verb: str, message: Mapping[str, Any]) -> Mapping[str, Any]:
        limit = self._limit or (
            CREATE_LIMIT if verb in {"Create", "Mount"} else OTHER_LIMIT
        )
        end = time.monotonic() + limit
        if self._has_started_anew():
            self._breaker.reset()
        with self._breaker.passing():
            answer = self._answer(verb, message, end)
        return self._read(verb, answer)

    def _answer(self, verb: str, message: Mapping[str, Any], end: float) -> Answer:
        try:
            if not self._activated:
                self._activate(end)
            answer = self._send(f"/VolumeDriver.{verb}", message, end, verb in _READS)
        except (NotSent, NoAnswer) as error:
            self._activated = False  # who comes back may be another, which wants it
            self._failed_at = self._identity()
            if self._breaker.failed(str(error)):
                log(logger, logging.WARNING, "plugin down", plugin=self.name)
            text = f"plugin {self.name}: {verb}: {error}"
            if isinstance(error, NotSent):
                raise Unavailable(text) from error
            raise Lost(text) from error
        self._note_answer()
        return answer

    def _note_answer(self) -> None:
        if self._breaker.succeeded():
            log(logger, logging.INFO, "plugin up again", plugin=self.name)

    def _has_started_anew(self) -> bool:
        """Tell whether another plugin listens than the one that did not answer."""
        return self._breaker.is_failing() and self._identity() != self._failed_at

    def _identity(self) -> tuple[int, int]:
        """Return what differs between two sockets of one path; (0, 0) for none."""
        try:
            found = os.stat(self._address().path)
        except (OSError, NotSent, VolpluginError):
            return 0, 0
        return found.st_ino, found.st_ctime_ns

    def _activate(self, end: float) -> None:
        """Do as dockerd before its first call: some plugins make themselves ready."""
        try:
            answer = self._send("/Plugin.Activate", None, end, is_read=True)
        except NoAnswer as error:  # the call itself was not sent
            raise NotSent(f"Activate: {error}") from error
        try:
            implements = self._read("Activate", answer).get("Implements")
        except (Refused, Lost) as error:
            self._note_answer()
            raise Unavailable(f"plugin {self.name} is not ready: {error}") from error
        if not isinstance(implements, list) or "VolumeDriver" not in implements:
            self._note_answer()
            raise Unavailable(
                f"plugin {self.name} is no volume plugin: it implements "
                f"{implements!r:.80}"
            )
        self._activated = True

    def _send(
        self,
        path: str,
        message: Mapping[str, Any] | None,
        end: float,
        is_read: bool,
    ) -> Answer:
        """Make a call, again while the plugin is not reached and can come back."""
        body = b"" if message is None else json.dumps(message).encode() + b"\n"
        headers = {
            "Accept": "application/vnd.docker.plugins.v1.2+json",
            "User-Agent": f"volplugin/{__version__}",
            route.HEADER: route.header(),
        }
        begun = time.monotonic()
        # Who comes back in the last moment still has time to answer.
        give_up = begun + min(_RESTART, (end - begun) / 2)
        pauses = iter(_PAUSES)
        while True:
            try:
                left = max(end - time.monotonic(), 0.001)
                address = self._address()
                return exchange(address, path, body, limit=left, headers=headers)
            except NotSent:
                left = give_up - time.monotonic()
                if left <= 0:
                    raise
                pause = min(next(pauses, _PAUSES[-1]), left)
            except NoAnswer as error:
                if not is_read or error.late:
                    raise
                is_read, pause = False, _PAUSES[0]  # once more
            time.sleep(pause)

    def _address(self) -> Address:
        try:
            return self._folders.find(self.name)
        except NotFound as error:
            raise NotSent(str(error)) from error

    def _read(self, verb: str, answer: Answer) -> Mapping[str, Any]:
        """Return what the plugin answered; raise `Refused`, or `Lost` for no sense."""
        try:
            fields = json.loads(answer.body)
        except (ValueError, RecursionError):
            fields = None
        said = fields.get("Err") if isinstance(fields, dict) else None
        if said:
            raise Refused(_shown(str(said)))
        if answer.status != 200:
            text = _shown(answer.body[: 4 * _SHOWN].decode("utf-8", "replace"))
            raise Refused(f"status {answer.status}: {text or 'no reason given'}")
        if not isinstance(fields, dict):
            # As dockerd: that is no success, and not the plugin's word for a failure.
            raise Lost(
                f"plugin {self.name}: {verb}: its answer makes no sense: "
                f"{answer.body[:80]!r}"
            )
        return fields


def _text(fields: Mapping[str, Any], key: str) -> str:
    """Return the text under ``key``, "" for what no name and no path can be."""
    value = fields.get(key)
    if not isinstance(value, str):
        return ""
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can name half a character
        return ""
    return value


def _shown(text: str) -> str:
    """Return what a plugin says, on one line that no terminal takes for commands."""
    words = " ".join(text.split())[:_SHOWN]
    return "".join(each if each.isprintable() else "?" for each in words)
