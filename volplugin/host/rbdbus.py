"""Images mapped by the kernel's own RBD client: ``/sys/bus/rbd``.

After Documentation/ABI/testing/sysfs-bus-rbd and rbd.c of Linux. A write there lasts
until the cluster has answered, so each is made by a program of its own: one can be
killed, and the kernel then gives the attempt up.
"""

import contextlib
import errno
import io
import os
import re
import select
from collections.abc import Sequence
from typing import Final

import attrs

from volplugin.errors import NotFound, Unavailable
from volplugin.host import commands, modules, nodes

_BUS: Final = "/sys/bus/rbd"
_MODULE: Final = "rbd"
_GRACE: Final = 5.0  # seconds for a killed program to leave the kernel
_ERRNO: Final = {os.strerror(code): code for code in errno.errorcode}

# Bits of /sys/bus/rbd/supported_features, as `rbd feature` names them.
_FEATURES: Final = (
    "layering",
    "striping",
    "exclusive-lock",
    "object-map",
    "fast-diff",
    "deep-flatten",
    "journaling",
    "data-pool",
    "operations",
    "migrating",
)


@attrs.frozen(kw_only=True)
class Device:
    """A mapped image: ``number`` is that of ``/dev/rbdN``, ``device`` major:minor.

    ``cluster`` is the fsid; ``key`` is the name of the key it was mapped by; ``image``
    has pool, namespace and name; ``address`` is the client's, as the image's watchers
    have it.
    """

    number: int
    device: str
    cluster: str
    key: str
    image: str
    address: str

    @property
    def path(self) -> str:
        """Where its node is, or belongs."""
        return f"/dev/rbd{self.number}"


def problem() -> str | None:
    """Say why images can't be mapped here; None if they can. Loads the module."""
    if not os.path.isdir(_BUS):
        reason = modules.load(_MODULE)
        if reason is not None:
            return f"the kernel has no module rbd: {reason}"
    if not os.access(_add_file(), os.W_OK):
        return f"{_add_file()} can't be written: a container must be privileged"
    return None


def devices() -> list[Device]:
    """Return what is mapped now, by number; cheap, no cluster is asked."""
    try:
        names = os.listdir(f"{_BUS}/devices")
    except FileNotFoundError:  # no module, so nothing is mapped
        return []
    found = []
    for number in sorted(int(name) for name in names):
        try:
            found.append(_device(number))
        except OSError:  # it has just gone, or is just coming
            continue
    return found


def features() -> str:
    """Return the names of the image features that this kernel has, for people."""
    try:
        mask = int(_read(f"{_BUS}/supported_features"), 16)
    except (OSError, ValueError):
        return "unknown"
    return ", ".join(name for bit, name in enumerate(_FEATURES) if mask >> bit & 1)


def add(
    monitors: Sequence[str],
    options: Sequence[str],
    pool: str,
    image: str,
    *,
    limit: float,
    doing: str,
) -> None:
    """Map an image; `devices` has it then. Give up after ``limit`` seconds.

    No word may have a blank, and no option a comma. ``doing`` names the attempt in
    errors. Raise the kernel's `OSError` as it comes, and `Unavailable` at the limit.
    """
    words = (",".join(monitors), ",".join(options), pool, image, "-")
    _write(_add_file(), " ".join(words), limit=limit, doing=doing)


def remove(number: int, *, limit: float, doing: str) -> None:
    """Take a mapping away; one that is gone is no error. Errors as of `add`.

    At the limit the kernel is told to wait no longer for the cluster, and goes on.
    """
    major = f"{_BUS}/remove_single_major"
    file = major if os.path.exists(major) else f"{_BUS}/remove"
    try:
        _write(file, str(number), limit=limit, doing=doing)
    except FileNotFoundError:
        return


def refresh(number: int, *, limit: float, doing: str) -> None:
    """Let a device take on the size that its image has now. Errors as of `add`."""
    file = f"{_BUS}/devices/{number}/refresh"
    if not os.path.exists(file):
        raise NotFound(f"{doing}: /dev/rbd{number} is mapped no more")
    _write(file, "1", limit=limit, doing=doing)


def _add_file() -> str:
    # Without it each device takes a major number of its own, of which there are few.
    single = f"{_BUS}/add_single_major"
    return single if os.path.exists(single) else f"{_BUS}/add"


def _device(number: int) -> Device:
    place = f"{_BUS}/devices/{number}"
    image = [_read(f"{place}/{part}") for part in ("pool", "pool_ns", "name")]
    # As it was written: monitors, options, pool, image, snapshot.
    options = _read(f"{place}/config_info").split(" ")[1].split(",")
    keys = [option[4:] for option in options if option.startswith("key=")]
    return Device(
        number=number,
        device=nodes.number_of(f"rbd{number}"),
        cluster=_read(f"{place}/cluster_fsid"),
        key=keys[0] if keys else "",
        image="/".join(filter(None, image)),
        address=_read(f"{place}/client_addr"),
    )


def _read(file: str) -> str:
    with open(file, encoding="utf-8", errors="surrogateescape") as opened:
        return opened.read().removesuffix("\n")


def _write(file: str, text: str, *, limit: float, doing: str) -> None:
    with contextlib.ExitStack() as stack:
        words_out, words_in = _pipe(stack)
        ended, running = _pipe(stack)
        words_in.write(text.encode("utf-8", "surrogateescape"))
        words_in.close()
        # timeout(1) is for the case that this process dies meanwhile.
        words = ["timeout", "-s", "KILL", f"{limit + 1:.1f}", "dd", "bs=64k"]
        words += [f"if=/proc/self/fd/{words_out.fileno()}", f"of={file}"]
        keep = (words_out.fileno(), running.fileno())
        try:
            output = commands.run(words, limit=limit, doing=doing, ok=(0, 1), keep=keep)
        except Unavailable as error:
            # The kernel first undoes what it had begun.
            running.close()
            select.select([ended], [], [], _GRACE)
            raise Unavailable(
                f"{doing}: not done within {limit:g} s: the cluster does not answer, or"
                " a client that has died still has the image, for half a minute; see"
                " `ceph status` and dmesg, then try again"
            ) from error
    # dd: error writing '/sys/bus/rbd/add_single_major': No such file or directory
    wrong = re.search(r"^dd: .*: (.*)$", output, re.MULTILINE)
    if wrong is not None:
        code = _ERRNO.get(wrong[1], errno.EIO)
        raise OSError(code, wrong[1], file)


def _pipe(stack: contextlib.ExitStack) -> tuple[io.FileIO, io.FileIO]:
    read, write = os.pipe()
    return (
        stack.enter_context(io.FileIO(read, "rb")),
        stack.enter_context(io.FileIO(write, "wb")),
    )
