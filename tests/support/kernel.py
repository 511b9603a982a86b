"""Real mounts and processes for the tests of the kernel layer."""

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.commands import Container, run, wait_for_program
from volplugin.host import mountinfo


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A directory on the host's disk; what is mounted below it goes with it."""
    path = Path(tempfile.mkdtemp(prefix="volplugin-host-")).resolve()
    yield path
    for mount in reversed(mountinfo.below(str(path), mountinfo.read())):
        run("umount", mount.mountpoint)
    subprocess.run(["chattr", "-R", "-ia", path], check=False, capture_output=True)
    run("rm", "-rf", path)  # deeper than Python recurses


@pytest.fixture
def tmpfs(scratch: Path) -> Path:
    """A directory with a tmpfs on it."""
    path = scratch / "tmpfs"
    path.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=4m", "volplugin-test", path)
    return path


@pytest.fixture
def ext4(scratch: Path) -> Path:
    """A directory with an ext4 of its own on it, on a loop device."""
    image, path = scratch / "image", scratch / "ext4"
    path.mkdir()
    with image.open("wb") as file:
        file.truncate(16 << 20)
    run("mkfs.ext4", "-q", "-b", "4096", "-I", "256", image)
    run("mount", "-o", "loop", image, path)
    return path


@pytest.fixture
def container(scratch: Path) -> Iterator[Container]:
    """Start processes in mount namespaces of their own with a root of their own.

    ``container(volume, script)`` binds ``volume`` on /data there and runs ``script``
    once the root has been changed, as a container runtime does.
    """
    started: list[subprocess.Popen[str]] = []

    def start(volume: Path, script: str = "") -> subprocess.Popen[str]:
        root = scratch / f"root{len(started)}"
        root.mkdir()
        inside = f"umount -l /old; {script} echo ready; exec sleep 600"
        setup = f"""
            set -e
            mount -t tmpfs rootfs {root}
            cd {root}
            mkdir usr data proc dev old
            touch dev/null
            mount --bind /dev/null dev/null
            ln -s usr/bin usr/sbin usr/lib usr/lib64 .
            mount --bind /usr usr
            mount -t proc proc proc
            mount --bind {volume} data
            pivot_root . old
            exec chroot . sh -c '{inside}'
        """
        return spawn("unshare", "-m", "--propagation", "private", "sh", "-c", setup)

    def spawn(*command: str) -> subprocess.Popen[str]:
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        started.append(child)
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        wait_for_program(child.pid, "sleep")
        return child

    yield start
    for child in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, 9)
        child.wait()
        assert child.stdout is not None
        child.stdout.close()
