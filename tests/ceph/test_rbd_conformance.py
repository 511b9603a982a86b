"""The driver ``rbd`` keeps the contract: the suite of all drivers, on a cluster."""

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import attrs
import pytest
from rbd_cases import HostCase
from support.ceph import Ceph

sys.path.append(str(Path(__file__).parents[1] / "contract"))

import test_drivers_conformance as suite
from driver_cases import Case, Kind, cleaned

from volplugin import failpoints
from volplugin.drivers.driver import Driver
from volplugin.host.mountinfo import Mount

pytestmark = pytest.mark.root

# Those are for directories that users choose.
_NOT_FOR_IMAGES: Final = (
    "test_planned_directory_of_another_volume",
    "test_users_directory",
)

globals().update(
    {
        name: test
        for name, test in vars(suite).items()
        if name.startswith("test_") and name not in _NOT_FOR_IMAGES
    }
)


@attrs.frozen(kw_only=True)
class RbdKind(Kind):
    """The driver on a namespace of its own."""

    build: Callable[[Path], HostCase] | None = None

    def driver(self, place: Path) -> Driver:
        """Build the driver with its state below ``place``."""
        assert self.build is not None
        return self.build(place).driver


class RbdCase(Case):
    """A case whose mappers have mounts of their own."""

    def mounts_below(self) -> list[Mount]:
        """Return the mounts of volumes."""
        return [each for each in super().mounts_below() if each.kind != "fuse"]


_STAGES: Final = (
    *("rbd.recorded", "rbd.mkfs", "rbd.image", "rbd.filled", "rbd.ready"),
    *("rbd.mountpoint", "rbd.guard", "registry.create"),
)
_OPTIONS: Final[Mapping[str, Mapping[str, str]]] = {
    "rbd-ext4": {"size": "16M"},
    "rbd-xfs": {"size": "300M", "fs": "xfs"},
}


@pytest.fixture
def make_case(
    ceph: Ceph, namespace: str, tmp_path: Path
) -> Iterator[Callable[[str], Case]]:
    """Makes cases; all of their volumes are removed."""
    hosts: list[HostCase] = []

    def build(place: Path) -> HostCase:
        settings: dict[str, Any] = {"mapper": "auto"}
        host = HostCase.of(ceph, namespace, place, "rbd", is_open=False, **settings)
        hosts.append(host)
        return host

    def make(name: str) -> Case:
        kind = RbdKind(name=name, options=_OPTIONS[name], stages=_STAGES, build=build)
        return RbdCase.of(kind, tmp_path)

    with cleaned(tmp_path):
        yield make
        failpoints.arm("")
        try:
            hosts[0].clear()
            hosts[0].wait_until_empty()
        finally:
            for host in hosts:
                host.close()


@pytest.fixture(params=_OPTIONS)
def case(request: pytest.FixtureRequest, make_case: Callable[[str], Case]) -> Case:
    """A driver that is open and has made and removed a volume before."""
    return make_case(request.param)


@pytest.fixture(params=_STAGES)
def failing(
    request: pytest.FixtureRequest, make_case: Callable[[str], Case]
) -> tuple[Case, str]:
    """A driver with one step of its create, as the setting that makes it fail."""
    return make_case("rbd-ext4"), f"{request.param}=error:5*1"
