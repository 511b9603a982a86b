"""A host with a real systemd as its first process, in namespaces of its own.

It sees the machine's files, and what it changes of them is gone at its end; its folder,
the units in it and docker's data stay between its boots. The cgroups are those of
version 2, which need no controllers here.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from support import processes
from support.client import Client
from support.docker import require_docker
from support.images import IMAGE, image_archive
from support.mounts import Mount, read_mounts
from support.plugin import DOCKER_SOCKET, REPOSITORY
from support.require import missing, require, require_root
from support.wait import eventually

BOOT_LIMIT: Final = 60.0
"""Seconds for a boot; it takes 2 to 4."""

_SYSTEMD: Final = "/lib/systemd/systemd"
# What would look after the machine, or delete in /tmp, or wait for hardware.
_MASKED: Final = (
    *("getty.target", "console-getty.service", "systemd-logind.service"),
    *("systemd-tmpfiles-setup.service", "systemd-tmpfiles-setup-dev.service"),
    *("systemd-tmpfiles-clean.timer", "systemd-sysctl.service"),
    *("systemd-udevd.service", "systemd-udev-trigger.service"),
    *("systemd-timesyncd.service", "systemd-sysusers.service"),
    *("systemd-modules-load.service", "systemd-update-utmp.service"),
    *("systemd-update-utmp-runlevel.service", "systemd-binfmt.service"),
    *("systemd-remount-fs.service", "systemd-machine-id-commit.service"),
    *("proc-sys-fs-binfmt_misc.automount", "dev-hugepages.mount"),
    *("dev-mqueue.mount", "sys-kernel-debug.mount", "sys-kernel-tracing.mount"),
    *("sys-kernel-config.mount", "sys-fs-fuse-connections.mount"),
    *("systemd-journald.service", "systemd-journald.socket"),
    *("systemd-journald-dev-log.socket", "systemd-journald-audit.socket"),
    *("systemd-journal-flush.service", "systemd-journal-catalog-update.service"),
    *("systemd-hwdb-update.service", "systemd-networkd.service"),
    "systemd-ask-password-wall.path",
    *("kmod-static-nodes.service", "ldconfig.service", "dbus.service", "dbus.socket"),
)
_DEVICES: Final = "null zero full random urandom tty fuse loop-control"
_BOOT: Final = f"""
set -e
folder=$1
root=$folder/root
mount -t tmpfs none $folder/layers
mkdir $folder/layers/upper $folder/layers/work
layers=lowerdir=/,upperdir=$folder/layers/upper,workdir=$folder/layers/work
mount -t overlay -o $layers overlay $root
mount --bind $folder $root$folder
mount -t proc proc $root/proc
mount -t sysfs sysfs $root/sys
mount -t cgroup2 cgroup2 $root/sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs $root/run
mount -t tmpfs -o mode=755 tmpfs $root/mnt
mount -t tmpfs -o mode=755 tmpfs $root/dev
for name in {_DEVICES}; do
    test -e /dev/$name || continue
    touch $root/dev/$name
    mount --bind /dev/$name $root/dev/$name
done
mkdir $root/dev/shm $root/dev/pts
ln -s /proc/self/fd $root/dev/fd
mount --bind $folder/units $root/etc/systemd/system
mkdir -p $root/var/lib/volplugin $root/var/lib/docker $root/etc/volplugin
mount --bind $folder/volplugin $root/var/lib/volplugin
mount --bind $folder/docker $root/var/lib/docker
mount --bind $folder/settings $root/etc/volplugin
mount --bind $folder/boot_id $root/proc/sys/kernel/random/boot_id
echo $2 >$root/etc/machine-id
cd $root
mkdir -p old
pivot_root . old
umount -l old
exec chroot . env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin container=test $3 \\
    {_SYSTEMD} --system --unit=multi-user.target --show-status=no --log-target=console
"""
_DOCKER: Final = """
[Unit]
Wants=
After=volplugin.socket
[Service]
ExecStart=
ExecStart={dockerd} --data-root=/var/lib/docker --host=unix:///run/docker.sock \\
    --exec-opt=native.cgroupdriver=cgroupfs --bridge=none --iptables=false \\
    --ip6tables=false --ip-forward=false --log-level=warn {options}
StandardOutput=append:{folder}/docker.log
StandardError=append:{folder}/docker.log
"""
_PROGRAM: Final = """#!{python}
import sys
sys.path.insert(0, {repository!r})
from volplugin.cli import main
main()
"""


class System:
    """A host whose first process is systemd; off when made. `close` ends it."""

    def __init__(self) -> None:
        require_root()
        for command in ("systemctl", "unshare", "nsenter", "pivot_root"):
            require(command)
        if not os.access(_SYSTEMD, os.X_OK):
            missing(f"{_SYSTEMD} is not installed")
        self._cgroups = _unified()
        # Short, because a socket's path has at most 108 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="vp-")).resolve()
        self.units = self.folder / "units"
        self.settings = self.folder / "settings"
        for name in ("root", "layers", "units", "volplugin", "docker", "settings"):
            (self.folder / name).mkdir()
        for unit in _MASKED:
            (self.units / unit).symlink_to("/dev/null")
        self.program = self.folder / "volplugin-program"
        self.program.write_text(
            _PROGRAM.format(python=sys.executable, repository=str(REPOSITORY))
        )
        self.program.chmod(0o755)
        self.log = self.folder / "service.log"
        self._first: subprocess.Popen[bytes] | None = None

    # Its life

    def start(self) -> None:
        """Boot, and return once all units that are enabled have started."""
        assert not self.is_running(), "it is running already"
        (self.folder / "boot_id").write_text(f"{uuid.uuid4()}\n")
        cgroup = self._cgroups / self.folder.name
        cgroup.mkdir(exist_ok=True)
        session = f"{processes.SESSION}={os.environ[processes.SESSION]}"
        enter = f'echo $$ >{cgroup}/cgroup.procs && exec "$@"'
        cut_off = "unshare --mount --propagation private --pid --cgroup --uts --ipc"
        words = ["sh", "-c", enter, "sh", *cut_off.split(), "--fork", "--kill-child"]
        words += ["sh", "-c", _BOOT, "sh", str(self.folder), uuid.uuid4().hex, session]
        with (self.folder / "console").open("ab") as console:
            self._first = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        eventually(self._has_booted, "it boots", seconds=BOOT_LIMIT)

    def _has_booted(self) -> bool:
        if not self.is_running():
            raise AssertionError(f"it ended at boot:\n{self.told()}")
        try:
            said = self.run("systemctl", "is-system-running", check=False)
        except (subprocess.SubprocessError, AssertionError):
            return False
        return said.strip() in {"running", "degraded"}

    def is_running(self) -> bool:
        """Return whether it is on."""
        return self._first is not None and self._first.poll() is None

    def cut(self) -> None:
        """Cut the power: all its processes and mounts are gone at once."""
        if self._first is not None and self.is_running():
            self._first.kill()
            self._first.wait(20)
        self._gone()

    def shut_down(self) -> None:
        """Shut it down as an operator does: all services stop in their order."""
        assert self._first is not None
        self.run("systemctl", "poweroff", check=False)
        self._first.wait(90)
        self._gone()

    def _gone(self) -> None:
        cgroup = self._cgroups / self.folder.name
        eventually(lambda: not processes.of_cgroups([cgroup]), "its processes end")
        eventually(lambda: _is_removed(cgroup), "its cgroups go")

    def close(self) -> None:
        """Cut its power if it is on, and remove all that it had."""
        self.cut()
        subprocess.run(["chattr", "-R", "-f", "-i", self.folder], check=False)
        shutil.rmtree(self.folder)

    # What is in it

    @property
    def pid(self) -> int:
        """The pid of its systemd, as this machine has it."""
        assert self._first is not None
        children = Path(f"/proc/{self._first.pid}/task/{self._first.pid}/children")
        pids = children.read_text().split()
        assert len(pids) == 1, f"it has ended, or has not begun:\n{self.told()}"
        return int(pids[0])

    def path(self, inside: str | Path) -> Path:
        """Return how this process reaches the absolute path ``inside`` it."""
        return Path(f"/proc/{self.pid}/root{inside}")

    def attempt(
        self, *words: str | Path, data: bytes = b"", limit: float = 90
    ) -> subprocess.CompletedProcess[str]:
        """Run ``words`` as a shell of root there would, whatever comes of it."""
        enter = ["nsenter", f"--target={self.pid}", "--mount", "--pid", "--cgroup"]
        enter += ["--uts", "--ipc", "--", "env", "-i", "PATH=/usr/sbin:/usr/bin"]
        enter.append(f"{processes.SESSION}={os.environ[processes.SESSION]}")
        done = subprocess.run(
            [*enter, *map(str, words)],
            input=data,
            capture_output=True,
            timeout=limit,
            check=False,
        )
        return subprocess.CompletedProcess(
            done.args, done.returncode, done.stdout.decode(), done.stderr.decode()
        )

    def run(
        self,
        *words: str | Path,
        data: bytes = b"",
        check: bool = True,
        limit: float = 90,
    ) -> str:
        """Do as `attempt`, and return what is printed; fail where it fails."""
        done = self.attempt(*words, data=data, limit=limit)
        if check and done.returncode:
            raise AssertionError(
                f"{words}: exit status {done.returncode}: {done.stdout}{done.stderr}\n"
                f"{self.told()}"
            )
        return done.stdout.strip()

    def systemctl(self, *words: str) -> str:
        """Run systemctl there."""
        return self.run("systemctl", *words)

    def show(self, name: str, unit: str = "volplugin.service") -> str:
        """Return a property of a unit, such as MainPID."""
        return self.systemctl("show", "--value", f"--property={name}", unit)

    def volplugin(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run the command line there."""
        return self.attempt(self.program, *words)

    @property
    def client(self) -> Client:
        """A client of the plugin socket."""
        return Client(self.path(DOCKER_SOCKET))

    def mounts(self) -> list[Mount]:
        """Return the mounts that it has."""
        return read_mounts(self.pid)

    def drop_in(self, unit: str, text: str) -> None:
        """Change a unit by a drop-in; systemd is told when it runs."""
        folder = self.units / f"{unit}.d"
        folder.mkdir(exist_ok=True)
        (folder / "test.conf").write_text(text)
        if self.is_running():
            self.systemctl("daemon-reload")

    def set_up(self, options: Sequence[str] = ()) -> None:
        """Have docker.service run a dockerd of its own, and the log in a file."""
        dockerd, _ = require_docker()
        text = _DOCKER.format(
            dockerd=dockerd, folder=self.folder, options=" ".join(options)
        )
        self.drop_in("docker.service", text)
        self.drop_in(
            "volplugin.service",
            f"[Service]\nStandardError=append:{self.log}\n",
        )

    def docker(self, *words: str, data: bytes = b"") -> str:
        """Run ``docker`` there."""
        _, docker = require_docker()
        return self.run(docker, "-H", "unix:///run/docker.sock", *words, data=data)

    def podman(self, *words: str, data: bytes = b"") -> str:
        """Run ``podman`` there, which knows the plugin by a line of its settings."""
        storage = self.folder / "podman"
        storage.mkdir(exist_ok=True)
        plugins = f'[engine.volume_plugins]\nvolplugin = "{DOCKER_SOCKET}"\n'
        (storage / "containers.conf").write_text(plugins)
        command = [f"CONTAINERS_CONF={storage / 'containers.conf'}", require("podman")]
        command += [f"--root={storage / 'root'}", "--runroot=/run/containers"]
        command += ["--tmpdir=/run/libpod", "--cgroup-manager=cgroupfs"]
        return self.run("env", *command, *words, data=data)

    def load_image(self) -> None:
        """Make `IMAGE`."""
        self.docker("import", "-", IMAGE, data=image_archive(seeded=False))

    def told(self) -> str:
        """Return the end of what its processes have logged."""
        texts = []
        for name in ("console", "docker.log", "service.log"):
            file = self.folder / name
            if file.exists():
                texts.append(f"--- {name}\n{file.read_text(errors='replace')[-4000:]}")
        return "\n".join(texts)


def _is_removed(cgroup: Path) -> bool:
    # What has ended counts as a member for a moment longer.
    for folder, _, _ in os.walk(cgroup, topdown=False):
        with contextlib.suppress(OSError):
            os.rmdir(folder)
    return not cgroup.exists()


def _unified() -> Path:
    """Return where cgroups of version 2 are mounted."""
    for mount in read_mounts():
        if mount.filesystem == "cgroup2":
            return Path(mount.mountpoint)
    return missing("no cgroup2 is mounted: systemd needs one")
