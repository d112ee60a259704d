import asyncio
import gc
import pickle
import random
import threading

import numpy as np
import pytest

from asyncshard import MemoryBudget
from asyncshard.errors import BudgetError
from asyncshard.pipeline.memory.budget import charge_of

PAGE = 4096


def make_budget(pages=16):
    return MemoryBudget(pages * PAGE / 2**20)


async def turns(count=10):
    for _ in range(count):
        await asyncio.sleep(0)


async def at_once(call):
    """Return the result of a call that must not wait."""
    task = asyncio.ensure_future(call)
    await turns(1)
    assert task.done()
    return task.result()


def asking(account, pages):
    return asyncio.ensure_future(account.allocate(pages * PAGE))


# --- what is charged


async def test_bytes_are_charged_in_whole_pages_until_the_last_view_dies():
    budget = make_budget()
    account = budget.open_account()
    one = await account.allocate(1)
    two = await account.allocate(PAGE + 1)
    assert budget.bytes_used == account.used == 3 * PAGE
    view = np.frombuffer(two, "u1")[5:]
    del two
    assert budget.bytes_used == 3 * PAGE
    del view
    assert budget.bytes_used == PAGE
    del one
    assert budget.bytes_used == 0
    account.close()


async def test_memory_of_one_lease_is_no_other_leases_memory():
    budget = make_budget()
    account = budget.open_account()
    views = [np.frombuffer(await account.allocate(PAGE), "u1") for _ in range(16)]
    for number, view in enumerate(views):
        view[:] = number
    assert all((view == number).all() for number, view in enumerate(views))
    account.close()


async def test_headers_count_and_more_than_the_budget_of_them_is_an_error():
    budget = make_budget(2)
    account = budget.open_account()
    account.charge_headers(PAGE, "one")
    assert budget.bytes_used == PAGE
    waiting = asking(account, 2)
    await turns()
    assert not waiting.done()
    account.charge_headers(-PAGE, "one")
    budget.collect()
    await waiting
    with pytest.raises(BudgetError, match=r"part-0: .*headers") as caught:
        account.charge_headers(3 * PAGE, "part-0")
    assert (caught.value.needed_bytes, caught.value.budget_bytes) == (3 * PAGE, 2 * PAGE)
    account.close()
    assert budget.bytes_used == 0


def test_a_copy_by_pickle_is_a_budget_of_its_own():
    budget = make_budget()
    account = budget.open_account()
    account.charge_headers(PAGE, "one")
    copy = pickle.loads(pickle.dumps(budget))
    assert (copy.nbytes, copy.bytes_used) == (budget.nbytes, 0)
    account.close()


@pytest.mark.parametrize("size", [0, -1, float("nan"), float("inf"), 2**30])
def test_a_size_out_of_range_is_an_error(size):
    with pytest.raises(ValueError, match="memory_budget_mb"):
        MemoryBudget(size)


@pytest.mark.parametrize("size", [True, "1", None])
def test_a_size_that_is_no_number_is_an_error(size):
    with pytest.raises(TypeError, match="memory_budget_mb"):
        MemoryBudget(size)


# --- the queue


async def test_requests_are_granted_whole_and_in_the_order_in_which_they_came():
    budget = make_budget(4)
    account = budget.open_account()
    held = [await account.allocate(PAGE) for _ in range(4)]
    large, small = asking(account, 3), asking(account, 1)
    await turns()
    for _ in range(2):
        held.pop()
        await turns()
        assert not large.done()
        assert not small.done()  # one page is free, but the large request came first
    held.pop()
    await turns()
    assert large.done()
    assert not small.done()
    held.pop()
    await turns()
    assert small.done()
    assert budget.bytes_used == 4 * PAGE
    assert account.wait_s > 0
    account.close()


async def test_a_request_within_the_floor_does_not_queue():
    budget = make_budget(4)
    mine, other = budget.open_account(), budget.open_account()
    await mine.set_floor(2 * PAGE)
    held = [await other.allocate(PAGE) for _ in range(2)]
    blocked = asking(other, 1)
    await turns()
    assert not blocked.done()
    first = await at_once(mine.allocate(2 * PAGE))
    beyond = asking(mine, 1)
    await turns()
    assert not beyond.done()
    del first
    budget.collect()
    again = await at_once(mine.allocate(PAGE))
    assert not blocked.done()
    assert budget.bytes_used <= budget.nbytes
    for task in (blocked, beyond):
        task.cancel()
    await asyncio.wait([blocked, beyond])
    del held, again
    mine.close()
    other.close()


async def test_floors_that_do_not_fit_together_wait_for_each_other():
    budget = make_budget(4)
    accounts = [budget.open_account() for _ in range(3)]
    floors = [asyncio.ensure_future(account.set_floor(3 * PAGE)) for account in accounts]
    for at in range(3):
        await turns()
        assert [floor.done() for floor in floors] == [index <= at for index in range(3)]
        accounts[at].close()


async def test_the_first_floor_is_granted_whatever_the_headers_take():
    budget = make_budget(4)
    mine, other = budget.open_account(), budget.open_account()
    mine.charge_headers(3 * PAGE, "mine")
    other.charge_headers(3 * PAGE, "other")
    await at_once(mine.set_floor(4 * PAGE))
    waiting = asyncio.ensure_future(other.set_floor(PAGE))
    await turns()
    assert not waiting.done()
    mine.close()
    await waiting
    other.close()


async def test_a_cancelled_request_makes_way_for_the_next():
    budget = make_budget(4)
    account = budget.open_account()
    held = await account.allocate(2 * PAGE)
    large, small = asking(account, 4), asking(account, 2)
    await turns()
    assert not small.done()
    large.cancel()
    await turns()
    assert small.done()
    assert budget.bytes_used == 4 * PAGE
    del held
    account.close()


async def test_a_grant_that_meets_a_cancel_is_passed_on():
    budget = make_budget(2)
    account = budget.open_account()
    held = await account.allocate(2 * PAGE)
    first, second = asking(account, 2), asking(account, 2)
    await turns()
    del held
    budget.collect()  # grants the first, whose task has not run since
    first.cancel()
    await turns()
    assert (first.cancelled(), second.done()) == (True, True)
    assert budget.bytes_used == 2 * PAGE
    account.close()


async def test_a_floor_that_meets_a_cancel_is_passed_on():
    budget = make_budget(2)
    before, one, two = (budget.open_account() for _ in range(3))
    await before.set_floor(2 * PAGE)
    first, second = asyncio.ensure_future(one.set_floor(2 * PAGE)), asyncio.ensure_future(two.set_floor(2 * PAGE))
    await turns()
    before.close()  # grants the first, whose task has not run since
    first.cancel()
    await turns()
    assert (first.cancelled(), second.done()) == (True, True)
    assert (one.floor, two.floor) == (0, 2 * PAGE)
    one.close()
    two.close()


async def test_on_wait_is_called_only_if_the_request_has_to_wait():
    budget = make_budget(2)
    account = budget.open_account()
    calls = []
    held = await account.allocate(2 * PAGE, lambda: calls.append(1))
    assert calls == []
    waiting = asyncio.ensure_future(account.allocate(PAGE, lambda: calls.append(account.is_waiting)))
    await turns()
    assert calls == [True]
    del held
    await waiting
    assert not account.is_waiting
    account.close()


async def test_the_repr_of_an_account_shows_what_is_used_held_and_waited_for():
    budget = MemoryBudget(1)
    account = budget.open_account()
    account.charge_headers(100_000, "path")
    lease = await account.allocate(200_704)
    assert repr(account) == "<Account of 1 MiB: 0.3 MB used, 0.0 MB held>"
    waiting = asyncio.ensure_future(account.allocate(900_000))
    await turns()
    assert repr(account) == "<Account of 1 MiB: 0.3 MB used, 0.0 MB held, waiting for 0.9 MB>"
    waiting.cancel()
    await turns()
    account.close()
    assert repr(account) == "<Account of 1 MiB: 0.0 MB used, 0.2 MB held, closed>"
    del lease


# --- where leases die


async def test_a_lease_that_dies_in_another_thread_wakes_the_waiter():
    budget = make_budget(2)
    account = budget.open_account()
    box = [await account.allocate(2 * PAGE)]
    waiting = asking(account, 2)
    await turns()
    thread = threading.Thread(target=box.clear)
    thread.start()
    await asyncio.wait_for(waiting, 30)
    thread.join()
    account.close()


async def test_a_lease_that_dies_in_the_garbage_collector_wakes_the_waiter():
    budget = make_budget(2)
    account = budget.open_account()
    cycle = [await account.allocate(2 * PAGE)]
    cycle.append(cycle)
    waiting = asking(account, 2)
    await turns()
    del cycle
    gc.collect()
    await asyncio.wait_for(waiting, 30)
    account.close()


async def test_a_lease_that_dies_while_the_lock_is_held_does_not_deadlock():
    budget = make_budget(2)
    account = budget.open_account()
    lease = await account.allocate(2 * PAGE)
    waiting = asking(account, 2)
    await turns()
    with budget._lock:
        del lease
    await asyncio.wait_for(waiting, 30)
    account.close()


def test_a_lease_that_dies_after_its_loop_has_closed_is_no_harm():
    budget = make_budget(2)

    async def take():
        account = budget.open_account()
        lease = await account.allocate(2 * PAGE)
        account.close()
        return lease

    lease = asyncio.run(take())
    assert (budget.bytes_used, budget.bytes_held) == (0, 2 * PAGE)
    del lease
    assert budget.bytes_held == 0


def test_a_waiter_whose_loop_has_closed_is_passed_over():
    budget = make_budget(2)
    account = budget.open_account()
    lost = asyncio.new_event_loop()
    held = lost.run_until_complete(account.allocate(2 * PAGE))
    request = account.allocate(2 * PAGE)
    task = lost.create_task(request)
    lost.run_until_complete(asyncio.sleep(0))
    lost.close()

    async def ask():
        waiting = asking(account, 2)
        await turns()
        box.clear()
        return len(await asyncio.wait_for(waiting, 30))

    box = [held]
    del held
    assert asyncio.run(ask()) == 2 * PAGE
    account.close()
    task._log_destroy_pending = False
    request.close()


def test_two_loops_in_two_threads_share_one_budget():
    budget = make_budget(8)
    excess, failures = [], []

    async def work(seed):
        chance = random.Random(seed)
        account = budget.open_account()
        await account.set_floor(2 * PAGE)
        leases = []

        async def one():
            for _ in range(100):
                lease = await account.allocate(chance.randint(1, 2 * PAGE))
                np.frombuffer(lease, "u1")[:] = seed
                if budget.bytes_used > budget.nbytes:
                    excess.append(budget.bytes_used)
                await asyncio.sleep(0)
                if not (np.frombuffer(lease, "u1") == seed).all():
                    failures.append(seed)
                leases.append(lease)
                del lease
                leases.pop(chance.randrange(len(leases)))

        await asyncio.gather(*(one() for _ in range(4)))
        account.close()

    threads = [threading.Thread(target=lambda seed=seed: asyncio.run(work(seed))) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert excess == failures == []
    assert (budget.bytes_used, budget.bytes_held) == (0, 0)


async def test_many_tasks_and_accounts_keep_within_the_budget_and_all_end():
    budget = make_budget(16)
    chance = random.Random(0)
    most = 0

    async def stream(number):
        nonlocal most
        account = budget.open_account()
        await account.set_floor(charge_of(chance.randint(1, 6 * PAGE)))
        assert sum(account.committed for account in budget._accounts) <= budget.nbytes
        leases = []
        for _ in range(30):
            while len(leases) > chance.randint(0, 3):
                del leases[0]
            nbytes = chance.randint(1, account.floor)
            if account.used + charge_of(nbytes) > account.floor:
                leases.clear()
            leases.append(await account.allocate(nbytes))
            most = max(most, budget.bytes_used)
            await turns(chance.randint(0, 3))
        account.close()

    tasks = [asyncio.ensure_future(stream(number)) for number in range(12)]
    await turns(20)
    for task in tasks[::4]:
        task.cancel()
    done, pending = await asyncio.wait(tasks, timeout=30)
    assert not pending
    for task in done:
        if not task.cancelled():
            task.result()
    assert 0 < most <= budget.nbytes


# --- handing over


async def test_hand_over_lets_the_oldest_go_and_no_more_than_needed():
    budget = make_budget(4)
    account = budget.open_account()
    await account.set_floor(2 * PAGE)
    leases = [await account.allocate(PAGE) for _ in range(4)]
    waiting = asking(account, 2)
    await turns()
    assert account.hand_over()
    assert (account.used, account.bytes_held(), budget.bytes_held) == (4 * PAGE, 2 * PAGE, 2 * PAGE)
    leases.append(await waiting)
    del leases[0], waiting
    await turns(1)  # the loop itself refers to what it has just woken
    assert (account.bytes_held(), budget.bytes_used) == (PAGE, 4 * PAGE)
    del leases[-2]
    assert (account.bytes_held(), budget.bytes_used) == (PAGE, 3 * PAGE)
    account.close()
    assert (budget.bytes_held, budget.bytes_used) == (4 * PAGE, 0)
    leases.clear()
    assert budget.bytes_held == 0


async def test_hand_over_goes_on_down_to_the_floor_where_others_were_first_in_the_queue():
    budget = make_budget(4)
    account, other = budget.open_account(), budget.open_account()
    await account.set_floor(2 * PAGE)
    leases = [await account.allocate(PAGE) for _ in range(4)]
    first = asking(other, 1)
    await turns()
    waiting = asking(account, 2)
    await turns()
    assert account.hand_over()
    await first
    await waiting
    assert account.bytes_held() == 3 * PAGE
    assert budget.bytes_used <= budget.nbytes
    leases.clear()
    account.close()
    other.close()


async def test_strict_hand_over_lets_the_newest_go_and_no_other_while_it_lives():
    budget = make_budget(4)
    account = budget.open_account()
    await account.set_floor(PAGE)
    leases = [await account.allocate(PAGE) for _ in range(4)]
    waiting = asking(account, 1)
    await turns()
    assert account.hand_over(newest_only=True)
    leases.append(await waiting)
    del waiting
    assert (account.used, account.bytes_held()) == (4 * PAGE, PAGE)
    waiting = asking(account, 1)
    await turns()
    assert not account.hand_over(newest_only=True)
    del leases[3]  # the one that was handed over
    assert account.hand_over(newest_only=True)
    await waiting
    leases.clear()
    account.close()


async def test_there_is_nothing_to_hand_over_for_a_request_that_was_granted_a_moment_ago():
    budget = make_budget(2)
    account = budget.open_account()
    await account.set_floor(2 * PAGE)
    lease = await account.allocate(2 * PAGE)
    waiting = asking(account, 2)
    await turns()
    del lease
    for _ in range(3):  # before the task that was granted it has run
        assert account.hand_over()
        assert account.bytes_held() == 0
    await waiting
    account.close()


async def test_handing_over_wakes_the_waiting_request():
    budget = make_budget(2)
    account = budget.open_account()
    await account.set_floor(2 * PAGE)
    lease = await account.allocate(2 * PAGE)
    waiting = asking(account, 2)
    await turns()
    assert account.hand_over()
    assert np.frombuffer(await waiting, "u1").ctypes.data != np.frombuffer(lease, "u1").ctypes.data
    account.close()


async def test_a_closed_account_makes_room_for_others_though_its_leases_live():
    budget = make_budget(2)
    first, second = budget.open_account(), budget.open_account()
    lease = await first.allocate(2 * PAGE)
    np.frombuffer(lease, "u1")[:] = 1
    waiting = asking(second, 2)
    await turns()
    assert not waiting.done()
    first.close()
    other = await waiting
    np.frombuffer(other, "u1")[:] = 2
    assert (np.frombuffer(lease, "u1") == 1).all()
    assert (budget.bytes_used, budget.bytes_held, first.bytes_held()) == (2 * PAGE, 2 * PAGE, 2 * PAGE)
    second.close()


async def test_trim_gives_idle_pages_back_only_when_no_stream_is_open():
    budget = make_budget(1024)
    account = budget.open_account()
    lease = await account.allocate(4 << 20)
    np.frombuffer(lease, "u1")[:] = 1
    del lease
    budget.trim()
    assert budget._arena.resident == 4 << 20
    account.close()
    budget.trim()
    assert budget._arena.resident == 0


async def test_resident_memory_stays_within_the_budget_and_the_held_bytes():
    budget = make_budget(16)
    account = budget.open_account()
    await account.set_floor(16 * PAGE)
    chance = random.Random(1)
    leases = []
    for _ in range(300):
        pages = chance.randint(1, 16)
        waiting = asking(account, pages)
        await turns(1)
        account.hand_over()
        leases.append(await waiting)
        del waiting
        np.frombuffer(leases[-1], "u1")[:] = 1
        assert budget._arena.resident <= budget.nbytes + budget.bytes_held
        while chance.random() < 0.6 and leases:
            leases.pop(chance.randrange(len(leases)))
    account.close()


async def test_address_space_that_the_system_refuses_is_a_budget_error():
    budget = MemoryBudget(2**29)
    account = budget.open_account()
    with pytest.raises(BudgetError, match="address space"):
        await account.allocate(2**48)
    assert budget.bytes_used == 0
    account.close()
