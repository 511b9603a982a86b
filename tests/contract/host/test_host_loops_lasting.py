"""Loop devices that stay until they are cleared, on the real kernel."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.commands import run
from support.require import require
from support.wait import eventually

from volplugin.errors import InUse, NotFound
from volplugin.host import loops, mountinfo

pytestmark = pytest.mark.root

MIB = 1 << 20


@pytest.fixture
def file(scratch: Path) -> Iterator[str]:
    path = scratch / "file"
    path.write_bytes(bytes(16 * MIB))
    yield str(path)
    for device in loops.devices_of(str(path)):
        loops.clear(device, loops.sequence(device))


def test_make_and_clear(file: str) -> None:
    """A device stays when its maker has closed it, and is gone after clear."""
    device = loops.make(file)
    assert loops.backing_files()[device] == file
    assert loops.devices_of(file) == [device]
    descriptor = os.open(device, os.O_WRONLY)
    os.write(descriptor, b"kept" * 1024)
    os.close(descriptor)
    assert loops.clear(device, loops.sequence(device))
    assert device not in loops.backing_files()
    assert Path(file).read_bytes()[:4] == b"kept"


def test_clear_again(file: str) -> None:
    """Clearing a device that is gone, or another file's by now, has no effect."""
    device = loops.make(file)
    old = loops.sequence(device)
    assert loops.clear(device, old)
    assert loops.clear(device, old)
    assert loops.clear("/dev/loop99999", None)
    device = loops.make(file)
    assert loops.sequence(device) != old
    assert loops.clear(device, old)
    assert loops.devices_of(file) == [device]


def test_in_use(file: str) -> None:
    """A mounted device is not cleared, and is afterwards."""
    device = loops.make(file)
    run("mkfs.ext4", "-q", device)
    where = Path(file).with_name("mnt")
    where.mkdir()
    run("mount", device, where)
    with pytest.raises(InUse, match=rf"{device}: it is mounted"):
        loops.clear(device, loops.sequence(device))
    (where / "file").write_text("still writable")
    run("umount", where)
    assert loops.clear(device, loops.sequence(device))


def test_someone_looks_at_it(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that a program has open is told, and goes when that closes it."""
    monkeypatch.setattr(loops, "_CLEAR_WAIT", 0.2)
    device = loops.make(file)
    descriptor = os.open(device, os.O_RDONLY)
    try:
        with pytest.raises(InUse, match="a program has it open"):
            loops.clear(device, loops.sequence(device))
    finally:
        os.close(descriptor)
    eventually(lambda: device not in loops.backing_files(), "the device is gone")


def test_read_only(file: str) -> None:
    """A read-only device takes no write, of a file that may be read-only too."""
    os.chmod(file, 0o400)
    device = loops.make(file, read_only=True)
    assert run("blockdev", "--getro", device).strip() == "1"
    # Some kernels refuse the opening, others the writing.
    with pytest.raises(PermissionError), open(device, "wb", buffering=0) as opened:
        opened.write(bytes(4096))


def test_capacity(file: str) -> None:
    """A device follows its file's length when it is told."""
    device = loops.make(file)
    os.truncate(file, 24 * MIB)
    loops.set_capacity(device)
    assert run("blockdev", "--getsize64", device).strip() == str(24 * MIB)


def test_what_is_missing(scratch: Path) -> None:
    """A file that is not there is named."""
    with pytest.raises(NotFound, match="nothing"):
        loops.make(str(scratch / "nothing"))


@pytest.fixture
def hung(scratch: Path) -> Iterator[subprocess.Popen[bytes]]:
    """What should serve the file of a loop device, and is stopped."""
    content, export = scratch / "content", scratch / "export"
    for path in (content, export):
        path.write_bytes(bytes(MIB))
    daemon = subprocess.Popen(
        [
            require("qemu-storage-daemon"),
            *("--blockdev", f"driver=file,node-name=disk,filename={content}"),
            "--export",
            f"type=fuse,id=disk,node-name=disk,mountpoint={export},writable=on",
        ]
    )
    device = None
    try:
        eventually(lambda: mountinfo.at(str(export), mountinfo.read()), "it is there")
        device = loops.make(str(export))
        daemon.send_signal(signal.SIGSTOP)
        time.sleep(1.1)  # the kernel keeps what it knows of the file for 1 s
        yield daemon
    finally:
        daemon.send_signal(signal.SIGCONT)
        if device is not None:
            loops.clear(device, loops.sequence(device))
        daemon.terminate()
        daemon.wait(10)


def test_a_hung_file_system(hung: subprocess.Popen[bytes], file: str) -> None:
    """A device whose file can't be asked for keeps no other waiting."""

    def work() -> list[str]:
        with loops.attach(file) as loop:
            return [loop.device, *loops.devices_of(file)]

    with ThreadPoolExecutor() as pool:
        asked = pool.submit(work)
        try:
            first, second = asked.result(10)
        finally:
            # Else a thread that waits would be waited for.
            hung.send_signal(signal.SIGCONT)
    assert first == second
