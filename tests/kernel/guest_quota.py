"""Project quotas on real XFS and ext4: what they stop, count, and say."""

import errno
import os
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest
from guest_disks import (
    BLOCK,
    DISKS,
    PLAIN,
    USER,
    Disk,
    Limited,
    become_user,
    fill,
    in_child,
    make,
    mounted,
    projid,
    quota_disk,
    refuse,
)
from support.commands import run
from support.wait import eventually

from volplugin.errors import AlreadyExists, InvalidArgument, NoSpace, Unsupported
from volplugin.host import projects, quotactl
from volplugin.host.projects import Project
from volplugin.quota import ids, mechanism
from volplugin.quota.ids import IdRange
from volplugin.quota.mechanism import Limit

MIB = 1 << 20
WITHOUT_RESOURCE = ("setpriv", "--bounding-set=-sys_resource", "--inh-caps=-all")
AS_USER = ("setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups")
FULL = {"xfs": "No space left on device", "ext4": "Disk quota exceeded"}


@pytest.fixture(scope="module", params=["xfs", "ext4"])
def disk(request: pytest.FixtureRequest) -> Iterator[Disk]:
    with quota_disk(request.param) as found:
        yield found


@pytest.fixture
def volume(disk: Disk) -> Iterator[Limited]:
    made = make(disk.mechanism(), disk.path / "volume")
    yield made
    made.remove()


@pytest.mark.parametrize("who", [WITHOUT_RESOURCE, AS_USER])
def test_writers_are_stopped_at_the_limit(
    disk: Disk, volume: Limited, who: tuple[str, ...]
) -> None:
    """Root and others are stopped within a block, each kind in its own words."""
    volume.limit(4 * MIB)
    assert FULL[disk.kind] in fill(volume.path / "file", *who)
    usage = volume.mechanism.usage(str(volume.path), volume.facts)
    assert usage.size == 4 * MIB
    assert 0 <= 4 * MIB - usage.used <= BLOCK
    assert usage.available <= BLOCK


def test_the_kernel_exempts_root_on_ext4_alone(disk: Disk, volume: Limited) -> None:
    """With CAP_SYS_RESOURCE ext4 lets a writer pass the limit; XFS lets nobody."""
    volume.limit(4 * MIB)
    told = fill(volume.path / "file")
    assert (FULL["xfs"] in told) is (disk.kind == "xfs")
    usage = volume.mechanism.usage(str(volume.path), volume.facts)
    assert (usage.used > 4 * MIB) is (disk.kind == "ext4")
    assert usage.available <= BLOCK


def test_inodes_are_limited(disk: Disk, volume: Limited) -> None:
    """The root counts as one inode; the last that fits is made, the next is not."""
    volume.limit(64 * MIB, inodes=10)

    def create() -> list[int | None]:
        codes: list[int | None] = []
        for number in range(11):
            try:
                os.mkdir(volume.path / str(number))
            except OSError as error:
                codes.append(error.errno)
        return codes

    full = errno.ENOSPC if disk.kind == "xfs" else errno.EDQUOT
    assert in_child(create, before=become_user) == [full, full]
    usage = volume.mechanism.usage(str(volume.path), volume.facts)
    assert (usage.inodes_used, usage.inodes) == (10, 10)


def test_a_writer_goes_on_when_the_limit_grows(volume: Limited) -> None:
    """What was stopped at the limit gets the new space at once."""
    volume.limit(4 * MIB)
    loop = (
        "until dd if=/dev/zero of=file bs=64k count=128 conv=notrunc; do sleep 0.1;done"
    )
    with subprocess.Popen(
        [*AS_USER, "sh", "-c", loop], cwd=volume.path, stderr=subprocess.DEVNULL
    ) as writer:
        eventually(lambda: used(volume) > 3 * MIB, "the volume is full", seconds=30)
        time.sleep(0.3)
        assert writer.poll() is None
        volume.limit(16 * MIB)
        assert writer.wait(30) == 0
    assert used(volume) >= 8 * MIB


def used(volume: Limited) -> int:
    return volume.mechanism.usage(str(volume.path), volume.facts).used


def test_a_limit_below_what_is_held_is_refused(volume: Limited) -> None:
    """The refusal names both figures, and the limit stays."""
    volume.limit(4 * MIB, inodes=10)
    (volume.path / "file").write_bytes(bytes(MIB))
    for number in range(3):
        (volume.path / str(number)).mkdir()
    with pytest.raises(NoSpace, match=r"holds \d+[KM], more than size=512K"):
        volume.limit(MIB // 2)
    with pytest.raises(NoSpace, match=r"holds 5 inodes, more than inodes=4"):
        volume.limit(4 * MIB, inodes=4)
    found = quotactl.get(str(volume.path), volume.id)
    assert (found.size, found.inodes) == (4 * MIB, 10)


@pytest.mark.parametrize("size", [100_001, 65_536, 123_457_791, 1 << 45])
def test_odd_sizes_are_rounded_up(volume: Limited, size: int) -> None:
    """A limit is at least what was asked, and less than a block above it."""
    volume.limit(size)
    kept = quotactl.get(str(volume.path), volume.id).size
    assert kept is not None
    assert 0 <= kept - size < BLOCK
    path, limit = str(volume.path), Limit(size=size)
    assert volume.mechanism.verify(path, volume.facts, limit) is None


def test_an_id_rests_while_anything_carries_it(disk: Disk) -> None:
    """It is free once the last file is gone, and comes back with the new limit."""
    one = IdRange(500, 500)
    volume = make(disk.mechanism(one), disk.path / "first")
    volume.limit(4 * MIB)
    with pytest.raises(NoSpace, match="all project ids of 500-500 are in use"):
        volume.mechanism.reserve(str(disk.path))
    volume.mechanism.forget(str(disk.path), volume.facts)
    with pytest.raises(NoSpace):  # its directory is there
        volume.mechanism.reserve(str(disk.path))
    volume.remove()
    # XFS takes inodes back in the background.
    eventually(
        lambda: quotactl.get(str(disk.path), 500).is_empty, "the last file is gone"
    )
    again = make(disk.mechanism(one), disk.path / "second")
    assert again.id == 500
    assert quotactl.get(str(again.path), 500).size is None
    again.limit(8 * MIB)
    assert quotactl.get(str(again.path), 500).size == 8 * MIB
    again.remove()


def test_ids_that_others_use_are_left_out(disk: Disk) -> None:
    """A limit or a file of someone else is enough; backends share what is given."""
    path, some = str(disk.path), IdRange(600, 609)
    quotactl.set_limit(path, 600, size=MIB, inodes=None)
    (disk.path / "foreign").touch()
    projects.put(str(disk.path / "foreign"), Project(602))
    assert ids.reserve(path, some) == 601
    assert ids.reserve(path, some) == 603
    ids.keep(path, 604)
    assert ids.reserve(path, IdRange(602, 700)) == 605
    ids.release(path, 603)
    assert [ids.reserve(path, some) for _ in range(5)] == [606, 607, 608, 609, 603]
    with pytest.raises(NoSpace, match="600-609"):
        ids.reserve(path, some)
    quotactl.set_limit(path, 600, size=None, inodes=None)
    (disk.path / "foreign").unlink()
    assert ids.reserve(path, some) in {600, 602}
    for number in range(600, 610):
        ids.release(path, number)


def look(path: str, number: int) -> Any:
    """Return all that the calls can tell, having set a limit by them."""
    quotactl.set_limit(path, number, size=3 * MIB, inodes=77)
    return (
        quotactl.state(path),
        quotactl.get(path, number),
        list(quotactl.each(path, number)),
    )


def without_the_call() -> None:
    refuse(443, errno.ENOSYS)


def test_by_descriptor_and_by_device_agree(volume: Limited) -> None:
    """A kernel without quotactl_fd(2) tells and sets the same by quotactl(2)."""
    path = str(volume.path)
    expected = look(path, volume.id)
    assert expected[1].size == 3 * MIB
    assert [quota.id for quota in expected[2]][:1] == [volume.id]
    volume.limit(5 * MIB)
    found = in_child(lambda: look(path, volume.id), before=without_the_call)
    assert found == expected
    assert quotactl.get(path, volume.id).inodes == 77


def test_a_device_without_a_node_is_reached(disk: Disk, volume: Limited) -> None:
    """Where /dev lacks the disk, a node is made for the call and removed."""
    path = str(volume.path)
    expected = look(path, volume.id)
    os.rename(DISKS[disk.kind], "/dev/hidden")
    before = os.listdir("/dev")
    try:
        found = in_child(lambda: look(path, volume.id), before=without_the_call)
        assert os.listdir("/dev") == before
    finally:
        os.rename("/dev/hidden", DISKS[disk.kind])
    assert found == expected


def test_without_the_right_the_capability_is_named(volume: Limited) -> None:
    """Another user is told what is missing, by each call that needs it."""
    path = str(volume.path)
    for action in (
        lambda: quotactl.get(path, volume.id),
        lambda: quotactl.set_limit(path, volume.id, size=MIB, inodes=None),
        lambda: list(quotactl.each(path, 1)),
    ):
        error = in_child(action, before=become_user)
        assert isinstance(error, Unsupported), error
        assert "it needs CAP_SYS_ADMIN" in str(error)
    parent = str(volume.path.parent)
    problem = in_child(lambda: volume.mechanism.problem(parent), before=become_user)
    assert "it needs CAP_SYS_ADMIN" in problem


def test_200_volumes_are_measured_in_one_pass(disk: Disk) -> None:
    """Each gets its own figures; those that can't be measured are left out."""
    volumes = {}
    for number in range(200):
        volume = make(disk.mechanism(), disk.path / f"many{number}")
        path, size = str(volume.path), MIB + number * BLOCK
        quotactl.set_limit(path, volume.id, size=size, inodes=None)
        volumes[str(number)] = volume
    asked = {
        key: mechanism.Limited(str(volume.path), volume.facts)
        for key, volume in volumes.items()
    }
    asked["gone"] = mechanism.Limited(str(disk.path / "gone"), {"project": "77"})
    begin = time.monotonic()
    found = disk.mechanism().measure(asked)
    assert time.monotonic() - begin < 2
    assert set(found) == set(volumes)
    for key in ("0", "57", "199"):
        volume = volumes[key]
        assert found[key].size == MIB + int(key) * BLOCK
        assert found[key] == volume.mechanism.usage(str(volume.path), volume.facts)
    for volume in volumes.values():
        volume.remove()


def test_the_disk_bounds_what_is_available(disk: Disk, volume: Limited) -> None:
    """A limit above the disk's own space gives no more than that space."""
    volume.limit(1 << 40)
    usage = volume.mechanism.usage(str(volume.path), volume.facts)
    space = os.statvfs(disk.path)
    assert usage.size == 1 << 40
    assert 0 < usage.available <= space.f_bavail * space.f_frsize
    volume.limit(2 * MIB)
    usage = volume.mechanism.usage(str(volume.path), volume.facts)
    assert usage.available == 2 * MIB - usage.used


def test_what_was_lost_is_put_right(volume: Limited) -> None:
    """A limit that someone changed and an id that is gone are told and restored."""
    volume.limit(4 * MIB, inodes=50)
    path, limit = str(volume.path), Limit(size=4 * MIB, inodes=50)
    (volume.path / "sub").mkdir()
    assert volume.mechanism.verify(path, volume.facts, limit) is None
    quotactl.set_limit(path, volume.id, size=None, inodes=50)
    projects.put(path, Project(0))
    told = volume.mechanism.verify(path, volume.facts, limit)
    assert told == (
        f"not in project {volume.id}; limit inodes=50 instead of size=4M inodes=50"
    )
    assert projects.of(path) == Project(volume.id, inherits=True)
    assert quotactl.get(path, volume.id).size == 4 * MIB
    assert volume.mechanism.work(lambda: False)
    assert volume.mechanism.verify(path, volume.facts, limit) is None
    projects.put(path, Project(4711))
    with pytest.raises(AlreadyExists, match="4711"):
        volume.mechanism.verify(path, volume.facts, limit)
    with pytest.raises(AlreadyExists, match="4711"):
        volume.limit(8 * MIB)
    projects.put(path, Project(volume.id, inherits=True))


def test_making_is_idempotent(volume: Limited) -> None:
    """A directory that was made is left as it is, with its limit."""
    volume.limit(4 * MIB)
    volume.mechanism.make(str(volume.path), volume.facts)
    assert projects.of(str(volume.path)) == Project(volume.id, inherits=True)
    assert quotactl.get(str(volume.path), volume.id).size == 4 * MIB


def test_volumes_in_one_project_would_be_no_volumes(disk: Disk) -> None:
    """A directory that is in a project is refused by its id and name."""
    assert disk.mechanism().problem(str(disk.path)) is None
    inner = disk.path / "inner"
    inner.mkdir()
    projects.put(str(inner), Project(900, inherits=True))
    assert "is itself in project 900: " in str(disk.mechanism().problem(str(inner)))
    with projid("# a comment\nelse:901\nscratch:900\n"):
        told = disk.mechanism().problem(str(inner))
    assert "is itself in project 900 (scratch): " in str(told)
    inner.rmdir()


@pytest.mark.parametrize(
    ("kind", "told"),
    [("xfs", "-o pquota"), ("ext4", "tune2fs -O quota,project")],
)
def test_quotas_that_are_off_are_told(kind: str, told: str) -> None:
    """The text names type, source and mountpoint, and the way to switch them on."""
    with mounted(PLAIN[kind], kind) as plain:
        (plain.path / "sub").mkdir(exist_ok=True)
        problem = plain.mechanism().problem(str(plain.path / "sub"))
        where = f"{kind} ({PLAIN[kind]} on {plain.path}) are off: "
        assert problem is not None
        assert problem.startswith(f"project quotas of {where}")
        assert told in problem
        with pytest.raises(Unsupported, match="project quotas are not on"):
            quotactl.get(str(plain.path), 5)
        with pytest.raises(Unsupported, match="project quotas are not on"):
            plain.mechanism().reserve(str(plain.path))
        # What can't be dropped does not hold up a removal.
        plain.mechanism().forget(str(plain.path), {"project": "5"})


def test_the_way_for_ext4_leads_there() -> None:
    """With the features alone quotas are counted; with the mount option they work."""
    run("tune2fs", "-O", "quota,project", PLAIN["ext4"])
    with mounted(PLAIN["ext4"], "ext4") as counted:
        problem = counted.mechanism().problem(str(counted.path))
    assert problem is not None
    assert "are not enforced: mount it with -o prjquota" in problem
    with mounted(PLAIN["ext4"], "ext4", "prjquota") as limited:
        assert limited.mechanism().problem(str(limited.path)) is None


def test_file_systems_without_project_ids_are_told() -> None:
    """A tmpfs and an overlay have none."""
    with mounted("none", "tmpfs") as tmpfs:
        problem = tmpfs.mechanism().problem(str(tmpfs.path))
    assert problem == (
        f"tmpfs (none on {tmpfs.path}) has no project quotas; XFS and ext4 have them"
    )
    assert "overlay" in str(tmpfs.mechanism().problem("/usr"))


def test_limits_too_small_to_hold_anything_are_refused(disk: Disk) -> None:
    """The minimum is named."""
    disk.mechanism().check(Limit(size=1 << 20, inodes=2))
    disk.mechanism().check(Limit())
    with pytest.raises(InvalidArgument, match=r"size=1023K is below the minimum.* 1M"):
        disk.mechanism().check(Limit(size=1023 << 10))
    with pytest.raises(InvalidArgument, match=r"inodes=1 is below the minimum.* 2"):
        disk.mechanism().check(Limit(inodes=1))
