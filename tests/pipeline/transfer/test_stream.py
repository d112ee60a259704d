import asyncio
import gc
import random

import numpy as np
import pytest

from asyncshard import AsyncShardLoader, MemoryBudget
from asyncshard.errors import (
    BudgetError,
    CheckpointError,
    FormatError,
    ObjectChangedError,
    ObjectNotFoundError,
    StoreError,
    StreamClosedError,
)
from asyncshard.testing import Fault, FaultyStore, GatedStore, MemoryStore

SIZE = 4096


@pytest.fixture(scope="session")
def tensors(checkpoints):
    return checkpoints.tensors(12, nbytes=SIZE)


@pytest.fixture(scope="session")
def files(checkpoints, tensors):
    """Twelve read items in three shards, with loaders as below."""
    names = list(tensors)
    return checkpoints.rank_files(*({name: tensors[name] for name in names[at : at + 4]} for at in (0, 4, 8)))


def make_loader(**tuning):
    return AsyncShardLoader(**{"memory_budget_mb": 1, "chunk_size": SIZE, **tuning})


async def turns(count=50):
    for _ in range(count):
        await asyncio.sleep(0)


async def others_end():
    """Wait until no task but this one is left."""
    while others := asyncio.all_tasks() - {asyncio.current_task()}:
        await asyncio.wait(others)


async def names_of(stream):
    return [name async for name, _ in stream]


# --- opening


async def test_every_way_of_opening_delivers_the_same(files, tensors, checkpoints):
    loader = make_loader()
    store = MemoryStore(files)
    async with loader.stream(store) as stream:
        assert checkpoints.same({name: tensor async for name, tensor in stream}, tensors)
    stream = await loader.stream(store)
    assert checkpoints.same({name: tensor async for name, tensor in stream}, tensors)
    assert checkpoints.same({name: tensor async for name, tensor in loader.stream(store)}, tensors)
    stream = loader.stream(store)
    assert await stream is stream
    async with stream as same:
        assert same is stream
        assert await stream is stream
        assert checkpoints.same({name: tensor async for name, tensor in stream}, tensors)


async def test_opening_reads_no_tensor_data(files):
    store = FaultyStore(MemoryStore(files))
    async with make_loader().stream(store) as stream:
        await turns()
        assert store.reads_begun == 0
        assert list(stream.info) == [f"layer.{index}" for index in range(12)]
        assert stream.info["layer.5"].nbytes == SIZE
        await anext(stream)
        assert store.reads_begun > 0


async def test_errors_that_need_no_tensor_data_are_raised_on_opening(files, checkpoints):
    last = "model-rank-0-part-2.safetensors"
    cases = [
        ({**files, last: files[last][:-1]}, FormatError),
        ({**files, last: b"not a shard"}, FormatError),
        ({**files, "model-rank-0-part-4.safetensors": files[last]}, CheckpointError),
        ({**files, "model-rank-0-part-3.safetensors": files[last]}, CheckpointError),
        ({}, ObjectNotFoundError),
    ]
    for broken, kind in cases:
        store = FaultyStore(MemoryStore(broken))
        loader = make_loader()
        stream = loader.stream(store)
        with pytest.raises(kind):
            await stream
        assert store.reads_begun == 0
        assert loader.budget.bytes_used == 0


async def test_a_stream_that_failed_to_open_raises_the_same_error_again():
    stream = make_loader().stream(MemoryStore({}))
    for _ in range(2):
        with pytest.raises(ObjectNotFoundError):
            await stream


async def test_a_stream_without_a_store_or_room_for_it_raises_the_same_error_again(files):
    store = MemoryStore(files)
    store.held_bytes = 2 << 20
    loader = make_loader()
    for path, error in (("nowhere://x", ValueError), (store, BudgetError)):
        stream = loader.stream(path)
        for _ in range(2):
            with pytest.raises(error):
                await stream
    assert loader.budget.bytes_used == 0


async def test_of_several_broken_shards_the_first_is_reported(files):
    names = list(files)
    released = asyncio.Event()
    first = StoreError("first", path=names[0])
    opens = {names[0]: Fault(hang=released, error=first), names[1]: Fault(error=StoreError("second", path=names[1]))}
    stream = make_loader().stream(FaultyStore(MemoryStore(files), opens=opens))
    opening = asyncio.ensure_future(stream.__aenter__())
    await turns()
    released.set()
    with pytest.raises(StoreError) as caught:
        await opening
    assert caught.value is first


async def test_a_store_that_was_passed_in_stays_open(files):
    class Closing(MemoryStore):
        is_closed = False

        async def aclose(self):
            self.is_closed = True

    store = Closing(files)
    async with make_loader().stream(store) as stream:
        await names_of(stream)
    assert not store.is_closed


async def test_an_empty_checkpoint_ends_at_once(checkpoints):
    async with make_loader().stream(MemoryStore(checkpoints.rank_files({}))) as stream:
        assert await names_of(stream) == []
        assert stream.statistics().eta_s == 0.0


async def test_before_opening_statistics_are_zero_and_facts_are_not_there(files):
    stream = make_loader().stream(MemoryStore(files))
    assert not stream.is_open
    at = stream.statistics()
    assert (at.bytes_total, at.bytes_done, at.bytes_held, at.elapsed_s, at.eta_s) == (0, 0, 0, 0.0, None)
    with pytest.raises(RuntimeError, match="not open"):
        _ = stream.info


def test_a_stream_belongs_to_the_loop_that_opened_it(files):
    stream = make_loader().stream(MemoryStore(files))

    async def begin():
        await stream
        await anext(stream)

    async def go_on():
        with pytest.raises(RuntimeError, match="another event loop"):
            while True:
                await anext(stream)

    asyncio.run(begin())
    asyncio.run(go_on())


# --- order and prefetch


@pytest.mark.parametrize("seed", range(5))
async def test_delivery_is_in_plan_order_whatever_completes_first(files, tensors, checkpoints, seed):
    chance = random.Random(seed)
    store = GatedStore(MemoryStore(files))

    async def open_gates():
        for _ in range(12):
            await turns(10)  # until as many wait as may be in flight
            chance.choice(await store.waiting(1)).open()

    opening = asyncio.ensure_future(open_gates())
    async with make_loader(prefetch_count=4).stream(store) as stream:
        got = {name: tensor async for name, tensor in stream}
    assert checkpoints.same(got, tensors)
    await opening


async def test_completion_order_delivers_items_as_their_reads_complete(files, tensors):
    store = GatedStore(MemoryStore(files))
    async with make_loader(prefetch_count=3, order="completion").stream(store) as stream:
        asked = asyncio.ensure_future(anext(stream))
        gates = await store.waiting(3)
        gates[2].open()
        name, tensor = await asked
        assert name == "layer.2"
        assert np.array_equal(tensor, tensors["layer.2"])
        gates[1].open()
        assert (await anext(stream))[0] == "layer.1"
        store.open_all()
        assert sorted(await names_of(stream)) == sorted(tensors.keys() - {"layer.1", "layer.2"})


@pytest.mark.parametrize("count", [1, 3, 100])
async def test_prefetch_count_bounds_the_items_ahead_of_the_consumer(files, count):
    store = GatedStore(MemoryStore(files))
    async with make_loader(prefetch_count=count).stream(store) as stream:
        asked = asyncio.ensure_future(anext(stream))
        await turns()
        assert len(store.gates) == min(count, 12)
        for gate in list(store.gates):
            gate.open()
        await asked
        await turns()
        # What was taken made room for one more; the others are read and wait for the consumer.
        assert len(store.gates) == (1 if count < 12 else 0)
        store.open_all()
        assert len(await names_of(stream)) == 11


async def test_small_tensors_are_read_together_up_to_chunk_size(checkpoints):
    files = checkpoints.rank_files(checkpoints.tensors(64, nbytes=64))
    store = FaultyStore(MemoryStore(files))
    async with make_loader(chunk_size=1024).stream(store) as stream:
        assert len(await names_of(stream)) == 64
    assert store.reads_begun == 4


async def test_a_large_tensor_is_read_in_chunks_that_are_in_flight_together(checkpoints):
    tensors = checkpoints.tensors(1, nbytes=SIZE * 5 + 4)
    store = GatedStore(MemoryStore(checkpoints.rank_files(tensors)))
    async with make_loader().stream(store) as stream:
        asked = asyncio.ensure_future(anext(stream))
        gates = await store.waiting(6)
        assert [gate.nbytes for gate in gates] == [SIZE] * 5 + [4]
        for gate in reversed(gates):
            gate.open()
        name, tensor = await asked
        assert checkpoints.same({name: tensor}, tensors)


# --- one consumer


async def test_two_consumers_at_once_are_an_error_and_the_first_goes_on(files):
    store = GatedStore(MemoryStore(files))
    async with make_loader().stream(store) as stream:
        asked = asyncio.ensure_future(anext(stream))
        await store.waiting(1)
        with pytest.raises(RuntimeError, match="another task"):
            await anext(stream)
        store.open_all()
        assert (await asked)[0] == "layer.0"
        assert (await anext(stream))[0] == "layer.1"


async def test_one_task_after_another_may_consume(files):
    async with make_loader().stream(MemoryStore(files)) as stream:
        got = [(await asyncio.create_task(stream.__anext__()))[0] for _ in range(12)]
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
    assert got == [f"layer.{index}" for index in range(12)]


async def test_a_stream_stays_at_its_end(files):
    stream = make_loader().stream(MemoryStore(files))
    assert len(await names_of(stream)) == 12
    assert await names_of(stream) == []
    await stream.aclose()
    assert await names_of(stream) == []


# --- ending early


async def test_break_within_the_context_leaves_nothing(files):
    loader = make_loader()
    async with loader.stream(GatedStoreThatOpens(files)) as stream:
        async for _name, _tensor in stream:
            break
    assert loader.budget.bytes_used == 0
    assert asyncio.all_tasks() == {asyncio.current_task()}
    del _tensor
    assert loader.budget.bytes_held == 0  # without a run of the garbage collector


class GatedStoreThatOpens(GatedStore):
    """Lets the first read through and holds all others."""

    def __init__(self, files):
        super().__init__(MemoryStore(files))
        self._count = 0

    async def read_into(self, meta, start, buffers):
        self._count += 1
        if self._count == 1:
            await self.store.read_into(meta, start, buffers)
        else:
            await super().read_into(meta, start, buffers)


async def test_break_and_drop_without_a_context_leaves_nothing_soon(files):
    loader = make_loader()
    async for _ in loader.stream(GatedStoreThatOpens(files)):
        break
    gc.collect()
    await others_end()
    assert loader.budget.bytes_used == 0


async def test_a_stream_dropped_before_its_first_item_leaves_nothing(files):
    loader = make_loader()
    stream = await loader.stream(MemoryStore(files))
    del stream
    gc.collect()
    await others_end()
    assert loader.budget.bytes_used == 0


def test_a_stream_dropped_after_its_loop_has_closed_is_no_error(files):
    async def begin():
        stream = await make_loader().stream(MemoryStore(files))
        await anext(stream)
        return stream

    stream = asyncio.run(begin())
    del stream
    gc.collect()


async def test_an_exception_in_the_consumer_leaves_nothing_and_comes_through_bare(files):
    loader = make_loader()
    with pytest.raises(KeyError, match="mine"):
        async with loader.stream(GatedStoreThatOpens(files)) as stream:
            async for _ in stream:
                raise KeyError("mine")
    assert loader.budget.bytes_used == 0
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_closing_from_another_task_ends_a_consumer_that_waits(files):
    store = GatedStore(MemoryStore(files))
    stream = await make_loader().stream(store)
    asked = asyncio.ensure_future(anext(stream))
    await store.waiting(1)
    await asyncio.create_task(stream.aclose())
    with pytest.raises(StreamClosedError):
        await asked
    assert store.gates == []
    await stream.aclose()


async def test_closing_while_the_last_tensors_are_read_is_no_end_for_a_consumer_that_waits(files):
    store = GatedStore(MemoryStore(files))
    stream = await make_loader(prefetch_count=12).stream(store)
    asked = asyncio.ensure_future(anext(stream))
    await store.waiting(12)
    await stream.aclose()
    with pytest.raises(StreamClosedError):
        await asked
    assert "closed, 0 of 12 tensors" in repr(stream)


async def test_a_closed_stream_is_an_error_to_use(files):
    stream = await make_loader().stream(MemoryStore(files))
    await anext(stream)
    await stream.aclose()
    for _ in range(2):
        with pytest.raises(StreamClosedError):
            await anext(stream)
    stream = make_loader().stream(MemoryStore(files))
    await stream.aclose()
    with pytest.raises(StreamClosedError):
        await stream
    with pytest.raises(StreamClosedError):
        await anext(stream)


async def test_many_tasks_may_close_at_once(files):
    stream = await make_loader().stream(GatedStoreThatOpens(files))
    await anext(stream)
    await asyncio.gather(*(stream.aclose() for _ in range(5)))


async def test_closing_a_stream_that_is_opening_stops_the_opening(files):
    name = next(iter(files))
    store = FaultyStore(MemoryStore(files), opens={name: Fault(hang=asyncio.Event())})
    stream = make_loader().stream(store)
    opening = asyncio.ensure_future(stream.__aenter__())
    await turns()
    await stream.aclose()
    with pytest.raises(StreamClosedError):
        await opening


async def test_closing_before_the_opening_has_begun_gives_all_memory_back(files):
    store = MemoryStore(files)
    store.held_bytes = SIZE
    loader = make_loader()
    stream = loader.stream(store)
    opening = asyncio.ensure_future(stream.__aenter__())
    await turns(1)
    assert loader.budget.bytes_used == SIZE
    await stream.aclose()
    with pytest.raises(StreamClosedError):
        await opening
    assert loader.budget.bytes_used == 0


@pytest.mark.parametrize("is_reversed", [False, True])
async def test_streams_may_be_closed_in_any_order(files, is_reversed):
    budget = MemoryBudget(1)
    streams = [await make_loader(memory_budget_mb=None, budget=budget).stream(MemoryStore(files)) for _ in range(3)]
    for stream in streams:
        await anext(stream)
    for stream in reversed(streams) if is_reversed else streams:
        await stream.aclose()
    assert budget.bytes_used == 0


# --- errors


async def test_an_error_comes_in_plan_order_after_the_tensors_before_it(files):
    error = StoreError("broken", path="part")
    for number in range(12):
        store = FaultyStore(MemoryStore(files), {number: Fault(error=error)})
        loader = make_loader()
        got = []
        with pytest.raises(StoreError) as caught:
            async with loader.stream(store) as stream:
                async for name, _ in stream:
                    got.append(name)
        assert caught.value is error
        assert got == [f"layer.{index}" for index in range(number)]
        assert loader.budget.bytes_used == 0


async def test_of_two_errors_the_first_in_plan_order_is_raised(files):
    first, second = StoreError("first"), StoreError("second")
    released = asyncio.Event()
    store = FaultyStore(MemoryStore(files), {1: Fault(hang=released, error=first), 2: Fault(error=second)})
    async with make_loader().stream(store) as stream:
        assert (await anext(stream))[0] == "layer.0"
        asked = asyncio.ensure_future(anext(stream))
        await turns()
        assert not asked.done()
        released.set()
        with pytest.raises(StoreError) as caught:
            await asked
        assert caught.value is first


async def test_after_an_error_the_stream_is_closed(files):
    store = FaultyStore(MemoryStore(files), {0: Fault(error=StoreError("broken"))})
    stream = make_loader().stream(store)
    with pytest.raises(StoreError):
        await anext(stream)
    assert asyncio.all_tasks() == {asyncio.current_task()}
    with pytest.raises(StreamClosedError):
        await anext(stream)


async def test_no_read_begins_after_one_has_failed(files):
    store = FaultyStore(MemoryStore(files), {0: Fault(error=StoreError("broken"))})
    with pytest.raises(StoreError):
        await anext(make_loader(prefetch_count=2).stream(store))
    assert store.reads_begun <= 2


async def test_an_error_in_one_chunk_ends_the_others(checkpoints):
    store = GatedStore(MemoryStore(checkpoints.rank_files(checkpoints.tensors(1, nbytes=SIZE * 4))))
    broken = FaultyStore(store, {2: Fault(error=StoreError("broken"))})
    with pytest.raises(StoreError, match="broken"):
        await anext(make_loader().stream(broken))
    assert store.gates == []


async def test_a_foreign_exception_of_a_store_comes_through_bare(files):
    store = FaultyStore(MemoryStore(files), {3: Fault(error=ZeroDivisionError("odd"))})
    with pytest.raises(ZeroDivisionError):
        await names_of(make_loader().stream(store))


async def test_an_exception_of_no_usual_class_ends_the_stream_too(files):
    class Interrupted(BaseException):
        pass

    class BrokenSink:
        async def write(self, offset, data):
            raise Interrupted

    class BrokenMapping(dict):
        def __contains__(self, name):
            raise Interrupted

    loader = make_loader()
    with pytest.raises(Interrupted):
        await loader.stream(MemoryStore(files), BrokenMapping())
    with pytest.raises(BaseExceptionGroup) as caught:
        await loader.stream(MemoryStore(files), {f"layer.{index}": BrokenSink() for index in range(12)}).drain()
    assert caught.group_contains(Interrupted)


async def test_an_object_that_changes_is_an_error_and_the_next_load_is_right(files, tensors, checkpoints):
    store = MemoryStore(files)
    loader = make_loader(prefetch_count=1)
    got = {}
    with pytest.raises(ObjectChangedError):
        async with loader.stream(store) as stream:
            async for name, tensor in stream:
                got[name] = tensor
                store.replace("model-rank-0-part-1.safetensors", files["model-rank-0-part-1.safetensors"])
    assert list(got) == ["layer.0", "layer.1", "layer.2", "layer.3"]
    assert checkpoints.same({name: tensor async for name, tensor in loader.stream(store)}, tensors)


# --- the event loop and the count


async def test_many_small_tensors_let_the_loop_run(checkpoints):
    store = MemoryStore(checkpoints.rank_files(checkpoints.tensors(20_000, nbytes=8)))
    count = 0
    is_done = False

    async def other():
        nonlocal count
        while not is_done:
            count += 1
            await asyncio.sleep(0)

    async with make_loader(chunk_size=1 << 20, memory_budget_mb=16).stream(store) as stream:
        await anext(stream)
        running = asyncio.ensure_future(other())
        async for _ in stream:
            pass
        is_done = True
    await running
    # One item holds all: without giving way the consumer would never have let go of the loop. It takes well over 10 ms.
    assert count >= 5


async def test_statistics_follow_the_load(files):
    store = GatedStore(MemoryStore(files))
    loader = make_loader(prefetch_count=2)
    async with loader.stream(store) as stream:
        at = stream.statistics()
        assert (at.bytes_total, at.tensors_total) == (12 * SIZE, 12)
        assert (at.bytes_done, at.tensors_done, at.bytes_in_flight, at.bytes_held) == (0, 0, 0, 0)
        assert at.eta_s is None
        asked = asyncio.ensure_future(anext(stream))
        await store.waiting(2)
        assert stream.statistics().bytes_in_flight == 2 * SIZE
        store.open_all()
        _name, tensor = await asked
        at = stream.statistics()
        assert (at.bytes_done, at.tensors_done) == (SIZE, 1)
        assert at.eta_s == pytest.approx(at.elapsed_s * 11, rel=0.5)
        assert len(await names_of(stream)) == 11
        at = stream.statistics()
        assert (at.bytes_done, at.tensors_done, at.bytes_in_flight, at.eta_s) == (12 * SIZE, 12, 0, 0.0)
        assert at.bytes_held == SIZE
        assert stream.statistics().elapsed_s == at.elapsed_s
        del tensor, asked
        assert stream.statistics().bytes_held == 0
    assert stream.statistics().tensors_done == 12
