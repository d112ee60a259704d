"""Destinations that take their tensor chunk by chunk."""

import asyncio

import numpy as np
import pytest

from asyncshard import AsyncShardLoader, Sink
from asyncshard.errors import StoreError, StreamClosedError
from asyncshard.testing import Fault, FaultyStore, GatedStore, MemoryStore

CHUNK = 4096


class Collected:
    """Remembers what it was given."""

    def __init__(self):
        self.data = bytearray()
        self.offsets = []

    async def write(self, offset, buffer):
        await asyncio.sleep(0)
        self.offsets.append(offset)
        self.data[offset : offset + len(buffer)] = buffer


@pytest.fixture(scope="session")
def tensors(checkpoints):
    return checkpoints.tensors(3, nbytes=5 * CHUNK + 8)


@pytest.fixture(scope="session")
def store(checkpoints, tensors):
    return MemoryStore(checkpoints.rank_files(tensors))


def make_loader(**tuning):
    return AsyncShardLoader(**{"memory_budget_mb": 1, "chunk_size": CHUNK, **tuning})


async def turns(count):
    for _ in range(count):
        await asyncio.sleep(0)


@pytest.mark.parametrize("order", ["plan", "completion"])
async def test_a_sink_gets_ascending_chunks_without_gaps(store, tensors, order):
    sinks = {name: Collected() for name in tensors}
    assert isinstance(sinks["layer.0"], Sink)
    async with make_loader(order=order).stream(store, into=sinks) as stream:
        got = [(name, destination) async for name, destination in stream]
    assert sorted(name for name, _ in got) == list(tensors)
    for name, sink in sinks.items():
        assert sink.offsets == list(range(0, 5 * CHUNK + 8, CHUNK))
        assert bytes(sink.data) == tensors[name].tobytes()
        assert (name, sink) in got


async def test_chunks_are_ascending_though_reads_complete_in_any_order(store, tensors):
    gated = GatedStore(store)
    sinks = {name: Collected() for name in tensors}
    load = asyncio.ensure_future(make_loader().stream(gated, into=sinks).drain())
    while not load.done():
        if gated.gates:
            gated.gates[-1].open()
        await turns(20)
    await load
    assert all(bytes(sink.data) == tensors[name].tobytes() for name, sink in sinks.items())
    assert all(sink.offsets == sorted(sink.offsets) for sink in sinks.values())


async def test_a_tensor_larger_than_the_budget_goes_through_a_sink(checkpoints):
    tensors = checkpoints.tensors(1, nbytes=3 << 20)
    sink = Collected()
    loader = AsyncShardLoader(memory_budget_mb=1)
    await loader.stream(MemoryStore(checkpoints.rank_files(tensors)), into={"layer.0": sink}).drain()
    assert bytes(sink.data) == tensors["layer.0"].tobytes()


async def test_a_slow_sink_bounds_the_reads_ahead(store, tensors):
    first, released = asyncio.Event(), asyncio.Event()

    class Slow(Collected):
        async def write(self, offset, buffer):
            first.set()
            await released.wait()
            await super().write(offset, buffer)

    counting = FaultyStore(store)
    sinks = {name: Slow() for name in tensors}
    load = asyncio.ensure_future(make_loader(prefetch_count=2).stream(counting, into=sinks).drain())
    await first.wait()
    await turns(200)
    assert counting.reads_begun == 2
    released.set()
    await load
    assert all(bytes(sink.data) == tensors[name].tobytes() for name, sink in sinks.items())


async def test_the_buffer_stays_as_it_is_until_write_returns(store, tensors):
    class Careful(Collected):
        async def write(self, offset, buffer):
            before = bytes(buffer)
            await turns(30)
            assert bytes(buffer) == before
            await super().write(offset, buffer)

    sinks = {name: Careful() for name in tensors}
    await make_loader(memory_budget_mb=0.05).stream(store, into=sinks).drain()
    assert all(bytes(sink.data) == tensors[name].tobytes() for name, sink in sinks.items())


@pytest.mark.parametrize("number", [0, 3, 5])
async def test_an_error_in_a_sink_is_raised_bare_and_ends_the_load(store, tensors, number):
    error = ZeroDivisionError("mine")

    class Broken(Collected):
        async def write(self, offset, buffer):
            if len(self.offsets) == number:
                raise error
            await super().write(offset, buffer)

    sinks = {**{name: Collected() for name in tensors}, "layer.1": Broken()}
    loader = make_loader()
    with pytest.raises(ZeroDivisionError) as caught:
        await loader.stream(store, into=sinks).drain()
    assert caught.value is error
    assert caught.value.filled == ("layer.0",)
    assert caught.value.torn[0] == "layer.1"
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert loader.budget.bytes_used == 0


async def test_a_read_error_reaches_the_consumer_after_the_chunks_before_it(store, tensors):
    broken = FaultyStore(store, {3: Fault(error=StoreError("broken"))})
    sinks = {name: Collected() for name in tensors}
    with pytest.raises(StoreError, match="broken"):
        await make_loader().stream(broken, into=sinks).drain()
    assert sinks["layer.0"].offsets == [0, CHUNK, 2 * CHUNK]


async def test_a_sink_may_close_the_stream_that_feeds_it(store, tensors):
    class Closing(Collected):
        async def write(self, offset, buffer):
            await super().write(offset, buffer)
            if len(self.offsets) == 2:
                await stream.aclose()

    sinks = {name: Closing() for name in tensors}
    loader = make_loader()
    stream = loader.stream(store, into=sinks)
    with pytest.raises(StreamClosedError):
        await stream.drain()
    assert sinks["layer.0"].offsets[:2] == [0, CHUNK]
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert loader.budget.bytes_used == 0


async def test_a_load_into_sinks_goes_on_after_a_cancelled_next_item(store, tensors):
    for count in range(0, 60, 3):
        sinks = {name: Collected() for name in tensors}
        async with make_loader(prefetch_count=3).stream(store, into=sinks) as stream:
            asked = asyncio.ensure_future(anext(stream))
            await turns(count)
            asked.cancel()
            await asyncio.wait([asked])
            names = [] if asked.cancelled() else [asked.result()[0]]
            names += [name async for name, _ in stream]
        assert names == list(tensors)
        for name, sink in sinks.items():
            assert bytes(sink.data) == tensors[name].tobytes()
            assert sink.offsets == sorted(sink.offsets)


async def test_an_empty_tensor_gives_its_sink_nothing_and_is_delivered(checkpoints):
    sink = Collected()
    empty = MemoryStore(checkpoints.rank_files({"empty": np.zeros((0, 4), "<f4")}))
    async with make_loader().stream(empty, into={"empty": sink}) as stream:
        assert [name async for name, _ in stream] == ["empty"]
    assert sink.offsets == []


async def test_sinks_and_arrays_may_be_mixed(store, tensors, checkpoints):
    array = np.zeros_like(tensors["layer.1"])
    strided = np.zeros((len(tensors["layer.2"]), 2), "<f4")[:, 0]
    sink = Collected()
    await make_loader().stream(store, into={"layer.0": sink, "layer.1": array, "layer.2": strided}).drain()
    assert bytes(sink.data) == tensors["layer.0"].tobytes()
    assert checkpoints.same({"layer.1": array, "layer.2": strided}, dict(list(tensors.items())[1:]))
