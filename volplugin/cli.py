"""The command line: ``volplugin serve``, ``config``, ``recover``, ``volume``."""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any, Final, NoReturn, TypeVar

import click

from volplugin import __version__, drivers
from volplugin.config import Config, load, render
from volplugin.errors import InvalidArgument, StoreCorrupt, VolpluginError

EX_CONFIG: Final = 78  # sysexits.h: what systemd shows as "configuration error"
INTERRUPTED: Final = 128 + signal.SIGINT  # what a shell shows of Ctrl-C

F = TypeVar("F", bound=Callable[..., Any])


def _finding(command: F) -> F:
    """Add the options by which a client's command finds the server."""
    for option in (
        click.option(
            "--admin-socket",
            metavar="PATH",
            help="Where operators' commands reach the server.  "
            "[default: /run/volplugin/admin.sock]",
        ),
        click.option(
            "--config",
            "file",
            metavar="FILE",
            help="Read settings from FILE.  [default: /etc/volplugin/volplugin.toml]",
        ),
    ):
        command = option(command)
    return command


def _settings(command: F) -> F:
    """Add the options by which every command of the host finds its configuration."""
    for option in (
        click.option("-q", "quiet", is_flag=True, help="Log warnings and errors only."),
        click.option("-v", "verbose", is_flag=True, help="Log more."),
        click.option(
            "--log-format",
            type=click.Choice(["text", "json"]),
            help="One line a fact, for people or for machines.  [default: text]",
        ),
        click.option(
            "--socket",
            "sockets",
            metavar="PATH",
            multiple=True,
            help="Listen here; may be repeated.  "
            "[default: /run/docker/plugins/volplugin.sock]",
        ),
        click.option(
            "--root",
            metavar="DIR",
            help="Where volumes and state are.  [default: /var/lib/volplugin]",
        ),
    ):
        command = option(command)
    return _finding(command)


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Each setting is also a variable: VOLPLUGIN_CONFIG, VOLPLUGIN_ROOT, "
    "VOLPLUGIN_SOCKET (paths separated by commas), VOLPLUGIN_LOG_FORMAT, "
    "VOLPLUGIN_LOG_LEVEL, VOLPLUGIN_DEFAULT_BACKEND, "
    "VOLPLUGIN_SWEEP_INTERVAL, VOLPLUGIN_ADMIN_SOCKET. Flags go before variables, "
    "variables before the file. Exit status 78 means a faulty configuration or a "
    "corrupt store.",
)
@click.version_option(__version__, prog_name="volplugin")
def cli() -> None:
    """Volumes for Docker, Podman and PouchContainer that are never lost."""


@cli.command(
    epilog="SIGTERM answers the calls under way and ends; mounts stay. SIGHUP reads "
    "the configuration again: log settings, timeouts, and backends."
)
@_settings
def serve(**flags: Any) -> None:
    """Answer engines on the plugin sockets until SIGTERM.

    Then `docker volume create -d volplugin NAME` makes a volume, and
    `docker volume create -d volplugin -o help x` lists the options.
    """
    # Imported here so that `--help` does not wait for the server's libraries.
    from volplugin import logs, service  # noqa: PLC0415

    config = _load(flags)
    writer = logs.setup(fmt=config.log_format, level=config.log_level)
    try:
        service.serve(config, writer, lambda: _read(flags))
    except StoreCorrupt as error:
        writer.close()
        _fail(str(error), EX_CONFIG)
    except VolpluginError as error:
        writer.close()
        _fail(str(error), 1)
    writer.close()


@cli.command()
@_settings
def config(**flags: Any) -> None:
    """Print the configuration in effect, from all its sources, as TOML.

    Comments at the end say, for each backend, what holds the size of its volumes.
    """
    from volplugin.backends import build  # noqa: PLC0415
    from volplugin.drivers.driver import TellsLimits  # noqa: PLC0415

    loaded = _load(flags)
    click.echo(render(loaded))
    for name, driver in build(loaded).items():
        if isinstance(driver, TellsLimits):
            click.echo(f"# backend {name}: limits by {driver.limited_by()}")


@cli.command()
@_settings
def recover(**flags: Any) -> None:
    """Rebuild a lost or corrupt store from the volumes on disk.

    Every volume's root carries its own record. The old store is kept beside the new
    one. Stop the server first.
    """
    from volplugin import failpoints, rebuild, service  # noqa: PLC0415

    config = _load(flags)
    try:
        failpoints.arm(os.environ.get(failpoints.VARIABLE, ""))
        with service.locked_root(config.root):
            outcome = rebuild.rebuild(config, service.store_path(config.root))
    except VolpluginError as error:
        _fail(str(error), 1)
    for fault in outcome.faults:
        click.echo(f"warning: {fault}", err=True)
    for volume in sorted(outcome.volumes, key=lambda v: v.name):
        click.echo(f"{volume.name}  {volume.backend}  {volume.mountpoint}")
    kept = f"; the old store is {outcome.kept}" if outcome.kept else ""
    click.echo(f"{len(outcome.volumes)} volumes{kept}", err=True)


@cli.group()
def volume() -> None:
    """Change volumes of the server that runs. For root alone."""


@volume.command(
    epilog="Online, that is while containers use the volume: a project quota and a "
    "btrfs volume grow and shrink. A loop image grows; with ext4 it shrinks only "
    "while no container has it, with XFS never. Nothing shrinks below what is in it. "
    "No data is lost by any outcome, and the old limit stays if the new one can't be."
)
@click.argument("name")
@click.argument("size", required=False)
@click.option("--inodes", metavar="N", help="How many files it can hold, such as 1m.")
@_finding
def resize(name: str, size: str | None, inodes: str | None, **flags: Any) -> None:
    """Give the volume NAME another size limit, another number of inodes, or both.

    \b
      volplugin volume resize db 20G
      volplugin volume resize db 20G --inodes 1m
      volplugin volume resize db --inodes 1m

    SIZE is a number with K, M, G, T or P, as in `docker volume create -o size=SIZE`:
    the whole size it gets, not what is added. The command ends when the change is
    done, after minutes for a large image. Ctrl-C ends the command, not the change.
    """  # noqa: D301  click's mark of lines to be left alone is the character
    if size is None and inodes is None:
        raise click.UsageError("nothing to change: give SIZE or --inodes, or both")
    from volplugin.admin import client  # noqa: PLC0415

    server = client.AdminClient(_load(flags).admin_socket)
    try:
        answer = server.resize(name, size=size, inodes=inodes)
    except VolpluginError as error:
        _fail(f"resize {name}: {error}", 1)
    except KeyboardInterrupt:
        _fail(
            f"resize {name}: the server goes on with it, and logs its outcome",
            INTERRUPTED,
        )
    asked = {"size": size, "inodes": inodes}
    changes = (
        f"{key} {answer.before.get(key, 'unset')} -> {answer.after.get(key, 'unset')}"
        for key, value in asked.items()
        if value is not None
    )
    click.echo(f"{answer.name}: {', '.join(changes)}")


def _read(flags: dict[str, Any]) -> Config:
    given = {
        "root": flags.get("root"),
        "sockets": flags.get("sockets") or None,
        "admin-socket": flags["admin_socket"],
        "log-format": flags.get("log_format"),
        "log-level": "debug"
        if flags.get("verbose")
        else "warning"
        if flags.get("quiet")
        else None,
    }
    return load(
        file=flags["file"],
        environ=os.environ,
        flags={key: value for key, value in given.items() if value is not None},
        settings_of=drivers.settings_of,
        drivers=drivers.NAMES,
    )


def _load(flags: dict[str, Any]) -> Config:
    try:
        return _read(flags)
    except InvalidArgument as error:
        _fail(str(error), EX_CONFIG)


def _fail(message: str, status: int) -> NoReturn:
    for line in message.splitlines():
        click.echo(f"volplugin: {line}", err=True)
    sys.exit(status)


def main() -> None:
    """Run the command line."""
    cli(prog_name="volplugin")
