"""`docker plugin install` on a real dockerd, from a real registry."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

import pytest
from support.client import PluginError
from support.docker import DockerError
from support.images import IMAGE
from support.managed import NAME, SECOND, SECOND_VERSION, Managed
from support.plugin import plugin_environment
from support.wait import eventually

pytestmark = [pytest.mark.root, pytest.mark.engine]

CREATE: Final = ("volume", "create", "-d", NAME)
KINDS: Final = {
    "disk": (),
    "memory": ("-o", "driver=tmpfs"),
    "image": ("-o", "driver=quota", "-o", "size=10m"),
}
FILES: Final = [f"/{name}/file" for name in KINDS]
CONTENT: Final = "\n".join(KINDS)
LASTING: Final = [f"/{name}/file" for name in KINDS if name != "memory"]
FLAGS: Final = [word for name in KINDS for word in ("-v", f"{name}:/{name}")]


def start(managed: Managed) -> None:
    """Run ``app`` with a volume of each driver, and a file in each."""
    for name, options in KINDS.items():
        managed.docker(*CREATE, *options, name)
    managed.docker.sleeper("app", *FLAGS)
    write = "; ".join(f"echo {name} > /{name}/file" for name in KINDS)
    managed.docker("exec", "app", "sh", "-c", write)


def other(managed: Managed, *command: str) -> str:
    """Run a second container on the same volumes."""
    return managed.docker.run("--rm", *FLAGS, IMAGE, *command)


def assert_intact(managed: Managed) -> None:
    """The container that runs, and a new one, have the same files."""
    assert managed.docker("exec", "app", "cat", *FILES) == CONTENT
    assert other(managed, "cat", *FILES) == CONTENT
    managed.docker("exec", "app", "sh", "-c", "echo shared > /memory/new")
    assert other(managed, "cat", "/memory/new") == "shared"


def test_containers_use_a_volume_of_each_driver(managed: Managed) -> None:
    """A hard limit is one; each volume is where docker says, and goes from there."""
    start(managed)
    assert_intact(managed)
    fill = "dd if=/dev/zero of=/image/big bs=1M count=20"
    with pytest.raises(DockerError, match="No space left"):
        managed.docker("exec", "app", "sh", "-c", fill)
    for name in KINDS:
        shown = managed.volume(name)
        assert shown["Status"]["mounts"] == 1
        assert "dockerd, pid " in shown["Status"]["holders"][0]
        assert (
            managed.host.path(shown["Mountpoint"]) / "file"
        ).read_text() == f"{name}\n"
    assert (managed.data / "local/volumes/disk/file").read_text() == "disk\n"
    assert not any(managed.host.path("/mnt/tmpfs/memory").glob("*"))


def test_no_process_is_left_to_wait_for(managed: Managed) -> None:
    """Programs that volplugin ran have ended and been waited for."""
    start(managed)
    programs = [Path(f"/proc/{pid}/comm").read_text() for pid in managed.pids()]
    assert sorted(programs) == ["tini\n", "volplugin\n"]


def test_operators_commands_reach_the_plugin_from_the_host(managed: Managed) -> None:
    """``volplugin volume`` finds the socket in the root, where nothing else is."""
    managed.docker(*CREATE, "-o", "driver=quota", "-o", "size=10m", "db")
    words = ["volume", "resize", "db", "9m"]
    done = subprocess.run(
        managed.host.command(sys.executable, "-m", "volplugin", *words),
        env={**plugin_environment(), "VOLPLUGIN_ROOT": str(managed.data)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "db: size 10m -> 9m\n"), done.stderr


def test_directories_of_users(managed: Managed) -> None:
    """Below /mnt they are the host's; elsewhere they would be the plugin's own."""
    docker = managed.docker
    for path in ("/srv/db", "/opt/db", "/volumes/db", "/volumes-2"):
        with pytest.raises(DockerError) as caught:
            docker(*CREATE, "-o", f"mount={path}", "db")
        assert f"mount={path} is inside the plugin" in caught.value.stderr
        assert caught.value.stderr.endswith("at or below /mnt and /var/lib/volplugin")
    assert docker.volumes(driver=f"{NAME}:latest") == set()
    docker(*CREATE, "-o", "mount=/mnt/db", "db")
    docker.run("--rm", "-v", "db:/db", IMAGE, "sh", "-c", "echo kept > /db/file")
    docker("volume", "rm", "db")
    assert managed.host.path("/mnt/db/file").read_text() == "kept\n"


def test_what_it_serves_at_once_is_not_lost_in_the_log(managed: Managed) -> None:
    """A line over 64 KiB would block a managed plugin for ever."""
    for _ in range(3):
        with pytest.raises(PluginError):
            managed.client.create("x" * 100_000)
    assert managed.answers()
    longest = max(len(line) for line in managed.docker.log.read_bytes().splitlines())
    assert longest < 1 << 14


@pytest.mark.parametrize("program", ["volplugin", "tini"])
def test_sigkill_under_a_running_container(managed: Managed, program: str) -> None:
    """Files and mounts stay, dockerd starts the plugin again, and it goes on."""
    start(managed)
    before = {mount.device for mount in managed.mounts()}
    managed.kill(program)
    assert_intact(managed)
    assert {mount.device for mount in managed.mounts()} == before
    managed.docker("rm", "-f", "app")
    eventually(lambda: not managed.mounts(), "all is unmounted")


def test_disable(managed: Managed) -> None:
    """It is refused while in use; by force it takes all mounts, and enable restores."""
    start(managed)
    docker = managed.docker
    with pytest.raises(DockerError, match="is in use"):
        docker("plugin", "disable", NAME)
    assert_intact(managed)
    docker("plugin", "disable", "-f", NAME)
    assert managed.pids() == []
    eventually(lambda: not managed.mounts(), "dockerd takes all of them down")
    assert docker("exec", "app", "cat", *FILES) == CONTENT
    docker("plugin", "enable", NAME)
    eventually(lambda: len({m.mountpoint for m in managed.mounts()}) == 3, "restored")
    assert_intact(managed)
    for name in KINDS:
        with pytest.raises(PluginError, match="in use by"):
            managed.client.remove(name)
    docker("rm", "-f", "app")
    eventually(lambda: not managed.mounts(), "all is unmounted")


def test_it_ends_at_once(managed: Managed) -> None:
    """SIGTERM gets through: dockerd need not wait 10 s to kill; so does an enable."""
    docker = managed.docker
    for word, limit in (("disable", 5), ("enable", 5)):
        begun = time.monotonic()
        docker("plugin", word, NAME)
        assert time.monotonic() - begun < limit
    assert "stopped answered=true" in managed.docker.log.read_text()


def test_settings(managed: Managed) -> None:
    """``plugin set`` works while it is disabled, for variables that there are."""
    docker = managed.docker
    with pytest.raises(DockerError, match="disable plugin before setting"):
        docker("plugin", "set", NAME, "VOLPLUGIN_LOG_FORMAT=json")
    docker("plugin", "disable", NAME)
    with pytest.raises(DockerError, match="not found in the plugin configuration"):
        docker("plugin", "set", NAME, "VOLPLUGIN_LOG_FORMATT=json")
    settings = managed.data / "volplugin.toml"
    settings.write_text('[backend.small]\ndriver = "tmpfs"\n')
    docker(
        *("plugin", "set", NAME, "VOLPLUGIN_LOG_FORMAT=json"),
        "VOLPLUGIN_CONFIG=/var/lib/volplugin/volplugin.toml",
    )
    docker("plugin", "enable", NAME)
    docker(*CREATE, "-o", "driver=small", "-o", "size=1m", "one")
    assert managed.volume("one")["Status"]["backend"] == "small"
    assert r'msg="{\"time\"' in docker.log.read_text()
    docker("volume", "rm", "one")
    docker("plugin", "disable", NAME)
    managed.reset()
    settings.unlink()


def test_a_place_inside_the_plugin_is_refused(managed: Managed) -> None:
    """Data that an upgrade would delete is not taken: the plugin does not start."""
    docker = managed.docker
    settings = managed.data / "volplugin.toml"
    settings.write_text('[backend.lost]\ndriver = "local"\nroot = "/srv/volumes"\n')
    docker("plugin", "disable", NAME)
    docker("plugin", "set", NAME, "VOLPLUGIN_CONFIG=/var/lib/volplugin/volplugin.toml")
    with pytest.raises(DockerError):
        docker("plugin", "enable", "--timeout", "1", NAME)
    assert "/srv/volumes is inside the plugin, and would be" in docker.log.read_text()
    managed.reset()
    settings.unlink()


def test_upgrade_under_a_running_container(managed: Managed) -> None:
    """Another version has the same volumes, the same files, and the same settings."""
    docker = managed.docker
    managed.offer_second()
    start(managed)
    with pytest.raises(DockerError, match="must be disabled before upgrading"):
        docker("plugin", "upgrade", "--grant-all-permissions", NAME, SECOND)
    docker("plugin", "disable", "-f", NAME)
    words = ("--grant-all-permissions", "--skip-remote-check")
    docker("plugin", "upgrade", *words, NAME, SECOND)
    # The upgrade has put the source of the data back, though inspect shows the old one.
    empty = managed.host.folder / "empty"
    empty.mkdir()
    docker("plugin", "set", NAME, f"data.source={empty}")
    with pytest.raises(DockerError):
        docker("plugin", "enable", NAME)
    told = f"the plugin's data was in {managed.data} of the host, and is in {empty} now"
    assert told in docker.log.read_text()
    docker("plugin", "set", NAME, f"data.source={managed.data}")
    managed.enable_after_failure()
    assert f"serving version={SECOND_VERSION} " in docker.log.read_text()
    assert_intact(managed)
    docker("rm", "-f", "app")
    assert other(managed, "cat", *LASTING) == "disk\nimage"


def test_uninstall_and_install_again(managed: Managed) -> None:
    """`docker plugin rm` loses nothing: each volume is found again, with its files."""
    docker = managed.docker
    start(managed)
    docker("rm", "-f", "app")
    eventually(lambda: not managed.mounts(), "all is unmounted")
    with pytest.raises(DockerError, match="is in use"):  # by volumes that dockerd made
        docker("plugin", "disable", NAME)
    docker("plugin", "rm", "-f", NAME)
    assert managed.pids() == []
    managed.install()
    assert docker.volumes(driver=f"{NAME}:latest") == set(KINDS)
    assert other(managed, "cat", *LASTING) == "disk\nimage"
    assert (
        json.dumps(managed.inspect()["Settings"]["Mounts"]).count(str(managed.data))
        == 1
    )


def test_a_restarted_dockerd(managed: Managed) -> None:
    """Without live-restore containers end with dockerd, and their volumes stay."""
    start(managed)
    managed.docker.restart()
    managed.wait_until_ready()
    eventually(lambda: not managed.mounts(), "all is unmounted")
    assert other(managed, "cat", *LASTING) == "disk\nimage"
    managed.docker("start", "app")
    assert managed.docker("exec", "app", "cat", *LASTING) == "disk\nimage"


def test_a_killed_dockerd(managed: Managed) -> None:
    """After SIGKILL nothing is lost, nothing stays mounted, and all can be removed."""
    start(managed)
    managed.docker.kill()
    managed.docker.start()
    managed.wait_until_ready()
    assert other(managed, "cat", *LASTING) == "disk\nimage"
    managed.docker("start", "app")
    assert managed.docker("exec", "app", "cat", *LASTING) == "disk\nimage"
    managed.docker("rm", "-f", "app")
    eventually(lambda: not managed.mounts(), "all is unmounted")
