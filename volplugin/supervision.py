"""What the service manager, systemd, gives the server and is told by it."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Coroutine, Mapping, MutableMapping
from types import MappingProxyType
from typing import Any, Final

import attrs

from volplugin import activation
from volplugin.config import Config
from volplugin.host import notify
from volplugin.host.notify import Notifier
from volplugin.logs import log
from volplugin.sockets import Listener

logger = logging.getLogger(__name__)

_EVERY: Final = 10.0  # seconds between requests for more time
_MORE: Final = 60.0  # seconds that each of them asks for
RECOVERY_LIMIT: Final = 900.0
"""Seconds after which no more time is asked for: docker.service waits for us."""


@attrs.frozen(kw_only=True)
class Supervisor:
    """The service manager; without one, nobody who gives or hears anything.

    ``held`` are sockets that it listens on for us, by path. What it can't be told is
    logged, and no more.
    """

    held: Mapping[str, Listener] = MappingProxyType({})
    notifier: Notifier = attrs.field(factory=Notifier)

    def ready(self, status: str) -> None:
        """Tell that the server listens, or that a reload is over."""
        self._tell(notify.READY, notify.status(status))

    def reloading(self) -> None:
        """Tell that a reload begins; `ready` ends it."""
        self._tell(*notify.reloading(), notify.status("reading the configuration"))

    def stopping(self, limit: float) -> None:
        """Tell that the end has begun and takes ``limit`` seconds at the most."""
        status = notify.status("answering the calls under way")
        self._tell(notify.STOPPING, notify.extend(limit), status)

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Have the manager notice, within, when the event loop does not turn."""
        limit = self.notifier.watchdog
        if limit is None:
            yield
            return
        async with _running(self._keep_telling(notify.WATCHDOG, limit / 2)):
            yield

    @contextlib.asynccontextmanager
    async def starting(self, status: str) -> AsyncIterator[None]:
        """Ask for more time, within, for as long as it takes, up to a limit."""
        self._tell(notify.status(status))
        async with _running(self._keep_asking()):
            yield

    async def _keep_asking(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(RECOVERY_LIMIT):
                await self._keep_telling(notify.extend(_MORE), _EVERY)

    async def _keep_telling(self, fact: str, interval: float) -> None:
        while True:
            self._tell(fact)
            await asyncio.sleep(interval)

    def _tell(self, *facts: str) -> None:
        try:
            self.notifier.tell(*facts)
        except OSError as error:
            log(
                logger,
                logging.WARNING,
                "systemd not told",
                fact=facts[0],
                error=error.strerror or str(error),
            )


def supervisor(config: Config, environ: MutableMapping[str, str]) -> Supervisor:
    """Return the manager that ``environ`` tells of, and take over its sockets.

    The variables are unset. Raise `InvalidArgument` as `activation.take_over` does.
    """
    notifier = notify.notifier(environ)
    return Supervisor(held=activation.take_over(config, environ), notifier=notifier)


@contextlib.asynccontextmanager
async def _running(coroutine: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    task = asyncio.get_running_loop().create_task(coroutine)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})
