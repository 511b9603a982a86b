"""The commands of a host with systemd: ``install-service``, ``uninstall-service``."""

import os
import sys
from collections.abc import Callable
from typing import Any, Final, TypeVar

import click

from volplugin import sockets, units
from volplugin.cli.settings import EX_CONFIG, fail, read
from volplugin.config import DEFAULT_FILE, Config
from volplugin.errors import InvalidArgument, StoreCorrupt, VolpluginError
from volplugin.host import commands
from volplugin.units import NAMES, SERVICE, SOCKET, State

_SYSTEMD_RUNS: Final = "/run/systemd/system"  # sd_booted(3)
_LIMIT: Final = 1000.0  # seconds: a start ends when all is recovered

F = TypeVar("F", bound=Callable[..., Any])


def _shared(command: F) -> F:
    for option in (
        click.option("--force", is_flag=True, help="Also files that were changed."),
        click.option(
            "--directory",
            metavar="DIR",
            default=units.DIRECTORY,
            help="Where the units are; systemd is told of "
            f"{units.DIRECTORY} alone.  [default: {units.DIRECTORY}]",
        ),
    ):
        command = option(command)
    return command


@click.command("install-service")
@click.option("--no-start", is_flag=True, help="Write the units and start nothing.")
@_shared
def install(directory: str, *, no_start: bool, force: bool) -> None:
    """Have systemd run the server, now and at each boot. For root alone.

    \b
      volplugin install-service
      systemctl status volplugin

    Writes a service and a socket unit that start this very program, before
    docker.service, and starts them. Doing it again changes nothing; do so after a
    change of `root` in /etc/volplugin/volplugin.toml, where all settings are. Changes
    of the units belong into `systemctl edit volplugin`.
    """  # noqa: D301  click's mark of lines to be left alone is the character
    program = _program()
    is_systems = os.path.realpath(directory) == os.path.realpath(units.DIRECTORY)
    try:
        root = _config().root
    except InvalidArgument as error:
        fail(str(error), EX_CONFIG)
    try:
        if is_systems and not no_start:
            _require_systemd("start the service")
        units.check(program, root)
        found = units.units(directory, program, root)
        if not force:
            units.refuse_changed(found, "overwrite")
        runs = is_systems and _runs_systemd() and _is_active(SERVICE)
        if is_systems and not no_start and not runs and not _is_active(SOCKET):
            _refuse_another_server()
        units.write(found)
        for unit in found:
            is_current = unit.state is State.CURRENT
            click.echo(f"{unit.path}: {'unchanged' if is_current else 'written'}")
        if not is_systems or not _runs_systemd():
            click.echo("systemd was told nothing")
            return
        _systemctl("daemon-reload")
        if no_start:
            click.echo(f"nothing was started: systemctl enable --now {' '.join(NAMES)}")
            return
        _systemctl("enable", "--now", *NAMES)
    except VolpluginError as error:
        fail(str(error), 1)
    if runs and any(unit.state is not State.CURRENT for unit in found):
        click.echo(
            "it runs by its earlier unit; take the new one over, without a loss:"
        )
        click.echo("systemctl restart volplugin")
    click.echo(f"{SERVICE} is {_property('ActiveState')}: {_property('StatusText')}")


@click.command("uninstall-service")
@_shared
def uninstall(directory: str, *, force: bool) -> None:
    """Stop the server, and have systemd forget it. All volumes stay.

    \b
      volplugin uninstall-service

    Removes the two units that install-service wrote, and nothing else: volumes, store
    and configuration stay as they are, and so do mounts of running containers.
    """  # noqa: D301
    is_systems = os.path.realpath(directory) == os.path.realpath(units.DIRECTORY)
    try:
        found = units.units(directory, _program(), "/")
        if not force:
            units.refuse_changed(found, "remove")
        there = [unit for unit in found if unit.state is not State.ABSENT]
        tells = is_systems and _runs_systemd() and bool(there)
        if tells:
            _systemctl("disable", "--now", *(os.path.basename(u.path) for u in there))
        units.remove(there)
        for unit in found:
            is_there = unit.state is not State.ABSENT
            click.echo(f"{unit.path}: {'removed' if is_there else 'was not there'}")
        if tells:
            _systemctl("daemon-reload")
            _take_socket_away()
    except VolpluginError as error:
        fail(str(error), 1)
    for unit in found:
        if os.path.isdir(f"{unit.path}.d"):
            click.echo(f"{unit.path}.d: not ours, stays")
    _tell_what_stays(in_use=is_systems)


def _config() -> Config:
    """Return the configuration that the service has: not that of this shell."""
    return read({"file": None, "admin_socket": None}, environ={})


def _program() -> list[str]:
    """Return the words that start this very program, wherever one stands."""
    name = sys.argv[0]
    if os.path.basename(name) == "__main__.py":
        return [os.path.abspath(sys.executable), "-m", "volplugin"]
    return [os.path.abspath(name)]


def _runs_systemd() -> bool:
    return os.path.isdir(_SYSTEMD_RUNS)


def _require_systemd(doing: str) -> None:
    if not _runs_systemd():
        fail(
            f"cannot {doing}: this host does not run systemd ({_SYSTEMD_RUNS} is not "
            f"there). Have its init start `volplugin serve` before the engines; "
            f"--no-start writes the units all the same",
            1,
        )


def _systemctl(*words: str) -> None:
    command = ["systemctl", *words]
    click.echo(" ".join(command))
    hint = f"look at `systemctl status {SERVICE}` and `journalctl -u {SERVICE}`"
    try:
        said = commands.run(command, limit=_LIMIT, doing=" ".join(command))
    except VolpluginError as error:
        fail(f"{error}\nthe units' files are in place; {hint}", 1)
    if said.strip():
        click.echo(said.rstrip())


def _is_active(unit: str) -> bool:
    command = ["systemctl", "is-active", unit]
    said = commands.run(command, limit=_LIMIT, doing=f"ask for {unit}", ok=range(6))
    return said.strip() in {"active", "activating", "reloading"}


def _property(name: str) -> str:
    command = ["systemctl", "show", "--value", f"--property={name}", SERVICE]
    return commands.run(command, limit=_LIMIT, doing=f"ask for {SERVICE}").strip()


def _refuse_another_server() -> None:
    """Fail where a server runs that is not systemd's: it would lose its socket."""
    path = units.listened_on()
    if sockets.is_served(path):
        fail(
            f"a server that systemd did not start listens on {path}: end it first "
            f"(`fuser {path}` tells its process); its mounts stay",
            1,
        )


def _take_socket_away() -> None:
    """Remove the socket that systemd leaves: dockerd would wait for it, 15 s a call."""
    path = units.listened_on()
    if sockets.remove_refusing(path):
        click.echo(f"{path}: removed, nobody listens on it any more")


def _tell_what_stays(*, in_use: bool) -> None:
    # Imported here so that `--help` does not wait for the store's libraries.
    from volplugin import service  # noqa: PLC0415

    try:
        root = _config().root
        volumes = service.volumes_in_use(root) if in_use else {}
    except (VolpluginError, StoreCorrupt) as error:
        click.echo(f"warning: cannot tell which volumes are in use: {error}", err=True)
        return
    for name, mountpoint in sorted(volumes.items()):
        click.echo(
            f"warning: {name} is in use, at {mountpoint}: its mount stays, and so do "
            f"its containers; nobody unmounts it now",
            err=True,
        )
    click.echo(f"volumes and store in {root} and settings in {DEFAULT_FILE} stay")
