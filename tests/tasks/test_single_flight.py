"""One call for all tasks that ask for the same thing at the same time."""

import asyncio
import gc
import weakref

import pytest

from asyncshard.tasks.single_flight import SingleFlight


class Call:
    """A call that waits until it is let go on, and counts."""

    def __init__(self):
        self.begun = self.cancelled = 0
        self.go_on = asyncio.Event()

    async def __call__(self):
        self.begun += 1
        try:
            await self.go_on.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return self.begun


async def turns(count=3):
    for _ in range(count):
        await asyncio.sleep(0)


async def test_all_callers_during_a_call_get_its_one_result():
    flights, call = SingleFlight(), Call()
    tasks = [asyncio.ensure_future(flights.run("a", call)) for _ in range(5)]
    other = asyncio.ensure_future(flights.run("b", call))
    await turns()
    assert (len(flights), call.begun) == (2, 2)
    call.go_on.set()
    assert await asyncio.gather(*tasks, other) == [2] * 6
    assert len(flights) == 0
    assert await flights.run("a", call) == 3


async def test_an_error_reaches_all_callers_and_is_not_cached():
    flights = SingleFlight()
    outcomes = [ZeroDivisionError("no"), None]

    async def call():
        await asyncio.sleep(0)
        outcome = outcomes.pop(0)
        if outcome is not None:
            raise outcome

    results = await asyncio.gather(*(flights.run("a", call) for _ in range(3)), return_exceptions=True)
    assert [str(result) for result in results] == ["no"] * 3
    assert await flights.run("a", call) is None


@pytest.mark.parametrize("who", [0, 1, 2])
async def test_a_cancelled_waiter_disturbs_no_other(who):
    flights, call = SingleFlight(), Call()
    tasks = [asyncio.ensure_future(flights.run("a", call)) for _ in range(3)]
    await turns()
    tasks[who].cancel()
    await turns()
    assert tasks[who].cancelled()
    call.go_on.set()
    del tasks[who]
    assert await asyncio.gather(*tasks) == [1, 1]
    assert call.cancelled == 0


async def test_cancelling_the_last_waiter_ends_the_call_before_the_waiter_goes_on():
    flights, call = SingleFlight(), Call()
    tasks = [asyncio.ensure_future(flights.run("a", call)) for _ in range(3)]
    await turns()
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    assert (call.cancelled, len(flights)) == (1, 0)


async def test_a_caller_during_the_cancellation_of_a_call_starts_a_new_one():
    flights, may_end = SingleFlight(), asyncio.Event()

    async def stubborn():
        try:
            await asyncio.Event().wait()
        finally:
            await may_end.wait()

    async def other():
        return "new"

    task = asyncio.ensure_future(flights.run("a", stubborn))
    await turns()
    task.cancel()
    await turns()
    assert await flights.run("a", other) == "new"
    assert not task.done()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_the_exception_of_a_cancelled_waiter_keeps_nothing_of_the_call_alive():
    class Buffer:
        pass

    flights, seen = SingleFlight(), []

    async def call():
        buffer = Buffer()
        seen.append(weakref.ref(buffer))
        await asyncio.Event().wait()

    task = asyncio.ensure_future(flights.run("a", call))
    await turns()
    task.cancel()
    gc.disable()
    try:
        await asyncio.wait([task])
        await turns()
        assert seen[0]() is None
    finally:
        gc.enable()
