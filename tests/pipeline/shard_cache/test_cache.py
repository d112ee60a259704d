"""The shard cache evicts what was used longest ago, never what is being read, and counts what is still in use."""

import gc

import numpy as np
import pytest

from asyncshard import MemoryBudget
from asyncshard.errors import BudgetError
from asyncshard.pipeline.memory.budget import Reclaimable
from asyncshard.pipeline.shard_cache.cache import ShardCache


async def read(folder, key):
    with folder.cache.pinned(key, folder.shard) as file:
        return await folder.reader.read_file(folder.opened, file)


async def test_a_file_is_found_once_it_was_pinned(make_folder):
    folder = await make_folder()
    assert folder.cache.find("a") is None
    with folder.cache.pinned("a", folder.shard) as file:
        assert folder.cache.find("a") is folder.cache.peek("a") is file
        assert not file.has_tensors
    assert folder.cache.peek("a") is file


async def test_the_file_used_longest_ago_is_evicted_first(make_folder):
    folder = await make_folder(max_shards=2)
    for key in ("a", "b"):
        await read(folder, key)
    folder.cache.find("a")
    await read(folder, "c")
    assert [folder.cache.peek(key) is not None for key in "abc"] == [True, False, True]
    assert folder.cache.statistics(0).evictions == 1


async def test_peeking_is_no_use(make_folder):
    folder = await make_folder(max_shards=2)
    for key in ("a", "b"):
        await read(folder, key)
    folder.cache.peek("a")
    await read(folder, "c")
    assert folder.cache.peek("a") is None


async def test_a_file_that_is_being_read_is_not_evicted(make_folder):
    folder = await make_folder()
    with folder.cache.pinned("a", folder.shard):
        assert not folder.cache.reclaim(Reclaimable.CACHED)
    assert folder.cache.reclaim(Reclaimable.CACHED)
    assert folder.cache.peek("a") is None


async def test_a_file_evicted_while_it_is_read_is_dropped_when_the_read_ends(make_folder):
    folder = await make_folder()
    with folder.cache.pinned("a", folder.shard) as file:
        tensors = await folder.reader.read_file(folder.opened, file)
        assert folder.cache.evict("a")
        assert file.tensors is tensors
    assert file.tensors is None
    assert len(tensors) == 3


async def test_another_version_of_a_file_takes_its_place(make_folder, checkpoints):
    folder = await make_folder()
    await read(folder, "a")
    folder.memory.replace(folder.opened.name, checkpoints.shard({"other": np.ones(3)}))
    changed = await folder.reader.read_header(folder.opened)
    with folder.cache.pinned("a", changed) as file:
        assert (file.shard, file.tensors) == (changed, None)


async def test_a_header_larger_than_the_budget_is_an_error_and_leaves_nothing(make_folder):
    large, small = await make_folder(), await make_folder(pages=0.25)
    with pytest.raises(BudgetError), small.cache.pinned("a", large.shard._replace(header=Header(10_000))):
        pass
    assert small.cache.peek("a") is None
    assert small.cache.budget.bytes_used == 0


class Header:
    """Stands for a large header."""

    def __init__(self, nbytes):
        self.nbytes = nbytes


async def test_tensors_in_use_are_held_after_their_file_was_evicted(make_folder):
    folder = await make_folder()
    tensors = await read(folder, "a")
    cached = folder.cache.statistics(0)
    folder.cache.evict("a")
    held = folder.cache.statistics(0)
    assert (cached.shards_cached, cached.bytes_held) == (1, 0)
    assert (held.shards_cached, held.bytes_cached) == (0, 0)
    assert held.bytes_held == folder.cache.budget.bytes_used > 0
    del tensors
    gc.collect()
    assert folder.cache.statistics(0).bytes_held == folder.cache.budget.bytes_used == 0


async def test_tensors_in_use_are_handed_over_unless_the_cache_is_strict(make_folder):
    for is_strict in (False, True):
        folder = await make_folder(is_strict=is_strict)
        tensors = await read(folder, "a")
        folder.cache.evict("a")
        assert folder.cache.reclaim(Reclaimable.IN_USE) != is_strict
        assert (folder.cache.budget.bytes_used == 0) != is_strict
        del tensors


async def test_a_strict_cache_says_when_tensors_in_use_leave_no_room(make_folder):
    folder = await make_folder(pages=8, is_strict=True)
    tensors = await read(folder, "a")
    folder.cache.evict("a")
    folder.cache.require_room(4096, "x")
    with pytest.raises(BudgetError, match=r"strict_budget=False") as caught:
        folder.cache.require_room(6 * 4096, "x")
    assert caught.value.needed_bytes == 6 * 4096
    del tensors


async def test_an_account_beside_the_files_is_closed_once(make_folder):
    folder = await make_folder()
    account = folder.cache.open_account()
    account.charge_headers(100, "x")
    assert folder.cache.budget.bytes_used == 100
    folder.cache.discard(account)
    folder.cache.discard(account)
    assert folder.cache.budget.bytes_used == 0


async def test_releasing_lets_everything_leave_the_budget(make_folder):
    folder = await make_folder()
    tensors = await read(folder, "a")
    folder.cache.release()
    assert folder.cache.budget.bytes_used == 0
    assert len(tensors) == 3


def test_a_cache_that_is_dropped_closes_its_accounts():
    budget = MemoryBudget(1)
    cache = ShardCache(budget, None, is_strict=False)
    cache.open_account().charge_headers(100, "x")
    assert budget.bytes_used == 100
    del cache
    gc.collect()
    assert budget.bytes_used == 0
