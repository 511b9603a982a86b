"""The plugin on disks with project quotas, as users and operators meet it.

Runs in the machines of ``test_kernel_limits``, for the kinds of disk that
``VOLPLUGIN_TEST_DISKS`` names.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import pytest
from guest_disks import BLOCK, DISKS, OPTIONS, USER, Disk, projid
from support.client import PluginError
from support.commands import run
from support.docker import DockerError
from support.engine import running
from support.images import IMAGE
from support.plugin import REPOSITORY, Plugin, plugin_environment
from support.wait import eventually

from volplugin.admin.client import AdminClient
from volplugin.errors import NoSpace
from volplugin.host import projects, quotactl
from volplugin.host.projects import Project
from volplugin.host.quotactl import Quota
from volplugin.quota.ids import IdRange

MIB: Final = 1 << 20
KINDS: Final = os.environ.get("VOLPLUGIN_TEST_DISKS", "xfs,ext4").split(",")
FULL: Final = {"xfs": "No space left on device", "ext4": "Disk quota exceeded"}
AS_USER: Final = ("setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups")
# As root of a container is, which has not all of root's rights.
CONFINED: Final = ("setpriv", "--bounding-set=-sys_resource", "--inh-caps=-all")
ONCE: Final = "once is enough"
on_xfs = pytest.mark.skipif("xfs" not in KINDS, reason=f"{ONCE}: on XFS")
on_ext4 = pytest.mark.skipif("ext4" not in KINDS, reason=f"{ONCE}: on ext4")
MANY: Final = 200
LARGE: Final = 21_000  # more than a create counts before it answers


@pytest.fixture(scope="module", params=KINDS)
def disk(request: pytest.FixtureRequest) -> Iterator[Disk]:
    """A disk with project quotas, mounted where containers' hosts see it too."""
    path = Path(f"/{request.param}")
    path.mkdir(exist_ok=True)
    options = ("-t", request.param, "-o", OPTIONS[request.param])
    run("mount", *options, DISKS[request.param], path)
    yield Disk(request.param, path)
    run("umount", path)


@pytest.fixture(scope="module")
def server(disk: Disk) -> Iterator[Plugin]:
    """A server with all that it has on the disk."""
    folder = disk.path / "plugin"
    folder.mkdir()
    server = Plugin(folder, config="usage-interval = 1\n")
    server.start()
    yield server
    server.close()


@pytest.fixture
def plugin(server: Plugin, disk: Disk) -> Iterator[Plugin]:
    """The server without a volume, before and after; and no limit is left then."""
    yield server
    if not server.is_running():
        server.start()
    for name in server.client.list():
        server.client.unmount(name, "one")  # a test that failed may hold it
        server.client.remove(name)
    assert limited(disk) == {}


def limited(disk: Disk) -> dict[int, Quota]:
    """Return the quotas of the ids that have a limit on the disk."""
    with contextlib.closing(quotactl.each(str(disk.path), 1)) as quotas:
        return {
            quota.id: quota
            for quota in quotas
            if quota.size is not None or quota.inodes is not None
        }


def quota_of(path: str | Path) -> Quota:
    """Return the quota of the project that a directory is in."""
    return quotactl.get(str(path), projects.of(str(path)).id)


def status(plugin: Plugin, name: str) -> dict[str, Any]:
    """Return the Status of a volume."""
    found = plugin.client.get(name)["Status"]
    assert isinstance(found, dict)
    return found


def make(plugin: Plugin, name: str, **options: str) -> Path:
    """Create a volume that everyone may write to and return where it is."""
    plugin.client.create(name, {"mode": "0777", **options})
    return Path(plugin.client.path(name))


def fill(path: Path, *prefix: str) -> str:
    """Write to a file by dd(1) until that fails, 8 MiB at most; return its words."""
    command = [*prefix, "dd", "if=/dev/zero", f"of={path}", f"bs={BLOCK}"]
    done = subprocess.run(
        [*command, "count=2048"], capture_output=True, text=True, check=False
    )
    return done.stderr


def volplugin(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run volplugin's command line."""
    return subprocess.run(
        command,
        env=plugin_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


# Limits as writers meet them


@pytest.mark.parametrize("driver", ["local", "quota", "mount"])
def test_writers_stop_at_the_size(plugin: Plugin, disk: Disk, driver: str) -> None:
    """All are stopped within a block, but on ext4 who has CAP_SYS_RESOURCE.

    What a chosen directory held before counts.
    """
    if driver == "mount":
        path = disk.path / "chosen"
        path.mkdir()
        path.chmod(0o777)
        (path / "theirs").write_bytes(bytes(MIB))
        plugin.client.create("v", {"mount": str(path), "size": "4m"})
    else:
        path = make(plugin, "v", driver=driver, size="4m")
    assert plugin.client.mount("v", "one") == str(path)
    for who in (AS_USER, CONFINED):
        assert FULL[disk.kind] in fill(path / "file", *who), who
        assert 0 <= 4 * MIB - quota_of(path).used <= BLOCK
        size = (path / "file").stat().st_size
        assert size > (2 if driver == "mount" else 3) * MIB
        (path / "file").unlink()
    assert (FULL["xfs"] in fill(path / "file")) is (disk.kind == "xfs")
    assert (quota_of(path).used > 4 * MIB) is (disk.kind == "ext4")
    eventually(lambda: status(plugin, "v").get("used", 0) > 3 * MIB, "it is measured")
    found = status(plugin, "v")
    assert (found["mechanism"], found["size"]) == ("project", "4M")
    assert found["percent"] >= 98  # within a block of the limit
    assert found["available"] <= BLOCK
    plugin.client.unmount("v", "one")
    plugin.client.remove("v")
    assert path.exists() is (driver == "mount")
    if driver == "mount":
        assert (path / "theirs").stat().st_size == MIB
        run("rm", "-r", path)


def test_inodes_are_limited(plugin: Plugin, disk: Disk) -> None:
    """The root is one of them; Status tells how many there are."""
    path = make(plugin, "v", driver="quota", size="16m", inodes="10")
    names = [str(path / str(number)) for number in range(20)]
    command = [*CONFINED, "touch", *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert FULL[disk.kind] in done.stderr
    assert len(os.listdir(path)) == 9
    eventually(lambda: status(plugin, "v").get("inodes-used") == 10, "it is measured")
    assert status(plugin, "v")["inodes"] == "10"
    assert status(plugin, "v")["inodes-percent"] == 100


def test_resize_under_a_writer(plugin: Plugin, disk: Disk) -> None:
    """Who was stopped goes on in the new space; less than is held is refused."""
    path = make(plugin, "v", size="4m")
    write = "dd if=/dev/zero of=file bs=64k count=128 conv=notrunc 2>/dev/null"
    loop = f"until {write}; do sleep 0.1; done"
    with subprocess.Popen([*AS_USER, "sh", "-c", loop], cwd=path) as writer:
        try:
            eventually(lambda: quota_of(path).used > 3 * MIB, "the volume is full")
            time.sleep(0.5)
            assert writer.poll() is None
            done = volplugin(plugin.resize("v", "16m"))
            assert done.returncode == 0, done.stderr
            assert done.stdout == "v: size 4m -> 16m\n"
            assert writer.wait(30) == 0
        finally:
            writer.kill()
    held = quota_of(path)
    assert 8 * MIB <= held.used < 9 * MIB
    done = volplugin(plugin.resize("v", "6m"))
    assert done.returncode == 1
    assert f"{path} holds 8" in done.stderr
    assert "more than size=6M" in done.stderr
    assert quota_of(path) == held
    admin = AdminClient(str(plugin.admin_socket))
    admin.resize("v", size="12m", inodes=None)
    assert status(plugin, "v")["size"] == "12M"
    assert FULL[disk.kind] in fill(path / "more", *CONFINED)
    assert 0 <= 12 * MIB - quota_of(path).used <= BLOCK
    with pytest.raises(NoSpace, match="holds 3 inodes"):
        admin.resize("v", size=None, inodes="2")


def test_a_name_used_again_gets_its_own_limit(plugin: Plugin, disk: Disk) -> None:
    """A removed volume's limit is gone with it, also where its place is the same."""
    for size, driver in ((4, "local"), (2, "local"), (3, "quota")):
        path = make(plugin, "v", size=f"{size}m", driver=driver)
        assert FULL[disk.kind] in fill(path / "file", *AS_USER)
        assert 0 <= size * MIB - quota_of(path).used <= BLOCK
        plugin.client.remove("v")
        assert limited(disk) == {}
    path = make(plugin, "v")
    assert FULL[disk.kind] not in fill(path / "file", *AS_USER)


# What others do on the same disk


def test_ids_of_others_are_left_alone(plugin: Plugin, disk: Disk) -> None:
    """An id with a limit, or with files, is given to no volume and stays as it is."""
    first = projects.of(str(make(plugin, "a", size="1m"))).id
    quotactl.set_limit(str(disk.path), first + 1, size=MIB, inodes=None)
    quotactl.set_limit(str(disk.path), first + 2, size=None, inodes=7)
    theirs = disk.path / "theirs"
    theirs.mkdir()
    projects.put(str(theirs), Project(first + 3, inherits=True))
    plugin.client.remove("a")
    made = {projects.of(str(make(plugin, name, size="1m"))).id for name in "bcd"}
    assert made == {first + 4, first + 5, first + 6}
    for name in "bcd":
        plugin.client.remove(name)
    foreign = limited(disk)
    assert set(foreign) == {first + 1, first + 2}
    assert (foreign[first + 1].size, foreign[first + 2].inodes) == (MIB, 7)
    assert projects.of(str(theirs)) == Project(first + 3, inherits=True)
    for number in foreign:
        quotactl.set_limit(str(disk.path), number, size=None, inodes=None)
    theirs.rmdir()


def test_limits_and_ids_are_put_right_at_start(plugin: Plugin, disk: Disk) -> None:
    """What was lost, or set otherwise, is as it should be again, and told."""
    lost, other, untagged, right = (
        make(plugin, name, size="4m", inodes="50") for name in "abcd"
    )
    (untagged / "file").write_bytes(bytes(MIB))
    number = projects.of(str(untagged)).id
    plugin.stop()
    if disk.kind == "xfs":
        bare = "limit -p bsoft=0 bhard=0 isoft=0 ihard=0"
        run("xfs_quota", "-x", "-c", f"{bare} {projects.of(str(lost)).id}", disk.path)
    else:
        own = projects.of(str(lost)).id
        quotactl.set_limit(str(lost), own, size=None, inodes=None)
    changed = projects.of(str(other)).id
    quotactl.set_limit(str(other), changed, size=64 * MIB, inodes=50)
    run("chattr", "-R", "-p", "0", untagged)
    run("chattr", "-P", untagged)
    told = len(plugin.log)
    plugin.start()

    def wrong_ones() -> list[str]:
        lines = plugin.log[told:].splitlines()
        return [line for line in lines if "limit was wrong" in line]

    eventually(lambda: len(wrong_ones()) == 3, "the log tells of three")
    wrong = wrong_ones()
    assert all(f'"{name}"' in line for name, line in zip("abc", wrong, strict=True))
    assert "limit none instead of size=4M inodes=50" in wrong[0]
    assert "limit size=64M inodes=50 instead of" in wrong[1]
    assert f"not in project {number}" in wrong[2]
    for path in (lost, other, untagged, right):
        assert (quota_of(path).size, quota_of(path).inodes) == (4 * MIB, 50), path
    assert projects.of(str(untagged)) == Project(number, inherits=True)
    eventually(lambda: quota_of(untagged).used >= MIB, "what it holds is counted")


def test_a_directory_of_a_foreign_project_is_refused(
    plugin: Plugin, disk: Disk
) -> None:
    """The refusal says whose project it looks like, and nothing is changed."""
    chosen = disk.path / "chosen"
    chosen.mkdir()
    ours = IdRange().last
    for number, whose in (
        (4711, "names 'backups'"),
        (4712, "someone else"),
        (ours, "a volume of volplugin"),
    ):
        projects.put(str(chosen), Project(number, inherits=True))
        with projid("backups:4711\n"), pytest.raises(PluginError, match=whose) as told:
            plugin.client.create("v", {"mount": str(chosen), "size": "4m"})
        assert str(number) in str(told.value)
        assert projects.of(str(chosen)) == Project(number, inherits=True)
    assert plugin.client.list() == {}
    chosen.rmdir()


# Many volumes, and large ones


def test_many_volumes(plugin: Plugin, disk: Disk) -> None:
    """All have a limit of their own and are measured; no limit outlives them."""
    names = [f"v{number}" for number in range(MANY)]
    for number, name in enumerate(names):
        options = {
            "size": f"{1024 + number}k",
            "driver": ("local", "quota")[number % 2],
        }
        plugin.client.create(name, options)
    listed = plugin.client.list()
    assert set(listed) == set(names)
    quotas = limited(disk)
    sizes = [quotas[projects.of(listed[name]).id].size or 0 for name in names]
    for number, size in enumerate(sizes):
        assert 0 <= size - ((1024 + number) << 10) < BLOCK
    assert len(quotas) == MANY
    eventually(
        lambda: all("used" in status(plugin, name) for name in names[-2:]),
        "the last are measured",
        seconds=30,
    )
    assert all("used" in status(plugin, name) for name in names)
    for name in names:
        plugin.client.remove(name)
    assert limited(disk) == {}


@on_xfs
def test_a_large_tree_is_counted_in_the_background(plugin: Plugin, disk: Disk) -> None:
    """Status tells how far it is; killed in the middle, it comes to its end."""
    chosen = disk.path / "large"
    for folder in range(21):
        (chosen / str(folder)).mkdir(parents=True)
        for number in range(LARGE // 21):
            os.close(os.open(chosen / f"{folder}/{number}", os.O_CREAT | os.O_WRONLY))
    plugin.client.create("v", {"mount": str(chosen), "size": "64m"})
    plugin.kill()
    total = LARGE + 22
    assert quota_of(chosen).inodes_used < total
    plugin.start()
    eventually(
        lambda: "entries so far" in status(plugin, "v").get("tagging", ""),
        "counting is told of",
        seconds=30,
    )
    plugin.kill()
    plugin.start()
    eventually(
        lambda: (
            status(plugin, "v").get("inodes-used") == total
            and "tagging" not in status(plugin, "v")
        ),
        "all is counted",
        seconds=60,
    )
    assert os.listdir(plugin.root / "local/tagging") == []
    plugin.client.remove("v")
    assert projects.of(str(chosen)) == Project(0)
    run("rm", "-r", chosen)


# Around it


@on_ext4
def test_the_configuration_is_told(plugin: Plugin) -> None:
    """`volplugin config` works beside the server."""
    done = volplugin(plugin.command("config"))
    assert done.returncode == 0, done.stderr
    assert f'root = "{plugin.root}"' in done.stdout


def test_containers_are_stopped(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root of a container that dockerd runs by default meets the limit."""
    run("mount", "-t", "cgroup2", "none", "/sys/fs/cgroup")
    monkeypatch.setattr(tempfile, "tempdir", str(disk.path))
    try:
        with running() as engine:
            words = ("-d", "volplugin", "-o", "size=4m", "db")
            engine.docker("volume", "create", *words)
            write = ("dd", "if=/dev/zero", "of=/data/file", "bs=4k", "count=2048")
            with pytest.raises(DockerError, match=FULL[disk.kind]):
                engine.docker.run("-v", "db:/data", IMAGE, *write)
            path = engine.docker.inspect("volume", "db")["Mountpoint"]
            assert 0 <= 4 * MIB - quota_of(path).used <= BLOCK
    finally:
        run("umount", "/sys/fs/cgroup")


# The tests of the host that need this machine


def test_drivers_keep_the_contract(disk: Disk) -> None:
    """The conformance suite passes with limits by project quota; none is skipped."""
    folder = disk.path / "contract"
    folder.mkdir()
    run_suite(
        "tests/contract/test_drivers_conformance.py",
        environment={"VOLPLUGIN_TEST_PROJECT_DISK": str(folder)},
    )
    assert os.listdir(folder) == []


@on_ext4
def test_images_grow(disk: Disk) -> None:
    """The tests of growing pass, ext4's too: here they have CAP_SYS_RESOURCE."""
    run("modprobe", "loop")
    folder = disk.path / "images"
    folder.mkdir()
    run_suite(
        "tests/contract/test_quota_images.py",
        "tests/contract/host/test_host_filesystems.py",
        *("-k", "grow"),
        environment={"TMPDIR": str(folder)},
    )
    run("rm", "-rf", folder)


def run_suite(*words: str, environment: Mapping[str, str]) -> None:
    """Run tests in a session of their own; fail unless all of them pass."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q"]
    done = subprocess.run(
        [*command, "--tb=short", *words],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    last = done.stdout.splitlines()[-1] if done.stdout else ""
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-2000:]}"
    assert "passed" in last, last
    assert "skipped" not in last, done.stdout[-3000:]
