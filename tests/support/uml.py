"""A machine of its own for a test: Debian's user-mode Linux, whose power can be cut.

It is a kernel that runs as a process. It sees the files of this machine, and what it
changes of them is gone with it; disks are image files, which stay as they are when the
process is killed, like real ones when the power fails.
"""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final
from xml.etree import ElementTree as ET

from support import processes
from support.commands import run
from support.network import Network
from support.require import require, require_root
from support.wait import eventually

MODULES: Final = "/usr/lib/uml/modules"
OUTPUT: Final = Path("/out")
"""Where a guest finds `Machine.output`: what it writes there is there at once."""
BOOT_SECONDS: Final = 150
"""In which a guest boots, does a test's first work or its last, and powers off.

It takes 5 s; a busy machine has taken ten times that.
"""

_MEMORY: Final = "768M"
_REPOSITORY: Final = Path(__file__).resolve().parents[2]

# The kernel's root is this machine's, by hostfs and read-only. An overlay makes it
# writable: the kernel has all but overlayfs built in.
_INIT: Final = """#!/bin/sh
set -e
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
mount -t proc proc /proc
mount -t tmpfs -o mode=755 tmpfs /mnt
mkdir /mnt/upper /mnt/work /mnt/root
insmod {modules}/$(uname -r)/kernel/fs/overlayfs/overlay.ko
mount -t overlay -o lowerdir=/,upperdir=/mnt/upper,workdir=/mnt/work overlay /mnt/root
cd /mnt/root
mkdir -p out old
umount /proc
pivot_root . old
exec chroot . /bin/sh {output}/guest
"""
_GUEST: Final = """
trap 'busybox poweroff -f' EXIT
mount -t hostfs -o {output} none /out || exit
exec >>/out/console 2>&1
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/shm /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
ln -sf /proc/self/fd /dev/fd
mkdir -p /lib/modules
mount --bind {modules} /lib/modules
ip link set lo up
cd /
"""


class Machine:
    """A computer with ``disks`` (/dev/ubda, /dev/ubdb …); ``close`` when done with it.

    Its scripts reach this machine by the folder `output`, at `OUTPUT`, and by
    ``network`` where it is on one. Off when made; it can be started again after it has
    ended or its power was cut.
    """

    def __init__(
        self, disks: Sequence[Path] = (), *, network: Network | None = None
    ) -> None:
        require_root()
        self._kernel = require("linux.uml")
        for command in ("busybox", "insmod", "ip", "pivot_root"):
            require(command)
        self._disks = disks
        self._network = network
        # hostfs takes the folder as a mount option.
        self._folder = Path(tempfile.mkdtemp(prefix="uml-")).resolve()
        self.output = self._folder / "out"
        self.output.mkdir()
        # What the file says: without it, no guest boots on a processor with AMX.
        self._registers = self._folder / "xstate.so"
        source = Path(__file__).with_name("uml_xstate.c")
        run(require("gcc"), "-O2", "-shared", "-fPIC", "-o", self._registers, source)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, script: str, environment: Mapping[str, str] | None = None) -> None:
        """Boot, run ``script`` by sh with ``environment``, and power off; don't wait.

        What it prints is in `console`.
        """
        assert not self.is_running(), "it is running already"
        self._release()
        variables = "".join(
            f"export {name}={shlex.quote(value)}\n"
            for name, value in (environment or {}).items()
        )
        places = {"output": shlex.quote(str(self.output)), "modules": MODULES}
        init = self.output / "init"
        init.write_text(_INIT.format(**places))
        init.chmod(0o755)
        guest = self.output / "guest"
        network = self._network.script if self._network else ""
        guest.write_text(_GUEST.format(**places) + network + variables + script)
        disks = [f"ubd{'abcd'[i]}={disk}" for i, disk in enumerate(self._disks)]
        command = [self._kernel, f"mem={_MEMORY}", "rootfstype=hostfs", "rootflags=/"]
        command += ["ro", f"init={init}", f"uml_dir={self._folder}/", "umid=machine"]
        # One console alone, and that is of no interest: two would fight for stdin.
        command += ["con=null", "ssl=null", "con0=null,fd:1", "quiet", *disks]
        if self._network:
            command.append(self._network.option)
        with (self._folder / "kernel").open("wb") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "LD_PRELOAD": str(self._registers)},
            )

    def is_running(self) -> bool:
        """Return whether it is on."""
        return self._process is not None and self._process.poll() is None

    def wait(self, seconds: float) -> None:
        """Wait until it has powered off; fail with what it has told by then."""
        try:
            eventually(lambda: not self.is_running(), "powers off", seconds=seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.told()}") from None

    def cut(self) -> None:
        """Cut the power: whatever runs in it ends at once, with its kernel.

        What the kernel has not yet written to a disk is lost.
        """
        if self._process is not None:
            # Its processes are processes of this machine, in the same group.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            group = self._process.pid
            eventually(lambda: not processes.of_group(group), "its processes end")

    def told(self) -> str:
        """Return the end of all that kernel and script have printed."""
        ours = {"init", "guest"}
        files = [file for file in self.output.iterdir() if file.name not in ours]
        texts = [
            f"--- {file.name}\n{file.read_text(errors='replace')[-6000:]}"
            for file in (self._folder / "kernel", *sorted(files))
        ]
        return "\n".join(texts)

    def close(self) -> None:
        """Cut the power if it is on, and remove its files; the disks stay."""
        self.cut()
        shutil.rmtree(self._folder)

    def _release(self) -> None:
        # A machine that was killed leaves its name taken.
        shutil.rmtree(self._folder / "machine", ignore_errors=True)


def run_tests(
    machine: Machine,
    paths: Sequence[Path],
    *,
    seconds: float,
    environment: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Run the test files ``paths`` in ``machine``, in one boot; return the outcomes.

    They are those of the tests by ``module::name``: ``passed``, ``skipped``, or what
    went wrong. The machine has powered off at return; ``seconds`` are its time. Fail
    with all that it told when there are no outcomes.
    """
    report = machine.output / "junit.xml"
    words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q"]
    words += [f"--junitxml={OUTPUT / report.name}", "-o", "junit_logging=no"]
    words += [str(path) for path in paths]
    variables = {"CI": "1", "PYTHONDONTWRITEBYTECODE": "1", **(environment or {})}
    machine.start(f"cd {_REPOSITORY} && {shlex.join(words)}\n", variables)
    machine.wait(seconds)
    assert report.exists(), f"no test was run\n{machine.told()}"
    outcomes: dict[str, str] = {}
    for case in ET.parse(report).iter("testcase"):
        module = case.get("classname", "").rpartition(".")[2]
        wrong = [part for part in case if part.tag in {"failure", "error", "skipped"}]
        name = f"{module}::{case.get('name')}"
        # A test that failed and then could not clean up is told twice.
        if outcomes.get(name, "passed") == "passed":
            outcomes[name] = f"{wrong[0].tag}: {wrong[0].text}" if wrong else "passed"
    assert outcomes, f"no test was collected\n{machine.told()}"
    return outcomes
