"""What the sockets of the configuration serve, held against the backends it has."""

from collections.abc import Collection, Mapping, Sequence

import attrs

from volplugin.config_values import BackendConfig, SocketConfig
from volplugin.options import nearest
from volplugin.parsers import quote


@attrs.frozen(kw_only=True)
class Names:
    """The backends that a configuration can name, and the faults of doing so.

    ``aliases`` are other names of drivers, of which ``shared`` have volumes of
    clusters. What is said of a backend in ``doubtful`` is no fault of its own; None
    stands for all of them.
    """

    backends: Mapping[str, BackendConfig]
    aliases: Mapping[str, str]
    shared: Collection[str]
    doubtful: Collection[str] | None
    faults: list[str]

    def find(self, wanted: str, where: str | None) -> BackendConfig | None:
        """Return a backend by its name or its driver's other one.

        That there is none is a fault of ``where``, unless the backend's own was told.
        """
        name = wanted if wanted in self.backends else self.aliases.get(wanted, wanted)
        found = self.backends.get(name)
        is_told = self.doubtful is None or wanted in self.doubtful
        if found is None and where is not None and not is_told:
            self.faults.append(
                f"{where}: there is no backend "
                f"{quote(wanted)}{nearest(wanted, self.backends)}; "
                f"there are {', '.join(sorted(self.backends))}"
            )
        return found


def settle(socket: SocketConfig, default: str, names: Names) -> SocketConfig:
    """Return the socket with what its backends decide; ``default`` is everyone's.

    One that has ``backends`` has them by their own names, and a default of its own.
    """
    place = f"socket {socket.path}: "
    wanted = socket.default_backend or default
    # A faulty default for all sockets is told of once.
    told = None if socket.default_backend is None else f"{place}default-backend"
    found = names.find(wanted, told)
    if socket.backends is not None:
        return _settle_backends(socket, found, place, names)
    if found is not None and _must_be_shared(socket, found, names):
        names.faults.append(
            f"{place}scope: a global socket serves shared backends "
            f"alone, and its default backend {quote(wanted)} is of driver "
            f"{found.driver}: give it a default-backend of driver {_shared(names)}"
        )
    return socket


def _settle_backends(
    socket: SocketConfig, default: BackendConfig | None, place: str, names: Names
) -> SocketConfig:
    given = socket.backends or ()
    found = [names.find(name, f"{place}backends") for name in given]
    allowed = {each.name: each for each in found if each is not None}
    if not given:
        names.faults.append(
            f"{place}backends: the list is empty; name one at least, or leave it out"
        )
    if len(allowed) == 0 or None in found:
        return socket
    for each in allowed.values():
        if _must_be_shared(socket, each, names):
            names.faults.append(
                f"{place}backends: a global socket serves shared backends alone, and "
                f"{each.name} is of driver {each.driver}: leave it out; those of "
                f"driver {_shared(names)} can be there"
            )
    if socket.default_backend is None and len(allowed) == 1:
        (default,) = allowed.values()
    if default is None:
        return socket
    if default.name not in allowed:
        names.faults.append(_not_among(socket, default.name, [*allowed], place))
    # The name is settled here: a reload of everyone's default leaves sockets alone.
    return attrs.evolve(
        socket,
        backends=tuple(allowed),
        default_backend=socket.default_backend or default.name,
    )


def _not_among(
    socket: SocketConfig, default: str, allowed: Sequence[str], place: str
) -> str:
    listed = ", ".join(allowed)
    if socket.default_backend is None:
        return (
            f"{place}default-backend: missing; everyone's is {quote(default)}, which "
            f"is not among this socket's backends: give it one of {listed}"
        )
    return (
        f"{place}default-backend: {quote(socket.default_backend)} is not among this "
        f"socket's backends: give it one of {listed}"
    )


def _must_be_shared(socket: SocketConfig, backend: BackendConfig, names: Names) -> bool:
    return socket.scope == "global" and backend.driver not in names.shared


def _shared(names: Names) -> str:
    return " or ".join(sorted(names.shared))
