"""Random calls of several clients, and restarts, against a model of the promise."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Final

import attrs
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from peers import Life, Lives, host_of, lives_of, serving_in_host
from support.plugin import Plugin

pytestmark = pytest.mark.root

NAMES: Final = ("v", "w")
IDS: Final = ("1" * 64, "2" * 64)  # few, so that calls meet
PROGRAMS: Final = ("dockerd", "dockerd", "podman", "pouchd", "nomad")

DAEMONS: Final = {"dockerd", "pouchd"}
COUNT_FOR_THEMSELVES: Final = {"podman", "pouchd"}
HAVE_STABLE_IDS: Final = {"dockerd", "podman"}

TMPFS: Final = {"driver": "tmpfs"}
SMALL: Final = {"driver": "tmpfs", "size": "1m"}
LOCAL: Final[Mapping[str, str]] = {}
PRIVATE: Final = {"mode": "0700"}
WRITTEN_OTHERWISE: Final[list[tuple[Mapping[str, str] | None, Mapping[str, str]]]] = [
    (None, LOCAL),
    ({"driver": "local", "selector.a": "b"}, LOCAL),
    ({"opt.mode": "700"}, PRIVATE),
    ({"mode": "0700", "backend": "local"}, PRIVATE),
    ({"driver": "tmpfs", "size": "64MiB", "exec": "false"}, TMPFS),
    ({"opt.driver": "tmpfs"}, TMPFS),
    ({"driver": "tmpfs", "opt.size": "1024k"}, SMALL),
    (TMPFS, TMPFS),
    (SMALL, SMALL),
]
"""What a user may write, and which of four kinds of volume it asks for."""
WRONG: Final = [{"size": "1m"}, {"driver": "none"}, {"driver": "tmpfs", "size": "0"}]


@attrs.define
class Holder:
    """A mount ID that holds a volume, in the model."""

    client: Life
    lived_through: int  # the server's restarts before it
    count: int = 1


@attrs.define
class Volume:
    """A volume, in the model."""

    kind: Mapping[str, str]
    holders: dict[str, Holder] = attrs.field(factory=dict)

    @property
    def is_tmpfs(self) -> bool:
        """Whether it is mounted while it is held."""
        return self.kind.get("driver") == "tmpfs"


class Engines(RuleBasedStateMachine):
    """Five clients of four programs and one server; `model` is what they may expect."""

    plugin: ClassVar[Plugin]
    lives: ClassVar[Lives]
    clients: ClassVar[list[Life]]
    dead: ClassVar[set[Life]]
    restarts: ClassVar[int]

    def __init__(self) -> None:
        super().__init__()
        self.model: dict[str, Volume] = {}
        self.since_restart = 0

    names = st.sampled_from(NAMES)
    ids = st.sampled_from(IDS)
    slots = st.integers(0, len(PROGRAMS) - 1)

    def call(self, slot: int, call: str, **message: Any) -> str | dict[str, Any]:
        """Make a call; return the answer, or the error's text."""
        self.since_restart += 1
        status, answer = self.clients[slot].call(call, message)
        assert status in {200, 500}
        if status == 500:
            prefix = f"{call.lower()} {message['Name']}: "
            assert answer["Err"].startswith(prefix)
            return str(answer["Err"].removeprefix(prefix))
        return answer

    @initialize(asked=st.lists(st.sampled_from(WRITTEN_OTHERWISE), min_size=2))
    def begin(self, asked: list[Any]) -> None:
        for name, each in zip(NAMES, asked, strict=False):
            self.create(0, name, each)

    @rule(slot=slots, name=names, asked=st.sampled_from(WRITTEN_OTHERWISE))
    def create(
        self,
        slot: int,
        name: str,
        asked: tuple[Mapping[str, str] | None, Mapping[str, str]],
    ) -> None:
        options, kind = asked
        answer = self.call(slot, "Create", Name=name, Opts=options)
        known = self.model.setdefault(name, Volume(kind))
        if known.kind == kind:
            assert answer == {}
        else:
            assert str(answer).startswith("it exists with other options: ")

    @rule(slot=slots, name=names, options=st.sampled_from(WRONG))
    def create_wrongly(self, slot: int, name: str, options: dict[str, str]) -> None:
        answer = self.call(slot, "Create", Name=name, Opts=options)
        assert isinstance(answer, str)

    @rule(slot=slots, name=names, holder_id=ids)
    def mount(self, slot: int, name: str, holder_id: str) -> None:
        answer = self.call(slot, "Mount", Name=name, ID=holder_id)
        volume = self.model.get(name)
        if volume is None:
            assert answer == "no such volume"
            return
        assert answer == {"Mountpoint": self.path_of(name)}
        client, known = self.clients[slot], volume.holders.get(holder_id)
        count = 1
        if (
            known is not None
            and known.client is client
            and client.program not in COUNT_FOR_THEMSELVES
        ):
            count = known.count + 1
        volume.holders[holder_id] = Holder(client, Engines.restarts, count)

    @rule(slot=slots, name=names, holder_id=ids)
    def unmount(self, slot: int, name: str, holder_id: str) -> None:
        answer = self.call(slot, "Unmount", Name=name, ID=holder_id)
        volume = self.model.get(name)
        if volume is None:
            assert answer == "no such volume"
            return
        assert answer == {}
        self.release(volume, holder_id, self.clients[slot])

    def held(self) -> list[tuple[str, str, Life]]:
        """Return what is held, by which ID and client."""
        return [
            (name, holder_id, holder.client)
            for name, volume in self.model.items()
            for holder_id, holder in volume.holders.items()
        ]

    def who(self, known: Life, other: int | None) -> int:
        """Return the client of a repeated call: the one before, or any."""
        same = known in self.clients and other is None
        return self.clients.index(known) if same else other or 0

    @precondition(lambda self: bool(self.held()))
    @rule(pick=st.integers(0, 9), other=st.none() | slots)
    def mount_again(self, pick: int, other: int | None) -> None:
        held = self.held()
        name, holder_id, client = held[pick % len(held)]
        self.mount(self.who(client, other), name, holder_id)

    @precondition(lambda self: bool(self.held()))
    @rule(pick=st.integers(0, 9), other=st.none() | slots)
    def unmount_again(self, pick: int, other: int | None) -> None:
        held = self.held()
        name, holder_id, client = held[pick % len(held)]
        self.unmount(self.who(client, other), name, holder_id)

    @precondition(lambda self: bool(self.held()))
    @rule(slot=slots, pick=st.integers(0, 9))
    def remove_what_is_held(self, slot: int, pick: int) -> None:
        held = self.held()
        self.remove(slot, held[pick % len(held)][0])

    def release(self, volume: Volume, holder_id: str, client: Life) -> None:
        """Count an Unmount in the model."""
        holders, program = volume.holders, client.program
        of_program = [i for i, h in holders.items() if h.client.program == program]
        if program in COUNT_FOR_THEMSELVES:
            for each in of_program:
                del holders[each]
        elif holder_id in holders:
            known = holders[holder_id]
            known.count -= 1
            if known.client is not client or not known.count:
                del holders[holder_id]
        elif program not in HAVE_STABLE_IDS and len(of_program) == 1:
            del holders[of_program[0]]
        # What only dead lives of it, or of a daemon, have left is nobody's: there are
        # no containers here.
        if all(
            h.client in self.dead and h.client.program in {program, *DAEMONS}
            for h in holders.values()
        ):
            holders.clear()

    @rule(slot=slots, name=names)
    def remove(self, slot: int, name: str) -> None:
        answer = self.call(slot, "Remove", Name=name)
        volume = self.model.get(name)
        if volume is None:
            assert answer == "no such volume"
        elif any(self.counts(holder) for holder in volume.holders.values()):
            total = sum(holder.count for holder in volume.holders.values())
            plural = "" if total == 1 else "s"
            assert str(answer).startswith(f"in use by {total} mount{plural}: ")
            for holder in volume.holders.values():
                assert f"({holder.client.program}, pid {holder.client.pid}" in answer
        else:
            assert answer == {}
            del self.model[name]

    def counts(self, holder: Holder) -> bool:
        """Return whether an Unmount of this holder is sure to come."""
        return (
            holder.client not in self.dead
            and holder.client.program != "pouchd"
            and holder.lived_through == Engines.restarts
        )

    @rule(slot=slots, name=names)
    def path(self, slot: int, name: str) -> None:
        answer = self.call(slot, "Path", Name=name)
        known = name in self.model
        assert answer == (
            {"Mountpoint": self.path_of(name)} if known else "no such volume"
        )

    @rule(slot=slots)
    def end_a_client(self, slot: int) -> None:
        life = self.clients[slot]
        life.end()
        self.dead.add(life)
        self.clients[slot] = self.lives.begin(life.program)

    @precondition(lambda self: self.since_restart > 10)  # a second each
    @rule(kill=st.booleans())
    def restart(self, kill: bool) -> None:
        self.since_restart = 0
        if kill:
            self.plugin.kill()
        else:
            self.plugin.stop()
        self.plugin.start()
        Engines.restarts += 1

    def path_of(self, name: str) -> str:
        """Return where a volume of the model is."""
        if self.model[name].is_tmpfs:
            return f"/mnt/tmpfs/{name}"
        return f"{self.plugin.root}/local/volumes/{name}"

    @invariant()
    def the_server_agrees(self) -> None:
        client = self.plugin.client
        assert client.list() == {name: self.path_of(name) for name in self.model}
        for name, volume in self.model.items():
            status = client.get(name)["Status"]
            assert status["mounts"] == sum(h.count for h in volume.holders.values())
            assert status["driver"] == volume.kind.get("driver", "local")

    @invariant()
    def the_mount_table_agrees(self) -> None:
        mounts = host_of(self.plugin).mounts()
        found = [m.mountpoint for m in mounts if m.source.startswith("volplugin-")]
        held = [n for n, v in self.model.items() if v.is_tmpfs and v.holders]
        assert sorted(found) == sorted(f"/mnt/tmpfs/{name}" for name in held)

    def teardown(self) -> None:
        for name, volume in list(self.model.items()):
            for holder_id, holder in list(volume.holders.items()):
                while holder_id in volume.holders and holder.client not in self.dead:
                    holder.client.unmount(name, holder_id)
                    self.release(volume, holder_id, holder.client)
            self.plugin.client.remove(name)
        self.model.clear()
        self.the_server_agrees()
        self.the_mount_table_agrees()


@pytest.fixture
def served() -> Iterator[None]:
    """A server and five clients, which all examples use one after another."""
    with serving_in_host(sweep=3600) as plugin, lives_of(plugin) as lives:
        Engines.plugin, Engines.lives, Engines.dead = plugin, lives, set()
        Engines.clients = [lives.begin(program) for program in PROGRAMS]
        Engines.restarts = 0
        yield


@pytest.mark.usefixtures("served")
def test_random_calls() -> None:
    """After each call the model, the server and the mount table agree."""
    run_state_machine_as_test(
        Engines,
        settings=settings(
            deadline=None,
            max_examples=40,
            stateful_step_count=40,
            suppress_health_check=list(HealthCheck),
        ),
    )
