"""The command ``migrate`` and a real server: what is shown, done, and refused."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from peers import scratch, serving
from support.commands import Container
from support.disks import disk
from support.plugin import Plugin, plugin_environment

from volplugin.admin.client import AdminClient
from volplugin.admin.messages import MigrateRequest
from volplugin.cli import cli
from volplugin.errors import InvalidArgument, VolpluginError

pytestmark = pytest.mark.root


class Site:
    """A server, and what Docker and a user have on the host's disk and on another."""

    def __init__(self, folder: Path, other: Path) -> None:
        self.folder, self.other = folder, other
        self.docker = folder / "docker"
        (self.docker / "volumes").mkdir(parents=True)
        self.plugin = Plugin(folder)

    def local(self, name: str, *, docker: Path | None = None) -> Path:
        """Make a volume as Docker's local driver does; return its files."""
        path = (docker or self.docker) / "volumes" / name / "_data"
        path.mkdir(parents=True)
        (path / "file").write_text(f"of {name}")
        return path

    def migrate(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run the command; tell where Docker's root is unless the words do."""
        if not {"--docker-root", "--directory"} & set(words):
            words = (*words, "--docker-root", str(self.docker))
        return subprocess.run(
            self.plugin.operate("migrate", *words),
            env=plugin_environment(),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def place(self, name: str) -> Path:
        """Return where a local volume of the server is."""
        return self.plugin.root / "local" / "volumes" / name

    def path(self, name: str) -> Path:
        """Return where the server says that a volume is."""
        return Path(self.plugin.client.list()[name])


@pytest.fixture(scope="module")
def other() -> Iterator[Path]:
    """Another file system."""
    with scratch() as folder, disk(folder, "ext4", 64 << 20) as mountpoint:
        yield mountpoint


@pytest.fixture(scope="module")
def shared_site(other: Path) -> Iterator[Site]:
    """A site for all tests."""
    with scratch() as folder, serving(folder) as plugin:
        site = Site.__new__(Site)
        site.folder, site.other, site.plugin = folder, other, plugin
        yield site


@pytest.fixture
def site(shared_site: Site, tmp_path: Path) -> Iterator[Site]:
    """The site, with a root of Docker's for one test, and no volume of ours after."""
    shared_site.docker = tmp_path.resolve() / "docker"
    (shared_site.docker / "volumes").mkdir(parents=True)
    yield shared_site
    for name in shared_site.plugin.client.list():
        shared_site.plugin.client.remove(name)


def test_all_of_docker(site: Site) -> None:
    """A dry run shows what a real one does then, and Docker's next step is told."""
    origins = {name: site.local(name) for name in ("db", "web")}
    words = ("--from", "local", "--all")
    shown = site.migrate(*words, "--dry-run")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.splitlines() == [
        f"{name}: move {origins[name]} to {site.place(name)}" for name in origins
    ]
    assert site.plugin.client.list() == {}
    assert all(path.exists() for path in origins.values())
    done = site.migrate(*words)
    assert done.returncode == 0
    assert done.stdout == shown.stdout.replace(": move ", ": moved ")
    assert "next: docker volume rm db web\n" in done.stderr
    for name, path in origins.items():
        assert not path.exists()
        assert path.parent.exists()
        assert (site.path(name) / "file").read_text() == f"of {name}"


def test_again(site: Site) -> None:
    """What was migrated is told of, and is success."""
    path = site.local("web")
    first = site.migrate("--from", "local", "web")
    again = site.migrate("--from", "local", "web")
    assert again.returncode == 0
    assert again.stdout == first.stdout.replace("\n", " before\n")
    path.mkdir()
    other = site.migrate("--from", "local", "web")
    assert other.returncode == 1
    assert "there is another directory in that place" in other.stderr
    assert site.migrate("--from", "local", "web", "--as", "web2").returncode == 0
    assert set(site.plugin.client.list()) == {"web", "web2"}


def test_from_another_disk(site: Site) -> None:
    """It is copied, and stays where it was unless it is to go."""
    root = site.other / "docker"
    path = site.local("big", docker=root)
    words = ("--from", "local", "--docker-root", str(root), "big")
    shown = site.migrate(*words, "--dry-run")
    reason = "it is on another file system, mount or subvolume"
    assert shown.stdout == (
        f"big: copy {path} to {site.place('big')} ({reason}); {path} stays\n"
    )
    done = site.migrate(*words)
    assert done.stdout == shown.stdout.replace("copy", "copied")
    assert (path / "file").exists()
    gone = site.migrate(*words, "--remove-source")
    assert gone.returncode == 0, gone.stderr
    assert gone.stdout.endswith(f"before ({reason}); {path} is deleted\n")
    assert list(path.parent.iterdir()) == []
    assert (site.path("big") / "file").read_text() == "of big"


def test_a_changed_source_is_kept(site: Site) -> None:
    """What was written to since it was copied is not deleted."""
    root = site.other / "changed"
    path = site.local("big", docker=root)
    words = ("--from", "local", "--docker-root", str(root), "big")
    assert site.migrate(*words).returncode == 0
    (path / "later").touch()
    kept = site.migrate(*words, "--remove-source")
    assert kept.returncode == 1
    assert f"{path} is kept" in kept.stderr
    assert (path / "later").exists()


def test_local_persist(site: Site, tmp_path: Path) -> None:
    """Its volumes are used where they are, and stay when they are removed."""
    place = tmp_path.resolve() / "place"
    place.mkdir()
    (place / "file").write_text("theirs")
    (site.docker / "plugin-data").mkdir()
    state = {"state": {"lp": str(place), "gone": str(place / "gone")}}
    (site.docker / "plugin-data" / "local-persist.json").write_text(json.dumps(state))
    words = ("--from", "local-persist", "--all")
    shown = site.migrate(*words, "--dry-run")
    assert shown.returncode == 1
    assert shown.stdout == f"lp: use {place}\n"
    assert "migrate gone: " in shown.stderr
    assert "is its disk mounted?" in shown.stderr
    done = site.migrate(*words)
    assert (done.returncode, done.stdout) == (1, f"lp: uses {place}\n")
    assert site.migrate("--from", "local-persist", "lp").stdout == (
        f"lp: uses {place}, as before\n"
    )
    assert site.path("lp") == place
    site.plugin.client.remove("lp")
    assert (place / "file").read_text() == "theirs"
    assert not (place / "gone").exists()


def test_a_tree(site: Site, tmp_path: Path) -> None:
    """Each subdirectory is a volume; one without a volume's name gets one."""
    tree = tmp_path.resolve() / "tree"
    for name in ("a", "b c"):
        (tree / name).mkdir(parents=True)
    words = ("--from", "directory", "--directory", str(tree))
    done = site.migrate(*words, "--all")
    assert done.returncode == 1
    assert done.stdout == f"a: moved {tree}/a to {site.place('a')}\n"
    assert "migrate b c: volume name 'b c': a name begins" in done.stderr
    assert "docker volume rm" not in done.stderr
    named = site.migrate(*words, "b c", "--as", "bc")
    assert (named.returncode, named.stderr) == (0, "")
    assert set(site.plugin.client.list()) == {"a", "bc"}
    assert "before" in site.migrate(*words, "a").stdout
    nothing = site.migrate(*words, "--all")
    assert (nothing.returncode, nothing.stderr) == (0, "there is nothing to migrate\n")


def test_used_by_a_container(site: Site, container: Container) -> None:
    """The process is named, nothing changes, and the others are migrated."""
    used, free = site.local("used"), site.local("web")
    child = container(used)
    done = site.migrate("--from", "local", "--all")
    assert done.returncode == 1
    assert f"pid {child.pid} (sleep)" in done.stderr
    assert used.exists()
    assert not free.exists()
    assert "docker volume rm web\n" in done.stderr
    assert set(site.plugin.client.list()) == {"web"}


def test_a_stopped_container(site: Site) -> None:
    """Docker's record of a container is enough to refuse."""
    path = site.local("web")
    folder = site.docker / "containers" / ("c" * 64)
    folder.mkdir(parents=True)
    mount = {"Type": "volume", "Name": "web", "Driver": "local"}
    config = {"Name": "/shop", "MountPoints": {"/data": mount}}
    (folder / "config.v2.json").write_text(json.dumps(config))
    for more in ([], ["--dry-run"]):
        done = site.migrate("--from", "local", "web", *more)
        assert done.returncode == 1
        assert "`docker rm -f shop` (without -v)" in done.stderr
    assert path.exists()


def test_a_mount_of_docker(site: Site) -> None:
    """A volume that is a mount is refused, and what to do instead is said."""
    path = site.local("nfs")
    options = {"MountType": "nfs", "MountOpts": "addr=x", "MountDevice": ":/srv"}
    (path.parent / "opts.json").write_text(json.dumps(options))
    done = site.migrate("--from", "local", "nfs")
    assert done.returncode == 1
    assert (
        "it is a mount of ':/srv', type 'nfs': its files are elsewhere" in done.stderr
    )
    assert path.exists()


def test_a_name_that_is_taken(site: Site) -> None:
    """A volume of ours that is another one stays as it is."""
    path = site.local("web")
    site.plugin.client.create("web", {})
    for more in ([], ["--dry-run"]):
        done = site.migrate("--from", "local", "web", *more)
        assert done.returncode == 1
        assert "'web' that was not made of" in done.stderr
    assert (path / "file").exists()
    assert list(site.path("web").iterdir()) == []


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--driver", "tmpfs"], "driver tmpfs takes in no directories"),
        (["--driver", "none"], "there is no such driver or backend"),
        (["-o", "size=1m"], "can't be limited in place"),
        (["-o", "sise=1m"], "unknown option 'sise'; did you mean 'size'"),
        (["-o", "uid=5"], "leave uid out"),
        (["-o", "mount=/mnt/x"], "mount=/mnt/x: it is not"),
        (["--as", "../x"], "name"),
    ],
)
def test_refused_words(site: Site, words: list[str], reason: str) -> None:
    """What the server refuses changes nothing, in a dry run too."""
    path = site.local("web")
    for more in ([], ["--dry-run"]):
        done = site.migrate("--from", "local", "web", *words, *more)
        assert done.returncode == 1
        assert "volplugin: migrate web: " in done.stderr
        assert reason in done.stderr
    assert (path / "file").exists()
    assert site.plugin.client.list() == {}


def test_our_own_directories(site: Site) -> None:
    """Neither volplugin's root nor a volume's directory can become another volume."""
    site.plugin.client.create("ours", {})
    client = AdminClient(str(site.plugin.admin_socket))
    for origin in (site.place("ours"), site.plugin.root, site.folder):
        request = MigrateRequest(
            name="new",
            driver="",
            options={},
            origin=str(origin),
            dry=False,
            remove_origin=False,
        )
        with pytest.raises(VolpluginError, match="is volplugin's own"):
            client.migrate(request)
    assert set(site.plugin.client.list()) == {"ours"}


def test_flags_of_the_message(site: Site) -> None:
    """A flag that is a text is refused, not read as true."""
    with pytest.raises(InvalidArgument, match="dry must be true or false"):
        MigrateRequest(
            name="n",
            driver="",
            options={},
            origin="/x",
            dry="no",  # type: ignore[arg-type]
            remove_origin=False,
        )


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "Missing option '--from'"),
        (["--from", "rclone", "--all"], "'rclone' is not one of"),
        (["--from", "local"], "give VOLUME..., or --all"),
        (["--from", "local", "a", "--all"], "give VOLUME..., or --all"),
        (["--from", "local", "a", "b", "--as", "c"], "--as is for one VOLUME"),
        (["--from", "directory", "--all"], "--directory goes with"),
        (["--from", "local", "--all", "--directory", "/x"], "--directory goes with"),
        (["--from", "local", "a", "-o", "size"], "give KEY=VALUE"),
    ],
)
def test_wrong_words(words: list[str], reason: str) -> None:
    """They are told with status 2, before any server is asked."""
    done = CliRunner().invoke(cli, ["migrate", *words])
    assert done.exit_code == 2
    assert reason in done.output


def test_what_is_not_there(site: Site, tmp_path: Path) -> None:
    """A name or a place that is not there is told with what is near."""
    site.local("web")
    done = site.migrate("--from", "local", "wed")
    assert done.returncode == 1
    assert "there is no volume 'wed'; did you mean 'web'?" in done.stderr
    done = site.migrate("--from", "local", "--all", "--docker-root", f"{tmp_path}/none")
    assert "there is no such directory" in done.stderr
    assert done.returncode == 1


def test_help_names_the_other_way() -> None:
    """Who looks for rclone is sent to ``volume adopt``; the order is told."""
    told = " ".join(CliRunner().invoke(cli, ["migrate", "--help"]).output.split())
    assert "see `volplugin volume adopt`" in told
    assert (
        "`docker volume rm NAME` makes Docker forget the old volume, never before"
        in (told)
    )
