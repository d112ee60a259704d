"""An opening holds a store, threads and an account, and closes all three, whatever happens meanwhile."""

import asyncio

import pytest

from asyncshard import MemoryBudget
from asyncshard.errors import BudgetError, StoreError
from asyncshard.pipeline.checkpoint.opening import Opening
from asyncshard.stores.opening import StoreAccess
from asyncshard.testing import MemoryStore, WrapperStore


class ClosingStore(WrapperStore):
    """Counts how often it is closed, waits meanwhile if asked to, and may fail."""

    def __init__(self, error=None, *, held_bytes=0):
        super().__init__(MemoryStore({}))
        self.held_bytes = held_bytes
        self.closes = 0
        self.error = error
        self.may_close = asyncio.Event()
        self.may_close.set()

    async def aclose(self):
        await self.may_close.wait()
        self.closes += 1
        if self.error is not None:
            raise self.error


async def test_leaving_closes_the_store_the_account_and_the_threads():
    store, budget = ClosingStore(held_bytes=100), MemoryBudget(1)
    async with Opening(store, budget) as opening:
        assert await opening.threads.run(lambda: 7) == 7
        assert budget.bytes_used == 100
    assert (store.closes, budget.bytes_used, budget._accounts) == (1, 0, [])
    with pytest.raises(RuntimeError, match="shut down"):
        opening.threads.submit(print)


async def test_a_store_of_the_users_own_stays_open():
    store = ClosingStore()
    async with Opening.of(store, StoreAccess(), MemoryBudget(1)) as opening:
        assert opening.store is store
    assert store.closes == 0


async def test_a_store_made_for_a_path_is_closed(tmp_path):
    async with Opening.of(tmp_path, StoreAccess(), MemoryBudget(1)) as opening:
        assert (await opening.store.list()).names == ()
    assert "closed" in repr(opening.store)


async def test_a_path_without_a_store_opens_nothing():
    budget = MemoryBudget(1)
    with pytest.raises(ValueError, match="nonsense"):
        Opening.of("nonsense://x", StoreAccess(), budget)
    assert budget._accounts == []


async def test_a_store_that_holds_more_than_the_budget_is_an_error():
    budget = MemoryBudget(1)
    with pytest.raises(BudgetError, match="memory://checkpoint"):
        Opening(ClosingStore(held_bytes=2 << 20), budget)
    assert (budget.bytes_used, budget._accounts) == (0, [])


async def test_a_cancel_does_not_interrupt_the_closing():
    store, budget = ClosingStore(), MemoryBudget(1)
    opening = Opening(store, budget)
    store.may_close.clear()
    closing = asyncio.ensure_future(opening.aclose())
    for _ in range(3):
        await asyncio.sleep(0)
        closing.cancel()
    assert not closing.done()
    store.may_close.set()
    with pytest.raises(asyncio.CancelledError):
        await closing
    assert (store.closes, budget._accounts) == (1, [])


async def test_a_store_that_fails_to_close_leaves_no_account_and_no_thread():
    budget = MemoryBudget(1)
    with pytest.raises(StoreError, match="broken"):
        async with Opening(ClosingStore(StoreError("broken")), budget) as opening:
            await opening.threads.run(lambda: None)
    assert budget._accounts == []
