"""Containers on volumes: what they write stays, and mounts end with the last one."""

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support import processes
from support.docker import DockerError
from support.engine import Engine
from support.images import IMAGE, SEED_IMAGE
from support.mounts import read_mounts
from support.wait import eventually

pytestmark = [pytest.mark.root, pytest.mark.engine]

OURS = ("--volume-driver", "volplugin")
TMPFS = ("volume", "create", "-d", "volplugin", "-o", "driver=tmpfs")


def test_a_second_container_reads_what_the_first_wrote(engine: Engine) -> None:
    """A named volume outlives its container, and a restart of one."""
    docker = engine.docker
    write = "echo first >> /data/log; sync"
    docker.run("--rm", "-v", "web:/data", *OURS, IMAGE, "sh", "-c", write)
    docker.sleeper("second", "-v", "web:/data")
    assert docker("exec", "second", "cat", "/data/log") == "first"
    docker("exec", "second", "sh", "-c", "echo second >> /data/log")
    docker("restart", "-t", "0", "second")
    assert docker("exec", "second", "cat", "/data/log") == "first\nsecond"
    file = Path(engine.plugin.client.get("web")["Mountpoint"]) / "log"
    assert engine.host.path(file).read_text() == "first\nsecond\n"


def test_one_run_is_one_mount_and_one_unmount(engine: Engine) -> None:
    """A container that starts and ends is a Create, a Mount and an Unmount."""
    engine.docker.run("--rm", "-v", "once:/data", *OURS, IMAGE, "ls", "/data")
    assert engine.plugin.operations("once") == ["Create", "Mount", "Unmount"]


def test_an_anonymous_volume_goes_with_rm(engine: Engine) -> None:
    """``run --rm`` removes the unnamed volume that it made."""
    before = len(engine.plugin.calls())
    engine.docker.run("--rm", "-v", "/data", *OURS, IMAGE, "touch", "/data/x")
    assert engine.plugin.client.list() == {}
    calls = engine.plugin.calls()[before:]
    (name,) = {call.volume for call in calls if len(call.volume) == 64}
    operations = ["Create", "Mount", "Unmount", "Remove"]
    assert engine.plugin.operations(name) == operations


def test_rm_fv_takes_anonymous_volumes_and_leaves_named_ones(engine: Engine) -> None:
    """What ``compose down`` does with ``rm -fv``: names stay, 64 hex digits go."""
    docker, client = engine.docker, engine.plugin.client
    docker.sleeper("app", "-v", "/cache", "-v", "kept:/data", *OURS)
    (anonymous,) = set(client.list()) - {"kept"}
    assert len(anonymous) == 64
    docker("exec", "app", "touch", "/cache/x", "/data/x")
    docker("rm", "-fv", "app")
    assert set(client.list()) == {"kept"}
    assert engine.plugin.operations("kept")[-1] == "Unmount"


def test_a_volume_is_found_without_naming_its_driver(engine: Engine) -> None:
    """``-v name:/x`` finds a volume that only the plugin knows of."""
    engine.plugin.client.create("known")
    engine.docker.sleeper("finder", "-v", "known:/x")
    (mount,) = engine.docker.inspect("container", "finder")["Mounts"]
    assert (mount["Name"], mount["Driver"]) == ("known", "volplugin")
    assert engine.docker.volumes() == {"known"}


def test_volumes_from_mounts_for_each_container(engine: Engine) -> None:
    """A container with ``--volumes-from`` holds the volume by a mount of its own."""
    docker = engine.docker
    docker.sleeper("owner", "-v", "shared:/data", *OURS)
    docker("exec", "owner", "sh", "-c", "echo shared > /data/x")
    docker.sleeper("guest", "--volumes-from", "owner")
    assert docker("exec", "guest", "cat", "/data/x") == "shared"
    docker("rm", "-f", "owner")
    assert docker("exec", "guest", "cat", "/data/x") == "shared"
    docker("rm", "-f", "guest")
    operations = engine.plugin.operations("shared")
    assert sorted(operations) == ["Create", "Mount", "Mount", "Unmount", "Unmount"]


def test_kill_is_an_unmount(engine: Engine) -> None:
    """A killed container releases its volume as a stopped one does."""
    docker = engine.docker
    docker(*TMPFS, "killed")
    docker.sleeper("victim", "-v", "killed:/data")
    assert engine.mount_of("killed") is not None
    docker("kill", "victim")
    eventually(
        lambda: engine.plugin.operations("killed") == ["Create", "Mount", "Unmount"],
        "Unmount is called",
    )
    engine.eventually_unmounted("killed")


def test_cp_leaves_a_running_container_its_mount(engine: Engine) -> None:
    """``docker cp`` mounts and unmounts by the container's own ID, twice here."""
    docker = engine.docker
    docker(*TMPFS, "copied")
    docker.sleeper("runner", "-v", "copied:/data")
    docker("exec", "runner", "sh", "-c", "echo here > /data/x")
    for _ in range(2):
        assert b"here" in docker_cp(engine, "runner:/data/x")
    copying = ["Mount", "Unmount"]
    assert engine.plugin.operations("copied") == ["Create", "Mount", *copying, *copying]
    assert engine.mount_of("copied") is not None
    assert docker("exec", "runner", "cat", "/data/x") == "here"
    docker("stop", "-t", "0", "runner")
    engine.eventually_unmounted("copied")
    docker("start", "runner")
    assert docker("exec", "runner", "ls", "/data") == ""


def test_cp_into_a_stopped_container_reaches_the_volume(engine: Engine) -> None:
    """A cp to a container that does not run mounts the volume for its own time."""
    docker = engine.docker
    docker("create", "--name", "idle", "-v", "cold:/data", *OURS, IMAGE, "true")
    source = engine.host.folder / "source"
    source.write_text("cold\n")
    docker("cp", str(source), "idle:/data/x")
    shown = docker.run("--rm", "-v", "cold:/data", IMAGE, "cat", "/data/x")
    assert shown == "cold"


def test_a_failed_mount_starts_no_container(engine: Engine) -> None:
    """A Mount that fails is told, is followed by no Unmount, and can be retried."""
    docker, plugin = engine.docker, engine.plugin
    docker(*TMPFS, "bad")
    plugin.restart(failpoints="tmpfs.attach=error:5*1")
    with pytest.raises(DockerError, match=r"(?i)input/output error"):
        docker.sleeper("unlucky", "-v", "bad:/data")
    assert docker.inspect("container", "unlucky")["State"]["Status"] == "created"
    assert plugin.operations("bad") == ["Create", "Mount"]
    assert engine.mount_of("bad") is None
    docker("start", "unlucky")
    assert engine.mount_of("bad") is not None
    docker("rm", "-f", "unlucky")
    plugin.restart()


def test_parallel_containers_keep_a_tmpfs_until_the_last(engine: Engine) -> None:
    """Eight containers on one tmpfs, ended in any order: mounted until the last."""
    docker = engine.docker
    docker(*TMPFS, "crowd")
    names = [f"crowd{number}" for number in range(8)]

    def start(name: str) -> None:
        docker.sleeper(name, "-v", "crowd:/data")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(start, names))
    docker("exec", names[0], "sh", "-c", "echo together > /data/x")
    random.Random(8).shuffle(names)
    while names:
        assert engine.mount_of("crowd") is not None
        assert docker("exec", names[-1], "cat", "/data/x") == "together"
        docker("rm", "-f", names.pop())
    engine.eventually_unmounted("crowd")
    docker("volume", "rm", "crowd")


def test_a_service_of_the_host_keeps_no_tmpfs_mounted(engine: Engine) -> None:
    """A service with PrivateTmp=, started meanwhile, has a copy that goes with ours."""
    docker, host = engine.docker, engine.host
    docker(*TMPFS, "private")
    docker.sleeper("app", "-v", "private:/data")
    mount = engine.mount_of("private")
    assert mount is not None
    service = host.start(
        *["unshare", "--mount", "--propagation", "slave", "sleep", "600"],
        log=host.folder / "service.log",
    )
    try:
        eventually(
            lambda: (
                processes.mount_namespace(service.pid) != host.namespace
                and mount.source in {m.source for m in read_mounts(service.pid)}
            ),
            "the service has a copy of the mount",
        )
        docker("rm", "-f", "app")
        engine.eventually_unmounted("private")
        assert mount.source not in {m.source for m in read_mounts(service.pid)}
        docker("volume", "rm", "private")
    finally:
        service.kill()
        service.wait(10)


def test_a_container_that_looks_at_the_host_keeps_no_tmpfs_mounted(
    engine: Engine,
) -> None:
    """One with -v /:/host, as monitors have it, got a copy and uses no volume."""
    docker = engine.docker
    docker(*TMPFS, "watched")
    docker.sleeper("app", "-v", "watched:/data")
    mount = engine.mount_of("watched")
    assert mount is not None
    docker.sleeper("monitor", "-v", "/:/host:ro")
    seen = docker("exec", "monitor", "cat", "/proc/self/mountinfo")
    assert f"/host{mount.mountpoint} " in seen
    docker("rm", "-f", "app")
    engine.eventually_unmounted("watched")
    docker("volume", "rm", "watched")


def test_a_new_volume_is_filled_from_the_image(engine: Engine) -> None:
    """An empty volume gets what the image has there, with owner and mode."""
    show = ["sh", "-c", "cat /data/hello; stat -c '%u %a' /data/hello"]
    shown = engine.docker.run("--rm", "-v", "fill:/data", *OURS, SEED_IMAGE, *show)
    assert shown == "from the image\n1000 640"


def test_filling_a_new_volume_is_a_mount_of_its_own(engine: Engine) -> None:
    """Where the image has the folder, create mounts and unmounts before the start."""
    engine.docker.run("--rm", "-v", "prefilled:/data", *OURS, SEED_IMAGE, "ls", "/data")
    pair = ["Mount", "Unmount"]
    assert engine.plugin.operations("prefilled") == ["Create", *pair, *pair]


def test_nocopy_leaves_a_new_volume_empty(engine: Engine) -> None:
    """With ``nocopy`` the image's content does not get into the volume."""
    volume = ("-v", "bare:/data:nocopy", *OURS)
    assert engine.docker.run("--rm", *volume, SEED_IMAGE, "ls", "/data") == ""


def test_a_tmpfs_is_full_at_its_size(engine: Engine) -> None:
    """``size`` is a hard limit inside the container, and df shows it."""
    docker = engine.docker
    docker(*TMPFS, "-o", "size=10m", "small")
    docker.sleeper("filler", "-v", "small:/data")
    fill = ["dd", "if=/dev/zero", "of=/data/x", "bs=1M"]
    with pytest.raises(DockerError, match="No space left on device"):
        docker("exec", "filler", *fill, "count=11")
    assert docker("exec", "filler", "stat", "-c", "%s", "/data/x") == str(10 << 20)
    assert " 10240 " in docker("exec", "filler", "df", "-k", "/data")


def test_a_tmpfs_runs_no_programs_unless_asked_to(engine: Engine) -> None:
    """noexec is the default of a tmpfs volume, and ``exec`` lifts it."""
    docker = engine.docker
    docker(*TMPFS, "plain")
    docker(*TMPFS, "-o", "exec=true", "programs")
    copy = "cat /bin/busybox > /data/true; chmod 755 /data/true; /data/true"
    script = ["/bin/busybox", "sh", "-c", copy.replace("chmod", "/bin/busybox chmod")]
    with pytest.raises(DockerError, match="Permission denied"):
        docker.run("--rm", "-v", "plain:/data", IMAGE, *script)
    docker.run("--rm", "-v", "programs:/data", IMAGE, *script)


def test_rm_leaves_the_files_of_a_directory_that_was_given(engine: Engine) -> None:
    """A volume with ``mount=`` uses exactly that directory and never deletes it."""
    docker = engine.docker
    disk = engine.host.folder / "mysql_data"
    disk.mkdir()
    (disk / "before").write_text("before\n")
    docker("volume", "create", "-d", "volplugin", "-o", f"mount={disk}", "mysql")
    assert docker.inspect("volume", "mysql")["Mountpoint"] == str(disk)
    script = ["sh", "-c", "cat /var/lib/before; echo after > /var/lib/after"]
    shown = docker.run("--rm", "-v", "mysql:/var/lib", IMAGE, *script)
    assert shown == "before"
    docker("volume", "rm", "mysql")
    assert (disk / "after").read_text() == "after\n"
    assert sorted(path.name for path in disk.iterdir()) == ["after", "before"]


def test_a_volume_can_be_read_only(engine: Engine) -> None:
    """``:ro`` is docker's: one container reads what another one writes."""
    docker = engine.docker
    docker.sleeper("writer", "-v", "both:/data", *OURS)
    docker("exec", "writer", "sh", "-c", "echo 1 > /data/x")
    docker.sleeper("reader", "-v", "both:/data:ro")
    assert docker("exec", "reader", "cat", "/data/x") == "1"
    with pytest.raises(DockerError, match="Read-only file system"):
        docker("exec", "reader", "touch", "/data/y")


def test_what_the_readme_shows_works(engine: Engine) -> None:
    """The first commands of README.rst, as a user types them."""
    docker = engine.docker
    directory = "mount=/mnt/mysql_data"
    docker("volume", "create", "-d", "volplugin", "web")
    docker("volume", "create", "-d", "volplugin", "-o", directory, "mysql_data")
    docker(*TMPFS, "-o", "size=100m", "scratch")
    write = ["sh", "-c", "date >> /data/log"]
    for _ in range(2):
        docker.run("--rm", "-v", "web:/data", IMAGE, *write)
    shown = docker.run("--rm", "-v", "web:/data", IMAGE, "wc", "-l", "/data/log")
    assert shown.split()[0] == "2"
    assert docker.volumes() == {"web", "mysql_data", "scratch"}
    assert docker.inspect("volume", "mysql_data")["Mountpoint"] == "/mnt/mysql_data"
    docker("volume", "rm", "web")
    assert docker.volumes() == {"mysql_data", "scratch"}


def docker_cp(engine: Engine, source: str) -> bytes:
    """Return the file that ``docker cp`` gets."""
    target = engine.host.folder / "copied"
    engine.docker("cp", source, str(target))
    content = target.read_bytes()
    target.unlink()
    return content
