"""The commands of the server's host: ``serve``, ``config``, ``recover``."""

import os
from typing import Any

import click

from volplugin.cli.settings import EX_CONFIG, fail, load_or_fail, read, settings
from volplugin.config_print import render
from volplugin.errors import InvalidArgument, StoreCorrupt, VolpluginError
from volplugin.redaction import WORDS


@click.command(
    epilog="SIGTERM answers the calls under way and ends; mounts stay. SIGHUP reads "
    "the configuration again: log settings, timeouts, and backends."
)
@settings
@click.option(
    "--record",
    metavar="FILE",
    help="Append every call on the plugin sockets and its answer to FILE, for a report "
    "of a fault. Values of options and headers are blanked out where their names hold "
    f"{', '.join(WORDS[:-1])} or {WORDS[-1]}. Read FILE before you show it to others: "
    "it names volumes and directories.",
)
@click.option(
    "--propagated",
    metavar="DIR",
    help="Mount volumes below DIR for engines: a managed plugin's propagatedMount.",
)
def serve(**flags: Any) -> None:
    """Answer engines on the plugin sockets until SIGTERM.

    Then `docker volume create -d volplugin NAME` makes a volume, and
    `docker volume create -d volplugin -o help x` lists the options.
    """
    # Imported here so that `--help` does not wait for the server's libraries.
    from volplugin import logs, service, supervision  # noqa: PLC0415

    config = load_or_fail(flags)
    writer = logs.setup(fmt=config.log_format, level=config.log_level)
    try:
        supervisor = supervision.supervisor(config, os.environ)
    except InvalidArgument as error:
        writer.close()
        fail(str(error), EX_CONFIG)
    try:
        service.serve(config, writer, lambda: read(flags), supervisor)
    except StoreCorrupt as error:
        writer.close()
        fail(str(error), EX_CONFIG)
    except VolpluginError as error:
        writer.close()
        fail(str(error), 1)
    writer.close()


@click.command()
@settings
def config(**flags: Any) -> None:
    """Print the configuration in effect, from all its sources, as TOML.

    Comments at the end say, for each backend, what holds the size of its volumes.
    """
    from volplugin.backends import build  # noqa: PLC0415
    from volplugin.drivers.driver import TellsLimits  # noqa: PLC0415

    loaded = load_or_fail(flags)
    click.echo(render(loaded))
    for name, driver in build(loaded).items():
        if isinstance(driver, TellsLimits):
            click.echo(f"# backend {name}: limits by {driver.limited_by()}")


@click.command()
@settings
def recover(**flags: Any) -> None:
    """Rebuild a lost or corrupt store from the volumes on disk.

    Every volume's root carries its own record. The old store is kept beside the new
    one. Stop the server first.
    """
    from volplugin import failpoints, rebuild, service  # noqa: PLC0415

    config = load_or_fail(flags)
    try:
        failpoints.arm(os.environ.get(failpoints.VARIABLE, ""))
        with service.locked_root(config.root):
            outcome = rebuild.rebuild(config, service.store_path(config.root))
    except VolpluginError as error:
        fail(str(error), 1)
    for fault in outcome.faults:
        click.echo(f"warning: {fault}", err=True)
    for volume in sorted(outcome.volumes, key=lambda v: v.name):
        click.echo(f"{volume.name}  {volume.backend}  {volume.mountpoint}")
    kept = f"; the old store is {outcome.kept}" if outcome.kept else ""
    click.echo(f"{len(outcome.volumes)} volumes{kept}", err=True)
