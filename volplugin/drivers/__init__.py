"""Where the bytes are: one module a kind of storage, and the registry of them.

The contract is in `driver`. A new driver is one module, one line in `_MODULES`, one
fixture in the conformance suite (``tests/contract``) and one section in the README.
"""

from importlib import import_module
from typing import Final

from volplugin.drivers.driver import Driver
from volplugin.errors import InvalidArgument
from volplugin.options import nearest

_MODULES: Final = {
    "cephfs": ("volplugin.drivers.cephfs", "CephFS"),
    "local": ("volplugin.drivers.local", "Local"),
    "plugin": ("volplugin.drivers.plugin", "Plugin"),
    "quota": ("volplugin.drivers.quota", "Quota"),
    "rbd": ("volplugin.drivers.rbd", "Rbd"),
    "tmpfs": ("volplugin.drivers.tmpfs", "Tmpfs"),
}

NAMES: Final = tuple(_MODULES)

ALIASES: Final = {"ceph": "rbd"}
"""Other names of drivers: PouchContainer's users say ``ceph`` for a block device."""

SHARED: Final = ("cephfs", "rbd")
"""The drivers that are `driver.Shares`: known without importing them."""


def find(name: str) -> type[Driver]:
    """Import the driver ``name``; raise `InvalidArgument` when there is none."""
    name = ALIASES.get(name, name)
    if name not in _MODULES:
        raise InvalidArgument(
            f"there is no driver {name!r}{nearest(name, NAMES)}; "
            f"drivers are {', '.join(NAMES)}"
        )
    module, attribute = _MODULES[name]
    driver: type[Driver] = getattr(import_module(module), attribute)
    return driver


def settings_of(name: str) -> type | None:
    """Return the class of a driver's settings, or None when there is no such driver."""
    return find(name).Config if ALIASES.get(name, name) in _MODULES else None
