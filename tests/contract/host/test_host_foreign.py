"""Mounts of containers, brought into our namespace."""

import os
from pathlib import Path

import attrs
import pytest
from support.commands import Container, run

from volplugin.errors import NotFound, Unavailable
from volplugin.host import foreign, mountinfo, mounts
from volplugin.host.mountinfo import Mount

pytestmark = pytest.mark.root


def data_of(pid: int) -> Mount:
    """Return what a container has on /data."""
    mount = mountinfo.at("/data", mountinfo.read(pid))
    assert mount is not None
    return mount


@pytest.fixture
def target(scratch: Path) -> Path:
    """An empty directory; what is mounted on it goes with the scratch directory."""
    path = scratch / "target"
    path.mkdir()
    return path


def test_bring(tmpfs: Path, target: Path, container: Container) -> None:
    """What only a container has is here too: one file system, and its mount's flags."""
    (tmpfs / "file").write_text("kept")
    run("mount", "-o", "remount,bind,nosuid,noexec", tmpfs)
    child = container(tmpfs)
    mounts.unmount(str(tmpfs))
    foreign.bring(child.pid, data_of(child.pid), str(target))
    assert (target / "file").read_text() == "kept"
    (target / "file").write_text("written")
    assert Path(f"/proc/{child.pid}/root/data/file").read_text() == "written"
    mount = mountinfo.at(str(target), mountinfo.read())
    assert mount is not None
    assert {"rw", "nosuid", "noexec"} <= set(mount.options.split(","))
    os.kill(child.pid, 9)
    child.wait()
    assert (target / "file").read_text() == "written"


def test_this_process_stays_in_its_namespace(
    tmpfs: Path, target: Path, container: Container
) -> None:
    """A thread of its own enters the container; nobody else notices."""
    child = container(tmpfs)
    here, root = os.readlink("/proc/self/ns/mnt"), os.stat("/").st_ino
    foreign.bring(child.pid, data_of(child.pid), str(target))
    assert os.readlink("/proc/thread-self/ns/mnt") == here
    assert os.stat("/").st_ino == root


def test_what_is_something_else_by_now(
    tmpfs: Path, target: Path, container: Container
) -> None:
    """Another file system than the table told of is not brought."""
    child = container(tmpfs)
    before = data_of(child.pid)
    changed = attrs.evolve(before, device="0:1")
    with pytest.raises(Unavailable, match="something else there by now"):
        foreign.bring(child.pid, changed, str(target))
    gone = attrs.evolve(before, mountpoint="/no/such")
    with pytest.raises(Unavailable, match="has it no more"):
        foreign.bring(child.pid, gone, str(target))
    assert mountinfo.at(str(target), mountinfo.read()) is None


def test_a_process_that_has_ended(
    tmpfs: Path, target: Path, container: Container
) -> None:
    """A dead container is told, and a missing target too."""
    child = container(tmpfs)
    mount = data_of(child.pid)
    with pytest.raises(NotFound):
        foreign.bring(child.pid, mount, str(target / "missing"))
    os.kill(child.pid, 9)
    child.wait()
    with pytest.raises(Unavailable, match="it has ended"):
        foreign.bring(child.pid, mount, str(target))
