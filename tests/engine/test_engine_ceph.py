"""Containers on volumes of a cluster, under one real dockerd and under two."""

from collections.abc import Iterator
from typing import Final

import pytest
from ceph_site import CephHost, Site, running
from support.ceph import POOL, Ceph
from support.docker import DockerError
from support.images import IMAGE, SEED_IMAGE
from support.wait import eventually

pytestmark = [pytest.mark.root, pytest.mark.engine]

RBD: Final = ("driver=ceph", "size=48M")


@pytest.fixture(scope="module")
def shared_site(ceph: Ceph) -> Iterator[Site]:
    """Two docker hosts for the tests of this module."""
    with running(ceph) as site:
        yield site


@pytest.fixture
def site(shared_site: Site) -> Iterator[Site]:
    """Both hosts; no container, no volume and no trace of one before and after."""
    yield shared_site
    shared_site.clear()


@pytest.fixture
def a(site: Site) -> CephHost:
    """The first host."""
    return site.a


def shell(host: CephHost, volume: str, script: str) -> str:
    """Run a script in a container that has ``volume`` on /d; return what it prints."""
    return host.docker.run("--rm", "-v", f"{volume}:/d", IMAGE, "sh", "-c", script)


def size_shown(host: CephHost, volume: str) -> int:
    """Return how many MiB ``df`` in a container shows the volume to have."""
    # Without -P it breaks the line behind a long name.
    return int(shell(host, volume, "df -P -m /d").splitlines()[-1].split()[1])


@pytest.mark.parametrize("options", [RBD, ("driver=cephfs", "size=48M")])
def test_the_life_of_a_volume(a: CephHost, options: tuple[str, ...]) -> None:
    """Created, written, shared by two containers, copied from and to, and removed."""
    a.create("pg", *options)
    shell(a, "pg", "echo first > /d/x")
    for name in ("one", "two"):
        a.docker.sleeper(name, "-v", "pg:/d")
    a.docker("exec", "one", "sh", "-c", "echo second >> /d/x")
    assert a.docker("exec", "two", "cat", "/d/x") == "first\nsecond"
    copy = a.engine.host.folder / "copy"
    a.docker("cp", "one:/d/x", str(copy))
    assert copy.read_text() == "first\nsecond\n"
    a.docker("cp", str(copy), "two:/d/y")
    assert a.docker("exec", "one", "cat", "/d/y") == "first\nsecond"
    for refused in (("volume", "rm", "pg"), ("volume", "rm", "-f", "pg")):
        assert "in use" in a.refusal(*refused)
    a.docker("rm", "-f", "one")
    assert a.docker("exec", "two", "cat", "/d/y") == "first\nsecond"
    a.docker("rm", "-f", "two")
    a.eventually_free()
    assert shell(a, "pg", "cat /d/x") == "first\nsecond"
    a.docker("volume", "rm", "pg")
    assert a.plugin.client.list() == {}


def test_inspect(site: Site) -> None:
    """``docker volume inspect`` shows size, image, who has it, and the cluster."""
    a = site.a
    a.create("pg", *RBD)
    a.create("files", "driver=cephfs", "size=48M")
    a.docker.sleeper("one", "-v", "pg:/pg", "-v", "files:/files")
    shown = a.docker.inspect("volume", "pg")
    assert shown["Scope"] == "local"
    assert shown["Mountpoint"] == a.plugin.client.get("pg")["Mountpoint"]
    status = a.status("pg")
    assert (status["driver"], status["size"], status["fs"]) == ("rbd", "48M", "ext4")
    assert status["cluster"] == "ok"
    assert str(status["holder"]).startswith("hosta (127.0.0.1:0/")
    assert str(status["image"]).startswith(f"{POOL}/pg.")
    files = a.status("files")
    assert (files["driver"], files["size"]) == ("cephfs", "48M")
    site.both_know("files")
    eventually(lambda: "hosta" in str(site.b.status("pg")["holder"]), "b is told")
    eventually(
        lambda: "hosta" in str(site.b.status("files").get("other-hosts")), "b is told"
    )


def test_help(a: CephHost) -> None:
    """``-o help`` shows the options of both drivers, and makes nothing."""
    create = ("volume", "create", "-d", "volplugin")
    for driver, words in (
        ("ceph", ("on-conflict", "image-feature", "object-size", "encryption")),
        ("cephfs", ("inodes", "path", "access")),
    ):
        told = a.refusal(*create, "-o", f"driver={driver}", "-o", "help")
        assert [word for word in words if word not in told] == []
    assert a.plugin.client.list() == {}


def test_copy_up(a: CephHost) -> None:
    """A new volume is empty, so docker copies what the image has there."""
    a.create("block", *RBD)
    a.create("files", "driver=cephfs")
    plain = ("stat", "-c", "%a %u %g %s", "/data", "/data/hello")
    a.docker.sleeper("plain", image=SEED_IMAGE)
    expected = a.docker("exec", "plain", "sh", "-c", "ls -A /data")
    owner = a.docker("exec", "plain", *plain[:3], "/data/hello")
    for name in ("block", "files"):
        words = ("--rm", "-v", f"{name}:/data", SEED_IMAGE)
        assert a.docker.run(*words, "ls", "-A", "/data") == expected
        assert a.docker.run(*words, *plain[:3], "/data/hello") == owner


def test_a_full_rbd_volume(a: CephHost) -> None:
    """dd ends with "No space left", df shows the size, and what is deleted is free."""
    a.create("pg", *RBD)
    said = a.refusal(
        *("run", "--rm", "--network", "none", "-v", "pg:/d", IMAGE),
        *("dd", "if=/dev/zero", "of=/d/x", "bs=1M", "count=60"),
    )
    assert "No space left on device" in said
    assert 36 <= size_shown(a, "pg") <= 48
    assert int(shell(a, "pg", "stat -c %s /d/x; rm /d/x")) > 30 << 20
    shell(a, "pg", "dd if=/dev/zero of=/d/y bs=1M count=30")


def test_a_full_cephfs_volume(a: CephHost) -> None:
    """dd ends with "Disk quota exceeded", a little late, and df shows the size."""
    a.create("files", "driver=cephfs", "size=48M")
    assert size_shown(a, "files") == 48
    said = a.refusal(
        *("run", "--rm", "--network", "none", "-v", "files:/d", IMAGE),
        *("dd", "if=/dev/zero", "of=/d/x", "bs=1M", "count=200"),
    )
    assert "Disk quota exceeded" in said
    assert 40 << 20 < int(shell(a, "files", "stat -c %s /d/x")) < 90 << 20


@pytest.mark.parametrize("options", [RBD, ("driver=cephfs",)])
def test_a_killed_plugin(a: CephHost, options: tuple[str, ...]) -> None:
    """SIGKILL the plugin under a container: it goes on, and after a restart all does.

    The volume is detached with the last container, as if nothing had been.
    """
    a.create("pg", *options)
    a.docker.sleeper("app", "-v", "pg:/d")
    a.docker("exec", "app", "sh", "-c", "echo before > /d/x; sync /d/x")
    mounted = a.mounts()
    a.plugin.kill()
    a.docker("exec", "app", "sh", "-c", "echo without >> /d/x; sync /d/x")
    assert a.mounts() == mounted
    a.plugin.start()
    a.docker("exec", "app", "sh", "-c", "echo after >> /d/x; sync /d/x")
    assert a.mounts() == mounted
    assert a.status("pg")["cluster"] == "ok"
    assert "in use" in a.refusal("volume", "rm", "pg")
    a.docker("stop", "-t", "0", "app")
    a.eventually_free()
    assert shell(a, "pg", "cat /d/x") == "before\nwithout\nafter"


def test_a_killed_dockerd(site: Site) -> None:
    """What a dockerd had that was killed is let go of, and another host gets it."""
    a, b = site.hosts
    a.create("pg", *RBD)
    a.docker.sleeper("app", "-v", "pg:/d")
    a.docker("exec", "app", "sh", "-c", "echo here > /d/x; sync /d/x")
    site.both_know("pg")
    a.docker.kill()
    # The container lives on: the volume is a's.
    run = ("run", "--rm", "--network", "none", "-v", "pg:/d", IMAGE, "cat", "/d/x")
    assert "attached on hosta" in b.refusal(*run)
    a.docker.start()  # and ends the container, with no Unmount
    a.eventually_free()
    assert b.docker(*run) == "here"


def test_move(site: Site) -> None:
    """A volume goes to another docker host and back, without a create and with all.

    While one host has it the other is refused, and told whom to ask.
    """
    a, b = site.hosts
    a.create("pg", *RBD)
    site.both_know("pg")
    for turn, (host, other) in enumerate([(a, b), (b, a), (a, b)]):
        host.docker.sleeper("app", "-v", "pg:/d")
        host.docker("exec", "app", "sh", "-c", f"echo {turn} >> /d/x")
        said = other.refusal("run", "--rm", "-v", "pg:/d", IMAGE, "cat", "/d/x")
        assert f"attached on {host.name} (address 127.0.0.1:0/" in said
        assert "volplugin volume takeover pg" in said
        assert "hosta" in said or turn == 1
        assert "in use" in other.refusal("volume", "rm", "pg")
        assert other.is_free()
        host.docker("rm", "-f", "app")
    assert shell(b, "pg", "cat /d/x") == "0\n1\n2"
    b.docker("volume", "rm", "pg")
    eventually(lambda: a.plugin.client.list() == {}, "a sees that it is gone")
    assert a.docker.volumes() == set()


def test_take_over(site: Site) -> None:
    """The container that lost its volume gets errors; the one that took it has all."""
    a, b = site.hosts
    a.create("pg", *RBD)
    a.docker.sleeper("app", "-v", "pg:/d")
    a.docker("exec", "app", "sh", "-c", "echo a > /d/x; sync /d/x")
    site.both_know("pg")
    assert b.run("volume", "takeover", "pg").startswith("pg: taken from hosta")
    b.docker.sleeper("app", "-v", "pg:/d")
    assert b.docker("exec", "app", "cat", "/d/x") == "a"
    b.docker("exec", "app", "sh", "-c", "echo b > /d/x; sync /d/x")
    with pytest.raises(DockerError, match=r"Input/output error|Read-only"):
        a.docker("exec", "app", "sh", "-c", "echo late > /d/y && sync /d/y")
    eventually(lambda: "hostb" in str(a.status("pg").get("error")), "a tells of it")
    a.docker("rm", "-f", "app")
    a.eventually_free()
    assert "attached on hostb" in a.refusal("run", "--rm", "-v", "pg:/d", IMAGE, "ls")
    b.docker("rm", "-f", "app")
    assert shell(a, "pg", "cat /d/x; ls /d") == "b\nx"


def test_many_writers(site: Site) -> None:
    """Containers on two hosts write one volume of CephFS; it is there while one is."""
    a, b = site.hosts
    a.create("files", "driver=cephfs", "size=48M")
    site.both_know("files")
    for host in site.hosts:
        host.docker.sleeper("app", "-v", "files:/d")
        host.docker("exec", "app", "sh", "-c", f"echo {host.name} > /d/{host.name}")
    assert a.docker("exec", "app", "cat", "/d/hosta", "/d/hostb") == "hosta\nhostb"
    assert b.docker("exec", "app", "cat", "/d/hosta", "/d/hostb") == "hosta\nhostb"
    a.docker("rm", "-f", "app")
    assert "in use by hostb" in a.refusal("volume", "rm", "files")
    assert b.docker("exec", "app", "cat", "/d/hosta") == "hosta"
    b.docker("rm", "-f", "app")
    a.docker("volume", "rm", "files")


def test_snapshots(a: CephHost) -> None:
    """A snapshot under a running container, and a volume that is a copy of it."""
    a.create("pg", *RBD)
    a.docker.sleeper("app", "-v", "pg:/d")
    a.docker("exec", "app", "sh", "-c", "echo old > /d/x")
    assert a.run("snapshot", "create", "pg@monday") == "pg@monday"
    a.docker("exec", "app", "sh", "-c", "echo new > /d/x; echo new > /d/y")
    assert "pg@monday" in a.run("snapshot", "ls", "pg")
    for name, source in (("past", "from=pg@monday"), ("present", "base=pg")):
        a.create(name, "driver=ceph", source)
    assert shell(a, "past", "cat /d/*; echo mine > /d/x") == "old"
    assert shell(a, "present", "cat /d/*") == "new\nnew"
    assert a.docker("exec", "app", "cat", "/d/x") == "new"
    a.docker("rm", "-f", "app")
    said = a.refusal("volume", "rm", "pg")
    assert "past" in said
    a.docker("volume", "rm", "past", "present")
    a.run("snapshot", "rm", "pg@monday")
    a.docker("volume", "rm", "pg")


def test_scope_global(site: Site) -> None:
    """The socket ``ceph`` is of scope global: all its volumes are the cluster's.

    Its default is the block device. What is a host's own is neither listed nor made.
    """
    a, b = site.hosts
    # Names that b has not had: a dockerd keeps to the plugin that it found one at.
    a.docker("volume", "create", "-d", "ceph", "-o", "size=48M", "globe")
    a.create("reef", "driver=cephfs", driver="ceph")
    a.create("here", driver="volplugin")
    shown = a.docker.inspect("volume", "globe")
    assert (shown["Driver"], shown["Scope"]) == ("ceph", "global")
    assert shown["Status"]["driver"] == "rbd"
    assert a.docker.inspect("volume", "reef")["Status"]["driver"] == "cephfs"
    assert a.docker.inspect("volume", "here")["Scope"] == "local"
    assert set(a.globe.list()) == {"globe", "reef"}
    assert set(a.plugin.client.list()) == {"globe", "reef", "here"}
    assert a.docker.volumes(driver="ceph") == {"globe", "reef"}
    assert a.docker.volumes() == {"here"}
    said = a.refusal("volume", "create", "-d", "ceph", "-o", "driver=local", "other")
    assert "serves volumes of clusters alone" in said
    shell(a, "globe", "echo a > /d/x")
    site.both_know("globe")
    site.both_know("reef")
    assert b.docker.volumes(driver="ceph") >= {"globe", "reef"}
    words = ("--rm", "-v", "globe:/d", "--volume-driver", "ceph", IMAGE)
    assert b.docker.run(*words, "cat", "/d/x") == "a"
    assert b.docker.inspect("volume", "globe")["Scope"] == "global"


def test_words_of_pouch(a: CephHost, site: Site) -> None:
    """PouchContainer's option names are taken, in both of its spellings."""
    ceph = site.ceph
    a.create(
        "pg",
        *("driver=ceph", "opt.size=320M", "opt.fs=xfs", "backend=ceph"),
        *("image-feature=layering,exclusive-lock", "object-size=1M"),
        *(f"pool={POOL}", f"conf={ceph.conf}", f"key={ceph.least()}"),
    )
    shell(a, "pg", "echo here > /d/x")
    status = a.status("pg")
    assert (status["size"], status["fs"]) == ("320M", "xfs")
    image = str(status["image"]).partition("/")[2]
    told = ceph.rbd("info", f"{POOL}/{site.namespace}/{image}")
    assert "order 20" in told
    assert "features: layering, exclusive-lock\n" in told
    a.create("copy", "driver=ceph", "base=pg")
    assert shell(a, "copy", "cat /d/x") == "here"
    said = a.refusal(
        *("volume", "create", "-d", "volplugin", "-o", "driver=ceph"),
        *("-o", "conf=/etc/other.conf", "other"),
    )
    assert "this backend has" in said
    # Copies go before what they are of.
    a.docker("volume", "rm", "copy", "pg")
