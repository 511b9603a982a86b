"""The driver ``plugin``: volumes of any other volume plugin, behind our accounting.

A volume is one of another plugin, by the same name with the backend's prefix, a note
here that says so, and a guarded mountpoint ``ROOT/BACKEND/ID/NAME``. Reads never reach
the plugin; what it does or fails to do costs its own volumes alone.
"""

import logging
import os
import threading
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

from volplugin.drivers import mountpoints
from volplugin.drivers.driver import Driver, Found, Held, Plan, Spec
from volplugin.drivers.markers import Markers
from volplugin.drivers.plugin_claims import Claims
from volplugin.drivers.plugin_mounting import Mounting
from volplugin.drivers.plugin_options import PluginConfig, PluginOptions, passed
from volplugin.errors import (
    AlreadyExists,
    InvalidArgument,
    NotFound,
    Unavailable,
    VolpluginError,
)
from volplugin.failpoints import hit
from volplugin.host import paths
from volplugin.host.mountinfo import Mount
from volplugin.logs import log
from volplugin.model import State, Usage, Volume
from volplugin.parsers import nearest, quote
from volplugin.plugins.client import PluginClient, Refused

logger = logging.getLogger(__name__)


class Plugin(Driver):
    """The volumes of one backend, of one other plugin or of several."""

    name = "plugin"
    Options = PluginOptions
    Config = PluginConfig

    def __init__(self, config: PluginConfig, place: str) -> None:
        self._config = config
        self._place = place
        self._markers = Markers(place)
        self._claims = Claims(place)
        self._mounting = Mounting(place)
        self._clients: dict[str, PluginClient] = {}
        self._clients_lock = threading.Lock()
        self._missing: dict[str, frozenset[str]] = {}  # by plugin, as of its last list

    def open(self) -> None:
        paths.make_directories(self._place, 0o711)
        self._mounting.open()

    def roots(self) -> Sequence[str]:
        return [self._place]

    def lane(self, volume: Volume) -> str:
        """Return the plugin that has the volume."""
        return volume.facts.get("plugin", "")

    def server_of(self, volume: Volume) -> int | None:
        """Return the plugin's process, as of `ServedByOthers`."""
        return self._client(volume).server()

    def plan(self, name: str, volume_id: str, options: PluginOptions) -> Plan:
        plugin = self._plugin_of(options)
        passed(self._config, options)
        there = self._config.prefix + name if options.adopt is None else options.adopt
        return Plan(
            mountpoint=os.path.join(self._place, volume_id, name),
            facts={"plugin": plugin, "name": there or name},
        )

    def _plugin_of(self, options: PluginOptions) -> str:
        """Return the name of the plugin that is asked for, which is or was there."""
        plugin = options.plugin or self._config.plugin
        if plugin is None:
            known = self._config.folders.names()
            raise InvalidArgument(
                f"plugin is missing: say which one has the volume, -o plugin=NAME"
                f"{'; there are ' + ', '.join(known) if known else ''}"
            )
        try:
            self._config.folders.find(plugin)
        except NotFound as error:
            if plugin not in self._clients:
                raise InvalidArgument(str(error)) from error
            # It was there before: it may be just restarting, and a call waits for it.
        return plugin

    def create(self, spec: Spec) -> None:
        volume = spec.volume
        client, there = self._client(volume), volume.facts["name"]
        is_asked = self._claims.is_taken(volume)
        if not is_asked:
            self._require_as_wanted(spec, client, there)
        self._mounting.make_mountpoint(spec)
        self._markers.add(volume.name, spec.record)
        self._claims.take(volume)
        hit("plugin.intent")
        if spec.options.adopt is None and not (is_asked and client.has(there)):
            try:
                self._make(spec, client, there)
            except Unavailable as error:
                if isinstance(error.__cause__, Refused):
                    # What has the name there is not by us: the undo must not touch it.
                    self._claims.drop(volume)
                raise
        hit("plugin.created")
        self._mounting.note_place(volume, client, there)

    def _require_as_wanted(self, spec: Spec, client: PluginClient, there: str) -> None:
        """Refuse what would make another's volume ours, or adopt what is not there."""
        found = client.has(there)
        if found and spec.options.adopt is None:
            raise AlreadyExists(
                f"plugin {client.name} has a volume {quote(there)} that volplugin did "
                f"not make: adopt it (-o adopt={there}, or `volplugin volume adopt`), "
                f"or use another name"
            )
        if not found and spec.options.adopt is not None:
            known = [held.name for held in _volumes(client)]
            raise InvalidArgument(
                f"adopt={there}: plugin {client.name} has no such volume"
                f"{nearest(there, known)}"
            )

    def _make(self, spec: Spec, client: PluginClient, there: str) -> None:
        try:
            client.create(there, passed(self._config, spec.options))
        except Refused as error:
            raise Unavailable(f"plugin {client.name}: Create: {error}") from error

    def remove(self, spec: Spec) -> None:
        volume = spec.volume
        client, there = self._client(volume), volume.facts["name"]
        self._mounting.unbind(volume)
        try:
            self._mounting.unmount_there(volume, client, there)
        except Unavailable as error:
            if spec.options.adopt is None:
                raise
            # It stays at its plugin, be that gone for good.
            event = "adopted volume not unmounted at its plugin"
            log(logger, logging.WARNING, event, volume=volume.name, error=str(error))
        if mountpoints.is_of_another(spec):
            return
        is_made = volume.state is not State.CREATING or self._claims.is_taken(volume)
        if is_made and spec.options.adopt is None:
            self._remove_there(spec, client, there)
            hit("plugin.removed")
        self._mounting.take_mountpoint(spec)
        hit("plugin.unguard")
        self._mounting.forget(volume)
        self._claims.drop(volume)
        self._markers.drop(volume.name)

    def _remove_there(self, spec: Spec, client: PluginClient, there: str) -> None:
        try:
            client.remove(there)
        except Refused:
            if not client.has(there):
                return
            self._mounting.let_go(spec, client, there)
            try:
                client.remove(there)
            except Refused as error:
                raise Unavailable(f"plugin {client.name}: Remove: {error}") from error

    def attach(self, spec: Spec) -> None:
        client, there = self._client(spec.volume), spec.volume.facts["name"]
        try:
            self._mounting.attach(spec, client, there)
        except Unavailable as error:
            is_refused = isinstance(error.__cause__, Refused)
            if not is_refused or _has(client, there):
                raise
            self._make_again(spec, client, there, error)
            self._mounting.attach(spec, client, there)

    def _make_again(
        self, spec: Spec, client: PluginClient, there: str, error: Unavailable
    ) -> None:
        """Make a volume again that its plugin has lost, where that is wanted."""
        lost = f"plugin {client.name} has no volume {quote(there)} any more"
        if not self._config.recreate or spec.options.adopt is not None:
            raise Unavailable(
                f"{lost}; make it there, or, if its volumes are but definitions, set "
                f"recreate = true for the backend ({error})"
            ) from error
        log(logger, logging.WARNING, lost, volume=spec.volume.name, done="made again")
        self._make(spec, client, there)

    def detach(self, spec: Spec) -> None:
        client, there = self._client(spec.volume), spec.volume.facts["name"]
        self._mounting.detach(spec, client, there)

    def attaches(self, volume: Volume) -> bool:
        return True

    def is_attached(self, volume: Volume, table: Sequence[Mount]) -> bool:
        return self._mounting.is_attached(volume, table)

    def status(
        self, volume: Volume, options: PluginOptions, *, attached: bool
    ) -> Mapping[str, Any]:
        plugin, there = volume.facts["plugin"], volume.facts["name"]
        client = self._clients.get(plugin)
        status = {
            "plugin": plugin,
            "name-there": there,
            "plugin-health": client.health() if client else "not asked yet",
        }
        if options.adopt is not None:
            status["adopted"] = "kept by the plugin when it is removed here"
        if there in self._missing.get(plugin, ()):
            status["missing"] = f"plugin {plugin} does not list it any more"
        return status

    def measure(self, specs: Sequence[Spec]) -> Mapping[str, Usage]:
        """Note which plugins answer, and which volumes they do not list any more.

        What a volume holds no plugin tells: the mapping returned is empty.
        """
        by_plugin: dict[str, set[str]] = {}
        for spec in specs:
            facts = spec.volume.facts
            by_plugin.setdefault(facts["plugin"], set()).add(facts["name"])
        for plugin, wanted in by_plugin.items():
            try:
                listed = {held.name for held in _volumes(self._client_of(plugin))}
            except VolpluginError as error:
                log(
                    logger,
                    logging.DEBUG,
                    "plugin not asked for its list",
                    plugin=plugin,
                    error=str(error),
                )
            else:
                self._missing[plugin] = frozenset(wanted - listed)
        return {}

    def adoptable(self, options: PluginOptions) -> Sequence[Held]:
        plugin = self._plugin_of(options)
        return [
            Held(
                name=held.name,
                options={"plugin": plugin, "adopt": held.name},
                facts={"plugin": plugin, "name": held.name},
            )
            for held in _volumes(self._client_of(plugin))
        ]

    def disowned(self, volume: Volume) -> Mapping[str, str]:
        facts = volume.facts
        return {"plugin": facts["plugin"], "adopt": facts["name"]}

    def note_again(self, spec: Spec) -> None:
        self._markers.add(spec.volume.name, spec.record)

    def discover(self, known: Container[str] = ()) -> Iterator[Found]:
        yield from self._markers.found(known)

    def _client(self, volume: Volume) -> PluginClient:
        return self._client_of(volume.facts["plugin"])

    def _client_of(self, plugin: str) -> PluginClient:
        with self._clients_lock:
            client = self._clients.get(plugin)
            if client is None:
                config = self._config
                client = PluginClient(plugin, config.folders, limit=config.time_limit)
                self._clients[plugin] = client
            return client


def _volumes(client: PluginClient) -> Sequence[Any]:
    try:
        return client.volumes()
    except Refused as error:
        raise Unavailable(f"plugin {client.name}: List: {error}") from error


def _has(client: PluginClient, there: str) -> bool:
    try:
        return client.has(there)
    except VolpluginError:
        return True
