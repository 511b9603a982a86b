"""The LevelDB database below the store: open, verify, migrate, write, reopen.

The only module that imports plyvel. All calls block and belong to one thread at a time.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, TypeVar

import plyvel

from volplugin import failpoints
from volplugin.errors import NoSpace, StoreCorrupt, Unavailable, VolpluginError
from volplugin.store.reserve import Reserve

T = TypeVar("T")

SCHEMA_KEY: Final = b"schema"
UNFINISHED: Final = ".new"
"""Ends the name of a store that `volplugin recover` has built, but not put in place."""

# A migration takes all pairs of its version and returns those of the next one.
Migration = Callable[[Mapping[bytes, bytes]], Mapping[bytes, bytes]]
Write = tuple[bytes, bytes | None]  # a key with its new value, or None to delete it

MIGRATIONS: Final[Sequence[Migration]] = ()
"""Step ``i`` leads from schema ``i + 1`` to ``i + 2``."""


class Database:
    """One LevelDB directory, opened by one process."""

    def __init__(self, path: str, migrations: Sequence[Migration] = MIGRATIONS) -> None:
        self.path = path
        self._migrations = migrations
        self._exists = _has_database(path)
        self._reserve = Reserve(path)
        self._db: plyvel.DB | None = None
        self._with_reserve(self._open)

    def _with_reserve(self, call: Callable[[], T]) -> T:
        """Repeat ``call`` with pieces of the reserve while LevelDB says "disk full"."""
        while True:
            try:
                return call()
            except NoSpace as error:
                full = isinstance(error.__cause__, plyvel.Error)
                if not full or not self._reserve.give():
                    raise

    def _open(self) -> plyvel.DB:
        if not self._exists and os.path.lexists(self.path + UNFINISHED):
            raise StoreCorrupt(
                f"the store {self.path} is missing and a `volplugin recover` was not "
                f"finished: run it again"
            )
        try:
            # paranoid_checks: a damaged log or table is an error here, not silently
            # less data. A record cut off at the end of the log, as a power cut leaves
            # it, is no damage to LevelDB.
            self._db = plyvel.DB(
                self.path, create_if_missing=not self._exists, paranoid_checks=True
            )
        except plyvel.CorruptionError as error:
            raise self._corrupt(error, opening=True) from error
        except plyvel.Error as error:
            if "does not exist" in str(error) or "No such file" in str(error):
                raise self._corrupt(error, opening=True) from error
            raise _translate(error, self.path) from error
        self._exists = True
        return self._db

    def load(self) -> dict[bytes, bytes]:
        """Read every pair with checksums verified, migrated to the current schema.

        What is migrated is kept as it was (see `backup_of`). Raise `StoreCorrupt` for
        damage and for a schema that is newer than this code, `NoSpace` or `Unavailable`
        where it can't be kept, or written; the store is then as it was.
        """
        db = self._db or self._with_reserve(self._open)
        try:
            with db.iterator(verify_checksums=True) as iterator:
                pairs: dict[bytes, bytes] = dict(iterator)
        except plyvel.Error as error:
            raise self._corrupt(error, opening=False) from error
        current = len(self._migrations) + 1
        if not pairs:
            self.write([(SCHEMA_KEY, b"%d" % current)], sync=True)
            return {}
        try:
            version = int(pairs.pop(SCHEMA_KEY))
        except (KeyError, ValueError) as error:
            raise StoreCorrupt(
                f"the store {self.path} has no schema version: it is damaged, or not "
                f"volplugin's. {REMEDY}"
            ) from error
        if version > current or version < 1:
            raise StoreCorrupt(
                f"the store {self.path} has schema {version}, this volplugin knows "
                f"1 to {current}: run the version that wrote it"
                f"{self._way_back(current)}"
            )
        self._reserve.keep()
        return self._migrate(pairs, version) if version < current else pairs

    def _way_back(self, schema: int) -> str:
        kept = backup_of(self.path, schema)
        if not os.path.isdir(kept):
            return ""
        return (
            f", or put {kept} in its place, which is how it was before: volumes made "
            f"since are taken over from disk"
        )

    def _migrate(self, pairs: dict[bytes, bytes], version: int) -> dict[bytes, bytes]:
        self._back_up(pairs, version)
        migrated: Mapping[bytes, bytes] = pairs
        for migration in self._migrations[version - 1 :]:
            migrated = migration(migrated)
        writes: list[Write] = [(key, None) for key in pairs if key not in migrated]
        writes += migrated.items()
        writes.append((SCHEMA_KEY, b"%d" % (len(self._migrations) + 1)))
        self.write(writes, sync=True)  # one batch: the old schema or the new one
        return dict(migrated)

    def _back_up(self, pairs: Mapping[bytes, bytes], version: int) -> None:
        """Write what is about to be migrated into a store of its own, whole or not."""
        kept = backup_of(self.path, version)
        fresh = kept + UNFINISHED
        try:
            # One that is there is of an earlier try, or of an earlier way back.
            shutil.rmtree(fresh, ignore_errors=True)
            copy = Database(fresh, self._migrations[: version - 1])
            try:
                copy.load()
                copy.write(pairs.items(), sync=True)
            finally:
                copy.close()
            shutil.rmtree(kept, ignore_errors=True)
            os.rename(fresh, kept)
        except (OSError, VolpluginError) as error:
            shutil.rmtree(fresh, ignore_errors=True)
            kind = NoSpace if isinstance(error, NoSpace) else Unavailable
            raise kind(
                f"the store {self.path} has schema {version} and is not migrated, as "
                f"its copy {kept} can't be written: {error}"
            ) from error

    def write(self, writes: Iterable[Write], *, sync: bool) -> None:
        """Write all pairs in one atomic batch, on disk at return if ``sync``.

        After a failure it is unknown which of the two states is on disk. The database
        is closed and opened again with the next write: LevelDB appends to a log that
        may end in half a record, and what follows such a half would be lost at the
        next start. A full disk is a failure only when the reserve is used up.
        """
        pairs = list(writes)
        self._with_reserve(lambda: self._write(pairs, sync=sync))
        if sync:
            self._reserve.keep()

    def _reopen(self) -> plyvel.DB:
        try:
            return self._open()
        except StoreCorrupt as error:  # reads go on from memory; a restart tells more
            raise Unavailable(str(error)) from error

    def _write(self, writes: Sequence[Write], *, sync: bool) -> None:
        db = self._db or self._reopen()
        try:
            failpoints.hit("store.write")
            batch = db.write_batch(sync=sync)
            for key, value in writes:
                if value is None:
                    batch.delete(key)
                else:
                    batch.put(key, value)
            batch.write()
            failpoints.hit("store.sync")
        except (plyvel.Error, OSError) as error:
            self.close()
            raise _translate(error, self.path) from error

    def close(self) -> None:
        """Close the database; closing it again does nothing."""
        if self._db is not None:
            self._db.close()
            self._db = None

    def _corrupt(self, error: Exception, *, opening: bool) -> StoreCorrupt:
        text = _text(error)
        culprit = _culprit(self.path, text, opening=opening)
        return StoreCorrupt(
            f"the store {self.path} is corrupt: {text}{culprit}. {REMEDY}"
        )


def backup_of(path: str, schema: int) -> str:
    """Return where the store ``path`` is kept as it was in ``schema``."""
    return f"{path}.schema-{schema}"


REMEDY: Final = (
    "Run `volplugin recover`: it keeps this store beside the new one that it rebuilds "
    "from the volumes on disk"
)


def _has_database(path: str) -> bool:
    """Tell whether LevelDB files lie in ``path``, whole or not.

    LevelDB takes a directory without CURRENT for a new database, whatever else is in
    it: a lost CURRENT would read as "no volumes". Its first manifest alone is a
    database whose making was cut short: every whole one has a later manifest or a log.
    """
    with contextlib.suppress(FileNotFoundError):
        return any(
            re.fullmatch(r"CURRENT|MANIFEST-(?!000001$)\d+|\d+\.(log|ldb|sst)", entry)
            for entry in os.listdir(path)
        )
    return False


def _culprit(path: str, text: str, *, opening: bool) -> str:
    """Say which file is damaged, where LevelDB's own error does not."""
    if re.search(r"\d{6}\.|MANIFEST|CURRENT", text):
        return ""
    files = os.listdir(path)
    if "CURRENT" not in files:
        return " (CURRENT is missing)"
    tables = sorted(file for file in files if file.endswith((".ldb", ".sst")))
    if not opening:  # everything else was read by then
        return f" (in {' or '.join(tables[:8])})"
    with contextlib.suppress(OSError):
        with open(os.path.join(path, "LOG"), "rb") as log:
            noted = re.findall(rb"(\d{6}\.log): dropping", log.read())
        if noted:
            return f" (in {noted[-1].decode()})"
    return " (in CURRENT or the MANIFEST that it names)"


def _translate(error: Exception, path: str) -> VolpluginError:
    """Turn LevelDB's error, which carries its errno as text only, into ours."""
    text = _text(error)
    if "No space left" in text or "quota exceeded" in text:
        return NoSpace(f"the store {path} is on a full disk: free some space there")
    if "lock" in text and "Resource temporarily unavailable" in text:
        return Unavailable(f"the store {path} is in use by another process")
    return Unavailable(f"the store {path} cannot be written: {text}")


def _text(error: Exception) -> str:
    # plyvel hands LevelDB's message on as bytes.
    first = error.args[0] if error.args else ""
    return first.decode("utf-8", "replace") if isinstance(first, bytes) else str(error)
