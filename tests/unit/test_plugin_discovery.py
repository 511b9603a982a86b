"""Where plugins are found, as dockerd finds them, and what is no address."""

import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from volplugin.errors import InvalidArgument, NotFound
from volplugin.plugins.discovery import SOCKETS, SPECS, TLS, Address, Folders

Listen = Callable[[Path], Path]


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    """Two folders for sockets and two for files; the second of each is not there."""
    for name in ("a", "b", "c", "d"):
        (tmp_path / name).mkdir()
    return Folders(
        sockets=[f"{tmp_path}/a", f"{tmp_path}/gone", f"{tmp_path}/b"],
        specs=[f"{tmp_path}/c", f"{tmp_path}/gone", f"{tmp_path}/d"],
    )


@pytest.fixture
def listen() -> Iterator[Listen]:
    """Makes sockets."""
    made: list[socket.socket] = []

    def begin(path: Path) -> Path:
        path.parent.mkdir(exist_ok=True)
        listener = socket.socket(socket.AF_UNIX)
        made.append(listener)
        listener.bind(str(path))
        return path

    yield begin
    for listener in made:
        listener.close()


def spec(folder: Path, text: str, name: str = "p.spec") -> Folders:
    """Return folders of which one has a file with this text."""
    (folder / name).write_text(text)
    return Folders(sockets=[], specs=[str(folder)])


def said(folder: Path, fields: object) -> Address:
    """Return the address that a .json with these fields says."""
    return spec(folder, json.dumps(fields), "p.json").find("p")


def test_dockers_own_folders() -> None:
    """Docker's come first, then PouchContainer's."""
    assert Folders() == Folders(sockets=SOCKETS, specs=SPECS)
    assert SOCKETS == ("/run/docker/plugins", "/run/pouch/plugins")
    assert SPECS[:2] == ("/etc/docker/plugins", "/usr/lib/docker/plugins")


def test_the_order(tmp_path: Path, folders: Folders, listen: Listen) -> None:
    """Sockets before files, folder by folder; NAME before NAME/NAME, .spec first."""
    order: list[Path] = []
    for folder in ("a", "b"):
        order += [tmp_path / folder / "p.sock", tmp_path / folder / "p" / "p.sock"]
    for folder in ("c", "d"):
        for end in ("spec", "json"):
            order.append(tmp_path / folder / f"p.{end}")
            order.append(tmp_path / folder / "p" / f"p.{end}")
    for path in order:
        path.parent.mkdir(exist_ok=True)
        if path.suffix == ".sock":
            listen(path)
        elif path.suffix == ".spec":
            path.write_text("unix:///somewhere")
        else:
            path.write_text('{"Addr": "unix:///somewhere"}')
    for path in order:
        found = folders.find("p")
        assert found.found_in == str(path)
        if path.suffix == ".sock":
            assert found == Address(found_in=str(path), path=str(path))
        else:
            assert found == Address(found_in=str(path), path="/somewhere")
        assert folders.names() == ["p"]
        path.unlink()
    assert folders.names() == []
    with pytest.raises(NotFound):
        folders.find("p")


def test_what_is_no_socket(tmp_path: Path, folders: Folders, listen: Listen) -> None:
    """A file, a folder, a pipe or a link to nowhere is passed over."""
    (tmp_path / "a" / "file.sock").touch()
    (tmp_path / "a" / "folder.sock").mkdir()
    os.mkfifo(tmp_path / "a" / "pipe.sock")
    (tmp_path / "a" / "link.sock").symlink_to("nowhere")
    (tmp_path / "a" / "loop.sock").symlink_to("loop.sock")
    (tmp_path / "c" / "folder.spec").mkdir()
    os.mkfifo(tmp_path / "c" / "pipe.json")
    assert folders.names() == []
    for name in ("file", "folder", "pipe", "link", "loop"):
        with pytest.raises(NotFound):
            folders.find(name)


def test_links(tmp_path: Path, folders: Folders, listen: Listen) -> None:
    """A link to a socket, and a link to a folder, are what they lead to."""
    there = listen(tmp_path / "there.sock")
    (tmp_path / "a" / "p.sock").symlink_to(there)
    assert folders.find("p").path == str(tmp_path / "a" / "p.sock")
    listen(tmp_path / "other" / "q.sock")
    (tmp_path / "b" / "q").symlink_to(tmp_path / "other")
    assert folders.find("q").path == str(tmp_path / "b" / "q" / "q.sock")
    assert folders.names() == ["p", "q"]


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../p",
        "a/b",
        "/p",
        "-p",
        ".p",
        "p\n",
        "p q",
        "é",
        "p\0",
        "x" * 256,
    ],
)
def test_what_is_no_name(folders: Folders, name: str) -> None:
    """No name leads out of the folders; the error has the name and what would do."""
    with pytest.raises(InvalidArgument, match="is no plugin's name: it is letters"):
        folders.find(name)


@pytest.mark.parametrize("name", ["p", "7", "a.b-c_d", "vendor:latest", "x" * 200])
def test_names(tmp_path: Path, name: str) -> None:
    """Those of dockerd, with a tag too."""
    folders = spec(tmp_path, "unix:///x", f"{name}.spec")
    assert folders.find(name).path == "/x"


def test_nearest_names(tmp_path: Path, folders: Folders, listen: Listen) -> None:
    """The error names the nearest plugin, where was looked, and all that there are."""
    listen(tmp_path / "a" / "rclone.sock")
    (tmp_path / "c" / "netapp.json").write_text("{}")
    with pytest.raises(NotFound) as caught:
        folders.find("rclon")
    assert str(caught.value) == (
        f"there is no plugin 'rclon'; did you mean 'rclone'?; looked for rclon.sock in "
        f"{tmp_path}/a, {tmp_path}/gone, {tmp_path}/b and for rclon.spec and "
        f"rclon.json in {tmp_path}/c, {tmp_path}/gone, {tmp_path}/d; there are netapp, "
        f"rclone"
    )


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("unix:///run/x.sock", {"path": "/run/x.sock"}),
        ("unix:/run/x.sock", {"path": "/run/x.sock"}),
        ("tcp://h:1", {"host": "h", "port": 1}),
        ("http://h:1", {"host": "h", "port": 1}),
        ("tcp://192.0.2.1:65535/", {"host": "192.0.2.1", "port": 65535}),
        ("tcp://h", {"host": "h", "port": 80}),
        ("tcp://[2001:db8::1]:7", {"host": "2001:db8::1", "port": 7}),
        ("TCP://Host.Example:7", {"host": "host.example", "port": 7}),
    ],
)
def test_addresses(tmp_path: Path, url: str, address: dict[str, Any]) -> None:
    """Each is read the same from a .spec, with blanks around it, and from a .json."""
    for text in (url, f" {url}\n", f"{url}\r\n\n"):
        found = spec(tmp_path, text).find("p")
        assert found == Address(found_in=f"{tmp_path}/p.spec", **address)
    (tmp_path / "p.spec").unlink()
    found = said(tmp_path, {"Addr": f"{url}\n", "Name": "p", "More": 1})
    assert found == Address(found_in=f"{tmp_path}/p.json", **address)


def test_how_an_address_reads() -> None:
    """In errors, and as the header Host."""
    assert str(Address(found_in="", path="/x")) == "/x"
    assert str(Address(found_in="", host="h", port=7)) == "h:7"
    assert str(Address(found_in="", host="2001:db8::1", port=7)) == "[2001:db8::1]:7"


@pytest.mark.parametrize(
    "url",
    [
        "",
        "/run/x.sock",
        "x.sock",
        "unix://",
        "unix://x.sock",
        "unix://host/x.sock",
        "ftp://h:1",
        "npipe:////./pipe/x",
        "fd://3",
        "tcp://",
        "tcp://:1",
        "tcp:h:1",
        "h:1",
        "tcp://h:x",
        "tcp://h:70000",
        "tcp://[::1",
        "tcp://]x[:1",
        "https://[::1:4]x:1",
        "unix:// /x",
    ],
)
def test_what_is_no_address(tmp_path: Path, url: str) -> None:
    """The error has the file and the value."""
    for folders in (
        spec(tmp_path, url),
        spec(tmp_path, json.dumps({"Addr": url}), "q.json"),
    ):
        name = "p" if (tmp_path / "p.spec").exists() else "q"
        with pytest.raises(InvalidArgument) as caught:
            folders.find(name)
        end = "spec" if name == "p" else "json"
        assert str(caught.value).startswith(f"{tmp_path}/{name}.{end}: {url!r}")
        (tmp_path / f"{name}.{end}").unlink()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not JSON: Expecting value"),
        ("unix:///x", "not JSON"),
        ("[" * 50_000, "not JSON"),
        ("null", 'it must be an object with "Addr", a URL'),
        ("[]", 'it must be an object with "Addr"'),
        ("{}", 'it must be an object with "Addr"'),
        ('{"Addr": 5}', 'it must be an object with "Addr"'),
        ('{"Addr": ["unix:///x"]}', 'it must be an object with "Addr"'),
        (" " * 70_000, "more than 65536 bytes are no address"),
    ],
)
def test_what_is_no_json(tmp_path: Path, text: str, reason: str) -> None:
    """The error has the file and what it should hold."""
    with pytest.raises(InvalidArgument) as caught:
        spec(tmp_path, text, "p.json").find("p")
    assert str(caught.value).startswith(f"{tmp_path}/p.json: {reason}")


def test_files_that_can_not_be_read(tmp_path: Path) -> None:
    """One that is too long, and one that is no text."""
    with pytest.raises(InvalidArgument, match="more than 65536 bytes"):
        spec(tmp_path, "unix:///" + "x" * 70_000).find("p")
    (tmp_path / "p.spec").write_bytes(b"unix:///\xff")
    with pytest.raises(InvalidArgument, match=r"p\.spec: can't be read: 'utf-8'"):
        Folders(sockets=[], specs=[str(tmp_path)]).find("p")


def test_tls(tmp_path: Path) -> None:
    """Its files are taken as they are; no authority means no proof, as with dockerd."""
    url = "https://h"
    files = {"CertFile": "/cert", "KeyFile": "/key"}
    for config, tls in (
        (None, TLS()),
        ({}, TLS(insecure_skip_verify=True)),
        ({"CAFile": ""}, TLS(insecure_skip_verify=True)),
        ({"CAFile": "/ca"}, TLS(ca_file="/ca")),
        (
            {"CAFile": "/ca", "InsecureSkipVerify": True},
            TLS(ca_file="/ca", insecure_skip_verify=True),
        ),
        (
            {"CAFile": "/ca", **files},
            TLS(ca_file="/ca", cert_file="/cert", key_file="/key"),
        ),
    ):
        found = said(tmp_path, {"Addr": url, "TLSConfig": config})
        assert (found.port, found.tls) == (443, tls)
    (tmp_path / "p.json").unlink()
    assert spec(tmp_path, url).find("p").tls == TLS(insecure_skip_verify=True)


def test_tls_is_of_https_alone(tmp_path: Path) -> None:
    """As with dockerd, tcp is plain whatever TLSConfig says."""
    for url in ("tcp://h:1", "http://h:1", "unix:///x"):
        assert said(tmp_path, {"Addr": url, "TLSConfig": {"CAFile": "/ca"}}).tls is None


@pytest.mark.parametrize(
    "tls",
    [
        [],
        "x",
        5,
        {"CAFile": 5},
        {"CertFile": None, "KeyFile": ""},
        {"KeyFile": ["/x"], "CertFile": "/x"},
        {"InsecureSkipVerify": "true"},
        {"InsecureSkipVerify": 1},
        {"CertFile": "/cert"},
        {"KeyFile": "/key"},
    ],
)
def test_what_is_no_tls(tmp_path: Path, tls: object) -> None:
    """A wrong type, and one of a pair, is refused with what would do."""
    with pytest.raises(InvalidArgument, match=r"p\.json: TLSConfig (takes|has one)"):
        said(tmp_path, {"Addr": "https://h", "TLSConfig": tls})


@given(
    st.text(max_size=40)
    | st.sampled_from(["tcp", "unix", "https"]).flatmap(
        lambda scheme: st.text("/:[]@%.x1", max_size=12).map(
            lambda end: f"{scheme}:{end}"
        )
    )
)
def test_any_text_is_an_address_or_refused(url: str) -> None:
    """No file escapes as another error."""
    from volplugin.plugins.discovery import _address

    try:
        found = _address("f", url, None)
    except InvalidArgument as error:
        assert str(error).startswith("f: ")  # noqa: PT017 - may also be right
    else:
        assert bool(found.path) is not bool(found.host)
