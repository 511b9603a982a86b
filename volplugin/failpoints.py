"""Named points at which a test can kill, delay or fail the process.

``VOLPLUGIN_FAILPOINTS="core.create.intent=kill;local.rename=error:28*1"`` arms points
by name: ``kill`` ends the process by SIGKILL, ``sleep:SECONDS`` delays the calling
thread, ``error:ERRNO`` raises `OSError`. ``*N`` arms for the first N hits only.
Unarmed, a point costs one dictionary look-up. The crash tests kill the server at each
name in `NAMES`, so a step without a name here is a step that no test covers.
"""

import os
import signal
import threading
import time
from typing import Final

import attrs

from volplugin.errors import InvalidArgument

VARIABLE: Final = "VOLPLUGIN_FAILPOINTS"

NAMES: Final = frozenset(
    {
        "core.create.intent",
        "core.create.driver",
        "core.create.commit",
        "core.attach.intent",
        "core.attach.driver",
        "core.attach.commit",
        "core.detach.intent",
        "core.detach.driver",
        "core.detach.commit",
        "core.remove.intent",
        "core.remove.driver",
        "core.remove.commit",
        "core.resize.intent",
        "core.resize.driver",
        "core.resize.commit",
        "core.recover.create",
        "core.recover.resize",
        "core.recover.remove",
        "core.recover.mounts",
        "export.daemon",
        "export.open",
        "export.loop",
        "export.device",
        "export.clear",
        "export.end",
        "export.unmount",
        "export.files",
        "krbd.mapped",
        "nbd.start",
        "nbd.started",
        "nbd.ended",
        "image.file",
        "image.mkfs",
        "image.mounted",
        "image.ready",
        "image.attach",
        "image.attached",
        "image.resize",
        "image.shrunk",
        "cephfs.directory",
        "cephfs.detached",
        "cephfs.hold",
        "cephfs.made",
        "cephfs.mounted",
        "cephfs.mountpoint",
        "cephfs.quota",
        "cephfs.record",
        "cephfs.release",
        "cephfs.removal",
        "cephfs.resize",
        "cephfs.trash",
        "cephfs.unmounted",
        "plugin.mountpoint",
        "plugin.guard",
        "plugin.intent",
        "plugin.created",
        "plugin.mount",
        "plugin.mounted",
        "plugin.bound",
        "plugin.unbind",
        "plugin.unmount",
        "plugin.unmounted",
        "plugin.removed",
        "plugin.unguard",
        "intake.mark",
        "intake.move",
        "intake.copy",
        "intake.compared",
        "intake.publish",
        "intake.aside",
        "intake.removed",
        "local.stage",
        "local.limit",
        "local.mark",
        "local.adopt",
        "local.publish",
        "local.release",
        "local.trash",
        "local.forget",
        "local.purge",
        "propagated.expose",
        "propagated.exposed",
        "propagated.fetched",
        "propagated.return",
        "propagated.withdraw",
        "propagated.withdrawn",
        "quota.mountpoint",
        "quota.guard",
        "quota.attach",
        "quota.mounted",
        "quota.detach",
        "quota.unguard",
        "quota.trash",
        "tmpfs.mountpoint",
        "tmpfs.guard",
        "tmpfs.attach",
        "tmpfs.mounted",
        "tmpfs.detach",
        "tmpfs.unguard",
        "rbd.recorded",
        "rbd.image",
        "rbd.mkfs",
        "rbd.filled",
        "rbd.snapshot",
        "rbd.cloned",
        "rbd.adopted",
        "rbd.ready",
        "rbd.mountpoint",
        "rbd.guard",
        "rbd.hold",
        "rbd.mapped",
        "rbd.noted",
        "rbd.checked",
        "rbd.mounted",
        "rbd.detach",
        "rbd.unmounted",
        "rbd.unmapped",
        "rbd.removing",
        "rbd.trash",
        "rbd.forgotten",
        "rbd.unguard",
        "rbd.resize",
        "rbd.grown",
        "rbd.purge",
        "rbd.unneeded",
        "registry.create",
        "registry.change",
        "registry.remove",
        "holding.hold",
        "holding.fence",
        "store.write",
        "store.sync",
        "recover.aside",
        "recover.rebuild",
    }
)


@attrs.define
class _Armed:
    action: str
    argument: float
    left: int | None


_armed: dict[str, _Armed] = {}
_lock = threading.Lock()


def arm(text: str) -> None:
    """Arm the points that ``text`` names, in place of those armed before.

    Raise `InvalidArgument` for a name that no code has or an action that is none.
    """
    armed: dict[str, _Armed] = {}
    for item in filter(None, (part.strip() for part in text.split(";"))):
        name, _, action = item.partition("=")
        if name not in NAMES:
            raise InvalidArgument(f"{VARIABLE}: there is no failpoint {name!r}")
        action, _, times = action.partition("*")
        verb, _, argument = action.partition(":")
        if verb not in {"kill", "sleep", "error"}:
            raise InvalidArgument(f"{VARIABLE}: {name}: no action {verb!r}")
        try:
            armed[name] = _Armed(
                verb, float(argument or 0), int(times) if times else None
            )
        except ValueError as error:
            raise InvalidArgument(f"{VARIABLE}: {item!r} has a bad number") from error
    with _lock:
        _armed.clear()
        _armed.update(armed)


def hit(name: str) -> None:
    """Do what the point ``name`` is armed for; nothing when it is not."""
    if not _armed:
        return
    with _lock:
        point = _armed.get(name)
        if point is None or point.left == 0:
            return
        if point.left is not None:
            point.left -= 1
    if point.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif point.action == "sleep":
        time.sleep(point.argument)
    else:
        number = int(point.argument)
        raise OSError(number, f"{os.strerror(number)} (failpoint {name})")
