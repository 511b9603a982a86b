"""Plugins on other machines: they prove themselves, and are proved, by certificates."""

import json
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import attrs
import pytest
from support.bad_plugin import BadPlugin
from support.require import require

from volplugin.errors import InvalidArgument, Unavailable
from volplugin.plugins.client import Held, Lost, PluginClient
from volplugin.plugins.discovery import Folders

NAME: Final = "far"
_KEY: Final = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


@attrs.frozen
class Authority:
    """Makes certificates, of which each NAME is in NAME.pem and NAME.key."""

    folder: Path
    name: str

    @classmethod
    def begin(cls, folder: Path, name: str) -> "Authority":
        """Make an authority."""
        authority = cls(folder, name)
        authority._run("req", "-x509", *_KEY, "-keyout", f"{name}.key")
        return authority

    @property
    def file(self) -> str:
        """What proves those that it has made."""
        return str(self.folder / f"{self.name}.pem")

    def make(self, name: str, *, host: str) -> tuple[str, str]:
        """Return the files of the certificate and the key of an address."""
        (self.folder / "extensions").write_text(f"subjectAltName=IP:{host}\n")
        request = ("req", *_KEY, "-keyout", f"{name}.key", "-out", f"{name}.csr")
        self._openssl(*request, "-subj", f"/CN={name}")
        sign = ("x509", "-req", "-in", f"{name}.csr", "-extfile", "extensions")
        issuer = ("-CA", f"{self.name}.pem", "-CAkey", f"{self.name}.key")
        self._openssl(*sign, *issuer, "-CAcreateserial", "-out", f"{name}.pem")
        return str(self.folder / f"{name}.pem"), str(self.folder / f"{name}.key")

    def _run(self, *words: str) -> None:
        own = ("-out", f"{self.name}.pem", "-subj", f"/CN={self.name}", "-days", "2")
        self._openssl(*words, *own)

    def _openssl(self, *words: str) -> None:
        command = [require("openssl"), *words]
        subprocess.run(command, cwd=self.folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The certificates of all tests."""
    return tmp_path_factory.mktemp("certificates")


@pytest.fixture(scope="module")
def authority(files: Path) -> Authority:
    """The authority that made the plugin's certificate."""
    return Authority.begin(files, "authority")


@pytest.fixture(scope="module")
def stranger(files: Path) -> Authority:
    """An authority that made nobody's."""
    return Authority.begin(files, "stranger")


@pytest.fixture(scope="module")
def pair(authority: Authority) -> tuple[str, str]:
    """The plugin's own certificate and key."""
    return authority.make("plugin", host="127.0.0.1")


Make = Callable[[ssl.SSLContext | None], BadPlugin]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Makes a plugin, with TLS by a context, that has the volume v."""
    made: list[BadPlugin] = []

    def begin(context: ssl.SSLContext | None) -> BadPlugin:
        plugin = BadPlugin(tmp_path / "there", ("127.0.0.1", 0), tls=context)
        plugin.start()
        (tmp_path / "there" / "v").mkdir()
        made.append(plugin)
        return plugin

    yield begin
    for plugin in made:
        plugin.close()


@pytest.fixture
def far(make: Make, pair: tuple[str, str]) -> BadPlugin:
    """A plugin that proves itself."""
    return make(serving(pair))


def serving(pair: tuple[str, str], client_authority: str = "") -> ssl.SSLContext:
    """Return a server's context, which asks for clients' certificates if told to."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*pair)
    if client_authority:
        context.load_verify_locations(client_authority)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def client_of(
    plugin: BadPlugin, tls: object = None, *, host: str = "127.0.0.1", limit: float = 5
) -> PluginClient:
    """Return a client that finds the plugin by a .json with ``tls``."""
    assert not isinstance(plugin.address, str)
    specs = Path(plugin.folder).parent / "specs"
    specs.mkdir(exist_ok=True)
    said: dict[str, Any] = {"Addr": f"https://{host}:{plugin.address[1]}"}
    if tls is not None:
        said["TLSConfig"] = tls
    (specs / f"{NAME}.json").write_text(json.dumps(said))
    return PluginClient(NAME, Folders(sockets=[], specs=[str(specs)]), limit=limit)


def test_a_plugin_that_is_proved(far: BadPlugin, authority: Authority) -> None:
    """By the authority that its file names."""
    client = client_of(far, {"CAFile": authority.file})
    client.create("w", {"a": "b" * 2000})
    assert client.get("w") == Held(name="w")
    assert far.made["w"] == {"a": "b" * 2000}


def test_one_that_is_of_another(far: BadPlugin, stranger: Authority) -> None:
    """It is told nothing, and the error says why."""
    client = client_of(far, {"CAFile": stranger.file}, limit=0.3)
    with pytest.raises(Unavailable, match="certificate verify failed") as caught:
        client.create("w", {})
    assert not isinstance(caught.value, Lost)
    assert far.calls == []


def test_one_of_another_address(
    make: Make, authority: Authority, pair: tuple[str, str]
) -> None:
    """Whose certificate names another one is not the plugin that was meant."""
    plugin = make(serving(authority.make("elsewhere", host="192.0.2.1")))
    client = client_of(plugin, {"CAFile": authority.file}, limit=0.3)
    with pytest.raises(Unavailable, match="IP address mismatch"):
        client.create("w", {})
    assert plugin.calls == []


@pytest.mark.parametrize("said", [{}, {"InsecureSkipVerify": True}])
def test_one_that_need_not_prove_itself(far: BadPlugin, said: dict[str, Any]) -> None:
    """As with dockerd: it is told to, or no authority is named."""
    assert client_of(far, said).get("v") == Held(name="v")


def test_skipped_though_there_is_an_authority(
    far: BadPlugin, stranger: Authority
) -> None:
    """InsecureSkipVerify is stronger than CAFile."""
    said = {"CAFile": stranger.file, "InsecureSkipVerify": True}
    assert client_of(far, said).get("v") == Held(name="v")


def test_one_of_a_spec(far: BadPlugin) -> None:
    """A .spec has no place for an authority: dockerd proves none of those."""
    client_of(far)
    folder = Path(far.folder).parent / "specs"
    (folder / f"{NAME}.json").rename(folder / "other.json")
    assert not isinstance(far.address, str)
    (folder / f"{NAME}.spec").write_text(f"https://127.0.0.1:{far.address[1]}\n")
    client = PluginClient(NAME, Folders(sockets=[], specs=[str(folder)]))
    assert client.get("v") == Held(name="v")


def test_one_without_a_word_on_tls(far: BadPlugin) -> None:
    """It is proved by the authorities that the host trusts, which ours is none of."""
    with pytest.raises(Unavailable, match="certificate verify failed"):
        client_of(far, limit=0.3).get("v")


def test_clients_that_prove_themselves(
    make: Make, authority: Authority, stranger: Authority, pair: tuple[str, str]
) -> None:
    """Whoever has no certificate, or a stranger's, is refused, with no effect."""
    plugin = make(serving(pair, authority.file))
    said = {"CAFile": authority.file}
    ours = authority.make("client", host="127.0.0.1")
    named = {**said, "CertFile": ours[0], "KeyFile": ours[1]}
    assert client_of(plugin, named).get("v") == Held(name="v")
    plugin.calls.clear()
    theirs = stranger.make("mallory", host="127.0.0.1")
    for fields in (said, {**said, "CertFile": theirs[0], "KeyFile": theirs[1]}):
        with pytest.raises(Unavailable, match=r"alert|reset|closed|EOF") as caught:
            client_of(plugin, fields, limit=0.3).create("w", {})
        assert not isinstance(caught.value, Lost)
    assert plugin.calls == []


def test_files_that_can_not_be_used(
    far: BadPlugin, authority: Authority, files: Path
) -> None:
    """The error names the file, and the file that names it; nobody is asked."""
    (files / "text").write_text("no certificate")
    command = [require("openssl"), "ec", "-in", "authority.key", "-out", "locked.key"]
    command += ["-aes128", "-passout", "pass:secret"]
    subprocess.run(command, cwd=files, check=True, capture_output=True)
    missing, text = str(files / "missing"), str(files / "text")
    locked = str(files / "locked.key")
    for said, reason in (
        ({"CAFile": missing}, f"CAFile {missing}: No such file or directory"),
        ({"CAFile": text}, f"CAFile {text}: "),
        (
            {"CertFile": missing, "KeyFile": text},
            f"CertFile {missing}, KeyFile {text}: No such file",
        ),
        ({"CertFile": text, "KeyFile": text}, f"CertFile {text}, KeyFile {text}: "),
        # Not asked on a terminal, which a service has none of.
        ({"CertFile": authority.file, "KeyFile": locked}, f"KeyFile {locked}: "),
    ):
        client = client_of(far, said)
        begun = time.monotonic()
        with pytest.raises(InvalidArgument) as caught:
            client.create("w", {})
        assert time.monotonic() - begun < 1
        assert reason in str(caught.value)
        assert str(Path(far.folder).parent / "specs" / f"{NAME}.json") in str(
            caught.value
        )
        assert client.health() == "not asked yet"
    assert far.calls == []


def test_a_handshake_that_hangs(make: Make) -> None:
    """The limit bounds it too; nothing was sent."""
    plugin = make(None)  # it waits for HTTP
    client = client_of(plugin, {}, limit=0.4)
    begun = time.monotonic()
    with pytest.raises(Unavailable, match="timed out") as caught:
        client.create("w", {})
    assert 0.3 < time.monotonic() - begun < 0.9
    assert not isinstance(caught.value, Lost)


@pytest.mark.parametrize("kind", ["hang", "drip"])
def test_the_limit(far: BadPlugin, kind: str) -> None:
    """It bounds the whole call, as without TLS."""
    client = client_of(far, {}, limit=0.4)
    far.fail("Create", kind)
    begun = time.monotonic()
    with pytest.raises(Lost, match=r"no answer within 0\.[34] s"):
        client.create("w", {})
    assert 0.3 < time.monotonic() - begun < 0.9
    assert far.count("Create") == 1


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("close", "closed the connection without an answer"),
        ("cut", "its answer was cut off"),
        ("endless", "more than 33554432 bytes"),
    ],
)
def test_no_answer(far: BadPlugin, kind: str, reason: str) -> None:
    """The outcome is unknown, as without TLS."""
    client = client_of(far, {})
    far.fail("Create", kind)
    with pytest.raises(Lost, match=reason):
        client.create("w", {})
    assert far.count("Create") == 1
