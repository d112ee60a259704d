"""What a stream takes of the memory budget, and how tensors that the consumer keeps are handed over."""

import asyncio
import gc
import itertools

import numpy as np
import pytest

from asyncshard import AsyncShardLoader, MemoryBudget
from asyncshard.errors import BudgetError, StoreError
from asyncshard.testing import Fault, FaultyStore, MemoryStore, WrapperStore

MIB = 1 << 20
PAGE = 4096


class WatchedStore(WrapperStore):
    """Remembers the most that a budget had in use at the end of a read."""

    def __init__(self, files, budget):
        super().__init__(MemoryStore(files))
        self._budget = budget
        self.most = 0

    async def read_into(self, meta, start, buffers):
        await super().read_into(meta, start, buffers)
        self.most = max(self.most, self._budget.bytes_used)


def watched(files, **tuning):
    loader = AsyncShardLoader(**{"memory_budget_mb": 1, **tuning})
    return loader, WatchedStore(files, loader.budget)


async def test_a_consumer_that_lets_go_stays_within_the_budget(checkpoints):
    tensors = checkpoints.tensors(40, nbytes=MIB // 8)
    loader, store = watched(checkpoints.rank_files(tensors))
    count = 0
    async with loader.stream(store) as stream:
        async for name, tensor in stream:
            assert np.array_equal(tensor, tensors[name])
            del tensor
            count += 1
        assert stream.statistics().bytes_held == 0
    assert count == 40
    assert MIB // 2 < store.most <= MIB
    assert loader.budget.bytes_used == 0


async def test_a_consumer_that_keeps_all_tensors_gets_them_all_and_none_is_overwritten(checkpoints):
    tensors = checkpoints.tensors(100, nbytes=MIB // 10 // 4 * 4)
    loader, store = watched(checkpoints.rank_files(tensors))
    async with loader.stream(store) as stream:
        got = {name: tensor async for name, tensor in stream}
    assert checkpoints.same(got, tensors)
    assert store.most <= MIB
    assert stream.statistics().bytes_held == loader.budget.bytes_held > 9 * MIB
    got.clear()
    assert stream.statistics().bytes_held == loader.budget.bytes_held == 0


@pytest.mark.parametrize("count", [1, 2, 5])
async def test_a_budget_of_exactly_the_largest_tensor_is_enough(checkpoints, count):
    tensors = checkpoints.tensors(count, nbytes=MIB)
    loader, store = watched(checkpoints.rank_files(tensors))
    async with loader.stream(store) as stream:
        async for name, tensor in stream:
            assert np.array_equal(tensor, tensors[name])
    loader, store = watched(checkpoints.rank_files(tensors))
    async with loader.stream(store) as stream:
        got = {name: tensor async for name, tensor in stream}
    assert checkpoints.same(got, tensors)


async def test_handing_over_begins_only_when_nothing_else_helps(checkpoints):
    tensors = checkpoints.tensors(9, nbytes=MIB // 4 - PAGE)
    loader, store = watched(checkpoints.rank_files(tensors), chunk_size=PAGE)
    kept, held = [], []
    async with loader.stream(store) as stream:
        async for _, tensor in stream:
            kept.append(tensor)
            held.append(stream.statistics().bytes_held)
    assert held[:3] == [0, 0, 0]
    assert held == sorted(held)
    steps = [after - before for before, after in itertools.pairwise(held[:-1])]  # at its end all are handed over
    assert set(steps) == {0, MIB // 4 - PAGE}  # one at a time, as the next read needs its place
    assert held[-1] > 0


async def test_tensors_read_together_are_charged_until_the_last_of_them_dies(checkpoints):
    tensors = checkpoints.tensors(4, nbytes=PAGE)
    loader, store = watched(checkpoints.rank_files(tensors))
    async with loader.stream(store) as stream:
        got = [tensor async for _, tensor in stream]
    assert loader.budget.bytes_held == 4 * PAGE
    del got[:3]
    assert loader.budget.bytes_held == 4 * PAGE
    del got[0]
    assert loader.budget.bytes_held == 0


async def test_a_tensor_larger_than_the_budget_is_an_error_on_opening_that_names_it(checkpoints):
    tensors = {**checkpoints.tensors(2, nbytes=PAGE), "lm_head.weight": np.zeros(MIB + 4, "u1")}
    loader, store = watched(checkpoints.rank_files(tensors))
    with pytest.raises(BudgetError, match=r"lm_head\.weight.*1,048,580.*1,048,576.*memory_budget_mb to 2") as caught:
        await loader.stream(store)
    assert caught.value.tensor == "lm_head.weight"
    assert (caught.value.needed_bytes, caught.value.budget_bytes) == (MIB + 4, MIB)
    assert store.most == 0
    assert loader.budget.bytes_used == 0


async def test_a_strict_budget_too_small_for_two_neighbours_is_an_error_on_opening(checkpoints):
    files = checkpoints.rank_files(checkpoints.tensors(3, nbytes=MIB // 2))
    loader, store = watched(files, strict_budget=True)
    with pytest.raises(BudgetError, match=r"layer\.0"):
        await loader.stream(store)
    loader, store = watched(files, strict_budget=True, memory_budget_mb=1.1)
    async with loader.stream(store) as stream:
        async for _ in stream:
            pass


async def test_a_strict_budget_makes_keeping_tensors_an_error_after_those_that_fit(checkpoints):
    files = checkpoints.rank_files(checkpoints.tensors(12, nbytes=MIB // 4 - PAGE))
    loader, store = watched(files, strict_budget=True, chunk_size=PAGE)
    kept = []
    with pytest.raises(BudgetError, match="strict_budget=False"):
        async with loader.stream(store) as stream:
            async for _, tensor in stream:
                kept.append(tensor)
    assert 3 <= len(kept) <= 6
    assert store.most <= MIB
    kept.clear()
    del tensor
    async with loader.stream(store) as stream:
        assert len([name async for name, _ in stream]) == 12


async def test_two_loads_that_each_need_more_than_half_share_a_budget(checkpoints):
    budget = MemoryBudget(1)
    checkpoint = [
        checkpoints.tensors(6, nbytes=nbytes, seed=seed) for seed, nbytes in ((1, MIB * 3 // 4), (2, MIB * 5 // 8))
    ]

    async def load(tensors):
        loader = AsyncShardLoader(budget=budget)
        store = WatchedStore(checkpoints.rank_files(tensors), budget)
        async with loader.stream(store) as stream:
            got = {name: tensor async for name, tensor in stream}
        assert checkpoints.same(got, tensors)
        return store.most

    most = await asyncio.gather(*(load(tensors) for tensors in checkpoint * 2))
    assert max(most) <= MIB
    assert (budget.bytes_used, budget.bytes_held) == (0, 0)


async def test_two_streams_of_one_loader_may_be_read_in_turns_by_one_task(checkpoints):
    store = MemoryStore(checkpoints.rank_files(checkpoints.tensors(20, nbytes=MIB // 8)))
    loader = AsyncShardLoader(memory_budget_mb=1, chunk_size=MIB // 8)
    async with loader.stream(store) as one, loader.stream(store) as two:
        await anext(one)
        for _ in range(200):
            await asyncio.sleep(0)
        asked = asyncio.ensure_future(anext(two))
        try:
            for _ in range(200):
                await asyncio.sleep(0)
            assert asked.done()
        finally:
            asked.cancel()
            await asyncio.wait([asked])


async def test_waiting_for_the_budget_is_counted(checkpoints):
    store = MemoryStore(checkpoints.rank_files(checkpoints.tensors(4, nbytes=MIB)))
    async with AsyncShardLoader(memory_budget_mb=1).stream(store) as stream:
        async for _ in stream:
            pass
        assert stream.statistics().budget_wait_s > 0


async def test_an_error_in_a_chunk_keeps_no_buffer_alive_once_it_is_dropped(checkpoints):
    files = checkpoints.rank_files(checkpoints.tensors(1, nbytes=4 * PAGE))
    loader = AsyncShardLoader(memory_budget_mb=1, chunk_size=PAGE)
    store = FaultyStore(MemoryStore(files), {1: Fault(error=StoreError("broken"))})
    with pytest.raises(StoreError):
        await anext(loader.stream(store))
    assert loader.budget.bytes_used == 0


class BrokenStore(MemoryStore):
    """Every read of tensor data fails, with an error that only the caller keeps."""

    async def read_into(self, meta, start, buffers):
        await asyncio.sleep(0)
        raise StoreError("broken")


@pytest.mark.parametrize("has_destinations", [False, True])
async def test_an_error_that_is_dropped_takes_the_buffers_of_its_read_along(checkpoints, has_destinations):
    tensors = checkpoints.tensors(3)
    into = {name: np.zeros(2 * len(array), array.dtype)[::2] for name, array in tensors.items()}
    loader = AsyncShardLoader(memory_budget_mb=1)
    store = BrokenStore(checkpoints.rank_files(tensors))
    gc.disable()
    try:
        with pytest.raises(StoreError):
            await loader.stream(store, into if has_destinations else None).drain()
        assert loader.budget.bytes_held == 0
    finally:
        gc.enable()


async def test_destinations_in_place_need_no_budget(checkpoints):
    tensors = checkpoints.tensors(2, nbytes=2 * MIB)
    loader, store = watched(checkpoints.rank_files(tensors), memory_budget_mb=0.01)
    arrays = {name: np.zeros_like(tensor) for name, tensor in tensors.items()}
    await loader.stream(store, into=arrays).drain()
    assert checkpoints.same(arrays, tensors)
    assert store.most < PAGE  # headers


async def test_strided_destinations_go_through_blocks_within_the_budget(checkpoints):
    tensors = {"w": np.arange(2 * MIB // 4, dtype="<f4").reshape(512, 1024)}
    loader, store = watched(checkpoints.rank_files(tensors), memory_budget_mb=0.25)
    target = np.zeros((512, 2048), "<f4")[:, ::2]
    await loader.stream(store, into={"w": target}).drain()
    assert np.array_equal(target, tensors["w"])
    assert 0 < store.most <= MIB // 4
