"""`make plugin`: the same bytes from the same commit, small, with Ceph or without."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from support.managed import Built, assemble
from support.plugin import REPOSITORY

from volplugin import __version__

pytestmark = pytest.mark.root

SIZE_LIMIT = 90  # MiB


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where to make it; root's files are not kept with pytest's."""
    yield tmp_path / "plugin"
    subprocess.run(["rm", "-rf", tmp_path / "plugin"], check=True)


def inside(plugin: Path, *words: str) -> str:
    """Run a program of the plugin."""
    done = subprocess.run(
        ["chroot", plugin / "rootfs", *words],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_made_twice_it_is_the_same(
    built: Built, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the directory, nor the time, nor the environment is in it."""
    monkeypatch.setenv("ANOTHER", "environment")
    monkeypatch.setenv("LANG", "de_DE.UTF-8")
    told = assemble(folder)
    assert told.partition(": ")[2] == built.told.partition(": ")[2]
    size = int(told.partition(": ")[2].partition(" ")[0])
    assert size < SIZE_LIMIT
    assert inside(folder, "/usr/bin/volplugin", "--version").endswith(__version__)


def test_the_image_holds_no_more_than_it_needs(built: Built) -> None:
    """No package manager, no device, nothing that anyone may write; all is noted."""
    rootfs = built.first / "rootfs"
    assert not os.listdir(rootfs / "dev")
    for gone in ("etc/apt", "etc/hostname", "etc/resolv.conf", "usr/share/doc"):
        assert not (rootfs / gone).exists()
    noted = (rootfs / "usr/share/volplugin/packages").read_text().splitlines()
    assert all(len(line.split()[0]) == 64 for line in noted)
    names = {line.split()[1].split("_")[0] for line in noted}
    assert {"tini", "e2fsprogs", "xfsprogs", "python3-plyvel", "libc6"} <= names
    for place, folders, files in os.walk(rootfs):
        for name in (*folders, *files):
            found = os.lstat(os.path.join(place, name))
            assert (found.st_uid, found.st_mtime) == (0, 1700000000)


def test_with_ceph(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CEPH=yes brings the bindings, and they can be loaded."""
    monkeypatch.setenv("CEPH", "yes")
    assemble(folder)
    code = "import cephfs, rados, rbd; print(rados.Rados.__name__)"
    assert inside(folder, "/usr/bin/python3", "-c", code) == "Rados"


def test_the_bill_of_materials(built: Built) -> None:
    """It is valid CycloneDX, and has each package with its hash and its licences."""
    text = (built.first / "volplugin-plugin.cdx.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    noted = (built.first / "rootfs/usr/share/volplugin/packages").read_text()
    hashes = {line.split()[0] for line in noted.splitlines()}
    bill = json.loads(text)
    assert bill["metadata"]["component"]["version"] == __version__
    assert {each["hashes"][0]["content"] for each in bill["components"]} == hashes
    for each in bill["components"]:
        assert all(licence["license"]["name"] for licence in each["licenses"])
    assert str(built.first) not in text


def test_a_lock_that_is_another(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LOCKED=yes makes nothing of packages that are not those of the lock."""
    lock = REPOSITORY / "packaging/plugin/packages.lock"
    for line in lock.read_text().splitlines():
        assert re.fullmatch(r"[0-9a-f]{64}  [a-z0-9.+-]+_[^_]+_(amd64|all)\.deb", line)
    tree = folder.parent / "tree"
    shutil.copytree(REPOSITORY / "packaging", tree / "packaging")
    shutil.copytree(REPOSITORY / "volplugin", tree / "volplugin")
    for name in ("LICENSE", "plugin-config.json"):
        shutil.copy(REPOSITORY / name, tree)
    (tree / "packaging/plugin/packages.lock").write_text(
        "0" * 64 + "  tini_0_all.deb\n"
    )
    command = [tree / "packaging/plugin/assemble", folder]
    monkeypatch.setenv("LOCKED", "yes")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "not in packages.lock" in done.stderr
    assert "  tini_0.19" in done.stderr
    assert not (folder / "config.json").exists()
