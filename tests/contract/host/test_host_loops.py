"""Loop devices on the real kernel."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.wait import eventually

from volplugin.errors import NotFound, Unavailable
from volplugin.host import loops

pytestmark = pytest.mark.root

MIB = 1 << 20


@pytest.fixture
def file(scratch: Path) -> str:
    path = scratch / "file"
    with path.open("wb") as new:
        new.truncate(16 * MIB)
    return str(path)


def number(device: str) -> str:
    status = os.stat(device)
    return f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"


def length(device: str) -> int:
    with open(device, "rb") as opened:
        return opened.seek(0, os.SEEK_END)


def test_attach(file: str) -> None:
    """A file is a device of its size as long as the context lasts, and no longer."""
    with loops.attach(file) as loop:
        assert loops.devices_of(file) == [loop.device]
        assert loops.backing_file(number(loop.device)) == file
        assert length(loop.device) == 16 * MIB
    eventually(lambda: not loops.devices_of(file), "the device has gone")


def test_one_device_for_a_file(file: str, scratch: Path) -> None:
    """A second attach takes the first one's device, also by another of its names."""
    link = scratch / "link"
    os.link(file, link)
    with loops.attach(file) as one, loops.attach(str(link)) as two:
        assert one.device == two.device
        assert loops.devices_of(file) == [one.device]


def test_a_file_of_the_same_path_is_another(file: str) -> None:
    """A device of a file that was replaced since is not taken for that of the new."""
    with loops.attach(file) as old:
        os.unlink(file)
        Path(file).write_bytes(bytes(MIB))
        assert loops.backing_file(number(old.device)) == f"{file} (deleted)"
        assert loops.devices_of(file) == []
        with loops.attach(file) as new:
            assert new.device != old.device


def test_long_names(scratch: Path) -> None:
    """A path longer than the kernel's name of a device is no obstacle."""
    path = scratch / ("x" * 200 + " (deleted)")
    path.write_bytes(bytes(MIB))
    with loops.attach(str(path)) as loop:
        assert loops.backing_file(number(loop.device)) == str(path)
        assert loops.devices_of(str(path)) == [loop.device]


def test_direct_io(file: str, tmpfs: Path) -> None:
    """Direct I/O is used on a disk's file system, and what has none works without."""
    with loops.attach(file) as loop:
        assert loops.uses_direct_io(number(loop.device))
    other = tmpfs / "file"
    other.write_bytes(bytes(MIB))
    with loops.attach(str(other)) as loop:
        assert length(loop.device) == MIB
    assert not loops.uses_direct_io("0:0")


def test_set_capacity(file: str) -> None:
    """A device gets its file's new size when told, as often as that is."""
    with loops.attach(file) as loop:
        os.truncate(file, 32 * MIB)
        assert length(loop.device) == 16 * MIB
        loops.set_capacity(loop.device)
        loops.set_capacity(loop.device)
        assert length(loop.device) == 32 * MIB


def test_many_at_once(scratch: Path) -> None:
    """Threads that want devices at the same time all get one of their own."""
    files = [scratch / f"file{index}" for index in range(16)]
    for path in files:
        path.write_bytes(bytes(MIB))
    all_there = threading.Barrier(len(files), timeout=60)

    def attach(path: Path) -> str:
        with loops.attach(str(path)) as loop:
            all_there.wait()
            return loop.device

    with ThreadPoolExecutor(len(files)) as pool:
        assert len(set(pool.map(attach, files))) == len(files)


def test_processes_race(scratch: Path) -> None:
    """Two processes that attach one file at once share its device."""
    path = scratch / "shared"
    path.write_bytes(bytes(MIB))
    program = (
        "import sys\nfrom volplugin.host import loops\n"
        f"with loops.attach({str(path)!r}) as loop:\n"
        "    print(loop.device, flush=True)\n    sys.stdin.read()\n"
    )
    children = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(loops.__file__).parents[2],
        )
        for _ in range(4)
    ]
    devices = {child.stdout.readline() for child in children if child.stdout}
    for child in children:
        child.communicate()
    assert len(devices) == 1


def test_killed_before_the_mount(file: str) -> None:
    """SIGKILL while the device is attached and not mounted leaves no device."""
    program = (
        "import os\nfrom volplugin.host import loops\n"
        f"with loops.attach({file!r}) as loop:\n"
        "    print(loop.device, flush=True)\n    os.kill(os.getpid(), 9)\n"
    )
    said = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(loops.__file__).parents[2],
    )
    assert said.stdout.startswith("/dev/loop")
    assert said.returncode == -9
    eventually(lambda: not loops.devices_of(file), "the device has gone")


def test_a_missing_node_is_made(file: str) -> None:
    """Where nothing makes the nodes of devices, the one needed is made."""
    program = (
        "import os\nfrom volplugin.host import loops\n"
        f"with loops.attach({file!r}) as loop:\n"
        f"    found = loops.devices_of({file!r})\n"
        "    print(os.path.exists(loop.device), found == [loop.device])\n"
    )
    script = (
        "mount -t tmpfs dev /dev && mknod /dev/loop-control c 10 237"
        f' && exec {sys.executable} -c "$0"'
    )
    said = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, program],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(loops.__file__).parents[2],
    )
    assert said.stdout == "True True\n"


def test_a_file_that_is_worked_on(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a program that inherited the lock runs, no device is made of the file."""
    monkeypatch.setattr(loops, "_LOCK_WAIT", 0.2)
    with loops.locked(file) as lock:
        child = subprocess.Popen(["sleep", "60"], pass_fds=(lock,))
    try:
        with (
            pytest.raises(Unavailable, match="a program works on"),
            loops.attach(file),
        ):
            pass
    finally:
        child.kill()
        child.wait()
    with loops.attach(file):
        pass


def test_what_is_missing(scratch: Path) -> None:
    """A missing file is an error to attach, and backs no device."""
    path = str(scratch / "missing")
    assert loops.devices_of(path) == []
    with pytest.raises(NotFound, match="missing"), loops.attach(path):
        pass
