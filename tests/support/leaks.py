"""What tests could leave on the machine: mounts, loop devices, processes."""

import contextlib
from pathlib import Path

import attrs

from support import processes
from support.mounts import read_mounts


@attrs.frozen(kw_only=True)
class Traces:
    """What is there now of this session: other sessions come and go beside it."""

    mounts: frozenset[str]
    loops: frozenset[str]
    processes: frozenset[int]


def traces(places: tuple[str, ...]) -> Traces:
    """Return the traces of this session, whose files are below ``places``."""
    return Traces(
        mounts=frozenset(
            f"{mount.source} on {mount.mountpoint}"
            for mount in read_mounts()
            if mount.mountpoint.startswith(places)
        ),
        loops=frozenset(
            line for line in _loops() if line.split("(")[-1].startswith(places)
        ),
        processes=frozenset(processes.of_session()),
    )


def assert_nothing_new(before: Traces, places: tuple[str, ...]) -> None:
    """Fail for each trace that was not there ``before``."""
    now = traces(places)
    new = now.processes - before.processes
    living = sorted(pid for pid in new if processes.is_alive(pid))
    left = [*(now.mounts - before.mounts), *(now.loops - before.loops)]
    left += [f"process {pid}: {processes.command_of(pid)}" for pid in living]
    assert not left, f"left on the machine: {left}"


def _loops() -> list[str]:
    # losetup would wait for the file system of each file, and so for a hung cluster.
    found = []
    for file in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):  # it has gone meanwhile
            found.append(f"/dev/{file.parts[3]} ({file.read_text().strip()})")
    return found
