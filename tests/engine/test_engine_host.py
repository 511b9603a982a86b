"""The test host itself: what happens in it stays in it."""

import os

import pytest
from support import processes
from support.host import Host
from support.mounts import read_mounts
from support.require import require
from support.wait import eventually

pytestmark = pytest.mark.root


def test_a_mount_in_a_host_is_not_seen_by_the_machine(host: Host) -> None:
    """A host's mount table is cut off from the machine's."""
    host.run("mount", "-t", "tmpfs", "inside", "/mnt")
    assert "inside" in {mount.source for mount in host.mounts()}
    assert "inside" not in {mount.source for mount in read_mounts()}


def test_plugin_sockets_of_a_host_are_its_own(host: Host) -> None:
    """/run/docker/plugins of a host is empty and writable at first."""
    assert os.listdir(host.path("/run/docker/plugins")) == []
    host.run("touch", "/run/docker/plugins/x.sock")
    assert not os.path.exists("/run/docker/plugins/x.sock")


def test_closing_a_host_kills_and_names_what_still_runs() -> None:
    """A process left in a host is ended and told of."""
    host = Host()
    left = host.start("sleep", "600", log=host.folder / "sleep.log")
    eventually(lambda: "sleep 600" in processes.command_of(left.pid), "it runs")
    with pytest.raises(AssertionError, match="sleep 600"):
        host.close()
    assert left.wait(10) == -9
    assert not host.folder.exists()
    assert processes.mount_namespace(host.pid) is None


def test_a_missing_command_skips_and_fails_in_ci(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the machine lacks skips a developer's test and fails CI's."""
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no-such-command"):
        require("no-such-command")
    monkeypatch.setenv("CI", "1")
    with pytest.raises(pytest.fail.Exception, match="no-such-command"):
        require("no-such-command")
