"""``volplugin migrate`` beside a real dockerd: from its own volumes to ours."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.docker import DockerError
from support.engine import Engine, running
from support.images import IMAGE
from support.local_persist import LocalPersist
from support.plugin import plugin_environment

pytestmark = [pytest.mark.root, pytest.mark.engine]

CONFIG = '[backend.other]\ndriver = "local"\nroot = "/mnt/other"\n'


@pytest.fixture(scope="module")
def shared() -> Iterator[Engine]:
    """A dockerd, and the plugin with a backend on another file system."""
    with running(config=CONFIG) as engine:
        yield engine


@pytest.fixture
def engine(shared: Engine) -> Iterator[Engine]:
    """With no container and no volume before and after."""
    yield shared
    shared.clear()


def root_of(engine: Engine) -> str:
    """Return Docker's data-root."""
    return engine.docker("info", "-f", "{{.DockerRootDir}}")


def migrate(engine: Engine, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the command on the engine's host."""
    words = ("migrate", "--docker-root", root_of(engine), *words)
    return subprocess.run(
        engine.host.command(*engine.plugin.operate(*words)),
        capture_output=True,
        text=True,
        check=False,
        env=plugin_environment(),
        timeout=60,
    )


def write(engine: Engine, volume: str) -> None:
    """Have a container write into a volume."""
    words = ["--rm", "-v", f"{volume}:/d", IMAGE, "sh", "-c", "echo kept > /d/file"]
    engine.docker.run(*words)


def read(engine: Engine, volume: str) -> str:
    """Have a container read it again."""
    return engine.docker.run("--rm", "-v", f"{volume}:/d", IMAGE, "cat", "/d/file")


def test_from_docker(engine: Engine) -> None:
    """Move, have Docker forget, and go on by the same name with the same files."""
    engine.docker("volume", "create", "web")
    write(engine, "web")
    done = migrate(engine, "--from", "local", "web")
    assert done.returncode == 0, done.stderr
    assert "next: docker volume rm web\n" in done.stderr
    # In between no container gets an empty volume of that name.
    with pytest.raises(DockerError, match="no such file or directory"):
        read(engine, "web")
    assert engine.docker.volumes(driver="local") == {"web"}
    engine.docker("volume", "rm", "web")
    assert engine.docker.volumes() == {"web"}
    assert engine.docker.volumes(driver="local") == set()
    assert read(engine, "web") == "kept"
    assert engine.docker.inspect("volume", "web")["Driver"] == "volplugin"
    engine.docker.restart()
    assert read(engine, "web") == "kept"


def test_copied_from_docker(engine: Engine) -> None:
    """Of a copy, Docker's removal of its volume takes the original, not ours."""
    engine.docker("volume", "create", "web")
    write(engine, "web")
    path = engine.docker.inspect("volume", "web")["Mountpoint"]
    done = migrate(engine, "--from", "local", "--driver", "other", "web")
    assert done.returncode == 0, done.stderr
    assert (engine.host.path(path) / "file").read_text() == "kept\n"
    engine.docker("volume", "rm", "web")
    assert not engine.host.path(path).exists()
    assert read(engine, "web") == "kept"
    assert engine.docker.inspect("volume", "web")["Mountpoint"].startswith("/mnt/other")


@pytest.mark.parametrize("state", ["running", "stopped"])
def test_a_container_has_it(engine: Engine, state: str) -> None:
    """It is refused with the container's name; what it says to do leads on."""
    engine.docker("volume", "create", "web")
    write(engine, "web")
    engine.docker.sleeper("shop", "-v", "web:/d")
    if state == "stopped":
        engine.docker("kill", "shop")
    done = migrate(engine, "--from", "local", "--all")
    assert done.returncode == 1
    assert "`docker rm -f shop` (without -v)" in done.stderr
    assert read(engine, "web") == "kept"
    engine.docker("rm", "-f", "shop")
    assert migrate(engine, "--from", "local", "web").returncode == 0
    engine.docker("volume", "rm", "web")
    engine.docker.sleeper("shop", "-v", "web:/d")
    assert engine.docker("exec", "shop", "cat", "/d/file") == "kept"


def test_under_a_running_container(engine: Engine) -> None:
    """What a container has by its path is seen where Docker's records say nothing."""
    engine.docker("volume", "create", "web")
    write(engine, "web")
    path = engine.docker.inspect("volume", "web")["Mountpoint"]
    engine.docker.sleeper("shop", "-v", f"{path}:/d")
    done = migrate(engine, "--from", "local", "web")
    assert done.returncode == 1
    assert "is in use by a container: pid" in done.stderr
    engine.docker("rm", "-f", "shop")
    assert read(engine, "web") == "kept"


def test_mounts_of_docker(engine: Engine) -> None:
    """A volume with driver_opts is refused; the bind's way is the one that is told."""
    place = engine.host.folder / "place"
    place.mkdir()
    options = ["-o", "type=none", "-o", "o=bind", "-o", f"device={place}"]
    engine.docker("volume", "create", *options, "bound")
    write(engine, "bound")
    done = migrate(engine, "--from", "local", "--all")
    assert done.returncode == 1
    assert f"create one with -d volplugin -o mount={place}" in done.stderr
    engine.docker("volume", "rm", "bound")
    create = ["volume", "create", "-d", "volplugin", "-o", f"mount={place}", "bound"]
    engine.docker(*create)
    assert read(engine, "bound") == "kept"


def test_anonymous_volumes(engine: Engine) -> None:
    """Those without a name have 64 digits for one, and are volumes like others."""
    name = engine.docker("volume", "create")
    write(engine, name)
    assert migrate(engine, "--from", "local", "--all").returncode == 0
    engine.docker("volume", "rm", name)
    assert read(engine, name) == "kept"


def test_from_local_persist(engine: Engine) -> None:
    """Its volumes go over without a move; its own removal keeps the files."""
    place = engine.host.folder / "persistent"
    state = Path(root_of(engine)) / "plugin-data" / "local-persist.json"
    plugin = LocalPersist(
        engine.host.path("/run/docker/plugins/local-persist.sock"),
        engine.host.path(state),
    )
    try:
        place.mkdir()
        words = ["-d", "local-persist", "-o", f"mountpoint={place}", "lp"]
        engine.docker("volume", "create", *words)
        engine.docker.sleeper("shop", "-v", "lp:/d")
        done = migrate(engine, "--from", "local-persist", "lp")
        assert "`docker rm -f shop` (without -v)" in done.stderr
        engine.docker("exec", "shop", "sh", "-c", "echo kept > /d/file")
        engine.docker("rm", "-f", "shop")
        done = migrate(engine, "--from", "local-persist", "--all")
        assert (done.returncode, done.stdout) == (0, f"lp: uses {place}\n")
        engine.docker("volume", "rm", "lp")
    finally:
        plugin.close()
    assert (place / "file").read_text() == "kept\n"
    assert read(engine, "lp") == "kept"
    assert engine.docker.inspect("volume", "lp")["Driver"] == "volplugin"
