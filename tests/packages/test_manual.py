"""The man page and the completions that are shipped: of today's help, and at work."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Final

import click
import pytest
from support.plugin import REPOSITORY, plugin_environment
from support.require import require

from volplugin.cli import cli

PACKAGING: Final = REPOSITORY / "packaging"


@pytest.fixture(scope="module")
def manual() -> ModuleType:
    """The script that writes them."""
    spec = importlib.util.spec_from_file_location("manual", PACKAGING / "manual.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_of_this_help(manual: ModuleType) -> None:
    """What a command takes is in the page; else: make manual."""
    assert manual.PAGE.read_text() == manual.page(), "run make manual"


def test_the_page_is_shown() -> None:
    """man(1) finds no fault in it and shows each command."""
    words = [require("man"), "--warnings", "--encoding=UTF-8", "-l"]
    done = subprocess.run(
        [*words, PACKAGING / "man" / "volplugin.1"],
        capture_output=True,
        text=True,
        check=True,
        env={**plugin_environment(), "MANWIDTH": "200", "MANPAGER": "cat"},
    )
    assert done.stderr == ""
    for name, command in cli.commands.items():
        assert f"volplugin {name} " in done.stdout
        if isinstance(command, click.Group):
            for below in command.commands:
                assert f"volplugin {name} {below} " in done.stdout
    assert "--remove-source" in done.stdout
    assert "`docker volume rm NAME`" in done.stdout
    assert "  volplugin volume resize db 20G\n" in done.stdout
    assert "\x08" not in done.stdout


def test_the_page_has_dashes_that_can_be_copied(manual: ModuleType) -> None:
    """A bare ``-`` is a hyphen to roff, which no shell takes for an option's."""
    body = manual.page().split("\n", 2)[2]
    assert not [line for line in body.splitlines() if "-" in line.replace("\\-", "")]


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    """A folder with the command volplugin."""
    command = tmp_path / "volplugin"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m volplugin "$@"\n')
    command.chmod(0o755)
    return tmp_path


def complete(commands: Path, line: str) -> list[str]:
    """Return what bash offers at the end of ``line``."""
    words = line.split(" ")
    script = (
        f"source {PACKAGING}/completions/volplugin\n"
        f"COMP_WORDS=({' '.join(map(repr, words))})\n"
        f"COMP_CWORD={len(words) - 1}\n"
        f"_volplugin_completion volplugin '{words[-1]}'\n"
        'printf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    done = subprocess.run(
        [require("bash"), "-c", script],
        env={**plugin_environment(), "PATH": f"{commands}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("volplugin vol", ["volume"]),
        ("volplugin volume res", ["resize"]),
        ("volplugin migrate --rem", ["--remove-source"]),
        ("volplugin migrate --from lo", ["local", "local-persist"]),
        ("volplugin nothing-like-it", []),
    ],
)
def test_bash_completes(commands: Path, line: str, offered: list[str]) -> None:
    """Commands, options, and the words that an option takes."""
    assert complete(commands, line) == offered


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completions_are_for_each_shell(manual: ModuleType, shell: str) -> None:
    """Each is where its shell looks for it, and asks the command itself."""
    text = manual.COMPLETIONS[shell].read_text()
    assert f"_VOLPLUGIN_COMPLETE={shell}_complete" in text
    assert text.startswith("#compdef volplugin") is (shell == "zsh")
