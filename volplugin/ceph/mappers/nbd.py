"""Images served by ``rbd-nbd`` as network block devices, by the kernel's module nbd.

There is a process for each. It is told which device to take by ioctl(2), and not by
netlink: so a device ends with its process, and takes on a new size. What this module
remembers of a mapping is in ``PLACE/KEY``: the helper's record, what it wrote, and the
device, before the helper is started.

rbd-nbd gives a device up though it is mounted, and takes one on which a file system
still is whose helper has died. So it is looked at here before.
"""

import contextlib
import os
import time
from typing import ClassVar, Final

import attrs

from volplugin.ceph.bindings import load
from volplugin.ceph.cluster import Cluster
from volplugin.ceph.mappers import Target
from volplugin.errors import (
    Internal,
    InUse,
    InvalidArgument,
    NotFound,
    Unavailable,
    Unsupported,
    VolpluginError,
    from_os_error,
)
from volplugin.failpoints import hit
from volplugin.host import commands, daemons, nbd, nodes, processes
from volplugin.host.mountinfo import Mount

_PROGRAM: Final = "rbd-nbd"
_RECORD: Final = "nbd"  # in the mapping's folder: the helper's record
_DEVICE: Final = "nbd-device"
_LOG: Final = "nbd-log"
_FILES: Final = (_RECORD, _LOG, _DEVICE)  # in the order in which they may go

_GRACE: Final = 10.0  # seconds to write what is in the helper's cache
_SETTLE: Final = 5.0  # seconds for the kernel to be done with a device
_DERIVATION: Final = 60.0  # seconds
_WRONG: Final = "crypt_volume_key_get failed: (1)"  # EPERM: no key slot opens
_PAUSE: Final = 0.02
_SHOWN: Final = 400  # characters


@attrs.frozen
class _Mapping:
    """What is remembered of one: its device, and the process that serves it, or 0."""

    device: str
    pid: int = 0


class RbdNbd:
    """The mapper ``rbd-nbd``."""

    name: ClassVar[str] = "rbd-nbd"

    def __init__(self, place: str) -> None:
        """Keep files of mappings below ``place``."""
        self._place = place

    def problem(self) -> str | None:
        """Say why this host has not what it takes; None if it has."""
        if commands.find(_PROGRAM) is None:
            return f"there is no program {_PROGRAM}: install Debian's package rbd-nbd"
        return nbd.problem()

    def supports(self, target: Target) -> str | None:
        """Say why this mapper can't map ``target``; None if it can."""
        if target.encryption is not None and target.key_file is None:
            return f"{target.encryption} needs a file with the passphrase"
        # Before Ceph 18 it takes a newline at the end away, and librbd and QEMU do not.
        if target.key_file is not None and _ends_with_newline(target.key_file):
            return (
                f"{target.key_file} ends with a newline, which is part of the"
                " passphrase and which rbd-nbd leaves out"
            )
        return None

    def prepare(self, target: Target) -> None:
        """Do nothing: all that takes time needs the cluster."""

    def map(self, target: Target) -> str:
        """Map the image; see the contract."""
        mapping = self._mapping(target)
        if mapping is not None and self._serves(target, mapping):
            return f"/dev/{mapping.device}"
        self.unmap(target)
        doing = _doing(target)
        reason = self.supports(target) or self.problem()
        if reason is not None:
            raise Unsupported(f"{doing}: {reason}")
        try:
            os.makedirs(self._folder(target), mode=0o700, exist_ok=True)
        except OSError as error:
            raise from_os_error(error, doing) from error
        try:
            with nbd.free() as device:
                self._remember(target, _Mapping(device))
                hit("nbd.start")
                try:
                    helper = self._start(target, device)
                except Internal:
                    _diagnose(target)
                    raise
                hit("nbd.started")
                self._remember(target, _Mapping(device, helper.pid))
        except BaseException:
            with contextlib.suppress(VolpluginError):  # the first is the one to tell
                self.unmap(target)
            raise
        return f"/dev/{device}"

    def unmap(self, target: Target) -> None:
        """Take the mapping away; see the contract."""
        mapping = self._mapping(target)
        if mapping is not None and self._is_ours(target, mapping):
            users = nodes.users(mapping.device, besides={mapping.pid})
            if users:
                raise InUse(f"unmap /dev/{mapping.device}: {'; '.join(users)}")
            daemons.end(self._file(target, _RECORD), grace=_GRACE)
            hit("nbd.ended")
            self._await_end(target, mapping)
        else:
            # One that is about to start, and has no device yet.
            daemons.end(self._file(target, _RECORD), grace=0)
        self._forget(target)

    def find(self, target: Target) -> str | None:
        """Return the device if it is mapped."""
        mapping = self._mapping(target)
        if mapping is None or not self._serves(target, mapping):
            return None
        return f"/dev/{mapping.device}"

    def is_mapped_by(self, target: Target, mount: Mount) -> bool:
        """Tell whether a mount is of the mapping's device."""
        mapping = self._mapping(target)
        if mapping is None or not self._is_ours(target, mapping):
            return False
        with contextlib.suppress(OSError):
            return mount.device == nodes.number_of(mapping.device)
        return False

    def grow(self, target: Target) -> None:
        """Wait until the device shows the length of the image: the helper is told."""
        device = self.find(target)
        doing = f"take on the new size of {target}"
        if device is None:
            raise NotFound(f"{doing}: it is not mapped")
        size = _size(target)
        end = time.monotonic() + target.access.timeout
        while nodes.size_of(os.path.basename(device)) < size:
            if time.monotonic() > end:
                raise Unavailable(f"{doing}: {device} does not show it; try again")
            time.sleep(_PAUSE)

    def alive(self, target: Target) -> bool:
        """Tell whether the helper is there and serves the device."""
        return self.find(target) is not None

    def _folder(self, target: Target) -> str:
        return os.path.join(self._place, target.key)

    def _file(self, target: Target, name: str) -> str:
        return os.path.join(self._folder(target), name)

    def _mapping(self, target: Target) -> _Mapping | None:
        try:
            with open(self._file(target, _DEVICE), encoding="ascii") as file:
                device, pid, boot = file.read().split()
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            path = self._file(target, _DEVICE)
            raise Internal(f"{path} can't be read: {error}") from error
        return _Mapping(device, int(pid)) if boot == processes.boot_id() else None

    def _remember(self, target: Target, mapping: _Mapping) -> None:
        path = self._file(target, _DEVICE)
        try:
            with open(f"{path}.new", "w", encoding="ascii") as file:
                file.write(f"{mapping.device} {mapping.pid} {processes.boot_id()}\n")
            os.rename(f"{path}.new", path)
        except OSError as error:
            raise from_os_error(error, f"write {path}") from error

    def _forget(self, target: Target) -> None:
        folder = self._folder(target)
        try:
            for name in (f"{_DEVICE}.new", *_FILES):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(os.path.join(folder, name))
            with contextlib.suppress(FileNotFoundError):
                # Another mapper's files are none of ours.
                if not os.listdir(folder):
                    os.rmdir(folder)
        except OSError as error:
            raise from_os_error(error, f"remove {folder}") from error

    def _serves(self, target: Target, mapping: _Mapping) -> bool:
        helper = daemons.find(self._file(target, _RECORD))
        return helper is not None and nbd.is_served_by(mapping.device, helper.pid)

    def _is_ours(self, target: Target, mapping: _Mapping) -> bool:
        """Tell whether the device is this mapping's, though its helper be dead."""
        if self._serves(target, mapping):
            return True
        return mapping.pid != 0 and nbd.server_of(mapping.device) == mapping.pid

    def _await_end(self, target: Target, mapping: _Mapping) -> None:
        end = time.monotonic() + _SETTLE
        while self._is_ours(target, mapping):
            if time.monotonic() > end:
                raise InUse(
                    f"unmap /dev/{mapping.device}: the kernel still has it, though"
                    " its helper has ended; try again"
                )
            time.sleep(_PAUSE)

    def _start(self, target: Target, device: str) -> daemons.Helper:
        record, log = self._file(target, _RECORD), self._file(target, _LOG)

        def is_ready() -> bool:
            # It tries a wrong passphrase once more, which is as slow.
            if target.encryption is not None and _WRONG in daemons.said(log):
                raise _refused(daemons.said(log), target)
            helper = daemons.find(record)
            return (
                helper is not None
                and nbd.is_served_by(device, helper.pid)
                and nodes.size_of(device) > 0
            )

        return daemons.start(
            _words(target, device),
            record=record,
            log=log,
            folder="/",
            ready=is_ready,
            # To make a passphrase into a key is slow, and meant to be.
            limit=target.access.timeout + (_DERIVATION if target.encryption else 0),
            doing=_doing(target),
            failed=lambda said: _refused(said, target),
        )


def _words(target: Target, device: str) -> list[str]:
    access = target.access
    words = [_PROGRAM, "-f", "-c", access.conf, "--id", access.user]
    # Errors alone, to where we look.
    words += ["--log-file", "", "--log-to-stderr", "false", "--err-to-stderr", "true"]
    if access.keyring is not None:
        words += ["--keyring", access.keyring]
    # Whatever the configuration has for other clients, its I/O waits.
    words += ["--rados-osd-op-timeout", "0", "--io-timeout", "0"]
    words += ["--device", f"/dev/{device}"]
    if target.read_only:
        words.append("--read-only")
    if target.encryption is not None and target.key_file is not None:
        words += ["--encryption-format", target.encryption]
        words += ["--encryption-passphrase-file", target.key_file]
    return [*words, "map", str(target)]


def _size(target: Target) -> int:
    cluster = Cluster(target.access)
    try:
        with (
            cluster.io(target.pool, target.namespace) as io,
            load("rbd").Image(io, target.image, read_only=True) as image,
        ):
            return int(image.size())
    finally:
        cluster.close()


def _diagnose(target: Target) -> None:
    """Raise what the cluster says is wrong; the helper's words are few."""
    try:
        _size(target)
    except InvalidArgument as error:  # no such pool
        raise NotFound(f"{_doing(target)}: {error}") from error
    except VolpluginError as error:
        raise type(error)(f"{_doing(target)}: {error}") from error


def _refused(said: str, target: Target) -> VolpluginError:
    doing = _doing(target)
    if "load encryption" in said or _WRONG in said:
        return InvalidArgument(
            f"{doing}: the passphrase in {target.key_file} is wrong, or the image is"
            f" not encrypted as {target.encryption}: {said[-_SHOWN:]}"
        )
    return Internal(f"{doing}: rbd-nbd ended: {said[-_SHOWN:] or 'it says nothing'}")


def _ends_with_newline(file: str) -> bool:
    try:
        with open(file, "rb") as opened:
            return opened.read().endswith(b"\n")
    except OSError:  # map tells
        return False


def _doing(target: Target) -> str:
    return f"map {target}"
