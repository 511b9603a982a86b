"""Swarm: services on two nodes, each with the plugin, and what becomes of volumes."""

from collections.abc import Iterator

import pytest
from support.engine import Engine
from support.images import IMAGE, SEED_IMAGE
from support.swarm import Swarm, running_swarm
from support.wait import eventually

pytestmark = [pytest.mark.root, pytest.mark.engine]

SLEEP = (IMAGE, "sleep", "600")
TMPFS = "volume-opt=driver=tmpfs"
MEMORY = (
    "--mount",
    f"type=volume,source=memory,target=/m,volume-driver=volplugin,{TMPFS}",
)
STACK = """
version: "3.7"
services:
  app:
    image: {image}
    command: sleep 600
    stop_signal: KILL
    networks: [host]
    volumes: ["data:/data"]
    deploy: {{placement: {{constraints: ["node.role==manager"]}}}}
networks: {{host: {{external: true, name: host}}}}
volumes:
  data: {{driver: volplugin, driver_opts: {{driver: quota, size: {size}}}}}
"""


@pytest.fixture(scope="module")
def shared_swarm() -> Iterator[Swarm]:
    """A swarm for the tests of this module."""
    with running_swarm() as swarm:
        yield swarm


@pytest.fixture
def swarm(shared_swarm: Swarm) -> Iterator[Swarm]:
    """The module's swarm, with no service and no volume before and after."""
    yield shared_swarm
    shared_swarm.clear()


def mount(volume: str, *options: str) -> tuple[str, str]:
    """Return the words that mount a volume on /data."""
    words = ("type=volume", f"source={volume}", "target=/data")
    return "--mount", ",".join([*words, "volume-driver=volplugin", *options])


def do(node: Engine, service: str, script: str) -> str:
    """Run a script in one of the service's containers on ``node``."""
    named = ("--filter", f"label=com.docker.swarm.service.name={service}")
    container = node.docker("ps", "--quiet", *named).split()[0]
    return node.docker("exec", container, "sh", "-c", script)


def holds(node: Engine, volume: str) -> int:
    """Return by how many containers the volume is held."""
    return int(node.plugin.client.get(volume)["Status"]["mounts"])


def test_a_service_has_its_volume_where_its_task_is(swarm: Swarm) -> None:
    """The node of the task makes it, with its options and labels; rm leaves it."""
    options = ("volume-opt=driver=quota", "volume-opt=size=20m", "volume-label=a=b")
    words = (*swarm.on(swarm.worker), *mount("db", *options))
    swarm.create("app", *words, *SLEEP)
    swarm.eventually_runs("app", 1)
    assert swarm.manager.docker.volumes() == set()
    shown = swarm.worker.docker.inspect("volume", "db")
    assert (shown["Labels"], shown["Status"]["size"]) == ({"a": "b"}, "20M")
    do(swarm.worker, "app", "echo here > /data/x")
    swarm.remove("app")
    assert swarm.worker.docker.volumes() == {"db"}
    assert holds(swarm.worker, "db") == 0
    swarm.create("app", *words, *SLEEP)
    swarm.eventually_runs("app", 1)
    assert do(swarm.worker, "app", "cat /data/x") == "here"


def test_replicas_make_one_volume_and_share_it(swarm: Swarm) -> None:
    """Six tasks that start at once on a node: one volume, a hold for each."""
    words = (*swarm.on(swarm.worker), "--replicas", "6", *mount("shared", TMPFS))
    swarm.create("app", *words, *SLEEP)
    swarm.eventually_runs("app", 6)
    assert holds(swarm.worker, "shared") == 6
    assert len(swarm.worker.mounts()) == 1
    outcomes = {call.outcome for call in swarm.worker.plugin.calls("shared")}
    assert outcomes <= {"ok", "not_found: no such volume"}
    do(swarm.worker, "app", "echo here > /data/x")
    swarm.manager.docker("service", "scale", "--detach", "app=1")
    eventually(lambda: holds(swarm.worker, "shared") == 1, "five tasks have ended")
    assert do(swarm.worker, "app", "cat /data/x") == "here"
    swarm.remove("app")
    swarm.worker.eventually_unmounted("shared")


def test_each_task_has_a_volume_of_its_own_by_a_template(swarm: Swarm) -> None:
    """Slots name volumes; a drained node's tasks get new ones on the other node.

    What the plugin keeps on a host stays on that host, and is there when they return.
    """
    volume = mount("{{.Service.Name}}-{{.Task.Slot}}", "volume-opt=mode=0700")
    swarm.create("web", "--replicas", "4", *volume, *SLEEP)
    swarm.eventually_runs("web", 4)
    on_manager, on_worker = (node.docker.volumes() for node in swarm.nodes)
    assert on_manager | on_worker == {"web-1", "web-2", "web-3", "web-4"}
    assert len(on_manager) == len(on_worker) == 2
    (worker,) = swarm.manager.docker("node", "ls", "-qf", "role=worker").split()
    swarm.manager.docker("node", "update", "--availability", "drain", worker)
    try:
        eventually(
            lambda: len(swarm.manager.docker.volumes()) == 4, "the tasks have moved"
        )
        swarm.eventually_runs("web", 4)
        assert swarm.worker.docker.volumes() == on_worker
        assert [holds(swarm.worker, name) for name in on_worker] == [0, 0]
        status = swarm.manager.docker.inspect("volume", min(on_worker))
        assert status["Options"] == {"mode": "0700"}
    finally:
        swarm.manager.docker("node", "update", "--availability", "active", worker)


def test_a_volume_without_a_name_leaves_another_one(swarm: Swarm) -> None:
    """The container's own goes with it; dockerd 20.10 makes one more for the task.

    That one nobody uses and nobody removes.
    """
    volume = "type=volume,target=/data,volume-driver=volplugin"
    words = (*swarm.on(swarm.worker), "--mount", volume, SEED_IMAGE, "sleep", "600")
    swarm.create("app", *words)
    swarm.eventually_runs("app", 1)
    volumes = swarm.worker.docker.volumes()
    assert [len(name) for name in volumes] == [64, 64]
    (unused,) = (name for name in volumes if holds(swarm.worker, name) == 0)
    assert do(swarm.worker, "app", "cat /data/hello") == "from the image"
    swarm.manager.docker("service", "rm", "app")
    eventually(lambda: swarm.worker.docker.volumes() == {unused}, "the other is gone")
    assert swarm.worker.plugin.operations(unused) == ["Create"]


def test_update_and_rollback_change_volumes(swarm: Swarm) -> None:
    """Each version of the service has its volume; neither loses its content."""
    docker = swarm.manager.docker
    place = swarm.on(swarm.manager)
    swarm.create("app", *place, *mount("first"), *SLEEP)
    swarm.eventually_runs("app", 1)
    do(swarm.manager, "app", "echo first > /data/x")
    _, other = mount("second", "volume-opt=driver=quota", "volume-opt=size=20m")
    docker("service", "update", "--quiet", "--mount-add", other, "app")
    assert (holds(swarm.manager, "first"), holds(swarm.manager, "second")) == (0, 1)
    do(swarm.manager, "app", "echo second > /data/x")
    docker("service", "rollback", "--quiet", "app")
    assert do(swarm.manager, "app", "cat /data/x") == "first"
    assert (holds(swarm.manager, "first"), holds(swarm.manager, "second")) == (1, 0)
    assert docker.volumes() == {"first", "second"}


def test_an_update_with_a_wrong_option_is_rolled_back(swarm: Swarm) -> None:
    """The task that could not start shows the plugin's error, whole."""
    docker = swarm.manager.docker
    swarm.create("app", *swarm.on(swarm.manager), *mount("good"), *SLEEP)
    swarm.eventually_runs("app", 1)
    do(swarm.manager, "app", "echo kept > /data/x")
    _, wrong = mount("bad", "volume-opt=sise=1g")
    words = ("--detach", "--update-failure-action", "rollback", "--mount-add", wrong)
    docker("service", "update", *words, "app")

    def is_rolled_back() -> bool:
        shown = "{{with .UpdateStatus}}{{.State}}{{end}}"
        state = docker("service", "inspect", "--format", shown, "app")
        return state == "rollback_completed"

    eventually(is_rolled_back, "the update is rolled back", seconds=30)
    swarm.eventually_runs("app", 1)
    assert do(swarm.manager, "app", "cat /data/x") == "kept"
    error = "create bad: unknown option 'sise'; did you mean 'size'?"
    assert error in swarm.tasks("app", shown="{{.Error}}")
    assert docker.volumes() == {"good"}


def test_a_stack_has_its_volumes(swarm: Swarm) -> None:
    """driver_opts arrive and ``stack rm`` leaves the volume.

    Other driver_opts are not compared, as compose does it: the volume is what it was,
    and Status tells.
    """
    docker = swarm.manager.docker
    file = swarm.manager.host.folder / "stack.yml"

    def deploy(size: str) -> None:
        file.write_text(STACK.format(image=IMAGE, size=size))
        docker("stack", "deploy", "--compose-file", str(file), "shop")
        swarm.eventually_runs("shop_app", 1)

    deploy("20m")
    assert docker.volumes() == {"shop_data"}
    do(swarm.manager, "shop_app", "echo here > /data/x")
    docker("stack", "rm", "shop")
    swarm.remove()
    deploy("40m")
    assert do(swarm.manager, "shop_app", "cat /data/x") == "here"
    assert docker.inspect("volume", "shop_data")["Status"]["size"] == "20M"


def test_tasks_go_on_while_the_plugin_is_killed(swarm: Swarm) -> None:
    """SIGKILL and start: no task ends, and the last one's end unmounts."""
    words = (*swarm.on(swarm.worker), "--replicas", "2", *mount("memory", TMPFS))
    swarm.create("app", *words, *SLEEP)
    swarm.eventually_runs("app", 2)
    do(swarm.worker, "app", "echo here > /data/x")
    swarm.worker.plugin.kill()
    swarm.worker.plugin.start()
    assert do(swarm.worker, "app", "cat /data/x") == "here"
    assert swarm.tasks("app", shown="{{.ID}}").count("\n") == 1
    swarm.remove("app")
    swarm.worker.eventually_unmounted("memory")


def test_a_worker_whose_dockerd_is_killed(swarm: Swarm) -> None:
    """The swarm starts its task again, on the same volumes; the tmpfs ends with it."""
    swarm.create("app", *swarm.on(swarm.worker), *mount("disk"), *MEMORY, *SLEEP)
    swarm.eventually_runs("app", 1)
    first = swarm.tasks("app", shown="{{.ID}}")
    do(swarm.worker, "app", "echo here > /data/x; sync")
    swarm.worker.docker.kill()
    swarm.worker.docker.start()
    eventually(lambda: swarm.tasks("app", shown="{{.ID}}") != first, "a new task")
    swarm.eventually_runs("app", 1)
    assert do(swarm.worker, "app", "cat /data/x") == "here"
    swarm.remove("app")
    swarm.worker.eventually_unmounted("memory")
    assert (holds(swarm.worker, "disk"), holds(swarm.worker, "memory")) == (0, 0)


def test_a_worker_that_is_rebooted(swarm: Swarm) -> None:
    """Its tasks start again: a local volume as it was, a tmpfs empty, held once."""
    swarm.create("app", *swarm.on(swarm.worker), *mount("disk"), *MEMORY, *SLEEP)
    swarm.eventually_runs("app", 1)
    first = swarm.tasks("app", shown="{{.ID}}")
    do(swarm.worker, "app", "echo here > /data/x; echo here > /m/x; sync")
    swarm.worker.host.reboot()
    swarm.worker.plugin.start()
    swarm.worker.docker.start()
    eventually(lambda: swarm.tasks("app", shown="{{.ID}}") != first, "a new task")
    swarm.eventually_runs("app", 1)
    assert do(swarm.worker, "app", "cat /data/x; ls /m") == "here"
    assert (holds(swarm.worker, "disk"), holds(swarm.worker, "memory")) == (1, 1)
    swarm.remove("app")
    swarm.worker.eventually_unmounted("memory")


def test_a_node_tells_of_the_plugin_once_its_dockerd_has_used_it() -> None:
    """Until then no task is placed there; a look at the volumes is use enough."""
    engine = Engine(own_network=True)
    try:
        engine.start()
        docker = engine.docker
        docker("swarm", "init", "--advertise-addr", "127.0.0.1")
        words = ("--network", "host", "--stop-signal", "KILL", *mount("late"))
        docker("service", "create", "--detach", "--name", "app", *words, *SLEEP)

        def state() -> str:
            shown = "{{.CurrentState}} {{.Error}}"
            return docker("service", "ps", "--no-trunc", "--format", shown, "app")

        eventually(lambda: "missing plugin on 1 node" in state(), "it is not placed")
        docker("volume", "ls")  # told to the swarm with the node's next report
        eventually(lambda: state().startswith("Running"), "it runs", seconds=30)
        docker("service", "rm", "app")
        docker("rm", "-f", *docker("ps", "-aq").split())
        engine.clear()
        docker.kill()
    finally:
        engine.close()
