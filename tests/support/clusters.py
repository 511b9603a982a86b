"""Clusters for the tests of Ceph: one for all of them, or one of a test's own."""

import json
from collections.abc import Callable, Iterator

import attrs
import pytest

from support.ceph import POOL, Ceph
from volplugin.ceph.cluster import Access, Cluster

# What RBD and the registry keep in a namespace that holds nothing.
_EMPTY = {
    "rbd_directory",
    "rbd_children",
    "rbd_info",
    "rbd_trash",
    "rbd_group_directory",
    "volplugin.index",
}


@pytest.fixture(scope="session")
def ceph(temporary_folder: None) -> Iterator[Ceph]:
    """A cluster for all tests; they leave it as they found it."""
    cluster = Ceph()
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()


@pytest.fixture
def own_ceph() -> Iterator[Ceph]:
    """A cluster for one test that stops or ends its daemons."""
    cluster = Ceph()
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()


@pytest.fixture
def namespace(ceph: Ceph) -> Iterator[str]:
    """A namespace in the pool ``volumes``, in which nothing may be left."""
    name = ceph.namespace()
    yield name
    place = f"{POOL}/{name}"
    images = json.loads(ceph.rbd("ls", place, "--format", "json"))
    trash = json.loads(ceph.rbd("trash", "ls", "--all", place, "--format", "json"))
    objects = set(ceph.rados("-p", POOL, "-N", name, "ls").split())
    index = "volplugin.index"
    keys, watchers = "", ""
    if index in objects:
        keys = ceph.rados("-p", POOL, "-N", name, "listomapkeys", index)
        watchers = ceph.rados("-p", POOL, "-N", name, "listwatchers", index)
    left = {
        "images": images,
        "trash": trash,
        "objects": sorted(objects - _EMPTY),
        "keys of the index": keys.split(),
        "watchers of the index": watchers.split(),
    }
    found = {kind: what for kind, what in left.items() if what}
    assert not found, f"left in {place}: {found}"
    # The image's own objects go with their images; what is left is empty.
    for each in objects:
        ceph.rados("-p", POOL, "-N", name, "rm", each)
    ceph.rbd("namespace", "rm", place)


@pytest.fixture
def access(ceph: Ceph) -> Access:
    """The way to the cluster of a user with the least rights."""
    return ceph.access()


@pytest.fixture
def connect(access: Access) -> Iterator[Callable[..., Cluster]]:
    """Make a client of its own at each call, `access` changed by the arguments."""
    made: list[Cluster] = []

    def connect(**changes: object) -> Cluster:
        changed = attrs.evolve(access, **changes)  # type: ignore[arg-type]
        made.append(Cluster(changed))
        return made[-1]

    yield connect
    for each in made:
        each.close()
