"""The sessions of README.rst and docs, replayed: each command gives what they show."""

import re
import shlex
import subprocess
from collections.abc import Iterator

import pytest
from support.docker import DockerError
from support.engine import Engine
from support.images import IMAGE
from support.plugin import REPOSITORY, Plugin, plugin_environment
from support.podman import PodmanEngine, PodmanError
from support.wait import eventually

pytestmark = [pytest.mark.root, pytest.mark.engine]

# What differs from run to run: IDs, process ids and times.
_VARIES = {
    r"\b[0-9a-f]{64}\b": "ID",
    r"\b[0-9a-f]{12}…": "ID…",
    r"\bpid \d+": "pid N",
    r"/dev/loop\d+ +": "/dev/loopN ",
    r"\d{4}-\d\d-\d\dT[\d:.]+Z": "TIME",
    r"[A-Z][a-z]{2} [A-Z][a-z]{2} [ \d]\d [\d:]{8} UTC \d{4}": "DATE",
}


def _session(file: str, title: str, following: str) -> Iterator[tuple[str, str]]:
    """Each command of a section, which ends before another, with what it shows."""
    text = (REPOSITORY / file).read_text()
    section = text.split(f"\n{title}\n", 1)[1].split(f"\n{following}\n", 1)[0]
    lines = [line[4:] for line in section.splitlines() if line.startswith("    ")]
    for step in re.split(r"^# ", "\n".join(lines), flags=re.MULTILINE)[1:]:
        command, _, shown = step.partition("\n")
        yield command, shown.strip()


def _steady(text: str) -> str:
    for pattern, name in _VARIES.items():
        text = re.sub(pattern, name, text)
    return text.strip()


def _lines(text: str) -> set[str]:
    return {line.strip(" ,") for line in _steady(text).splitlines()}


def _do(engine: Engine, command: str) -> str:
    if command.startswith("kill -9 "):
        engine.plugin.kill()
        return ""
    if command.startswith("docker volume ") and not engine.plugin.is_running():
        engine.plugin.start()  # the prose tells the reader to
    program, *words = shlex.split(command)
    if program == "volplugin":
        return _resize(engine.plugin, *words)
    if program != "docker":
        return engine.host.run(program, *words)
    words = [IMAGE if word == "busybox" else word for word in words]
    words = [word.replace("/tmp", str(engine.host.folder)) for word in words]
    if words[0] == "run":
        words[1:1] = ["--network", "none"]
    try:
        return engine.docker(*words)
    except DockerError as error:
        return error.stderr


def _resize(plugin: Plugin, *words: str) -> str:
    assert words[:2] == ("volume", "resize")
    command = plugin.resize(*words[2:])
    return subprocess.run(
        command,
        env=plugin_environment(),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout


def test_the_session_in_the_readme_is_what_happens(engine: Engine) -> None:
    """The transcript is real: the same commands show the same, IDs and times apart."""
    steps = list(_session("README.rst", "A session", "Options of a volume"))
    assert len(steps) > 10
    for command, shown in steps:
        if " inspect " not in command:
            assert _steady(_do(engine, command)) == _steady(shown), command
            continue
        # The file leaves out some of its lines, and a container's namespace may take a
        # moment to go after its removal.
        lines = _lines(shown)
        eventually(
            lambda c=command, wanted=lines: wanted <= _lines(_do(engine, c)),  # type: ignore[misc]
            f"{command} shows {shown}",
        )


def test_the_session_on_dockers_page_is_what_happens(engine: Engine) -> None:
    """A limited volume, resized and copied from while a container has it."""
    steps = list(_session("docs/docker.rst", "Docker", "What is to be known:"))
    assert len(steps) > 10
    for command, shown in steps:
        assert _steady(_do(engine, command)) == _steady(shown), command


def test_the_session_on_podmans_page_is_what_happens(
    podman_engine: PodmanEngine,
) -> None:
    """Two volumes, a container on them, and what podman tells of both."""
    podman = podman_engine.podman
    steps = list(_session("docs/podman.rst", "Set up", "Five seconds"))
    assert len(steps) > 8
    for command, shown in steps:
        program, verb, *words = shlex.split(command)
        assert program == "podman"
        words = [IMAGE if word == "busybox" else word for word in words]
        try:
            told = podman.run(*words) if verb == "run" else podman(verb, *words)
        except PodmanError as error:
            told = str(error)
        assert _steady(told) == _steady(shown), command
