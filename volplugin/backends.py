"""Configured drivers, each with threads of its own: one stuck starves no other."""

import asyncio
import contextvars
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import Any, Final, ParamSpec, TypeVar

from volplugin import drivers
from volplugin.config import Config
from volplugin.doors import ANY_DOOR, Door
from volplugin.drivers.driver import Driver, Lanes, Purges, Shares, Spec
from volplugin.errors import InvalidArgument, VolpluginError, from_os_error
from volplugin.host.mountinfo import Mount
from volplugin.logs import log
from volplugin.model import Volume
from volplugin.options import nearest, parse_settings
from volplugin.propagated import Tree

P = ParamSpec("P")
T = TypeVar("T")

logger = logging.getLogger(__name__)

THREADS: Final = 8  # driver calls of one backend, or one lane of it, that run at once
PURGE_RETRY: Final = 60.0  # seconds between tries to delete what could not be deleted


class Backend:
    """A driver with its pool of threads and its background deletion."""

    def __init__(
        self,
        name: str,
        driver: Driver,
        settings: Mapping[str, object] = MappingProxyType({}),
        tree: Tree | None = None,
    ) -> None:
        self.name = name
        self.driver = driver
        self.tree = tree  # through which a managed plugin's volumes reach the host
        self.settings = settings  # as they were configured; the driver has them parsed
        self._lanes: dict[str, ThreadPoolExecutor] = {}
        self._stop = threading.Event()
        self._purge_wanted = asyncio.Event()
        self._purge_pool = ThreadPoolExecutor(1, thread_name_prefix=f"{name}-purge")
        self._purging: asyncio.Task[None] | None = None
        self._purge_trouble = ""
        self._retiring: set[asyncio.Task[None]] = set()
        self._retired: list[Shares] = []  # drivers replaced that are not closed yet
        self._running: set[asyncio.Future[Any]] = set()

    # What `Driver` has of the same names, and the host's mount where there is one. The
    # first two block: they are for `run`.

    def attach(self, spec: Spec) -> None:
        """Make the volume's bytes available, to engines too."""
        driver = self.driver
        if self.tree is not None:
            self.tree.fetch(spec.volume, driver)
        driver.attach(spec)
        if self.tree is not None:
            self.tree.expose(spec.volume, driver)

    def detach(self, spec: Spec) -> None:
        """Take back `attach`, from engines first."""
        driver = self.driver
        if self.tree is not None:
            self.tree.withdraw(spec.volume.name)
        driver.detach(spec)

    def attaches(self, volume: Volume) -> bool:
        """Tell whether `attach` and `detach` change anything. No I/O."""
        return self.tree is not None or self.driver.attaches(volume)

    def is_attached(self, volume: Volume, table: Sequence[Mount]) -> bool:
        """Tell whether there is anything to detach, by a mount table."""
        if self.driver.is_attached(volume, table):
            return True
        return self.tree is not None and self.tree.shows(volume, self.driver, table)

    async def run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a blocking driver call in this backend's threads, or its party's.

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

        in_context = contextvars.copy_context().run  # with the way that the call came
        running = asyncio.get_running_loop().run_in_executor(
            self._pool_for(args), in_context, guarded
        )
        self._note(running)
        return await asyncio.shield(running)  # else it would count as ended

    def _pool_for(self, args: tuple[Any, ...]) -> ThreadPoolExecutor:
        lane = ""
        if isinstance(self.driver, Lanes) and args and isinstance(args[0], Spec):
            lane = self.driver.lane(args[0].volume)
        pool = self._lanes.get(lane)
        if pool is None:
            prefix = "-".join(filter(None, (self.name, lane, "driver")))
            pool = ThreadPoolExecutor(THREADS, thread_name_prefix=prefix)
            self._lanes[lane] = pool
        return pool

    def use(self) -> "asyncio.Future[None]":
        """Keep the driver of this moment from being closed until the future is done.

        For what lives longer than a call. It is the caller's to make it done.
        """
        using: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._note(using)
        return using

    def _note(self, running: "asyncio.Future[Any]") -> None:
        self._running.add(running)
        running.add_done_callback(self._running.discard)

    def replace(self, driver: Driver, settings: Mapping[str, object]) -> None:
        """Have calls made of ``driver`` from now on; close the old one after its last.

        Nothing happens where the settings are the same: its connections stay.
        """
        if settings == self.settings:
            return
        old, self.driver, self.settings = self.driver, driver, settings
        if isinstance(old, Shares):
            self._retired.append(old)
            task = asyncio.create_task(self._retire(old, set(self._running)))
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)

    async def _retire(self, old: Shares, running: set["asyncio.Future[Any]"]) -> None:
        if running:
            await asyncio.wait(running)
        await self.run(self._close_quietly, old)

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
                running = loop.run_in_executor(
                    self._purge_pool, driver.purge, self._stop.is_set
                )
                self._note(running)
                done = await running
                self._purge_trouble = ""
            except (OSError, VolpluginError) as error:
                self._note_purge_trouble(str(error))
                done = False
            if not done:
                loop.call_later(PURGE_RETRY, self._purge_wanted.set)

    def _note_purge_trouble(self, error: str) -> None:
        """Log it, once until a purge succeeds; a cluster may be away for days.

        One that nobody has configured is no trouble: most hosts have none.
        """
        if error == self._purge_trouble:
            return
        self._purge_trouble = error
        wanted = self.settings or not isinstance(self.driver, Shares)
        level = logging.WARNING if wanted else logging.DEBUG
        log(logger, level, "purge failed", backend=self.name, error=error)

    async def close(self, limit: float) -> bool:
        """End the threads; return False if a call is still stuck after ``limit`` s."""
        self._stop.set()
        ending = [*self._retiring, *([self._purging] if self._purging else [])]
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)
        for pool in self._lanes.values():
            pool.shutdown(wait=False, cancel_futures=True)
        self._purge_pool.shutdown(wait=False, cancel_futures=True)
        waiter = threading.Thread(target=self._join, daemon=True)
        waiter.start()
        for _ in range(max(1, int(limit / 0.01))):
            if not waiter.is_alive():
                return True
            await asyncio.sleep(0.01)
        return False

    def _join(self) -> None:
        for pool in self._lanes.values():
            pool.shutdown(wait=True)
        self._purge_pool.shutdown(wait=True)
        if isinstance(self.driver, Shares):
            self._retired.append(self.driver)
        for driver in list(self._retired):
            self._close_quietly(driver)

    def _close_quietly(self, driver: Shares) -> None:
        self._retired.remove(driver)
        try:
            driver.close()
        except (OSError, VolpluginError) as error:
            event = "connection not closed"
            log(logger, logging.WARNING, event, backend=self.name, error=str(error))


class Backends:
    """All backends by name, as the configuration has them."""

    def __init__(self, config: Config) -> None:
        self._default = config.default_backend
        self.root = config.root
        self.tree = None if config.propagated is None else Tree(config.propagated)
        self._by_name: dict[str, Backend] = {
            name: Backend(name, driver, settings_of(config, name), self.tree)
            for name, driver in build(config).items()
        }

    def get(self, name: str) -> Backend | None:
        """Return the backend ``name``, or None when it is not configured any more."""
        return self._by_name.get(name)

    def pick(self, name: str | None, door: Door = ANY_DOOR) -> Backend:
        """Return the backend that a user asked for, or the default one of ``door``.

        Raise `InvalidArgument` for one that is not there, or not to be used there.
        """
        wanted = name or door.default_backend or self._default
        backend = self._by_name.get(wanted)
        if backend is None:
            backend = self._by_name.get(drivers.ALIASES.get(wanted, wanted))
        usable = [each.name for each in self.behind(door)]
        if backend is None:
            raise InvalidArgument(
                f"driver={wanted}: there is no such driver or backend"
                f"{nearest(wanted, usable)}; there are {', '.join(usable)}"
            )
        if not door.allows(backend.name):
            raise InvalidArgument(
                f"driver={wanted}: this socket serves volumes of {', '.join(usable)} "
                f"alone: use another socket for those of {backend.name}"
            )
        if door.shared_only and not isinstance(backend.driver, Shares):
            raise InvalidArgument(
                f"driver={wanted}: this socket serves volumes of clusters alone, and "
                f"those of {backend.name} are this host's: use another socket for them"
            )
        return backend

    def behind(self, door: Door) -> list[Backend]:
        """Return the backends that can be used through ``door``, by name."""
        return [
            backend
            for name, backend in sorted(self._by_name.items())
            if door.allows(name)
            and (isinstance(backend.driver, Shares) or not door.shared_only)
        ]

    def all(self) -> list[Backend]:
        """Return all backends."""
        return list(self._by_name.values())

    def reserved(self) -> list[str]:
        """Return the directories that no volume may be given by its user."""
        roots = [root for backend in self.all() for root in backend.driver.roots()]
        return [self.root, *roots]

    def path(self, volume: Volume) -> str:
        """Return the path of a volume that is mounted, as engines get it."""
        return volume.mountpoint if self.tree is None else self.tree.path(volume.name)

    def path_on_host(self, volume: Volume) -> str:
        """Return the path of a volume that is mounted, as people are told it."""
        if self.tree is None:
            return volume.mountpoint
        return self.tree.path_on_host(volume.name)

    async def reconfigure(self, config: Config) -> None:
        """Take over settings, new backends and the default of a new configuration.

        Raise `InvalidArgument` and change nothing for what needs a restart. Not to be
        called while an earlier call runs.
        """
        built = build(config)
        faults = []
        if config.root != self.root:
            faults.append(f"root: {self.root} to {config.root} needs a restart")
        if config.propagated != (self.tree and self.tree.root):
            faults.append("propagated: a change needs a restart")
        for name, backend in self._by_name.items():
            if name not in built:
                faults.append(f"backend.{name}: taking it away needs a restart")
            elif built[name].name != backend.driver.name:
                faults.append(f"backend.{name}.driver: a change needs a restart")
        if faults:
            raise InvalidArgument("\n".join(faults))
        for name, driver in built.items():
            known = self._by_name.get(name)
            kept = known is not None and known.settings == settings_of(config, name)
            # One that is thrown away is not opened: nobody would close it.
            await asyncio.to_thread(
                known.driver.open if known and kept else driver.open
            )
        for name, driver in built.items():
            settings = settings_of(config, name)
            if name in self._by_name:
                self._by_name[name].replace(driver, settings)
            else:
                self._by_name[name] = Backend(name, driver, settings, self.tree)
                self._by_name[name].start_purge()
        self._default = config.default_backend


def settings_of(config: Config, name: str) -> Mapping[str, object]:
    """Return the settings that ``config`` has for the backend ``name``."""
    backend = config.backends.get(name)
    return {} if backend is None else backend.settings


def build(config: Config) -> Mapping[str, Driver]:
    """Build, without effect, the driver of each backend in ``config``."""
    built: dict[str, Driver] = {}
    root = os.path.realpath(config.root)  # below it no symbolic link is followed
    for name in sorted({*drivers.NAMES, *config.backends}):
        backend = config.backends.get(name)
        kind = drivers.find(backend.driver if backend else name)
        settings: Any = parse_settings(
            kind.Config, settings_of(config, name), f"backend.{name}"
        )
        built[name] = kind(settings, os.path.join(root, name))
    return built
