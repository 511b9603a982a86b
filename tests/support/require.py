"""What a test needs from the machine: a skip with its reason, a failure in CI."""

import os
import shutil
from typing import NoReturn

import pytest

# Debian's command line fits Debian's dockerd; a newer one that comes first on PATH may
# refuse its API, so the distribution's folders are looked at before PATH.
_SEARCH = "/usr/bin:/usr/sbin:" + os.environ.get("PATH", "")


def missing(reason: str) -> NoReturn:
    """Skip the test for ``reason``; fail it where the environment sets ``CI``."""
    if os.environ.get("CI"):
        pytest.fail(f"{reason} (CI is set: a missing part fails)", pytrace=False)
    pytest.skip(reason)


def require(command: str) -> str:
    """Return the path of ``command``, or end the test as `missing` does."""
    found = shutil.which(command, path=_SEARCH)
    return found if found is not None else missing(f"{command} is not installed")


def require_root() -> None:
    """End the test as `missing` does unless it runs as root."""
    if os.geteuid() != 0:
        missing("needs root: mount namespaces and trusted xattrs")
