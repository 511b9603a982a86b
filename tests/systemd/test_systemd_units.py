"""The units' files: what is in them, and how they are written, changed and removed."""

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest
from support.host import Host
from support.plugin import REPOSITORY, plugin_environment
from support.require import require

from volplugin import units
from volplugin.config_values import DEFAULT_SOCKET, Config, Timeouts

NAMES: Final = ("volplugin.service", "volplugin.socket")
PACKAGED: Final = REPOSITORY / "packaging" / "systemd"
PAGE: Final = REPOSITORY / "docs" / "systemd.rst"

# systemd.exec(5): each gives the service a mount namespace, or keeps devices from it.
HARMFUL: Final = re.compile(
    r"^(Private\w+|Protect\w+|Bind\w*Paths|(ReadOnly|ReadWrite|Inaccessible|Exec|NoExec)"
    r"Paths|Mount\w+|TemporaryFileSystem|Root\w+|DynamicUser|Extension\w+|LogNamespace"
    r"|NetworkNamespacePath|LoadCredential\w*|SetCredential\w*|ProcSubset|Device\w+)$"
)


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A volplugin that needs no environment, as one that is installed."""
    return make_program(tmp_path / "volplugin")


def make_program(path: Path) -> Path:
    """Make a command ``path`` that is this volplugin."""
    path.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(REPOSITORY)!r})\n"
        "from volplugin.cli import main\nmain()\n"
    )
    path.chmod(0o755)
    return path


def call(*words: str | Path, status: int = 0) -> str:
    """Run a command line; return what it says."""
    done = subprocess.run(
        [str(word) for word in words],
        env=plugin_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == status, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def directives(name: str) -> list[tuple[str, str]]:
    """Return the keys and values of a packaged unit."""
    lines = (PACKAGED / name).read_text().splitlines()
    pairs = [line.split("=", 1) for line in lines if re.match(r"[A-Z]\w+=", line)]
    return [(key, value) for key, value in pairs]


def content(folder: Path) -> dict[str, bytes]:
    """Return all files of a directory."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# What is in them


def test_systemd_understands_them(tmp_path: Path, program: Path) -> None:
    """``systemd-analyze verify`` finds no fault in what is installed."""
    analyze = require("systemd-analyze")
    call(program, "install-service", f"--directory={tmp_path / 'units'}")
    files = [tmp_path / "units" / name for name in NAMES]
    done = subprocess.run(
        [analyze, "verify", "--man=no", *files],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    # Other units of the machine may have faults of their own.
    ours = [x for x in (done.stdout + done.stderr).splitlines() if "volplugin" in x]
    assert ours == []
    text = files[0].read_text()
    files[0].write_text(text.replace("KillMode=process", "KillMood=process"))
    done = subprocess.run(
        [analyze, "verify", "--man=no", *files],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "KillMood" in done.stderr


def test_none_has_a_mount_namespace() -> None:
    """A mount that the service makes has to be the host's, and the containers'."""
    found = [key for key, _ in directives(NAMES[0]) if HARMFUL.match(key)]
    assert found == []
    page = PAGE.read_text()
    for key in ("PrivateTmp", "ProtectKernelModules", "ReadOnlyPaths", "DeviceAllow"):
        assert HARMFUL.match(key)
        assert f"``{key}``" in page


def test_they_fit_the_defaults() -> None:
    """Paths and times are those that the server has without a configuration."""
    service = dict(directives("volplugin.service"))
    socket = dict(directives("volplugin.socket"))
    assert socket["ListenStream"] == DEFAULT_SOCKET == units.listened_on()
    assert socket["SocketMode"] == f"{Config().sockets[0].mode:04o}"
    assert service["RequiresMountsFor"] == Config().root
    # The calls, and then the changes that nobody waits for.
    assert float(service["TimeoutStopSec"]) > 2 * Timeouts().drain + 30
    assert service["RestartPreventExitStatus"].split() == ["2", "78"]


def test_each_line_is_explained() -> None:
    """docs/systemd.rst tells what each directive is for, and of none that is gone."""
    table = PAGE.read_text().partition("\nDirective ")[2].partition("\n\n")[0]
    first_column = "\n".join(line[:29] for line in table.splitlines())
    keys = {key for name in NAMES for key, _ in directives(name)}
    told = set(re.findall(r"``([A-Z]\w+)=", first_column))
    assert told == keys - {"Description"}


# Written


def test_install(tmp_path: Path, program: Path) -> None:
    """The files are written as packaged, with the path of the program that ran."""
    folder = tmp_path / "new" / "units"
    said = call(program, "install-service", f"--directory={folder}")
    assert said == (
        f"{folder}/volplugin.socket: written\n"
        f"{folder}/volplugin.service: written\n"
        "systemd was told nothing\n"
    )
    assert sorted(os.listdir(folder)) == sorted(NAMES)
    for name in NAMES:
        file = folder / name
        assert stat.S_IMODE(file.stat().st_mode) == 0o644
        mark, _, rest = file.read_text().partition("\n")
        assert mark.startswith("# By volplugin install-service")
        packaged = (PACKAGED / name).read_text()
        assert rest == packaged.replace("/usr/bin/volplugin", str(program))
    service = (folder / "volplugin.service").read_text()
    assert f"\nExecStart={program} serve\n" in service


def test_install_by_a_relative_path(tmp_path: Path, program: Path) -> None:
    """systemd knows no working directory: the path is a whole one."""
    folder = tmp_path / "units"
    subprocess.run(
        ["./volplugin", "install-service", f"--directory={folder}"],
        cwd=program.parent,
        check=True,
        capture_output=True,
        timeout=60,
    )
    text = (folder / "volplugin.service").read_text()
    assert f"\nExecStart={program} serve\n" in text


def test_install_again(tmp_path: Path, program: Path) -> None:
    """What is there as it should be is not touched."""
    call(program, "install-service", f"--directory={tmp_path / 'units'}")
    files = [tmp_path / "units" / name for name in NAMES]
    before = [file.stat() for file in files]
    said = call(program, "install-service", f"--directory={tmp_path / 'units'}")
    assert said.count(": unchanged\n") == 2
    assert [file.stat() for file in files] == before


def test_install_of_another_version(tmp_path: Path, program: Path) -> None:
    """A file that an earlier install-service wrote, and nobody changed, is replaced."""
    folder = tmp_path / "units"
    call(program, "install-service", f"--directory={folder}")
    before = content(folder)
    other = make_program(tmp_path / "other")
    said = call(other, "install-service", f"--directory={folder}")
    assert said.count(": written\n") == 1  # the socket's does not name the program
    assert f"ExecStart={other} serve" in (folder / NAMES[0]).read_text()
    call(program, "install-service", f"--directory={folder}")
    assert content(folder) == before


@pytest.mark.parametrize("kind", ["edited", "another's", "masked"])
def test_a_changed_file(tmp_path: Path, program: Path, kind: str) -> None:
    """What somebody changed is neither overwritten nor removed, and nothing else is."""
    folder = tmp_path / "units"
    call(program, "install-service", f"--directory={folder}")
    unit = folder / "volplugin.service"
    if kind == "edited":
        unit.write_text(unit.read_text().replace("WatchdogSec=60", "WatchdogSec=5"))
    else:
        unit.unlink()
        if kind == "masked":
            unit.symlink_to("/dev/null")
        else:
            unit.write_text("[Service]\nExecStart=/bin/true\n")
    (folder / "volplugin.socket").unlink()
    before, link = content(folder), unit.is_symlink()
    for command in ("install-service", "uninstall-service"):
        said = call(program, command, f"--directory={folder}", status=1)
        assert f"{unit}: changed, or not written by install-service" in said
        assert "--force" in said
        assert (content(folder), unit.is_symlink()) == (before, link)
    call(program, "install-service", f"--directory={folder}", "--force")
    assert f"ExecStart={program}" in unit.read_text()
    assert not unit.is_symlink()


def test_uninstall(tmp_path: Path, program: Path) -> None:
    """Just these files go; a second time there is nothing to do."""
    folder = tmp_path / "units"
    call(program, "install-service", f"--directory={folder}")
    drop_in = folder / "volplugin.service.d"
    drop_in.mkdir()
    (folder / "docker.service").write_text("")
    said = call(program, "uninstall-service", f"--directory={folder}")
    assert said.count(": removed\n") == 2
    assert f"{drop_in}: not ours, stays\n" in said
    assert "volumes and store in /var/lib/volplugin and settings in" in said
    assert sorted(os.listdir(folder)) == ["docker.service", "volplugin.service.d"]
    said = call(program, "uninstall-service", f"--directory={folder}")
    assert said.count(": was not there\n") == 2


# Refused


def test_a_path_that_systemd_would_not_read(tmp_path: Path) -> None:
    """A path with what systemd takes for something else is told, nothing written."""
    place = tmp_path / "with a blank"
    place.mkdir()
    odd = make_program(place / "volplugin")
    folder = tmp_path / "units"
    said = call(odd, "install-service", f"--directory={folder}", status=1)
    assert f"'{odd}': systemd would not read this path" in said
    assert not folder.exists()


def test_a_program_that_runs_in_this_shell_alone(tmp_path: Path) -> None:
    """One that only the environment makes work is told before systemd fails with it."""
    folder = tmp_path / "units"
    python = shutil.copy(os.path.realpath(sys.executable), tmp_path / "python")
    bare = tmp_path / "volplugin"
    bare.write_text(f"#!{python} -S\nfrom volplugin.cli import main\nmain()\n")
    bare.chmod(0o755)
    done = subprocess.run(
        [bare, "install-service", f"--directory={folder}"],
        env={
            **plugin_environment(),
            "PYTHONPATH": ":".join([str(REPOSITORY), *sys.path]),
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1, done
    assert f"try {bare} as systemd would start it: {bare} failed" in done.stderr
    assert not folder.exists()


@pytest.mark.root
def test_a_host_without_systemd(program: Path, host: Host) -> None:
    """It says so, and what to do; nothing is written."""
    assert not host.path("/run/systemd").exists()
    before = set(os.listdir(units.DIRECTORY))
    place = host.folder / "volplugin"
    make_program(place)
    done = subprocess.run(
        host.command(place, "install-service"),
        env=plugin_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1, done
    assert "this host does not run systemd" in done.stderr
    assert set(os.listdir(units.DIRECTORY)) == before
