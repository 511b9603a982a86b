"""The engines of the day send what they were recorded to send, byte for byte."""

import json
from collections.abc import Callable, Iterator

import pytest
from support import recordings
from support.record_engines import DOCKERD, PODMAN, record_docker, record_podman
from support.recordings import Line
from support.require import missing

pytestmark = [pytest.mark.root, pytest.mark.engine]

AGAIN = "if it is right, `python -m support.record_engines` in tests records it anew"


def stored(engine: str) -> list[str]:
    """Return the names of an engine's recordings."""
    return sorted(file.stem for file in recordings.FOLDER.glob(f"{engine}-*.jsonl"))


def record(
    engine: str, make: Callable[[], Iterator[tuple[str, list[Line]]]]
) -> dict[str, list[Line]]:
    """Return what an engine sends now, by the names of the recordings."""
    made = dict(make())
    version = engine.partition("-")[2]
    for about, *_ in made.values():
        if f" {version}." not in about["comment"]:
            missing(f"{version} is what was recorded; this is {about['comment']}")
    return made


@pytest.fixture(scope="module")
def dockerd() -> dict[str, list[Line]]:
    """What dockerd sends."""
    return record(DOCKERD, record_docker)


@pytest.fixture(scope="module")
def podman() -> dict[str, list[Line]]:
    """What podman sends."""
    return record(PODMAN, record_podman)


def calls(lines: list[Line]) -> list[tuple[str, list[str]]]:
    """Return the requests that each command makes, without what chance decides.

    That is which connection was idle, and the order of what an engine sends at once:
    so the answers, which tell of that order, are left to the replay.
    """
    found: list[tuple[str, list[str]]] = [("", [])]
    for line in lines:
        if "command" in line:
            found.append((line["command"], []))
        elif "request" in line:
            found[-1][1].append(json.dumps([line["client"], line["request"]]))
    return [(command, sorted(made)) for command, made in found]


@pytest.mark.parametrize("name", stored(DOCKERD))
def test_dockerd(dockerd: dict[str, list[Line]], name: str) -> None:
    """Each command makes the recorded calls, with their bytes."""
    file = recordings.FOLDER / f"{name}.jsonl"
    assert calls(dockerd[name]) == calls(recordings.read(file)), AGAIN


@pytest.mark.parametrize("name", stored(PODMAN))
def test_podman(podman: dict[str, list[Line]], name: str) -> None:
    """As dockerd's."""
    file = recordings.FOLDER / f"{name}.jsonl"
    assert calls(podman[name]) == calls(recordings.read(file)), AGAIN


def test_every_scenario_is_stored(
    dockerd: dict[str, list[Line]], podman: dict[str, list[Line]]
) -> None:
    """None was made that has no file."""
    assert sorted(dockerd) == stored(DOCKERD)
    assert sorted(podman) == stored(PODMAN)
