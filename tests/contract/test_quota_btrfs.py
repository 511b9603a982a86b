"""Limits by qgroups on a real btrfs: in force for root, and gone with the volume."""

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.commands import run
from support.disks import disk, enable_quotas
from support.require import require

from volplugin.errors import (
    AlreadyExists,
    InvalidArgument,
    NoSpace,
    NotFound,
    Unsupported,
    VolpluginError,
)
from volplugin.host import btrfs, paths, qgroups, trees
from volplugin.quota.btrfs import BtrfsQuota
from volplugin.quota.mechanism import Limit, Limited

pytestmark = pytest.mark.root

MIB = 1 << 20
QUOTA = BtrfsQuota()


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[Path]:
    """A btrfs without quotas."""
    require("btrfs")
    with disk(tmp_path, "btrfs", 512 * MIB) as mountpoint:
        yield mountpoint


@pytest.fixture
def quotas(plain: Path) -> Path:
    """A btrfs with quotas, counted."""
    enable_quotas(plain)
    return plain


def make(path: Path, size: int | None = None) -> Path:
    QUOTA.make(str(path), {})
    if size is not None:
        QUOTA.set_limit(str(path), {}, Limit(size=size))
    return path


def fill(path: Path, block: str = "64k", count: int = 10_000) -> int:
    """Write as root until btrfs stops it, and return the bytes that went in."""
    words = ["dd", "if=/dev/zero", f"of={path}", f"bs={block}", f"count={count}"]
    done = subprocess.run(
        [*words, "oflag=append", "conv=notrunc"],
        check=False,
        capture_output=True,
        text=True,
        env={"LC_ALL": "C", "PATH": os.environ["PATH"]},
    )
    assert "Disk quota exceeded" in done.stderr
    return path.stat().st_size


def number_of(path: Path) -> int:
    found = btrfs.subvolume_at(str(path))
    assert found is not None
    return found.id


def limit_of(path: Path) -> int | None:
    return qgroups.get(str(path), number_of(path)).size


def shown(mountpoint: Path) -> str:
    return run("btrfs", "qgroup", "show", "--raw", "-r", mountpoint)


def never() -> bool:
    return False


def test_no_problem_where_quotas_are_on(quotas: Path) -> None:
    """With quotas on and counted directories can be limited, at any depth."""
    (quotas / "directory").mkdir()
    assert QUOTA.problem(str(quotas)) is None
    assert QUOTA.problem(str(quotas / "directory")) is None


def test_problem_quotas_off(plain: Path) -> None:
    """Quotas off: the text has the command with the mountpoint, and nothing is done."""
    (plain / "directory").mkdir()
    assert QUOTA.problem(str(plain / "directory")) == (
        f"quotas are off on this btrfs; `btrfs quota enable {plain}` switches them on"
    )
    assert not qgroups.state(str(plain)).is_on


def test_problem_other_file_systems(tmpfs: Path) -> None:
    """A file system that is not btrfs is named."""
    assert QUOTA.problem(str(tmpfs)) == (
        f"tmpfs (volplugin-test on {tmpfs}) is not btrfs"
    )


def test_problem_lost_count(quotas: Path) -> None:
    """Counts that are inconsistent, so that limits don't hold, are a problem."""
    path = make(quotas / "v")
    (path / "file").write_bytes(bytes(MIB))
    run("btrfs", "subvolume", "snapshot", path, quotas / "s")
    run("btrfs", "qgroup", "create", "1/1", quotas)
    btrfs.sync(str(quotas))
    run("btrfs", "qgroup", "assign", "--no-rescan", f"0/{number_of(path)}", "1/1", path)
    btrfs.commit(str(quotas))
    problem = QUOTA.problem(str(quotas))
    assert problem is not None
    assert "have lost count" in problem
    assert f"`btrfs quota rescan -w {quotas}`" in problem
    run("btrfs", "quota", "rescan", "-w", quotas)
    assert QUOTA.problem(str(quotas)) is None


def test_problem_without_rights(quotas: Path) -> None:
    """Without CAP_SYS_ADMIN quotas can't even be read: that is a problem."""
    script = (
        "from volplugin.quota.btrfs import BtrfsQuota;"
        f"print(BtrfsQuota().problem({str(quotas)!r}))"
    )
    said = run(
        *(require("setpriv"), "--bounding-set", "-sys_admin"),
        *(sys.executable, "-c", script),
    )
    assert "it needs CAP_SYS_ADMIN" in said


def test_what_can_be_limited(quotas: Path) -> None:
    """Less than 1M and numbers of inodes are refused; 1M is enough for a file."""
    with pytest.raises(InvalidArgument, match=r"size=1023K is below .* 1M"):
        QUOTA.check(Limit(size=1023 << 10))
    with pytest.raises(Unsupported, match="btrfs counts no inodes"):
        QUOTA.check(Limit(size=MIB, inodes=100))
    QUOTA.check(Limit(size=MIB))
    path = make(quotas / "v", MIB)
    for number in range(10):
        (path / f"{number}").write_bytes(bytes(50_000))


@pytest.mark.parametrize("options", [["-n", "4096"], ["-n", "65536"]])
def test_the_minimum_with_other_blocks(tmp_path: Path, options: list[str]) -> None:
    """The minimum takes files with the smallest and the largest metadata blocks too."""
    require("btrfs")
    with disk(tmp_path, "btrfs", 512 * MIB, options) as mountpoint:
        enable_quotas(mountpoint)
        path = make(mountpoint / "v", MIB)
        (path / "file").write_bytes(bytes(500_000))
        btrfs.sync(str(path))
        assert 500_000 < QUOTA.usage(str(path), {}).used < MIB


def test_a_new_volume(quotas: Path) -> None:
    """It is an empty subvolume of mode 0700; making it again changes nothing."""
    path = make(quotas / "v", 10 * MIB)
    number = number_of(path)
    make(path)
    assert number_of(path) == number
    assert limit_of(path) == 10 * MIB
    assert path.stat().st_mode & 0o7777 == 0o700
    assert QUOTA.reserve(str(quotas)) == {}
    (quotas / "directory").mkdir()
    with pytest.raises(AlreadyExists):
        make(quotas / "directory")


@pytest.mark.parametrize("size", [MIB, 10 * MIB, 100 * MIB])
def test_root_is_stopped_at_the_limit(quotas: Path, size: int) -> None:
    """Root is stopped with EDQUOT, at most two blocks of metadata and 1% early."""
    path = make(quotas / "v", size)
    written = fill(path / "file")
    assert size - (32 << 10) - size // 100 - (64 << 10) <= written <= size
    btrfs.sync(str(path))
    assert QUOTA.usage(str(path), {}).used <= size


def test_small_files_are_stopped(quotas: Path) -> None:
    """Files within metadata blocks count as well, and can be deleted at the limit."""
    path = make(quotas / "v", MIB)
    made = 0
    try:
        for made in range(2000):
            (path / f"{made}").write_bytes(bytes(1000))
    except OSError as error:
        assert error.errno == errno.EDQUOT  # noqa: PT017  which one fails is not known
    assert 300 < made < 1000
    btrfs.sync(str(path))
    assert QUOTA.usage(str(path), {}).used <= MIB
    for name in os.listdir(path):
        (path / name).unlink()


def test_a_full_volume_grows_and_is_emptied(quotas: Path) -> None:
    """Given more, writing goes on; and files can be deleted in a full volume."""
    path = make(quotas / "v", 2 * MIB)
    before = fill(path / "file")
    QUOTA.set_limit(str(path), {}, Limit(size=4 * MIB))
    assert fill(path / "file") >= before + 2 * MIB - (64 << 10)
    QUOTA.set_limit(str(path), {}, Limit(size=None))
    assert limit_of(path) is None
    with (path / "file").open("ab") as file:
        file.write(bytes(8 * MIB))
    QUOTA.set_limit(str(path), {}, Limit(size=13 * MIB))
    fill(path / "file")
    (path / "file").unlink()
    (path / "other").write_bytes(bytes(MIB))


def test_shrinking_below_what_it_holds(quotas: Path) -> None:
    """Refused with both figures and nothing changed, also for data not written yet."""
    path = make(quotas / "v", 10 * MIB)
    (path / "file").write_bytes(bytes(3 * MIB))
    with pytest.raises(NoSpace, match=r"holds \d+K, more than size=2M"):
        QUOTA.set_limit(str(path), {}, Limit(size=2 * MIB))
    assert limit_of(path) == 10 * MIB
    QUOTA.set_limit(str(path), {}, Limit(size=4 * MIB))
    assert limit_of(path) == 4 * MIB
    (path / "file").unlink()
    QUOTA.set_limit(str(path), {}, Limit(size=2 * MIB))
    assert limit_of(path) == 2 * MIB


def test_a_first_limit_counts_what_is_on_the_way(quotas: Path) -> None:
    """A subvolume that had no limit is counted anew before it gets one."""
    path = make(quotas / "v")
    (path / "file").write_bytes(bytes(3 * MIB))
    with pytest.raises(NoSpace, match="more than size=2M"):
        QUOTA.set_limit(str(path), {}, Limit(size=2 * MIB))
    assert limit_of(path) is None


def test_a_limit_outlives_a_power_cut(tmp_path: Path, scratch: Path) -> None:
    """It is on disk at return."""
    require("btrfs")
    with disk(tmp_path, "btrfs", 256 * MIB) as mountpoint:
        enable_quotas(mountpoint)
        make(mountpoint / "v", 5 * MIB)
        run("cp", "--sparse=always", mountpoint.parent / "image", scratch / "image")
    after = scratch / "after"
    after.mkdir()
    run("mount", "-o", "loop", scratch / "image", after)
    assert limit_of(after / "v") == 5 * MIB
    assert QUOTA.problem(str(after)) is None
    run("umount", after)


def test_a_rename_keeps_the_limit(quotas: Path) -> None:
    """Moved into place a volume has the limit that it was given aside."""
    (quotas / "volumes").mkdir()
    make(quotas / "staged", 2 * MIB)
    paths.move(str(quotas / "staged"), str(quotas / "volumes" / "v"))
    assert limit_of(quotas / "volumes" / "v") == 2 * MIB
    assert fill(quotas / "volumes" / "v" / "file") <= 2 * MIB


def test_adopting(quotas: Path) -> None:
    """A filled subvolume without a limit is adopted at once, and released again."""
    path = quotas / "theirs"
    run("btrfs", "subvolume", "create", path)
    (path / "file").write_bytes(bytes(2 * MIB))
    btrfs.sync(str(path))
    QUOTA.require_adoptable(str(path), {}, Limit(size=4 * MIB))
    assert limit_of(path) is None
    for _ in range(2):
        assert QUOTA.adopt(str(path), {}, Limit(size=4 * MIB))
    assert QUOTA.work(never)
    assert fill(path / "file") <= 4 * MIB
    for _ in range(2):
        QUOTA.release(str(path), {})
    assert limit_of(path) is None
    assert (path / "file").stat().st_size > 2 * MIB
    assert path.stat().st_mode & 0o7777 == 0o755


def test_what_can_not_be_adopted(quotas: Path) -> None:
    """A plain directory, one that holds too much, one that someone else limits."""
    (quotas / "directory").mkdir()
    path = quotas / "theirs"
    run("btrfs", "subvolume", "create", path)
    (path / "file").write_bytes(bytes(4 * MIB))
    btrfs.sync(str(path))

    def refusals(place: Path, size: int) -> Iterator[VolpluginError]:
        for call in (QUOTA.require_adoptable, QUOTA.adopt):
            with pytest.raises(VolpluginError) as error:
                call(str(place), {}, Limit(size=size))
            yield error.value

    for error in refusals(quotas / "directory", 8 * MIB):
        assert isinstance(error, Unsupported)
        assert "`btrfs subvolume create NEW`" in str(error)
    for error in refusals(path, 3 * MIB):
        assert isinstance(error, NoSpace)
        assert "more than size=3M" in str(error)
    run("btrfs", "qgroup", "limit", "7M", path)
    for error in refusals(path, 8 * MIB):
        assert isinstance(error, AlreadyExists)
        assert "has a limit of 7M already" in str(error)
    run("btrfs", "qgroup", "limit", "none", path)
    run("btrfs", "qgroup", "limit", "-e", "9M", path)
    for error in refusals(path, 8 * MIB):
        assert isinstance(error, AlreadyExists)
        assert "has an exclusive limit of 9M already" in str(error)


def test_usage(quotas: Path) -> None:
    """After a sync it is what was written, and what is left is of limit or disk."""
    path = make(quotas / "v", 20 * MIB)
    assert QUOTA.usage(str(path), {}).used == 16384
    (path / "file").write_bytes(os.urandom(5 * MIB))
    btrfs.sync(str(path))
    usage = QUOTA.usage(str(path), {})
    assert 5 * MIB < usage.used < 5.1 * MIB
    assert usage.size == 20 * MIB
    assert usage.available == 20 * MIB - usage.used
    assert (usage.inodes, usage.inodes_used) == (None, None)
    QUOTA.set_limit(str(path), {}, Limit(size=1 << 40))
    disk = os.statvfs(quotas)
    assert QUOTA.usage(str(path), {}).available == disk.f_bavail * disk.f_frsize


def test_a_hundred_volumes_in_one_pass(quotas: Path) -> None:
    """All are measured by one read; those that can't be measured are left out."""
    volumes = {}
    for number in range(100):
        path = make(quotas / f"v{number}")
        qgroups.set_limit(str(path), number_of(path), (number + 1) * MIB)
        volumes[f"id{number}"] = Limited(str(path), {})
    (quotas / "v7" / "file").write_bytes(bytes(MIB))
    btrfs.sync(str(quotas))
    (quotas / "directory").mkdir()
    for name in ("directory", "missing"):
        volumes[name] = Limited(str(quotas / name), {})
    measured = QUOTA.measure(volumes)
    assert set(measured) == {f"id{number}" for number in range(100)}
    for number in range(100):
        assert measured[f"id{number}"].size == (number + 1) * MIB
        assert measured[f"id{number}"] == QUOTA.usage(str(quotas / f"v{number}"), {})
    assert measured["id7"].used > MIB


def test_measuring_two_file_systems(quotas: Path, tmp_path: Path) -> None:
    """Volumes of equal subvolume ids on two disks are kept apart."""
    with disk(tmp_path, "btrfs", 256 * MIB) as other:
        enable_quotas(other)
        here, there = make(quotas / "v", 2 * MIB), make(other / "v", 3 * MIB)
        assert number_of(here) == number_of(there)
        volumes = {"here": Limited(str(here), {}), "there": Limited(str(there), {})}
        measured = QUOTA.measure(volumes)
    assert measured["here"].size == 2 * MIB
    assert measured["there"].size == 3 * MIB


def test_measuring_without_quotas(plain: Path) -> None:
    """Nothing is measured where quotas are off, and nothing raised."""
    path = make(plain / "v")
    assert QUOTA.measure({"v": Limited(str(path), {})}) == {}


def test_verifying(quotas: Path) -> None:
    """A limit that is missing or differs is put right and told of; one right is not."""
    path = make(quotas / "v", 5 * MIB)
    wanted = Limit(size=5 * MIB)
    assert QUOTA.verify(str(path), {}, wanted) is None
    run("btrfs", "qgroup", "limit", "none", path)
    assert QUOTA.verify(str(path), {}, wanted) == "limit none instead of size=5M"
    run("btrfs", "qgroup", "limit", "9M", path)
    assert QUOTA.verify(str(path), {}, wanted) == "limit size=9M instead of size=5M"
    assert limit_of(path) == 5 * MIB


def test_verifying_what_is_gone(quotas: Path) -> None:
    """A volume that is missing, or is no subvolume any more, is an error."""
    (quotas / "directory").mkdir()
    with pytest.raises(NotFound):
        QUOTA.verify(str(quotas / "missing"), {}, Limit(size=MIB))
    with pytest.raises(Unsupported, match="is no subvolume"):
        QUOTA.verify(str(quotas / "directory"), {}, Limit(size=MIB))


def test_quotas_switched_off_and_on(quotas: Path) -> None:
    """Limits are lost with quotas switched off; verify brings them back."""
    path = make(quotas / "v", 5 * MIB)
    run("btrfs", "quota", "disable", quotas)
    with pytest.raises(Unsupported, match="quotas are off"):
        QUOTA.verify(str(path), {}, Limit(size=5 * MIB))
    with pytest.raises(Unsupported, match="quotas are off"):
        QUOTA.set_limit(str(path), {}, Limit(size=5 * MIB))
    QUOTA.release(str(path), {})
    enable_quotas(quotas)
    said = QUOTA.verify(str(path), {}, Limit(size=5 * MIB))
    assert said == "limit none instead of size=5M"


def test_releasing_what_is_gone(quotas: Path, tmpfs: Path) -> None:
    """A directory that is missing, or was never a subvolume, has no limit to lose."""
    (quotas / "directory").mkdir()
    for path in (quotas / "missing", quotas / "directory", tmpfs):
        QUOTA.release(str(path), {})


def test_the_qgroup_goes_with_the_volume(quotas: Path) -> None:
    """Deleting a full volume with others below it leaves no qgroup behind."""
    path = make(quotas / "v", 4 * MIB)
    run("btrfs", "subvolume", "create", path / "nested")
    (path / "nested" / "file").touch()
    fill(path / "file")
    assert shown(quotas).count("\n0/") == 3
    QUOTA.forget(str(quotas), {})
    for _ in range(2):
        assert trees.delete(str(path), stop=never)
    assert not path.exists()
    assert shown(quotas).count("\n0/") == 1


def test_df_shows_the_whole_file_system(quotas: Path) -> None:
    """The limit can't be seen from inside by statfs(2)."""
    path = make(quotas / "v", 5 * MIB)
    assert os.statvfs(path).f_blocks == os.statvfs(quotas).f_blocks


def test_a_subvolume_made_inside_escapes_the_limit(quotas: Path) -> None:
    """Whoever may write in a volume can make a subvolume there without a limit."""
    path = make(quotas / "v", 5 * MIB)
    path.chmod(0o777)
    quotas.parent.parent.chmod(0o755)
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    script = "btrfs subvolume create n && dd if=/dev/zero of=n/file bs=1M count=50"
    subprocess.run(
        [*nobody, "sh", "-c", script], cwd=path, check=True, capture_output=True
    )
    btrfs.sync(str(path))
    assert (path / "n" / "file").stat().st_size == 50 * MIB
    assert QUOTA.usage(str(path), {}).used < 5 * MIB
