"""The circuit breaker: when calls pass, and what it says of a plugin."""

import threading
import time

import pytest

from volplugin.errors import Unavailable
from volplugin.plugins import breaker
from volplugin.plugins.breaker import FAILURES, Breaker


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make it try again soon."""
    monkeypatch.setattr(breaker, "PAUSE", 0.1)


def opened() -> Breaker:
    """Return one that has just opened."""
    made = Breaker("p")
    for number in range(FAILURES):
        with made.passing():
            made.failed(f"reason {number}")
    return made


def test_closed() -> None:
    """All calls pass, and nothing is known before the first is answered."""
    made = Breaker("p")
    assert made.health() == "not asked yet"
    with made.passing(), made.passing():
        assert made.succeeded() is False
    assert made.health() == "ok"


def test_few_failures() -> None:
    """They let all pass, but are told; an answer makes them forgotten."""
    made = Breaker("p")
    made.succeeded()
    assert [made.failed("a"), made.failed("b")] == [True, False]
    with made.passing():
        pass
    assert made.health().startswith("down since 2")
    assert made.health().endswith("Z: b")
    assert made.succeeded() is True
    assert made.succeeded() is False
    assert made.failed("c") is True
    assert FAILURES > 2


def test_open() -> None:
    """Calls fail at once, with since when it is down, why, and what happens."""
    made = opened()
    since = made.health().split(": ")[0]
    for _ in range(3):
        with pytest.raises(Unavailable) as caught, made.passing():
            raise AssertionError("it passed")
        assert str(caught.value) == (
            f"plugin p is {since}: reason {FAILURES - 1}; it is tried again every 0.1 s"
        )


def test_one_is_let_through() -> None:
    """After the pause, and no other while it lasts, however long."""
    made = opened()
    time.sleep(0.11)
    with made.passing():
        time.sleep(0.11)
        with pytest.raises(Unavailable), made.passing():
            raise AssertionError("a second one passed")
        made.failed("still")
    with pytest.raises(Unavailable, match="still"), made.passing():
        raise AssertionError("it passed without a pause")
    time.sleep(0.11)
    with made.passing():
        assert made.succeeded() is True
    with made.passing(), made.passing():
        pass
    assert made.health() == "ok"


def test_one_that_was_never_sent() -> None:
    """It says nothing of the plugin; the next one is let through."""
    made = opened()
    time.sleep(0.11)
    for _ in range(2):
        with pytest.raises(KeyError), made.passing():
            raise KeyError("a file that says where it is can't be read")
    with made.passing():
        made.succeeded()


def test_an_old_call_ends_late() -> None:
    """What began before it opened neither blocks nor frees the one that tries."""
    made = Breaker("p")
    with made.passing():
        for _ in range(FAILURES):
            made.failed("down")
        time.sleep(0.11)
        trying = made.passing()
        trying.__enter__()
        made.failed("the old one")
    time.sleep(0.11)
    with pytest.raises(Unavailable), made.passing():
        raise AssertionError("the old one's end let another through")
    trying.__exit__(None, None, None)
    with made.passing():
        pass


def test_threads() -> None:
    """Of many at once one passes."""
    made = opened()
    time.sleep(0.11)
    start, passed, refused = threading.Barrier(16), [], []

    def call() -> None:
        start.wait()
        try:
            with made.passing():
                passed.append(1)
                time.sleep(0.2)
        except Unavailable:
            refused.append(1)

    threads = [threading.Thread(target=call) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(passed), len(refused)) == (1, 15)
