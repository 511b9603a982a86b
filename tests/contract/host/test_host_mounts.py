"""Mounting and unmounting on the real kernel."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from volplugin.errors import (
    InUse,
    InvalidArgument,
    NotFound,
    Unavailable,
    Unsupported,
)
from volplugin.host import mountinfo, mounts
from volplugin.host.mounts import MountFlag

pytestmark = pytest.mark.root

FLAGS = MountFlag.NOSUID | MountFlag.NODEV | MountFlag.NOEXEC


def mount_tmpfs(path: Path, data: str = "size=1m,mode=1777") -> None:
    mounts.mount("volplugin-x", str(path), "tmpfs", flags=FLAGS, data=data)


@pytest.mark.parametrize("name", ["plain", "with space", "new\nline", "back\\slash"])
def test_mount_and_unmount(scratch: Path, name: str) -> None:
    """A tmpfs has the source, flags and options it was given, and goes again."""
    path = scratch / name
    path.mkdir()
    mount_tmpfs(path)
    found = mountinfo.at(str(path), mountinfo.read())
    assert found is not None
    assert (found.kind, found.source) == ("tmpfs", "volplugin-x")
    assert {"nosuid", "nodev", "noexec"} <= set(found.options.split(","))
    assert path.stat().st_mode & 0o7777 == 0o1777
    status = os.statvfs(path)
    assert status.f_blocks * status.f_frsize == 1 << 20
    mounts.unmount(str(path))
    assert mountinfo.at(str(path), mountinfo.read()) is None


def test_bind(tmpfs: Path, scratch: Path) -> None:
    """A bind mount shows the directory at another place."""
    (tmpfs / "file").touch()
    other = scratch / "other"
    other.mkdir()
    mounts.mount(str(tmpfs), str(other), "", flags=MountFlag.BIND)
    assert (other / "file").exists()


def test_unmount_is_idempotent(scratch: Path) -> None:
    """Nothing mounted, no such path and no parent of it are all success."""
    mounts.unmount(str(scratch))
    mounts.unmount(str(scratch / "missing"))
    mounts.unmount(str(scratch / "missing" / "deeper"))


def test_unmount_takes_one_at_a_time(tmpfs: Path) -> None:
    """Of two mounts on one mountpoint only the upper one goes."""
    mount_tmpfs(tmpfs)
    mounts.unmount(str(tmpfs))
    found = mountinfo.at(str(tmpfs), mountinfo.read())
    assert found is not None
    assert found.source == "volplugin-test"


def test_busy_says_what_to_do(tmpfs: Path) -> None:
    """A mount with an open file stays, and the error says how to find the process."""
    with (tmpfs / "file").open("w"), pytest.raises(InUse, match="fuser -vm"):
        mounts.unmount(str(tmpfs))
    mounts.unmount(str(tmpfs))


def test_a_mount_below_keeps_it(tmpfs: Path) -> None:
    """A mount with another one below it is in use."""
    (tmpfs / "sub").mkdir()
    mount_tmpfs(tmpfs / "sub")
    with pytest.raises(InUse):
        mounts.unmount(str(tmpfs))


def test_a_hidden_mount_is_not_reported_gone(tmpfs: Path) -> None:
    """A mount that another one hides is an error, not "nothing to do"."""
    for name in ("there", "not-there"):
        (tmpfs / name).mkdir()
        mount_tmpfs(tmpfs / name)
    mount_tmpfs(tmpfs)
    (tmpfs / "there").mkdir()
    for name in ("there", "not-there"):
        with pytest.raises(Unavailable, match="hidden"):
            mounts.unmount(str(tmpfs / name))
    mounts.unmount(str(tmpfs))


def test_no_symbolic_link_is_followed(tmpfs: Path, scratch: Path) -> None:
    """Neither mount nor unmount goes through a link, at the end or before."""
    (tmpfs / "sub").mkdir()
    (scratch / "link").symlink_to(tmpfs)
    for path in (scratch / "link", scratch / "link" / "sub"):
        with pytest.raises(InvalidArgument, match="symbolic link"):
            mount_tmpfs(path)
    with pytest.raises(InvalidArgument, match="symbolic link"):
        mounts.unmount(str(scratch / "link" / "sub"))
    mounts.unmount(str(scratch / "link"))
    assert mountinfo.at(str(tmpfs), mountinfo.read()) is not None


def test_refused_mounts(scratch: Path) -> None:
    """Bad options, an unknown type, a missing target and a NUL are told apart."""
    with pytest.raises(InvalidArgument, match="nonsense"):
        mount_tmpfs(scratch, "nonsense=1")
    with pytest.raises(Unsupported, match="nosuchfs"):
        mounts.mount("x", str(scratch), "nosuchfs", flags=FLAGS)
    with pytest.raises(NotFound, match="missing"):
        mount_tmpfs(scratch / "missing")
    with pytest.raises(InvalidArgument, match="NUL"):
        mount_tmpfs(scratch, "size=1m\0,size=1g")
    assert mountinfo.below(str(scratch), mountinfo.read()) == []


def test_without_the_right(scratch: Path) -> None:
    """Without CAP_SYS_ADMIN the error names what is missing."""
    program = (
        "from volplugin.errors import Unsupported\n"
        "from volplugin.host import mounts\n"
        "try:\n"
        f"    mounts.mount('x', {str(scratch)!r}, 'tmpfs', flags=mounts.MountFlag(0))\n"
        "except Unsupported as error:\n"
        "    print(error)\n"
    )
    answer = subprocess.run(
        ["setpriv", "--bounding-set=-sys_admin", sys.executable, "-c", program],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(mounts.__file__).parents[2],
    )
    assert "CAP_SYS_ADMIN" in answer.stdout
