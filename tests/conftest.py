"""Fixtures for all tests; what they are made of is in ``support``."""

import os
import tempfile
import uuid
from collections.abc import Generator, Iterator

import pytest

pytest.register_assert_rewrite("support")

from support import leaks, processes  # noqa: E402  rewriting comes first
from support.engine import Engine, running  # noqa: E402
from support.host import Host  # noqa: E402
from support.podman import PodmanEngine, running_podman  # noqa: E402

# Real mounts, disks and containers, without a server; and a managed plugin.
pytest_plugins = ["support.kernel", "support.clusters", "support.managed"]

os.environ[processes.SESSION] = uuid.uuid4().hex


@pytest.fixture(scope="session", autouse=True)
def temporary_folder() -> Iterator[None]:
    """Keep this session's temporary folders in one of its own, empty at the end.

    So they can't be taken for those of another session on the same machine.
    """
    usual = tempfile.gettempdir()
    # tmp_path stays where it is: pytest keeps the last three sessions' there.
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", usual)
    tempfile.tempdir = tempfile.mkdtemp(prefix="vp")
    yield
    left = os.listdir(tempfile.tempdir)
    assert not left, f"left in {tempfile.tempdir}: {left}"
    os.rmdir(tempfile.tempdir)
    tempfile.tempdir = usual


@pytest.fixture(scope="module", autouse=True)
def nothing_left(
    temporary_folder: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Fail a module that leaves a mount, a loop device or a process."""
    places = (f"{tempfile.gettempdir()}/", f"{tmp_path_factory.getbasetemp()}/")
    before = leaks.traces(places)
    yield
    leaks.assert_nothing_new(before, places)


@pytest.fixture
def host() -> Iterator[Host]:
    """A mount namespace with nothing in it."""
    host = Host()
    yield host
    host.close()


@pytest.fixture(scope="module")
def shared_engine() -> Iterator[Engine]:
    """A dockerd with the plugin, for the tests of a module that end neither."""
    with running() as engine:
        yield engine


@pytest.fixture
def engine(shared_engine: Engine) -> Iterator[Engine]:
    """The module's engine, with no container and no volume before and after."""
    yield shared_engine
    shared_engine.clear()


@pytest.fixture
def own_engine() -> Iterator[Engine]:
    """A dockerd with the plugin, for one test that may end either."""
    with running() as engine:
        yield engine


@pytest.fixture(scope="module")
def shared_podman_engine() -> Iterator[PodmanEngine]:
    """A podman with the plugin, for the tests of a module."""
    with running_podman() as engine:
        yield engine


@pytest.fixture
def podman_engine(shared_podman_engine: PodmanEngine) -> Iterator[PodmanEngine]:
    """The module's podman, with no container and no volume before and after."""
    yield shared_podman_engine
    shared_podman_engine.clear()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[
    None, pytest.TestReport, pytest.TestReport
]:
    """Show the end of each live host's logs with a test that failed."""
    report = yield
    if report.failed:
        for host in Host.alive:
            for log in host.logs:
                text = log.read_text(errors="replace")[-6000:]
                report.sections.append((f"end of {log.name}", text))
    return report
