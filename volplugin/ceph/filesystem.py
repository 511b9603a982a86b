"""Directories in a file system of CephFS: their quotas, records, snapshots and usage.

All through libcephfs, so that nothing has to be mounted on this host. Paths are those
of the file system. Methods raise `OSError` as it comes, with the path, and what
`Session.run` raises.
"""

import contextlib
import datetime as dt
import errno
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import attrs

from volplugin.ceph.bindings import load
from volplugin.ceph.fssession import At, Session
from volplugin.errors import Unavailable, Unsupported
from volplugin.times import rfc3339

RECORD: Final = "trusted.volplugin"

_MAX_BYTES: Final = "ceph.quota.max_bytes"
_MAX_FILES: Final = "ceph.quota.max_files"
_LONGEST: Final = 65536  # bytes of an attribute's value
_BATCH: Final = 64  # files deleted by one call, that a slow cluster may do in time
_DIRECTORY: Final = 4  # readdir(3)'s DT_DIR
_SNAPSHOTS: Final = ".snap"  # client_snapdir's default, which all clients share


@attrs.frozen(kw_only=True)
class Quota:
    """A directory's limits: bytes, and files with directories; None is no limit."""

    size: int | None = None
    inodes: int | None = None


@attrs.frozen(kw_only=True)
class Holds:
    """What a directory holds, by recursive statistics that lag a few seconds."""

    used: int
    inodes: int
    quota: Quota
    free: int  # of the whole file system, for new data


@attrs.frozen(kw_only=True)
class Kept:
    """A snapshot: its name, when it was taken (RFC 3339), what it holds in bytes."""

    name: str
    created_at: str
    size: int


class FileSystem:
    """The file system of one backend."""

    def __init__(self, session: Session, user: str) -> None:
        self._session = session
        self._user = user

    def exists(self, path: str) -> bool:
        """Tell whether ``path`` is a directory; raise for what is something else."""
        try:
            found = self._run("look at", path, lambda fs, at: fs.lstat(at(path)))
        except FileNotFoundError:
            return False
        if not stat.S_ISDIR(found.st_mode):
            raise NotADirectoryError(
                errno.ENOTDIR, os.strerror(errno.ENOTDIR), f"cephfs:{path}"
            )
        return True

    def make(self, path: str, mode: int = 0o755) -> bool:
        """Make the directory ``path``; return False for one that is there."""

        def call(fs: Any, at: At) -> None:
            fs.mkdir(at(path), mode)
            fs.chmod(at(path), mode)  # mkdir takes the umask off

        try:
            self._run("make", path, call)
        except FileExistsError:
            return False
        except PermissionError as error:
            raise self._missing_right("w", "make", path) from error
        return True

    def make_all(self, path: str, mode: int) -> None:
        """Make ``path`` and what is missing above it; what is there stays as it is."""
        try:
            self.make(path, mode)
        except FileNotFoundError:
            self.make_all(os.path.dirname(path), mode)
            self.make(path, mode)

    def set_root(self, path: str, uid: int, gid: int, mode: int) -> None:
        """Give the directory its owner and its mode."""

        def call(fs: Any, at: At) -> None:
            fs.chown(at(path), uid, gid)
            fs.chmod(at(path), mode)  # last: a change of owner may take bits away

        self._run("set up", path, call)

    def root(self, path: str) -> tuple[int, int, int]:
        """Return owner, group and mode of the directory."""
        found = self._run("look at", path, lambda fs, at: fs.lstat(at(path)))
        return found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)

    def move(self, source: str, target: str) -> None:
        """Rename a directory; success if that was done before.

        An empty directory at ``target`` is replaced (rename(2)).
        """

        def call(fs: Any, at: At) -> None:
            # One that fails beside a listing of the target's directory leaves that
            # name "renaming" in libcephfs 16: who looks it up then waits for ever.
            fs.lstat(at(source))
            fs.rename(at(source), at(target))

        with contextlib.suppress(FileNotFoundError):
            self._run("move", source, call)

    def remove_empty(self, path: str) -> None:
        """Remove the empty directory ``path``; success if it is not there."""
        with contextlib.suppress(FileNotFoundError):
            self._run("remove", path, lambda fs, at: fs.rmdir(at(path)))

    def names(self, path: str) -> list[str]:
        """Return what is in the directory, nothing for one that is not there."""
        try:
            return [n for n, _ in self._run("list", path, _Lister(path, all_of=True))]
        except FileNotFoundError:
            return []

    def record(self, path: str) -> bytes | None:
        """Return the record that the directory carries, None without one."""
        try:
            return self._get(path, RECORD)
        except OSError as error:
            if error.errno in {errno.ENODATA, errno.ENOENT, errno.ENOTDIR}:
                return None
            raise

    def write_record(self, path: str, record: bytes) -> None:
        """Give the directory ``record`` in place of one that is there."""
        self._set(path, {RECORD: record})

    def clear_record(self, path: str) -> None:
        """Take the record off; none to take, or no directory, is success."""
        try:
            self._run(
                "change", path, lambda fs, at: fs.removexattr(at(path), RECORD.encode())
            )
        except OSError as error:
            if error.errno not in {errno.ENODATA, errno.ENOENT}:
                raise

    def quota(self, path: str) -> Quota:
        """Return the limits of the directory itself."""
        try:
            size, inodes = (
                int(self._get(path, name)) or None for name in (_MAX_BYTES, _MAX_FILES)
            )
        except OSError as error:
            if error.errno == errno.ENODATA:  # neither was ever set
                return Quota()
            raise
        return Quota(size=size, inodes=inodes)

    def set_quota(self, path: str, quota: Quota) -> None:
        """Put the limits in force; a limit of None is taken away.

        Raise `Unavailable` where the user lacks the right, ``p`` of its mds caps.
        """
        before = self.quota(path)
        wanted = {}
        if quota.size != before.size:
            wanted[_MAX_BYTES] = quota.size
        if quota.inodes != before.inodes:
            wanted[_MAX_FILES] = quota.inodes
        try:
            self._set(path, {k: str(v or 0).encode() for k, v in wanted.items()})
        except PermissionError as error:
            raise self._missing_right("p", "set a quota on", path) from error

    def holds(self, path: str) -> Holds:
        """Return what the directory holds, and its limits."""

        def call(fs: Any, at: At) -> tuple[int, int, int]:
            used, entries = (
                int(fs.getxattr(at(path), name.encode(), _LONGEST))
                for name in ("ceph.dir.rbytes", "ceph.dir.rentries")
            )
            disk = fs.statfs(at(path))
            return used, entries, disk["f_bavail"] * disk["f_frsize"]

        used, entries, free = self._run("measure", path, call)
        return Holds(used=used, inodes=entries, quota=self.quota(path), free=free)

    def snapshots(self, path: str, inner: str = "") -> list[Kept]:
        """Return the snapshots of the directory, oldest first.

        Their size is that of ``inner``, the part of the directory that counts.
        """
        place = f"{path}/{_SNAPSHOTS}"
        found = []
        for name in self.names(place):
            if name.startswith("_"):  # _NAME_INODE: one of a directory further up
                continue
            with contextlib.suppress(FileNotFoundError):
                seconds = self._get(f"{place}/{name}", "ceph.snap.btime").decode()
                counted = f"{place}/{name}/{inner}".rstrip("/")
                size = int(self._get(counted, "ceph.dir.rbytes"))
                found.append(
                    (float(seconds), Kept(name=name, created_at="", size=size))
                )
        return [
            attrs.evolve(
                kept, created_at=rfc3339(dt.datetime.fromtimestamp(when, dt.UTC))
            )
            for when, kept in sorted(found, key=lambda each: (each[0], each[1].name))
        ]

    def take_snapshot(self, path: str, name: str) -> None:
        """Keep the directory as it is now. Raise `FileExistsError` for a name taken.

        Raise `Unavailable` where the user lacks the right, ``s`` of its mds caps.
        """
        try:
            self._run(
                "take a snapshot of",
                path,
                lambda fs, at: fs.mksnap(at(path), os.fsencode(name), 0o755, {}),
            )
        except PermissionError as error:
            raise self._missing_right("s", "take a snapshot of", path) from error

    def drop_snapshot(self, path: str, name: str) -> None:
        """Delete a snapshot. Raise `FileNotFoundError` when there is none."""

        def call(fs: Any, at: At) -> None:
            # Told to drop one that is not there, libcephfs 16 never shuts down again.
            fs.lstat(at(f"{path}/{_SNAPSHOTS}/{name}"))
            fs.rmsnap(at(path), os.fsencode(name))

        try:
            self._run("drop a snapshot of", path, call)
        except PermissionError as error:
            raise self._missing_right("s", "drop a snapshot of", path) from error

    def some(self, path: str) -> list[tuple[str, bool]]:
        """Return some names in the directory, and whether each is a directory.

        As many as `unlink` may get through in time; none where it is empty.
        """
        found: list[tuple[str, bool]] = self._run("list", path, _Lister(path))
        return found

    def unlink(self, path: str, names: Sequence[str]) -> None:
        """Delete files in the directory; those that are not there are no error."""

        def call(fs: Any, at: At) -> None:
            for name in names:
                with contextlib.suppress(load("cephfs").ObjectNotFound):
                    fs.unlink(at(f"{path}/{name}"))

        self._run("empty", path, call)

    def _missing_right(self, letter: str, doing: str, path: str) -> Unavailable:
        return Unavailable(
            f"{doing} {path}: client.{self._user} may not: the '{letter}' is missing"
            f" in its mds caps; they should be 'allow rwps', see `ceph auth get"
            f" client.{self._user}` and `ceph auth caps`"
        )

    def _get(self, path: str, name: str) -> bytes:
        value: bytes = self._run(
            "read an attribute of",
            path,
            lambda fs, at: fs.getxattr(at(path), name.encode(), _LONGEST),
        )
        return value

    def _set(self, path: str, values: dict[str, bytes]) -> None:
        def call(fs: Any, at: At) -> None:
            for name, value in values.items():
                fs.setxattr(at(path), name.encode(), value, 0)

        if values:
            self._run("write an attribute of", path, call)

    def _run(self, doing: str, path: str, call: Callable[[Any, At], Any]) -> Any:
        try:
            return self._session.run(f"{doing} {path}", call)
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                raise Unsupported(f"{doing} {path}: {error.strerror}") from error
            raise OSError(error.errno, error.strerror, f"cephfs:{path}") from error


class _Lister:
    """A call that lists a directory: names, and whether each is a directory."""

    def __init__(self, path: str, *, all_of: bool = False) -> None:
        self._path = path
        self._most = None if all_of else _BATCH

    def __call__(self, fs: Any, at: At) -> list[tuple[str, bool]]:
        found: list[tuple[str, bool]] = []
        with _opened(fs, at(self._path)) as directory:
            while self._most is None or len(found) < self._most:
                entry = fs.readdir(directory)
                if entry is None:
                    break
                name = os.fsdecode(entry.d_name)
                if name not in {".", ".."}:
                    found.append((name, entry.d_type == _DIRECTORY))
        return found


@contextlib.contextmanager
def _opened(fs: Any, path: bytes) -> Iterator[Any]:
    directory = fs.opendir(path)
    try:
        yield directory
    finally:
        fs.closedir(directory)
