"""The driver ``plugin`` keeps the contract, on rclone and on another volplugin."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import attrs
import pytest
import test_drivers_conformance as suite
from driver_cases import Case, Kind, cleaned, record_of
from support.plugin import Plugin
from support.rclone import Rclone

from volplugin import failpoints
from volplugin.drivers.driver import Driver, Spec
from volplugin.drivers.plugin import Plugin as PluginDriver
from volplugin.drivers.plugin_mounting import mount_id
from volplugin.drivers.plugin_options import PluginConfig
from volplugin.model import Volume
from volplugin.plugins.client import Refused
from volplugin.store import records

pytestmark = pytest.mark.root

# Those are for directories that users choose.
_NOT_FOR_PLUGINS: Final = (
    "test_planned_directory_of_another_volume",
    "test_users_directory",
)

globals().update(
    {
        name: test
        for name, test in vars(suite).items()
        if name.startswith("test_") and name not in _NOT_FOR_PLUGINS
    }
)

_STAGES: Final = (
    *("plugin.mountpoint", "plugin.guard", "plugin.intent", "plugin.created"),
)
_OTHERS: Final = ("rclone", "volplugin-local", "volplugin-tmpfs")


@attrs.frozen(kw_only=True)
class PluginKind(Kind):
    """The driver on another plugin, whose socket is in ``sockets``."""

    sockets: Path = Path("/nowhere")

    def driver(self, place: Path) -> Driver:
        """Build the driver with its state in ``place``."""
        config = PluginConfig(sockets=(str(self.sockets),), specs=())
        return PluginDriver(config, str(place))


class PluginCase(Case):
    """A case whose roots are others': the record is in a note."""

    def record(self, spec: Spec) -> bytes | None:
        """Return the record that is noted of the volume."""
        return record_of(self.folder / "place" / "adopted" / spec.volume.name)


@contextlib.contextmanager
def another(name: str, folder: Path) -> Iterator[PluginKind]:
    """Another plugin, as a kind of driver."""
    sockets = folder / "s"
    sockets.mkdir()
    if name == "rclone":
        rclone = Rclone(folder, sockets, host=None)
        try:
            rclone.start()
            yield PluginKind(
                name=name, options=rclone.options, stages=_STAGES, sockets=sockets
            )
            assert rclone.client.list() == {}
            assert rclone.mounts() == []
        finally:
            rclone.close()
        return
    config = f'[backend.tmpfs]\nroot = "{folder}/tmpfs"\n'
    plugin = Plugin(folder, socket=sockets / "other.sock", config=config)
    driver = name.partition("-")[2]
    own = {"plugin": "other", "pass.driver": driver}
    options = {**own, "size": "1m"} if driver == "tmpfs" else own
    try:
        plugin.start()
        yield PluginKind(name=name, options=options, stages=_STAGES, sockets=sockets)
        assert plugin.client.list() == {}
    finally:
        plugin.close()


@pytest.fixture(scope="module")
def kinds(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[str], PluginKind]]:
    """The other plugins, each started when it is first asked for."""
    made: dict[str, PluginKind] = {}
    with contextlib.ExitStack() as stack:

        def kind(name: str) -> PluginKind:
            if name not in made:
                folder = tmp_path_factory.mktemp("p")
                made[name] = stack.enter_context(another(name, folder))
            return made[name]

        yield kind


@pytest.fixture
def make_case(
    kinds: Callable[[str], PluginKind], tmp_path: Path
) -> Iterator[Callable[[str], Case]]:
    """Makes cases; all of their volumes are removed."""
    cases: list[Case] = []

    def make(name: str) -> Case:
        case = PluginCase.of(kinds(name), tmp_path)
        cases.append(case)
        return case

    with cleaned(tmp_path):
        yield make
        failpoints.arm("")
        for case in cases:
            _clear(case)


def _clear(case: Case) -> None:
    """Remove what a test has left at the other plugin."""
    driver = case.driver
    assert isinstance(driver, PluginDriver)
    client = driver._client_of(case.kind.options["plugin"])
    for found in driver.discover():
        volume = records.decode(found.record, Volume)
        with contextlib.suppress(Refused):
            client.unmount(volume.name, mount_id(volume))
    for held in client.volumes():
        client.remove(held.name)


@pytest.fixture(params=_OTHERS)
def case(request: pytest.FixtureRequest, make_case: Callable[[str], Case]) -> Case:
    """A driver that is open and has made and removed a volume before."""
    return make_case(request.param)


@pytest.fixture(params=_STAGES)
def failing(
    request: pytest.FixtureRequest, make_case: Callable[[str], Case]
) -> tuple[Case, str]:
    """A driver with one step of its create, as the setting that makes it fail."""
    return make_case("rclone"), f"{request.param}=error:5*1"
