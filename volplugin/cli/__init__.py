"""The command line: what runs a server, and what asks one that runs."""

import click

from volplugin import __version__
from volplugin.cli import migration, server, units, volumes


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


for command in (
    server.serve,
    server.config,
    server.recover,
    volumes.volume,
    volumes.snapshot,
    units.install,
    units.uninstall,
    migration.migrate,
):
    cli.add_command(command)


def main() -> None:
    """Run the command line."""
    cli(prog_name="volplugin")
