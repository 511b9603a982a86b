"""What others have on disk is read as they write it; what can't be taken says why."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from volplugin import origins
from volplugin.errors import InvalidArgument

# As dockerd 20.10 writes them.
_NO_QUOTA = {"MountOpts": "", "Quota": {"Size": 0}}
BIND = {**_NO_QUOTA, "MountType": "none", "MountOpts": "bind", "MountDevice": "/srv/x"}
NFS = {**_NO_QUOTA, "MountType": "nfs", "MountDevice": ":/export"}
SIZED = {"MountType": "", "MountOpts": "", "MountDevice": "", "Quota": {"Size": 4096}}


@pytest.fixture
def docker(tmp_path: Path) -> Path:
    """Docker's data-root, with nothing in it."""
    root = tmp_path.resolve() / "docker"
    (root / "volumes").mkdir(parents=True)
    (root / "volumes" / "metadata.db").touch()
    return root


def volume(docker: Path, name: str, options: dict[str, Any] | None = None) -> Path:
    """Make a volume as Docker's local driver does."""
    path = docker / "volumes" / name / "_data"
    path.mkdir(parents=True)
    if options is not None:
        (path.parent / "opts.json").write_text(json.dumps(options))
    return path


def container(docker: Path, name: str, volume: str, driver: str = "local") -> None:
    """Make a container's record as dockerd does."""
    folder = docker / "containers" / (name[0] * 64)
    folder.mkdir(parents=True)
    mount = {"Type": "volume", "Name": volume, "Driver": driver, "Destination": "/d"}
    bind = {"Type": "bind", "Name": "", "Driver": "", "Destination": "/b"}
    config = {"Name": f"/{name}", "MountPoints": {"/d": mount, "/b": bind}}
    (folder / "config.v2.json").write_text(json.dumps(config))


def test_local_volumes(docker: Path) -> None:
    """Each directory of Docker's is one, by name; its other files are none."""
    paths = {name: str(volume(docker, name)) for name in ("b", "a")}
    found = origins.of_docker(str(docker))
    assert [(o.name, o.path, o.options, o.refusal) for o in found] == [
        (name, paths[name], {}, None) for name in ("a", "b")
    ]


def test_a_root_behind_a_link(docker: Path) -> None:
    """The root is often a link to a larger disk: paths are without it."""
    path = volume(docker, "a")
    link = docker.parent / "link"
    link.symlink_to(docker)
    assert [o.path for o in origins.of_docker(str(link))] == [str(path)]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (BIND, "mount of '/srv/x'.*keeps them.*-o mount=/srv/x"),
        (NFS, "mount of ':/export', type 'nfs'.*files are elsewhere"),
    ],
)
def test_mounts(docker: Path, options: dict[str, Any], reason: str) -> None:
    """A volume that Docker mounts has no files to take; the way is told."""
    volume(docker, "a", options)
    (found,) = origins.of_docker(str(docker))
    assert re.search(reason, found.refusal or "")


def test_sized(docker: Path) -> None:
    """A size that Docker held is asked for again."""
    volume(docker, "a", SIZED)
    (found,) = origins.of_docker(str(docker))
    assert (found.options, found.refusal) == ({"size": "4096"}, None)


def test_containers(docker: Path) -> None:
    """A volume that a container has, be it stopped, is refused with its name."""
    for name in ("a", "b"):
        volume(docker, name)
    container(docker, "one", "a")
    container(docker, "two", "a")
    container(docker, "xyz", "b", driver="volplugin")
    (docker / "containers" / "half-made").mkdir()
    used, free = origins.of_docker(str(docker))
    assert used.refusal is not None
    assert "docker rm -f one two` (without -v)" in used.refusal
    assert free.refusal is None


def test_local_persist(docker: Path, tmp_path: Path) -> None:
    """Its volumes are those of its state file, each with the directory as mount=."""
    (docker / "plugin-data").mkdir()
    place = tmp_path.resolve() / "place"
    state = {"state": {"b": str(place), "a": str(place / "a")}}
    (docker / origins.STATE).write_text(json.dumps(state))
    container(docker, "one", "a", driver="local-persist")
    a, b = origins.of_local_persist(str(docker))
    assert (b.name, b.path, b.options, b.refusal) == (
        *("b", str(place), {"mount": str(place)}, None),
    )
    assert a.refusal is not None
    assert "docker rm -f one" in a.refusal


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "there is no .*local-persist.json"),
        ("{", "not JSON"),
        ("[]", "no object"),
        ("{}", "no table 'state'"),
        ('{"state": {"a": 1}}', "no table 'state'"),
    ],
)
def test_bad_state(docker: Path, text: str | None, reason: str) -> None:
    """A state file that is none is an error with its path."""
    (docker / "plugin-data").mkdir()
    if text is not None:
        (docker / origins.STATE).write_text(text)
    with pytest.raises(InvalidArgument, match=reason):
        origins.of_local_persist(str(docker))


def test_folders(tmp_path: Path) -> None:
    """Subdirectories by name; files and what is hidden are none."""
    folder = tmp_path.resolve()
    for name in ("b", "a", ".hidden", "no name"):
        (folder / name).mkdir()
    (folder / "file").touch()
    (folder / "link").symlink_to("a")
    going = f".half.volplugin-{'0' * 32}"
    (folder / going).mkdir()
    found = {o.name: o for o in origins.of_folder(str(folder))}
    assert list(found) == ["a", "b", "half", "no name"]
    assert found["a"] == origins.Origin(name="a", path=str(folder / "a"))


@pytest.mark.parametrize(
    ("look", "option"),
    [(origins.of_docker, "--docker-root"), (origins.of_folder, "--directory")],
)
def test_no_such_directory(look: Any, option: str, tmp_path: Path) -> None:
    """A place that is not there is told of with the option that names it."""
    with pytest.raises(InvalidArgument, match=f"{option}.*there is no such directory"):
        look(str(tmp_path / "none"))
