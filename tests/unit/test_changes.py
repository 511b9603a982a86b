"""Changes: one at a time for a volume, none cancelled, waits that end in time."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest

from volplugin.changes import Caller, Changes, Locks
from volplugin.errors import DeadlineExceeded, InUse

LONG = 60.0  # seconds that no test waits


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a test on a loop; it may leave no task."""

    async def checked() -> None:
        await asyncio.wait_for(test(), 20)
        await turns()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left

    asyncio.run(checked())


async def turns(count: int = 10) -> None:
    """Let all tasks that can go on do so."""
    for _ in range(count):
        await asyncio.sleep(0)


class Work:
    """Changes that a test holds up: what has begun, and what has ended."""

    def __init__(self) -> None:
        self.changes = Changes()
        self.begun: list[str] = []
        self.ended: list[str] = []
        self.running = 0
        self.go_on = asyncio.Event()

    def change(self, label: str) -> Callable[[], Awaitable[str]]:
        """Return a change that waits for `go_on`."""

        async def work() -> str:
            self.begun.append(label)
            self.running += 1
            assert self.running == 1, "two changes of one volume run at once"
            await self.go_on.wait()
            await asyncio.sleep(0)
            self.running -= 1
            self.ended.append(label)
            return label

        return work

    def start(
        self, label: str, *, limit: float = LONG, caller: Caller | None = None
    ) -> "asyncio.Task[str]":
        """Ask for a change of the volume ``v``."""
        return asyncio.create_task(
            self.changes.run(
                "v", self.change(label), limit=limit, caller=caller or Caller()
            )
        )


def test_the_outcome_is_returned_or_raised() -> None:
    """A change's value and its error are its caller's."""

    async def test() -> None:
        changes = Changes()

        async def fails() -> None:
            raise InUse("by a test")

        async def works() -> int:
            return 7

        assert await changes.run("v", works, limit=LONG, caller=Caller()) == 7
        with pytest.raises(InUse, match="by a test"):
            await changes.run("v", fails, limit=LONG, caller=Caller())
        assert changes.locks.waiting("v") == 0

    run(test)


def test_one_after_another_in_order() -> None:
    """Changes of one volume run alone, in the order in which they were asked for."""

    async def test() -> None:
        work = Work()
        labels = [str(number) for number in range(10)]
        tasks = []
        for label in labels:
            tasks.append(work.start(label))
            await turns()
        assert work.begun == ["0"]
        assert work.changes.locks.waiting("v") == 10
        work.go_on.set()
        assert await asyncio.gather(*tasks) == labels
        assert work.ended == labels

    run(test)


def test_other_volumes_do_not_wait() -> None:
    """A change that hangs holds up its own volume only."""

    async def test() -> None:
        work = Work()
        task = work.start("hangs")
        await turns()

        async def quick() -> str:
            return "done"

        caller = Caller()
        assert await work.changes.run("w", quick, limit=LONG, caller=caller) == "done"
        assert not task.done()
        work.go_on.set()
        await task

    run(test)


def test_past_its_deadline_it_goes_on() -> None:
    """After the limit the caller is told; the change ends, the next waits for it."""

    async def test() -> None:
        work, caller = Work(), Caller()
        with pytest.raises(DeadlineExceeded, match=r"still at it after 0\.01 s"):
            await work.start("slow", limit=0.01, caller=caller)
        assert caller.left
        assert not caller.is_waiting()
        again = work.start("again")
        await turns()
        assert work.begun == ["slow"]
        work.go_on.set()
        assert await again == "again"
        assert work.ended == ["slow", "again"]

    run(test)


def test_what_has_not_begun_by_its_deadline_never_does() -> None:
    """A caller that gave up in the queue has been told that nothing was done."""

    async def test() -> None:
        work = Work()
        first = work.start("first")
        await turns()
        with pytest.raises(DeadlineExceeded):
            await work.start("second", limit=0.01)
        third = work.start("third")
        work.go_on.set()
        await asyncio.gather(first, third)
        assert work.begun == ["first", "third"]

    run(test)


def test_a_cancelled_request_leaves_its_change_running() -> None:
    """The lock is free when the change has ended, not when its caller has gone."""

    async def test() -> None:
        work, caller = Work(), Caller()
        task = work.start("left", caller=caller)
        await turns()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert caller.left
        following = work.start("following")
        await turns()
        assert work.begun == ["left"]
        assert work.changes.locks.waiting("v") == 2
        work.go_on.set()
        assert await following == "following"
        assert work.ended == ["left", "following"]

    run(test)


def test_an_error_that_nobody_waits_for() -> None:
    """What fails after its caller left is no error of the event loop's."""

    async def test() -> None:
        complaints: list[dict[str, Any]] = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: complaints.append(context))
        changes = Changes()

        async def fails_late() -> None:
            await asyncio.sleep(0.05)
            raise InUse("late")

        with pytest.raises(DeadlineExceeded):
            await changes.run("v", fails_late, limit=0.01, caller=Caller())
        assert await changes.drain(5)
        await turns()
        assert complaints == []

    run(test)


def test_drain() -> None:
    """Draining waits for what runs and what waits its turn, within its limit."""

    async def test() -> None:
        work = Work()
        assert await work.changes.drain(LONG)
        tasks = [work.start("first"), work.start("second")]
        await turns()
        assert not await work.changes.drain(0.01)
        work.go_on.set()
        assert await work.changes.drain(LONG)
        assert work.ended == ["first", "second"]
        await asyncio.gather(*tasks)

    run(test)


def test_a_caller_knows_its_connection() -> None:
    """It waits while it is connected and within its deadline."""
    assert Caller().is_waiting()
    assert not Caller(connected=lambda: False).is_waiting()
    assert not Caller(left=True).is_waiting()


def test_a_lock_is_never_lost_while_held() -> None:
    """However many come and go, cancelled or not, one holds it and none stays.

    PouchContainer's locks were collected while they were held.
    """

    async def test() -> None:
        locks, inside = Locks(), 0

        async def hold(number: int) -> None:
            nonlocal inside
            async with locks.hold("v"):
                inside += 1
                assert inside == 1
                await turns(number % 4)
                inside -= 1

        tasks = [asyncio.create_task(hold(number)) for number in range(200)]
        for number, task in enumerate(tasks):
            if number % 3 == 0:
                await turns(1)
                task.cancel()
                # Cancelled inside, it leaves `inside` as it was: mend the test's count.
                if inside:
                    inside = 0
        await asyncio.gather(*tasks, return_exceptions=True)
        assert locks.waiting("v") == 0
        async with locks.hold("v"):
            assert locks.waiting("v") == 1
        assert locks._locks == {}

    run(test)


def test_a_lock_goes_with_its_last_user() -> None:
    """Names that are used once cost no memory."""

    async def test() -> None:
        locks = Locks()
        for number in range(100):
            async with locks.hold(f"v{number}"):
                assert len(locks._locks) == 1
        assert locks._locks == {}

    run(test)


def test_a_waiter_that_is_cancelled() -> None:
    """It leaves the queue; who comes after it gets the lock from who holds it."""

    async def test() -> None:
        locks = Locks()
        order: list[str] = []

        async def hold(label: str) -> None:
            async with locks.hold("v"):
                order.append(label)

        async with locks.hold("v"):
            waiters = [asyncio.create_task(hold(label)) for label in "abc"]
            await turns()
            assert locks.waiting("v") == 4
            waiters[1].cancel()
            await turns()
            assert locks.waiting("v") == 3
        await asyncio.gather(*waiters, return_exceptions=True)
        assert order == ["a", "c"]

    run(test)
