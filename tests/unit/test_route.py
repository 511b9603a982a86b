"""The way that a call has come: passed on, and never in a circle."""

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from volplugin import route
from volplugin.errors import InvalidArgument


@pytest.fixture(autouse=True)
def start() -> Iterator[None]:
    """Begin and end with a call that came from an engine."""
    route.enter("")
    yield
    route.enter("")


def test_an_engines_call() -> None:
    """This server is the first on its way."""
    assert route.header() == f"1.1 {route.SELF}"


def test_the_name_of_a_server() -> None:
    """It is one word of a header, and no other process's."""
    assert route.SELF.isascii()
    assert " " not in route.SELF
    assert len(route.SELF) > 32


def test_a_call_of_another() -> None:
    """It is added to those that the call has come through."""
    route.enter("1.1 proxy, 1.1 volplugin-other")
    assert route.header() == f"1.1 proxy, 1.1 volplugin-other, 1.1 {route.SELF}"


@pytest.mark.parametrize(
    "way", ["1.1 {}", "1.1 a, 1.1 {}", "1.1 {}, 1.1 b", "1.0 {} (a comment)"]
)
def test_a_circle(way: str) -> None:
    """A call that has been here before is refused, wherever on its way."""
    with pytest.raises(InvalidArgument, match="this volplugin asks itself"):
        route.enter(way.format(route.SELF))


def test_calls_beside_each_other() -> None:
    """Each has its own way, and so has what it starts: tasks, and threads in them."""

    async def call(way: str) -> list[str]:
        route.enter(way)
        await asyncio.sleep(0.01)
        task = asyncio.create_task(asyncio.to_thread(route.header))
        return [route.header(), await task]

    async def both() -> tuple[list[str], list[str], list[str]]:
        return await asyncio.gather(call("1.1 a"), call(""), call("1.1 b"))

    a, engine, b = asyncio.run(both())
    own = f"1.1 {route.SELF}"
    assert a == [f"1.1 a, {own}"] * 2
    assert engine == [own] * 2
    assert b == [f"1.1 b, {own}"] * 2


def test_a_thread_of_nobody() -> None:
    """What no call has begun has come from nowhere."""
    route.enter("1.1 a")
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(route.header).result() == f"1.1 {route.SELF}"
