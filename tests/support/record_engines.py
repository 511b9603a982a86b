"""Records what real engines send: ``python -m support.record_engines`` in ``tests``.

As root, with Debian's docker.io and podman. It writes the files of `recordings` anew,
those of ``dockerd-…`` and ``podman-…``; the others are made by hand. A test in
``tests/engine`` holds them to the engines of the day.
"""

import contextlib
import json
import os
import shlex
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from support import processes, recordings
from support.docker import Docker, DockerError
from support.engine import Engine
from support.host import Host
from support.images import IMAGE, SEED_IMAGE
from support.plugin import Plugin
from support.podman import Podman, PodmanError
from support.recordings import Line, Normaliser
from support.wait import eventually

DOCKERD: Final = "dockerd-20.10"
PODMAN: Final = "podman-4.3"

_NO_SWEEP: Final = 3600.0  # seconds: what is swept, and when, would be chance
_QUIET: Final = 0.3  # seconds for what an engine does after its command has returned


class Session:
    """What one scenario makes an engine send, command by command."""

    def __init__(self, plugin: Plugin, file: Path) -> None:
        self._plugin = plugin
        self._file = file
        self._seen = 0
        self._take()
        self._normalise = Normaliser(
            root=str(plugin.root), programs={plugin.client_pid: "another"}
        )
        self.lines: list[Line] = []

    def done(self, command: str) -> None:
        """Note the calls since the last command as those that ``command`` made."""
        self.lines.append({"command": command})
        time.sleep(_QUIET)
        self.lines += map(self._normalise, self._take())

    def another(self, call: str, **message: object) -> None:
        """Have another client make a call."""
        status, _ = self._plugin.client.call(call, message)
        self.done(f"another client: {call} {message}, answered {status}")

    def _take(self) -> list[Line]:
        """Return the calls since the last time, once they are written."""
        mark = uuid.uuid4().hex
        self._plugin.client.call("Get", {"Name": mark})
        eventually(lambda: mark in self._file.read_text(), "the calls are recorded")
        lines = self._file.read_text().splitlines()
        entries = [json.loads(line) for line in lines[self._seen :]]
        self._seen = len(lines)
        assert not any("dropped" in entry for entry in entries), entries
        return [
            entry
            for entry in entries
            if "request" in entry and mark not in entry["request"]["body"]
        ]


Scenario = Callable[["Typist"], None]


class Typist:
    """Types the commands of a scenario at an engine."""

    def __init__(
        self, name: str, run: Callable[..., str], folder: Path, session: Session
    ) -> None:
        self._name = name
        self._run = run
        self.folder = folder
        self.session = session

    def __call__(self, *words: str) -> None:
        """Run a command that succeeds."""
        self._run(*words)
        self.session.done(self._shown(words))

    def fails(self, *words: str) -> None:
        """Run a command that fails."""
        try:
            self._run(*words)
        except (DockerError, PodmanError):
            self.session.done(f"{self._shown(words)}   (fails)")
        else:
            raise AssertionError(f"it did not fail: {words}")

    def _shown(self, words: Sequence[str]) -> str:
        shown = [word.replace(str(self.folder), "/tmp") for word in words]
        return shlex.join([self._name, *shown])


CREATE: Final = ("volume", "create", "--driver", "volplugin")
DRIVER: Final = ("--volume-driver", "volplugin")
SLEEP: Final = (IMAGE, "sleep", "600")


def _volumes(engine: Typist) -> None:
    engine(*CREATE, "web")
    engine("volume", "ls")
    engine("volume", "inspect", "web")
    engine(*CREATE, "-o", "driver=tmpfs", "-o", "size=1m", "-o", "mode=0750", "memory")
    engine(*CREATE, "--label", "of=no-concern", "labelled")
    engine("volume", "inspect", "memory")
    engine("volume", "rm", "web", "labelled")
    engine("volume", "rm", "memory")
    engine("volume", "ls", "-q")


def _docker_runs(docker: Typist) -> None:
    run = ("run", "--rm", "--network", "none")
    docker(*run, "-v", "web:/data", *DRIVER, IMAGE, "ls", "/data")
    docker(*run, "-v", "web:/data", IMAGE, "ls", "/data")
    docker(*run, "-v", "web:/one", "-v", "web:/two", IMAGE, "ls", "/one", "/two")
    docker(*run, "-v", "seeded:/data", *DRIVER, SEED_IMAGE, "cat", "/data/hello")
    docker("volume", "rm", "web")
    docker("volume", "rm", "seeded")


def _docker_copies(docker: Typist) -> None:
    file = docker.folder / "copied"
    file.write_text("copied\n")
    sleep = ("run", "-d", "--network", "none", "--stop-signal", "KILL", "--name")
    docker(*CREATE, "-o", "driver=tmpfs", "memory")
    docker(*sleep, "one", "-v", "memory:/data", *SLEEP)
    docker("cp", str(file), "one:/data/copied")
    docker("exec", "one", "cat", "/data/copied")
    docker("cp", "one:/data/copied", str(docker.folder))
    docker(*sleep, "two", "-v", "memory:/data", *SLEEP)
    docker("stop", "one")
    docker("volume", "inspect", "memory")
    docker("start", "one")
    docker("rm", "-f", "one")
    docker("rm", "-f", "two")
    docker("volume", "rm", "memory")


def _docker_anonymous(docker: Typist) -> None:
    run = ("run", "--rm", "--network", "none")
    sleep = ("run", "-d", "--network", "none", "--name")
    docker(*run, "-v", "/data", *DRIVER, IMAGE, "touch", "/data/x")
    docker(*sleep, "one", "-v", "/data", *DRIVER, *SLEEP)
    docker("rm", "-f", "-v", "one")
    docker(*CREATE)
    docker(*CREATE, "unused")
    docker("volume", "prune", "-f")
    docker("volume", "ls", "-q")


def _docker_errors(docker: Typist) -> None:
    docker.fails(*CREATE, "-o", "uid=nobody", "web")
    docker.fails(*CREATE, "../web")
    docker.fails("volume", "inspect", "web")
    docker.fails("volume", "rm", "web")
    docker(*CREATE, "web")
    docker(*CREATE, "-o", "uid=7", "web")
    docker.session.another("Mount", Name="web", ID="held")
    docker.fails("volume", "rm", "web")
    docker.session.another("Unmount", Name="web", ID="held")
    docker.session.another("Remove", Name="web")
    docker.fails("volume", "inspect", "web")
    docker(*CREATE, "web")
    docker("volume", "rm", "-f", "web")


def _docker_deaths(docker: Typist, daemon: Docker) -> None:
    sleep = ("run", "-d", "--network", "none", "--stop-signal", "KILL", "--name")
    docker(*CREATE, "-o", "driver=tmpfs", "memory")
    docker(*sleep, "one", "-v", "memory:/data", *SLEEP)
    daemon.restart()
    docker.session.done("systemctl restart docker")
    docker("start", "one")
    daemon.kill()
    docker.session.done("kill -9 $(pidof dockerd)")
    daemon.start()
    docker.session.done("systemctl start docker")
    docker("start", "one")
    docker("rm", "-f", "one")
    docker("volume", "rm", "memory")


def _podman_runs(podman: Typist) -> None:
    podman(*CREATE, "web")
    podman("run", "--rm", "-v", "web:/data", IMAGE, "ls", "/data")
    podman("run", "--rm", "-v", "web:/one", "-v", "web:/two", IMAGE, "ls", "/one")
    podman(*CREATE, "seeded")
    podman("run", "--rm", "-v", "seeded:/data", SEED_IMAGE, "cat", "/data/hello")
    podman("volume", "rm", "web", "seeded")


def _podman_copies(podman: Typist) -> None:
    file = podman.folder / "copied"
    file.write_text("copied\n")
    podman(*CREATE, "-o", "driver=tmpfs", "memory")
    podman("run", "-d", "--name", "one", "-v", "memory:/data", *SLEEP)
    podman("cp", str(file), "one:/data/copied")
    podman("exec", "one", "cat", "/data/copied")
    podman("run", "-d", "--name", "two", "-v", "memory:/data", *SLEEP)
    podman("stop", "-t", "0", "one")
    podman("volume", "inspect", "memory")
    podman("start", "one")
    podman("rm", "-f", "-t", "0", "one")
    podman("rm", "-f", "-t", "0", "two")
    podman("volume", "rm", "memory")


def _podman_errors(podman: Typist) -> None:
    podman.fails(*CREATE, "-o", "uid=nobody", "web")
    podman.fails("volume", "inspect", "web")
    podman.fails("volume", "rm", "web")
    podman(*CREATE, "web")
    podman.fails(*CREATE, "web")
    podman.session.another("Mount", Name="web", ID="held")
    podman.fails("volume", "rm", "web")
    podman.session.another("Unmount", Name="web", ID="held")
    podman(*CREATE, "unused")
    podman("volume", "prune", "-f")


DOCKER_SCENARIOS: Final[Mapping[str, Scenario]] = {
    "volumes": _volumes,
    "runs": _docker_runs,
    "copies": _docker_copies,
    "anonymous": _docker_anonymous,
    "errors": _docker_errors,
}
PODMAN_SCENARIOS: Final[Mapping[str, Scenario]] = {
    "volumes": _volumes,
    "runs": _podman_runs,
    "copies": _podman_copies,
    "errors": _podman_errors,
}


def _about(engine: str, version: str) -> Line:
    return {
        "comment": f"{version}, recorded by `python -m support.record_engines`; "
        f"{engine} of Debian 12"
    }


def record_docker() -> Iterator[tuple[str, list[Line]]]:
    """Yield the name of each scenario with what dockerd sent and got."""
    with _file() as file:
        engine = Engine(config=_config(file), sweep=_NO_SWEEP)
        try:
            engine.start()
            scenarios = {
                **DOCKER_SCENARIOS,
                "deaths": lambda typist: _docker_deaths(typist, engine.docker),
            }
            version = engine.docker("version", "-f", "dockerd {{.Server.Version}}")
            yield from _record(
                _about("docker.io", version),
                lambda session: Typist(
                    "docker", engine.docker, engine.host.folder, session
                ),
                lambda: Session(engine.plugin, file),
                {f"{DOCKERD}-{name}": each for name, each in scenarios.items()},
                engine.clear,
            )
        finally:
            engine.close()


def record_podman() -> Iterator[tuple[str, list[Line]]]:
    """Yield the name of each scenario with what podman sent and got."""
    with _file() as file, contextlib.ExitStack() as stack:
        host = Host()
        stack.callback(host.close)
        plugin = Plugin(
            host.folder,
            host=host,
            config=f"sweep-interval = {_NO_SWEEP}\n{_config(file)}",
        )
        stack.callback(plugin.close)
        plugin.start()
        podman = Podman(host)
        podman.load_images()
        stack.callback(podman.clear)

        def run(*words: str) -> str:
            return podman.run(*words[1:]) if words[0] == "run" else podman(*words)

        yield from _record(
            _about("podman", podman("--version")),
            lambda session: Typist("podman", run, host.folder, session),
            lambda: Session(plugin, file),
            {f"{PODMAN}-{name}": each for name, each in PODMAN_SCENARIOS.items()},
            podman.clear,
        )


def _record(
    about: Line,
    typist: Callable[[Session], Typist],
    begin: Callable[[], Session],
    scenarios: Mapping[str, Scenario],
    clear: Callable[[], None],
) -> Iterator[tuple[str, list[Line]]]:
    for name, scenario in scenarios.items():
        session = begin()
        scenario(typist(session))
        yield name, [about, *session.lines]
        clear()


@contextlib.contextmanager
def _file() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vp-") as folder:
        yield Path(folder) / "calls"


def _config(file: Path) -> str:
    return f"record = {json.dumps(str(file))}\n"


def main() -> None:
    """Write all recordings anew."""
    os.environ[processes.SESSION] = uuid.uuid4().hex
    for record in (record_docker, record_podman):
        for name, lines in record():
            recordings.write(recordings.FOLDER / f"{name}.jsonl", lines)


if __name__ == "__main__":
    main()
