"""Containers that hold a file system are found; services of the host are not taken."""

import os
import subprocess
import time
from pathlib import Path

import pytest
from support.commands import Container, run, wait_for_program
from support.wait import eventually

from volplugin.host import mountinfo, namespaces

pytestmark = pytest.mark.root


def place(path: Path) -> tuple[str, str]:
    found = mountinfo.inside(str(path), mountinfo.read())
    assert found is not None
    return found


def test_a_container_is_found(tmpfs: Path, container: Container) -> None:
    """A process with a root and a mount table of its own holds what it has mounted."""
    assert namespaces.holders(*place(tmpfs)) == []
    child = container(tmpfs)
    assert namespaces.holders(*place(tmpfs)) == [namespaces.Process(child.pid, "sleep")]
    os.kill(child.pid, 9)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert namespaces.holders(*place(tmpfs)) == []  # still a zombie
    child.wait()
    assert namespaces.holders(*place(tmpfs)) == []


def test_one_process_for_each_container(tmpfs: Path, container: Container) -> None:
    """Two containers are two holders, however many processes each has."""
    pids = {container(tmpfs, "sleep 600 & sleep 600 &").pid for _ in range(2)}
    assert {process.pid for process in namespaces.holders(*place(tmpfs))} == pids


def test_only_what_lies_below_counts(scratch: Path, container: Container) -> None:
    """A volume's directory is told from its neighbours on the same disk."""
    for name in ("db", "db2", "db/sub"):
        (scratch / name).mkdir()
    child = container(scratch / "db" / "sub")
    assert [p.pid for p in namespaces.holders(*place(scratch / "db"))] == [child.pid]
    assert [p.pid for p in namespaces.holders(*place(scratch / "db" / "sub"))] == [
        child.pid
    ]
    assert namespaces.holders(*place(scratch / "db2")) == []
    device, _ = place(scratch)
    assert child.pid in [p.pid for p in namespaces.holders(device, "/")]
    assert namespaces.holders("0:0", "/") == []


def test_a_renamed_directory_is_still_held(scratch: Path, container: Container) -> None:
    """The kernel follows a rename: a volume in the trash is found where it is."""
    (scratch / "db").mkdir()
    child = container(scratch / "db")
    (scratch / "db").rename(scratch / "trash")
    assert [p.pid for p in namespaces.holders(*place(scratch / "trash"))] == [child.pid]


def test_services_of_the_host_are_left_out(tmpfs: Path) -> None:
    """A namespace with the host's root directory is no container."""
    with subprocess.Popen(
        ["unshare", "-m", "sleep", "600"], stdout=subprocess.DEVNULL
    ) as child:
        wait_for_program(child.pid, "sleep")
        here, there = (os.readlink(f"/proc/{p}/ns/mnt") for p in ("self", child.pid))
        assert here != there
        assert namespaces.holders(*place(tmpfs)) == []
        child.kill()


def test_a_chroot_inside_does_not_hide_the_mount(
    tmpfs: Path, container: Container
) -> None:
    """A process that sees less than its container does not speak for it."""
    jailed = container(
        tmpfs,
        "sleep 600 & mkdir -p jail/usr; mount --bind usr jail/usr;"
        "ln -s usr/bin usr/lib usr/lib64 jail; echo ready; exec chroot jail sleep 600;",
    )
    assert mountinfo.at("/data", mountinfo.read(jailed.pid)) is None
    other = int(run("pgrep", "-P", str(jailed.pid)))
    assert [p.pid for p in namespaces.holders(*place(tmpfs))] == [other]


def test_quick_with_many_processes(tmpfs: Path, container: Container) -> None:
    """Five hundred processes of containers and host are looked through in no time."""
    container(tmpfs, "for i in $(seq 250); do sleep 600 & done;")
    container(tmpfs, "for i in $(seq 250); do sleep 600 & done;")
    eventually(
        lambda: int(run("pgrep", "-c", "-f", "^sleep 600$")) >= 500,
        "all of them have begun",
    )
    start = time.perf_counter()
    held = namespaces.holders(*place(tmpfs))
    assert time.perf_counter() - start < 0.5
    assert len(held) == 2


def test_processes_that_end_meanwhile(tmpfs: Path, container: Container) -> None:
    """Processes that come and go while the table is read are no trouble."""
    child = container(
        tmpfs, "(while :; do /usr/bin/true & /usr/bin/true & wait; done) &"
    )
    for _ in range(30):
        assert [p.pid for p in namespaces.holders(*place(tmpfs))] == [child.pid]


# Who sees a mount


def ended() -> int:
    """Return the pid of a process that is no more."""
    child = subprocess.Popen(["true"])
    child.wait()
    return child.pid


def test_our_own_namespace() -> None:
    """It is told by one look; a process that has ended is in nobody's way."""
    with subprocess.Popen(["sleep", "600"]) as child:
        assert namespaces.is_ours(os.getpid())
        assert namespaces.is_ours(child.pid)
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert namespaces.is_ours(child.pid)  # a zombie
    assert namespaces.is_ours(ended())


def test_a_mount_that_does_not_arrive(scratch: Path) -> None:
    """A namespace of its own has what was mounted before, and nothing since."""
    before, since = scratch / "before", scratch / "since"
    for path in (before, since):
        path.mkdir()
    run("mount", "-t", "tmpfs", "before", before)
    cut_off = ["unshare", "--mount", "--propagation", "private", "sleep", "600"]
    try:
        with subprocess.Popen(cut_off) as child:
            wait_for_program(child.pid, "sleep")
            run("mount", "-t", "tmpfs", "since", since)
            try:
                assert not namespaces.is_ours(child.pid)
                assert namespaces.sees(child.pid, str(before))
                assert not namespaces.sees(child.pid, str(since))
                assert namespaces.sees(child.pid, str(scratch))
                # One that came in its place is another one, though the path has both.
                run("umount", before)
                run("mount", "-t", "tmpfs", "before", before)
                assert not namespaces.sees(child.pid, str(before))
            finally:
                run("umount", since)
            child.kill()
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
            assert namespaces.sees(child.pid, str(before))  # a zombie: nobody to ask
    finally:
        run("umount", before)
    assert namespaces.sees(ended(), str(since))


def test_a_mount_that_has_another_path_elsewhere(
    tmpfs: Path, scratch: Path, container: Container
) -> None:
    """With another root directory the path says nothing; the file system does."""
    other = scratch / "other"
    other.mkdir()
    with_it, without = container(tmpfs), container(other)
    for child in (with_it, without):
        assert not namespaces.is_ours(child.pid)
    assert namespaces.sees(with_it.pid, str(tmpfs))
    assert not namespaces.sees(without.pid, str(tmpfs))
