"""Images mapped by the kernel's own RBD client, where it has the module ``rbd``.

Nothing but the kernel serves such a device, so there is no helper that could die, and
nothing to remember: ``/sys/bus/rbd`` tells by which key a device was mapped, and that
key, which the kernel is given for the time of the call, is named after the mapping.
"""

import errno
import hashlib
import os
import re
import time
from typing import ClassVar, Final

from volplugin.ceph import settings
from volplugin.ceph.mappers import Target
from volplugin.errors import (
    InUse,
    NotFound,
    Unavailable,
    Unsupported,
    VolpluginError,
    from_os_error,
)
from volplugin.failpoints import hit
from volplugin.host import keys, modules, nodes, rbdbus
from volplugin.host.mountinfo import Mount

_V2_SINCE: Final = (5, 11)  # Linux that speaks messenger 2
_REMOVAL: Final = 10.0  # seconds for the cluster to hear of it
_BUSY: Final = 3.0  # seconds for who just looks at a device that has come or gone
_PAUSE: Final = 0.05
_BLANK: Final = re.compile(r"\s")


class Krbd:
    """The mapper ``krbd``."""

    name: ClassVar[str] = "krbd"

    def __init__(self, place: str) -> None:
        """Keep nothing at ``place``, but tell its mappings from those of others."""
        self._mark = hashlib.sha256(os.fsencode(place)).hexdigest()[:12]

    def problem(self) -> str | None:
        """Say why this host has not what it takes; None if it has."""
        return rbdbus.problem()

    def supports(self, target: Target) -> str | None:
        """Say why this mapper can't map ``target``; None if it can."""
        if target.encryption is not None:
            return f"the kernel's client has no encryption ({target.encryption})"
        access = target.access
        for word in (target.pool, target.image):
            if _BLANK.search(word):
                return f"the kernel's client takes no name with a blank: {word!r}"
        for word in (target.namespace, access.user):
            if _BLANK.search(word) or "," in word:
                return f"the kernel's client takes no option with {word!r}"
        return None

    def prepare(self, target: Target) -> None:
        """Do nothing: all that takes time needs the cluster."""

    def map(self, target: Target) -> str:
        """Map the image; see the contract."""
        found = self._devices(target)
        if not found:
            try:
                self._add(target)
                hit("krbd.mapped")
            except BaseException:
                self._undo(target)
                raise
            found = self._devices(target)
        if not found:
            raise Unavailable(f"{_doing(target)}: it has gone again; see dmesg")
        return nodes.ensure(f"rbd{found[0].number}")

    def unmap(self, target: Target) -> None:
        """Take the mapping away; see the contract."""
        # More than one: the death of a process whose attempt went on behind it.
        for device in self._devices(target):
            _remove(device)

    def find(self, target: Target) -> str | None:
        """Return the device if it is mapped."""
        found = self._devices(target)
        return found[0].path if found else None

    def is_mapped_by(self, target: Target, mount: Mount) -> bool:
        """Tell whether a mount is of the mapping's device."""
        return mount.device in {device.device for device in self._devices(target)}

    def grow(self, target: Target) -> None:
        """Let the device show the length of the image."""
        found = self._devices(target)
        doing = f"take on the new size of {target}"
        if not found:
            raise NotFound(f"{doing}: it is not mapped")
        try:
            for device in found:
                rbdbus.refresh(device.number, limit=target.access.timeout, doing=doing)
        except OSError as error:
            raise from_os_error(error, doing) from error

    def alive(self, target: Target) -> bool:
        """Tell whether it is mapped: then the kernel serves it."""
        return self.find(target) is not None

    def _devices(self, target: Target) -> list[rbdbus.Device]:
        key = self._key_name(target)
        return [device for device in rbdbus.devices() if device.key == key]

    def _key_name(self, target: Target) -> str:
        return f"volplugin.{self._mark}.{target.key}"

    def _add(self, target: Target) -> None:
        access, doing = target.access, _doing(target)
        reason = self.supports(target) or self.problem()
        if reason is not None:
            raise Unsupported(f"{doing}: {reason}")
        said = settings.read(access)
        monitors, options = _reached(target, said)
        name = self._key_name(target)
        options += [f"name={access.user}", f"key={name}", "noshare"]
        # Its I/O has no time limit (osd_request_timeout), only the way to the cluster.
        options.append(f"mount_timeout={max(1, round(access.timeout))}")
        options += [f"_pool_ns={target.namespace}"] if target.namespace else []
        options += ["ro"] if target.read_only else ["rw"]

        def add() -> None:
            rbdbus.add(
                monitors,
                options,
                target.pool,
                target.image,
                limit=access.timeout,
                doing=doing,
            )

        try:
            keys.holding("ceph", name, settings.secret(access, said), add)
        except OSError as error:
            raise _refused(error, target) from error

    def _undo(self, target: Target) -> None:
        for device in self._devices(target):
            try:
                _remove(device)
            except VolpluginError:  # the first error is the one to tell
                continue


def _reached(target: Target, said: settings.Settings) -> tuple[list[str], list[str]]:
    """Return the monitors' addresses, and the options that go with them."""
    if modules.kernel_version() >= _V2_SINCE and (
        found := settings.monitors(said, "v2")
    ):
        # Else encrypted, where the cluster wants that.
        return found, ["ms_mode=prefer-crc"]
    if found := settings.monitors(said, "v1"):
        return found, []
    raise Unsupported(
        f"{_doing(target)}: {target.access.conf} has no `mon host` that the kernel"
        f" {os.uname().release} can speak to: {said.mon_host!r}"
    )


def _refused(error: OSError, target: Target) -> VolpluginError:
    doing, user = _doing(target), f"client.{target.access.user}"
    match error.errno:
        case errno.ENOENT:
            return NotFound(f"{doing}: there is no such pool, namespace or image")
        case errno.ENXIO:
            return Unsupported(
                f"{doing}: it has a feature that this kernel has not, which has"
                f" {rbdbus.features()}; `rbd feature disable` it, or use another mapper"
            )
        case errno.EACCES | errno.EPERM | errno.EKEYREJECTED | errno.ENOKEY:
            return Unavailable(
                f"{doing}: the cluster refuses {user}: look at its key and caps"
                f" (`ceph auth get {user}`)"
            )
        case errno.ETIMEDOUT | errno.EIO | errno.ECONNREFUSED:
            return Unavailable(
                f"{doing}: the cluster can't be reached ({error.strerror}); see"
                " `ceph status` and dmesg, then try again"
            )
    told = from_os_error(error, doing)
    return type(told)(f"{told}; see dmesg")


def _remove(device: rbdbus.Device) -> None:
    doing = f"unmap {device.path}"
    end = time.monotonic() + _BUSY
    while True:
        try:
            rbdbus.remove(device.number, limit=_REMOVAL, doing=doing)
            break
        except Unavailable:
            break  # killed; the kernel goes on without the cluster
        except OSError as error:
            if error.errno == errno.EINPROGRESS:  # by someone else
                break
            if error.errno != errno.EBUSY:
                raise from_os_error(error, doing) from error
            # Programs such as udev's look at a device when it was closed.
            if time.monotonic() > end:
                users = nodes.users(f"rbd{device.number}") or ["it is open"]
                raise InUse(f"{doing}: {'; '.join(users)}") from error
        time.sleep(_PAUSE)
    _wait_until_gone(device)


def _wait_until_gone(device: rbdbus.Device) -> None:
    end = time.monotonic() + _REMOVAL
    while any(device == other for other in rbdbus.devices()):
        if time.monotonic() > end:
            raise Unavailable(
                f"unmap {device.path}: the kernel does not let go of it; see dmesg"
            )
        time.sleep(_PAUSE)


def _doing(target: Target) -> str:
    return f"map {target}"
