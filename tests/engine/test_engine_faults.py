"""What users see when another plugin fails, each call in each way, by each engine.

The plugin behind ours is one of the tests' own. While a call to it fails, other volumes
are as quick as ever; afterwards both sides know the same volumes and mounts.
"""

import contextlib
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final, Protocol

import attrs
import pytest
from support.bad_process import BadProcess
from support.docker import DockerError
from support.engine import Engine
from support.images import IMAGE
from support.plugin import DOCKER_SOCKET, Plugin
from support.podman import Podman, PodmanError

pytestmark = [pytest.mark.root, pytest.mark.engine]

LIMIT: Final = 1  # seconds that a call to the other plugin may take
CONFIG: Final = f"""
[backend.plugin]
time-limit = {LIMIT}
"""
OPTIONS: Final = ("driver=plugin", "plugin=bad")

# By fault, the kind of the bad plugin's, and what the user is told.
FAULTS: Final = {
    "refused": ("", "Connection refused"),
    "hang": ("hang", "no answer within 1 s"),
    "reset in the middle": ("reset", "cut off|closed the connection|reset"),
    "500 text": ("text", "it can't"),
    "500 JSON": ("error", "it can't"),
    "200 Err": ("refusal", "it can't"),
    "truncated JSON": ("half", "makes no sense"),
    "huge answer": ("huge", "more than"),
}
SAYS_NO: Final = ("500 text", "500 JSON", "200 Err")
"""The faults by which the plugin itself says that a call failed."""

# The step of a user in which a call is made; calls without one are never made.
STEPS: Final = {
    "Activate": "create",
    "Create": "create",
    "Get": "create",
    "List": "create",
    "Mount": "run",
    "Unmount": "run",
    "Remove": "remove",
    "Path": "",
    "Capabilities": "",
}


class Shown(Exception):
    """What the engine's command line shows of an error."""


class User(Protocol):
    """Someone at the command line of an engine."""

    def create(self) -> None:
        """Create the volume."""

    def run(self) -> None:
        """Have a container write to the volume and end."""

    def remove(self) -> None:
        """Remove the volume."""


@attrs.frozen
class OfDocker:
    """A user of docker."""

    engine: Engine

    def create(self) -> None:
        """Create the volume."""
        words = [word for option in OPTIONS for word in ("-o", option)]
        self._ask("volume", "create", "-d", "volplugin", *words, "photos")

    def run(self) -> None:
        """Have a container write to the volume and end."""
        flags = ("--rm", "--network", "none", "-v", "photos:/d")
        self._ask("run", *flags, IMAGE, "touch", "/d/x")

    def remove(self) -> None:
        """Remove the volume."""
        self._ask("volume", "rm", "photos")

    def _ask(self, *words: str) -> None:
        try:
            self.engine.docker(*words)
        except DockerError as error:
            raise Shown(error.stderr) from error


@attrs.frozen
class OfPodman:
    """A user of podman."""

    podman: Podman

    def create(self) -> None:
        """Create the volume."""
        words = [word for option in OPTIONS for word in ("--opt", option)]
        self._ask("volume", "create", "--driver", "volplugin", *words, "photos")

    def run(self) -> None:
        """Have a container write to the volume and end."""
        try:
            self.podman.run("--rm", "-v", "photos:/d", IMAGE, "touch", "/d/x")
        except PodmanError as error:
            raise Shown(str(error)) from error

    def remove(self) -> None:
        """Remove the volume."""
        self._ask("volume", "rm", "photos")

    def _ask(self, *words: str) -> None:
        try:
            self.podman(*words)
        except PodmanError as error:
            raise Shown(str(error)) from error


@attrs.frozen
class Site:
    """A host with both engines, the plugin, and the bad plugin behind it."""

    plugin: Plugin
    bad: BadProcess
    users: dict[str, User]

    def fail(self, verb: str, fault: str) -> None:
        """Have calls of ``verb`` fail from now on."""
        kind, _ = FAULTS[fault]
        if kind:
            self.bad.fail(verb, kind)
        else:
            self.bad.listen("refuse")


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    """The site of all tests here."""
    engine = Engine(config=CONFIG)
    with contextlib.ExitStack() as stack:
        stack.callback(engine.host.close)
        folder = engine.host.folder / "bad"
        folder.mkdir()
        bad = BadProcess(folder, DOCKER_SOCKET.parent, host=engine.host)
        stack.callback(bad.close)
        bad.start()
        stack.callback(engine.plugin.close)
        stack.callback(engine.docker.close)
        engine.start()
        podman = Podman(engine.host)
        podman.load_images()
        stack.callback(podman.clear)
        engine.plugin.client.create("other")
        users: dict[str, User] = {
            "docker": OfDocker(engine),
            "podman": OfPodman(podman),
        }
        yield Site(engine.plugin, bad, users)
        engine.plugin.client.remove("other")


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("verb", STEPS)
@pytest.mark.parametrize("name", ["docker", "podman"])
def test_fault(site: Site, name: str, verb: str, fault: str) -> None:
    """The user sees the error, or what was asked for; both sides agree afterwards."""
    user, bad, plugin = site.users[name], site.bad, site.plugin
    if verb == "Activate":
        _lose_activation(site, user)
    steps: dict[str, Callable[[], None]] = {
        "create": user.create,
        "run": user.run,
        "remove": user.remove,
    }
    failing = STEPS[verb] or "run"
    is_there = False
    for step, act in steps.items():
        if step != failing:
            act()
            is_there = step != "remove"
            continue
        site.fail(verb, fault)
        told = _see(site, act)
        bad.heal()
        if not _is_told(verb, fault):
            assert told == "", told
            is_there = step != "remove"
        else:
            assert re.search(FAULTS[fault][1], told), told
            assert "plugin bad" in told
            assert ("photos" in plugin.client.list()) is is_there
            act()  # once more, and it works
            is_there = step != "remove"
        if is_there:
            assert plugin.client.get("photos")["Status"]["driver"] == "plugin"
    assert set(plugin.client.list()) == {"other"}
    assert bad.client.list() == {}


def _lose_activation(site: Site, user: User) -> None:
    """Have the plugin be one that is to be activated before the next call."""
    site.bad.listen("refuse")
    with pytest.raises(Shown, match="Connection refused"):
        user.create()
    site.bad.heal()


def _is_told(verb: str, fault: str) -> bool:
    """Tell whether the user sees an error of the step in which ``verb`` fails."""
    if not STEPS[verb]:
        # Never called: but a plugin that is not there mounts nothing.
        return fault == "refused"
    if verb == "Get":
        return fault not in SAYS_NO  # that there is none, which List confirms
    # A detach that fails is tried again, and no trouble of a container that has ended.
    return verb != "Unmount" or fault == "refused"


def _see(site: Site, act: Callable[[], None]) -> str:
    """Return what a user is told of a step, during which all else goes on as ever."""
    told: list[str] = []

    def ask() -> None:
        try:
            act()
        except Shown as error:
            told.append(str(error))

    asking = threading.Thread(target=ask)
    asking.start()
    quickest = min(_time_of_another(site) for _ in range(3))
    asking.join(60)
    assert not asking.is_alive()
    assert quickest < 0.1, "another volume's calls wait for the plugin that fails"
    return "".join(told)


def _time_of_another(site: Site) -> float:
    client = site.plugin.client
    begun = time.monotonic()
    client.list()
    client.get("other")
    client.mount("other", "id")
    client.unmount("other", "id")
    return time.monotonic() - begun
