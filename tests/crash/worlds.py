"""A client that writes down what it was promised: the other half of `invariants`."""

import http.client
import os
from collections.abc import Callable, Mapping
from typing import Final

import attrs
from invariants import Expected, check, check_nothing_left
from rooms import ForkedPlugin
from views import holders

from volplugin.admin.client import AdminClient
from volplugin.errors import Unavailable, VolpluginError


@attrs.frozen
class _Kind:
    """A kind of volume: its options, and whether its directory is a user's."""

    options: Mapping[str, str] = attrs.field(factory=dict)
    chosen: str = ""  # "new", or "existing"

    @property
    def driver(self) -> str:
        """The driver or backend."""
        return self.options.get("driver", "local")


_TMPFS: Final = {"driver": "tmpfs", "size": "1m"}
_IMAGE: Final = {"driver": "quota", "quota": "loop"}
_FAST: Final = {"driver": "fast", "size": "16m"}  # limited by btrfs

_KINDS: Final[Mapping[str, _Kind]] = {
    "local": _Kind(),
    "local-new": _Kind(chosen="new"),
    "local-existing": _Kind(chosen="existing"),
    "tmpfs": _Kind(_TMPFS),
    "tmpfs-new": _Kind(_TMPFS, "new"),
    "tmpfs-existing": _Kind(_TMPFS, "existing"),
    "quota": _Kind({**_IMAGE, "size": "16m"}),
    "fast": _Kind(_FAST),
    "fast-new": _Kind(_FAST, "new"),
    "fast-existing": _Kind(_FAST, "existing"),
    # Slow, as its least size is 300 MB; but it can grow without CAP_SYS_RESOURCE.
    "quota-xfs": _Kind({**_IMAGE, "fs": "xfs", "size": "300m"}),
}
KINDS: Final = tuple(kind for kind in _KINDS if kind != "quota-xfs")


class Died(Exception):
    """The server was gone before it answered."""


@attrs.define
class World:
    """A plugin and what its clients were told."""

    plugin: ForkedPlugin
    expected: Expected = attrs.field(factory=Expected)

    def options(self, kind: str, name: str) -> dict[str, str]:
        """Return the options of a volume of ``kind``, its directory made if need be."""
        found = _KINDS[kind]
        chosen = dict(found.options)
        if found.chosen:
            plugin = self.plugin
            folder = plugin.on_btrfs if found.driver == "fast" else plugin.folder
            chosen["mount"] = f"{folder}/{found.chosen}/{kind}-{name}"
        if found.chosen == "existing":
            path = self.plugin.host.path(chosen["mount"])
            if not path.exists():
                self._make_users(found, chosen["mount"])
            self.expected.users[chosen["mount"]] = (0o750, 5, 6)
            if found.driver != "tmpfs":
                self.expected.content[name] = (path / "kept").read_text()
        return chosen

    def _make_users(self, kind: _Kind, inside: str) -> None:
        path = self.plugin.host.path(inside)
        path.parent.mkdir(exist_ok=True)
        if kind.driver == "fast":
            self.plugin.host.run("btrfs", "subvolume", "create", inside)
        else:
            path.mkdir()
        path.chmod(0o750)
        os.chown(path, 5, 6)
        if kind.driver != "tmpfs":
            (path / "kept").write_text("the user's")

    def create(self, name: str, options: Mapping[str, str]) -> None:
        """Create a volume."""
        expected, path = self.expected, options.get("mount")
        if path is not None and not self.plugin.host.path(path).exists():
            expected.made[name] = path
        expected.unsure[name] = options
        self._ask(lambda: self.plugin.client.create(name, options))
        self._exists(name, expected.unsure.pop(name))

    def _exists(self, name: str, options: Mapping[str, str]) -> None:
        self.expected.present[name] = options
        if options.get("driver") != "tmpfs":
            self.expected.made.pop(name, None)  # what was made is the user's from now

    def remove(self, name: str) -> None:
        """Remove a volume."""
        expected = self.expected
        expected.unsure[name] = expected.present.pop(name)
        self._ask(lambda: self.plugin.client.remove(name))
        del expected.unsure[name]
        expected.content.pop(name, None)

    def resize(self, name: str, size: str) -> None:
        """Give a volume another size; one that is refused stays as it was."""
        expected = self.expected
        expected.resizing[name] = size
        socket = self.plugin.host.path(self.plugin.admin_socket)
        try:
            AdminClient(str(socket)).resize(name, size=size)
        except Unavailable as error:
            raise Died from error
        except VolpluginError:
            del expected.resizing[name]
            raise
        expected.present[name] = {**expected.present[name], "size": size}
        del expected.resizing[name]

    def mount(self, name: str, mount_id: str) -> str:
        """Mount a volume."""
        self.expected.unsure_held.add(name)
        path = self._ask(lambda: self.plugin.client.mount(name, mount_id))
        self.expected.unsure_held.discard(name)
        self.expected.held.setdefault(name, set()).add(mount_id)
        assert path is not None
        return path

    def write(self, name: str, path: str, text: str) -> None:
        """Write into a mounted volume."""
        (self.plugin.host.path(path) / "kept").write_text(text)
        self.expected.content[name] = text

    def unmount(self, name: str, mount_id: str) -> None:
        """Unmount a volume."""
        held = self.expected.held[name]
        held.discard(mount_id)
        if not held and self.expected.present[name].get("driver") == "tmpfs":
            self.expected.content.pop(name, None)
        self.expected.unsure_held.add(name)
        self._ask(lambda: self.plugin.client.unmount(name, mount_id))
        self.expected.unsure_held.discard(name)

    def _ask(self, call: Callable[[], str | None]) -> str | None:
        try:
            return call()
        except (OSError, http.client.HTTPException) as error:
            raise Died from error

    def check(self) -> None:
        """Assert the invariants, then take for true what was not answered."""
        check(self.plugin, self.expected)
        self.settle()

    def settle(self) -> None:
        """Take what the server shows for what clients did not hear."""
        expected = self.expected
        names = self.plugin.client.list()
        for name, options in expected.unsure.items():
            if name in names:
                self._exists(name, options)
            else:
                expected.content.pop(name, None)
                expected.held.pop(name, None)
        expected.unsure.clear()
        for name in expected.resizing:
            size = self.plugin.client.get(name)["Status"]["size"].lower()
            expected.present[name] = {**expected.present[name], "size": size}
        expected.resizing.clear()
        for name in expected.unsure_held & set(names):
            expected.held[name] = holders(self.plugin.client.get(name))
        expected.unsure_held.clear()

    def destroy(self) -> None:
        """Unmount and remove everything; nothing of it may be left."""
        self.settle()
        for name in list(self.expected.present):
            for mount_id in list(self.expected.held.get(name, ())):
                self.unmount(name, mount_id)
            self.remove(name)
        check_nothing_left(self.plugin, self.expected)
