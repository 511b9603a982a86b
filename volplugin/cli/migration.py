"""The command ``migrate``: volumes of others become volumes of the server that runs."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import click

from volplugin import origins
from volplugin.cli.settings import fail, finding, load_or_fail
from volplugin.cli.volumes import INTERRUPTED
from volplugin.errors import InUse, InvalidArgument, VolpluginError
from volplugin.origins import Origin
from volplugin.parsers import nearest, quote

if TYPE_CHECKING:
    from volplugin.admin.client import AdminClient
    from volplugin.admin.messages import MigrateAnswer

_SOURCES: Final = ("local", "local-persist", "directory")
_DOING: Final = {"move": "move", "copy": "copy", "adopt": "use"}
_DONE: Final = {"move": "moved", "copy": "copied", "adopt": "uses"}


def _options(
    _context: click.Context, _parameter: click.Parameter, values: Sequence[str]
) -> Mapping[str, str]:
    found = {}
    for value in values:
        key, equals, text = value.partition("=")
        if not (key and equals):
            raise click.BadParameter(f"{value!r}: give KEY=VALUE, such as size=10G")
        found[key] = text
    return found


@click.command(
    epilog="Moved by a rename where one file system has both places, in a moment; else "
    "copied with owners, times, extended attributes, hard links and holes, compared, "
    "and synced. What is killed half way leaves each volume where it was or where it "
    "goes: the same command again finishes. Containers that have a volume, running or "
    "stopped, are to be removed before, without -v, which would delete its files. "
    "Afterwards `docker volume rm NAME` makes Docker forget the old volume, never "
    "before: then NAME is volplugin's, and containers can be created with it. Volumes "
    "of rclone and of other plugins stay where they are: see `volplugin volume adopt`."
)
@click.argument("names", metavar="[VOLUME]...", nargs=-1)
@click.option(
    "--from",
    "source",
    required=True,
    type=click.Choice(_SOURCES),
    help="local: volumes of Docker's own driver. local-persist: those of that plugin, "
    "used where they are. directory: each subdirectory of --directory is a volume.",
)
@click.option("--all", "is_all", is_flag=True, help="Migrate all that there are.")
@click.option("--dry-run", is_flag=True, help="Show what would be done; no effect.")
@click.option("--as", "new_name", metavar="NAME", help="Give one VOLUME another name.")
@click.option(
    "--driver", metavar="BACKEND", default="", help="A backend of the driver local."
)
@click.option(
    "-o",
    "options",
    metavar="KEY=VALUE",
    multiple=True,
    callback=_options,
    help="An option of the new volumes, such as size=10G; may be repeated.",
)
@click.option(
    "--remove-source",
    is_flag=True,
    help="Delete what was copied, if it is still what was copied.",
)
@click.option(
    "--docker-root",
    metavar="DIR",
    default=origins.DOCKER_ROOT,
    show_default=True,
    help="Docker's data-root.",
)
@click.option("--directory", metavar="DIR", help="The directory of --from directory.")
@finding
def migrate(names: tuple[str, ...], source: str, **flags: Any) -> None:
    """Take over volumes that Docker, local-persist or you have on this host.

    \b
      volplugin migrate --from local --all --dry-run
      volplugin migrate --from local web db
      volplugin migrate --from local-persist --all
      volplugin migrate --from directory --directory /srv/volumes --all

    The server that runs does it, one volume after the other; one that can't be
    migrated stops no other, and the exit status is then 1.
    """  # noqa: D301  click's mark of lines to be left alone is the character
    if bool(names) == flags["is_all"]:
        raise click.UsageError("give VOLUME..., or --all")
    if flags["new_name"] is not None and len(names) != 1:
        raise click.UsageError("--as is for one VOLUME")
    if (source == "directory") != (flags["directory"] is not None):
        raise click.UsageError("--directory goes with --from directory, and only there")
    # Imported here so that `--help` does not wait for the client's libraries.
    from volplugin.admin.client import AdminClient  # noqa: PLC0415

    server = AdminClient(load_or_fail(flags).admin_socket)
    try:
        found = _found(source, flags)
        if names:
            found = _chosen(names, found, flags["directory"])
    except VolpluginError as error:
        fail(f"migrate from {source}: {error}", 1)
    if not found:
        click.echo("there is nothing to migrate", err=True)
    outcomes = [_migrate(server, origin, flags) for origin in found]
    done = [name for name in outcomes if name]
    if done and source != "directory" and not flags["dry_run"]:
        click.echo(
            f"next: docker volume rm {' '.join(done)}\n"
            f"That is Docker's old record, with what a copy left there. Then create "
            f"containers with the volume again.",
            err=True,
        )
    if not all(outcomes):
        raise SystemExit(1)


def _found(source: str, flags: Mapping[str, Any]) -> Sequence[Origin]:
    if source == "local":
        return origins.of_docker(flags["docker_root"])
    if source == "local-persist":
        return origins.of_local_persist(flags["docker_root"])
    return origins.of_folder(flags["directory"])


def _chosen(
    names: Sequence[str], found: Sequence[Origin], folder: str | None
) -> Sequence[Origin]:
    by_name = {origin.name: origin for origin in found}
    if folder is not None:  # one that has moved is gone; the server knows it
        for name in names:
            by_name.setdefault(name, origins.in_folder(folder, name))
    for name in dict.fromkeys(names):
        if name not in by_name:
            raise InvalidArgument(
                f"there is no volume {quote(name)}{nearest(name, by_name)}"
            )
    return [by_name[name] for name in dict.fromkeys(names)]


def _migrate(
    server: "AdminClient", origin: Origin, flags: Mapping[str, Any]
) -> str | None:
    """Migrate one volume and tell of it; return its old name, None if it failed."""
    from volplugin.admin.messages import MigrateRequest  # noqa: PLC0415

    request = MigrateRequest(
        name=flags["new_name"] or origin.name,
        driver=flags["driver"],
        options={**origin.options, **flags["options"]},
        origin=origin.path,
        dry=flags["dry_run"],
        remove_origin=flags["remove_source"],
    )
    try:
        if origin.refusal is not None:
            raise InUse(origin.refusal)
        answer = server.migrate(request)
    except VolpluginError as error:
        click.echo(f"volplugin: migrate {origin.name}: {error}", err=True)
        return None
    except KeyboardInterrupt:
        fail(
            f"migrate {origin.name}: the server goes on with it, and logs its outcome",
            INTERRUPTED,
        )
    click.echo(f"{request.name}: {_told(origin, answer, flags)}")
    return origin.name


def _told(origin: Origin, answer: "MigrateAnswer", flags: Mapping[str, Any]) -> str:
    done = answer.earlier or not flags["dry_run"]
    verb = (_DONE if done else _DOING)[answer.way]
    if answer.way == "adopt":
        return f"{verb} {origin.path}{', as before' if answer.earlier else ''}"
    text = f"{verb} {origin.path} to {answer.mountpoint}"
    if answer.earlier:
        text += " before"
    if answer.way == "copy":
        fate = "is deleted" if flags["remove_source"] else "stays"
        text += f" ({answer.reason}); {origin.path} {fate}"
    return text
