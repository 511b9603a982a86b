"""A real podman: one mount ID for everything, its own count, no daemon."""

import pytest
from support.client import PluginError
from support.images import IMAGE, SEED_IMAGE
from support.podman import PodmanEngine, PodmanError

from volplugin.admin.client import AdminClient

pytestmark = [pytest.mark.root, pytest.mark.engine]

CREATE = ("volume", "create", "--driver", "volplugin")
TMPFS = (*CREATE, "--opt", "driver=tmpfs")


def test_podman_reads_back_what_it_wrote(podman_engine: PodmanEngine) -> None:
    """A named volume outlives its container; ls and rm agree with the plugin."""
    podman, client = podman_engine.podman, podman_engine.plugin.client
    podman(*CREATE, "web")
    volume = ("-v", "web:/data", IMAGE)
    podman.run("--rm", *volume, "sh", "-c", "echo here > /data/x")
    assert podman.run("--rm", *volume, "cat", "/data/x") == "here"
    assert podman.volumes() == {"web"} == set(client.list())
    podman("volume", "rm", "web")
    assert client.list() == {}


def test_one_run_is_one_mount_and_one_unmount(podman_engine: PodmanEngine) -> None:
    """podman asks for no Path, and sends a Mount at its 0→1 alone."""
    podman, plugin = podman_engine.podman, podman_engine.plugin
    podman(*CREATE, "once")
    podman.sleeper("first", "-v", "once:/data")
    podman.run("--rm", "-v", "once:/data", IMAGE, "ls", "/data")
    podman("stop", "--time", "0", "first")
    assert plugin.operations("once") == ["Create", "Mount", "Unmount"]


def test_two_containers_keep_a_tmpfs_until_the_last(
    podman_engine: PodmanEngine,
) -> None:
    """podman sends one Mount for the first and one Unmount for the last of them."""
    podman = podman_engine.podman
    podman(*TMPFS, "memory")
    podman.sleeper("one", "-v", "memory:/data")
    podman.sleeper("two", "-v", "memory:/data")
    podman("exec", "one", "sh", "-c", "echo here > /data/x")
    podman("stop", "--time", "0", "one")
    assert podman("exec", "two", "cat", "/data/x") == "here"
    assert len(podman_engine.mounts()) == 1
    podman("stop", "--time", "0", "two")
    assert podman_engine.mounts() == []


def test_inspect_shows_what_the_plugin_tells(podman_engine: PodmanEngine) -> None:
    """Labels and options are podman's, Status is the plugin's, the path is Mount's."""
    podman = podman_engine.podman
    podman(*TMPFS, "--opt", "size=10m", "--label", "a=b", "seen")
    shown = podman.inspect("seen")
    assert (shown["Driver"], shown["Scope"]) == ("volplugin", "local")
    assert shown["Labels"] == {"a": "b"}
    assert shown["Options"] == {"driver": "tmpfs", "size": "10m"}
    assert shown["Status"]["size"] == "10M"
    assert shown["Mountpoint"] == ""
    podman.sleeper("app", "-v", "seen:/data")
    shown = podman.inspect("seen")
    assert shown["Mountpoint"] == "/mnt/tmpfs/seen"
    assert "(podman, pid " in shown["Status"]["holders"][0]


def test_exists_knows_podmans_volumes_alone(podman_engine: PodmanEngine) -> None:
    """``volume exists`` asks no plugin, nor does ``-v``: reload comes first.

    Else podman makes a volume of its own that has the name.
    """
    podman, client = podman_engine.podman, podman_engine.plugin.client
    client.create("outside")
    with pytest.raises(PodmanError, match=r"^$"):
        podman("volume", "exists", "outside")
    podman.run("--rm", "-v", "outside:/data", IMAGE, "touch", "/data/lost")
    assert podman.inspect("outside")["Driver"] == "local"
    podman("volume", "rm", "outside")
    assert podman("volume", "reload") == "Added:\noutside"
    podman("volume", "exists", "outside")
    podman.run("--rm", "-v", "outside:/data", IMAGE, "touch", "/data/kept")
    assert podman.inspect("outside")["Driver"] == "volplugin"
    assert podman.run("-v", "outside:/data", IMAGE, "ls", "/data") == "kept"


def test_reload_forgets_what_was_removed_elsewhere(podman_engine: PodmanEngine) -> None:
    """A volume that the plugin has no more is an error, until reload drops it."""
    podman, client = podman_engine.podman, podman_engine.plugin.client
    podman(*CREATE, "gone")
    podman(*CREATE, "stays")
    client.remove("gone")
    with pytest.raises(PodmanError, match="get gone: no such volume"):
        podman("volume", "inspect", "gone")
    assert podman("volume", "reload") == "Removed:\ngone"
    assert podman.volumes() == {"stays"}
    podman(*CREATE, "gone")
    assert set(client.list()) == {"gone", "stays"}


def test_prune_takes_unused_volumes_of_the_plugin(podman_engine: PodmanEngine) -> None:
    """``volume prune`` removes named ones too; what a container has stays."""
    podman, client = podman_engine.podman, podman_engine.plugin.client
    for name in ("used", "stopped", "unused"):
        podman(*CREATE, name)
    podman.sleeper("app", "-v", "used:/data")
    podman.create("-v", "stopped:/data", IMAGE, "ls")
    assert podman("volume", "prune", "--force") == "unused"
    assert set(client.list()) == {"used", "stopped"} == podman.volumes()


def test_labels_choose_what_prune_takes(podman_engine: PodmanEngine) -> None:
    """Labels never reach the plugin, and podman's filters work on its volumes."""
    podman, client = podman_engine.podman, podman_engine.plugin.client
    podman(*CREATE, "--label", "keep=yes", "labelled")
    podman(*CREATE, "plain")
    shown = podman("volume", "ls", "--quiet", "--filter", "label=keep=yes")
    assert shown == "labelled"
    podman("volume", "prune", "--force", "--filter", "label=keep=yes")
    assert set(client.list()) == {"plain"}


def test_a_volume_without_a_name_gets_one(podman_engine: PodmanEngine) -> None:
    """create makes 64 hex digits; those of ``run -v /data`` are podman's own."""
    podman, client = podman_engine.podman, podman_engine.plugin.client
    made = podman(*CREATE)
    assert len(made) == 64
    assert set(client.list()) == {made}
    podman.run("-v", "/data", SEED_IMAGE, "ls", "/data")
    (anonymous,) = podman.volumes() - {made}
    assert podman.inspect(anonymous)["Driver"] == "local"


def test_cp_works_while_the_container_runs(podman_engine: PodmanEngine) -> None:
    """podman copies by its own mount: the plugin is not asked, the container goes on.

    Into a container that does not run podman refuses to copy, with any plugin.
    """
    podman, plugin = podman_engine.podman, podman_engine.plugin
    source = podman_engine.host.folder / "source"
    source.write_text("content\n")
    podman(*TMPFS, "copied")
    podman.create("--name", "app", "-v", "copied:/data", IMAGE, "sleep", "600")
    with pytest.raises(PodmanError, match="volume copied is not mounted"):
        podman("cp", str(source), "app:/data/x")
    podman("start", "app")
    target = podman_engine.host.folder / "target"
    for _ in range(2):
        podman("cp", str(source), "app:/data/x")
        assert podman("exec", "app", "cat", "/data/x") == "content"
        podman("cp", "app:/data/x", str(target))
        assert target.read_text() == "content\n"
    assert plugin.operations("copied") == ["Create", "Mount"]
    podman("stop", "--time", "0", "app")
    assert podman_engine.mounts() == []


def test_a_new_volume_is_filled_from_the_image(podman_engine: PodmanEngine) -> None:
    """An empty volume gets what the image has there, with owner and mode."""
    podman = podman_engine.podman
    podman(*CREATE, "fill")
    show = ["sh", "-c", "cat /data/hello; stat -c '%u %a' /data/hello"]
    shown = podman.run("--rm", "-v", "fill:/data", SEED_IMAGE, *show)
    assert shown == "from the image\n1000 640"


def test_a_volume_can_be_read_only(podman_engine: PodmanEngine) -> None:
    """``:ro`` is podman's: one container reads what another one writes."""
    podman = podman_engine.podman
    podman(*CREATE, "both")
    podman.run("--rm", "-v", "both:/data", IMAGE, "sh", "-c", "echo 1 > /data/x")
    read = ("--rm", "-v", "both:/data:ro", IMAGE)
    assert podman.run(*read, "cat", "/data/x") == "1"
    with pytest.raises(PodmanError, match="Read-only file system"):
        podman.run(*read, "touch", "/data/y")


def test_a_container_stops_at_the_size(podman_engine: PodmanEngine) -> None:
    """A limited volume is full at its size, and Status says how full it is."""
    podman = podman_engine.podman
    podman(*CREATE, "--opt", "driver=quota", "--opt", "size=20m", "limited")
    fill = ("dd", "if=/dev/zero", "of=/data/x", "bs=1M")
    with pytest.raises(PodmanError, match="No space left on device"):
        podman.run("--rm", "-v", "limited:/data", IMAGE, *fill)
    assert podman.inspect("limited")["Status"]["size"] == "20M"


def test_resize_under_a_running_container(podman_engine: PodmanEngine) -> None:
    """A container that is full goes on writing; Options stay as podman was asked."""
    podman, plugin = podman_engine.podman, podman_engine.plugin
    options = ("driver=quota", "fs=xfs", "size=300m")
    words = [word for option in options for word in ("--opt", option)]
    podman(*CREATE, *words, "grows")
    podman.sleeper("app", "-v", "grows:/data")
    write = ("exec", "app", "dd", "if=/dev/zero", "of=/data/x", "bs=1M", "count=310")
    with pytest.raises(PodmanError, match="No space left on device"):
        podman(*write)
    AdminClient(str(plugin.admin_socket)).resize("grows", size="400m")
    podman(*write)
    shown = podman.inspect("grows")
    assert (shown["Options"]["size"], shown["Status"]["size"]) == ("300m", "400M")


def test_mount_shows_a_volume_without_a_container(podman_engine: PodmanEngine) -> None:
    """``volume mount`` and ``unmount`` count as containers do."""
    podman, plugin = podman_engine.podman, podman_engine.plugin
    podman(*TMPFS, "shown")
    podman("volume", "mount", "shown")
    assert len(podman_engine.mounts()) == 1
    podman.run("--rm", "-v", "shown:/data", IMAGE, "touch", "/data/x")
    podman("volume", "unmount", "shown")
    assert podman_engine.mounts() == []
    assert plugin.operations("shown") == ["Create", "Mount", "Unmount"]


def test_a_volume_in_use_is_removed_by_nobody(podman_engine: PodmanEngine) -> None:
    """podman refuses by its own record, the plugin by its own."""
    podman, client = podman_engine.podman, podman_engine.plugin.client
    podman(*TMPFS, "used")
    podman.sleeper("app", "-v", "used:/data")
    with pytest.raises(PodmanError, match="used is being used by the following"):
        podman("volume", "rm", "used")
    with pytest.raises(PluginError, match=r"in use by a container: pid \d+ \(sleep\)"):
        client.remove("used")
    assert len(podman_engine.mounts()) == 1


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["driver=tmpfs", "sizr=1m"], "unknown option 'sizr'; did you mean 'size'"),
        (["driver=tmpfs", "size=1x"], "option size: '1x' is not a size"),
        (["driver=nosuch"], "nosuch"),
        (["driver=tmpfs", "help"], "(?s)options of driver tmpfs.*noexec|exec"),
    ],
)
def test_podman_shows_the_plugins_error(
    podman_engine: PodmanEngine, options: list[str], error: str
) -> None:
    """podman takes an Err with status 200 for success: ours come with 500."""
    words = [word for option in options for word in ("--opt", option)]
    with pytest.raises(PodmanError, match=error):
        podman_engine.podman(*CREATE, *words, "wrong")
    assert podman_engine.podman.volumes() == set()
    assert podman_engine.plugin.client.list() == {}


def test_podman_skips_the_create_of_what_is_there(podman_engine: PodmanEngine) -> None:
    """Like dockerd, it asks Get first: Options are what was asked, Status what is."""
    podman, client = podman_engine.podman, podman_engine.plugin.client
    client.create("drift", {"driver": "tmpfs", "size": "10m"})
    podman(*TMPFS, "--opt", "size=20m", "drift")
    shown = podman.inspect("drift")
    assert (shown["Options"]["size"], shown["Status"]["size"]) == ("20m", "10M")
    with pytest.raises(PodmanError, match="drift already exists"):
        podman(*TMPFS, "--opt", "size=10m", "drift")
    with pytest.raises(PluginError, match=r"size.*10"):
        client.create("drift", {"driver": "tmpfs", "size": "20m"})


def test_podman_checks_names_itself(podman_engine: PodmanEngine) -> None:
    """A name that the plugin would refuse does not get there."""
    with pytest.raises(PodmanError, match="names must match"):
        podman_engine.podman(*CREATE, "../evil")
    assert podman_engine.plugin.calls("../evil") == []
