"""Directories of CephFS mounted on this host: by its kernel, or by ceph-fuse.

The kernel's client is taken where there is one. Which of the two a mount is, and whose,
is told by the mount table alone: ceph-fuse's source is a name that we give it, and the
kernel's ends with the path in the file system.
"""

import base64
import contextlib
import logging
import time
from collections.abc import Sequence
from typing import Final

import attrs

from volplugin.ceph import fsmap, settings
from volplugin.ceph.cluster import Cluster
from volplugin.errors import Unavailable, Unsupported, VolpluginError
from volplugin.failpoints import hit
from volplugin.host import (
    cephmount,
    filesystems,
    mountinfo,
    mounts,
    namespaces,
    paths,
)
from volplugin.host.cephmount import FuseProcess
from volplugin.host.mountinfo import Mount
from volplugin.host.mounts import MountFlag
from volplugin.host.patience import outwait
from volplugin.logs import log

logger = logging.getLogger(__name__)

KERNEL: Final = "ceph"
FUSE: Final = "fuse.ceph-fuse"

_FENCE_SECONDS: Final = 3600  # as Ceph's own default: the dead do not come back
_BUSY_WAIT: Final = 2.0  # seconds
_PAUSE: Final = 0.02

# As ceph-fuse's, so that a volume is the same on all hosts.
_FLAGS: Final = MountFlag.NOSUID | MountFlag.NODEV


@attrs.frozen(kw_only=True)
class Target:
    """A directory of a file system to be mounted.

    ``key`` is a word of its own for each; it names files and finds the mount again.
    """

    filesystem: str | None
    path: str
    key: str
    read_only: bool = False


class Mounts:
    """The mounts of one backend, whose files are in ``place``.

    ``wanted`` is ``kernel``, ``fuse`` or ``auto``.
    """

    def __init__(self, cluster: Cluster, place: str, wanted: str) -> None:
        self._cluster = cluster
        self._place = place
        self._wanted = wanted

    def problem(self) -> str | None:
        """Say why nothing can be mounted, None if it can. No effect."""
        try:
            self._uses_kernel()
        except Unsupported as error:
            return str(error)
        return None

    def is_mounted(
        self, target: Target, mountpoint: str, table: Sequence[Mount]
    ) -> bool:
        """Tell whether ``target`` is what is mounted at ``mountpoint``. No I/O."""
        found = mountinfo.at(mountpoint, table)
        return found is not None and found.root == "/" and self.shows(target, found)

    def shows(self, target: Target, mount: Mount) -> bool:
        """Tell whether the mount is one of ``target``, or of a directory in it."""
        if mount.kind == FUSE:
            return mount.source == self._process(target).source
        return mount.kind == KERNEL and mount.source.endswith(f":{target.path}")

    def mount(self, target: Target, mountpoint: str) -> None:
        """Mount ``target`` on the empty directory ``mountpoint``, and see that it is.

        Not idempotent. What an earlier process, which is dead by now, may still hold in
        the cluster is taken from it first: it would hold us up for a minute.
        """
        process = self._process(target)
        if self._settle(target, mountpoint):
            return
        paths.make_directories(self._place, 0o700)
        try:
            if self._uses_kernel():
                self._mount_by_kernel(target, mountpoint)
            else:
                process.start(
                    self._words(target),
                    mountpoint,
                    read_only=target.read_only,
                    ready=lambda: self._is_there(target, mountpoint),
                    limit=2 * self._limit,
                )
            hit("cephfs.mounted")
            self._require_there(target, mountpoint)
        except BaseException:
            # The error is the one to tell; a later unmount does what this can't.
            with contextlib.suppress(Exception):
                self._take_down(target, mountpoint)
                process.kill()
            raise

    def flush(self, mountpoint: str) -> None:
        """Return once the cluster has what the kernel's client was given to write.

        No effect on ceph-fuse, which is never late. Raise `Unavailable` while the
        cluster does not take the data.
        """
        found = mountinfo.at(mountpoint, mountinfo.read())
        if found is not None and found.kind == KERNEL:
            self._write_back(mountpoint)

    def _write_back(self, mountpoint: str) -> None:
        # That something could not be written its programs were told; here it only
        # counts that nothing is left to be.
        filesystems.sync(mountpoint, limit=self._limit, ok=(0, 1))

    def unmount(self, target: Target, mountpoint: str) -> None:
        """Unmount ``target``; return once the cluster has all that was written.

        Idempotent; what else is mounted there stays. Raise `InUse` while a process has
        files open there, `Unavailable` while the cluster does not take the data.
        """
        process = self._process(target)
        was_alive = process.pid() is not None
        while True:
            table = mountinfo.read()
            found = mountinfo.at(mountpoint, table)
            if found is None or not self.is_mounted(target, mountpoint, table):
                break
            if found.kind == KERNEL:
                # umount(2) would wait for the cluster where nothing can interrupt it.
                self._write_back(mountpoint)
            self._unmount(mountpoint)
            hit("cephfs.unmounted")
        if not process.wait(self._limit):
            raise self._still_writes(target)
        if not was_alive:
            self._fence(process)
        process.forget()

    def _settle(self, target: Target, mountpoint: str) -> bool:
        """Clear up after an earlier ceph-fuse; return whether it mounted after all.

        One that runs was started by a plugin that died, or was unmounted here and still
        writes back, or a container has it in a mount namespace of its own.
        """
        process = self._process(target)
        end = time.monotonic() + self._limit
        while process.pid() is not None:
            if self._is_there(target, mountpoint):
                return True
            if time.monotonic() > end:
                raise self._still_writes(target)
            time.sleep(_PAUSE)
        if self._is_there(target, mountpoint):
            self._take_down(target, mountpoint)
        self._fence(process)
        process.forget()
        return False

    def is_alive(self, target: Target, mount: Mount) -> bool:
        """Tell whether the process of a mount lives; the kernel's always does."""
        return mount.kind != FUSE or self._process(target).pid() is not None

    def address(self, target: Target) -> str | None:
        """Return by what address the cluster knows the mount's client, if we know."""
        return self._process(target).address()

    def revive(self, target: Target, mountpoint: str, *, bound: bool = False) -> bool:
        """Unmount ``target`` if its process is dead; return whether it was.

        ``bound`` is a mount of a directory in it, whose process is others' as well.
        Raise `Unavailable` where it does not answer, and where a container still has
        the dead mount, which must not get another file system under its feet.
        """
        process = self._process(target)
        if not cephmount.is_dead(mountpoint, self._limit) and not process.is_fenced():
            return False
        table = mountinfo.read()
        mount = mountinfo.at(mountpoint, table)
        if mount is None:
            return False
        place = mountinfo.place_of(mount, table)
        users = namespaces.holders(mount.device, mount.root, [place] if place else [])
        if users:
            named = ", ".join(f"pid {user.pid} ({user.program})" for user in users)
            raise Unavailable(
                f"{mountpoint}: its ceph-fuse has ended, and containers still have the"
                f" dead mount: {named}; stop them, it is mounted anew then"
            )
        log(logger, logging.WARNING, "its ceph-fuse has ended", path=mountpoint)
        self._take_down(target, mountpoint)
        if not bound:  # it may be stuck, and can do no more for anyone
            process.kill()
        return True

    def _take_down(self, target: Target, mountpoint: str) -> None:
        while (
            found := mountinfo.at(mountpoint, mountinfo.read())
        ) is not None and self.shows(target, found):
            self._unmount(mountpoint)

    def _unmount(self, mountpoint: str) -> None:
        # The `mount` that ceph-fuse starts to remount itself is in it for a moment.
        outwait(lambda: mounts.unmount(mountpoint), _BUSY_WAIT)

    def _require_there(self, target: Target, mountpoint: str) -> None:
        if not self._is_there(target, mountpoint):
            raise Unavailable(
                f"{mountpoint}: {target.path} was mounted and is not there"
            )

    def _is_there(self, target: Target, mountpoint: str) -> bool:
        return self.is_mounted(target, mountpoint, mountinfo.read())

    @property
    def _limit(self) -> float:
        return self._cluster.access.timeout

    def _process(self, target: Target) -> FuseProcess:
        return FuseProcess(self._place, target.key)

    def _still_writes(self, target: Target) -> Unavailable:
        return Unavailable(
            f"ceph-fuse, process {self._process(target).pid()}, still writes"
            f" {target.path} back: the cluster may be away, or a container may have it;"
            f" end the process if what it has not written may be lost"
        )

    def _fence(self, process: FuseProcess) -> None:
        address = process.address()
        if address is None:
            return
        try:
            self._cluster.blocklist(address, _FENCE_SECONDS)
        except VolpluginError as error:
            # It only costs time: the MDS gives a silent client up after a minute.
            log(
                logger,
                logging.WARNING,
                "a dead ceph-fuse was not fenced: the next mount may take a minute",
                address=address,
                error=str(error),
            )

    def _words(self, target: Target) -> list[str]:
        access = self._cluster.access
        words = ["-n", f"client.{access.user}", "--conf", access.conf]
        if access.keyring is not None:
            words += ["--keyring", access.keyring]
        if target.filesystem is not None:
            words.append(f"--client_fs={target.filesystem}")
        return [
            *words,
            "-r",
            target.path,
            f"--client_mount_timeout={max(1, int(access.timeout))}",
            # It has the kernel drop what it has cached by `mount -o remount`, and tries
            # that once at its start. It must not end when this fails, as it does once
            # a container alone has the mount, nor try again while it is to end.
            "--client_die_on_failed_remount=false",
            "--client_die_on_failed_dentry_invalidate=false",
            "--client_max_retries_on_remount_failure=1",
        ]

    def _uses_kernel(self) -> bool:
        problems = []
        if self._wanted in {"auto", "kernel"}:
            if cephmount.has_kernel_client():
                return True
            problems.append("kernel: this one has no file system ceph")
        if self._wanted in {"auto", "fuse"}:
            if cephmount.has_fuse():
                return False
            problems.append("fuse: there is no ceph-fuse (Debian's package ceph-fuse)")
        raise Unsupported(f"CephFS can't be mounted here: {'; '.join(problems)}")

    def _mount_by_kernel(self, target: Target, mountpoint: str) -> None:
        access = self._cluster.access
        addresses, needed = fsmap.monitors(self._cluster)
        secret = settings.secret(access, settings.read(access))
        # mount(2)'s data is seen by nobody; in mount tables the kernel hides the key.
        options = [
            f"name={access.user}",
            f"secret={base64.b64encode(secret).decode()}",
            f"mount_timeout={max(1, int(access.timeout))}",
        ]
        if needed:
            options.append(needed)
        if target.filesystem is not None:
            options.append(f"mds_namespace={target.filesystem}")
        flags = _FLAGS | (MountFlag.RDONLY if target.read_only else MountFlag(0))
        try:
            mounts.mount(
                f"{addresses}:{target.path}",
                mountpoint,
                "ceph",
                flags=flags,
                data=",".join(options),
            )
        except VolpluginError as error:
            # The kernel's own text has the options in it, with the key.
            cause = error.__cause__
            reason = getattr(cause, "strerror", None) or type(error).__name__
            raise Unavailable(
                f"mount {target.path} on {mountpoint}: {reason}; `dmesg` may say more"
            ) from None
