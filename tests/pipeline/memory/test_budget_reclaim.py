"""What is cached gives way to requests that wait for the budget."""

import asyncio

import pytest

from asyncshard import MemoryBudget
from asyncshard.errors import BudgetError
from asyncshard.pipeline.memory.budget import Reclaimable

MIB = 1 << 20


class Cache:
    """Holds buffers that it can do without, and one in use."""

    def __init__(self, budget):
        self.budget = budget
        self.account = budget.open_account()
        self.leases = []
        self.calls = []
        self.can_hand_over = False
        budget.add_reclaimer(self)

    def reclaim(self, kind):
        self.calls.append(kind)
        if kind is Reclaimable.CACHED and self.leases:
            self.leases.pop(0)
            return True
        if kind is Reclaimable.IN_USE and self.can_hand_over:
            self.can_hand_over = False
            self.account.close()
            return True
        return False


class Ahead:
    """Holds buffers that were read ahead."""

    def __init__(self, budget):
        self.leases = []
        budget.add_reclaimer(self)

    def reclaim(self, kind):
        if kind is not Reclaimable.READ_AHEAD or not self.leases:
            return False
        self.leases.pop()
        return True


def never():
    raise AssertionError("it had to wait")


async def test_no_more_memory_is_reclaimed_than_a_request_needs():
    budget = MemoryBudget(4)
    cache, account = Cache(budget), budget.open_account()
    cache.leases = await cache.account.allocate_all([MIB] * 4, never)
    lease = await account.allocate(2 * MIB)
    assert (len(cache.leases), budget.bytes_used) == (2, 4 * MIB)
    del lease
    cache.leases.clear()
    account.close()
    cache.account.close()
    assert budget.bytes_used == 0


async def test_several_buffers_are_granted_together_or_not_at_all():
    budget = MemoryBudget(4)
    account, other = budget.open_account(), budget.open_account()
    lease = await other.allocate(2 * MIB)
    waits = []
    both = asyncio.ensure_future(account.allocate_all([MIB, 2 * MIB], lambda: waits.append(budget.bytes_used)))
    for _ in range(5):
        await asyncio.sleep(0)
    assert not both.done()
    assert (waits, account.used) == ([2 * MIB], 0)
    del lease
    assert [lease.nbytes for lease in await both] == [MIB, 2 * MIB]
    del both
    account.close()
    other.close()


async def test_a_request_that_has_to_wait_may_give_up():
    budget = MemoryBudget(1)
    account, other = budget.open_account(), budget.open_account()
    lease = await other.allocate(MIB)

    def give_up():
        raise BudgetError("no")

    with pytest.raises(BudgetError, match="no"):
        await account.allocate_all([MIB], give_up)
    del lease
    lease = await account.allocate(MIB)
    del lease
    account.close()
    other.close()


async def test_memory_in_use_is_handed_over_last_and_only_for_an_urgent_request():
    budget = MemoryBudget(1)
    cache, account = Cache(budget), budget.open_account()
    cache.can_hand_over = True
    (in_use,) = await cache.account.allocate_all([MIB], never)
    patient = asyncio.ensure_future(account.allocate(MIB, on_wait=lambda: None))
    for _ in range(3):
        await asyncio.sleep(0)
    assert not patient.done()
    assert set(cache.calls) == {Reclaimable.CACHED}
    patient.cancel()
    lease = (await account.allocate_all([MIB], lambda: None))[0]
    assert cache.calls[-1] is Reclaimable.IN_USE
    assert (budget.bytes_used, budget.bytes_held, in_use.nbytes) == (MIB, MIB, MIB)
    del lease, in_use
    account.close()
    assert (budget.bytes_used, budget.bytes_held) == (0, 0)


async def test_the_floor_of_the_first_stream_is_granted_when_memory_in_use_is_handed_over():
    """Its floor counts what others use, though no other stream has one."""
    budget = MemoryBudget(1)
    cache, account = Cache(budget), budget.open_account()
    cache.leases = await cache.account.allocate_all([MIB // 2] * 2, never)
    await account.set_floor(MIB)
    assert cache.leases == []
    account.close()
    cache.account.close()


async def test_a_reclaimer_that_is_gone_is_not_asked():
    budget = MemoryBudget(1)
    cache, account = Cache(budget), budget.open_account()
    calls, of_cache = cache.calls, cache.account
    del cache
    lease = await of_cache.allocate(MIB)
    waiting = asyncio.ensure_future(account.allocate(MIB))
    for _ in range(3):
        await asyncio.sleep(0)
    assert (calls, waiting.done()) == ([], False)
    del lease
    await waiting
    del waiting
    account.close()
    of_cache.close()


async def test_an_account_may_be_closed_from_a_finaliser():
    budget = MemoryBudget(1)
    account = budget.open_account()
    account.charge_headers(1000, "x")
    budget.abandon(account)
    assert budget.bytes_used == 0


@pytest.mark.parametrize("kinds", [(Cache, Ahead), (Ahead, Cache)])
async def test_items_read_ahead_are_reclaimed_before_memory_in_use(kinds):
    """Whichever of the two was made first."""
    budget = MemoryBudget(1)
    made = {kind: kind(budget) for kind in kinds}
    cache, ahead = made[Cache], made[Ahead]
    cache.can_hand_over = True
    account = budget.open_account()
    (in_use,) = await cache.account.allocate_all([MIB // 2], never)
    ahead.leases = await account.allocate_all([MIB // 2], never)
    (lease,) = await account.allocate_all([MIB // 2], lambda: None)
    assert (ahead.leases, cache.can_hand_over, budget.bytes_held) == ([], True, 0)
    del lease, in_use
    account.close()
    cache.account.close()


async def test_a_waiting_request_is_granted_when_an_account_is_abandoned():
    budget = MemoryBudget(1)
    one, other = budget.open_account(), budget.open_account()
    await one.set_floor(MIB)
    waiting = asyncio.ensure_future(other.set_floor(MIB))
    for _ in range(3):
        await asyncio.sleep(0)
    assert not waiting.done()
    budget.abandon(one)
    async with asyncio.timeout(20):
        await waiting
    other.close()
