"""Ceph's Python bindings, which are Debian's: PyPI has none.

They are loaded at first use, so that a host without Ceph needs none of them. A virtual
environment does not see Debian's packages; the extension modules are then taken from
their files one by one, as adding their folder to ``sys.path`` would bring all of
Debian's other packages with it.
"""

import importlib
import importlib.machinery
import importlib.util
import os
import sys
import threading
from types import ModuleType
from typing import Any, Final, Literal, TypeAlias

from volplugin.errors import Unsupported

Name: TypeAlias = Literal["rados", "rbd", "cephfs"]

_FOLDER: Final = "/usr/lib/python3/dist-packages"
_lock = threading.RLock()  # rbd and cephfs load rados


def load(name: Name) -> Any:
    """Return the binding ``name``, loaded once for the process.

    Raise `Unsupported` where it is not installed, or not for this Python.
    """
    with _lock:
        if name in sys.modules:
            return sys.modules[name]
        if name != "rados":
            load("rados")  # their modules look for it among those loaded
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            return _load_file(name)
        except ImportError as error:
            raise _unsupported(name, str(error)) from error


def _load_file(name: Name) -> ModuleType:
    # Debian names its files for one Python alone: cpython-311-x86_64-linux-gnu.
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    path = os.path.join(_FOLDER, name + suffix)
    if not os.path.exists(path):
        raise _unsupported(name, f"there is no {path}")
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise _unsupported(name, f"{path} can't be loaded")
    try:
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    except ImportError as error:
        sys.modules.pop(name, None)
        raise _unsupported(name, str(error)) from error
    return module


def _unsupported(name: Name, reason: str) -> Unsupported:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return Unsupported(
        f"the driver needs Debian's package python3-{name} (apt-get install"
        f" python3-{name}), for Python {version}: {reason}"
    )
