"""Where the configuration comes from, how it is checked, and how it prints.

Defaults < the TOML file < ``VOLPLUGIN_*`` variables < flags. The faults of all sources
are found at once, each told with the key, variable or flag it belongs to.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Final

import attrs

from volplugin import config_doors, failpoints, toml
from volplugin.config_values import BackendConfig, Config, SocketConfig, Timeouts
from volplugin.errors import InvalidArgument
from volplugin.options import nearest, read
from volplugin.parsers import quote

__all__ = [
    "DEFAULT_FILE",
    "BackendConfig",
    "Config",
    "SocketConfig",
    "Timeouts",
    "load",
]

DEFAULT_FILE: Final = "/etc/volplugin/volplugin.toml"

_PREFIX: Final = "VOLPLUGIN_"
_TABLES: Final = ("socket", "timeouts", "backend")
SCALARS: Final = (
    "root",
    "default-backend",
    "log-format",
    "log-level",
    "sweep-interval",
    "admin-socket",
    "usage-interval",
    "usage-marks",
    "follow-interval",
    "propagated",
    "record",
)
_BACKEND: Final = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,254}")
# A backend keeps its things in ROOT/NAME, beside the lock, the note of sockets, the
# store, the stores that were put aside, and a managed plugin's admin socket.
_TAKEN: Final = re.compile(r"admin\.sock|lock|sockets(\.new)?|store([.-].*)?")


def load(
    *,
    file: str | None,
    environ: Mapping[str, str],
    flags: Mapping[str, object],
    settings_of: Callable[[str], type | None],
    drivers: Collection[str],
    aliases: Mapping[str, str] = MappingProxyType({}),
    shared: Collection[str] = (),
) -> Config:
    """Read the configuration from all its sources.

    ``file`` None means ``VOLPLUGIN_CONFIG``, or the default file, which need not exist.
    ``flags`` are named as the options of the command line; None and empty tuples are
    flags not given. ``settings_of`` gives the class, declared with `option`, of a
    driver's settings. ``aliases`` are other names of ``drivers``, of which ``shared``
    serve sockets of scope global. Raise one `InvalidArgument` that names every fault,
    one a line.
    """
    loader = _Loader(settings_of, drivers, aliases, shared)
    loader.read_file(file or environ.get("VOLPLUGIN_CONFIG") or None)
    loader.read_environ(environ)
    loader.read_flags(flags)
    return loader.finish()


class _Loader:
    """Gathers values and faults, source after source."""

    def __init__(
        self,
        settings_of: Callable[[str], type | None],
        drivers: Collection[str],
        aliases: Mapping[str, str],
        shared: Collection[str],
    ) -> None:
        self._settings_of = settings_of
        self._drivers = sorted(drivers)
        self._aliases = aliases
        self._shared = shared
        self._faults: list[str] = []
        self._values: dict[str, Any] = {}
        self._sockets: list[SocketConfig] = []
        self._backends = {
            name: BackendConfig(name=name, driver=name) for name in self._drivers
        }
        # Backends with faults of their own; None, every one, if the file is unreadable.
        self._doubtful: set[str] | None = set()
        self._default_from = ""

    def read_file(self, named: str | None) -> None:
        file = named or DEFAULT_FILE
        try:
            tables = toml.read_file(file, must_exist=named is not None)
        except InvalidArgument as error:
            self._faults.append(str(error))
            self._doubtful = None
            return
        where = f"{file}: "
        sections = {name: tables.pop(name) for name in _TABLES if name in tables}
        self._take(Config, tables, where, self._values, also=_TABLES)
        if "default-backend" in tables:
            self._default_from = f"{where}default-backend"
        for name, section in sections.items():
            if not isinstance(section, dict):
                self._faults.append(f"{where}{name}: must be a table, [{name}…]")
            elif name == "timeouts":
                found: dict[str, Any] = {}
                self._take(Timeouts, section, f"{where}timeouts.", found)
                self._values["timeouts"] = Timeouts(**found)
            else:
                self._read_named(where, name, section)

    def _read_named(self, where: str, kind: str, section: dict[str, Any]) -> None:
        for name, table in section.items():
            place = f"{where}{kind}.{toml.key(name)}"
            if not isinstance(table, dict):
                self._faults.append(
                    f"{place}: must be in a table of its own, [{kind}.NAME]"
                )
            elif kind == "socket":
                self._read_socket(place, table)
            else:
                self._read_backend(place, name, table)

    def _read_socket(self, place: str, table: dict[str, Any]) -> None:
        values: dict[str, Any] = {}
        self._take(SocketConfig, table, f"{place}.", values)
        if "path" in table and "path" not in values:
            return
        socket = SocketConfig(**values)
        if any(socket.path == other.path for other in self._sockets):
            self._faults.append(f"{place}.path: another socket has {socket.path} too")
        self._sockets.append(socket)

    def _read_backend(self, place: str, name: str, table: dict[str, Any]) -> None:
        before = len(self._faults)
        settings = dict(table)
        known = {name: name for name in self._drivers} | dict(self._aliases)
        driver = settings.pop("driver", known.get(name))
        if isinstance(driver, str):
            driver = self._aliases.get(driver, driver)
        if not _BACKEND.fullmatch(name):
            self._faults.append(
                f"{place}: a backend's name is letters, digits, '_', '.' and '-', "
                "at most 255, the first a letter or a digit"
            )
        elif _TAKEN.fullmatch(name):
            self._faults.append(f"{place}: this name is volplugin's own; take another")
        if driver is None:
            self._faults.append(
                f"{place}.driver: missing{nearest(name, self._drivers)}; "
                f"{self._choices()}"
            )
        elif not isinstance(driver, str) or driver not in self._drivers:
            hint = nearest(driver, self._drivers) if isinstance(driver, str) else ""
            self._faults.append(
                f"{place}.driver: there is no driver {quote(driver)}{hint}; "
                f"{self._choices()}"
            )
        else:
            if driver != known.get(name, driver):
                self._faults.append(
                    f"{place}.driver: a backend with a driver's name is of that "
                    "driver; leave the line out, or take another name"
                )
            cls = self._settings_of(driver) or _NoSettings
            self._take(cls, settings, f"{place}.", {}, also=("driver",))
            self._backends[name] = BackendConfig(
                name=name, driver=driver, settings=settings
            )
        if len(self._faults) > before and self._doubtful is not None:
            self._doubtful.add(name)

    def read_environ(self, environ: Mapping[str, str]) -> None:
        known = {_variable(key): key for key in (*SCALARS, "socket")}
        ours = {_variable("config"), failpoints.VARIABLE}
        for variable, value in environ.items():
            if not variable.startswith(_PREFIX) or variable in ours:
                continue
            if variable not in known:
                hint = nearest(variable, [*known, *ours])
                self._faults.append(f"{variable}: unknown variable{hint}")
            # A managed plugin gets every variable of its config.json, most of them "".
            elif value:
                self._read_scalar(known[variable], value, variable)

    def read_flags(self, flags: Mapping[str, object]) -> None:
        for name, value in flags.items():
            key = "socket" if name == "sockets" else name.replace("_", "-")
            if value is None or value == ():
                continue
            if key not in (*SCALARS, "socket"):
                raise TypeError(f"no flag {name!r} is known to the configuration")
            self._read_scalar(key, value, f"--{key}")

    def _read_scalar(self, key: str, value: object, where: str) -> None:
        """Take one value from a variable or a flag."""
        if key == "socket":
            self._replace_sockets(value, where)
            return
        self._take(Config, {key: value}, where, self._values, names_key=False)
        if key == "default-backend":
            self._default_from = where

    def _replace_sockets(self, value: object, where: str) -> None:
        """Listen on these paths instead; one that is in the file keeps its settings."""
        configured = {socket.path: socket for socket in self._sockets}
        sockets: dict[str, SocketConfig] = {}
        paths = value.split(",") if isinstance(value, str) else value
        for path in paths if isinstance(paths, Iterable) else [paths]:
            found: dict[str, Any] = {}
            self._take(SocketConfig, {"path": path}, where, found, names_key=False)
            if not found:
                continue
            socket = SocketConfig(**found)
            if socket.path in sockets:
                self._faults.append(f"{where}: {socket.path} is there twice")
            sockets[socket.path] = configured.get(socket.path, socket)
        self._sockets = list(sockets.values())

    def _take(
        self,
        cls: type[Any],
        raw: Mapping[str, object],
        where: str,
        into: dict[str, Any],
        *,
        also: Iterable[str] = (),
        names_key: bool = True,
    ) -> None:
        """Read ``raw`` into ``into``; note its faults as those of ``where``."""
        values, faults = read(cls, raw, also)
        into.update(values)
        for fault in faults:
            place = f"{where}{toml.key(fault.key)}" if names_key else where
            told = f"unknown key{fault.text}" if fault.unknown else fault.text
            self._faults.append(f"{place}: {told}")

    def finish(self) -> Config:
        """Check what only all sources together can tell, and make the value."""
        config = Config(**self._values, backends=self._backends)
        names = config_doors.Names(
            backends=self._backends,
            aliases=self._aliases,
            shared=self._shared,
            doubtful=self._doubtful,
            faults=self._faults,
        )
        sockets = tuple(
            config_doors.settle(socket, config.default_backend, names)
            for socket in self._sockets or config.sockets
        )
        config = attrs.evolve(config, sockets=sockets)
        names.find(config.default_backend, self._default_from or "default-backend")
        if any(socket.path == config.admin_socket for socket in sockets):
            self._faults.append(
                f"admin-socket: {config.admin_socket} is a socket for engines too; "
                f"give it a path of its own"
            )
        if self._faults:
            raise InvalidArgument("\n".join(self._faults))
        return config

    def _choices(self) -> str:
        return f"the drivers are {', '.join(self._drivers)}"


@attrs.frozen(kw_only=True)
class _NoSettings:
    """What a driver takes that can't be configured."""


def _variable(key: str) -> str:
    return _PREFIX + key.upper().replace("-", "_")
