"""The drivers under test, each as a user can have it, and what a folder looks like."""

import contextlib
import itertools
import os
import stat
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import attrs
from support.require import require_root

from volplugin import options
from volplugin.drivers.driver import Driver, Plan, Purges, Spec
from volplugin.drivers.local import Local, LocalConfig
from volplugin.drivers.quota import Quota
from volplugin.drivers.quota_options import QuotaConfig
from volplugin.drivers.tmpfs import Tmpfs, TmpfsConfig
from volplugin.host import mountinfo
from volplugin.host.mountinfo import Mount
from volplugin.model import State, Volume
from volplugin.store import records

NAMES: Final = ("a", "b", "v", "half")
RECORD: Final = "trusted.volplugin"
_numbers = itertools.count(1)


@attrs.frozen(kw_only=True)
class Kind:
    """A driver with the options of its volumes.

    ``mount`` among the options stands for a directory that the user chooses; it
    ``is_existing`` or not before. ``disk`` is the kind of disk that it needs.
    ``stages`` are the failpoints of a create in order. ``is_kept`` says that the root
    stays when the volume is removed, ``adopts`` that a directory with content is made a
    volume as it is.
    """

    name: str
    options: Mapping[str, str]
    stages: Sequence[str]
    is_existing: bool = False
    is_kept: bool = False
    adopts: bool = False
    disk: str = ""

    def driver(self, place: Path) -> Driver:
        """Build the driver with its state in ``place``."""
        match self.name.partition("-")[0]:
            case "tmpfs":
                return Tmpfs(TmpfsConfig(root=f"{place}/mountpoints"), str(place))
            case "quota":
                return Quota(QuotaConfig(), str(place))
        return Local(LocalConfig(), str(place))


_ADOPTED: Final = ("local.stage", "local.adopt", "local.mark")
_GUARDED: Final = ("tmpfs.mountpoint", "tmpfs.guard")
_SMALL: Final = {"size": "1m"}

_MADE: Final = ("local.stage", "local.limit", "local.mark", "local.publish")
_IMAGE: Final = (
    *("image.file", "image.mkfs", "image.mounted", "image.ready"),
    *("quota.mountpoint", "quota.guard"),
)


def _in_place(disk: str) -> tuple[Kind, ...]:
    """Return the kinds whose volumes are limited in place on such a disk."""
    size = {"size": "16m"}
    return (
        Kind(name=f"local-{disk}", options=size, stages=_MADE, disk=disk),
        Kind(
            name=f"local-{disk}-new",
            options={"mount": "new/deep", **size},
            stages=_ADOPTED,
            is_kept=True,
            disk=disk,
        ),
        Kind(
            name=f"local-{disk}-existing",
            options={"mount": "existing", **size},
            stages=_ADOPTED,
            is_existing=True,
            adopts=True,
            disk=disk,
        ),
        Kind(
            name=f"quota-{disk}",
            options={"quota": disk, **size},
            stages=_MADE,
            disk=disk,
        ),
    )


_ON_ANY_HOST: Final = (
    Kind(name="local", options={}, stages=_MADE),
    Kind(
        name="local-new",
        options={"mount": "new/deep"},
        stages=_ADOPTED,
        is_kept=True,
        adopts=True,
    ),
    Kind(
        name="local-existing",
        options={"mount": "existing"},
        stages=_ADOPTED,
        is_existing=True,
        adopts=True,
    ),
    Kind(name="tmpfs", options=_SMALL, stages=_GUARDED),
    Kind(name="tmpfs-new", options={"mount": "new/deep", **_SMALL}, stages=_GUARDED),
    Kind(
        name="tmpfs-existing",
        options={"mount": "existing", **_SMALL},
        stages=_GUARDED,
        is_existing=True,
    ),
    *(
        Kind(
            name=f"quota-loop-{fs}",
            options={"quota": "loop", "fs": fs, "size": size},
            stages=_IMAGE,
        )
        for fs, size in (("ext4", "16m"), ("xfs", "300m"))
    ),
    *_in_place("btrfs"),
)

PROJECT_DISK: Final = os.environ.get("VOLPLUGIN_TEST_PROJECT_DISK", "")
"""A directory with project quota, in the machine that ``tests/kernel`` starts."""

KINDS: Final = _in_place("project") if PROJECT_DISK else _ON_ANY_HOST


@attrs.frozen
class Case:
    """An open driver of a kind in a folder."""

    kind: Kind
    folder: Path
    driver: Driver

    @classmethod
    def of(cls, kind: Kind, folder: Path) -> "Case":
        """Open the driver, with all that is made once for all, or by users."""
        driver = kind.driver(folder / "place")
        driver.open()
        case = cls(kind, folder, driver)
        for name in NAMES:
            case.raw(name)
        first = case.made("first")
        driver.remove(case.in_state(first, State.REMOVING))
        case.purge()
        return case

    def raw(self, name: str) -> dict[str, str]:
        """Return the options of volume ``name`` as its user gives them."""
        raw = dict(self.kind.options)
        if "mount" in raw:
            raw["mount"] = f"{self.folder}/{name}/{raw['mount']}"
            place = Path(raw["mount"])
            if self.kind.is_existing and not place.exists():
                place.parent.mkdir(parents=True, exist_ok=True)
                if self.kind.disk == "btrfs":
                    command = ["btrfs", "-q", "subvolume", "create", str(place)]
                    subprocess.run(command, check=True)
                else:
                    place.mkdir()
                place.chmod(0o750)
                os.chown(place, 5, 6)
                if self.kind.adopts:
                    (place / "theirs").write_text("the user's")
            (self.folder / name).mkdir(exist_ok=True)
        return raw

    def parsed(self, name: str) -> Any:
        """Return the options of volume ``name`` as the driver takes them."""
        return options.parse(self.driver.Options, self.raw(name), subject="a test")

    def plan(self, name: str, *, like: str | None = None) -> Plan:
        """Plan volume ``name``, with the options of another one if given."""
        return self.driver.plan(name, f"id{next(_numbers)}", self.parsed(like or name))

    def spec(self, name: str) -> Spec:
        """Plan a volume and return it as the driver gets it, *creating*."""
        volume_id = f"{next(_numbers):032x}"
        parsed = self.parsed(name)
        plan = self.driver.plan(name, volume_id, parsed)
        volume = Volume(
            name=name,
            id=volume_id,
            backend=self.driver.name,
            driver=self.driver.name,
            options=self.raw(name),
            facts=plan.facts,
            mountpoint=plan.mountpoint,
            created_at="2024-01-01T00:00:00.000Z",
        )
        record = records.encode(attrs.evolve(volume, state=State.READY))
        return Spec(volume=volume, options=parsed, record=record)

    def in_state(self, spec: Spec, state: State) -> Spec:
        """Return the volume in another state of its life."""
        return attrs.evolve(spec, volume=attrs.evolve(spec.volume, state=state))

    def made(self, name: str) -> Spec:
        """Make a volume and return it, *ready*."""
        spec = self.spec(name)
        self.driver.create(spec)
        return self.in_state(spec, State.READY)

    def purge(self) -> None:
        """Delete what removed volumes left."""
        if isinstance(self.driver, Purges):
            assert self.driver.purge(lambda: False) is True

    def record(self, spec: Spec) -> bytes | None:
        """Return the record that the volume's root carries."""
        return record_of(spec.volume.mountpoint)

    def claim(self, path: str, name: str) -> None:
        """Make a directory the root of another volume, by its record."""
        record = records.encode(
            Volume(
                name=name,
                id="e" * 32,
                backend="local",
                driver="local",
                mountpoint=path,
                created_at="2024-01-01T00:00:00.000Z",
            )
        )
        with contextlib.suppress(FileNotFoundError):
            subprocess.run(["chattr", "-i", path], check=False, capture_output=True)
        os.setxattr(path, RECORD, record)

    def mounts(self) -> list[Mount]:
        """Return the mount table."""
        return mountinfo.read()

    def mounts_below(self) -> list[Mount]:
        """Return the mounts in the folder."""
        return mountinfo.below(str(self.folder), self.mounts())


def record_of(path: str | Path) -> bytes | None:
    """Return the record that ``path`` carries."""
    try:
        return os.getxattr(path, RECORD, follow_symlinks=False)
    except OSError:
        return None


def snapshot(folder: Path) -> dict[str, tuple[object, ...]]:
    """Return all that a user could see of a folder and what is below it."""
    found: dict[str, tuple[object, ...]] = {}
    for path in [folder, *sorted(folder.rglob("*"))]:
        status = path.lstat()
        content = b""
        if path.suffix == ".img":  # a file system, whose times change with each mount
            content = str(status.st_size).encode()
        elif stat.S_ISREG(status.st_mode):
            content = path.read_bytes()
        found[str(path)] = (
            oct(status.st_mode),
            status.st_uid,
            status.st_gid,
            record_of(path),
            content,
        )
    return found


@contextlib.contextmanager
def cleaned(folder: Path) -> Iterator[None]:
    """Unmount what is mounted below a folder, and make it deletable, at the end."""
    require_root()
    try:
        yield
    finally:
        for mount in reversed(mountinfo.below(str(folder), mountinfo.read())):
            subprocess.run(["umount", mount.mountpoint], check=True)
        subprocess.run(["chattr", "-R", "-i", folder], check=False, capture_output=True)
