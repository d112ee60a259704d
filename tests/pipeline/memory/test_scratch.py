"""Scratch is charged to the account of a load, and stays a share of the budget."""

import pytest

from asyncshard import MemoryBudget
from asyncshard.errors import BudgetError
from asyncshard.pipeline.memory.scratch import charge_scratch
from asyncshard.tasks.threads import DaemonThreads

KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture
async def threads():
    threads = DaemonThreads(1, "asyncshard-test")
    yield threads
    await threads.aclose()


@pytest.fixture
def account_of():
    accounts = []

    def make(nbytes):
        accounts.append(MemoryBudget(nbytes / MIB).open_account())
        return accounts[-1]

    yield make
    for account in accounts:
        account.close()


async def test_a_scratch_has_sixteen_slabs_of_a_chunk_each_in_a_large_budget(account_of, threads):
    account = account_of(1024 * MIB)
    scratch = charge_scratch(account, threads, chunk_size=MIB, path="x")
    assert (scratch.slab_bytes, scratch.nbytes) == (MIB, 16 * MIB)
    assert account.header_bytes == scratch.nbytes


@pytest.mark.parametrize("budget_mib", [1, 3, 32, 100])
async def test_a_scratch_takes_an_eighth_of_the_budget_at_most(account_of, threads, budget_mib):
    account = account_of(budget_mib * MIB)
    scratch = charge_scratch(account, threads, chunk_size=16 * MIB, path="x")
    assert scratch.nbytes <= account.budget.nbytes // 8
    assert scratch.nbytes // scratch.slab_bytes >= 4


async def test_a_slab_is_never_smaller_than_four_kib(account_of, threads):
    scratch = charge_scratch(account_of(16 * KIB), threads, chunk_size=MIB, path="x")
    assert (scratch.slab_bytes, scratch.nbytes) == (4 * KIB, 4 * KIB)


async def test_a_scratch_that_exceeds_the_budget_is_an_error_that_names_the_path(account_of, threads):
    account = account_of(32 * KIB)
    account.charge_headers(30 * KIB, "headers")
    with pytest.raises(BudgetError, match="memory://model"):
        charge_scratch(account, threads, chunk_size=MIB, path="memory://model")
