"""sdist and wheel, installed with the locked requirements where nothing else is."""

import email
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any, Final

import attrs
import pytest
from support.plugin import REPOSITORY, plugin_environment
from test_supply import locked

from volplugin import __version__

MANUAL: Final = (
    "share/man/man1/volplugin.1",
    "share/bash-completion/completions/volplugin",
    "share/zsh/site-functions/_volplugin",
    "share/fish/vendor_completions.d/volplugin.fish",
)


@attrs.frozen
class Built:
    """What `python -m build` makes: the wheel comes out of the sdist."""

    sdist: Path
    wheel: Path


def run(*words: str | Path) -> str:
    """Run a command outside the tree, without its package on the path."""
    environment = plugin_environment()
    del environment["PYTHONPATH"]
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [str(word) for word in words],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Both, of a copy of the tree, which stays as it is."""
    folder = tmp_path_factory.mktemp("dist")
    tree = tmp_path_factory.mktemp("tree") / "volplugin"
    ignored = shutil.ignore_patterns(
        *(".git", ".*", "__pycache__", "build", "dist", "*.egg-info", "tests")
    )
    shutil.copytree(REPOSITORY, tree, ignore=ignored)
    run(sys.executable, "-m", "build", "--outdir", folder, tree)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return Built(sdist, wheel)


@pytest.fixture(scope="module")
def venv(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel and what is locked, and nothing else."""
    folder = tmp_path_factory.mktemp("clean") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    pip = (sys.executable, "-m", "pip", "--python", folder / "bin" / "python")
    lock = REPOSITORY / "packaging" / "requirements.lock"
    run(*pip, "install", "--quiet", "--require-hashes", "-r", lock)
    here = ("--no-index", "--find-links", built.wheel.parent)
    run(*pip, "install", "--quiet", "--no-deps", *here, "volplugin")
    return folder


def test_the_wheel_has_it_all(built: Built) -> None:
    """Every module, the mark that it is typed, the manual; and nothing of the tests."""
    with zipfile.ZipFile(built.wheel) as wheel:
        names = wheel.namelist()
        (metadata,) = (n for n in names if n.endswith(".dist-info/METADATA"))
        told = email.message_from_bytes(wheel.read(metadata))
    package = REPOSITORY / "volplugin"
    modules = {str(f.relative_to(REPOSITORY)) for f in package.rglob("*.py")}
    assert modules | {"volplugin/py.typed"} <= set(names)
    data = f"volplugin-{__version__}.data/data"
    assert {f"{data}/{name}" for name in MANUAL} <= set(names)
    assert not [name for name in names if name.startswith(("tests", "benchmarks"))]
    assert told["Version"] == __version__
    assert told["License"] == "Apache-2.0"
    assert {"ceph", "test"} <= set(told.get_all("Provides-Extra") or [])


def test_the_sdist_has_what_packages_are_made_of(built: Built) -> None:
    """The licence, the pages, and all of packaging."""
    with tarfile.open(built.sdist) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {
        *("LICENSE", "README.rst", "CHANGES.rst", "docs/packages.rst", "setup.cfg"),
        *("packaging/debian/control", "packaging/debian/rules", "packaging/deb"),
        *("packaging/requirements.lock", "packaging/volplugin.toml"),
    } <= names


def test_the_command(venv: Path) -> None:
    """It runs, in the version that was built, and finds its server's libraries."""
    command = venv / "bin" / "volplugin"
    assert "Usage: volplugin" in run(command, "--help")
    assert __version__ in run(command, "--version")
    assert "root = " in run(command, "config")
    run(venv / "bin" / "python", "-c", "import volplugin.service")


def test_the_manual_is_installed(venv: Path) -> None:
    """Where man(1) and the shells look below a prefix."""
    for name in MANUAL:
        assert (venv / name).is_file(), name


@pytest.fixture(scope="module")
def sbom(venv: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What `make sbom` writes of such an environment."""
    file = tmp_path_factory.mktemp("sbom") / "volplugin.cdx.json"
    run(REPOSITORY / "packaging" / "sbom", venv, file)
    return file.read_text()


def test_the_sbom_is_valid(sbom: str) -> None:
    """By the schema of CycloneDX, and strictly."""
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(sbom) is None


def components(sbom: str) -> dict[str, dict[str, Any]]:
    """Return the components by name."""
    return {each["name"].lower(): each for each in json.loads(sbom)["components"]}


def test_the_sbom_lists_what_is_locked(sbom: str) -> None:
    """Each pin and volplugin itself, in these versions, and nothing else."""
    found = {name: each["version"] for name, each in components(sbom).items()}
    pins = {name: version for name, (version, _) in locked().items()}
    assert {name.replace("_", "-"): version for name, version in found.items()} == {
        **pins,
        "volplugin": __version__,
    }


def test_the_sbom_tells_licences(sbom: str) -> None:
    """Of each component; by SPDX where it says so itself."""
    for name, component in components(sbom).items():
        assert component.get("licenses"), name
    assert "Apache-2.0" in json.dumps(components(sbom)["volplugin"]["licenses"])


def test_the_sbom_says_nothing_of_where_it_was_made(sbom: str) -> None:
    """No path of whoever made it."""
    assert "file://" not in sbom
