"""Who holds a volume: the sequences that real engines send, against the mount table.

M is Mount, U is Unmount, | is the end of one life of the client and the next one. X and
Y are mount IDs.
"""

import contextlib
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from peers import (
    Life,
    Lives,
    container,
    holders,
    host_of,
    lives_of,
    mount_of,
    serving_in_host,
)
from support.client import PluginError
from support.plugin import Plugin
from support.wait import eventually
from wire import connected, post

pytestmark = pytest.mark.root

SWEEP: Final = 0.2  # seconds between sweeps, see `serving_in_host`
X: Final = "3f2a" * 16
Y: Final = "b0b1" * 16
PODMAN: Final = "c0de" * 16  # podman has one ID for everything
PATH: Final = "/mnt/tmpfs/v"


@pytest.fixture(scope="module")
def server() -> Iterator[Plugin]:
    """A server that the module shares."""
    with serving_in_host() as plugin:
        yield plugin


@pytest.fixture
def plugin(server: Plugin) -> Iterator[Plugin]:
    """The server with one tmpfs volume, ``v``; each test lets go of it."""
    server.client.create("v", {"driver": "tmpfs"})
    yield server
    clear(server)


def clear(plugin: Plugin) -> None:
    """Remove all volumes; none may be mounted any more or counted as held."""
    for name in plugin.client.list():
        plugin.client.remove(name)
    assert not mounted(plugin)


@pytest.fixture
def lives(plugin: Plugin) -> Iterator[Lives]:
    """Clients of the server."""
    with lives_of(plugin) as lives:
        yield lives


def mounted(plugin: Plugin) -> bool:
    """Return whether ``v`` is in the mount table, as the tmpfs that it should be."""
    mount = mount_of(plugin, PATH)
    if mount is None:
        return False
    assert mount.filesystem == "tmpfs"
    assert mount.source.startswith("volplugin-")
    assert mount.options >= {"nosuid", "nodev", "noexec"}
    return True


def eventually_unmounted(plugin: Plugin) -> None:
    """Fail unless the sweep detaches ``v``."""
    eventually(lambda: not mounted(plugin), "the volume is detached", seconds=10)


def refusal(client: Life, name: str = "v") -> str:
    """Return why a Remove is refused, which it must be."""
    status, answer = client.call("Remove", {"Name": name})
    assert status == 500
    return str(answer["Err"])


# The sequences of dockerd


def test_first_in_last_out(plugin: Plugin, lives: Lives) -> None:
    """M(X) M(Y) U(X) U(Y): mounted from the first to the last."""
    dockerd = lives.begin()
    assert not mounted(plugin)
    assert dockerd.mount("v", X) == PATH
    assert dockerd.mount("v", Y) == PATH
    assert mounted(plugin)
    assert holders(plugin, "v") == 2
    dockerd.unmount("v", X)
    assert mounted(plugin)
    dockerd.unmount("v", Y)
    assert not mounted(plugin)
    assert holders(plugin, "v") == 0


def test_docker_cp(plugin: Plugin, lives: Lives) -> None:
    """(a) M(X) M(X) U(X) U(X): the container keeps its mount after `docker cp`."""
    dockerd = lives.begin()
    dockerd.mount("v", X)
    for _ in range(2):
        dockerd.mount("v", X)
        dockerd.unmount("v", X)
        assert mounted(plugin)
    dockerd.unmount("v", X)
    assert not mounted(plugin)


def test_killed_dockerd(plugin: Plugin, lives: Lives) -> None:
    """(b) M(X) | M(X) U(X): what the first life never unmounted does not leak."""
    first = lives.begin()
    first.mount("v", X)
    first.end()
    second = lives.begin()
    second.mount("v", X)
    assert holders(plugin, "v") == 1
    second.unmount("v", X)
    assert not mounted(plugin)
    assert holders(plugin, "v") == 0


def test_killed_dockerd_with_other_containers(plugin: Plugin, lives: Lives) -> None:
    """M(X) M(Y) | M(X) U(X): Y, which died with the first life, does not leak."""
    first = lives.begin()
    first.mount("v", X)
    first.mount("v", Y)
    first.end()
    second = lives.begin()
    second.mount("v", X)
    second.unmount("v", X)
    assert not mounted(plugin)
    assert holders(plugin, "v") == 0


def test_killed_dockerd_that_only_unmounts(plugin: Plugin, lives: Lives) -> None:
    """M(X) | U(X): the next life may send the Unmount of the one before."""
    first = lives.begin()
    first.mount("v", X)
    first.end()
    lives.begin().unmount("v", X)
    assert not mounted(plugin)


def test_killed_dockerd_that_never_comes_back(plugin: Plugin, lives: Lives) -> None:
    """M(X) |: what nobody has any more is detached without being asked for."""
    first = lives.begin()
    first.mount("v", X)
    first.end()
    eventually_unmounted(plugin)
    assert holders(plugin, "v") == 0


def test_live_restore(plugin: Plugin, lives: Lives) -> None:
    """(c) M(X) | M(X) U(X): the container that lives on keeps its volume.

    dockerd 20.10 sends no Unmount at its stop; the sweep finds that it has ended.
    """
    first = lives.begin()
    path = first.mount("v", X)
    with container(plugin, path) as running:
        first.end()
        second = lives.begin()
        second.mount("v", X)
        second.unmount("v", X)
        assert holders(plugin, "v") == 0
        assert mounted(plugin)
        (running.data / "file").write_text("kept")
        assert refusal(second) == (
            f"remove v: in use by a container: pid {running.pid} (sleep); stop it"
        )
        # A container that joins finds what the first one wrote.
        assert second.mount("v", Y) == path
        assert (host_of(plugin).path(path) / "file").read_text() == "kept"
        second.unmount("v", Y)
        assert mounted(plugin)
        running.end()
        eventually_unmounted(plugin)


def test_live_restore_with_a_dead_container(plugin: Plugin, lives: Lives) -> None:
    """(b) against (c): the same calls detach at once when the container is dead."""
    first = lives.begin()
    path = first.mount("v", X)
    with container(plugin, path) as running:
        first.end()
        running.end()
        second = lives.begin()
        second.mount("v", X)
        second.unmount("v", X)
        assert not mounted(plugin)


def test_failed_unmount(plugin: Plugin, lives: Lives) -> None:
    """(d) U(X)! M(X) U(X): a busy volume stays, and its ID is used again."""
    dockerd = lives.begin()
    path = dockerd.mount("v", X)
    busy = host_of(plugin).start(
        *("sh", "-c", 'cd "$1"; exec sleep 600', "sh", path),
        log=plugin.root.parent / "busy.log",
    )
    try:
        where = Path(f"/proc/{busy.pid}/cwd")
        eventually(lambda: os.readlink(where) == path, "a process is in the volume")
        with pytest.raises(
            PluginError, match=r"^unmount v: .*a process has files open"
        ):
            dockerd.unmount("v", X)
        assert mounted(plugin)
        assert dockerd.mount("v", X) == path
        assert holders(plugin, "v") == 1
    finally:
        busy.kill()
        busy.wait(10)
    dockerd.unmount("v", X)
    assert not mounted(plugin)


def test_failed_unmount_is_tried_again(plugin: Plugin, lives: Lives) -> None:
    """U(X)!: the sweep detaches what nobody holds once it is not busy any more."""
    dockerd = lives.begin()
    path = dockerd.mount("v", X)
    with contextlib.ExitStack() as stack:
        descriptor = os.open(host_of(plugin).path(path), os.O_RDONLY)
        stack.callback(os.close, descriptor)
        with pytest.raises(PluginError, match=r"^unmount v: "):
            dockerd.unmount("v", X)
        assert mounted(plugin)
    eventually_unmounted(plugin)


def test_unknown_ids(plugin: Plugin, lives: Lives) -> None:
    """An Unmount of what dockerd never mounted is success and changes nothing."""
    dockerd = lives.begin()
    dockerd.unmount("v", X)
    dockerd.mount("v", X)
    for unknown in (Y, "", "🐳"):
        dockerd.unmount("v", unknown)
    assert mounted(plugin)
    assert holders(plugin, "v") == 1
    dockerd.unmount("v", X)
    dockerd.unmount("v", X)
    assert not mounted(plugin)


# Podman: one ID for everything, a process for each command


def test_podman(plugin: Plugin, lives: Lives) -> None:
    """M(C) | U(C): podman mounts at its own 0→1, each command is a process."""
    starting = lives.begin("podman")
    starting.mount("v", PODMAN)
    starting.end()
    time.sleep(3 * SWEEP)  # it is dead, as it always is, and holds all the same
    assert mounted(plugin)
    stopping = lives.begin("podman")
    stopping.unmount("v", PODMAN)
    assert not mounted(plugin)


def test_podman_after_a_reset(plugin: Plugin, lives: Lives) -> None:
    """M(C) | M(C) | U(C): podman lost its count, with `system reset` or a reboot."""
    for _ in range(2):
        starting = lives.begin("podman")
        starting.mount("v", PODMAN)
        starting.mount("v", PODMAN)
        starting.end()
    assert holders(plugin, "v") == 1
    lives.begin("podman").unmount("v", PODMAN)
    assert not mounted(plugin)


def test_podman_has_one_id_for_all_volumes(plugin: Plugin, lives: Lives) -> None:
    """The ID says nothing without the volume: one is unmounted, not the other."""
    plugin.client.create("w", {"driver": "tmpfs"})
    podman = lives.begin("podman")
    for name in ("v", "w"):
        podman.mount(name, PODMAN)
    podman.unmount("w", PODMAN)
    assert mounted(plugin)
    assert mount_of(plugin, "/mnt/tmpfs/w") is None
    podman.unmount("v", PODMAN)
    assert not mounted(plugin)


def test_podman_and_a_container_that_lives_on(plugin: Plugin, lives: Lives) -> None:
    """U(C) while a container has the volume: it stays until the container ends."""
    podman = lives.begin("podman")
    path = podman.mount("v", PODMAN)
    with container(plugin, path) as running:
        podman.unmount("v", PODMAN)
        assert mounted(plugin)
        assert "in use by a container" in refusal(podman)
        running.end()
        eventually_unmounted(plugin)


def test_podman_is_told_of_no_detach_that_fails(plugin: Plugin, lives: Lives) -> None:
    """U(C) of a busy volume is success: else podman sends no Mount any more.

    The next M(C) has the same mount; without one the sweep detaches it.
    """
    path = lives.begin("podman").mount("v", PODMAN)
    with contextlib.ExitStack() as stack:
        descriptor = os.open(host_of(plugin).path(path), os.O_RDONLY)
        stack.callback(os.close, descriptor)
        lives.begin("podman").unmount("v", PODMAN)
        assert mounted(plugin)
        assert holders(plugin, "v") == 0
        lives.begin("podman").mount("v", PODMAN)
        lives.begin("podman").unmount("v", PODMAN)
        assert mounted(plugin)
    eventually_unmounted(plugin)


def test_podman_is_told_of_an_unmount_that_releases_nothing(lives: Lives) -> None:
    """U(C) of a volume that is not there is an error to podman too."""
    with pytest.raises(PluginError, match=r"^unmount gone: no such volume"):
        lives.begin("podman").unmount("gone", PODMAN)


# PouchContainer


def test_pouch_1_0_0(plugin: Plugin, lives: Lives) -> None:
    """M(X) M(X) U(X): the ID of create comes again at start, and one Unmount."""
    pouchd = lives.begin("pouchd")
    pouchd.mount("v", X)
    assert pouchd.ask("Path", Name="v") == {"Mountpoint": PATH}
    pouchd.mount("v", X)
    assert mounted(plugin)
    pouchd.unmount("v", X)
    assert not mounted(plugin)


def test_pouch_random_ids(plugin: Plugin, lives: Lives) -> None:
    """M(1) M(2) U(3): the last commit has a new ID in each call."""
    pouchd = lives.begin("pouchd")
    pouchd.mount("v", "1" * 64)
    pouchd.mount("v", "2" * 64)
    assert mounted(plugin)
    pouchd.unmount("v", "3" * 64)
    assert not mounted(plugin)


def test_pouch_that_never_unmounts(plugin: Plugin, lives: Lives) -> None:
    """M(1) M(2), Remove: the last commit's mounts do not stand against it."""
    pouchd = lives.begin("pouchd")
    pouchd.mount("v", "1" * 64)
    pouchd.mount("v", "2" * 64)
    pouchd.ask("Remove", Name="v")
    assert not mounted(plugin)


def test_pouch_is_released(plugin: Plugin, lives: Lives) -> None:
    """M(1) M(2), release: Status tells of the hold, and the command ends it."""
    pouchd = lives.begin("pouchd")
    pouchd.mount("v", "1" * 64)
    pouchd.mount("v", "2" * 64)
    status = plugin.client.get("v")["Status"]
    assert status["held"] == (
        "by pouchd, whose last release never unmounts: until it ends, or `volplugin "
        "volume release v`"
    )
    done = plugin.release("v")
    assert done.returncode == 0, done.stderr
    holder = rf"\(pouchd, pid {pouchd.pid}, since \S+Z\)"
    assert re.fullmatch(
        f"v: released from '1{{12}}…' {holder}, '2{{12}}…' {holder}\n", done.stdout
    )
    assert not mounted(plugin)
    assert "held" not in plugin.client.get("v")["Status"]
    eventually(lambda: "released by an operator" in plugin.log, "it is logged")
    assert plugin.release("v").stdout == "v: nobody held it\n"
    # It is as new for the next one.
    pouchd.mount("v", "3" * 64)
    assert holders(plugin, "v") == 1
    assert plugin.release("v").returncode == 0


def test_a_release_with_a_container(plugin: Plugin, lives: Lives) -> None:
    """M(1), release: refused while a container has it, which keeps it; and then not."""
    for program in ("pouchd", "dockerd"):
        life = lives.begin(program)
        path = life.mount("v", "1" * 64)
        with container(plugin, path) as running:
            done = plugin.release("v")
            assert done.returncode == 1
            assert done.stderr == (
                f"volplugin: release v: in use by a container: pid {running.pid} "
                f"(sleep); stop it\n"
            )
            assert mounted(plugin)
            assert holders(plugin, "v") == 1
            assert running.data.is_mount()
            running.end()
        assert plugin.release("v").returncode == 0
        assert not mounted(plugin)


def test_a_release_of_a_directory(plugin: Plugin, lives: Lives) -> None:
    """A local volume has holders as well, and can be removed afterwards."""
    plugin.client.create("w")
    lives.begin().mount("w", X)
    assert "in use by 1 mount" in refusal(lives.begin("podman"), "w")
    assert plugin.release("w").stdout.startswith("w: released from '3f2a3f2a3f2a…'")
    assert "held" not in plugin.client.get("w")["Status"]
    plugin.client.remove("w")


def test_pouch_with_a_container(plugin: Plugin, lives: Lives) -> None:
    """M(1), Remove: what pouchd never unmounts stays while a container has it."""
    pouchd = lives.begin("pouchd")
    path = pouchd.mount("v", "1" * 64)
    with container(plugin, path) as running:
        assert f"in use by a container: pid {running.pid}" in refusal(pouchd)
        pouchd.end()
        time.sleep(3 * SWEEP)
        assert mounted(plugin)
        running.end()
        eventually_unmounted(plugin)


def test_engines_side_by_side(plugin: Plugin, lives: Lives) -> None:
    """The Unmount of an engine that counts for itself leaves another's alone."""
    dockerd, podman, pouchd = map(lives.begin, ("dockerd", "podman", "pouchd"))
    dockerd.mount("v", X)
    podman.mount("v", PODMAN)
    pouchd.mount("v", Y)
    podman.unmount("v", PODMAN)
    pouchd.unmount("v", "1" * 64)
    assert mounted(plugin)
    assert holders(plugin, "v") == 1
    dockerd.unmount("v", X)
    assert not mounted(plugin)


def test_another_program(plugin: Plugin, lives: Lives) -> None:
    """M(1) U(2) of a program that is not known: its one ID is what it means."""
    other = lives.begin("nomad")
    other.mount("v", "1" * 64)
    other.unmount("v", "2" * 64)
    assert not mounted(plugin)
    other.mount("v", "1" * 64)
    other.mount("v", "2" * 64)
    other.unmount("v", "3" * 64)  # which of the two it means can't be known
    assert holders(plugin, "v") == 2
    for known in ("1" * 64, "2" * 64):
        other.unmount("v", known)
    assert not mounted(plugin)


# Remove


def test_remove_names_who_holds(plugin: Plugin, lives: Lives) -> None:
    """Remove is refused while the volume is mounted, with ID, program, pid and time."""
    dockerd = lives.begin()
    dockerd.mount("v", X)
    dockerd.mount("v", X)
    time = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
    holder = rf"'3f2a3f2a3f2a…' \(dockerd, pid {dockerd.pid}, since {time}\)"
    assert re.fullmatch(
        f"remove v: in use by 2 mounts: {holder}; stop the containers that have it",
        refusal(dockerd),
    )
    assert mounted(plugin)
    dockerd.unmount("v", X)
    assert "in use by 1 mount: " in refusal(dockerd)
    dockerd.unmount("v", X)
    dockerd.ask("Remove", Name="v")


def test_remove_after_a_client_died(plugin: Plugin, lives: Lives) -> None:
    """A holder whose client is dead, with no container, does not stand against it."""
    first = lives.begin()
    first.mount("v", X)
    first.end()
    lives.begin().ask("Remove", Name="v")
    assert not mounted(plugin)
    assert "v" not in plugin.client.list()


def test_remove_after_a_client_died_with_a_container(
    plugin: Plugin, lives: Lives
) -> None:
    """A dead client's holder whose container lives on stands against Remove."""
    first = lives.begin()
    path = first.mount("v", X)
    with container(plugin, path) as running:
        first.end()
        second = lives.begin()
        assert f"in use by a container: pid {running.pid}" in refusal(second)
        assert mounted(plugin)
        running.end()
    second.ask("Remove", Name="v")


def test_one_living_holder_is_enough(plugin: Plugin, lives: Lives) -> None:
    """Beside a dead client's holder, one of a living client stands against Remove."""
    first, other = lives.begin(), lives.begin("podman")
    first.mount("v", X)
    other.mount("v", PODMAN)
    first.end()
    assert "in use by 2 mounts" in refusal(other)
    other.unmount("v", PODMAN)
    other.ask("Remove", Name="v")


def test_local_volumes_are_held_too(plugin: Plugin, lives: Lives) -> None:
    """A local volume, which we never mount, is held by the same rules."""
    plugin.client.create("w")
    first = lives.begin()
    path = first.mount("w", X)
    assert "in use by 1 mount" in refusal(first, "w")
    with container(plugin, path) as running:
        first.end()
        second = lives.begin()
        assert "in use by a container" in refusal(second, "w")
        running.end()
    second.ask("Remove", Name="w")
    assert not Path(path).exists()


def test_a_restart_of_the_server(plugin: Plugin, lives: Lives) -> None:
    """Mounts outlive the server, by SIGTERM and by SIGKILL, with who holds them."""
    dockerd = lives.begin()
    path = dockerd.mount("v", X)
    before = mount_of(plugin, path)
    plugin.restart()
    plugin.kill()
    plugin.start()
    assert mount_of(plugin, path) == before
    assert holders(plugin, "v") == 1
    dockerd.mount("v", X)
    dockerd.unmount("v", X)
    assert mounted(plugin)
    dockerd.unmount("v", X)
    assert not mounted(plugin)


def test_remove_after_the_server_died(plugin: Plugin, lives: Lives) -> None:
    """A Mount that a dead server granted may never have been answered.

    So it does not stand against Remove, but a container that has the volume does.
    """
    dockerd = lives.begin()
    path = dockerd.mount("v", X)
    with container(plugin, path) as running:
        plugin.kill()
        plugin.start()
        assert f"in use by a container: pid {running.pid}" in refusal(dockerd)
        assert mounted(plugin)
        running.end()
    dockerd.ask("Remove", Name="v")
    assert not mounted(plugin)


# Callers that leave, and deadlines


def test_a_caller_that_left() -> None:
    """A Mount whose client hung up is taken back at once: nobody will unmount it."""
    failpoints = "tmpfs.attach=sleep:1*1"
    with serving_in_host(failpoints=failpoints, sweep=3600) as plugin:
        plugin.client.create("v", {"driver": "tmpfs"})
        with connected(plugin.client) as wire:
            wire.send(post("Mount", b'{"Name":"v","ID":"%s"}' % X.encode()))
            eventually(lambda: holders(plugin, "v") == 1, "the Mount is under way")
        eventually(lambda: "mount taken back" in plugin.log, "it is taken back")
        eventually_unmounted(plugin)
        assert holders(plugin, "v") == 0
        clear(plugin)


def test_a_caller_that_asks_again() -> None:
    """M(X) left, M(X): the repeated call waits for the first and is the one counted.

    podman leaves after 5 s: were the first taken down before it, a slow attach would
    never succeed.
    """
    with serving_in_host(failpoints="tmpfs.attach=sleep:1*1") as plugin:
        plugin.client.create("v", {"driver": "tmpfs"})
        message = b'{"Name":"v","ID":"%s"}' % X.encode()
        with connected(plugin.client) as wire:
            wire.send(post("Mount", message))
            eventually(lambda: holders(plugin, "v") == 1, "the Mount is under way")
        with connected(plugin.client) as wire:
            answer = wire.ask(post("Mount", message))
            assert answer.json == {"Mountpoint": PATH}
            assert holders(plugin, "v") == 1
            assert mounted(plugin)
            assert wire.ask(post("Unmount", message)).json == {}
        assert not mounted(plugin)
        clear(plugin)


def test_deadline_of_mount() -> None:
    """(e) A Mount past its deadline is answered so, and then taken back."""
    config = "[timeouts]\nmount = 0.5\n"
    failpoints = "tmpfs.attach=sleep:1.5*1"
    with (
        serving_in_host(config=config, failpoints=failpoints) as plugin,
        lives_of(plugin) as lives,
    ):
        plugin.client.create("v", {"driver": "tmpfs"})
        dockerd = lives.begin()
        status, answer = dockerd.call("Mount", {"Name": "v", "ID": X})
        assert status == 500
        assert answer["Err"].startswith("mount v: still at it after 0.5 s; it goes on")
        assert not mounted(plugin)
        eventually(lambda: "mount taken back" in plugin.log, "it is taken back")
        eventually_unmounted(plugin)
        assert holders(plugin, "v") == 0
        # Nothing of it stands against the next one.
        assert dockerd.mount("v", X) == PATH
        dockerd.unmount("v", X)
        assert not mounted(plugin)
        clear(plugin)


def test_deadline_of_podman() -> None:
    """podman leaves after 5 s: its calls have a deadline of their own."""
    config = "[timeouts]\npodman = 0.3\n"
    failpoints = "tmpfs.attach=sleep:1*1"
    with (
        serving_in_host(config=config, failpoints=failpoints) as plugin,
        lives_of(plugin) as lives,
    ):
        plugin.client.create("v", {"driver": "tmpfs"})
        podman, dockerd = lives.begin("podman"), lives.begin()
        status, answer = podman.call("Mount", {"Name": "v", "ID": PODMAN})
        assert (status, answer["Err"][:31]) == (500, "mount v: still at it after 0.3 ")
        assert dockerd.mount("v", X) == PATH  # in its turn, within its own time
        dockerd.unmount("v", X)
        clear(plugin)


def test_deadline_of_create() -> None:
    """A Create past its deadline goes on; the same call again finds its outcome."""
    config = "[timeouts]\ncreate = 0.5\nother = 0.5\n"
    failpoints = "tmpfs.mountpoint=sleep:2*1"
    with (
        serving_in_host(config=config, failpoints=failpoints) as plugin,
        lives_of(plugin) as lives,
    ):
        dockerd = lives.begin()
        create = {"Name": "v", "Opts": {"driver": "tmpfs"}}
        late = 0
        status, answer = dockerd.call("Create", create)
        while status != 200:
            assert answer["Err"].startswith("create v: still at it after 0.5 s")
            assert late or plugin.client.list() == {}
            late += 1
            status, answer = dockerd.call("Create", create)
        assert late >= 2
        assert list(plugin.client.list()) == ["v"]
        clear(plugin)


def test_a_change_whose_turn_never_came() -> None:
    """A Remove that gave up waiting behind a Create is not done later."""
    config = "[timeouts]\nother = 0.3\n"
    failpoints = "tmpfs.mountpoint=sleep:1*1"
    with (
        serving_in_host(config=config, failpoints=failpoints) as plugin,
        lives_of(plugin) as lives,
    ):
        creating, removing = lives.begin(), lives.begin()
        creating.begin("Create", {"Name": "v", "Opts": {"driver": "tmpfs"}})
        time.sleep(0.2)
        assert "still at it after 0.3 s" in refusal(removing)
        assert creating.finish() == (200, {})
        assert list(plugin.client.list()) == ["v"]
        time.sleep(0.3)
        assert list(plugin.client.list()) == ["v"]
        clear(plugin)
