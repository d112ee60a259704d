"""Long work that yields to the event loop, or releases the GIL, every half a millisecond."""

import asyncio

import pytest

from asyncshard.tasks import yielding
from asyncshard.tasks.yielding import SLICE_S, LoopYield, yielding_gil


class FakeTime:
    """A clock that stands still until it is moved, and counts how often the GIL is released."""

    def __init__(self):
        self.now = 0.0
        self.sleeps = []

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.sleeps.append(seconds)


@pytest.fixture
def clock(monkeypatch):
    clock = FakeTime()
    monkeypatch.setattr(yielding, "time", clock)
    return clock


async def test_a_loop_yield_is_due_after_one_slice_and_again_one_slice_after_giving_way(clock):
    loop_yield = LoopYield()
    assert not loop_yield.is_due()
    clock.now = SLICE_S
    assert loop_yield.is_due()
    await loop_yield.give_way()
    assert not loop_yield.is_due()
    clock.now = 2 * SLICE_S
    assert loop_yield.is_due()


async def test_giving_way_lets_the_other_tasks_of_the_loop_run():
    turns = []

    async def other():
        turns.append("other")

    task = asyncio.create_task(other())
    await LoopYield().give_way()
    assert turns == ["other"]
    await task


def test_yielding_gil_yields_the_items_unchanged_and_in_order():
    items = [object() for _ in range(100)]
    assert list(yielding_gil(iter(items))) == items
    assert list(yielding_gil([])) == []


def test_the_gil_is_released_once_for_each_slice_of_work(clock):
    for _ in yielding_gil(range(10)):
        clock.now += SLICE_S / 2
    assert clock.sleeps == [0] * 5


def test_the_gil_is_not_released_within_a_slice(clock):
    assert list(yielding_gil(range(1000))) == list(range(1000))
    assert clock.sleeps == []
