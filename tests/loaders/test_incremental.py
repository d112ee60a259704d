"""`IncrementalShardLoader`: shards and tensors on demand, from memory where they are."""

import asyncio
import gc
import pickle

import numpy as np
import pytest

import asyncshard
from asyncshard import AsyncShardLoader, IncrementalShardLoader, MemoryBudget
from asyncshard.errors import AsyncShardError, BudgetError, NamesError, ObjectNotFoundError, StoreError
from asyncshard.stores import LocalStore
from asyncshard.stores.opening import StoreAccess
from asyncshard.testing import Fault, FaultyStore, GatedStore, WrapperStore

KIB, MIB = 1 << 10, 1 << 20


def rank_files(directory, checkpoints, *, parts=4, nbytes=256 * KIB):
    """Write parts of two tensors each, of `nbytes` together, whose values tell the part."""
    tensors = [
        {f"p{part}.{name}": np.full(nbytes // 8, 10 * part + i, np.int32) for i, name in enumerate("ab")}
        for part in range(parts)
    ]
    checkpoints.write_ranks(directory, *tensors)
    return [str(directory / f"model-rank-0-part-{part}.safetensors") for part in range(parts)]


@pytest.fixture
def files(tmp_path, checkpoints):
    return rank_files(tmp_path / "model", checkpoints)


class CountingStore(WrapperStore):
    """Counts the calls, and the bytes of tensors that are read."""

    def __init__(self, store):
        super().__init__(store)
        self.opens = self.reads = self.nbytes = self.closes = 0

    async def open(self, name, nbytes):
        self.opens += 1
        return await super().open(name, nbytes)

    async def read_into(self, meta, start, buffers):
        self.reads += 1
        self.nbytes += sum(buffer.nbytes for buffer in buffers)
        await super().read_into(meta, start, buffers)

    async def aclose(self):
        self.closes += 1
        await super().aclose()


@pytest.fixture
def wrapped(monkeypatch):
    """Put a wrapper round every store that a loader opens for a file; returns those made."""

    def wrap(make):
        made = []
        open_folder = StoreAccess.open_folder

        def opened(access, file):
            store, name = open_folder(access, file)
            made.append(make(store))
            return made[-1], name

        monkeypatch.setattr(StoreAccess, "open_folder", opened)
        return made

    return wrap


async def first(stores):
    """Wait until a store was opened."""
    async with asyncio.timeout(20):
        while not stores:  # noqa: ASYNC110 - nothing tells of it
            await asyncio.sleep(0)
    return stores[0]


def values(tensors):
    return {name: int(tensor[0]) for name, tensor in tensors.items()}


async def test_a_shard_is_a_read_only_mapping_of_its_tensors(files):
    async with IncrementalShardLoader() as loader:
        shard = await loader.load_shard(files[1])
        assert list(shard) == ["p1.a", "p1.b"]
        assert (len(shard), "p1.a" in shard, "p0.a" in shard, None in shard) == (2, True, False, False)
        assert values(shard) == {"p1.a": 10, "p1.b": 11}
        with pytest.raises(KeyError):
            shard["p0.a"]
        with pytest.raises(TypeError):
            shard["p1.a"] = 0
        with pytest.raises(ValueError, match="read-only"):
            shard["p1.a"][0] = 0
        assert "2 tensors" in repr(shard)


async def test_every_dtype_comes_as_by_a_full_load(tmp_path, checkpoints):
    path = checkpoints.write_file(tmp_path / "x.safetensors", checkpoints.every_dtype())
    expected = await asyncshard.load(path)
    async with IncrementalShardLoader() as loader:
        shard = await loader.load_shard(path)
        assert list(shard) == list(expected)
        for name, tensor in expected.items():
            for got in (shard[name], await loader.get_tensor(path, name)):
                assert (got.dtype, got.shape, got.tobytes()) == (tensor.dtype, tensor.shape, tensor.tobytes())
    async with IncrementalShardLoader() as loader:
        for name, tensor in expected.items():
            assert (await loader.get_tensor(path, name)).tobytes() == tensor.tobytes()


async def test_a_second_request_is_answered_from_memory(files, wrapped):
    stores = wrapped(CountingStore)
    async with IncrementalShardLoader() as loader:
        shard = await loader.load_shard(files[0])
        before = stores[0].opens, stores[0].reads
        assert await loader.load_shard(files[0]) is shard
        assert values({"p0.b": await loader.get_tensor(files[0], "p0.b")}) == {"p0.b": 1}
        assert (stores[0].opens, stores[0].reads) == before
        statistics = loader.statistics()
    assert (statistics.hits, statistics.misses, statistics.shards_cached) == (2, 1, 1)
    assert (statistics.evictions, statistics.bytes_held, statistics.reads_in_flight) == (0, 0, 0)
    assert 256 * KIB < statistics.bytes_cached < 264 * KIB


async def test_a_relative_and_an_absolute_path_are_one_shard(files, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    async with IncrementalShardLoader() as loader:
        assert await loader.load_shard("model/model-rank-0-part-0.safetensors") is await loader.load_shard(files[0])


async def test_one_tensor_reads_its_own_bytes_alone_and_once(files, wrapped):
    stores = wrapped(CountingStore)
    async with IncrementalShardLoader() as loader:
        for _ in range(3):
            assert int((await loader.get_tensor(files[2], "p2.b"))[0]) == 21
        assert stores[0].nbytes == 128 * KIB
        assert int((await loader.get_tensor(files[2], "p2.a"))[0]) == 20
        assert (stores[0].nbytes, stores[0].opens) == (256 * KIB, 1)
        assert (loader.statistics().hits, loader.statistics().misses) == (2, 2)


async def test_tensors_are_found_in_a_checkpoint_of_ranks_or_with_an_index(tmp_path, files, checkpoints):
    indexed = checkpoints.write_hugging_face(tmp_path / "hf", {"x": np.ones(3)}, {"y": np.full(3, 2.0)})
    async with IncrementalShardLoader() as loader:
        assert int((await loader.get_tensor(tmp_path / "model", "p3.b"))[0]) == 31
        assert int((await loader.get_tensor(indexed, "y"))[0]) == 2
        for path, name in ((tmp_path / "model", "z"), (indexed, "z"), (files[0], "p1.a")):
            with pytest.raises(NamesError, match=name) as caught:
                await loader.get_tensor(path, name)
            assert isinstance(caught.value, KeyError)
        assert loader.evict(indexed)
        assert not loader.evict(indexed)


async def test_a_hundred_tasks_cause_one_read(files, wrapped):
    stores = wrapped(CountingStore)
    async with IncrementalShardLoader() as loader:
        shards = await asyncio.gather(*(loader.load_shard(files[0]) for _ in range(100)))
        assert all(shard is shards[0] for shard in shards)
        assert (stores[0].opens, stores[0].nbytes) == (1, 256 * KIB)
        tensors = await asyncio.gather(*(loader.get_tensor(files[1], "p1.a") for _ in range(100)))
        assert {int(tensor[0]) for tensor in tensors} == {10}
        assert (stores[0].opens, stores[0].nbytes) == (2, 384 * KIB)


@pytest.mark.parametrize("who", [0, 3])
async def test_cancelling_one_who_waits_disturbs_no_other(files, wrapped, who):
    stores = wrapped(GatedStore)
    async with IncrementalShardLoader() as loader:
        tasks = [asyncio.ensure_future(loader.load_shard(files[0])) for _ in range(4)]
        store = await first(stores)
        await store.waiting(1)
        tasks[who].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[who]
        assert loader.statistics().reads_in_flight == 1
        stores[0].open_all()
        assert [values(await task)["p0.a"] for task in tasks if task is not tasks[who]] == [0] * 3


async def test_cancelling_all_who_wait_stops_the_read(files, wrapped):
    stores = wrapped(GatedStore)
    loader = IncrementalShardLoader()
    tasks = [asyncio.ensure_future(loader.load_shard(files[0])) for _ in range(4)]
    store = await first(stores)
    await store.waiting(1)
    for task in tasks:
        task.cancel()
    assert all(
        isinstance(result, asyncio.CancelledError) for result in await asyncio.gather(*tasks, return_exceptions=True)
    )
    assert stores[0].gates == []
    assert loader.statistics().reads_in_flight == 0
    loader.clear()
    del tasks, task
    await asyncio.sleep(0)  # what woke this task is let go of
    assert loader.budget.bytes_used == 0
    wrapped(lambda store: store.store)
    assert values(await loader.load_shard(files[0])) == {"p0.a": 0, "p0.b": 1}
    await loader.aclose()


async def test_a_cancel_at_any_turn_leaves_the_cache_right(files):
    loader = IncrementalShardLoader(memory_budget_mb=1)
    for turns in range(40):
        task = asyncio.ensure_future(loader.load_shard(files[turns % 4]))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
            raise asyncio.CancelledError  # it had ended before
        assert loader.statistics().reads_in_flight == 0
        assert values(await loader.load_shard(files[turns % 4]))[f"p{turns % 4}.a"] == 10 * (turns % 4)
        loader.clear()
        del task
        await asyncio.sleep(0)  # what woke this task is let go of
        assert loader.budget.bytes_used == 0


async def test_a_read_that_fails_is_an_error_for_all_who_wait_and_is_not_remembered(files, wrapped):
    failing = [Fault(error=StoreError("the disk is on fire"))]
    wrapped(lambda store: FaultyStore(store, {0: failing[0]} if failing else {}))
    async with IncrementalShardLoader() as loader:
        results = await asyncio.gather(*(loader.load_shard(files[0]) for _ in range(5)), return_exceptions=True)
        assert [str(result) for result in results] == ["the disk is on fire"] * 5
        assert loader.statistics().shards_cached == 0
        assert values(await loader.load_shard(files[0])) == {"p0.a": 0, "p0.b": 1}


async def test_what_cannot_be_read_is_said_and_leaves_nothing(tmp_path, files):
    (tmp_path / "bad.safetensors").write_bytes(b"\0" * 20)
    loader = IncrementalShardLoader()
    with pytest.raises(ObjectNotFoundError, match="absent"):
        await loader.load_shard(tmp_path / "absent.safetensors")
    with pytest.raises(AsyncShardError, match="directory"):
        await loader.load_shard(tmp_path / "model")
    with pytest.raises(ValueError, match=r"bad\.safetensors"):
        await loader.load_shard(tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match="names no file"):
        await loader.load_shard("model/")
    assert loader.budget.bytes_used == 0
    assert loader.statistics().bytes_cached == 0


async def test_a_shard_larger_than_the_budget_is_an_error_and_its_tensors_are_not(tmp_path, checkpoints):
    (path,) = rank_files(tmp_path / "model", checkpoints, parts=1, nbytes=1500 * KIB)
    async with IncrementalShardLoader(memory_budget_mb=1) as loader:
        with pytest.raises(BudgetError, match=r"part-0.*1,048,576.*raise memory_budget_mb to 2.*get_tensor") as caught:
            await loader.load_shard(path)
        assert caught.value.needed_bytes > caught.value.budget_bytes == MIB
        assert int((await loader.get_tensor(path, "p0.b"))[0]) == 1


async def test_the_least_recently_used_shard_gives_way_to_bytes(files):
    async with IncrementalShardLoader(memory_budget_mb=0.8) as loader:  # three shards
        for index in (0, 1, 2, 0, 3):
            await loader.load_shard(files[index])
        assert (loader.statistics().evictions, loader.statistics().shards_cached) == (1, 3)
        hits = loader.statistics().hits
        for index in (0, 2, 3):
            await loader.load_shard(files[index])
        assert loader.statistics().hits == hits + 3
        assert loader.budget.bytes_used <= loader.budget.nbytes


async def test_the_cache_size_bounds_the_number_of_shards(files):
    async with IncrementalShardLoader(cache_size=2) as loader:
        for index in (0, 1, 0, 2):
            await loader.load_shard(files[index])
        assert (loader.statistics().shards_cached, loader.statistics().evictions) == (2, 1)
        misses = loader.statistics().misses
        await loader.load_shard(files[0])
        assert loader.statistics().misses == misses
        await loader.get_tensor(files[3], "p3.a")
        assert (loader.statistics().shards_cached, loader.statistics().evictions) == (2, 2)


async def test_a_shard_that_is_held_gives_way_and_stays_as_it_is(files):
    async with IncrementalShardLoader(memory_budget_mb=0.3) as loader:  # one shard
        tensor = (await loader.load_shard(files[0]))["p0.a"]
        for index in (1, 2, 3):
            assert values(await loader.load_shard(files[index]))[f"p{index}.a"] == 10 * index
            assert (tensor == 0).all()
            assert loader.statistics().bytes_held == 128 * KIB
            assert loader.budget.bytes_used <= loader.budget.nbytes
        del tensor
        assert loader.statistics().bytes_held == 0


async def test_bytes_in_use_count_until_they_die(files):
    async with IncrementalShardLoader(cache_size=1) as loader:
        tensor = (await loader.load_shard(files[0]))["p0.a"][5:]
        await loader.load_shard(files[1])
        assert loader.statistics().bytes_held == 256 * KIB
        assert loader.budget.bytes_used == loader.statistics().bytes_cached + 256 * KIB
        del tensor
        assert loader.statistics().bytes_held == 0
        assert loader.budget.bytes_used == loader.statistics().bytes_cached


async def test_with_a_strict_budget_what_is_held_is_an_error(files):
    async with IncrementalShardLoader(memory_budget_mb=0.3, strict_budget=True) as loader:
        tensor = (await loader.load_shard(files[0]))["p0.a"]
        with pytest.raises(BudgetError, match=r"still in use.*131,072"):
            await loader.load_shard(files[1])
        del tensor
        gc.collect()  # the error's frames
        assert values(await loader.load_shard(files[1]))["p1.a"] == 10


async def test_evicting_and_clearing_forget(files):
    async with IncrementalShardLoader() as loader:
        for path in files:
            await loader.load_shard(path)
        assert loader.evict(files[0])
        assert not loader.evict(files[0])
        assert loader.statistics().shards_cached == 3
        loader.clear()
        assert (loader.statistics().shards_cached, loader.budget.bytes_used) == (0, 0)
        assert values(await loader.load_shard(files[0])) == {"p0.a": 0, "p0.b": 1}


async def test_a_shard_evicted_while_it_is_read_is_delivered_and_not_kept(files, wrapped):
    stores = wrapped(GatedStore)
    async with IncrementalShardLoader() as loader:
        task = asyncio.ensure_future(loader.load_shard(files[0]))
        store = await first(stores)
        await store.waiting(1)
        assert loader.evict(files[0])
        stores[0].open_all()
        shard = await task
        assert values(shard) == {"p0.a": 0, "p0.b": 1}
        assert (loader.statistics().shards_cached, loader.statistics().bytes_held) == (0, 256 * KIB)
        del task, shard
        await asyncio.sleep(0)  # what woke this task is let go of
        assert (loader.statistics().bytes_held, loader.budget.bytes_used) == (0, 0)


async def test_a_shard_stays_as_it_was_read_until_it_is_evicted(tmp_path, files, checkpoints):
    async with IncrementalShardLoader() as loader:
        await loader.load_shard(files[0])
        await loader.get_tensor(files[1], "p1.a")
        for part in (0, 1):
            checkpoints.write_file(files[part], {f"p{part}.{name}": np.full(100, 7, np.int32) for name in "ab"})
        assert values(await loader.load_shard(files[0])) == {"p0.a": 0, "p0.b": 1}
        loader.evict(files[0])
        assert values(await loader.load_shard(files[0])) == {"p0.a": 7, "p0.b": 7}
        # Of a file that was read in part, what is still to be read is of the new one.
        assert values({"b": await loader.get_tensor(files[1], "p1.b")}) == {"b": 7}
        assert values({"a": await loader.get_tensor(files[1], "p1.a")}) == {"a": 7}


async def test_files_stay_open_inside_async_with_only(files, wrapped):
    stores = wrapped(CountingStore)
    async with IncrementalShardLoader() as loader:
        for path in files:
            await loader.load_shard(path)
        assert (len(stores), stores[0].closes) == (1, 0)
    assert stores[0].closes == 1
    for path in files[:2]:
        await loader.load_shard(path)
        assert stores[-1].closes == 1
    assert len(stores) == 3
    await loader.aclose()


async def test_a_loader_inherits_and_pickles(files):
    base = asyncshard.ShardedStateLoader(memory_budget_mb=7, chunk_size=MIB)
    loader = IncrementalShardLoader(base, cache_size=3)
    assert loader.budget is base.budget
    assert loader.options.chunk_size == MIB
    copy = pickle.loads(pickle.dumps(loader))
    assert repr(copy) == repr(loader)
    assert "0.0 MB of MemoryBudget(7) used, cache_size=3, 0 shards cached" in repr(loader)
    assert values(await copy.load_shard(files[0])) == {"p0.a": 0, "p0.b": 1}
    await copy.aclose()
    for wrong, kind in ((0, ValueError), (1.5, TypeError), (True, TypeError)):
        with pytest.raises(kind, match="cache_size"):
            IncrementalShardLoader(cache_size=wrong)


async def test_a_cache_that_is_dropped_gives_its_bytes_back(files):
    budget = MemoryBudget(4)
    loader = IncrementalShardLoader(budget=budget)
    await loader.load_shard(files[0])
    assert budget.bytes_used > 0
    del loader
    gc.collect()
    assert budget.bytes_used == 0


# --- with streams


async def test_a_stream_on_the_same_budget_takes_what_is_cached(tmp_path, files):
    budget = MemoryBudget(1)
    async with IncrementalShardLoader(budget=budget) as loader:
        for path in files[:3]:
            await loader.load_shard(path)
        async for name, tensor in AsyncShardLoader(budget=budget).stream(tmp_path / "model"):
            assert int(tensor[0]) == 10 * int(name[1]) + "ab".index(name[3])
            assert budget.bytes_used <= budget.nbytes


async def test_all_tensors_come_in_plan_order(tmp_path, files):
    got = []

    async def keep(name, tensor):
        await asyncio.sleep(0)
        got.append((name, int(tensor[0]), tensor.flags.writeable))

    async with IncrementalShardLoader(memory_budget_mb=0.3) as loader:
        await loader.load_weights_incremental(tmp_path / "model", keep)
        expected = [(f"p{p}.{n}", 10 * p + i, False) for p in range(4) for i, n in enumerate("ab")]
        assert got == expected
        got.clear()
        await loader.load_weights_incremental(
            tmp_path / "model", lambda name, tensor: got.append((name, int(tensor[0]), tensor.flags.writeable))
        )
        assert got == expected


async def test_the_next_shard_is_read_while_the_callback_runs(files, tmp_path):
    store = GatedStore(LocalStore(str(tmp_path / "model")))
    reached, may_go_on = asyncio.Event(), asyncio.Event()

    async def stop(name, tensor):
        reached.set()
        await may_go_on.wait()

    async with IncrementalShardLoader(chunk_size=256 * KIB) as loader, store:
        load = asyncio.ensure_future(loader.load_weights_incremental(store, stop))
        (await store.waiting(1))[0].open()
        await reached.wait()
        gates = await store.waiting(3)
        assert [gate.name[-13] for gate in gates] == ["1", "2", "3"]
        store.open_all()
        may_go_on.set()
        await load


async def test_cached_shards_are_delivered_from_memory(tmp_path, files):
    store = CountingStore(LocalStore(str(tmp_path / "model")))
    got = {}
    async with IncrementalShardLoader() as loader, store:
        await loader.load_shard(files[1])
        await loader.load_weights_incremental(store, got.__setitem__)
        assert store.nbytes == 3 * 256 * KIB
        assert (loader.statistics().hits, loader.statistics().shards_cached) == (1, 1)
    assert values(got) == {f"p{p}.{n}": 10 * p + i for p in range(4) for i, n in enumerate("ab")}


async def test_a_cached_shard_of_a_file_that_was_replaced_is_not_delivered(tmp_path, files, checkpoints):
    got = {}
    async with IncrementalShardLoader() as loader:
        await loader.load_shard(files[1])
        checkpoints.write_file(files[1], {"p1.a": np.full(9, 5, np.int32)})
        await loader.load_weights_incremental(tmp_path / "model", got.__setitem__)
    assert (values(got)["p1.a"], "p1.b" in got) == (5, False)


async def test_an_error_of_the_callback_stops_the_load_and_names_the_tensor(tmp_path, files):
    seen = []

    def fail(name, tensor):
        seen.append(name)
        if name == "p1.b":
            raise ZeroDivisionError("no")

    async with IncrementalShardLoader() as loader:
        await loader.load_shard(files[1])
        with pytest.raises(ZeroDivisionError) as caught:
            await loader.load_weights_incremental(tmp_path / "model", fail)
        assert "'p1.b'" in caught.value.__notes__[0]
        assert seen == ["p0.a", "p0.b", "p1.a", "p1.b"]
        del caught
        gc.collect()
        statistics = loader.statistics()
        assert (statistics.shards_cached, statistics.bytes_held) == (1, 0)
        assert loader.budget.bytes_used == statistics.bytes_cached


async def test_the_callback_may_ask_the_same_loader_for_shards(tmp_path, files):
    """What was read ahead gives way to it: nobody else could make room."""
    seen = []

    async def ask(name, tensor):
        other = files[(int(name[1]) + 2) % 4]
        seen.append((name, values(await loader.load_shard(other))))

    async with IncrementalShardLoader(memory_budget_mb=0.8, chunk_size=64 * KIB) as loader:
        async with asyncio.timeout(20):
            await loader.load_weights_incremental(tmp_path / "model", ask)
    assert [name for name, _ in seen] == [f"p{p}.{n}" for p in range(4) for n in "ab"]
    assert all(shard[f"p{(int(name[1]) + 2) % 4}.a"] == 10 * ((int(name[1]) + 2) % 4) for name, shard in seen)


async def test_ten_loaders_share_one_small_budget(tmp_path, files):
    budget = MemoryBudget(0.6)
    loaders = [IncrementalShardLoader(budget=budget) for _ in range(10)]

    async def work(loader, first):
        for step in range(8):
            index = (first + step) % 4
            assert values(await loader.load_shard(files[index]))[f"p{index}.a"] == 10 * index
            assert budget.bytes_used <= budget.nbytes

    async with asyncio.timeout(40):
        await asyncio.gather(*(work(loader, first) for first, loader in enumerate(loaders)))
    for loader in loaders:
        await loader.aclose()
    assert budget.bytes_used == 0


async def test_clearing_at_any_turn_of_a_read_loses_no_count(files):
    loader = IncrementalShardLoader(memory_budget_mb=1)
    for turns in range(60):
        task = asyncio.ensure_future(loader.load_shard(files[0]))
        for _ in range(turns):
            await asyncio.sleep(0)
        loader.clear()
        shard = await task
        statistics = loader.statistics()
        assert loader.budget.bytes_used == statistics.bytes_cached + statistics.bytes_held >= 256 * KIB
        assert values(shard) == {"p0.a": 0, "p0.b": 1}
        loader.clear()
        del task, shard
        await asyncio.sleep(0)  # what woke this task is let go of
        assert loader.budget.bytes_used == 0
    await loader.aclose()
