"""`AsyncShardLoader.stream` over real files: its three forms, destinations, sinks, statistics."""

import asyncio
import gc

import numpy as np
import pytest

import asyncshard
from asyncshard import AsyncShardLoader, ShardedStateLoader, Sink, Stream
from asyncshard.errors import BudgetError, DestinationError, NamesError, ObjectNotFoundError, StreamClosedError

KIB, MIB = 1 << 10, 1 << 20


class Collector:
    """A sink that keeps what it gets, and checks that it comes in order."""

    def __init__(self):
        self.data = bytearray()
        self.sizes = []

    async def write(self, offset, buffer):
        assert offset == len(self.data)
        await asyncio.sleep(0)
        self.data += buffer
        self.sizes.append(len(buffer))


@pytest.fixture
def model(tmp_path, checkpoints):
    parts = [{f"t{part}.{i}": np.full(5000, 100 * part + i, np.int32) for i in range(10)} for part in range(3)]
    return checkpoints.write_ranks(tmp_path / "model", *parts), {
        name: int(array[0]) for tensors in parts for name, array in tensors.items()
    }


async def test_a_stream_is_awaitable_a_context_manager_and_an_iterator(model):
    path, expected = model
    loader = AsyncShardLoader()
    stream = loader.stream(path)
    assert isinstance(stream, Stream)
    assert not stream.is_open
    assert await stream is stream
    assert stream.is_open
    assert {name: int(tensor[0]) async for name, tensor in stream} == expected
    async with loader.stream(path) as stream:
        assert {name: int(tensor[0]) async for name, tensor in stream} == expected
    assert {name: int(tensor[0]) async for name, tensor in loader.stream(path)} == expected
    async with await loader.stream(path) as stream:
        assert {name: int(tensor[0]) async for name, tensor in stream} == expected


async def test_opening_reads_no_tensor_and_iterating_reads_them(tmp_path, checkpoints):
    path = checkpoints.write_file(tmp_path / "x", {"w": np.zeros(MIB)})
    stream = await asyncshard.stream(path)
    statistics = stream.statistics()
    assert (statistics.bytes_total, statistics.bytes_done, statistics.tensors_total) == (8 * MIB, 0, 1)
    assert (statistics.tensors_done, statistics.bytes_in_flight, statistics.bytes_held) == (0, 0, 0)
    assert statistics.eta_s is None
    await stream.aclose()


async def test_each_way_of_opening_raises_the_errors_of_the_checkpoint(tmp_path):
    with pytest.raises(ObjectNotFoundError):
        await asyncshard.stream(tmp_path)
    with pytest.raises(ObjectNotFoundError):
        async with asyncshard.stream(tmp_path):
            raise AssertionError("it opened")
    with pytest.raises(ObjectNotFoundError):
        await anext(asyncshard.stream(tmp_path))
    with pytest.raises(ObjectNotFoundError):
        await asyncshard.stream(tmp_path).drain()


async def test_a_failed_stream_can_be_asked_for_its_error_again(tmp_path):
    stream = asyncshard.stream(tmp_path)
    for _ in range(2):
        with pytest.raises((ObjectNotFoundError, StreamClosedError)):
            await stream


async def test_statistics_tell_the_end(model):
    path, expected = model
    stream = asyncshard.stream(path)
    async with stream:
        counts = []
        async for _ in stream:
            counts.append(stream.statistics().tensors_done)
    assert counts == list(range(1, len(expected) + 1))
    statistics = stream.statistics()
    assert statistics.bytes_done == statistics.bytes_total == 30 * 20_000
    assert statistics.tensors_done == statistics.tensors_total == 30
    assert (statistics.bytes_in_flight, statistics.eta_s, statistics.retries) == (0, 0.0, 0)
    assert statistics.elapsed_s == stream.statistics().elapsed_s
    assert statistics.missing == statistics.unexpected == ()


async def test_a_stream_that_is_not_open_knows_of_no_tensors_yet(model):
    stream = asyncshard.stream(model[0])
    statistics = stream.statistics()
    assert (statistics.bytes_total, statistics.tensors_total, statistics.bytes_done) == (0, 0, 0)
    with pytest.raises(RuntimeError, match="not open"):
        _ = stream.info
    await stream.aclose()


async def test_a_stream_ends_once_and_stays_ended(model):
    stream = asyncshard.stream(model[0])
    await stream.drain()
    for _ in range(2):
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
    assert [item async for item in stream] == []


@pytest.mark.parametrize("count", [0, 1, 15])
async def test_using_a_closed_stream_is_an_error(count, model):
    stream = asyncshard.stream(model[0])
    async with stream:
        for _ in range(count):
            await anext(stream)
    with pytest.raises(StreamClosedError):
        await anext(stream)
    await stream.aclose()


async def test_a_stream_that_was_never_opened_can_be_closed(model):
    stream = asyncshard.stream(model[0])
    await stream.aclose()
    with pytest.raises(StreamClosedError):
        await stream


async def test_break_return_and_an_exception_in_the_consumer_leave_the_next_load_right(model):
    path, expected = model
    loader = AsyncShardLoader(memory_budget_mb=1, chunk_size=64 * KIB)

    async def first():
        async with loader.stream(path) as stream:
            async for name, _ in stream:
                return name
        return None

    assert await first() == "t0.0"
    async for _ in loader.stream(path):
        break

    async def broken():
        async with loader.stream(path) as stream:
            async for _ in stream:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await broken()
    gc.collect()
    assert {name: int(tensor[0]) async for name, tensor in loader.stream(path)} == expected
    assert loader.budget.bytes_used == 0


async def test_tensors_belong_to_the_consumer(model):
    path, expected = model
    loader = AsyncShardLoader(memory_budget_mb=0.2, chunk_size=64 * KIB)
    kept = {}
    async for name, tensor in loader.stream(path):
        assert tensor.flags.writeable
        tensor += 1
        kept[name] = tensor
    assert {name: int(tensor[0]) for name, tensor in kept.items()} == {
        name: value + 1 for name, value in expected.items()
    }
    assert all((tensor == tensor[0]).all() for tensor in kept.values())
    assert loader.budget.bytes_held >= sum(tensor.nbytes for tensor in kept.values())
    piece = kept.popitem()[1][10:20]
    kept.clear()
    del tensor
    assert 0 < loader.budget.bytes_held < 200_000
    del piece
    assert loader.budget.bytes_held == 0


async def test_into_yields_each_destination_when_it_is_filled(model):
    path, expected = model
    into = {name: np.full(5000, -1, np.int32) for name in expected}
    seen = []
    async with AsyncShardLoader(chunk_size=8 * KIB).stream(path, into=into) as stream:
        async for name, tensor in stream:
            assert tensor is into[name]
            assert (tensor == expected[name]).all()
            seen.append(name)
    assert seen == list(expected)


async def test_into_mixes_arrays_views_and_sinks(tmp_path, checkpoints):
    weights = {name: np.random.default_rng(1).integers(0, 99, (40, 50)).astype(np.int32) for name in "abcd"}
    checkpoints.write_ranks(tmp_path, weights)
    fused, sink = np.zeros((40, 100), np.int32), Collector()
    into = {"a": fused[:, :50], "b": fused[:, 50:], "c": sink, "d": np.zeros((40, 50), np.int32)}
    loader = AsyncShardLoader(chunk_size=1024)
    async with loader.stream(tmp_path, into) as stream:
        assert {name: tensor is into[name] async for name, tensor in stream} == dict.fromkeys("abcd", True)
    assert (fused == np.concatenate([weights["a"], weights["b"]], 1)).all()
    assert bytes(sink.data) == weights["c"].tobytes()
    assert (into["d"] == weights["d"]).all()
    assert isinstance(sink, Sink)


async def test_a_tensor_larger_than_the_budget_passes_through_a_sink(tmp_path, checkpoints):
    array = np.random.default_rng(2).integers(0, 256, 5 * MIB, np.uint8)
    checkpoints.write_ranks(tmp_path, {"w": array, "empty": np.zeros((0, 3))})
    loader = AsyncShardLoader(memory_budget_mb=1)
    with pytest.raises(BudgetError, match="into="):
        await loader.stream(tmp_path)
    sink, empty = Collector(), Collector()
    await loader.stream(tmp_path, {"w": sink, "empty": empty}).drain()
    assert bytes(sink.data) == array.tobytes()
    assert max(sink.sizes) <= MIB // 4
    assert empty.data == b""
    assert loader.budget.bytes_used == 0


async def test_an_error_of_a_sink_comes_out_bare(tmp_path, checkpoints):
    checkpoints.write_ranks(tmp_path, {"w": np.zeros(1000), "v": np.zeros(1000)})

    class Broken:
        async def write(self, offset, buffer):
            raise ZeroDivisionError("device lost")

    with pytest.raises(ZeroDivisionError, match="device lost"):
        await AsyncShardLoader().stream(tmp_path, {"w": Broken(), "v": np.zeros(1000)}).drain()


@pytest.mark.parametrize("sink", [object(), 3, "text", None])
async def test_a_destination_that_is_neither_an_array_nor_a_sink_is_refused_before_a_read(sink, tmp_path, checkpoints):
    checkpoints.write_ranks(tmp_path, {"a": np.ones(3), "w": np.ones(3)})
    into = {"a": np.zeros(3), "w": sink}
    with pytest.raises(DestinationError, match="'w'"):
        await AsyncShardLoader().stream(tmp_path, into)
    assert not into["a"].any()


async def test_into_is_strict_unless_told_otherwise(model):
    path, _ = model
    into = {"t0.0": np.zeros(5000, np.int32), "extra": np.zeros(1)}
    with pytest.raises(NamesError):
        await AsyncShardLoader().stream(path, into)
    async with AsyncShardLoader().stream(path, into, strict=False) as stream:
        assert [name async for name, _ in stream] == ["t0.0"]
        assert stream.statistics().missing == ("extra",)
        assert len(stream.statistics().unexpected) == 29


async def test_an_empty_into_is_a_load_into_no_destinations(model):
    with pytest.raises(NamesError):
        await AsyncShardLoader().stream(model[0], {})
    assert await AsyncShardLoader().stream(model[0], {}, strict=False).drain()


async def test_load_weights_async_gives_a_dict_in_plan_order(model):
    path, expected = model
    got = await AsyncShardLoader(memory_budget_mb=0.1).load_weights_async(path)
    assert {name: int(tensor[0]) for name, tensor in got.items()} == expected
    assert list(got) == list(expected)


async def test_the_base_loader_chooses_the_files(tmp_path, checkpoints):
    for rank in range(2):
        checkpoints.write_ranks(tmp_path, {"w": np.array([rank])}, rank=rank)
    base = ShardedStateLoader(rank=1, world_size=2)
    assert (await AsyncShardLoader(base).load_weights_async(tmp_path))["w"].tolist() == [1]
    assert (await AsyncShardLoader(AsyncShardLoader(base)).load_weights_async(tmp_path))["w"].tolist() == [1]


async def test_drain_closes_the_stream_also_when_it_fails(tmp_path, checkpoints):
    path = checkpoints.write_file(tmp_path / "x", {"w": np.zeros(10)})
    stream = asyncshard.stream(path)
    statistics = await stream.drain()
    assert statistics == stream.statistics()
    broken = await asyncshard.stream(path)
    path.write_bytes(b"")
    with pytest.raises(OSError, match="x: "):
        await broken.drain()
    with pytest.raises(StreamClosedError):
        await anext(broken)
