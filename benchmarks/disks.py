"""File systems in sparse images of our own, on the host and for the guest."""

import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from volplugin.host import loops, mounts
from volplugin.host.mounts import MountFlag

MIB = 1 << 20


def make_image(path: Path, kind: str, size: int, options: Sequence[str] = ()) -> None:
    """Make a sparse file of ``size`` bytes with a file system; no mount."""
    with path.open("wb") as file:
        file.truncate(size)
    command(f"mkfs.{kind}", "-q", *options, path)


@contextmanager
def mounted(image: Path, kind: str, mountpoint: Path, data: str = "") -> Iterator[Path]:
    """Mount an image, past the page cache of the file system below it.

    The loop device goes with the mount, whatever ends that.
    """
    mountpoint.mkdir()
    with loops.attach(str(image)) as loop:
        mounts.mount(loop.device, str(mountpoint), kind, flags=MountFlag(0), data=data)
    try:
        yield mountpoint
    finally:
        mounts.unmount(str(mountpoint))


def command(*words: str | Path) -> str:
    """Run a program and return what it printed; raise with its words if it fails.

    What it leaves in its working directory, as fio does, is gone afterwards.
    """
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [str(word) for word in words],
            check=False,
            capture_output=True,
            text=True,
            cwd=folder,
        )
    if done.returncode:
        told = (done.stderr or done.stdout).strip()
        raise RuntimeError(f"{' '.join(map(str, words))}: {told}")
    return done.stdout
