"""Debian's package in a Debian 12: installed, run, upgraded, removed, purged."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from debian import NEXT, Debian, Packages, bootstrap, built_packages
from support.commands import run
from support.plugin import REPOSITORY
from support.require import require_root

from volplugin import __version__

pytestmark = [pytest.mark.root, pytest.mark.timeout(300)]

UNITS: Final = ("volplugin.service", "volplugin.socket")
VOLUMES: Final = "var/lib/volplugin/local/volumes"


@pytest.fixture(scope="module")
def packages() -> Iterator[Packages]:
    """Today's package, and one of a later version."""
    with built_packages() as packages:
        yield packages


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A place for all of it, with a short name."""
    require_root()
    path = Path(tempfile.mkdtemp(prefix="vp-deb-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def installed(folder: Path, packages: Packages) -> Debian:
    """A Debian with today's package, installed by apt with what it depends on."""
    debian = bootstrap(folder / "base")
    debian.apt("update")
    debian.apt("install", debian.take(packages.today))
    debian.take(packages.later)
    return debian


@pytest.fixture
def debian(installed: Debian, folder: Path) -> Iterator[Debian]:
    """The same for one test: what that changes is on a layer of its own."""
    root, changed, work = (folder / name for name in ("root", "changed", "work"))
    for path in (root, changed, work):
        path.mkdir()
    layers = f"lowerdir={installed.root},upperdir={changed},workdir={work}"
    run("mount", "-t", "overlay", "-o", layers, "overlay", root)
    yield Debian(root)
    run("umount", root)
    # Of links and sockets chattr knows nothing, and fails.
    subprocess.run(["chattr", "-R", "-f", "-i", changed], check=False)
    for path in (root, changed, work):
        shutil.rmtree(path)


def test_what_is_installed(installed: Debian) -> None:
    """Each file where Debian wants it, the libraries as they are there."""
    root = installed.root
    for file in (
        *("usr/bin/volplugin", "etc/volplugin/volplugin.toml"),
        *("usr/share/man/man1/volplugin.1.gz", "usr/share/doc/volplugin/README.rst.gz"),
        *("usr/share/bash-completion/completions/volplugin",),
        *("usr/share/zsh/vendor-completions/_volplugin",),
        *("usr/share/fish/vendor_completions.d/volplugin.fish",),
        *("usr/lib/python3/dist-packages/volplugin/py.typed",),
    ):
        assert (root / file).is_file(), file
    for unit in UNITS:
        is_there = (REPOSITORY / "packaging" / "systemd" / unit).exists()
        assert (root / "lib" / "systemd" / "system" / unit).is_file() is is_there
    conffiles = installed.run("dpkg-query", "-W", "-f", "${Conffiles}", "volplugin")
    assert "/etc/volplugin/volplugin.toml" in conffiles.stdout
    assert __version__ in installed.run("volplugin", "--version").stdout
    assert "Usage: volplugin" in installed.run("volplugin", "--help").stdout
    assert installed.run("dpkg", "--verify", "volplugin").stdout == ""


def test_bash_completes_with_debians_click(installed: Debian) -> None:
    """The completion that is shipped fits the click of Debian."""
    script = (
        "source /usr/share/bash-completion/completions/volplugin\n"
        "COMP_WORDS=(volplugin volume res) COMP_CWORD=2\n"
        "_volplugin_completion volplugin res\n"
        'echo "${COMPREPLY[@]}"\n'
    )
    assert installed.run("bash", "-c", script).stdout == "resize\n"


def test_it_serves(debian: Debian) -> None:
    """What engines ask for works with Debian's libraries, and outlives the server."""
    with debian.serving() as client:
        client.create("disk", {})
        client.create("memory", {"driver": "tmpfs", "size": "1m"})
        path = client.mount("disk", "id")
        (debian.root / path.lstrip("/") / "file").write_text("kept")
        assert client.mount("memory", "id") == "/mnt/tmpfs/memory"
        client.unmount("memory", "id")
        client.unmount("disk", "id")
        assert set(client.list()) == {"disk", "memory"}
        client.remove("memory")
    with debian.serving() as client:
        assert set(client.list()) == {"disk"}
        client.remove("disk")


def fill(debian: Debian) -> Path:
    """Make a volume with a file; return that."""
    with debian.serving() as client:
        client.create("web", {})
        client.create("memory", {"driver": "tmpfs", "size": "1m"})
    file = debian.root / VOLUMES / "web" / "file"
    file.write_text("kept")
    return file


def test_upgrade(debian: Debian) -> None:
    """Volumes are served by the later version; a changed configuration is kept."""
    file = fill(debian)
    config = debian.root / "etc" / "volplugin" / "volplugin.toml"
    config.write_text(config.read_text() + '\nlog-level = "debug"\n')
    debian.apt("install", f"/root/volplugin_{NEXT}_all.deb")
    assert NEXT in debian.run("volplugin", "--version").stdout
    assert "debug" in config.read_text()
    with debian.serving() as client:
        assert set(client.list()) == {"web", "memory"}
        assert file.read_text() == "kept"


def test_upgrade_while_it_runs(debian: Debian) -> None:
    """A server of the old version goes on until it is restarted."""
    with debian.serving() as client:
        client.create("web", {})
        debian.apt("install", f"/root/volplugin_{NEXT}_all.deb")
        path = client.mount("web", "id")
        (debian.root / path.lstrip("/") / "file").write_text("kept")
        client.unmount("web", "id")
        # It has not loaded all of its modules yet.
        client.create("memory", {"driver": "tmpfs", "size": "1m"})
    with debian.serving() as client:
        assert set(client.list()) == {"web", "memory"}


def test_remove_keeps_all(debian: Debian) -> None:
    """The program goes; volumes and configuration stay for another installation."""
    file = fill(debian)
    debian.apt("remove", "volplugin")
    assert not (debian.root / "usr" / "bin" / "volplugin").exists()
    assert not (debian.root / "usr/lib/python3/dist-packages/volplugin").exists()
    assert file.read_text() == "kept"
    assert (debian.root / "etc" / "volplugin" / "volplugin.toml").exists()
    debian.apt("install", f"/root/volplugin_{__version__}_all.deb")
    with debian.serving() as client:
        assert set(client.list()) == {"web", "memory"}


def test_purge_asks_and_keeps(debian: Debian) -> None:
    """The question is asked, and who does not answer keeps all volumes."""
    file = fill(debian)
    debug = {"DEBCONF_DEBUG": "developer"}
    purged = debian.run("dpkg", "--purge", "volplugin", environment=debug)
    assert "INPUT critical volplugin/purge-volumes" in purged.stderr
    assert "kept /var/lib/volplugin, which has the volumes" in purged.stderr
    assert file.read_text() == "kept"
    assert not (debian.root / "etc" / "volplugin").exists()


def answer(debian: Debian, text: str) -> None:
    """Answer the question before it is asked."""
    line = f"volplugin volplugin/purge-volumes boolean {text}"
    debian.run("sh", "-c", f"echo {line} | debconf-set-selections")


def test_purge_deletes_when_told_so(debian: Debian) -> None:
    """With the answer yes nothing of it is left, in two steps or one."""
    fill(debian)
    answer(debian, "true")
    debian.run("dpkg", "--purge", "volplugin")
    assert not (debian.root / "var" / "lib" / "volplugin").exists()
    assert not (debian.root / "etc" / "volplugin").exists()
    left = debian.run("dpkg-query", "-W", "volplugin", ok=(1,))
    assert "no packages found" in left.stderr


def test_purge_of_what_is_mounted(debian: Debian) -> None:
    """Even with the answer yes nothing is deleted while a volume is mounted."""
    file = fill(debian)
    answer(debian, "true")
    debian.run("dpkg", "--remove", "volplugin")
    script = (
        "mkdir /var/lib/volplugin/m && mount -t tmpfs t /var/lib/volplugin/m && "
        "dpkg --purge volplugin 2>&1"
    )
    told = debian.run("sh", "-c", script).stdout
    assert "kept /var/lib/volplugin: something is mounted in it" in told
    assert file.read_text() == "kept"


def test_purge_of_an_immutable_mountpoint(debian: Debian) -> None:
    """A guarded mountpoint does not stand in the way of who wants all deleted."""
    fill(debian)
    guarded = debian.root / "var" / "lib" / "volplugin" / "guarded"
    guarded.mkdir()
    subprocess.run(["chattr", "+i", guarded], check=True)
    answer(debian, "true")
    debian.run("dpkg", "--purge", "volplugin")
    assert not guarded.parent.exists()
    assert os.path.isdir(debian.root / "var" / "lib")
