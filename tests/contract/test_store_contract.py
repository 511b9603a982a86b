"""The store's contract: atomic, ordered, shared syncs, a mirror of what holds."""

import asyncio
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import plyvel
import pytest
from hypothesis import given
from hypothesis import strategies as st

from volplugin import failpoints
from volplugin.errors import NoSpace, StoreCorrupt
from volplugin.model import Client, Holder, Mounts, State, Volume
from volplugin.store import records
from volplugin.store.store import Change, DropVolume, PutMounts, PutVolume, Store

Opener = Callable[[], Store]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opener]:
    """Open the store of this test; opened again, the one before is closed."""
    stores: list[Store] = []

    def open_store() -> Store:
        if stores:
            stores[-1].close()
        stores.append(Store(str(tmp_path / "store")))
        return stores[-1]

    yield open_store
    failpoints.arm("")
    if stores:
        stores[-1].close()


@pytest.fixture
def store(opened: Opener) -> Store:
    """A new store."""
    return opened()


def volume(name: str, **fields: Any) -> Volume:
    """Return a record with ``name``."""
    given = {"state": State.READY, "options": {"k": "v"}, **fields}
    return Volume(
        name=name,
        id=f"id-{name}",
        backend="local",
        driver="local",
        mountpoint=f"/volumes/{name}",
        created_at="2024-01-01T00:00:00.000Z",
        **given,
    )


def mounts(*holders: str) -> Mounts:
    """Return mounts held by ``holders``."""
    client = Client(program="dockerd", pid=1, started=2)
    return Mounts(
        boot_id="boot",
        attached=True,
        holders={name: Holder(id=name, client=client) for name in holders},
    )


def run(work: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine on an event loop of its own."""
    asyncio.run(work)


def commit(store: Store, *changes: Change, sync: bool = True) -> None:
    """Commit from outside an event loop."""
    run(store.commit(*changes, sync=sync))


def test_commit(opened: Opener) -> None:
    """What is committed is shown, and is there when opened again."""
    store = opened()
    commit(store, PutVolume(volume("a")), PutMounts("a", mounts("x")))
    for shown in (store, opened()):
        assert dict(shown.volumes) == {"a": volume("a")}
        assert dict(shown.mounts) == {"a": mounts("x")}


def test_without_sync(opened: Opener) -> None:
    """A commit without a sync is there too when the store is opened again."""
    store = opened()
    commit(store, PutMounts("a", mounts("x")), sync=False)
    assert dict(opened().mounts) == {"a": mounts("x")}


def test_replace_and_drop(opened: Opener) -> None:
    """Putting again replaces; dropping takes the volume with its mounts."""
    store = opened()
    commit(store, PutVolume(volume("a")), PutMounts("a", mounts("x")))
    commit(store, PutVolume(volume("b")), PutMounts("b", mounts()))
    commit(store, PutVolume(volume("a", state=State.REMOVING)))
    assert store.volumes["a"].state is State.REMOVING
    commit(store, DropVolume("a"), DropVolume("never there"))
    for shown in (store, opened()):
        assert set(shown.volumes) == {"b"}
        assert set(shown.mounts) == {"b"}


def test_mirror_is_read_only(store: Store) -> None:
    """Nobody changes the mirror but a commit."""
    with pytest.raises(TypeError):
        store.volumes["a"] = volume("a")  # type: ignore[index]
    with pytest.raises(TypeError):
        store.mounts["a"] = mounts()  # type: ignore[index]


def test_generation(store: Store) -> None:
    """The generation grows with each change of volumes, not with mounts."""
    seen = [store.generation]
    commit(store, PutVolume(volume("a")))
    seen.append(store.generation)
    commit(store, DropVolume("a"))
    seen.append(store.generation)
    assert sorted(set(seen)) == seen
    commit(store, PutMounts("a", mounts()))
    assert store.generation == seen[-1]


def test_shown_only_when_committed(store: Store) -> None:
    """While a write is under way the mirror shows what was before."""

    async def work() -> None:
        failpoints.arm("store.write=sleep:0.1*1")
        task = asyncio.create_task(store.commit(PutVolume(volume("a"))))
        await asyncio.sleep(0.03)
        assert not task.done()
        assert dict(store.volumes) == {}
        await task
        assert set(store.volumes) == {"a"}

    run(work())


def test_shared_sync(opened: Opener) -> None:
    """Commits that are asked for at once share a write, and all of them hold."""
    store = opened()

    async def work() -> None:
        failpoints.arm("store.write=sleep:0.02")
        started = time.monotonic()
        names = [f"v{number}" for number in range(200)]
        await asyncio.gather(*(store.commit(PutVolume(volume(n))) for n in names))
        # One after the other they take 4 s; they need two or three writes.
        assert time.monotonic() - started < 1
        assert set(store.volumes) == set(names)

    run(work())
    assert len(opened().volumes) == 200


def test_order(opened: Opener) -> None:
    """Of commits to one name, the one that was asked for last holds."""
    store = opened()

    async def work() -> None:
        last = [volume("a", options={"n": str(number)}) for number in range(50)]
        await asyncio.gather(*(store.commit(PutVolume(v)) for v in last))
        assert store.volumes["a"] == last[-1]

    run(work())
    assert opened().volumes["a"].options == {"n": "49"}


@pytest.mark.parametrize("point", ["store.write", "store.sync"])
def test_failed_commit(opened: Opener, point: str) -> None:
    """A commit that fails changes nothing, whatever it left on disk."""
    store = opened()
    commit(store, PutVolume(volume("kept")), PutMounts("kept", mounts("x")))
    failpoints.arm(f"{point}=error:28*7")  # each commit, and all put-backs but one
    for change in (
        PutVolume(volume("new")),
        PutVolume(volume("kept", state=State.REMOVING)),
        PutMounts("kept", mounts()),
        DropVolume("kept"),
    ):
        with pytest.raises(NoSpace, match="full disk"):
            commit(store, change)
    assert dict(store.volumes) == {"kept": volume("kept")}
    assert dict(store.mounts) == {"kept": mounts("x")}
    commit(store, PutVolume(volume("next")))
    for shown in (store, opened()):
        assert dict(shown.volumes) == {
            "kept": volume("kept"),
            "next": volume("next"),
        }
        assert dict(shown.mounts) == {"kept": mounts("x")}


@pytest.mark.parametrize("point", ["store.write", "store.sync"])
def test_failed_commit_is_put_back(opened: Opener, point: str) -> None:
    """What failed is not found by the next start, even if nothing is written since."""
    store = opened()
    commit(store, PutVolume(volume("kept")))
    failpoints.arm(f"{point}=error:28*1")
    with pytest.raises(NoSpace):
        commit(store, PutVolume(volume("kept", state=State.REMOVING)))
    assert dict(opened().volumes) == {"kept": volume("kept")}


def test_failed_batch(opened: Opener) -> None:
    """Of a batch that fails nothing holds; each who shared the write is told."""
    store = opened()

    async def work() -> None:
        failpoints.arm("store.write=sleep:0.05*1")
        first = asyncio.create_task(store.commit(PutVolume(volume("first"))))
        await asyncio.sleep(0.02)
        failpoints.arm("store.write=error:28*1")
        results = await asyncio.gather(
            store.commit(PutVolume(volume("a")), PutVolume(volume("b"))),
            store.commit(PutVolume(volume("c"))),
            return_exceptions=True,
        )
        await first
        assert [type(result) for result in results] == [NoSpace, NoSpace]
        assert set(store.volumes) == {"first"}

    run(work())
    assert set(opened().volumes) == {"first"}


def test_cancelled_commit(opened: Opener) -> None:
    """A caller that leaves does not stop the write, and the mirror follows it."""
    store = opened()

    async def work() -> None:
        failpoints.arm("store.write=sleep:0.05*1")
        task = asyncio.create_task(store.commit(PutVolume(volume("a"))))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert dict(store.volumes) == {}
        await store.commit(PutVolume(volume("b")))
        assert set(store.volumes) == {"a", "b"}

    run(work())
    assert set(opened().volumes) == {"a", "b"}


def test_close(opened: Opener) -> None:
    """Closing finishes what was asked for; closing again does nothing."""
    store = opened()

    async def work() -> None:
        failpoints.arm("store.write=sleep:0.05*1")
        tasks = [
            asyncio.create_task(store.commit(PutVolume(volume(name))))
            for name in ("a", "b")
        ]
        await asyncio.sleep(0)
        await asyncio.to_thread(store.close)
        await asyncio.gather(*tasks)

    run(work())
    store.close()
    assert set(opened().volumes) == {"a", "b"}


def test_second_opener(store: Store, tmp_path: Path) -> None:
    """A store is one process's."""
    code = "import sys; from volplugin.store.store import Store; Store(sys.argv[1])"
    other = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "store"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert other.returncode != 0
    assert "is in use by another process" in other.stderr
    commit(store, PutVolume(volume("a")))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (b"volume/a", b"garbage"),
        (b"volume/a", b"{}"),
        (b"volume/a", b'{"name":"a"}'),
        (b"mounts/a", b'{"boot_id":"b","holders":[]}'),
        (b"snapshot/a", b"{}"),
        (b"", b""),
    ],
)
def test_bad_record(opened: Opener, tmp_path: Path, key: bytes, value: bytes) -> None:
    """One record that can't be read makes the store one that can't be trusted."""
    store = opened()
    commit(store, PutVolume(volume("a")))
    store.close()
    database = plyvel.DB(str(tmp_path / "store"))
    database.put(key, value)
    database.close()
    with pytest.raises(StoreCorrupt, match="volplugin recover"):
        Store(str(tmp_path / "store"))


texts = st.text(max_size=20)
clients = st.builds(
    Client, program=texts, pid=st.integers(0, 2**22), started=st.integers(0, 2**63)
)
holders = st.builds(
    Holder,
    id=texts,
    count=st.integers(1, 10**6),
    pending=st.integers(0, 10**6),
    client=clients,
    since=texts,
    server=texts,
)


@given(
    st.builds(
        Volume,
        name=texts,
        id=texts,
        backend=texts,
        driver=texts,
        options=st.dictionaries(texts, texts, max_size=5),
        facts=st.dictionaries(texts, texts, max_size=5),
        mountpoint=texts,
        created_at=texts,
        state=st.sampled_from(State),
    )
)
def test_volume_round_trip(record: Volume) -> None:
    """A volume's record is read as it was written, and written the same again."""
    data = records.encode(record)
    assert records.decode(data, Volume) == record
    assert records.encode(records.decode(data, Volume)) == data
    assert b"\n" not in data


@given(
    st.builds(
        Mounts,
        boot_id=texts,
        attached=st.booleans(),
        holders=st.dictionaries(texts, holders, max_size=4),
    )
)
def test_mounts_round_trip(record: Mounts) -> None:
    """A record of mounts is read as it was written."""
    assert records.decode(records.encode(record), Mounts) == record


@given(st.binary(max_size=60))
def test_garbage(data: bytes) -> None:
    """What is no record is refused by one kind of error."""
    with pytest.raises(ValueError, match="no record of a Volume"):
        records.decode(data, Volume)
    with pytest.raises(ValueError, match="no record of a Mounts"):
        records.decode(data, Mounts)
