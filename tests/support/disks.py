"""Disks for tests: file systems of their own, in sparse images on loop devices."""

import contextlib
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from support.commands import run
from support.require import require, require_root
from volplugin.host import mountinfo


@contextlib.contextmanager
def disk(
    folder: Path,
    kind: str,
    size: int,
    options: Sequence[str] = (),
    *,
    mount_options: str = "",
) -> Iterator[Path]:
    """Make a file system of ``size`` bytes in ``folder``; yield where it is mounted.

    ``kind`` is ``btrfs``, ``ext4`` or ``xfs``; ``options`` are further words for its
    mkfs. All of it is gone at the end, with what is mounted below it.
    """
    require_root()
    mkfs, losetup = require(f"mkfs.{kind}"), require("losetup")
    own = Path(tempfile.mkdtemp(prefix=f"{kind}-", dir=folder)).resolve()
    image, mountpoint = own / "image", own / "disk"
    with contextlib.ExitStack() as undo:
        undo.callback(run, "rm", "-rf", "--one-file-system", own)
        mountpoint.mkdir()
        with image.open("wb") as file:
            file.truncate(size)
        run(mkfs, "-q", *options, image)
        device = run(losetup, "--find", "--show", image).strip()
        undo.callback(run, losetup, "--detach", device)
        words = ["-o", mount_options] if mount_options else []
        run("mount", "-t", kind, *words, device, mountpoint)
        undo.callback(_unmount, mountpoint)
        yield mountpoint


def enable_quotas(mountpoint: Path) -> None:
    """Switch on the quotas of a btrfs, and wait until all of it is counted."""
    run("btrfs", "quota", "enable", mountpoint)
    run("btrfs", "quota", "rescan", "-w", mountpoint)


def _unmount(mountpoint: Path) -> None:
    mounts = mountinfo.read()
    while mountinfo.at(str(mountpoint), mounts) is not None:
        for mount in reversed(mountinfo.below(str(mountpoint), mounts)):
            run("umount", mount.mountpoint)
        try:
            run("umount", mountpoint)
        except subprocess.CalledProcessError:
            run("umount", "--lazy", mountpoint)  # so that the rest can go
            raise
        mounts = mountinfo.read()
