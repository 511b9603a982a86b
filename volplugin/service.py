"""One server process from start to end: everything put together, signals, shutdown."""

import asyncio
import contextlib
import gc
import logging
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any, Final

import attrs
import uvloop

from volplugin import __version__, failpoints
from volplugin.admin import server as admin
from volplugin.attachments import Attachments
from volplugin.backends import Backends
from volplugin.catalog import Catalog
from volplugin.changes import Changes
from volplugin.config import Config
from volplugin.core import Core
from volplugin.doors import ANY_DOOR, Door
from volplugin.errors import VolpluginError
from volplugin.following import Followers
from volplugin.host import lockfile, paths, processes, surroundings
from volplugin.logs import Writer, log
from volplugin.manager import VolumeManager
from volplugin.migrating import Migrations
from volplugin.operations import Operations
from volplugin.recorder import Recorder, recording
from volplugin.recovery import recover
from volplugin.server import Server
from volplugin.sockets import Listener, bind, clear_left
from volplugin.store.store import Store
from volplugin.supervision import Supervisor

logger = logging.getLogger(__name__)

STUCK_LIMIT: Final = 2.0  # seconds that a stuck driver call may delay the exit


_ENDING: Final = 30.0  # seconds for all that ends after the calls have been answered


def store_path(root: str) -> str:
    """Return where the store of a root is."""
    return os.path.join(os.path.realpath(root), "store")


@contextlib.contextmanager
def locked_root(root: str) -> Iterator[None]:
    """Own ``root``, made if need be, against other servers and `recover`."""
    root = os.path.realpath(root)
    paths.make_directories(root, 0o711)
    held = lockfile.acquire(os.path.join(root, "lock"))
    try:
        yield
    finally:
        lockfile.release(held)


def volumes_in_use(root: str) -> dict[str, str]:
    """Return the mountpoints of volumes that engines have on this host, by name.

    Raise `InUse` while a server runs on ``root``, `StoreCorrupt` as `serve` does.
    """
    if not os.path.isdir(store_path(root)):
        return {}
    with locked_root(root):
        store = Store(store_path(root))
        try:
            return {
                name: store.volumes[name].mountpoint
                for name, mounts in store.mounts.items()
                if mounts.boot_id == processes.boot_id() and mounts.holders
            }
        finally:
            store.close()


def serve(
    config: Config,
    writer: Writer,
    reload: Callable[[], Config],
    supervisor: Supervisor | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT; SIGHUP takes over what ``reload`` returns.

    Raise `VolpluginError` or `StoreCorrupt` when it can't start.
    """
    supervisor = supervisor or Supervisor()
    failpoints.arm(os.environ.get(failpoints.VARIABLE, ""))
    with locked_root(config.root), recording(config.record) as recorder:
        store = Store(store_path(config.root))
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            serving = _serve(
                config, writer, reload, supervisor, store=store, recorder=recorder
            )
            if runner.run(serving):
                # A thread that hangs in a system call can't be ended and would keep
                # the interpreter from exiting, and its change can't be undone any
                # more: the store is closed. All that was answered is in it.
                log(logger, logging.ERROR, "exit with calls stuck in drivers")
                if recorder is not None:
                    recorder.close()
                writer.close()
                os._exit(0)


async def _serve(
    config: Config,
    writer: Writer,
    reload: Callable[[], Config],
    supervisor: Supervisor,
    *,
    store: Store,
    recorder: Recorder | None,
) -> bool:
    service = _Service(
        config, writer, reload, supervisor, store=store, recorder=recorder
    )
    async with supervisor.watching():
        return await service.run()


class _Service:
    """The server's parts; built on the running event loop."""

    def __init__(
        self,
        config: Config,
        writer: Writer,
        reload: Callable[[], Config],
        supervisor: Supervisor,
        *,
        store: Store,
        recorder: Recorder | None,
    ) -> None:
        self._config = config
        self._writer = writer
        self._reload = reload
        self._supervisor = supervisor
        self._store = store
        self._backends = Backends(config)
        self._catalog = Catalog(store, self._backends, processes.boot_id())
        self._core = Core(self._catalog, Attachments(self._catalog))
        changes = Changes()
        self._manager = VolumeManager(self._core, changes, config.limits)
        self._server = Server(self._manager, _doors(config), recorder)
        self._admin = admin.AdminServer(
            Operations(self._core, changes), Migrations(self._core, changes)
        )
        self._followers = Followers(self._core, changes)
        self._loops: list[asyncio.Task[None]] = []
        self._taking_over: asyncio.Task[None] | None = None

    async def run(self) -> bool:
        """Serve; return whether a driver call is stuck at the end."""
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        loop.add_signal_handler(signal.SIGHUP, self._start_taking_over)
        listeners: list[Listener] = []
        try:
            self._require_kept()
            self._bind(listeners)
            async with self._supervisor.starting("recovering"):
                await recover(self._core)
            # What was loaded stays: the collector need not look at it again and again.
            gc.freeze()
            await self._admin.listen(listeners[0])
            await self._server.listen(listeners[1:])
            if self._core.unsettled():
                self._manager.sweep_soon()
            self._start_loops()
            log(
                logger,
                logging.INFO,
                "serving",
                version=__version__,
                root=self._config.root,
                volumes=len(self._store.volumes),
                sockets=",".join(listener.path for listener in listeners),
            )
            self._supervisor.ready(_status(self._config))
            await stop.wait()
        finally:
            stuck = await self._shut_down(listeners)
        return stuck

    def _require_kept(self) -> None:
        """Refuse to run a managed plugin whose volumes would go with it, or have."""
        tree = self._backends.tree
        if tree is not None:
            for place in self._backends.reserved():
                surroundings.require_kept(place, tree.root)
            root = os.path.realpath(self._config.root)
            tree.require_same_data(root, is_empty=not self._store.volumes)

    def _bind(self, listeners: list[Listener]) -> None:
        """Bind all sockets and add them to ``listeners``; nobody can connect yet.

        Before the recovery, however long that takes: a socket that refuses is better
        than none. A dockerd that has called us before tries again for 15 s in either
        case. One that has just started leaves out what it does not find: it lists none
        of our volumes, answers 404 for those that it knows, and a container that names
        one that it does not know gets a local volume at once. Where a socket refuses,
        it waits for up to 15 s and then tells of an error. So what a killed server has
        left stays too, until its place is taken here. At a held socket, calls wait.
        """
        config, held = self._config, self._supervisor.held
        paths = [config.admin_socket, *(socket.path for socket in config.sockets)]
        clear_left(os.path.join(os.path.realpath(config.root), "sockets"), paths)
        path = config.admin_socket
        listeners.append(held.get(path) or admin.listener(path))
        for socket in config.sockets:
            listener = held.get(socket.path) or bind(socket)
            listeners.append(listener)  # all bound are closed, whatever happens

    def _start_loops(self) -> None:
        """Start what runs for ever, or start it again by another configuration."""
        for task in self._loops:
            task.cancel()
        config, usages = self._config, self._catalog.usages
        usages.marks = config.usage_marks
        self._loops = [
            asyncio.create_task(loop)
            for loop in (
                self._manager.keep_sweeping(config.sweep_interval),
                usages.keep_refreshing(config.usage_interval),
                self._followers.keep_following(config.follow_interval),
            )
        ]

    async def _shut_down(self, listeners: list[Listener]) -> bool:
        log(logger, logging.INFO, "stopping")
        limit = self._config.limits.drain
        # The calls, then the changes that run on without a caller, then the backends.
        self._supervisor.stopping(2 * limit + _ENDING)
        answered = all(
            await asyncio.gather(self._server.drain(limit), self._admin.drain(limit))
        )
        for task in (self._taking_over, *self._loops):
            if task is not None:
                task.cancel()
                await asyncio.wait({task}, timeout=STUCK_LIMIT)
        ended = await self._manager.drain(limit if answered else 0.1)
        closed = [await b.close(STUCK_LIMIT) for b in self._backends.all()]
        for listener in listeners:
            listener.close()
        self._store.close()
        log(logger, logging.INFO, "stopped", answered=answered)
        return not (ended and all(closed))

    def _start_taking_over(self) -> None:
        self._supervisor.reloading()
        self._taking_over = asyncio.create_task(self._take_over(self._taking_over))

    async def _take_over(self, earlier: asyncio.Task[None] | None) -> None:
        if earlier is not None:
            await asyncio.gather(earlier, return_exceptions=True)
        if await self._reconfigure():
            self._supervisor.ready(_status(self._config))
        else:
            reason = "the changed configuration is not in effect: see the log"
            self._supervisor.ready(f"{_status(self._config)}; {reason}")

    async def _reconfigure(self) -> bool:
        """Take over a changed configuration, or log why not and keep the old one."""
        try:
            config = self._reload()
            kept = _sockets(self._config)
            if _sockets(config) != kept:
                log(logger, logging.WARNING, "changed sockets need a restart")
            if config.record != self._config.record:
                # Connections that are open would have no ear.
                log(logger, logging.WARNING, "a changed record needs a restart")
            await self._backends.reconfigure(config)
        except (VolpluginError, OSError) as error:
            for line in str(error).splitlines():
                log(logger, logging.ERROR, "configuration not reloaded", error=line)
            return False
        self._config = attrs.evolve(config, **kept, record=self._config.record)
        self._manager.timeouts = config.limits
        self._catalog.forget_parsed()
        self._writer.reconfigure(config.log_format, config.log_level)
        self._start_loops()
        log(logger, logging.INFO, "configuration reloaded")
        return True


def _doors(config: Config) -> dict[str, Door]:
    """Return what each socket serves that does not serve all."""
    doors = {
        socket.path: Door(
            default_backend=socket.default_backend,
            backends=socket.backends,
            shared_only=socket.scope == "global",
        )
        for socket in config.sockets
    }
    return {path: door for path, door in doors.items() if door != ANY_DOOR}


def _status(config: Config) -> str:
    return f"serving on {', '.join(socket.path for socket in config.sockets)}"


def _sockets(config: Config) -> dict[str, Any]:
    return {"sockets": config.sockets, "admin_socket": config.admin_socket}
