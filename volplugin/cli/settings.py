"""What every command shares: how it finds its configuration, and how it fails."""

import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, Final, NoReturn, TypeVar

import click

from volplugin import drivers
from volplugin.config import Config, load
from volplugin.errors import InvalidArgument

EX_CONFIG: Final = 78  # sysexits.h: what systemd shows as "configuration error"

F = TypeVar("F", bound=Callable[..., Any])


def finding(command: F) -> F:
    """Add the options by which a client's command finds the server."""
    for option in (
        click.option(
            "--admin-socket",
            metavar="PATH",
            help="Where operators' commands reach the server; a managed plugin's is "
            "ROOT/admin.sock.  [default: /run/volplugin/admin.sock]",
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


def settings(command: F) -> F:
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
    return finding(command)


def read(flags: dict[str, Any], environ: Mapping[str, str] = os.environ) -> Config:
    """Read the configuration that a command was given by its options."""
    given = {
        "root": flags.get("root"),
        "sockets": flags.get("sockets") or None,
        "admin-socket": flags["admin_socket"],
        "log-format": flags.get("log_format"),
        "propagated": flags.get("propagated"),
        "record": flags.get("record"),
        "log-level": "debug"
        if flags.get("verbose")
        else "warning"
        if flags.get("quiet")
        else None,
    }
    return load(
        file=flags["file"],
        environ=environ,
        flags={key: value for key, value in given.items() if value is not None},
        settings_of=drivers.settings_of,
        drivers=drivers.NAMES,
        aliases=drivers.ALIASES,
        shared=drivers.SHARED,
    )


def load_or_fail(flags: dict[str, Any]) -> Config:
    """Do as `read`; end the command where the configuration is faulty."""
    try:
        return read(flags)
    except InvalidArgument as error:
        fail(str(error), EX_CONFIG)


def fail(message: str, status: int) -> NoReturn:
    """End the command with ``message`` on stderr and ``status``."""
    tell(message)
    sys.exit(status)


def tell(message: str) -> None:
    """Write ``message`` to stderr."""
    for line in message.splitlines():
        click.echo(f"volplugin: {line}", err=True)
