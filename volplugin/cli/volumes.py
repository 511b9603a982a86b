"""The commands of operators, for the server that runs: ``volume``, ``snapshot``."""

import os
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, NoReturn

import click

from volplugin.cli.settings import fail, finding, load_or_fail, tell
from volplugin.config_values import DEFAULT_ADMIN_SOCKET, MANAGED_ADMIN_SOCKET
from volplugin.errors import VolpluginError
from volplugin.sizes import format_size

if TYPE_CHECKING:
    from volplugin.admin.client import AdminClient

INTERRUPTED: Final = 128 + signal.SIGINT  # what a shell shows of Ctrl-C


@click.group()
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
@finding
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
    server = _server(flags)
    try:
        answer = server.resize(name, size=size, inodes=inodes)
    except (VolpluginError, KeyboardInterrupt) as error:
        _failed(f"resize {name}", error)
    asked = {"size": size, "inodes": inodes}
    changes = (
        f"{key} {answer.before.get(key, 'unset')} -> {answer.after.get(key, 'unset')}"
        for key, value in asked.items()
        if value is not None
    )
    click.echo(f"{answer.name}: {', '.join(changes)}")


@volume.command(
    epilog="The last release of PouchContainer mounts a volume for every start of a "
    "container and never unmounts it: Status then has a field `held`. An engine that "
    "was killed needs none of this: what it held is let go of by itself once no "
    "container has it. Where a process of the host has files open in the volume, the "
    "command drops the holders and fails with the reason; the volume is detached once "
    "that process has ended."
)
@click.argument("name")
@finding
def release(name: str, **flags: Any) -> None:
    """Drop all who hold the volume NAME on this host, and detach it.

    \b
      volplugin volume release db

    Refused while a container has the volume: it names the container's process, and
    nothing changes. Start no container with the volume at the same moment. The volume
    and what is in it stay, but the content of a tmpfs, which ends with its last
    holder. Success where nobody holds it.
    """  # noqa: D301  click's mark of lines to be left alone is the character
    server = _server(flags)
    try:
        answer = server.release(name)
    except (VolpluginError, KeyboardInterrupt) as error:
        _failed(f"release {name}", error)
    dropped = ", ".join(answer.holders)
    click.echo(f"{name}: {f'released from {dropped}' if dropped else 'nobody held it'}")


@volume.command(
    epilog="The other host's writes fail from then on, whatever it does: its cluster "
    "client is blocklisted before the volume is let go of. Containers there get I/O "
    "errors; stop them. For a host that is dead or hangs; one that works should stop "
    "its containers instead, which loses nothing."
)
@click.argument("name")
@finding
def takeover(name: str, **flags: Any) -> None:
    """Take the volume NAME from the host that has it, dead or alive.

    \b
      volplugin volume takeover pg

    Here or anywhere, the next container that is started with it gets it. What the
    other host had not yet synced to the cluster is lost, as in a power cut. Nothing
    happens where no other host has it.
    """  # noqa: D301  click's mark of lines to be left alone is the character
    server = _server(flags)
    try:
        answer = server.take_over(name)
    except (VolpluginError, KeyboardInterrupt) as error:
        _failed(f"takeover {name}", error)
    taken = (
        f"taken from {', '.join(answer.hosts)}" if answer.hosts else "no host had it"
    )
    click.echo(f"{name}: {taken}")


@volume.command(
    epilog="An adopted volume is the plugin's as before: `docker volume rm` makes "
    "volplugin forget it, and the plugin keeps it. Take its old name out of use: a "
    "container that gets it from the plugin directly is not counted here."
)
@click.argument("names", metavar="[VOLUME]...", nargs=-1)
@click.option(
    "--driver",
    required=True,
    metavar="DRIVER[=PLUGIN]",
    help="A driver or backend that adopts; of `plugin`, which one: plugin=rclone.",
)
@click.option("--list", "is_list", is_flag=True, help="Show what there is; no effect.")
@click.option("--all", "is_all", is_flag=True, help="Adopt all that there is.")
@click.option("--as", "new_name", metavar="NAME", help="Give one VOLUME another name.")
@finding
def adopt(
    names: tuple[str, ...],
    driver: str,
    new_name: str | None,
    *,
    is_list: bool,
    is_all: bool,
    **flags: Any,
) -> None:
    """Take over volumes that another volume plugin has.

    \b
      volplugin volume adopt --driver plugin=rclone --list
      volplugin volume adopt --driver plugin=rclone photos
      volplugin volume adopt --driver plugin=rclone photos --as holiday

    From then on engines get them from volplugin, by the same names, with its
    accounting: nothing is copied or moved.
    """  # noqa: D301
    if sum((bool(names), is_list, is_all)) != 1:
        raise click.UsageError("give VOLUME..., or --all, or --list")
    if new_name is not None and len(names) != 1:
        raise click.UsageError("--as is for one VOLUME")
    backend, _, plugin = driver.partition("=")
    options = {"plugin": plugin} if plugin else {}
    server = _server(flags)
    try:
        found = server.adoptable(backend, options).volumes if not names else ()
    except (VolpluginError, KeyboardInterrupt) as error:
        _failed(f"adopt from {driver}", error)
    if is_list:
        _print_table(
            [("VOLUME", "ADOPTED AS"), *((each.name, each.volume) for each in found)]
        )
        return
    failures = 0
    for there in names or [each.name for each in found if not each.volume]:
        name = there if new_name is None else new_name
        try:
            server.adopt(name, backend, options, there)
        except KeyboardInterrupt as error:
            _failed(f"adopt {there}", error)
        except VolpluginError as error:  # one of a hundred keeps none of the others
            tell(f"adopt {there}: {error}")
            failures += 1
        else:
            click.echo(name)
    if failures:
        sys.exit(1)


@volume.command(
    epilog="For a plugin that is gone for good, and for a volume that another is to "
    "have: the opposite of adopt. Containers go on with it meanwhile."
)
@click.argument("name")
@finding
def disown(name: str, **flags: Any) -> None:
    """Leave the volume NAME of another plugin to that plugin.

    \b
      volplugin volume disown photos
      docker volume rm photos

    From then on its removal takes away what volplugin knows of it and nothing at the
    plugin, which is not asked: it need not even be there.
    """  # noqa: D301
    server = _server(flags)
    try:
        server.disown(name)
    except (VolpluginError, KeyboardInterrupt) as error:
        _failed(f"disown {name}", error)
    click.echo(f"{name}: its plugin's own")


@click.group()
def snapshot() -> None:
    """Keep volumes as they are at one moment. For root alone.

    A new volume begins as a copy of a snapshot with `docker volume create -d volplugin
    -o from=VOLUME@SNAPSHOT NEW`.
    """


def _split(_context: click.Context, _parameter: click.Parameter, value: str) -> Any:
    volume_name, separator, name = value.partition("@")
    if not (volume_name and separator and name):
        raise click.BadParameter(f"{value!r}: give VOLUME@SNAPSHOT, such as pg@monday")
    return volume_name, name


@snapshot.command()
@click.argument("snapshot", metavar="VOLUME@SNAPSHOT", callback=_split)
@finding
def create(snapshot: tuple[str, str], **flags: Any) -> None:
    """Keep a volume as it is now, also while containers use it.

    \b
      volplugin snapshot create pg@monday

    The snapshot holds what a power cut at this moment would leave: all that programs
    have synced, and what this host had in its caches.
    """  # noqa: D301
    server = _server(flags)
    try:
        server.take_snapshot(*snapshot)
    except (VolpluginError, KeyboardInterrupt) as error:
        _failed(f"snapshot {'@'.join(snapshot)}", error)
    click.echo("@".join(snapshot))


@snapshot.command()
@click.argument("name", metavar="VOLUME")
@finding
def ls(name: str, **flags: Any) -> None:
    """List the snapshots of a volume, oldest first."""
    server = _server(flags)
    try:
        answer = server.snapshots(name)
    except (VolpluginError, KeyboardInterrupt) as error:
        _failed(f"snapshots of {name}", error)
    rows = [("SNAPSHOT", "CREATED", "SIZE")]
    for entry in answer.snapshots:
        size = format_size(int(entry.size)) if entry.size else ""
        rows.append((f"{name}@{entry.name}", entry.created_at, size))
    _print_table(rows)


@snapshot.command()
@click.argument("snapshot", metavar="VOLUME@SNAPSHOT", callback=_split)
@finding
def rm(snapshot: tuple[str, str], **flags: Any) -> None:
    """Delete a snapshot; the volume and other snapshots stay.

    Refused while volumes that were made from it need it.
    """
    server = _server(flags)
    try:
        server.drop_snapshot(*snapshot)
    except (VolpluginError, KeyboardInterrupt) as error:
        _failed(f"snapshot {'@'.join(snapshot)}", error)
    click.echo("@".join(snapshot))


def _print_table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = zip(row, widths, strict=True)
        click.echo("  ".join(cell.ljust(width) for cell, width in cells).rstrip())


def _server(flags: dict[str, Any]) -> "AdminClient":
    # Imported here so that `--help` does not wait for the client's libraries.
    from volplugin.admin.client import AdminClient  # noqa: PLC0415

    config = load_or_fail(flags)
    socket = config.admin_socket
    managed = os.path.join(config.root, MANAGED_ADMIN_SOCKET)
    if (
        socket == DEFAULT_ADMIN_SOCKET
        and not os.path.lexists(socket)
        and os.path.lexists(managed)
    ):
        socket = managed
    return AdminClient(socket)


def _failed(doing: str, error: BaseException) -> NoReturn:
    if isinstance(error, KeyboardInterrupt):
        fail(f"{doing}: the server goes on with it, and logs its outcome", INTERRUPTED)
    fail(f"{doing}: {error}", 1)
