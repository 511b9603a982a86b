"""A Debian 12 of its own in a folder, and what is installed and run in it."""

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

import attrs
from support.client import Client
from support.connections import Connector
from support.plugin import REPOSITORY, plugin_environment
from support.require import require, require_root

from volplugin import __version__

_SOURCES: Final = Path("/etc/apt/sources.list.d/debian.sources")
_PATH: Final = "/usr/sbin:/usr/bin:/sbin:/bin"
_LIST: Final = Path("/etc/apt/sources.list")
SOCKET: Final = "/run/docker/plugins/volplugin.sock"

NEXT: Final = "0.999.0"

# Its own mounts, which go with the namespace; a container's would be such too.
_ENTER: Final = """
set -e
mount --make-rprivate /
mount -t proc proc "$0/proc"
mount --bind /dev "$0/dev"
mount -t tmpfs tmpfs "$0/run"
exec chroot "$0" "$@"
"""


class Debian:
    """The system below ``root``; nothing of it runs between calls."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def command(self, *words: str) -> list[str]:
        """Return the command that runs ``words`` in it, as the same process."""
        return ["unshare", "--mount", "sh", "-c", _ENTER, str(self.root), *words]

    def run(
        self,
        *words: str,
        ok: Container[int] = (0,),
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> subprocess.CompletedProcess[str]:
        """Run ``words`` to their end."""
        done = subprocess.run(
            self.command(*words),
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
            timeout=110,
            env={
                "PATH": _PATH,
                "DEBIAN_FRONTEND": "noninteractive",
                **environment,
            },
        )
        assert done.returncode in ok, f"{words}: {done.stdout}{done.stderr}"
        return done

    def apt(self, *words: str) -> str:
        """Run ``apt-get`` and say yes to all; what is suggested is not installed."""
        options = ("-y", "-qq", "-o", "Dpkg::Use-Pty=0", "--no-install-recommends")
        return self.run("apt-get", *options, *words).stdout

    def take(self, package: Path) -> str:
        """Bring a package into it; return its path there."""
        shutil.copy(package, self.root / "root")
        return f"/root/{package.name}"

    @contextlib.contextmanager
    def serving(self) -> Iterator[Client]:
        """Run the server that is installed in it, and stop it by SIGTERM."""
        log = self.root / "root" / "serve.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                self.command("volplugin", "serve"),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={"PATH": _PATH},
            )
        # Of its mount namespace, as an engine is: elsewhere its mounts are not seen.
        enter = ["nsenter", f"--mount=/proc/{process.pid}/ns/mnt", "--"]
        connector = Connector(enter)
        try:
            client = Client(
                Path(f"/proc/{process.pid}/root{SOCKET}"), connector=connector
            )
            end = time.monotonic() + 20
            while True:
                try:
                    client.activate()
                    break
                except OSError:
                    told = log.read_text()
                    assert process.poll() is None, told
                    assert time.monotonic() < end, told
                    time.sleep(0.05)
            yield client
        finally:
            connector.close()
            process.terminate()
            status = process.wait(30)
        assert status == 0, log.read_text()
        assert "Traceback" not in log.read_text()


def bootstrap(root: Path) -> Debian:
    """Make a Debian 12 in ``root`` from the package sources of this machine."""
    require_root()
    text = _SOURCES.read_text() if _SOURCES.exists() else _LIST.read_text()
    mirror = next(iter(re.findall(r"https?://\S+", _without_comments(text))))
    words = [require("debootstrap"), "--variant=minbase", "bookworm", str(root), mirror]
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, env=plugin_environment()
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for file in (_SOURCES, _LIST, Path("/etc/resolv.conf")):
        if file.exists():
            os.makedirs(root / file.parent.relative_to("/"), exist_ok=True)
            shutil.copy(file, root / file.relative_to("/"))
    for file in Path("/etc/apt/apt.conf.d").iterdir():
        if "proxy" in file.read_text(errors="replace").lower():
            shutil.copy(file, root / "etc/apt/apt.conf.d")
    # Without this the packages of a container's services would start them.
    policy = root / "usr" / "sbin" / "policy-rc.d"
    policy.write_text("#!/bin/sh\nexit 101\n")
    policy.chmod(0o755)
    return Debian(root)


def _without_comments(text: str) -> str:
    return re.sub(r"^#.*$", "", text, flags=re.MULTILINE)


@attrs.frozen
class Packages:
    """The package of today's version, and one of the later version `NEXT`."""

    today: Path
    later: Path


@contextlib.contextmanager
def built_packages() -> Iterator[Packages]:
    """Both packages, built of the tree as ``make deb`` does; lintian has its say."""
    for program in ("dpkg-buildpackage", "dh", "lintian"):
        require(program)
    folder = Path(tempfile.mkdtemp(prefix="vp-debs-"))
    try:
        _build(folder)
        _build(folder, VERSION=NEXT)
        yield Packages(
            *(folder / f"volplugin_{each}_all.deb" for each in (__version__, NEXT))
        )
    finally:
        shutil.rmtree(folder)


def _build(folder: Path, **variables: str) -> None:
    # By Debian's own interpreter and tools, not those of this environment.
    environment = {"PATH": _PATH, "TMPDIR": str(folder), "OUTPUT": str(folder)}
    done = subprocess.run(
        [REPOSITORY / "packaging" / "deb"],
        capture_output=True,
        text=True,
        check=False,
        env={**environment, **variables},
    )
    assert done.returncode == 0, done.stdout + done.stderr
