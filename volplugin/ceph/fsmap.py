"""What the monitors and the manager know of file systems: names, pools, subvolumes."""

import contextlib
import errno
import json
import os
from typing import Any, Final

import attrs

from volplugin.ceph.cluster import Cluster
from volplugin.errors import (
    InUse,
    InvalidArgument,
    NoSpace,
    NotFound,
    Unavailable,
    VolpluginError,
)

_FORBIDDEN: Final = frozenset({errno.EPERM, errno.EACCES})


@attrs.frozen(kw_only=True)
class Known:
    """A file system as the monitors know it."""

    name: str
    data_pool: str


def find(cluster: Cluster, name: str | None) -> Known:
    """Return the file system ``name``, None being the cluster's default one.

    Raise `InvalidArgument` where there is none, naming those that there are.
    """
    known = json.loads(_ask_monitor(cluster, "fs ls"))
    names = [each["name"] for each in known]
    if name is None:
        if not names:
            raise InvalidArgument(
                "the cluster has no file system that this user may see: make one"
                " with `ceph fs volume create NAME`"
            )
        name = names[0] if len(names) == 1 else _default(cluster, names)
    for each in known:
        if each["name"] == name:
            return Known(name=name, data_pool=each["data_pools"][0])
    raise InvalidArgument(
        f"fs={name}: there is no such file system; there are"
        f" {', '.join(sorted(names)) or 'none'}"
    )


def monitors(cluster: Cluster) -> tuple[str, str]:
    """Return the monitors' addresses as mount(2) takes them, and options they need.

    Those of the older protocol where all have one: every kernel speaks it.
    """
    shown = json.loads(_ask_monitor(cluster, "mon dump"))
    found: dict[str, list[str]] = {"v1": [], "v2": []}
    for monitor in shown["mons"]:
        for address in monitor["public_addrs"]["addrvec"]:
            found.setdefault(address["type"], []).append(address["addr"])
    if len(found["v1"]) == len(shown["mons"]):
        return ",".join(found["v1"]), ""
    return ",".join(found["v2"]), "ms_mode=prefer-crc"


class Subvolumes:
    """The subvolumes of one group, which the manager's module ``volumes`` makes."""

    def __init__(self, cluster: Cluster, filesystem: str, group: str) -> None:
        self._cluster = cluster
        self._common = {"vol_name": filesystem, "group_name": group}

    def check(self) -> None:
        """Raise `Unavailable` for a user who may not ask the manager. No effect."""
        with contextlib.suppress(NotFound):  # no group was made yet
            self._ask("fs subvolume ls")

    def make(self, name: str, *, uid: int, gid: int, mode: int) -> None:
        """Make the subvolume and, once for all, its group. Idempotent."""
        self._ask("fs subvolumegroup create")
        given = {"uid": uid, "gid": gid, "mode": f"{mode:o}"}
        self._ask("fs subvolume create", sub_name=name, **given)

    def path(self, name: str) -> str | None:
        """Return the directory of the subvolume, None when there is none."""
        try:
            return self._ask("fs subvolume getpath", sub_name=name).strip()
        except NotFound:
            return None

    def remove(self, name: str) -> None:
        """Give it to the manager to delete; success if it is not there.

        Its snapshots must be gone, else `InUse`.
        """
        try:
            self._ask("fs subvolume rm", sub_name=name)
        except NotFound:
            return

    def _ask(self, prefix: str, **more: Any) -> str:
        command = json.dumps({"prefix": prefix, **self._common, **more})
        with self._cluster.errors(f"ceph {prefix}"):
            rados = self._cluster.rados()
            status, output, said = rados.mgr_command(command, b"")
        if status != 0:
            raise _refused(prefix, abs(status), said)
        text: str = output.decode()
        return text


def _ask_monitor(cluster: Cluster, prefix: str) -> str:
    command = json.dumps({"prefix": prefix, "format": "json"})
    with cluster.errors(f"ceph {prefix}"):
        status, output, said = cluster.rados().mon_command(command, b"")
    if status != 0:
        raise _refused(prefix, abs(status), said)
    text: str = output.decode()
    return text


def _default(cluster: Cluster, names: list[str]) -> str:
    shown = json.loads(_ask_monitor(cluster, "fs dump"))
    for each in shown["filesystems"]:
        if each["id"] == shown.get("default_fscid"):
            return str(each["mdsmap"]["fs_name"])
    raise InvalidArgument(
        f"the cluster has no default file system: set 'fs' to one of {', '.join(names)}"
    )


def _refused(prefix: str, number: int, said: str) -> VolpluginError:
    text = f"ceph {prefix}: {said or os.strerror(number)}"
    if number == errno.ENOENT:
        return NotFound(text)
    if number in {errno.ENOTEMPTY, errno.EBUSY, errno.EAGAIN}:
        return InUse(text)
    if number == errno.ETIMEDOUT:
        return Unavailable(f"{text}: look at `ceph status`, then try again")
    if number in {errno.ENOSPC, errno.EDQUOT}:
        return NoSpace(text)
    if number in _FORBIDDEN:
        return Unavailable(f"{text}: the user's caps do not allow it; see `ceph auth`")
    if number == errno.EINVAL:
        return InvalidArgument(text)
    return Unavailable(text)
