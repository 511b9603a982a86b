"""What is shipped with volplugin is pinned, hashed, and told of with its licences."""

import configparser
import re
from pathlib import Path
from typing import Final

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support.plugin import REPOSITORY

from volplugin import __version__, drivers
from volplugin.config import load
from volplugin.config_print import render

LOCK: Final = REPOSITORY / "packaging" / "requirements.lock"
CONTROL: Final = REPOSITORY / "packaging" / "debian" / "control"
# Debian's names for what setup.cfg asks for.
DEBIAN: Final = {"attrs": "python3-attr", "cattrs": "python3-cattr"}


def required() -> list[Requirement]:
    """Return what setup.cfg says that volplugin needs."""
    settings = configparser.ConfigParser()
    settings.read(REPOSITORY / "setup.cfg")
    lines = settings["options"]["install_requires"].split("\n")
    return [Requirement(line) for line in lines if line]


def locked() -> dict[str, tuple[str, list[str]]]:
    """Return version and hashes of each pin, by name."""
    text = LOCK.read_text().replace("\\\n", " ")
    pins: dict[str, tuple[str, list[str]]] = {}
    for line in text.splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            pin, *options = line.split()
            name, version = pin.split("==")
            pins[canonicalize_name(name)] = (version, options)
    return pins


@pytest.mark.parametrize("requirement", required(), ids=lambda each: each.name)
def test_the_lock_covers_what_is_required(requirement: Requirement) -> None:
    """Each requirement of setup.cfg has a pin that it allows; else: make lock."""
    version, _ = locked()[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(version), "run make lock"


def test_every_pin_has_hashes() -> None:
    """Nothing is installed that is not the very file that was locked."""
    pins = locked()
    assert len(pins) > len(required())
    for name, (_, options) in pins.items():
        assert options, name
        for option in options:
            assert re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", option), (name, option)


def test_the_lock_says_nothing_of_where_it_was_made() -> None:
    """No index, no path: each is the business of whoever installs."""
    text = LOCK.read_text()
    assert "make lock" in text
    assert not re.search(r"://|--index|--find-links|--trusted|^/", text, re.MULTILINE)


def test_the_manual_names_the_licence_of_each() -> None:
    """The table in docs/packages.rst has what is locked, and nothing else."""
    text = (REPOSITORY / "docs" / "packages.rst").read_text()
    rows = text.split("\nLibrary", 1)[1].splitlines()
    told = {row.split("``")[1]: row.split("``")[2] for row in rows if "``" in row}
    assert set(told) == set(locked())
    assert all(licence.strip() for licence in told.values())


def test_debian_asks_for_the_same() -> None:
    """The Debian package depends on what setup.cfg requires, in the same versions."""
    depends = CONTROL.read_text().split("\nDepends:", 1)[1].split("\nRecommends:")[0]
    found = dict(re.findall(r"(python3-[a-z]+) \(>= ([0-9.]+)\)", depends))
    assert found == {
        DEBIAN.get(each.name, f"python3-{each.name}"): next(
            iter(each.specifier)
        ).version
        for each in required()
    }


def test_debian_has_this_version() -> None:
    """The newest entry of Debian's changelog is of the version that is built."""
    changelog = (REPOSITORY / "packaging" / "debian" / "changelog").read_text()
    assert changelog.startswith(f"volplugin ({__version__}) ")


def shown(text: str, folder: Path) -> list[str]:
    """Return the lines of ``volplugin config`` for a file with ``text``."""
    file = folder / "volplugin.toml"
    file.write_text(text)
    config = load(
        file=str(file),
        environ={},
        flags={},
        settings_of=drivers.settings_of,
        drivers=drivers.NAMES,
        aliases=drivers.ALIASES,
        shared=drivers.SHARED,
    )
    return render(config).splitlines()


def test_the_configuration_that_is_shipped(tmp_path: Path) -> None:
    """It changes nothing, and what is commented out in it is valid, and the default."""
    text = (REPOSITORY / "packaging" / "volplugin.toml").read_text()
    usual = shown("", tmp_path)
    assert shown(text, tmp_path) == usual
    settings = re.sub(r"^#(?=\S)", "", text, flags=re.MULTILINE)
    added = {line for line in shown(settings, tmp_path) if line not in usual}
    assert added == {
        *("[backend.fast]", 'root = "/mnt/nvme/volumes"'),
        *("[backend.ceph]", 'user = "volplugin"', 'pool = "volumes"'),
    }
