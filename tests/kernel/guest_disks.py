"""The disks of the machine that quotas are tried on, and writers of all kinds."""

import contextlib
import ctypes
import os
import pickle
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import attrs
from support.commands import run

from volplugin.host import trees
from volplugin.quota.ids import IdRange
from volplugin.quota.mechanism import Facts, Limit
from volplugin.quota.project import ProjectQuota

BLOCK: Final = 4096
USER: Final = 1000
DISKS: Final = {"xfs": "/dev/ubda", "ext4": "/dev/ubdb"}
PLAIN: Final = {"ext4": "/dev/ubdc", "xfs": "/dev/ubdd"}
OPTIONS: Final = {"xfs": "pquota", "ext4": "prjquota"}


@attrs.frozen
class Disk:
    """A mounted file system, and the kind it is."""

    kind: str
    path: Path

    def mechanism(self, ids: IdRange | None = None) -> ProjectQuota:
        """Make a mechanism as after a restart: what it knows is on the disk."""
        return ProjectQuota(str(self.path / "place"), ids or IdRange())


@contextlib.contextmanager
def mounted(device: str, kind: str, options: str = "defaults") -> Iterator[Disk]:
    # Not in the session's folder, which other users can't pass.
    path = Path(tempfile.mkdtemp(prefix="disk-", dir="/run"))
    path.chmod(0o755)
    run("mount", "-t", kind, "-o", options, device, path)
    try:
        yield Disk(kind, path)
    finally:
        run("umount", path)
        path.rmdir()


@contextlib.contextmanager
def quota_disk(kind: str) -> Iterator[Disk]:
    with mounted(DISKS[kind], kind, OPTIONS[kind]) as disk:
        yield disk


@attrs.frozen
class Limited:
    """A directory of ours with a limit."""

    mechanism: ProjectQuota
    path: Path
    facts: Facts

    @property
    def id(self) -> int:
        return int(self.facts["project"])

    def limit(self, size: int | None = None, inodes: int | None = None) -> None:
        self.mechanism.set_limit(
            str(self.path), self.facts, Limit(size=size, inodes=inodes)
        )

    def remove(self) -> None:
        """Remove it as a volume is removed: the limit first of all that is left."""
        self.mechanism.forget(str(self.path.parent), self.facts)
        assert trees.delete(str(self.path), stop=lambda: False)


def make(mechanism: ProjectQuota, path: Path) -> Limited:
    facts = mechanism.reserve(str(path.parent))
    mechanism.make(str(path), facts)
    path.chmod(0o777)
    return Limited(mechanism, path, facts)


def fill(path: Path, *prefix: str) -> str:
    """Write to a file by dd(1) until that fails, 64 MiB at most; return its words."""
    command = [*prefix, "dd", "if=/dev/zero", f"of={path}", f"bs={BLOCK}"]
    done = subprocess.run(
        [*command, "count=16384"], capture_output=True, text=True, check=False
    )
    return done.stderr


def in_child(action: Callable[[], Any], *, before: Callable[[], None]) -> Any:
    """Return what ``action`` returns in a process that has done ``before``.

    An error that is raised there is returned.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            before()
            result = action()
        except BaseException as error:  # noqa: BLE001  it is told by the parent
            result = error
        with contextlib.suppress(BaseException):
            os.write(writing, pickle.dumps(result))
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        data = pipe.read()
    os.waitpid(pid, 0)
    return pickle.loads(data)


def become_user() -> None:
    """Make this process one of an ordinary user, for good."""
    os.setgroups([])
    os.setgid(USER)
    os.setuid(USER)


def refuse(number: int, code: int) -> None:
    """Have the kernel answer one system call of this process with an error, for good.

    By seccomp(2), as container runtimes do.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    load = struct.pack("HBBI", 0x20, 0, 0, 0)  # the number of the call
    same = struct.pack("HBBI", 0x15, 0, 1, number)
    answer = struct.pack("HBBI", 0x06, 0, 0, 0x00050000 | code)
    allow = struct.pack("HBBI", 0x06, 0, 0, 0x7FFF0000)
    program = ctypes.create_string_buffer(load + same + answer + allow)
    header = struct.pack("HxxxxxxQ", 4, ctypes.addressof(program))
    assert libc.prctl(22, 2, header) == 0, os.strerror(ctypes.get_errno())


@contextlib.contextmanager
def projid(text: str) -> Iterator[None]:
    """Have an /etc/projid of this content."""
    Path("/etc/projid").write_text(text)
    try:
        yield
    finally:
        os.unlink("/etc/projid")
