"""Configured drivers, each with threads of its own: one stuck starves no other."""

import asyncio
import logging
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, ParamSpec, TypeVar

from volplugin import drivers
from volplugin.config import Config
from volplugin.drivers.driver import Driver, Purges
from volplugin.errors import InvalidArgument, VolpluginError, from_os_error
from volplugin.logs import log
from volplugin.options import nearest, parse_settings

P = ParamSpec("P")
T = TypeVar("T")

logger = logging.getLogger(__name__)

THREADS: Final = 8  # driver calls of one backend that run at once
PURGE_RETRY: Final = 60.0  # seconds between tries to delete what could not be deleted


class Backend:
    """A driver with its pool of threads and its background deletion."""

    def __init__(self, name: str, driver: Driver) -> None:
        self.name = name
        self.driver = driver
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix=f"{name}-driver")
        self._stop = threading.Event()
        self._purge_wanted = asyncio.Event()
        self._purge_pool = ThreadPoolExecutor(1, thread_name_prefix=f"{name}-purge")
        self._purging: asyncio.Task[None] | None = None
        self._running = 0

    async def run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a blocking driver call in this backend's pool.

        `OSError` becomes one of our errors here, for drivers and failpoints alike. A
        cancelled caller leaves the call running.
        """

        def guarded() -> T:
            try:
                return call(*args, **kwargs)
            except OSError as error:
                where = f"{error.filename}: " if error.filename else ""
                doing = f"{where}{self.driver.name} {call.__name__}"
                raise from_os_error(error, doing) from error

        self._running += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, guarded)
        finally:
            self._running -= 1

    def start_purge(self) -> None:
        """Begin to delete what removed volumes left, now and whenever `purge_soon`."""
        if isinstance(self.driver, Purges):
            self._purging = asyncio.create_task(self._purge_loop())
            self.purge_soon()

    def purge_soon(self) -> None:
        """Say that there is something to delete."""
        self._purge_wanted.set()

    async def _purge_loop(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._purge_wanted.wait()
            self._purge_wanted.clear()
            driver = self.driver  # a reload may have replaced it
            if not isinstance(driver, Purges):
                return
            try:
                done = await loop.run_in_executor(
                    self._purge_pool, driver.purge, self._stop.is_set
                )
            except (OSError, VolpluginError) as error:
                log(
                    logger,
                    logging.WARNING,
                    "purge failed",
                    backend=self.name,
                    error=str(error),
                )
                done = False
            if not done:
                loop.call_later(PURGE_RETRY, self._purge_wanted.set)

    async def close(self, limit: float) -> bool:
        """End the threads; return False if a call is still stuck after ``limit`` s."""
        self._stop.set()
        if self._purging is not None:
            self._purging.cancel()
            await asyncio.gather(self._purging, return_exceptions=True)
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._purge_pool.shutdown(wait=False, cancel_futures=True)
        waiter = threading.Thread(target=self._join, daemon=True)
        waiter.start()
        for _ in range(max(1, int(limit / 0.01))):
            if not waiter.is_alive():
                return True
            await asyncio.sleep(0.01)
        return False

    def _join(self) -> None:
        self._pool.shutdown(wait=True)
        self._purge_pool.shutdown(wait=True)


class Backends:
    """All backends by name, as the configuration has them."""

    def __init__(self, config: Config) -> None:
        self._default = config.default_backend
        self.root = config.root
        self._by_name: dict[str, Backend] = {
            name: Backend(name, driver) for name, driver in build(config).items()
        }

    def get(self, name: str) -> Backend | None:
        """Return the backend ``name``, or None when it is not configured any more."""
        return self._by_name.get(name)

    def pick(self, name: str | None) -> Backend:
        """Return the backend that a user asked for, or the default one."""
        wanted = name or self._default
        backend = self._by_name.get(wanted)
        if backend is None:
            raise InvalidArgument(
                f"driver={wanted}: there is no such driver or backend"
                f"{nearest(wanted, self._by_name)}; there are "
                f"{', '.join(sorted(self._by_name))}"
            )
        return backend

    def all(self) -> list[Backend]:
        """Return all backends."""
        return list(self._by_name.values())

    def reserved(self) -> list[str]:
        """Return the directories that no volume may be given by its user."""
        roots = [root for backend in self.all() for root in backend.driver.roots()]
        return [self.root, *roots]

    async def reconfigure(self, config: Config) -> None:
        """Take over settings, new backends and the default of a new configuration.

        Raise `InvalidArgument` and change nothing for what needs a restart. Not to be
        called while an earlier call runs.
        """
        built = build(config)
        faults = []
        if config.root != self.root:
            faults.append(f"root: {self.root} to {config.root} needs a restart")
        for name, backend in self._by_name.items():
            if name not in built:
                faults.append(f"backend.{name}: taking it away needs a restart")
            elif built[name].name != backend.driver.name:
                faults.append(f"backend.{name}.driver: a change needs a restart")
        if faults:
            raise InvalidArgument("\n".join(faults))
        for driver in built.values():
            await asyncio.to_thread(driver.open)
        for name, driver in built.items():
            if name in self._by_name:
                self._by_name[name].driver = driver
            else:
                self._by_name[name] = Backend(name, driver)
                self._by_name[name].start_purge()
        self._default = config.default_backend


def build(config: Config) -> Mapping[str, Driver]:
    """Build, without effect, the driver of each backend in ``config``."""
    built: dict[str, Driver] = {}
    root = os.path.realpath(config.root)  # below it no symbolic link is followed
    for name in sorted({*drivers.NAMES, *config.backends}):
        backend = config.backends.get(name)
        kind = drivers.find(backend.driver if backend else name)
        settings: Any = parse_settings(
            kind.Config, backend.settings if backend else {}, f"backend.{name}"
        )
        built[name] = kind(settings, os.path.join(root, name))
    return built
