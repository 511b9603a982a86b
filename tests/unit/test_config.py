"""The configuration: its sources, their order, their faults, and its print."""

import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from volplugin import config as module
from volplugin import options, toml
from volplugin.config import (
    BackendConfig,
    Config,
    SocketConfig,
    Timeouts,
    load,
)
from volplugin.config_print import render
from volplugin.errors import InvalidArgument


@attrs.frozen(kw_only=True)
class Directory:
    allow: tuple[str, ...] = options.option(
        help="allowed", parse=options.path_list, default=()
    )
    label: str = options.option(help="label", parse=options.text, default="")


@attrs.frozen(kw_only=True)
class Memory:
    root: str = options.option(
        help="root", parse=options.absolute_path, default="/mnt/tmpfs"
    )
    size: int = options.option(help="size", parse=options.size(), default=1)
    guard: bool = options.option(help="guard", parse=options.boolean, default=True)
    mode: int = options.option(help="mode", parse=options.mode, default=0o1777)


DRIVERS = {"local": Directory, "tmpfs": Memory, "plain": None}
BUILT_IN = {name: BackendConfig(name=name, driver=name) for name in DRIVERS}


class Load(Protocol):
    def __call__(
        self, text: str = "", environ: Mapping[str, str] | None = None, **flags: object
    ) -> Config: ...


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "volplugin.toml"


@pytest.fixture
def loaded(file: Path) -> Load:
    def loaded(
        text: str = "", environ: Mapping[str, str] | None = None, **flags: object
    ) -> Config:
        file.write_text(text)
        return read(str(file), environ, flags)

    return loaded


@pytest.fixture
def faults(loaded: Load, file: Path) -> Callable[..., list[str]]:
    """Loads and returns the faults, without the file's directory."""

    def faults(
        text: str = "", environ: Mapping[str, str] | None = None, **flags: object
    ) -> list[str]:
        with pytest.raises(InvalidArgument) as caught:
            loaded(text, environ, **flags)
        return str(caught.value).replace(str(file), "FILE").split("\n")

    return faults


def read(
    file: str | None,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, object] | None = None,
) -> Config:
    return load(
        file=file,
        environ=environ or {},
        flags=flags or {},
        settings_of=DRIVERS.get,
        drivers=DRIVERS.keys(),
        aliases={"ram": "tmpfs"},
        shared=("tmpfs",),
    )


def test_defaults(loaded: Load) -> None:
    """An empty file gives the defaults, and a backend for each driver."""
    assert loaded() == Config(backends=BUILT_IN)
    assert Config() == Config(
        root="/var/lib/volplugin",
        sockets=(
            SocketConfig(
                path="/run/docker/plugins/volplugin.sock",
                mode=0o660,
                owner="root",
                group="root",
            ),
        ),
        default_backend="local",
        log_format="text",
        log_level="info",
        sweep_interval=5.0,
        admin_socket="/run/volplugin/admin.sock",
        usage_interval=60.0,
        usage_marks=(80, 95),
        timeouts=Timeouts(
            create=110.0, mount=110.0, other=50.0, podman=4.5, drain=30.0
        ),
        backends={},
    )


def test_a_whole_file(loaded: Load) -> None:
    """Every key of the file has its place in the value."""
    assert loaded(
        """
        root = "/srv/volplugin/"
        default-backend = "ssd"
        log-format = "json"
        log-level = "debug"
        sweep-interval = 1
        admin-socket = "/run/a.sock"
        usage-interval = 7.5
        usage-marks = "50,90,100"
        [timeouts]
        create = 20.5
        podman = "4"
        [socket.docker]
        path = "/run/docker/plugins/v.sock"
        mode = "0600"
        owner = 1000
        group = "docker"
        [socket.podman]
        path = "/run/v.sock"
        owner = "1001"
        [backend.ssd]
        driver = "local"
        allow = ["/ssd"]
        [backend.tmpfs]
        size = 4096
        guard = false
        """
    ) == Config(
        root="/srv/volplugin",
        default_backend="ssd",
        log_format="json",
        log_level="debug",
        sweep_interval=1.0,
        admin_socket="/run/a.sock",
        usage_interval=7.5,
        usage_marks=(50, 90, 100),
        timeouts=Timeouts(create=20.5, podman=4.0),
        sockets=(
            SocketConfig(
                path="/run/docker/plugins/v.sock",
                mode=0o600,
                owner=1000,
                group="docker",
            ),
            SocketConfig(path="/run/v.sock", owner=1001),
        ),
        backends={
            **BUILT_IN,
            "ssd": BackendConfig(
                name="ssd", driver="local", settings={"allow": ["/ssd"]}
            ),
            "tmpfs": BackendConfig(
                name="tmpfs", driver="tmpfs", settings={"size": 4096, "guard": False}
            ),
        },
    )


def test_flags_go_before_variables_before_the_file(loaded: Load) -> None:
    """Defaults < file < variables < flags, key by key."""
    config = loaded(
        'root = "/file"\nlog-format = "json"\nlog-level = "error"\nsweep-interval = 9',
        {
            "VOLPLUGIN_ROOT": "/variable",
            "VOLPLUGIN_LOG_FORMAT": "text",
            "VOLPLUGIN_SWEEP_INTERVAL": "2.5",
            "VOLPLUGIN_DEFAULT_BACKEND": "tmpfs",
            "VOLPLUGIN_ADMIN_SOCKET": "/run/variable",
            "VOLPLUGIN_USAGE_INTERVAL": "30",
            "VOLPLUGIN_USAGE_MARKS": "90",
            "PATH": "/bin",
        },
        root="/flag",
        log_level=None,
        socket=(),
    )
    assert config == Config(
        root="/flag",
        log_format="text",
        log_level="error",
        sweep_interval=2.5,
        default_backend="tmpfs",
        admin_socket="/run/variable",
        usage_interval=30.0,
        usage_marks=(90,),
        backends=BUILT_IN,
    )


def test_sockets_of_variables_and_flags_replace_the_files(loaded: Load) -> None:
    """A path that the file has too keeps its owner and mode."""
    text = '[socket.a]\npath = "/run/a"\nmode = "0600"\n[socket.b]\npath = "/run/b"'
    a, c, d = SocketConfig(path="/run/a", mode=0o600), "/run/c", "/run/d"
    variable = {"VOLPLUGIN_SOCKET": "/run/a,/run/c"}
    assert loaded(text, variable).sockets == (a, SocketConfig(path=c))
    assert loaded(text, variable, socket=(d,)).sockets == (SocketConfig(path=d),)
    assert loaded(text, sockets=(d, "/run/a")).sockets == (SocketConfig(path=d), a)


def test_an_empty_variable_is_none(loaded: Load) -> None:
    """A managed plugin's environment holds every variable, most of them empty."""
    empty = {
        f"VOLPLUGIN_{name}": ""
        for name in ("CONFIG", "ROOT", "SOCKET", "LOG_FORMAT", "FAILPOINTS")
    }
    assert loaded("", empty) == Config(backends=BUILT_IN)


def test_where_the_file_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The flag's file, else the variable's, else the default, which may be absent."""
    first, second = tmp_path / "first.toml", tmp_path / "second.toml"
    first.write_text('root = "/first"')
    second.write_text('root = "/second"')
    variable = {"VOLPLUGIN_CONFIG": str(second)}
    assert read(str(first), variable).root == "/first"
    assert read(None, variable).root == "/second"
    monkeypatch.setattr(module, "DEFAULT_FILE", str(first))
    assert read(None).root == "/first"
    monkeypatch.setattr(module, "DEFAULT_FILE", str(tmp_path / "absent"))
    assert read(None).root == "/var/lib/volplugin"
    for named in ({"file": str(tmp_path / "absent")}, {"file": None}):
        absent = {"VOLPLUGIN_CONFIG": str(tmp_path / "absent")}
        with pytest.raises(InvalidArgument, match="absent: there is no such file"):
            read(named["file"], absent)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    """The file is named, with what is wrong with it."""
    with pytest.raises(InvalidArgument, match="can't be read: Is a directory"):
        read(str(tmp_path))
    with pytest.raises(InvalidArgument, match="larger than"):
        read("/dev/zero")
    with pytest.raises(InvalidArgument, match="can't be read"):
        read("a\0b")
    bad = tmp_path / "bad.toml"
    bad.write_bytes(b'root = "/a"\nlog-level = "\xff"')
    with pytest.raises(InvalidArgument, match=r"bad\.toml: line 2: not UTF-8"):
        read(str(bad))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("root = ", "FILE: line 1, column 8: not TOML: Invalid value"),
        ('\nroot = "/a', "FILE: line 2, column 11: not TOML: Unterminated string"),
        ("a = 1\na = 2", "FILE: line 2, column 6: not TOML: Cannot overwrite a value"),
        ("a = " + "[" * 5000, "FILE: nested too deeply"),
        ("a = " + "9" * 5000, "FILE: not TOML: Exceeds the limit"),
    ],
)
def test_a_syntax_error_has_line_and_column(
    faults: Callable[..., list[str]], text: str, fault: str
) -> None:
    """What is not TOML is told with its place, and no fault is made up from it."""
    (told,) = faults(text, default_backend="ssd")
    assert told.startswith(fault)


def test_all_faults_are_told_at_once(faults: Callable[..., list[str]]) -> None:
    """One line a fault, whatever source it is in."""
    assert faults(
        """
        rooot = "/x"
        log-level = "loud"
        timeouts = 3
        [socket.a]
        pth = "/run/a"
        mode = 0o660
        owner = "a b"
        [backend.ssd]
        driver = "tmpfs"
        szie = "1G"
        size = "0"
        [backend.hdd]
        driver = "ceph"
        """,
        {"VOLPLUGIN_ROOOT": "/x", "VOLPLUGIN_LOG_FORMAT": "xml"},
        root="relative",
        default_backend="tmpsf",
    ) == [
        "FILE: rooot: unknown key; did you mean 'root'?",
        "FILE: log-level: 'loud' is none of debug, info, warning, error",
        "FILE: socket.a.pth: unknown key; did you mean 'path'?",
        'FILE: socket.a.mode: a mode is written in quotes, such as "0755"',
        "FILE: socket.a.owner: 'a b' is neither an account's name nor an id",
        "FILE: timeouts: must be a table, [timeouts…]",
        "FILE: backend.ssd.szie: unknown key; did you mean 'size'?",
        "FILE: backend.ssd.size: '0' is less than a byte; give a number of bytes, or a "
        "number with K, M, G, T or P (binary units, also KB or KiB), such as 512M, 10G "
        "or 10.5GiB",
        "FILE: backend.hdd.driver: there is no driver 'ceph'; "
        "the drivers are local, plain, tmpfs",
        "VOLPLUGIN_ROOOT: unknown variable; did you mean 'VOLPLUGIN_ROOT'?",
        "VOLPLUGIN_LOG_FORMAT: 'xml' is none of text, json",
        "--root: 'relative' is not an absolute path; begin with /",
        "--default-backend: there is no backend 'tmpsf'; did you mean 'tmpfs'?; "
        "there are local, plain, ssd, tmpfs",
    ]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("socket = 1", "FILE: socket: must be a table"),
        ("[socket]\na = 1", "FILE: socket.a: must be in a table of its own"),
        ("[backend]\ntmpfs = 1", "FILE: backend.tmpfs: must be in a table of its own"),
        ("[backends.a]", "FILE: backends: unknown key; did you mean 'backend'?"),
        (
            "log_level = 'info'",
            "FILE: log_level: unknown key; did you mean 'log-level'?",
        ),
        ("sockets = []", "FILE: sockets: unknown key; did you mean 'socket'?"),
        ("root = 1", "FILE: root: '1' is not an absolute path"),
        ("root = ['/a']", "FILE: root: a list does not fit here"),
        ("root = 1979-05-27", "FILE: root: a value like this does not fit here"),
        ("sweep-interval = 0", "FILE: sweep-interval: '0' is not a time"),
        ("sweep-interval = nan", "FILE: sweep-interval: 'NaN' is not a time"),
        ("sweep-interval = true", "FILE: sweep-interval: 'true' is not a time"),
        ("[timeouts]\nmount = -1.0", "FILE: timeouts.mount: '-1.0' is not a time"),
        ("[timeouts]\nmuont = 1", "FILE: timeouts.muont: unknown key; did you mean"),
        ("[socket.a]\npath = '/run/' ", None),
        (
            "[socket.a]\npath='/a'\n[socket.b]\npath='/a/'",
            "FILE: socket.b.path: another socket has /a too",
        ),
        (f"[socket.a]\npath = '/{'x' * 106}'", None),
        (
            f"[socket.a]\npath = '/{'x' * 107}'",
            re.compile(
                "FILE: socket.a.path: .* is 108 bytes long; a socket's path has"
            ),
        ),
        ("[socket.a]\nowner = 4294967295", "FILE: socket.a.owner: '4294967295' is not"),
        (
            "[backend.ssd]\nsize = 1",
            "FILE: backend.ssd.driver: missing; the drivers are",
        ),
        (
            "[backend.tmpf]",
            "FILE: backend.tmpf.driver: missing; did you mean 'tmpfs'?;",
        ),
        (
            "[backend.a]\ndriver = 1",
            "FILE: backend.a.driver: there is no driver 1; the",
        ),
        (
            "[backend.a]\ndriver = 'lokal'",
            "FILE: backend.a.driver: there is no driver 'lokal'; did you mean 'local'?",
        ),
        (
            "[backend.local]\ndriver = 'tmpfs'",
            "FILE: backend.local.driver: a backend with a driver's name is of that",
        ),
        ("[backend.local]\ndriver = 'local'", None),
        ("[backend.plain]\nx = 1", "FILE: backend.plain.x: unknown key"),
        (
            "[backend.a]\ndriver = 'tmpfs'\ndrivr = 1",
            "FILE: backend.a.drivr: unknown key",
        ),
        (
            "[backend.'a/b']\ndriver = 'local'",
            'FILE: backend."a/b": a backend\'s name is letters',
        ),
        ("[backend.'..']\ndriver = 'local'", 'FILE: backend.".."'),
        ("[backend.'a.b']\ndriver = 'local'", None),
        (f"[backend.{'a' * 256}]\ndriver = 'local'", "FILE: backend.aaa"),
        ("[backend.store]\ndriver = 'local'", "FILE: backend.store: this name is"),
        ("[backend.lock]\ndriver = 'local'", "FILE: backend.lock: this name is"),
        ("[backend.sockets]\ndriver = 'local'", "FILE: backend.sockets: this name is"),
        ("[backend.storeroom]\ndriver = 'local'", None),
        (
            "admin-socket = 'admin.sock'",
            "FILE: admin-socket: 'admin.sock' is not an absolute path; begin with /",
        ),
        (
            "admin-socket = '/a'\n[socket.b]\npath = '/a/'",
            "admin-socket: /a is a socket for engines too; give it a path of its own",
        ),
        ("usage-marks = ''", None),
        ("usage-marks = 90", None),
        ("usage-marks = '1,100'", None),
        *(
            (f"usage-marks = '{wrong}'", f"FILE: usage-marks: '{wrong}' is not a list")
            for wrong in ["0", "101", "80%", "080", "80, 95", "80,", ",", "-1", "1.5"]
        ),
        ("usage-marks = '95,80'", "FILE: usage-marks: '95,80' does not ascend"),
        ("usage-marks = '80,80'", "FILE: usage-marks: '80,80' does not ascend"),
        ("usage-interval = 0", "FILE: usage-interval: '0' is not a time"),
        ("default-backend = 'ssd'", "FILE: default-backend: there is no backend 'ssd'"),
    ],
)
def test_faults_of_the_file(
    loaded: Load,
    faults: Callable[..., list[str]],
    text: str,
    fault: str | re.Pattern[str] | None,
) -> None:
    """Each fault is one line with its key; what looks alike and is right passes."""
    if fault is None:
        loaded(text)
        return
    (told,) = faults(text)
    found = fault.match(told) if isinstance(fault, re.Pattern) else fault in told
    assert found, told


def test_faults_of_variables_and_flags(faults: Callable[..., list[str]]) -> None:
    """The variable or flag is named."""
    assert faults("", {"VOLPLUGIN_SOCKET": "/a,b,/a"}) == [
        "VOLPLUGIN_SOCKET: 'b' is not an absolute path; begin with /",
        "VOLPLUGIN_SOCKET: /a is there twice",
    ]
    assert faults("", {"VOLPLUGIN_DEFAULT_BACKEND": "x"})[0].startswith(
        "VOLPLUGIN_DEFAULT_BACKEND: there is no backend 'x'"
    )
    assert faults(socket=("s",), log_level="loud", sweep_interval=-1) == [
        "--socket: 's' is not an absolute path; begin with /",
        "--log-level: 'loud' is none of debug, info, warning, error",
        "--sweep-interval: '-1' is not a time; give seconds above 0, such as 5 or 0.5",
    ]


def test_a_flag_without_a_setting_is_a_bug(loaded: Load) -> None:
    """The command line can't pass what the configuration would ignore."""
    with pytest.raises(TypeError):
        loaded(colour="red")


def test_a_faulty_default_backend_is_told_once(
    faults: Callable[..., list[str]],
) -> None:
    """The table's own fault is enough; the backend is not said to be absent too."""
    assert len(faults("default-backend = 'a'\n[backend.a]\ndriver = 'x'")) == 1


# Sockets with a backend and a scope of their own


def test_a_socket_has_a_default_backend(loaded: Load) -> None:
    """A backend by its name, or by another name of its driver."""
    for name in ("local", "a", "ram"):
        config = loaded(
            f"[socket.s]\npath = '/s'\ndefault-backend = '{name}'\n"
            f"[backend.a]\ndriver = 'plain'"
        )
        assert config.sockets[0].default_backend == name


def test_a_socket_without_a_backend_of_its_own(loaded: Load) -> None:
    """It has everyone's, and is local."""
    (socket,) = loaded("[socket.s]\npath = '/s'").sockets
    assert socket.default_backend is None
    assert socket.scope == "local"


def test_a_socket_keeps_its_backend_when_a_flag_names_it(loaded: Load) -> None:
    """A path that is in the file keeps what the file says of it."""
    text = "[socket.s]\npath = '/s'\ndefault-backend = 'tmpfs'\nscope = 'global'"
    (socket,) = loaded(text, sockets=("/s",)).sockets
    assert (socket.default_backend, socket.scope) == ("tmpfs", "global")


@pytest.mark.parametrize("default", ["tmpfs", "ram", "shared"])
def test_a_global_socket(loaded: Load, default: str) -> None:
    """Its backend is of a driver that shares, be it its own or everyone's."""
    backend = "[backend.shared]\ndriver = 'tmpfs'\n"
    socket = "[socket.s]\npath = '/s'\nscope = 'global'\n"
    own = f"{socket}default-backend = '{default}'\n"
    (found,) = loaded(own + backend).sockets
    assert found.scope == "global"
    (found,) = loaded(f"default-backend = '{default}'\n{socket}{backend}").sockets
    assert found.scope == "global"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (
            "[socket.s]\npath = '/s'\ndefault-backend = 'tmpsf'",
            "socket /s: default-backend: there is no backend 'tmpsf'; did you mean "
            "'tmpfs'?; there are local, plain, tmpfs",
        ),
        (
            "[socket.s]\npath = '/s'\nscope = 'global'",
            "socket /s: scope: a global socket serves shared backends alone, and its "
            "default backend 'local' is of driver local: give it a default-backend of "
            "driver tmpfs",
        ),
        (
            "[socket.s]\npath = '/s'\nscope = 'global'\ndefault-backend = 'plain'",
            "socket /s: scope: a global socket serves shared backends alone, and its "
            "default backend 'plain' is of driver plain: give it a default-backend of "
            "driver tmpfs",
        ),
        (
            "default-backend = 'x'\n[socket.s]\npath = '/s'\nscope = 'global'",
            "FILE: default-backend: there is no backend 'x'; there are local, plain, "
            "tmpfs",
        ),
    ],
)
def test_a_socket_that_can_not_be_served(
    faults: Callable[..., list[str]], text: str, fault: str
) -> None:
    """The fault names the socket, and is told once."""
    assert faults(text) == [fault]


def test_what_is_no_scope(faults: Callable[..., list[str]]) -> None:
    """There are two."""
    (fault,) = faults("[socket.s]\npath = '/s'\nscope = 'swarm'")
    assert fault.startswith("FILE: socket.s.scope: ")
    assert "local" in fault
    assert "global" in fault


def test_a_socket_of_a_faulty_backend(faults: Callable[..., list[str]]) -> None:
    """The table's own fault is enough."""
    text = "[socket.s]\npath = '/s'\ndefault-backend = 'a'\n[backend.a]\ndriver = 'x'"
    assert len(faults(text)) == 1


# Sockets of some backends alone


@pytest.mark.parametrize("given", ["['tmpfs']", "'tmpfs'", "['ram']", "'ram,tmpfs'"])
def test_a_socket_of_one_backend(loaded: Load, given: str) -> None:
    """It needs no default of its own: there is one choice."""
    (socket,) = loaded(f"[socket.s]\npath = '/s'\nbackends = {given}").sockets
    assert socket.backends == ("tmpfs",)
    assert socket.default_backend == "tmpfs"


def test_a_socket_of_some_backends(loaded: Load) -> None:
    """Drivers and backends, by their own names; everyone's default is one of them."""
    (socket,) = loaded(
        "[socket.s]\npath = '/s'\nbackends = ['ram', 'a', 'local', 'tmpfs']\n"
        "[backend.a]\ndriver = 'plain'"
    ).sockets
    assert socket.backends == ("tmpfs", "a", "local")
    assert socket.default_backend == "local"


def test_a_socket_of_some_backends_with_a_default(loaded: Load) -> None:
    """The default is named as the user did, be it by another name."""
    for default in ("plain", "tmpfs", "ram"):
        (socket,) = loaded(
            "[socket.s]\npath = '/s'\nbackends = 'plain,ram'\n"
            f"default-backend = '{default}'"
        ).sockets
        assert socket.default_backend == default


def test_a_socket_of_all_backends(loaded: Load) -> None:
    """So it is where nothing is said."""
    (socket,) = loaded("[socket.s]\npath = '/s'").sockets
    assert socket.backends is None


def test_a_global_socket_of_some_backends(loaded: Load) -> None:
    """All of them are of drivers that share."""
    (socket,) = loaded(
        "[socket.s]\npath = '/s'\nscope = 'global'\nbackends = ['ram']"
    ).sockets
    assert (socket.backends, socket.default_backend) == (("tmpfs",), "tmpfs")


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        (
            "backends = ['tmpsf', 'plain']",
            "socket /s: backends: there is no backend 'tmpsf'; did you mean 'tmpfs'?; "
            "there are local, plain, tmpfs",
        ),
        (
            "backends = 'plain, tmpfs'\ndefault-backend = 'plain'",
            "socket /s: backends: there is no backend ' tmpfs'; did you mean 'tmpfs'?; "
            "there are local, plain, tmpfs",
        ),
        (
            "backends = []",
            "socket /s: backends: the list is empty; name one at least, or leave it "
            "out",
        ),
        (
            "backends = ''",
            "socket /s: backends: the list is empty; name one at least, or leave it "
            "out",
        ),
        ("backends = [1]", "FILE: socket.s.backends: [1] is not a list of texts"),
        (
            "backends = {a = 1}",
            "FILE: socket.s.backends: a table does not fit here; give a text or a list",
        ),
        (
            "backends = ['plain', 'tmpfs']",
            "socket /s: default-backend: missing; everyone's is 'local', which is not "
            "among this socket's backends: give it one of plain, tmpfs",
        ),
        (
            "backends = ['tmpfs']\ndefault-backend = 'plain'",
            "socket /s: default-backend: 'plain' is not among this socket's backends: "
            "give it one of tmpfs",
        ),
        (
            "backends = ['tmpfs']\ndefault-backend = 'plian'",
            "socket /s: default-backend: there is no backend 'plian'; did you mean "
            "'plain'?; there are local, plain, tmpfs",
        ),
        (
            "backends = ['tmpfs', 'plain']\ndefault-backend = 'ram'\nscope = 'global'",
            "socket /s: backends: a global socket serves shared backends alone, and "
            "plain is of driver plain: leave it out; those of driver tmpfs can be "
            "there",
        ),
    ],
)
def test_backends_that_a_socket_can_not_have(
    faults: Callable[..., list[str]], lines: str, fault: str
) -> None:
    """The fault names the socket and the value, and is told once."""
    assert faults(f"[socket.s]\npath = '/s'\n{lines}") == [fault]


def test_a_socket_of_backends_and_a_faulty_default_for_all(
    faults: Callable[..., list[str]],
) -> None:
    """Everyone's default is told of once, and no other fault is made of it."""
    text = "default-backend = 'x'\n[socket.s]\npath = '/s'\nbackends = "
    for backends in ("'tmpfs'", "'tmpfs,plain'"):
        (fault,) = faults(text + backends)
        assert fault.startswith("FILE: default-backend: there is no backend 'x'")


# Other names of drivers


def test_another_name_of_a_driver(loaded: Load) -> None:
    """It names a driver, and a backend of that driver."""
    config = loaded("[backend.ram]\nsize = 2\n[backend.a]\ndriver = 'ram'")
    for name in ("ram", "a"):
        assert config.backends[name].driver == "tmpfs"
    assert loaded("default-backend = 'ram'").default_backend == "ram"


@pytest.mark.parametrize("name", ["ram", "tmpfs"])
def test_a_name_of_a_driver_means_that_driver(
    faults: Callable[..., list[str]], loaded: Load, name: str
) -> None:
    """A backend of this name is of no other driver."""
    (fault,) = faults(f"[backend.{name}]\ndriver = 'local'")
    assert "a backend with a driver's name is of that driver" in fault
    for driver in ("ram", "tmpfs"):
        config = loaded(f"[backend.{name}]\ndriver = '{driver}'")
        assert config.backends[name].driver == "tmpfs"


printable = "aZ0 _-.,:=#'[]\"\\/\u00fc\u2028\U0001f600"
paths = (
    st.text(printable + "\t\r\x1b\x7f", min_size=1, max_size=9)
    .map(lambda name: "/" + name)
    .filter(lambda path: {"", ".", ".."}.isdisjoint(path[1:].split("/")))
)
lines = st.text(printable, max_size=9)
times = st.floats(1e-9, 1e6) | st.integers(1, 10**6).map(float)
accounts = st.integers(0, 2**32 - 2) | st.from_regex(r"\A[a-z_][a-z0-9_-]{0,20}\Z")
sockets = st.builds(
    SocketConfig,
    path=paths,
    mode=st.integers(0, 0o7777),
    owner=accounts,
    group=accounts,
    default_backend=st.sampled_from([None, "local", "plain", "tmpfs", "ram"]),
    backends=st.none(),
).flatmap(
    lambda socket: st.sampled_from(
        [socket, attrs.evolve(socket, scope="global")]
        if socket.default_backend in {"tmpfs", "ram"}
        else [socket]
    )
)
limited = st.builds(
    SocketConfig,
    path=paths,
    default_backend=st.sampled_from(["tmpfs", "ram"]),
    backends=st.sampled_from([("tmpfs",), ("plain", "tmpfs"), ("tmpfs", "local")]),
)
local = st.fixed_dictionaries(
    {}, optional={"allow": st.lists(paths, max_size=3), "label": lines}
)
memory = st.fixed_dictionaries(
    {},
    optional={
        "root": paths,
        "size": st.integers(1, 2**62) | st.sampled_from(["1M", "10.5GiB"]),
        "guard": st.booleans() | st.sampled_from(["yes", "off"]),
        "mode": st.sampled_from(["0755", "1777"]),
    },
)
names = st.from_regex(r"\A[a-zA-Z0-9][a-zA-Z0-9_.-]{0,9}\Z").filter(
    lambda name: name not in DRIVERS and not name.startswith(("store", "lock", "sock"))
)


@st.composite
def configurations(draw: st.DrawFn) -> Config:
    backends = dict(BUILT_IN)
    backends["tmpfs"] = attrs.evolve(BUILT_IN["tmpfs"], settings=draw(memory))
    for name in draw(st.lists(names, max_size=3, unique=True)):
        driver = draw(st.sampled_from(["local", "tmpfs"]))
        chosen: Mapping[str, object] = draw(local if driver == "local" else memory)
        backends[name] = BackendConfig(name=name, driver=driver, settings=chosen)
    return Config(
        root=draw(paths),
        default_backend=draw(st.sampled_from([*sorted(backends), "ram"])),
        log_format=draw(st.sampled_from(["text", "json"])),
        log_level=draw(st.sampled_from(["debug", "info", "warning", "error"])),
        sweep_interval=draw(times),
        admin_socket=draw(paths.map("/admin{}".format)),
        usage_interval=draw(times),
        follow_interval=draw(times),
        record=draw(st.none() | paths),
        usage_marks=draw(st.sets(st.integers(1, 100)).map(sorted).map(tuple)),
        sockets=tuple(
            draw(
                st.lists(
                    sockets | limited,
                    min_size=1,
                    max_size=3,
                    unique_by=lambda s: s.path,
                )
            )
        ),
        timeouts=draw(
            st.builds(
                Timeouts,
                create=times,
                mount=times,
                other=times,
                podman=times,
                drain=times,
            )
        ),
        backends=backends,
    )


@given(configurations())
def test_what_is_printed_is_read_back(config: Config) -> None:
    """`volplugin config > FILE` makes a file of the same configuration."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(render(config).encode())
        file.flush()
        assert read(file.name) == config


@given(st.text())
def test_any_text_is_a_configuration_or_refused(text: str) -> None:
    """No text in the file escapes as another error."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(text.encode(errors="surrogatepass"))
        file.flush()
        try:
            read(file.name)
        except InvalidArgument as error:
            assert file.name in str(error)  # noqa: PT017 - may also be right


def test_what_is_printed() -> None:
    """The print is a file as an operator would write it."""
    config = Config(
        backends={
            "a.b": BackendConfig(
                name="a.b", driver="tmpfs", settings={"size": "1G", "guard": True}
            )
        },
        sockets=(
            SocketConfig(),
            SocketConfig(
                path="/run/x.sock",
                default_backend="a.b",
                backends=("a.b", "ceph"),
                scope="global",
            ),
        ),
        record="/var/tmp/calls",
    )
    assert render(config) == (
        """\
root = "/var/lib/volplugin"
default-backend = "local"
log-format = "text"
log-level = "info"
sweep-interval = 5.0
admin-socket = "/run/volplugin/admin.sock"
usage-interval = 60.0
usage-marks = "80,95"
follow-interval = 30.0
record = "/var/tmp/calls"

[timeouts]
create = 110.0
mount = 110.0
other = 50.0
podman = 4.5
managed = 28.0
drain = 30.0

[socket.1]
path = "/run/docker/plugins/volplugin.sock"
mode = "0660"
owner = "root"
group = "root"
scope = "local"

[socket.2]
path = "/run/x.sock"
mode = "0660"
owner = "root"
group = "root"
default-backend = "a.b"
backends = ["a.b", "ceph"]
scope = "global"

[backend."a.b"]
driver = "tmpfs"
size = "1G"
guard = true
"""
    )


def test_only_what_a_file_can_hold_is_printed() -> None:
    """A value that came from no file is a bug, not a guess."""
    with pytest.raises(TypeError):
        toml.line("key", object())


def test_a_managed_plugin_answers_before_its_engine_gives_up(loaded: Load) -> None:
    """With ``propagated`` no call, and no shutdown, takes longer than dockerd waits."""
    plain = loaded("[timeouts]\nother = 5")
    assert plain.limits == plain.timeouts
    managed = loaded("[timeouts]\nother = 5", propagated="/volumes")
    assert managed.timeouts == plain.timeouts
    assert managed.limits == Timeouts(
        create=28, mount=28, other=5, podman=4.5, managed=28, drain=8
    )
    shorter = loaded(
        "propagated = '/volumes'\n[timeouts]\nmanaged = 3\ndrain = 0.5"
    ).limits
    assert shorter == Timeouts(
        create=3, mount=3, other=3, podman=3, managed=3, drain=0.5
    )
