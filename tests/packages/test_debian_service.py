"""Debian's package under a real systemd: its service from installation to removal."""

import http.client
import shutil
import threading
import time
from collections.abc import Iterator

import pytest
from debian import NEXT, Packages, built_packages
from support.client import PluginError
from support.system import System
from support.wait import eventually

from volplugin import __version__

pytestmark = [pytest.mark.root, pytest.mark.timeout(300)]

UNITS = ("volplugin.socket", "volplugin.service")


@pytest.fixture(scope="module")
def packages() -> Iterator[Packages]:
    """The packages."""
    with built_packages() as packages:
        yield packages


@pytest.fixture(scope="module")
def system(packages: Packages) -> Iterator[System]:
    """A host with today's package, installed by apt."""
    system = System()
    try:
        system.start()
        for package in (packages.today, packages.later):
            shutil.copy(package, system.folder)
        system.path("/usr/sbin/policy-rc.d").unlink(missing_ok=True)
        install(system, __version__)
        yield system
    finally:
        system.close()


def apt(system: System, *words: str) -> str:
    """Run ``apt-get`` there."""
    command = ["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-y", "-qq"]
    return system.run(*command, "-o", "Dpkg::Use-Pty=0", *words)


def install(system: System, version: str) -> None:
    """Install a version of the package."""
    package = f"{system.folder}/volplugin_{version}_all.deb"
    apt(system, "install", "--no-install-recommends", package)


def states(system: System) -> list[str]:
    """Return whether the units are active."""
    return [system.show("ActiveState", unit) for unit in UNITS]


def test_it_is_started_and_enabled(system: System) -> None:
    """After the installation the plugin answers, and will after a boot."""
    assert states(system) == ["active", "active"]
    for unit in UNITS:
        assert system.systemctl("is-enabled", unit) == "enabled"
    system.client.create("web", {})
    assert "web" in system.client.list()
    assert "volplugin" in system.run("readlink", "-f", "/usr/bin/volplugin")


def test_an_upgrade_refuses_no_call(system: System) -> None:
    """The service is the new version's, and every call was answered meanwhile."""
    system.client.create("kept", {"driver": "tmpfs", "size": "1m"})
    path = system.path(system.client.mount("kept", "id"))
    (path / "file").write_text("kept")
    before = system.show("MainPID")
    faults: list[Exception] = []
    calls = 0
    stop = threading.Event()

    def ask() -> None:
        nonlocal calls
        while not stop.is_set():
            try:
                assert "kept" in system.client.list()
                calls += 1
            except (OSError, http.client.HTTPException, PluginError) as error:
                faults.append(error)
            time.sleep(0.01)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        install(system, NEXT)
        eventually(lambda: system.show("MainPID") != before, "it is restarted")
        time.sleep(0.5)
    finally:
        stop.set()
        asking.join(60)
    assert faults == []
    assert calls > 20
    assert states(system) == ["active", "active"]
    assert NEXT in system.run("/usr/bin/volplugin", "--version")
    assert (path / "file").read_text() == "kept"
    system.client.unmount("kept", "id")


def test_removal_stops_it(system: System) -> None:
    """Both units go, and the volumes stay for the next installation."""
    apt(system, "remove", "volplugin")
    assert not [state for state in states(system) if state == "active"]
    assert not system.path("/run/docker/plugins/volplugin.sock").exists()
    install(system, __version__)
    assert states(system) == ["active", "active"]
    assert set(system.client.list()) == {"web", "kept"}
