"""Every driver keeps the contract of ``volplugin.drivers.driver``: one suite for all.

A new driver joins by its lines in `KINDS`. What only one driver does is tested in
``test_drivers_local`` and ``test_drivers_tmpfs``.
"""

import contextlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
from driver_cases import KINDS, PROJECT_DISK, Case, Kind, cleaned, snapshot
from support.disks import disk, enable_quotas

from volplugin import failpoints
from volplugin.drivers.driver import Discovers
from volplugin.errors import AlreadyExists, Unavailable, VolpluginError
from volplugin.host import qgroups
from volplugin.model import State

pytestmark = pytest.mark.root

Folders = Callable[[Kind], Path]
STAGES = [(kind, point) for kind in KINDS for point in kind.stages]


def named(kind: Kind) -> str:
    """Return what a kind is called in a test's name."""
    return kind.name


@pytest.fixture(scope="module")
def btrfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A btrfs with quotas on."""
    folder = tmp_path_factory.mktemp("btrfs")
    with disk(folder, "btrfs", 1 << 30) as mountpoint:
        enable_quotas(mountpoint)
        yield mountpoint
        assert not qgroups.state(str(mountpoint)).is_inconsistent, "counts were spoilt"


@pytest.fixture
def folders(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Folders]:
    """Where a driver of a kind can be: nothing stays mounted or immutable there."""
    with contextlib.ExitStack() as stack:

        def make(kind: Kind) -> Path:
            folder = tmp_path
            if kind.disk:
                place = PROJECT_DISK or request.getfixturevalue("btrfs")
                folder = Path(tempfile.mkdtemp(dir=place))
                stack.callback(shutil.rmtree, folder)
            stack.enter_context(cleaned(folder))
            return folder

        yield make
    failpoints.arm("")


@pytest.fixture(params=KINDS, ids=named)
def case(request: pytest.FixtureRequest, folders: Folders) -> Case:
    """A driver that is open and has made and removed a volume before."""
    return Case.of(request.param, folders(request.param))


@pytest.fixture(params=[k for k in KINDS if "mount" in k.options], ids=named)
def chosen(request: pytest.FixtureRequest, folders: Folders) -> Case:
    """As `case`, where the user chooses the directory."""
    return Case.of(request.param, folders(request.param))


@pytest.fixture(params=[kind for kind in KINDS if kind.is_existing], ids=named)
def existing(request: pytest.FixtureRequest, folders: Folders) -> Case:
    """As `case`, where the user has the directory already."""
    return Case.of(request.param, folders(request.param))


@pytest.fixture(params=STAGES, ids=lambda stage: f"{stage[0].name}-{stage[1]}")
def failing(request: pytest.FixtureRequest, folders: Folders) -> tuple[Case, str]:
    """A driver with one step of its create, as the setting that makes it fail."""
    kind, point = request.param
    return Case.of(kind, folders(kind)), f"{point}=error:5*1"


def test_plan(case: Case) -> None:
    """A plan has no effect and is the same each time."""
    before = snapshot(case.folder)
    plans = [case.plan("v") for _ in range(2)]
    assert snapshot(case.folder) == before
    # But for the ids that a plan may hold, which are given only once.
    places = {re.sub(r"/id\d+/", "/ID/", plan.mountpoint) for plan in plans}
    assert len(places) == 1
    assert set(plans[0].facts) == set(plans[1].facts)
    assert os.path.isabs(plans[0].mountpoint)
    assert plans[0].chosen is ("mount" in case.kind.options)
    assert all(isinstance(value, str) for value in plans[0].facts.values())


def test_create(case: Case) -> None:
    """Create makes the volume's root with its record; again changes nothing."""
    spec = case.spec("v")
    case.driver.create(spec)
    assert case.record(spec) == spec.record
    assert json.loads(spec.record)["state"] == "ready"
    made = snapshot(case.folder)
    case.driver.create(spec)
    assert snapshot(case.folder) == made


def test_remove(case: Case) -> None:
    """Remove leaves nothing but what is the user's, and once more is success."""
    before = snapshot(case.folder)
    spec = case.made("v")
    for state in (State.READY, State.REMOVING, State.REMOVING):
        case.driver.remove(case.in_state(spec, state))
        case.purge()
        after = snapshot(case.folder)
        if case.kind.is_kept:
            assert case.record(spec) is None
            after = {path: told for path, told in after.items() if path in before}
        assert after == before


def test_remove_what_never_was(case: Case) -> None:
    """Removing a volume of which nothing was made is success, without effect."""
    spec = case.spec("v")
    before = snapshot(case.folder)
    for state in State:
        case.driver.remove(case.in_state(spec, state))
        assert snapshot(case.folder) == before


def test_remove_attached(case: Case) -> None:
    """Remove takes back what is attached."""
    spec = case.made("v")
    case.driver.attach(spec)
    case.driver.remove(case.in_state(spec, State.REMOVING))
    assert case.driver.is_attached(spec.volume, case.mounts()) is False
    assert case.mounts_below() == []


def test_attach(case: Case) -> None:
    """An attached volume can be written to; attaching again changes nothing."""
    spec = case.made("v")
    for _ in range(2):
        case.driver.attach(spec)
        attaches = case.driver.attaches(spec.volume)
        assert len(case.mounts_below()) == (1 if attaches else 0)
        assert case.driver.is_attached(spec.volume, case.mounts()) is attaches
        assert case.record(spec) == spec.record
    file = Path(spec.volume.mountpoint) / "file"
    file.write_text("text")
    case.driver.attach(spec)
    assert file.read_text() == "text"


def test_detach(case: Case) -> None:
    """Detach takes attach back, and without one does nothing."""
    spec = case.made("v")
    made = snapshot(case.folder)
    case.driver.detach(spec)
    case.driver.attach(spec)
    for _ in range(2):
        case.driver.detach(spec)
        assert case.driver.is_attached(spec.volume, case.mounts()) is False
        assert case.mounts_below() == []
        assert snapshot(case.folder) == made
    case.driver.attach(spec)
    case.driver.detach(spec)
    assert snapshot(case.folder) == made


def test_attach_another_volumes_directory(case: Case) -> None:
    """A directory with the record of another volume is not attached for this one."""
    spec = case.made("v")
    case.claim(spec.volume.mountpoint, "another")
    with pytest.raises(Unavailable):
        case.driver.attach(spec)
    assert case.mounts_below() == []


def test_other_volume_is_not_attached(case: Case) -> None:
    """What is attached at a mountpoint counts for the volume with its id alone."""
    spec = case.made("v")
    case.driver.attach(spec)
    other = attrs.evolve(spec.volume, id="f" * 32)
    assert case.driver.is_attached(other, case.mounts()) is False


def test_undo(failing: tuple[Case, str]) -> None:
    """A create that fails at any step is undone in full, and can be made again."""
    case, failure = failing
    before = snapshot(case.folder)
    spec = case.spec("v")
    failpoints.arm(failure)
    with pytest.raises((OSError, VolpluginError)):
        case.driver.create(spec)
    for _ in range(2):
        case.driver.remove(spec)
        case.purge()
        assert snapshot(case.folder) == before
    again = case.made("v")
    case.driver.attach(again)
    case.driver.detach(again)
    case.driver.remove(case.in_state(again, State.REMOVING))


def test_create_after_failure(failing: tuple[Case, str]) -> None:
    """A create that failed at any step goes on when it is called again."""
    case, failure = failing
    spec = case.spec("v")
    failpoints.arm(failure)
    with pytest.raises((OSError, VolpluginError)):
        case.driver.create(spec)
    case.driver.create(spec)
    assert case.record(spec) == spec.record
    case.driver.attach(spec)
    case.driver.detach(spec)
    case.driver.remove(case.in_state(spec, State.REMOVING))


def test_another_volume_in_its_place(case: Case) -> None:
    """Another volume's directory in its place refuses a create and is left alone."""
    spec = case.spec("v")
    place = Path(spec.volume.mountpoint)
    place.mkdir(parents=True, exist_ok=True)
    case.claim(str(place), "another")
    (place / "theirs").write_text("theirs")
    before = snapshot(place)
    with pytest.raises(AlreadyExists):
        case.driver.create(spec)
    case.driver.remove(spec)
    assert snapshot(place) == before
    with contextlib.suppress(AlreadyExists):  # or there is nothing to release
        case.driver.remove(case.in_state(spec, State.REMOVING))
    case.purge()
    assert snapshot(place) == before


def test_full_directory_in_its_place(case: Case) -> None:
    """A directory that came after the plan keeps its content, mode and owner."""
    spec = case.spec("v")
    place = Path(spec.volume.mountpoint)
    place.mkdir(parents=True, exist_ok=True)
    (place / "theirs").write_text("theirs")
    before = snapshot(place)
    if case.kind.adopts:
        case.driver.create(spec)
    else:
        with pytest.raises(VolpluginError):
            case.driver.create(spec)
    case.driver.remove(spec)
    case.purge()
    assert snapshot(place) == before


def test_planned_directory_of_another_volume(chosen: Case) -> None:
    """A user can't choose a directory that is a volume already."""
    chosen.made("v")
    with pytest.raises(VolpluginError):
        chosen.plan("w", like="v")


def test_two_volumes(case: Case) -> None:
    """Removing one volume leaves the other as it is."""
    one, two = case.made("a"), case.made("b")
    assert one.volume.mountpoint != two.volume.mountpoint
    case.driver.attach(two)
    (Path(two.volume.mountpoint) / "file").write_text("text")
    before = snapshot(Path(two.volume.mountpoint))
    case.driver.remove(case.in_state(one, State.REMOVING))
    case.purge()
    assert snapshot(Path(two.volume.mountpoint)) == before
    case.driver.attach(two)


def test_discover(case: Case) -> None:
    """What was made is found by its record, once, until it is removed."""
    assert isinstance(case.driver, Discovers)
    assert list(case.driver.discover()) == []
    specs = [case.made(name) for name in ("b", "a")]
    case.driver.attach(specs[0])
    found = list(case.driver.discover())
    assert sorted(f.record for f in found) == sorted(s.record for s in specs)
    for each in found:
        assert each.path in {None, *(s.volume.mountpoint for s in specs)}
    assert [f.record for f in case.driver.discover({"a"})] == [specs[0].record]
    for spec in specs:
        case.driver.remove(case.in_state(spec, State.REMOVING))
    assert list(case.driver.discover()) == []


def test_discover_before_open(case: Case, tmp_path: Path) -> None:
    """A driver whose place is not there yet finds nothing and makes nothing."""
    driver = case.kind.driver(tmp_path / "elsewhere")
    assert isinstance(driver, Discovers)
    assert list(driver.discover()) == []
    assert not (tmp_path / "elsewhere").exists()


def test_open_again(case: Case) -> None:
    """Opening again, as a reload does, changes nothing, half made volumes included."""
    case.made("whole")
    spec = case.spec("half")
    failpoints.arm(f"{case.kind.stages[0]}=error:5*1")
    with pytest.raises((OSError, VolpluginError)):
        case.driver.create(spec)
    before = snapshot(case.folder)
    case.driver.open()
    assert snapshot(case.folder) == before
    case.driver.create(spec)


def test_roots(case: Case) -> None:
    """What the driver makes in places of its own lies below its roots."""
    assert all(os.path.isabs(root) for root in case.driver.roots())
    if "mount" not in case.kind.options:
        mountpoint = case.spec("v").volume.mountpoint
        assert any(mountpoint.startswith(f"{root}/") for root in case.driver.roots())


def test_status(case: Case) -> None:
    """A Status is plain JSON without the key that PouchContainer takes for its own."""
    spec = case.spec("v")
    for attached in (False, True):
        status: Any = case.driver.status(spec.volume, spec.options, attached=attached)
        assert "ref" not in status
        assert json.loads(json.dumps(dict(status))) == status


def test_users_directory(existing: Case) -> None:
    """A directory that a user had is theirs again when the volume is removed."""
    spec = existing.spec("v")
    place = Path(spec.volume.mountpoint)
    before = snapshot(place)
    assert stat.S_IMODE(place.stat().st_mode) == 0o750
    existing.driver.create(spec)
    existing.driver.attach(spec)
    existing.driver.detach(spec)
    existing.driver.remove(existing.in_state(spec, State.REMOVING))
    assert snapshot(place) == before
