"""The one entry: the protocol's verbs, on valid names, one change at a time."""

import asyncio
import contextlib
import logging
import re
from collections.abc import Mapping
from typing import Any, Final

import attrs

from volplugin import accounting
from volplugin.changes import Caller, Changes
from volplugin.config import Timeouts
from volplugin.core import Core
from volplugin.doors import ANY_DOOR, Door
from volplugin.errors import (
    DeadlineExceeded,
    InvalidArgument,
    Unavailable,
    VolpluginError,
)
from volplugin.logs import log
from volplugin.model import Client, State, Volume
from volplugin.times import now

logger = logging.getLogger(__name__)

NAME: Final = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]*", re.ASCII)
"""The names of Docker's local driver; dockerd checks none that go to a plugin."""

NAME_LIMIT: Final = 255  # bytes: a name is a directory entry
ID_LIMIT: Final = 1024  # bytes of a mount ID; dockerd's have 64
OPTIONS_LIMIT: Final = 2048  # bytes: a record must fit in an xattr, one block on ext4


class VolumeManager:
    """Volumes as an engine sees them. All methods raise `VolpluginError` only.

    Reads answer at once from memory. Changes of one volume queue behind each other,
    go on when their caller leaves, and are answered within `Timeouts`.
    """

    def __init__(self, core: Core, changes: Changes, timeouts: Timeouts) -> None:
        self._core = core
        self._changes = changes
        self.timeouts = timeouts
        self._activations = 0
        self._sweep_wanted = asyncio.Event()
        self._unsettled: dict[str, str] = {}  # volumes with the error of their sweep

    # Reads

    def get(self, name: str, door: Door = ANY_DOOR) -> tuple[Volume, dict[str, Any]]:
        """Return the volume and its Status; raise `NotFound`.

        Its mountpoint is the host's: dockerd shows it as it is, also a managed
        plugin's, whose answers to the other calls it puts below that plugin's folder.
        """
        require_name(name)
        catalog = self._core.catalog
        volume = catalog.get(name, door)
        status = catalog.status(volume)
        if catalog.backends.tree is None:
            return volume, status
        shown = catalog.backends.path_on_host(volume)
        return attrs.evolve(volume, mountpoint=shown), status

    def volumes(self, door: Door = ANY_DOOR) -> list[Volume]:
        """Return all volumes that ``door`` shows, with the paths that engines get."""
        catalog = self._core.catalog
        if catalog.backends.tree is None:
            return catalog.volumes(door)
        return [
            attrs.evolve(volume, mountpoint=catalog.backends.path(volume))
            for volume in catalog.volumes(door)
        ]

    @property
    def generation(self) -> int:
        """Return a number that is another one when `volumes` would be."""
        return self._core.catalog.store.generation

    def path(self, name: str, door: Door = ANY_DOOR) -> str:
        """Return where the volume is once it is mounted; raise `NotFound`."""
        require_name(name)
        return self._core.catalog.backends.path(self._core.catalog.get(name, door))

    # Changes

    async def create(
        self,
        name: str,
        asked: Mapping[str, str],
        client: Client,
        caller: Caller,
        door: Door = ANY_DOOR,
    ) -> None:
        """Make the volume; the same name with the same options is success."""
        require_name(name)
        size = sum(len(k.encode()) + len(v.encode()) for k, v in asked.items())
        if size > OPTIONS_LIMIT:
            raise InvalidArgument(
                f"the options have {size} bytes, {OPTIONS_LIMIT} is the limit"
            )
        limit = self._limit(self.timeouts.create, client)
        await self._changes.run(
            name,
            lambda: self._core.create(name, asked, door),
            limit=limit,
            caller=caller,
        )

    async def remove(
        self, name: str, client: Client, caller: Caller, door: Door = ANY_DOOR
    ) -> None:
        """Remove the volume; raise `InUse` while it is mounted, naming by whom."""
        require_name(name)
        limit = self._limit(self.timeouts.other, client)
        await self._changes.run(
            name, lambda: self._core.remove(name, door), limit=limit, caller=caller
        )

    async def mount(
        self,
        name: str,
        holder_id: str,
        client: Client,
        caller: Caller,
        door: Door = ANY_DOOR,
    ) -> str:
        """Hold the volume by ``holder_id`` and return where it is.

        When the caller has left before that, the mount is taken back: dockerd never
        unmounts what it was not told of.
        """
        require_name(name)
        require_id(holder_id)
        limit = self._limit(self.timeouts.mount, client)

        async def mount() -> str:
            life = self._in_this_life(client)
            return await self._mount(name, holder_id, life, caller, door)

        return await self._changes.run(
            name,
            mount,
            limit=limit,
            caller=caller,
        )

    async def _mount(
        self, name: str, holder_id: str, client: Client, caller: Caller, door: Door
    ) -> str:
        volume = self._core.catalog.get(name, door)
        if volume.state is not State.READY:
            raise Unavailable("it is being removed")
        before = self._core.catalog.mounts(name)
        claimed = accounting.claim(
            before,
            holder_id,
            client,
            now=now(),
            server=self._core.attachments.server_id,
        )
        attachments = self._core.attachments
        await attachments.attach(volume, claimed, holder_id)
        try:
            await attachments.require_seen(volume, client)
        except BaseException:
            await attachments.take_back(volume, before)
            raise
        if caller.is_waiting():
            return self._core.catalog.backends.path(volume)
        log(
            logger,
            logging.WARNING,
            "mount taken back: its caller left",
            volume=name,
            holder=holder_id,
        )
        # Detached by the sweep, not here: the same call may be waiting for its turn
        # behind this one, and podman, which leaves after 5 s, would never see a
        # slower attach succeed.
        await self._core.attachments.drop_claim(volume, before)
        self._sweep_wanted.set()
        raise DeadlineExceeded("the caller left before it was mounted")

    async def unmount(
        self, name: str, holder_id: str, client: Client, caller: Caller
    ) -> None:
        """Release the hold of ``holder_id``; after the last one, detach the volume.

        An ID that is not known is success. When the detach fails the hold is gone all
        the same, the error is raised, and the detach is tried again by `sweep`. For
        podman it is success once the hold is gone, however long the detach takes.
        """
        require_name(name)
        require_id(holder_id)
        limit = self._limit(self.timeouts.other, client)
        try:
            await self._changes.run(
                name,
                lambda: self._unmount(name, holder_id, self._in_this_life(client)),
                limit=limit,
                caller=caller,
            )
        except VolpluginError as error:
            if not self._has_let_go(name, client):
                raise
            log(
                logger,
                logging.WARNING,
                "released, and not detached yet",
                volume=name,
                error=str(error),
            )

    def _has_let_go(self, name: str, client: Client) -> bool:
        """Tell whether an Unmount that failed must be a success to ``client``."""
        return (
            client.program in accounting.FORGET_NO_FAILED_UNMOUNT
            and self._core.catalog.find(name) is not None
            and not accounting.is_held_by(
                self._core.catalog.mounts(name), client.program
            )
        )

    async def _unmount(self, name: str, holder_id: str, client: Client) -> None:
        volume = self._core.catalog.get(name)
        before = self._core.catalog.mounts(name)
        after = accounting.release(before, holder_id, client)
        after = await self._core.attachments.without_left_behind(
            volume, after, client.program
        )
        if after != before or (after.attached and not after.holders):
            await self._core.attachments.release(volume, after)

    def activate(self, client: Client) -> None:
        """Note that a client has begun a new life, where its pid cannot tell."""
        if client.pid == 0:
            self._activations += 1

    def _in_this_life(self, client: Client) -> Client:
        if client.pid == 0:
            return attrs.evolve(client, started=self._activations)
        return client

    def _limit(self, limit: float, client: Client) -> float:
        return min(limit, self.timeouts.podman) if client.program == "podman" else limit

    # What needs no request

    def sweep_soon(self) -> None:
        """Have `keep_sweeping` begin its next sweep at once."""
        self._sweep_wanted.set()

    async def sweep(self) -> None:
        """Look again at what an error, a left caller or a container left undone."""
        await asyncio.gather(*map(self._settle, self._core.unsettled()))

    async def _settle(self, name: str) -> None:
        try:
            await self._changes.run(
                name,
                lambda: self._core.settle(name),
                limit=self.timeouts.other,
                caller=Caller(),
            )
        except VolpluginError as error:
            if self._unsettled.get(name) != str(error):  # once, not with each sweep
                log(
                    logger,
                    logging.WARNING,
                    "not settled, to be tried again",
                    volume=name,
                    error=str(error),
                )
            self._unsettled[name] = str(error)
        else:
            self._unsettled.pop(name, None)

    async def keep_sweeping(self, interval: float) -> None:
        """`sweep` every ``interval`` s and when there is reason to; runs for ever."""
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._sweep_wanted.wait(), interval)
            self._sweep_wanted.clear()
            try:
                await self.sweep()
            except Exception:  # a bug in one sweep must not end all sweeps
                logger.exception("sweep failed")

    async def drain(self, limit: float) -> bool:
        """Wait ``limit`` s for all changes under way; return whether they ended."""
        return await self._changes.drain(limit)


def require_name(name: str) -> None:
    """Raise `InvalidArgument` unless ``name`` can name a volume."""
    if not NAME.fullmatch(name):
        raise InvalidArgument(
            f"volume name {name[:300]!r}: a name begins with a letter or digit and "
            f"goes on with those, '_', '.' and '-'"
        )
    if len(name) > NAME_LIMIT:
        raise InvalidArgument(
            f"volume name {name[:20]!r}… has {len(name)} bytes, {NAME_LIMIT} is the "
            f"limit"
        )


def require_id(holder_id: str) -> None:
    """Raise `InvalidArgument` for a mount ID that can't be one."""
    if len(holder_id) > ID_LIMIT or not holder_id.isprintable():
        raise InvalidArgument(
            f"mount ID {holder_id[:20]!r}…: at most {ID_LIMIT} printable characters"
        )
