"""Who holds a volume: each rule, and what holds for any order of calls."""

from collections.abc import Callable

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from volplugin import accounting
from volplugin.model import Client, Holder, Mounts

DOCKERD = Client(program="dockerd", pid=10, started=100)
RESTARTED = Client(program="dockerd", pid=11, started=200)
REUSED_PID = Client(program="dockerd", pid=10, started=300)
PODMAN = Client(program="podman", pid=20, started=100)
NEXT_PODMAN = Client(program="podman", pid=21, started=101)
POUCHD = Client(program="pouchd", pid=30, started=100)
OTHER = Client(program="nomad", pid=40, started=100)
CLIENTS = (DOCKERD, RESTARTED, REUSED_PID, PODMAN, NEXT_PODMAN, POUCHD, OTHER, Client())

NONE = Mounts(boot_id="boot")


def mount(mounts: Mounts, holder_id: str, client: Client) -> Mounts:
    """A Mount that was answered."""
    claimed = accounting.claim(mounts, holder_id, client, now="t", server="s")
    return accounting.confirm(claimed, holder_id)


def counts(mounts: Mounts) -> dict[str, int]:
    return {holder_id: holder.count for holder_id, holder in mounts.holders.items()}


def after(*calls: tuple[str, str, Client]) -> dict[str, int]:
    """Return the counts after ``("M" or "U", ID, client)`` calls."""
    mounts = NONE
    for call, holder_id, client in calls:
        if call == "M":
            mounts = mount(mounts, holder_id, client)
        else:
            mounts = accounting.release(mounts, holder_id, client)
    return counts(mounts)


def test_a_repeated_id_is_counted() -> None:
    """`docker cp` repeats the ID of the container's mount and releases it once."""
    assert after(("M", "x", DOCKERD), ("M", "x", DOCKERD)) == {"x": 2}
    assert after(*[("M", "x", DOCKERD)] * 2, ("U", "x", DOCKERD)) == {"x": 1}
    assert after(*[("M", "x", DOCKERD)] * 2, *[("U", "x", DOCKERD)] * 2) == {}


@pytest.mark.parametrize("next_life", [RESTARTED, REUSED_PID, OTHER])
def test_a_new_life_begins_at_one(next_life: Client) -> None:
    """The Unmounts of a life that ended never come, also where its pid came again."""
    twice = [("M", "x", DOCKERD)] * 2
    assert after(*twice, ("M", "x", next_life)) == {"x": 1}
    assert after(*twice, ("M", "x", next_life), ("U", "x", next_life)) == {}


def test_a_new_life_releases_all_of_an_id() -> None:
    """An Unmount by the next life ends an ID that it never mounted."""
    assert after(*[("M", "x", DOCKERD)] * 3, ("U", "x", RESTARTED)) == {}


@pytest.mark.parametrize("client", [PODMAN, POUCHD])
def test_who_counts_for_itself_holds_once(client: Client) -> None:
    """Podman and Pouch ask again for what they hold, and release it all at once."""
    assert after(*[("M", "x", client)] * 3) == {"x": 1}
    assert after(("M", "1", client), ("M", "2", client), ("U", "3", client)) == {}


def test_podman_is_one_program() -> None:
    """Each podman command is a process of its own; they count together."""
    assert after(("M", "c", PODMAN), ("U", "c", NEXT_PODMAN)) == {}


def test_engines_do_not_release_each_others() -> None:
    """One that counts for itself releases its own IDs and no others."""
    calls = [("M", "x", DOCKERD), ("M", "y", PODMAN), ("M", "z", POUCHD)]
    assert after(*calls, ("U", "y", PODMAN)) == {"x": 1, "z": 1}
    assert after(*calls, ("U", "w", POUCHD)) == {"x": 1, "y": 1}
    assert after(*calls, ("U", "x", PODMAN)) == {"x": 1, "z": 1}


def test_an_unknown_id_of_a_stable_client() -> None:
    """What dockerd did not mount changes nothing when it is unmounted."""
    assert after(("U", "x", DOCKERD)) == {}
    assert after(("M", "x", DOCKERD), ("U", "y", DOCKERD)) == {"x": 1}


def test_an_unknown_id_of_another_client() -> None:
    """Of a program that is not known it means its one ID, where it has but one."""
    assert after(("M", "x", OTHER), ("U", "y", OTHER)) == {}
    two = [("M", "x", OTHER), ("M", "y", OTHER)]
    assert after(*two, ("U", "z", OTHER)) == {"x": 1, "y": 1}
    assert after(("M", "x", DOCKERD), ("U", "y", OTHER)) == {"x": 1}
    # However often the one was mounted: an ID that is new each time is no count.
    assert after(*[("M", "x", OTHER)] * 2, ("U", "y", OTHER)) == {}


def test_pending_until_confirmed() -> None:
    """A claim is pending until its answer, and confirming settles one."""
    claimed = accounting.claim(NONE, "x", DOCKERD, now="t", server="s")
    claimed = accounting.claim(claimed, "x", DOCKERD, now="t", server="s")
    assert claimed.holders["x"] == Holder(
        id="x", count=2, pending=2, client=DOCKERD, since="t", server="s"
    )
    confirmed = accounting.confirm(claimed, "x")
    assert (confirmed.holders["x"].count, confirmed.holders["x"].pending) == (2, 1)
    twice = accounting.confirm(accounting.confirm(confirmed, "x"), "x")
    assert twice.holders["x"].pending == 0


def test_drop_pending() -> None:
    """What a dead server granted and never answered is taken back, the rest is not."""
    mounts = mount(mount(NONE, "x", DOCKERD), "y", DOCKERD)
    mounts = accounting.claim(mounts, "x", DOCKERD, now="t", server="s")
    mounts = accounting.claim(mounts, "z", DOCKERD, now="t", server="s")
    dropped = accounting.drop_pending(mounts)
    assert counts(dropped) == {"x": 1, "y": 1}
    assert all(holder.pending == 0 for holder in dropped.holders.values())
    assert accounting.drop_pending(dropped) == dropped


def test_nothing_is_changed_in_place() -> None:
    """Each function returns a new value and leaves its argument."""
    before = mount(NONE, "x", DOCKERD)
    copy = attrs.evolve(before, holders=dict(before.holders))
    mount(before, "x", DOCKERD)
    mount(before, "y", DOCKERD)
    accounting.release(before, "x", DOCKERD)
    accounting.drop_pending(before)
    assert before == copy
    assert counts(NONE) == {}


def test_attached_is_not_touched() -> None:
    """Whether it is attached is not for the accounting to say."""
    start = Mounts(boot_id="b", attached=True)
    for end in (mount(start, "x", DOCKERD), accounting.release(start, "x", PODMAN)):
        assert (end.boot_id, end.attached) == ("b", True)


@pytest.mark.parametrize(
    ("holder", "text"),
    [
        (
            Holder(id="3f2a" * 16, client=DOCKERD, since="t"),
            "'3f2a3f2a3f2a…' (dockerd, pid 10, since t)",
        ),
        (
            Holder(id="short", client=PODMAN, since="t"),
            "'short' (podman, pid 20, since t)",
        ),
        (Holder(id="", client=Client(), since="t"), "'' (a client, since t)"),
        (Holder(id="a\n'b", client=Client(program="x", pid=1), since="t"), None),
    ],
)
def test_describe(holder: Holder, text: str | None) -> None:
    """An error names a holder on one line, whatever its ID."""
    described = accounting.describe(holder)
    assert text is None or described == text
    assert described.isprintable()


CALLS = st.lists(
    st.tuples(
        st.sampled_from(["claim", "confirm", "release", "drop"]),
        st.sampled_from(["", "x", "y", "z"]),
        st.sampled_from(CLIENTS),
    ),
    max_size=40,
)


@given(calls=CALLS)
def test_counts_are_never_negative(calls: list[tuple[str, str, Client]]) -> None:
    """In any order of calls a holder counts at least one, and never less than pends."""
    steps: dict[str, Callable[[Mounts, str, Client], Mounts]] = {
        "claim": lambda m, i, c: accounting.claim(m, i, c, now="t", server="s"),
        "confirm": lambda m, i, c: accounting.confirm(m, i) if i in m.holders else m,
        "release": accounting.release,
        "drop": lambda m, i, c: accounting.drop_pending(m),
    }
    mounts = NONE
    for step, holder_id, client in calls:
        mounts = steps[step](mounts, holder_id, client)
        for key, holder in mounts.holders.items():
            assert key == holder.id
            assert 0 <= holder.pending <= holder.count
            assert holder.count >= 1


@given(calls=CALLS, client=st.sampled_from(CLIENTS), holder_id=st.sampled_from("xy"))
def test_a_mount_always_holds(
    calls: list[tuple[str, str, Client]], client: Client, holder_id: str
) -> None:
    """After an answered Mount the ID holds, whatever was before, until an Unmount."""
    mounts = NONE
    for step, each, whose in calls:
        if step == "claim":
            mounts = mount(mounts, each, whose)
        elif step == "release":
            mounts = accounting.release(mounts, each, whose)
    mounts = mount(mounts, holder_id, client)
    assert mounts.holders[holder_id].client == client
    assert holder_id in accounting.drop_pending(mounts).holders


@given(numbers=st.permutations(range(6)), client=st.sampled_from(CLIENTS))
def test_as_many_unmounts_as_mounts(numbers: list[int], client: Client) -> None:
    """Mounts and Unmounts that match leave nothing, in whatever order they end."""
    ids = [f"id{number // 2}" for number in range(6)]
    mounts = NONE
    for each in ids:
        mounts = mount(mounts, each, client)
    for number in numbers:
        mounts = accounting.release(mounts, ids[number], client)
    assert counts(mounts) == {}


def test_who_never_unmounts_is_told_of() -> None:
    """With the command that lets go of it; the others' holds end by themselves."""
    pouch, docker = (
        Holder(id=program, client=Client(program=program, pid=7))
        for program in ("pouchd", "dockerd")
    )
    told = accounting.never_released("db", [docker, pouch])
    assert told is not None
    assert told.startswith("by pouchd, whose last release never unmounts: ")
    assert "`volplugin volume release db`" in told
    assert accounting.never_released("db", [docker]) is None
    assert accounting.never_released("db", []) is None
