"""Growing what a qemu-storage-daemon exports, while it is in use.

qemu 7.2 learns of a longer image by ``block_resize`` alone, which also sets the image's
length in the cluster: never to less than it is there. Of an encrypted image librbd
takes the raw length and shows it without the header, and qemu takes it for what it
shows; so the export's own node is told the right one (`qemu.window`).

The lengths are those of a second, read-only node, which is opened for the moment. It is
a client of its own, and not seen as a watcher.
"""

import contextlib
import os
import time
from typing import Any, Final

from volplugin.ceph.mappers import Target, qemu
from volplugin.ceph.mappers.qmp import Monitor, monitor
from volplugin.errors import Unavailable, VolpluginError, from_os_error

_PROBE: Final = "probe"
_SHOWN_WAIT: Final = 5.0  # seconds; FUSE may keep a length for one
_PAUSE: Final = 0.01


def grow(target: Target, socket: str, disk: str) -> None:
    """Let the export at ``disk`` have the length that the image has. Idempotent.

    Raise `Unavailable` for a daemon or a cluster that does not answer.
    """
    folder = os.path.dirname(socket)
    with monitor(socket, limit=qemu.limit(target)) as daemon:
        length = raw = _probe(daemon, qemu.image(target, folder, None))
        if target.encryption is not None:
            length = _probe(daemon, qemu.image(target, folder, target.encryption))
        if length <= _length(disk):
            return
        if target.encryption is None:
            daemon.run("block_resize", **{"node-name": qemu.DISK, "size": raw})
        else:
            daemon.run("block_resize", **{"node-name": qemu.IMAGE, "size": raw})
            daemon.run("blockdev-reopen", options=[qemu.window(target, length)])
    end = time.monotonic() + _SHOWN_WAIT
    while (shown := _length(disk)) < length:
        if time.monotonic() > end:
            raise Unavailable(f"{disk} is to have {length} bytes and has {shown}")
        time.sleep(_PAUSE)


def _probe(daemon: Monitor, options: dict[str, Any]) -> int:
    with contextlib.suppress(VolpluginError):  # one that a death left
        daemon.run("blockdev-del", **{"node-name": _PROBE})
    daemon.run("blockdev-add", **{**options, "node-name": _PROBE, "read-only": True})
    try:
        for node in daemon.run("query-named-block-nodes", flat=True):
            if node["node-name"] == _PROBE:
                return int(node["image"]["virtual-size"])
    finally:
        daemon.run("blockdev-del", **{"node-name": _PROBE})
    raise Unavailable("qemu does not tell the image's length")


def _length(disk: str) -> int:
    try:
        return os.stat(disk).st_size
    except OSError as error:
        raise from_os_error(error, f"look at {disk}") from error
