"""The LevelDB layer: schema and migrations, all or nothing, a reserve of space."""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import plyvel
import pytest

from volplugin import failpoints
from volplugin.errors import NoSpace, StoreCorrupt, Unavailable
from volplugin.store.database import Database, backup_of
from volplugin.store.reserve import PIECE, SIZE, Reserve

Pairs = Mapping[bytes, bytes]


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    """Where the database is."""
    yield tmp_path / "database"
    failpoints.arm("")


def shout(pairs: Pairs) -> Pairs:
    """Migrate by changing each value."""
    return {key: value.upper() for key, value in pairs.items()}


def rename(pairs: Pairs) -> Pairs:
    """Migrate by changing each key, and leaving some out."""
    return {b"new/" + key: value for key, value in pairs.items() if key != b"gone"}


def content(path: Path) -> dict[bytes, bytes]:
    """Read a closed database past our own code."""
    database = plyvel.DB(str(path))
    try:
        with database.iterator() as iterator:
            return dict(iterator)
    finally:
        database.close()


def fill(path: Path, pairs: Pairs) -> None:
    """Make a database of the first schema with ``pairs`` in it."""
    database = Database(str(path))
    assert database.load() == {}
    database.write(pairs.items(), sync=True)
    database.close()


def test_new(path: Path) -> None:
    """A new database has the current schema and nothing else."""
    fill(path, {})
    assert content(path) == {b"schema": b"1"}
    database = Database(str(path), [shout])
    assert database.load() == {}
    database.close()
    assert content(path) == {b"schema": b"2"}


def test_migrations(path: Path) -> None:
    """An old database passes through each step that it lacks, once."""
    fill(path, {b"a": b"one", b"gone": b"two"})
    database = Database(str(path), [shout])
    assert database.load() == {b"a": b"ONE", b"gone": b"TWO"}
    database.close()
    for _ in range(2):
        database = Database(str(path), [shout, rename])
        assert database.load() == {b"new/a": b"ONE"}
        database.close()
        assert content(path) == {b"schema": b"3", b"new/a": b"ONE"}


def test_a_migrated_store_is_kept(path: Path) -> None:
    """The store as it was lies beside the new one, and can take its place again."""
    fill(path, {b"a": b"one", b"gone": b"two"})
    old = content(path)
    for _ in range(2):  # a second time over the copy of the first
        database = Database(str(path), [shout, rename])
        database.load()
        database.close()
        kept = Path(backup_of(str(path), 1))
        assert content(kept) == old
        assert {each.name for each in path.parent.iterdir()} == {path.name, kept.name}
        shutil.rmtree(path)
        kept.rename(path)
    database = Database(str(path), [])
    assert database.load() == {b"a": b"one", b"gone": b"two"}
    database.close()


def test_a_store_that_can_not_be_kept_is_not_migrated(path: Path) -> None:
    """Without room for the copy the error says so, and nothing has changed."""
    fill(path, {b"a": b"one"})
    blocked = Path(f"{backup_of(str(path), 1)}.new")
    blocked.write_text("in the way")
    database = Database(str(path), [shout])
    with pytest.raises(Unavailable, match=r"is not migrated, as its copy .*schema-1"):
        database.load()
    database.close()
    assert content(path) == {b"schema": b"1", b"a": b"one"}
    blocked.unlink()
    failpoints.arm("store.write=error:28*1")
    database = Database(str(path), [shout])
    with pytest.raises(NoSpace, match="full disk"):
        database.load()
    database.close()
    assert content(path) == {b"schema": b"1", b"a": b"one"}


@pytest.mark.parametrize("point", ["store.write", "store.sync"])
def test_failed_migration(path: Path, point: str) -> None:
    """A migration that can't be written leaves the old schema or the new, whole."""

    def last(pairs: Pairs) -> Pairs:
        failpoints.arm(f"{point}=error:28*1")  # the copy was written by then
        return rename(pairs)

    fill(path, {b"a": b"one", b"gone": b"two"})
    database = Database(str(path), [shout, last])
    with pytest.raises(NoSpace):
        database.load()
    database.close()
    old = {b"schema": b"1", b"a": b"one", b"gone": b"two"}
    new = {b"schema": b"3", b"new/a": b"ONE"}
    assert content(path) == (old if point == "store.write" else new)
    database = Database(str(path), [shout, rename])
    assert database.load() == {b"new/a": b"ONE"}
    database.close()


def test_failing_step(path: Path) -> None:
    """A migration that raises changes nothing."""

    def broken(pairs: Pairs) -> Pairs:
        raise ZeroDivisionError

    fill(path, {b"a": b"one"})
    database = Database(str(path), [shout, broken])
    with pytest.raises(ZeroDivisionError):
        database.load()
    database.close()
    assert content(path) == {b"schema": b"1", b"a": b"one"}


def test_newer_schema(path: Path) -> None:
    """A database of a newer version is refused, versions named, and unchanged."""
    fill(path, {b"a": b"one"})
    database = Database(str(path), [shout, rename])
    database.load()
    database.close()
    before = content(path)
    database = Database(str(path), [shout])
    with pytest.raises(StoreCorrupt, match=r"has schema 3, .* knows 1 to 2") as caught:
        database.load()
    database.close()
    assert content(path) == before
    assert "schema-" not in str(caught.value)  # there is none of schema 2
    database = Database(str(path))
    with pytest.raises(StoreCorrupt, match=r"or put .*database\.schema-1 in its place"):
        database.load()
    database.close()
    assert content(path) == before


@pytest.mark.parametrize("schema", [None, b"", b"two", b"0", b"-1"])
def test_bad_schema(path: Path, schema: bytes | None) -> None:
    """Pairs without a sane schema are not volplugin's."""
    fill(path, {b"a": b"one"})
    database = plyvel.DB(str(path))
    if schema is None:
        database.delete(b"schema")
    else:
        database.put(b"schema", schema)
    database.close()
    opened = Database(str(path))
    with pytest.raises(StoreCorrupt, match="schema"):
        opened.load()
    opened.close()


@pytest.mark.parametrize("point", ["store.write", "store.sync"])
def test_write_after_failure(path: Path, point: str) -> None:
    """After a failed write the next ones are readable at the next start."""
    fill(path, {})
    database = Database(str(path))
    database.load()
    failpoints.arm(f"{point}=error:5*1")
    with pytest.raises(Exception, match=r"cannot be written: .*Input/output error"):
        database.write([(b"a", b"one")], sync=True)
    database.write([(b"b", b"two"), (b"never there", None)], sync=True)
    database.close()
    database.close()
    database = Database(str(path))
    pairs = database.load()
    database.close()
    assert pairs == {b"b": b"two"} | ({} if point == "store.write" else {b"a": b"one"})


def test_unfinished_recover(path: Path) -> None:
    """Where a rebuilt store waits to take its place, no empty one is made instead."""
    path.with_name("database.new").mkdir()
    with pytest.raises(StoreCorrupt, match="was not finished: run it again"):
        Database(str(path))
    assert not path.exists()


def test_many_writes(path: Path) -> None:
    """What no longer fits in the log goes on in tables, and all of it is read."""
    fill(path, {})
    database = Database(str(path))
    database.load()
    value = b"x" * 4096
    for block in range(12):
        keys = [b"%d/%d" % (block, number) for number in range(256)]
        database.write([(key, value + key) for key in keys], sync=False)
    database.close()
    assert list(path.glob("*.ldb"))
    database = Database(str(path))
    pairs = database.load()
    database.close()
    assert len(pairs) == 12 * 256
    assert all(found == value + key for key, found in pairs.items())


def test_reserve(tmp_path: Path) -> None:
    """The reserve takes up real space and gives it back piece by piece."""
    reserve, file = Reserve(str(tmp_path)), tmp_path / "reserve"
    assert reserve.give() is False
    reserve.keep()
    assert file.stat().st_blocks * 512 >= SIZE
    assert reserve.give() is True
    assert file.stat().st_size == SIZE - PIECE
    reserve.keep()
    assert file.stat().st_size == SIZE
    for _ in range(SIZE // PIECE):
        assert reserve.give() is True
    assert reserve.give() is False


def test_reserve_of_an_earlier_life(tmp_path: Path) -> None:
    """A reserve that is there already is known for one."""
    Reserve(str(tmp_path)).keep()
    later = Reserve(str(tmp_path))
    assert later.give() is True
    later.keep()
    assert (tmp_path / "reserve").stat().st_size == SIZE
