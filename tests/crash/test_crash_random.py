"""Random work from several clients, and SIGKILL at any moment of it."""

import contextlib
import random
import threading
import time
from collections.abc import Iterator, Mapping, Sequence

import pytest
from rooms import ForkedPlugin, Room, opened
from worlds import KINDS, Died, World

from volplugin.errors import Unsupported

pytestmark = pytest.mark.root

CLIENTS = 3
VOLUMES = 3  # of each client: what one client knows of its volumes is certain
ROUNDS = 8


@pytest.fixture(scope="module")
def room() -> Iterator[Room]:
    """A room for all seeds."""
    with opened() as room:
        yield room


@pytest.mark.parametrize("seed", [1, 2])
def test_random_deaths(room: Room, seed: int) -> None:
    """Whatever was under way when the server died, what was answered holds."""
    chance = random.Random(seed)
    plugin = ForkedPlugin(room, room.folder(), config="sweep-interval = 0.1")
    plugin.start()
    world = World(plugin)
    for _ in range(ROUNDS):
        faults: list[BaseException] = []
        clients = [
            threading.Thread(target=work, args=(world, client, chance.random(), faults))
            for client in range(CLIENTS)
        ]
        for client in clients:
            client.start()
        time.sleep(chance.uniform(0.02, 0.5))
        plugin.kill()
        for client in clients:
            client.join()
        assert not faults, faults
        if chance.random() < 0.5:  # and once more while it recovers
            plugin.start(wait=False)
            time.sleep(chance.uniform(0.005, 0.06))
            plugin.kill()
        plugin.start()
        world.check()
    world.destroy()
    plugin.close()


def work(world: World, client: int, seed: float, faults: list[BaseException]) -> None:
    """Ask for what makes sense of the client's own volumes, until the server dies."""
    chance = random.Random(seed)
    names = [f"c{client}v{number}" for number in range(VOLUMES)]
    try:
        while True:
            step(world, chance, chance.choice(names))
    except Died:
        return
    except BaseException as error:
        faults.append(error)
        raise


def step(world: World, chance: random.Random, name: str) -> None:
    """Take one step in the life of a volume."""
    expected = world.expected
    if name not in expected.present:
        kind = chance.choice(KINDS)
        expected.made.pop(name, None)
        world.create(name, world.options(kind, name))
        return
    held = expected.held.get(name, set())
    sizes = sizes_for(expected.present[name], held=bool(held))
    if sizes and chance.random() < 0.3:
        with contextlib.suppress(Unsupported):  # ext4 grows by CAP_SYS_RESOURCE alone
            world.resize(name, chance.choice(sizes))
        return
    if held and chance.random() < 0.6:
        world.unmount(name, chance.choice(sorted(held)))
    elif held or chance.random() < 0.6:
        mount_id = f"id{chance.randrange(10**8)}"
        path = world.mount(name, mount_id)
        if name not in expected.content:
            world.write(name, path, f"written by {mount_id}")
    else:
        world.remove(name)


def sizes_for(options: Mapping[str, str], *, held: bool) -> Sequence[str]:
    """Return the sizes that a volume may be given; none where it has no limit."""
    driver = options.get("driver")
    if driver == "quota" and held:  # it would have to be unmounted to be made smaller
        return ("24m",)
    return ("12m", "16m", "24m") if driver in {"quota", "fast"} else ()
