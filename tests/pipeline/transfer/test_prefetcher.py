"""The prefetcher fills slots: as many as the pacing and the budget allow, each read reported, errors in their slot."""

import asyncio
from types import SimpleNamespace

import pytest

from asyncshard import MemoryBudget
from asyncshard.errors import BudgetError, StoreError
from asyncshard.events import ReadEnded, ReadStarted
from asyncshard.pipeline.transfer.prefetcher import Prefetcher
from asyncshard.pipeline.transfer.slots import Slots
from asyncshard.plan.items import ReadItem
from asyncshard.stores.base import Pacing

PAGE = 4096


class Plan:
    """Stands for a transfer of items of one page each; `broken` names the item whose read fails."""

    is_in_place = False

    def __init__(self, count, *, prefetch_count=2, broken=None):
        self.items = [ReadItem(0, PAGE * number, PAGE * (number + 1), number, number + 1) for number in range(count)]
        self.pacing = Pacing(prefetch_count=prefetch_count)
        self.checkpoint = SimpleNamespace(shards=[SimpleNamespace(path="a.safetensors")])
        self.broken = broken
        self.read_items = []
        self.begun = asyncio.Event()
        self.may_end = asyncio.Event()
        self.may_end.set()

    def prepare(self, item):
        return item.nbytes

    async def read(self, item, lease):
        self.begun.set()
        await self.may_end.wait()
        await asyncio.sleep(0)
        self.read_items.append(item.first)
        if item.first == self.broken:
            raise StoreError("broken")


class Reads:
    """A prefetcher of a plan, and what it shares with others."""

    def __init__(self, plan, *, pages=16, is_strict=False):
        self.slots = Slots(is_ordered=True)
        self.slots.plan(plan.items)
        self.account = MemoryBudget(pages * PAGE / 2**20).open_account()
        self.events = []
        self.tasks = set()
        self.prefetcher = Prefetcher(
            plan, self.slots, self.account, is_strict=is_strict, report=self.events.append, own_tasks=self.tasks
        )

    async def __aenter__(self):
        self.running = asyncio.ensure_future(self.prefetcher.run())
        return self

    async def __aexit__(self, *exc_info):
        self.running.cancel()
        await asyncio.wait([self.running])
        self.slots.clear()
        self.account.close()
        assert self.tasks == set()

    async def take(self):
        while (slot := self.slots.find_done()) is None:
            self.slots.slot_ready.clear()
            await self.slots.slot_ready.wait()
        self.slots.take(slot)
        return slot

    async def settle(self):
        for _ in range(20):
            await asyncio.sleep(0)


async def test_no_more_items_are_read_ahead_than_the_pacing_allows():
    plan = Plan(5, prefetch_count=2)
    async with Reads(plan) as reads:
        await reads.settle()
        assert plan.read_items == [0, 1]
        await reads.take()
        await reads.settle()
        assert plan.read_items == [0, 1, 2]


async def test_all_items_are_read_in_plan_order_and_then_it_ends():
    plan = Plan(4, prefetch_count=1)
    async with Reads(plan) as reads:
        assert [(await reads.take()).item.first for _ in plan.items] == [0, 1, 2, 3]
        await reads.running
        assert reads.slots.is_exhausted


async def test_each_read_is_reported_when_it_begins_and_ends():
    async with Reads(Plan(1)) as reads:
        await reads.running
        assert reads.events == [ReadStarted("a.safetensors", 0, PAGE), ReadEnded("a.safetensors", 0, PAGE)]


async def test_a_read_that_fails_leaves_its_error_in_its_slot():
    async with Reads(Plan(3, prefetch_count=1, broken=1)) as reads:
        assert (await reads.take()).error is None
        slot = await reads.take()
        assert (str(slot.error), slot.lease) == ("broken", None)
        await reads.running
        assert (reads.slots.has_failed, len(reads.slots)) == (True, 0)


async def test_a_plan_without_items_wakes_the_consumer():
    async with Reads(Plan(0)) as reads:
        await reads.running
        assert reads.slots.slot_ready.is_set()


async def test_reads_that_were_stopped_begin_again():
    plan = Plan(2)
    plan.may_end.clear()
    async with Reads(plan) as reads:
        await plan.begun.wait()
        reads.running.cancel()
        await asyncio.wait([reads.running])
        assert list(reads.slots.unread())
        plan.may_end.set()
        await reads.prefetcher.run()
        assert reads.slots.is_fed
        assert [(await reads.take()).item.first for _ in plan.items] == [0, 1]


async def test_tensors_that_are_kept_are_handed_over_when_the_consumer_waits_for_the_next():
    async with Reads(Plan(2), pages=1) as reads:
        kept = await reads.take()
        await reads.settle()
        assert reads.account.is_waiting
        reads.prefetcher.unblock()
        assert reads.account.is_waiting  # the consumer is busy elsewhere, and may let go of it
        reads.slots.is_consumer_waiting = True
        reads.prefetcher.unblock()
        assert (await reads.take()).item.first == 1
        assert reads.account.bytes_held() == PAGE
        del kept


async def test_with_a_strict_budget_tensors_that_are_kept_are_an_error():
    async with Reads(Plan(3), pages=1, is_strict=True) as reads:
        kept = [await reads.take()]
        reads.slots.is_consumer_waiting = True
        await reads.settle()
        reads.prefetcher.unblock()
        kept.append(await reads.take())  # the newest tensor has left the budget
        await reads.settle()
        reads.prefetcher.unblock()
        slot = await reads.take()
        assert isinstance(slot.error, BudgetError)
        assert slot.error.needed_bytes == PAGE
        del kept


@pytest.mark.parametrize("is_in_place", [True, False])
async def test_a_buffer_in_place_goes_back_as_soon_as_it_was_read(is_in_place):
    plan = Plan(1)
    plan.is_in_place = is_in_place
    async with Reads(plan) as reads:
        await reads.running
        assert (reads.slots.find_done().lease is None) == is_in_place
        assert reads.account.bytes_alive() == (0 if is_in_place else PAGE)
