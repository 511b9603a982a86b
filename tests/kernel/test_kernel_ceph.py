"""Ceph with the kernel's own clients, in a machine whose kernel has them.

Its cluster runs on this host, and the machine reaches it over a network. The tests are
those of ``tests/ceph``, some run there as they are, and ``guest_ceph_*.py``.
"""

import shlex
from collections.abc import Iterator, Mapping
from typing import Final

import attrs
import guest_ceph
import pytest
from support.ceph import Ceph
from support.network import Network
from support.plugin import REPOSITORY
from support.uml import Machine, run_tests

pytestmark = [pytest.mark.root, pytest.mark.timeout(900)]

TESTS: Final = REPOSITORY / "tests"
SECONDS: Final = 600  # for all the tests of one boot, where the host is busy


@attrs.frozen
class Boot:
    """Tests to run in one boot, and the environment to run them in."""

    tests: tuple[str, ...]
    environment: Mapping[str, str] = attrs.field(factory=dict)


def _of(file: str, *names: str) -> tuple[str, ...]:
    """Name tests of one file of ``tests/ceph``."""
    return tuple(f"ceph/{file}.py::{name}" for name in names)


# All takes its time there, so of the tests that run on the host as well there are those
# whose outcome the kernel's client decides.
BOOTS: Final = {
    "rbd": Boot(
        (
            "kernel/guest_ceph_mappers.py",
            "kernel/guest_ceph_volumes.py",
            *_of(
                "test_ceph_mappers",
                *("test_a_life", "test_discard[rbd-nbd]", "test_two_readers"),
            ),
        ),
        {"VOLPLUGIN_TEST_MAPPERS": "krbd,rbd-nbd"},
    ),
    "cephfs": Boot(
        _of(
            "test_cephfs_driver",
            *("test_life[volume]", "test_life[backend]", "test_life[subvolume]"),
            *("test_attach_after_failure[volume-mounted]", "test_quota[volume]"),
            *("test_detach_after_failure[volume-unmounted]", "test_restart[volume]"),
            *("test_df_shows_the_quota", "test_two_hosts", "test_take_over"),
            *("test_snapshots[volume]", "test_read_only", "test_mds_restart"),
            "test_hung_mds",
        ),
        {"VOLPLUGIN_TEST_CEPHFS_MOUNT": "kernel"},
    ),
}


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    """A network of the host and one machine."""
    made = Network()
    yield made
    made.close()


@pytest.fixture(scope="module")
def cluster(network: Network) -> Iterator[Ceph]:
    """A cluster that the machine reaches."""
    made = Ceph(address=network.host)
    try:
        made.start()
        made.least()  # the machine's files are its own: it could not add one here
        yield made
    finally:
        made.close()


@pytest.mark.parametrize("name", BOOTS)
def test_in_the_machine(network: Network, cluster: Ceph, name: str) -> None:
    """Every test has passed there."""
    boot = BOOTS[name]
    folders = (REPOSITORY, TESTS, TESTS / "kernel")
    environment = {
        "PYTHONPATH": ":".join(str(folder) for folder in folders),
        "PYTEST_ADDOPTS": shlex.join(["-p", guest_ceph.__name__]),
        guest_ceph.VARIABLE: str(cluster.folder),
        **boot.environment,
    }
    paths = [TESTS / test for test in boot.tests]
    machine = Machine(network=network)
    try:
        with guest_ceph.serving(cluster, machine.output):
            outcomes = run_tests(
                machine, paths, seconds=SECONDS, environment=environment
            )
    finally:
        machine.close()
    wrong = {name: told for name, told in outcomes.items() if told != "passed"}
    assert not wrong, "\n\n".join(f"{name}\n{told}" for name, told in wrong.items())
