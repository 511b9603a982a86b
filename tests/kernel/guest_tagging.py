"""Trees that are given a project id, or have it taken off, on real XFS and ext4."""

import os
import socket
import stat
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from guest_disks import Disk, Limited, make, mounted, projid, quota_disk
from support.commands import run

from volplugin.errors import AlreadyExists, NoSpace, Unsupported
from volplugin.host import projects, quotactl
from volplugin.host.projects import Project
from volplugin.quota import project as module
from volplugin.quota.ids import IdRange
from volplugin.quota.jobs import Jobs
from volplugin.quota.mechanism import Limit
from volplugin.quota.tagging import Job, Tagger
from volplugin.quota.walk import Count, walk

MIB = 1 << 20


@pytest.fixture(scope="module", params=["xfs", "ext4"])
def disk(request: pytest.FixtureRequest) -> Iterator[Disk]:
    with quota_disk(request.param) as found:
        yield found


@pytest.fixture
def tree(disk: Disk) -> Iterator[Path]:
    """A directory that is to be adopted; the disk has no job before and after."""
    path = disk.path / "tree"
    path.mkdir()
    yield path
    subprocess.run(["chattr", "-R", "-i", path], check=False, capture_output=True)
    run("rm", "-rf", path, disk.path / "place")


def never() -> bool:
    return False


def adopted(disk: Disk, tree: Path, limit: Limit | None = None) -> Limited:
    limit = limit or Limit(size=64 * MIB)
    mechanism = disk.mechanism()
    facts = mechanism.reserve(str(tree.parent))
    mechanism.require_adoptable(str(tree), facts, limit)
    mechanism.adopt(str(tree), facts, limit)
    return Limited(mechanism, tree, facts)


def ids_below(tree: Path) -> dict[str, Project]:
    """Return the projects of all directories and regular files below ``tree``."""
    found = {}
    for folder, _, files in os.walk(tree):
        found[os.path.relpath(folder, tree)] = projects.of(folder)
        for name in files:
            path = os.path.join(folder, name)
            if stat.S_ISREG(os.lstat(path).st_mode):
                found[os.path.relpath(path, tree)] = projects.of(path)
    return found


def fill(tree: Path, folders: int = 3, files: int = 3) -> None:
    for number in range(folders):
        (tree / f"d{number}" / "sub").mkdir(parents=True)
        for other in range(files):
            (tree / f"d{number}" / f"f{other}").write_text("x")
            (tree / f"d{number}" / "sub" / f"f{other}").write_text("x")


def markers(disk: Disk) -> list[str]:
    return sorted(path.name for path in (disk.path / "place/tagging").glob("*"))


def test_all_of_a_tree_is_counted(disk: Disk, tree: Path) -> None:
    """Directories inherit, files are tagged, what is made afterwards counts too."""
    fill(tree)
    volume = adopted(disk, tree)
    found = ids_below(tree)
    assert len(found) == 25
    for name, project in found.items():
        is_directory = (tree / name).is_dir()
        assert project == Project(volume.id, inherits=is_directory), name
    assert quotactl.get(str(tree), volume.id).inodes_used == 25
    (tree / "d0" / "sub" / "new").write_text("x")
    assert projects.of(str(tree / "d0/sub/new")).id == volume.id
    assert markers(disk) == []


def test_each_inode_counts_once(disk: Disk, tree: Path) -> None:
    """A file of many names is changed once; what can't be opened is left out."""
    (tree / "a").write_text("x")
    for number in range(4):
        os.link(tree / "a", tree / f"link{number}")
    os.mkfifo(tree / "pipe")
    (tree / "symlink").symlink_to("/etc")
    os.mknod(tree / "device", 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tree / "socket"))
    tagger = Tagger(Job(str(tree), frozenset({0}), 4000))
    assert walk(str(tree), tagger, never)
    assert (tagger.seen, tagger.changed, tagger.special) == (10, 2, 4)
    assert quotactl.get(str(tree), 4000).inodes_used == 2
    count = Count()
    assert walk(str(tree), count, never)
    assert (count.seen, count.inodes) == (10, 2)
    assert count.size == quotactl.get(str(tree), 4000).used


def test_mounts_below_are_left_out(disk: Disk, tree: Path) -> None:
    """A tmpfs, a directory and a file bound from the same disk keep their projects."""
    outside = disk.path / "outside"
    outside.mkdir()
    (outside / "file").touch()
    for name in ("tmpfs", "bound"):
        (tree / name).mkdir()
    (tree / "file").touch()
    run("mount", "-t", "tmpfs", "none", tree / "tmpfs")
    run("mount", "--bind", outside, tree / "bound")
    run("mount", "--bind", outside / "file", tree / "file")
    try:
        volume = adopted(disk, tree)
        assert projects.of(str(tree)).id == volume.id
        assert projects.of(str(outside)) == Project(0)
        assert projects.of(str(outside / "file")) == Project(0)
    finally:
        run("umount", tree / "tmpfs", tree / "bound", tree / "file")
    assert projects.of(str(tree / "file")) == Project(0)
    run("rm", "-r", outside)


def test_ids_of_others_are_kept(disk: Disk, tree: Path) -> None:
    """What is in a project of someone else inside the tree stays in it."""
    fill(tree)
    projects.put(str(tree / "d1"), Project(4711, inherits=True))
    projects.put(str(tree / "d2/f1"), Project(4712))
    volume = adopted(disk, tree)
    found = ids_below(tree)
    assert found["d1"] == Project(4711, inherits=True)
    assert found["d2/f1"] == Project(4712)
    assert {project.id for project in found.values()} == {4711, 4712, volume.id}
    volume.mechanism.release(str(tree), volume.facts)
    assert volume.mechanism.work(never)
    found = ids_below(tree)
    assert {project.id for project in found.values()} == {4711, 4712, 0}


def test_what_can_not_be_changed_does_not_hold_up(disk: Disk, tree: Path) -> None:
    """An immutable file is passed over; all others are tagged."""
    fill(tree)
    run("chattr", "+i", tree / "d1/f1")
    volume = adopted(disk, tree)
    found = ids_below(tree)
    del found["d1/f1"]
    assert {project.id for project in found.values()} == {volume.id}
    assert markers(disk) == []


def test_other_flags_stay(disk: Disk, tree: Path) -> None:
    """The project is all that changes of a file's attributes."""
    (tree / "file").touch()
    run("chattr", "+dA", tree / "file")
    before = run("lsattr", tree / "file").split()[0]
    volume = adopted(disk, tree)
    assert projects.of(str(tree / "file")).id == volume.id
    assert run("lsattr", tree / "file").split()[0] == before
    assert "d" in before


def test_tagging_goes_on_after_a_restart(
    disk: Disk, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What adopt leaves is noted on disk, and done by another process's work."""
    fill(tree, folders=20)
    monkeypatch.setattr(module, "_AT_ONCE", 30)
    mechanism = disk.mechanism()
    facts = mechanism.reserve(str(disk.path))
    number = int(facts["project"])
    assert not mechanism.adopt(str(tree), facts, Limit(size=64 * MIB))
    assert quotactl.get(str(tree), number).size == 64 * MIB
    found = [project.id for project in ids_below(tree).values()]
    assert found[0] == number
    assert set(found) == {0, number}
    again = disk.mechanism()
    assert len(markers(disk)) == 1
    calls = iter([False] * 40)
    assert not again.work(lambda: next(calls, True))
    assert len(markers(disk)) == 1
    assert again.work(never)
    assert markers(disk) == []
    assert {project.id for project in ids_below(tree).values()} == {number}


def test_releasing_takes_all_ids_off(disk: Disk, tree: Path) -> None:
    """Limit and top at once, the rest by work; then the id is nobody's."""
    fill(tree)
    volume = adopted(disk, tree)
    volume.mechanism.release(str(tree), volume.facts)
    assert projects.of(str(tree)) == Project(0)
    assert projects.of(str(tree / "d0")).id == volume.id
    assert quotactl.get(str(tree), volume.id).size is None
    assert len(markers(disk)) == 1
    volume.mechanism.release(str(tree), volume.facts)
    assert disk.mechanism().work(never)
    assert set(ids_below(tree).values()) == {Project(0)}
    assert quotactl.get(str(tree), volume.id).is_empty
    assert markers(disk) == []


def test_a_tree_is_adopted_again_before_it_is_untagged(disk: Disk, tree: Path) -> None:
    """The ids of an earlier volume are taken off first, also for a part of its tree."""
    fill(tree)
    first = adopted(disk, tree)
    first.mechanism.release(str(tree), first.facts)
    part = adopted(disk, tree / "d0")
    assert part.id != first.id
    assert {project.id for project in ids_below(tree / "d0").values()} == {part.id}
    assert projects.of(str(tree / "d1")) == Project(0)
    part.mechanism.release(str(tree / "d0"), part.facts)
    second = adopted(disk, tree)
    assert {project.id for project in ids_below(tree).values()} == {second.id}


def test_directories_of_others_are_not_adopted(disk: Disk, tree: Path) -> None:
    """The refusal says whose the project looks like."""
    mechanism, facts = disk.mechanism(), {"project": "5000"}
    for number, told in (
        (77, "set by someone else: xfs_quota, docker or podman"),
        (78, "which /etc/projid names 'theirs'"),
        (IdRange().first + 9, "which looks like a volume of volplugin"),
    ):
        projects.put(str(tree), Project(number, inherits=True))
        with (
            projid("theirs:78\n"),
            pytest.raises(AlreadyExists, match=f"in project {number} already, {told}"),
        ):
            mechanism.require_adoptable(str(tree), facts, Limit(size=MIB))
        with pytest.raises(AlreadyExists):
            mechanism.adopt(str(tree), facts, Limit(size=MIB))
        assert projects.of(str(tree)).id == number
        projects.put(str(tree), Project(0))


def test_a_tree_above_the_limit_is_not_adopted(
    disk: Disk, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes and inodes are counted before, as far as a bounded look can tell."""
    (tree / "file").write_bytes(bytes(2 * MIB))
    mechanism = disk.mechanism()
    facts = mechanism.reserve(str(disk.path))
    path = str(tree)
    with pytest.raises(NoSpace, match=r"holds 2\w+, more than size=1M"):
        mechanism.require_adoptable(path, facts, Limit(size=MIB))
    with pytest.raises(NoSpace, match=r"holds 2 inodes, more than inodes=1;"):
        mechanism.require_adoptable(path, facts, Limit(inodes=1))
    monkeypatch.setattr(module, "_LOOKED_AT", 1)
    mechanism.require_adoptable(path, facts, Limit(size=MIB))
    with pytest.raises(NoSpace, match=r"more than size=1M"):
        mechanism.adopt(path, facts, Limit(size=MIB))
    mechanism.release(path, facts)
    assert mechanism.work(never)
    assert set(ids_below(tree).values()) == {Project(0)}


def test_deep_trees_are_tagged_to_the_end(disk: Disk, tree: Path) -> None:
    """A tree deeper than a path is long is walked down and up again."""
    here = os.open(tree, os.O_RDONLY)
    for _ in range(2500):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    (tree / "z").mkdir()
    os.mkdir("foreign", dir_fd=here)
    foreign = os.open("foreign", os.O_RDONLY, dir_fd=here)
    projects.put_open(foreign, Project(4711))
    os.close(foreign)
    volume = adopted(disk, tree)
    assert projects.of_open(here) == Project(volume.id, inherits=True)
    os.close(here)
    assert projects.of(str(tree / "z")).id == volume.id
    assert quotactl.get(str(tree), volume.id).inodes_used == 2502


def test_a_tree_that_changes_meanwhile_is_tagged(disk: Disk, tree: Path) -> None:
    """What others make, move and remove during the walk is no error."""
    fill(tree, folders=10, files=20)
    end = threading.Event()

    def change() -> None:
        number = 0
        while not end.is_set():
            number += 1
            (tree / f"made{number}" / "x").mkdir(parents=True)
            (tree / f"made{number}" / "x" / "f").touch()
            os.rename(tree / f"made{number}", tree / f"moved{number}")
            if number > 5:
                run("rm", "-rf", tree / f"moved{number - 5}")

    changing = threading.Thread(target=change)
    changing.start()
    try:
        volume = adopted(disk, tree)
        for _ in range(3):
            tagger = Tagger(Job(str(tree), frozenset({0}), volume.id))
            assert walk(str(tree), tagger, never)
    finally:
        end.set()
        changing.join()
    found = ids_below(tree)
    assert {found[name].id for name in ("d0/f0", "d9/sub/f19")} == {volume.id}


def test_a_lost_id_is_put_on_the_whole_tree(disk: Disk, tree: Path) -> None:
    """A volume whose tree was untagged by someone is tagged again by work."""
    volume = make(disk.mechanism(), tree / "volume")
    volume.limit(64 * MIB)
    fill(volume.path)
    for name in ids_below(volume.path):
        projects.put(str(volume.path / name), Project(0))
    told = volume.mechanism.verify(str(volume.path), volume.facts, Limit(size=64 * MIB))
    assert told == f"not in project {volume.id}"
    assert disk.mechanism().work(never)
    found = ids_below(volume.path)
    assert {project.id for project in found.values()} == {volume.id}
    volume.remove()


def test_a_job_waits_for_its_disk(disk: Disk, tree: Path) -> None:
    """It is kept while its disk is away, and goes when its tree was deleted."""
    other = "ext4" if disk.kind == "xfs" else "xfs"
    jobs = Jobs(str(disk.path / "place"))
    with quota_disk(other) as away:
        gone = away.path / "gone"
        gone.mkdir()
        projects.put(str(gone), Project(5001, inherits=True))
        jobs.note(Job(str(gone), frozenset({5001}), 0))
    assert not jobs.run_all(never)
    assert not jobs.run_all(never)
    assert len(markers(disk)) == 1
    run("rm", "-rf", disk.path / "place")
    jobs.note(Job(str(tree / "gone"), frozenset({5001}), 0))
    assert jobs.run_all(never)
    assert markers(disk) == []
    # A directory that is not the one that was tagged: its disk may be mounted later.
    jobs.note(Job(str(tree), frozenset({0}), 5001))
    assert not jobs.run_all(never)
    assert projects.of(str(tree)) == Project(0)


def test_a_release_stops_tagging_that_runs(disk: Disk, tree: Path) -> None:
    """The job at work for a tree gives way to the one that takes its ids off."""
    fill(tree, folders=5)
    volume = adopted(disk, tree)
    job = Job(str(tree), frozenset({0}), volume.id)
    jobs = volume.mechanism._jobs
    jobs.note(job)
    begun, wait = threading.Event(), threading.Event()

    def stop(tagger: Tagger) -> bool:
        begun.set()
        wait.wait(0.05)
        return False

    working = threading.Thread(target=lambda: jobs.run(job.name, stop, wait=False))
    working.start()
    assert begun.wait(10)
    assert jobs.progress(str(tree)) is not None
    usage = volume.mechanism.usage(str(tree), volume.facts)
    assert "entries so far" in usage.notes["tagging"]
    assert not jobs.run(job.name, lambda _: False, wait=False)
    volume.mechanism.release(str(tree), volume.facts)
    working.join()
    assert volume.mechanism.work(never)
    assert set(ids_below(tree).values()) == {Project(0)}


def test_a_marker_without_its_job_goes(disk: Disk, tree: Path) -> None:
    """What a crash left before the job was written down had not begun."""
    (disk.path / "place/tagging/4711-x").mkdir(parents=True)
    assert disk.mechanism().work(never)
    assert markers(disk) == []


def test_a_place_without_attributes_keeps_no_jobs(disk: Disk, tree: Path) -> None:
    """What could not be noted is not begun."""
    with mounted("none", "ramfs") as place:
        jobs = Jobs(str(place.path))
        with pytest.raises(Unsupported, match="without trusted xattrs"):
            jobs.note(Job(str(tree), frozenset({0}), 5001))
        assert jobs.run_all(never)
