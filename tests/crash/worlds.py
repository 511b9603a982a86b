"""A client that writes down what it was promised: the other half of `invariants`."""

import http.client
import os
from collections.abc import Callable, Mapping
from typing import Final

import attrs
from invariants import Expected, check, check_nothing_left, holders
from rooms import ForkedPlugin

KINDS: Final = (
    "local",
    "local-new",
    "local-existing",
    "tmpfs",
    "tmpfs-new",
    "tmpfs-existing",
)


class Died(Exception):
    """The server was gone before it answered."""


@attrs.define
class World:
    """A plugin and what its clients were told."""

    plugin: ForkedPlugin
    expected: Expected = attrs.field(factory=Expected)

    def options(self, kind: str, name: str) -> dict[str, str]:
        """Return the options of a volume of ``kind``, its directory made if need be."""
        driver, _, where = kind.partition("-")
        chosen = {"size": "1m"} if driver == "tmpfs" else {}
        if driver != "local":
            chosen["driver"] = driver
        if where:
            chosen["mount"] = f"{self.plugin.folder}/{where}/{kind}-{name}"
        if where == "existing":
            path = self.plugin.host.path(chosen["mount"])
            if not path.exists():
                path.mkdir(parents=True)
                path.chmod(0o750)
                os.chown(path, 5, 6)
                if driver == "local":
                    (path / "kept").write_text("the user's")
            self.expected.users[chosen["mount"]] = (0o750, 5, 6)
            if driver == "local":
                self.expected.content[name] = (path / "kept").read_text()
        return chosen

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
