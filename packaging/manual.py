"""Write the man page and the shell completions: ``make manual``.

The page is made of the command line's own help, the completions are click's. Both are
kept in the tree, so that no build needs click; a test holds the page to the help.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import click

from volplugin.cli import cli

HERE: Final = Path(__file__).resolve().parent
PAGE: Final = HERE / "man" / "volplugin.1"
COMPLETIONS: Final = {  # by shell, named as the shells look for them
    "bash": HERE / "completions" / "volplugin",
    "zsh": HERE / "completions" / "_volplugin",
    "fish": HERE / "completions" / "volplugin.fish",
}

_TAIL: Final = r"""
.SH ENVIRONMENT
{environment}
.SH EXIT STATUS
.TP
0
All went well.
.TP
1
The command failed; standard error says why.
.TP
2
The command line is wrong.
.TP
78
The configuration is faulty, or the store is corrupt.
.TP
130
The command was interrupted; the server goes on with what it was asked for.
.SH FILES
.TP
.I /etc/volplugin/volplugin.toml
The configuration, which need not exist;
.B volplugin config
prints what is in effect.
.TP
.I /var/lib/volplugin
The store, and the volumes of the host.
.TP
.I /run/docker/plugins/volplugin.sock
Where engines find the plugin.
.TP
.I /run/volplugin/admin.sock
Where operators' commands reach the server.
.SH SEE ALSO
.BR docker (1),
.BR docker\-volume\-create (1),
.BR podman\-volume (1)
""".lstrip()


def page() -> str:
    """Return the man page as roff(7)."""
    lines = [
        '.\\" Made by packaging/manual.py of the help: change that, not this.',
        '.TH VOLPLUGIN 1 "" "volplugin" "Volumes for containers"',
        ".SH NAME",
        f"volplugin \\- {_text(_sentence(cli)).rstrip('.')}",
        ".SH SYNOPSIS",
        ".B volplugin",
        ".RI [ OPTIONS ]",
        ".I COMMAND",
        ".RI [ ARGUMENTS ]...",
        ".SH DESCRIPTION",
        _text(_sentence(cli)),
        "Each command has its help:",
        '.BR "volplugin " " COMMAND " \\-\\-help .',
        ".SH COMMANDS",
    ]
    for path, command in _commands(cli, ["volplugin"]):
        lines += _section(path, command)
    environment = _text(" ".join((cli.epilog or "").split()))
    return "\n".join(lines) + "\n" + _TAIL.format(environment=environment)


def _commands(
    group: click.Group, path: list[str]
) -> Iterator[tuple[list[str], click.Command]]:
    for name, command in group.commands.items():
        here = [*path, name]
        yield here, command
        if isinstance(command, click.Group):
            yield from _commands(command, here)


def _section(path: list[str], command: click.Command) -> list[str]:
    context = click.Context(command, info_name=path[-1])
    usage = " ".join([*path, *command.collect_usage_pieces(context)])
    lines = [f".SS {_text(usage)}"]
    for paragraph in (*_paragraphs(command.help or ""), command.epilog or ""):
        if paragraph.startswith("\b\n"):
            shown = paragraph.split("\n")[1:]
            lines += [".PP", ".nf", *(_line(text) for text in shown), ".fi"]
        elif paragraph:
            lines += [".PP", _text(" ".join(paragraph.split()))]
    for parameter in command.params:  # without --help, which all have
        record = parameter.get_help_record(context)
        if record is not None and isinstance(parameter, click.Option):
            names, told = record
            lines += [".TP", f".B {_text(names)}", _text(" ".join(told.split()))]
    return lines


def _paragraphs(text: str) -> list[str]:
    return re.split(r"\n\s*\n", re.sub(r"^ +(?=\x08)", "", text, flags=re.MULTILINE))


def _sentence(command: click.Command) -> str:
    return " ".join((command.help or "").split())


def _line(text: str) -> str:
    """Return a line that is shown as it is."""
    return _text(text) if text else ".sp"


def _text(text: str) -> str:
    """Return ``text`` such that roff reads nothing into it."""
    escaped = text.replace("\\", r"\e").replace("-", r"\-").replace("'", r"\(aq")
    escaped = escaped.replace("`", r"\(ga").replace("…", "...")
    return rf"\&{escaped}" if escaped.startswith(".") else escaped


def completion(shell: str) -> str:
    """Return click's completion script for ``shell``."""
    return subprocess.run(
        [sys.executable, "-m", "volplugin"],
        env={**os.environ, "_VOLPLUGIN_COMPLETE": f"{shell}_source"},
        cwd=HERE.parent,
        check=True,
        capture_output=True,
        text=True,
    ).stdout


def main() -> None:
    """Write all of them."""
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page())
    for shell, file in COMPLETIONS.items():
        file.parent.mkdir(exist_ok=True)
        file.write_text(completion(shell))


if __name__ == "__main__":
    main()
