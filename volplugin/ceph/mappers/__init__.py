"""Images of a cluster as block devices of this host: the contract, and the choice.

Terms: a *target* is an image as it is to be mapped; a *mapping* is the device that
shows it, with what keeps it alive (the kernel's client, or a helper program). A mapping
is known by its target's ``key``, and found again by that after a restart of the plugin.

Each mapping is a RADOS client of its own, so that fencing one volume leaves the others
of the host alone. Its I/O waits for a cluster that does not answer, and never fails for
that: a file system that has seen an error stays broken.

A mapper keeps what it must remember below the ``place`` it was made with, in files that
name processes and devices together with what proves them (a start time, a backing
file). All methods are blocking, bounded in time and safe in threads for different keys;
the caller has one call at a time for a key. They raise errors of ours alone.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import ClassVar, Final, Protocol

import attrs

from volplugin.ceph.cluster import Access
from volplugin.errors import InvalidArgument, Unsupported
from volplugin.host.mountinfo import Mount
from volplugin.options import nearest


@attrs.frozen(kw_only=True)
class Target:
    """An image that is to be mapped, and how; secrets only as names of files.

    ``key`` is the volume's id, and a file name. ``encryption`` is ``luks1`` or
    ``luks2``, done by librbd, with the passphrase in ``key_file``, byte by byte.
    """

    access: Access
    pool: str
    namespace: str
    image: str
    key: str
    read_only: bool = False
    encryption: str | None = None
    key_file: str | None = None

    def __str__(self) -> str:
        return "/".join(filter(None, (self.pool, self.namespace, self.image)))


class Mapper(Protocol):
    """One way to map images; its state is in the kernel and in files, not in memory."""

    name: ClassVar[str]

    def problem(self) -> str | None:
        """Say why this host has not what it takes; None if it has.

        Cheap, without effect, and nothing is remembered: a module that was loaded, or
        a package that was installed, shows at once.
        """

    def supports(self, target: Target) -> str | None:
        """Say why this mapper can't map ``target``; None if it can. No I/O."""

    def prepare(self, target: Target) -> None:
        """Do what of `map` takes time and needs no cluster, ahead of it. Idempotent.

        To be called while nothing is mapped, and not beside other calls for the key.
        `unmap` takes it back. Errors as of `map`.
        """

    def map(self, target: Target) -> str:
        """Map the image and return its device, ``/dev/…``, that is ready for use.

        Idempotent: what is mapped, and alive, is returned as it is; what a death at any
        moment left is taken away first. An error leaves nothing mapped. Raise
        `NotFound` for an image or pool that is missing, `InvalidArgument` for a wrong
        passphrase, `Unsupported` for a program or a feature that is missing,
        `Unavailable` for a cluster that does not answer within the access's timeout or
        refuses the key.
        """

    def unmap(self, target: Target) -> None:
        """Take the mapping away, and wait for the end of its device and program.

        What was written and flushed is in the image at return. Idempotent, also for
        what a death left, for a fenced client and for a helper that was killed. While
        the cluster does not answer it ends by force within some seconds; what had not
        been flushed is lost then. Only key and access of ``target`` need to be those
        it was mapped with. Raise `InUse` while the device is mounted or open.
        """

    def find(self, target: Target) -> str | None:
        """Return the device that the image is mapped as by this mapper, or None.

        By ``/sys``, ``/proc`` and files of this host alone; the cluster isn't asked.
        """

    def is_mapped_by(self, target: Target, mount: Mount) -> bool:
        """Tell whether what is mounted there is the device of this mapping.

        Also when its helper has died, or the client is fenced. No I/O on the cluster.
        """

    def grow(self, target: Target) -> None:
        """Let the device show the length that the image has grown to. Idempotent.

        Raise `NotFound` when it isn't mapped.
        """

    def alive(self, target: Target) -> bool:
        """Tell whether what serves the device is there; False when nothing is mapped.

        True for a fenced client: that is the cluster's to say.
        """


_MODULES: Final = {  # by preference
    "krbd": ("volplugin.ceph.mappers.krbd", "Krbd"),
    "rbd-nbd": ("volplugin.ceph.mappers.nbd", "RbdNbd"),
    "qemu": ("volplugin.ceph.mappers.export", "QemuExport"),
}

NAMES: Final = tuple(_MODULES)


def mappers(place: str) -> Mapping[str, Mapper]:
    """Return all mappers by name, the preferred first; files go below ``place``.

    ``place`` is an absolute path without symbolic links, made at the first mapping.
    """
    made: dict[str, Mapper] = {}
    for name, (module, attribute) in _MODULES.items():
        kind: type[Mapper] = getattr(import_module(module), attribute)
        made[name] = kind(place)  # type: ignore[call-arg]  # a protocol makes none
    return made


def choose(known: Mapping[str, Mapper], wanted: str | None, target: Target) -> Mapper:
    """Return the mapper ``wanted`` of ``known``, or the first that can map ``target``.

    Raise `Unsupported` with what is wrong with it, or with each of them, and
    `InvalidArgument` for a name that no mapper has.
    """
    if wanted is not None and wanted not in known:
        raise InvalidArgument(
            f"there is no mapper {wanted!r}{nearest(wanted, NAMES)};"
            f" mappers are {', '.join(NAMES)}"
        )
    problems = []
    for name in known if wanted is None else (wanted,):
        problem = known[name].supports(target) or known[name].problem()
        if problem is None:
            return known[name]
        problems.append(f"{name}: {problem}")
    raise Unsupported(f"no way to map {target} on this host: " + "; ".join(problems))
