"""plugin-config.json, Dockerfile and the package lists say what the code says."""

import json
import re
import shlex
from pathlib import Path
from typing import Final

import pytest

from volplugin import config_values
from volplugin.cli import cli
from volplugin.config import DEFAULT_FILE, SCALARS, Config, load
from volplugin.host.commands import _PACKAGES

ROOT: Final = Path(__file__).resolve().parents[2]
PLUGIN: Final = json.loads((ROOT / "plugin-config.json").read_text())
PACKAGING: Final = ROOT / "packaging" / "plugin"

# What dockerd 20.10 knows of a plugin's configuration; it ignores all other keys.
KEYS: Final = {
    *("args", "description", "documentation", "entrypoint", "env", "interface"),
    *("ipchost", "linux", "mounts", "network", "pidhost", "propagatedMount", "workdir"),
}
BINDS: Final = {"data": "/var/lib/volplugin", "mnt": "/mnt"}


def served() -> Config:
    """The configuration that the entry point gives to the server."""
    command = PLUGIN["entrypoint"][-1]
    words = shlex.split(command.removeprefix("exec ").removesuffix(" 2>&1"))
    assert words[:2] == ["/usr/bin/volplugin", "serve"]
    given = cli.commands["serve"].make_context("serve", words[2:]).params
    flags = {
        "root": given["root"],
        "sockets": given["sockets"],
        "admin_socket": given["admin_socket"],
        "propagated": given["propagated"],
    }
    assert {name for name, value in given.items() if value} == set(flags)
    return load(
        file="/dev/null",
        environ={each["name"]: each["value"] for each in PLUGIN["env"]},
        flags=flags,
        settings_of=lambda _: None,
        drivers=("local",),
    )


def packages(name: str) -> list[str]:
    lines = (PACKAGING / name).read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_has_what_dockerd_reads() -> None:
    """No key is misspelt; devices are a list, as null would end the plugin's start."""
    assert set(PLUGIN) == KEYS
    assert set(PLUGIN["linux"]) == {"allowAllDevices", "capabilities", "devices"}
    assert PLUGIN["linux"]["devices"] == []
    assert PLUGIN["interface"]["types"] == ["docker.volumedriver/1.0"]
    assert len(PLUGIN["interface"]["socket"]) <= 22
    assert (ROOT / PLUGIN["documentation"]).is_file()


def test_the_entry_point_serves_where_dockerd_looks() -> None:
    """Socket, shared directory and root are those that the plugin is given."""
    config = served()
    (socket,) = config.sockets
    assert socket.path == f"/run/docker/plugins/{PLUGIN['interface']['socket']}"
    assert config.propagated == PLUGIN["propagatedMount"]
    assert config.root == BINDS["data"] == Config().root
    assert config.admin_socket == f"{config.root}/{config_values.MANAGED_ADMIN_SOCKET}"


def test_the_first_process_waits_for_children() -> None:
    """Tini as a subreaper, since the plugin sees the host's processes."""
    assert PLUGIN["entrypoint"][:3] == ["/usr/bin/tini", "-s", "--"]
    assert PLUGIN["pidhost"] is True
    assert "tini" in packages("packages.txt")


def test_each_setting_is_a_variable_but_those_of_the_entry_point() -> None:
    """Each can be set, has a description, and has its default in the code."""
    fixed = {"root", "admin-socket", "propagated"}
    settings = {"config", *SCALARS} - fixed
    wanted = {f"VOLPLUGIN_{key.upper().replace('-', '_')}" for key in settings}
    assert {each["name"] for each in PLUGIN["env"]} == wanted
    for each in PLUGIN["env"]:
        assert each["settable"] == ["value"]
        assert each["value"] == ""
        assert each["description"]


def test_variables_tell_the_defaults_that_the_code_has() -> None:
    """What a description gives as the default is the default."""
    defaults = Config()
    for each in PLUGIN["env"]:
        told = re.search(r"; default: (\S+)$", each["description"])
        assert told is not None, each["name"]
        key = each["name"].removeprefix("VOLPLUGIN_").lower()
        value = None if key == "config" else getattr(defaults, key)
        shown = {
            "usage_marks": ",".join(map(str, defaults.usage_marks)),
        }.get(key, f"{value:g}" if isinstance(value, float) else str(value).lower())
        assert told[1] == shown, each["name"]


def test_what_of_the_host_is_in_the_plugin() -> None:
    """Directories that every host has, but for the data; slaves, never shared ones.

    Of a shared one dockerd's masks would show on the host, and an unmount in the
    plugin would be one there.
    """
    mounts = {each["name"]: each for each in PLUGIN["mounts"]}
    assert {name: each["destination"] for name, each in mounts.items()} == {
        **BINDS,
        "dev": "/dev",
        "sys": "/sys",
    }
    for name, each in mounts.items():
        assert each["source"] == each["destination"]
        assert each["options"] == ["rbind", "rslave"]
        assert each["type"] == "bind"
        assert each["settable"] == (["source"] if name in BINDS else [])
        assert each["description"]


def test_rights_are_those_that_drivers_need() -> None:
    """Each capability beyond a container's own has its reason here."""
    assert set(PLUGIN["linux"]["capabilities"]) == {
        "CAP_SYS_ADMIN",  # mount, quotas, trusted xattrs
        "CAP_SYS_PTRACE",  # which containers have a volume
        "CAP_SYS_RESOURCE",  # to grow an ext4, and to spare helpers when memory ends
        "CAP_LINUX_IMMUTABLE",  # mountpoints that nothing can be written into
    }
    assert PLUGIN["linux"]["allowAllDevices"] is True  # /dev/loopN, whatever N


def test_libraries_are_those_of_the_package() -> None:
    """Each library that setup.cfg asks for is Debian's in the image, and no other."""
    setup = (ROOT / "setup.cfg").read_text()
    block = setup.partition("install_requires =")[2].partition("[")[0]
    asked = re.findall(r"^    ([a-z]+) >=", block, re.MULTILINE)
    names = {"attrs": "attr", "cattrs": "cattr"}
    wanted = {f"python3-{names.get(each, each)}" for each in asked}
    listed = packages("packages.txt")
    assert {each for each in listed if each.startswith("python3-")} == wanted
    assert set(_PACKAGES.values()) <= set(listed)


def test_bindings_of_the_cluster_are_apart() -> None:
    """An image without Ceph has none of it."""
    assert packages("packages-ceph.txt") == [
        f"python3-{name}" for name in ("cephfs", "rados", "rbd")
    ]
    assert not [each for each in packages("packages.txt") if "ceph" in each]


@pytest.mark.parametrize("file", ["Dockerfile", "Makefile"])
def test_both_ways_to_build_are_one(file: str) -> None:
    """Whoever builds with Docker and whoever does not gets what one script makes."""
    assert "packaging/plugin/assemble" in (ROOT / file).read_text()


def test_the_dockerfile_copies_all_that_the_script_reads() -> None:
    """No file is missing in a build that sees nothing else."""
    script = (PACKAGING / "assemble").read_text()
    read = set(re.findall(r'"\$top/([a-zA-Z.-]+)"', script))
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    copied = {
        word
        for line in lines
        if line.startswith("COPY ") and "--from" not in line
        for word in line.split()[1:-1]
    }
    assert read | {"packaging/plugin"} == copied


def test_no_file_of_the_image_configures_it() -> None:
    """Defaults are in the code: an upgrade that changes them is one of the code."""
    assert DEFAULT_FILE not in (PACKAGING / "assemble").read_text()
