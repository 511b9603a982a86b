"""Where our directories are on the host; tests/managed has a plugin that differs."""

from pathlib import Path

import pytest
from support.commands import run

from volplugin.host import surroundings

pytestmark = pytest.mark.root


def test_a_host_is_no_container(scratch: Path) -> None:
    """Without a root directory of its own nothing goes with this process."""
    assert not surroundings.is_contained()
    surroundings.require_kept(str(scratch), "/volumes")
    surroundings.require_kept("/no/such/directory", "/volumes")


def test_the_path_on_a_host_is_the_same(scratch: Path) -> None:
    """Of what is not mounted twice there is one path, be it there or not."""
    for path in ("/", "/usr", str(scratch), f"{scratch}/to/be/made"):
        assert surroundings.path_on_host(path) == path


def test_a_directory_that_is_bound_elsewhere(scratch: Path) -> None:
    """The path is that of the file system, not of our view of a part of it."""
    (scratch / "volumes" / "db").mkdir(parents=True)
    (scratch / "bound").mkdir()
    run("mount", "--bind", scratch / "volumes", scratch / "bound")
    assert surroundings.path_on_host(f"{scratch}/bound/db") == f"{scratch}/volumes/db"
