"""Shared volumes followed: other hosts' changes, by notice and by a look at all.

One task a shared backend. It waits for its cluster alone, and a cluster that is out of
reach is tried again and told of once.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterable
from typing import Final

from volplugin.backends import THREADS, Backend
from volplugin.changes import Caller, Changes
from volplugin.core import Core
from volplugin.drivers.driver import Following, Shares
from volplugin.errors import DeadlineExceeded, Unavailable, VolpluginError
from volplugin.logs import log
from volplugin.model import Volume

logger = logging.getLogger(__name__)

_RETRY: Final = 5.0  # seconds between tries to reach a cluster with volumes of ours
_PATIENCE: Final = 30.0  # seconds for one volume
_BUSY: Final = 1.0  # seconds until one that another change holds up is looked at again
_APART: Final = 1.0  # seconds between looks at all, however many notices ask for one
_AT_ONCE: Final = THREADS // 2  # volumes looked at in parallel; callers have the rest
_MOST_FAULTS: Final = 5  # volumes that the log names at once
_MOST_NOTICES: Final = 1000  # names kept; for more of them all volumes are looked at


class Follower:
    """One shared backend, followed until cancelled. All on the event loop."""

    def __init__(self, core: Core, changes: Changes, backend: Backend) -> None:
        self._core = core
        self._changes = changes
        self._backend = backend
        self._noticed: set[str] = set()
        self._looked_at = self._look_again_at = 0.0  # time.monotonic(), at all volumes
        self._wake = asyncio.Event()
        self._opened: asyncio.Future[Following] | None = None
        self._using: asyncio.Future[None] | None = None
        self._driver: object = None  # whom `_opened` is of: a reload may replace it
        self._trouble = ""

    async def run(self, interval: float) -> None:
        """Follow for ever; look at all volumes every ``interval`` s."""
        try:
            while True:
                self._wake.clear()
                try:
                    self._note_trouble(await self._step(interval))
                except Exception as error:  # a bug in one look must not end all of them
                    if isinstance(error, VolpluginError):
                        self._note_trouble(str(error))
                    else:
                        logger.exception("following failed")
                    self._look_again_at = 0.0
                    # Whatever is noticed meanwhile: else each notice would be a try.
                    used = self._is_used()
                    await asyncio.sleep(min(interval, _RETRY) if used else interval)
                    continue
                pause = self._look_again_at - time.monotonic()
                if self._noticed:
                    pause = min(pause, _BUSY)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await self._wake.wait()
        finally:
            await self._unfollow()

    async def _step(self, interval: float) -> str:
        """Look at what was noticed, or at all; return what is wrong with volumes."""
        await self._ensure_following()
        names, self._noticed = self._noticed, set()
        now = time.monotonic()
        if now >= self._look_again_at:
            self._looked_at, self._look_again_at = now, now + interval
            names |= await self._differing()
        return await self._refresh(names)

    async def _ensure_following(self) -> None:
        driver = self._backend.driver
        if not isinstance(driver, Shares):
            return
        if self._opened is not None and (
            self._driver is not driver or not self._opened.result().is_alive()
        ):
            await self._unfollow()
        if self._opened is None:
            loop = asyncio.get_running_loop()

            def changed(name: str | None) -> None:  # in a thread of the cluster's
                with contextlib.suppress(RuntimeError):  # the loop has ended
                    loop.call_soon_threadsafe(self.notice, name)

            self._driver = driver
            self._using = self._backend.use()
            opening = self._backend.run(driver.follow, changed)
            self._opened = asyncio.ensure_future(opening)
            try:
                # One that is cancelled meanwhile is opened all the same: then closed.
                await asyncio.shield(self._opened)
            except Exception:
                await self._unfollow()
                raise
            self._look_again_at = 0.0

    async def _unfollow(self) -> None:
        opened, self._opened = self._opened, None
        using, self._using = self._using, None
        if opened is None or using is None:
            return
        try:
            following = await opened
            await self._backend.run(following.close)
        except (VolpluginError, RuntimeError):
            pass  # never opened, or the backend is closed, and its connection with it
        finally:
            using.set_result(None)

    def notice(self, name: str | None) -> None:
        """Have ``name``, or all volumes, looked at soon."""
        if name is None or len(self._noticed) >= _MOST_NOTICES:
            soon = self._looked_at + _APART
            self._look_again_at = min(self._look_again_at, soon)
        else:
            self._noticed.add(name)
        self._wake.set()

    async def _differing(self) -> set[str]:
        """Return the names of which the store and the cluster say different things.

        Only hints, as volumes come and go meanwhile: `Sharing.refresh` looks again.
        """
        driver = self._backend.driver
        if not isinstance(driver, Shares):
            return set()

        def read(driver: Shares = driver) -> dict[str, Volume]:
            return {volume.name: volume for volume in driver.volumes()}

        found = await self._backend.run(read)
        known = self._core.catalog.store.volumes
        ours = {
            name
            for name, volume in known.items()
            if volume.backend == self._backend.name
        }
        return (ours - set(found)) | {
            name for name, volume in found.items() if known.get(name) != volume
        }

    async def _refresh(self, names: Iterable[str]) -> str:
        """Bring these in step; return the faults of some, raise what hits them all.

        One that another change holds up is noticed again: it holds up no other.
        """
        turns = asyncio.Semaphore(_AT_ONCE)
        lost: list[Unavailable] = []
        faults: list[str] = []

        async def refresh(name: str) -> None:
            async with turns:
                if lost:
                    return
                if self._changes.locks.waiting(name):
                    self._noticed.add(name)
                    return
                try:
                    await self._changes.run(
                        name,
                        lambda: self._core.sharing.refresh(self._backend, name),
                        limit=_PATIENCE,
                        caller=Caller(),
                    )
                except DeadlineExceeded:
                    self._noticed.add(name)
                except Unavailable as error:
                    lost.append(error)
                except VolpluginError as error:
                    faults.append(f"{name}: {error}")

        await asyncio.gather(*map(refresh, sorted(names)))
        if lost:
            raise lost[0]
        return "\n".join(sorted(faults)[:_MOST_FAULTS])

    def _is_used(self) -> bool:
        """Tell a backend that someone wants from one that its driver is by itself."""
        volumes = self._core.catalog.store.volumes.values()
        name = self._backend.name
        return bool(self._backend.settings) or any(v.backend == name for v in volumes)

    def _note_trouble(self, error: str) -> None:
        """Log trouble once, and its end."""
        if error == self._trouble:
            return
        level = logging.WARNING if self._is_used() else logging.DEBUG
        if error:
            log(
                logger,
                level,
                "shared volumes not followed, to be tried again",
                backend=self._backend.name,
                error="; ".join(error.splitlines()),
            )
        else:
            level = min(level, logging.INFO)
            name = self._backend.name
            log(logger, level, "shared volumes followed again", backend=name)
        self._trouble = error


class Followers:
    """All shared backends, followed."""

    def __init__(self, core: Core, changes: Changes) -> None:
        self._core = core
        self._changes = changes

    async def keep_following(self, interval: float) -> None:
        """Follow each shared backend until cancelled; see `Follower.run`."""
        async with asyncio.TaskGroup() as group:
            for backend in self._followed():
                follower = Follower(self._core, self._changes, backend)
                group.create_task(follower.run(interval))

    def _followed(self) -> list[Backend]:
        """Return the shared backends that someone may want.

        That of a driver by itself is left out where others of the driver are configured
        and it has no volume: it may be one more way to the cluster of another.
        """
        catalog = self._core.catalog
        shared = [b for b in catalog.backends.all() if isinstance(b.driver, Shares)]
        configured = {b.driver.name for b in shared if b.settings}
        used = {volume.backend for volume in catalog.store.volumes.values()}
        return [
            b
            for b in shared
            if b.settings or b.name in used or b.driver.name not in configured
        ]
