"""Directory trees copied with all that they carry, by cp(1), and held together after.

A copy has what the original has: owners, modes, times, extended attributes and access
lists, hard links among its files, holes, and what is neither file nor directory.
"""

import os
import stat
from collections.abc import Iterator
from typing import Final

import attrs

from volplugin.errors import Unavailable, from_os_error
from volplugin.host import attributes, commands
from volplugin.parsers import quote

LIMIT: Final = 14 * 86400.0  # seconds; poll(2) takes 24 days at most
_CHUNK: Final = 1 << 20  # bytes compared at a time
# Of two file systems one may keep times less exactly; the content is compared anyway.
_SAME_TIME: Final = 2 * 10**9  # nanoseconds
_RECORD: Final = attributes.RECORD.decode()
# Others are the file system's own, such as btrfs.compression.
_ATTRIBUTES: Final = ("user.", "trusted.", "security.", "system.posix_acl_")


def copy(source: str, target: str, *, share: bool = True) -> None:
    """Copy the directory ``source`` onto the empty directory ``target``, and sync it.

    It may take hours. The copying ends with this process, whatever ends that. Unless
    ``share`` is false, blocks are shared where the file system can do that, which no
    limit of btrfs counts before a commit. Raise `NoSpace` for a full disk; what is
    there by then is the caller's to delete.
    """
    doing = f"copy {source} to {target}"
    reflink = f"--reflink={'auto' if share else 'never'}"
    words = ("cp", "--archive", reflink, "--no-target-directory", "--", source, target)
    mortal = ("setpriv", "--pdeathsig", "KILL")
    commands.run([*mortal, *words], limit=LIMIT, doing=doing)
    commands.run(("sync", "--file-system", target), limit=LIMIT, doing=doing)


def difference(one: str, other: str) -> str | None:
    """Return the first thing in which two trees differ, None where they are the same.

    All of it is read. Not looked at are the records of volumes that the two may carry,
    and what nobody can set. Raise `Unavailable` when others change a tree meanwhile.
    """
    try:
        return _Comparison(one, other).run()
    except FileNotFoundError as error:
        raise Unavailable(
            f"{error.filename} went away while it was compared: end who uses it"
        ) from error
    except OSError as error:
        raise from_os_error(error, f"compare {one} with {other}") from error


@attrs.define
class _Comparison:
    one: str
    other: str
    # Which file of the other tree each with several names is, and the way back.
    _links: dict[tuple[int, int], tuple[int, int]] = attrs.field(factory=dict)
    _back: dict[tuple[int, int], tuple[int, int]] = attrs.field(factory=dict)

    def run(self) -> str | None:
        for below in self._entries():
            one, other = (os.path.join(top, below) for top in (self.one, self.other))
            found = self._differ(one, other, is_root=not below)
            if found is not None:
                return f"{quote(below) if below else 'the directory itself'}: {found}"
        return None

    def _entries(self) -> Iterator[str]:
        """Yield the root and all below it; what either lacks is told by its parent."""
        waiting = [""]
        while waiting:
            below = waiting.pop()
            yield below
            with os.scandir(os.path.join(self.one, below)) as entries:
                for entry in entries:
                    path = os.path.join(below, entry.name)
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(path)
                    else:
                        yield path

    def _differ(self, one: str, other: str, *, is_root: bool) -> str | None:
        try:
            a, b = os.lstat(one), os.lstat(other)
        except FileNotFoundError as error:
            if error.filename != other:
                raise
            return "it is missing"
        for what, of_one, of_other in (
            ("type or mode", a.st_mode, b.st_mode),
            ("owner", (a.st_uid, a.st_gid), (b.st_uid, b.st_gid)),
            ("device number", a.st_rdev, b.st_rdev),
        ):
            if of_one != of_other:
                return f"another {what}"
        if self._attributes(one, is_root) != self._attributes(other, is_root):
            return "other extended attributes"
        if abs(a.st_mtime_ns - b.st_mtime_ns) > _SAME_TIME:
            return "another time"
        if not stat.S_ISDIR(a.st_mode) and not self._are_linked_alike(a, b):
            return "other hard links"
        return _differ_inside(one, other, a)

    def _attributes(self, path: str, is_root: bool) -> dict[str, bytes]:
        return {
            name: os.getxattr(path, name, follow_symlinks=False)
            for name in os.listxattr(path, follow_symlinks=False)
            if name.startswith(_ATTRIBUTES) and not (is_root and name == _RECORD)
        }

    def _are_linked_alike(self, a: os.stat_result, b: os.stat_result) -> bool:
        if a.st_nlink == b.st_nlink == 1:
            return True
        one, other = (a.st_dev, a.st_ino), (b.st_dev, b.st_ino)
        return (
            self._links.setdefault(one, other) == other
            and self._back.setdefault(other, one) == one
        )


def _differ_inside(one: str, other: str, found: os.stat_result) -> str | None:
    if stat.S_ISDIR(found.st_mode):
        a, b = set(os.listdir(one)), set(os.listdir(other))
        if a != b:
            return f"{min(a ^ b)!r} is in one of the two alone"
    elif stat.S_ISLNK(found.st_mode):
        if os.readlink(one) != os.readlink(other):
            return "it points elsewhere"
    elif stat.S_ISREG(found.st_mode) and not _same_content(one, other):
        return "another content"
    return None


def _same_content(one: str, other: str) -> bool:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    with (
        open(os.open(one, flags), "rb") as a,
        open(os.open(other, flags), "rb") as b,
    ):
        while True:
            chunk = a.read(_CHUNK)
            if chunk != b.read(_CHUNK):
                return False
            if not chunk:
                return True
