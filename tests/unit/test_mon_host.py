"""Addresses of monitors, in all forms in which a configuration may have them."""

import pytest

from volplugin.ceph.settings import Settings, monitors
from volplugin.errors import InvalidArgument, Unavailable


def settings(mon_host: str) -> Settings:
    return Settings(mon_host=mon_host, keyrings=(), key="", keyfile="")


@pytest.mark.parametrize(
    ("mon_host", "v1", "v2"),
    [
        ("", [], []),
        ("10.0.0.1", ["10.0.0.1:6789"], ["10.0.0.1:3300"]),
        ("10.0.0.1:6789", ["10.0.0.1:6789"], []),
        ("10.0.0.1:3300", [], ["10.0.0.1:3300"]),
        ("10.0.0.1:7000", ["10.0.0.1:7000"], []),
        ("v2:10.0.0.1:7000/0", [], ["10.0.0.1:7000"]),
        ("v1:10.0.0.1/0", ["10.0.0.1:6789"], []),
        (
            "[v2:10.0.0.1:3300/0,v1:10.0.0.1:6789/0] [v2:10.0.0.2:3300,v1:10.0.0.2:1]",
            ["10.0.0.1:6789", "10.0.0.2:1"],
            ["10.0.0.1:3300", "10.0.0.2:3300"],
        ),
        (
            "10.0.0.1, 10.0.0.2;10.0.0.1",
            ["10.0.0.1:6789", "10.0.0.2:6789"],
            ["10.0.0.1:3300", "10.0.0.2:3300"],
        ),
        (
            "[v2:[fd00::1]:3300/0,v1:[fd00::1]:6789/0]",
            ["[fd00::1]:6789"],
            ["[fd00::1]:3300"],
        ),
        ("[fd00::1]", ["[fd00::1]:6789"], ["[fd00::1]:3300"]),
        ("[fd00::1]:6789", ["[fd00::1]:6789"], []),
        ("fd00::1", ["[fd00::1]:6789"], ["[fd00::1]:3300"]),
        ("any:10.0.0.1", ["10.0.0.1:6789"], ["10.0.0.1:3300"]),
    ],
)
def test_forms(mon_host: str, v1: list[str], v2: list[str]) -> None:
    """Each address goes to the protocols that are spoken there, once."""
    assert monitors(settings(mon_host), "v1") == v1
    assert monitors(settings(mon_host), "v2") == v2


def test_names() -> None:
    """A host's name is looked up; one without an address is told."""
    assert "127.0.0.1:6789" in monitors(settings("localhost"), "v1")
    with pytest.raises(Unavailable, match=r"no-such\.invalid has no address"):
        monitors(settings("no-such.invalid"), "v1")


def test_what_is_none() -> None:
    """What is no address is told with its value."""
    with pytest.raises(InvalidArgument, match=r"'10\.0\.0\.1=3' is no address"):
        monitors(settings("10.0.0.1=3"), "v1")
