"""Destinations that share memory: where they meet, against a plain comparison of every two; two tensors for one.

Of two tensors for one destination either is taken where they are equal, and they are named where they are not.
"""

import asyncio

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asyncshard import AsyncShardLoader, ShardedStateLoader, save_sharded_state
from asyncshard.arrays.memory import span
from asyncshard.errors import DestinationError, NamesError, StoreError
from asyncshard.pipeline.transfer.shared_memory import CoveredMemory
from asyncshard.plan.division.placements import Shard
from asyncshard.testing import Fault, FaultyStore, GatedStore, MemoryStore

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def weight():
    return np.random.default_rng(0).random((64, 48), np.float32)


@pytest.fixture
def write(checkpoints):
    """Make the files of a checkpoint, each of some tensors."""

    def make(*files):
        names = [f"model-rank-0-part-{part}.safetensors" for part in range(len(files))]
        return MemoryStore({name: checkpoints.shard(held) for name, held in zip(names, files, strict=True)})

    return make


def shared(shape, dtype=np.float32):
    memory = np.zeros(shape, dtype)
    return {EMBED: memory, HEAD: memory}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("is_split", [True, False])
@pytest.mark.parametrize("chunk_size", [None, 1024])
async def test_two_equal_copies_fill_one_destination(write, weight, strict, is_split, chunk_size):
    files = [{EMBED: weight}, {HEAD: weight}] if is_split else [{EMBED: weight, HEAD: weight}]
    loader = ShardedStateLoader(memory_budget_mb=1, chunk_size=chunk_size)
    state = shared(weight.shape)
    await loader.load_weights(write(*files), state, strict=strict)
    assert np.array_equal(state[EMBED], weight)
    assert loader.last_report.missing == loader.last_report.unexpected == ()
    assert loader.budget.bytes_used == 0


async def test_a_module_with_both_copies_in_its_file_is_loaded(tmp_path):
    from safetensors.torch import save_file

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(6, 4)
            self.head = torch.nn.Linear(4, 6, bias=False)
            self.head.weight = self.embed.weight

    source, target = Model(), Model()
    save_file({name: tensor.clone() for name, tensor in source.state_dict().items()}, tmp_path / "model.safetensors")
    await ShardedStateLoader().load_weights(tmp_path, target.state_dict())
    assert torch.equal(target.head.weight, source.embed.weight)
    assert target.head.weight is target.embed.weight


@pytest.mark.parametrize("order", ["plan", "completion"])
async def test_a_stream_yields_both_copies(write, weight, order):
    state = shared(weight.shape)
    stream = AsyncShardLoader(memory_budget_mb=1, order=order).stream(write({EMBED: weight, HEAD: weight}), state)
    assert {name async for name, tensor in stream if np.array_equal(tensor, weight)} == {EMBED, HEAD}
    assert stream.statistics().bytes_done == 2 * weight.nbytes


@pytest.mark.parametrize("at", [0, 1500, -1])
@pytest.mark.parametrize("is_split", [True, False])
async def test_copies_that_differ_anywhere_are_named(write, weight, at, is_split):
    other = weight.copy()
    other.reshape(-1)[at] += 1
    files = [{EMBED: weight}, {HEAD: other}] if is_split else [{EMBED: weight, HEAD: other}]
    loader = ShardedStateLoader(memory_budget_mb=1, chunk_size=1024)
    with pytest.raises(
        DestinationError, match="are one destination, and their tensors in the checkpoint differ"
    ) as caught:
        await loader.load_weights(write(*files), shared(weight.shape), strict=False)
    assert f"'{EMBED}'" in str(caught.value)
    assert f"'{HEAD}'" in str(caught.value)
    assert caught.value.tensor in (EMBED, HEAD)
    assert caught.value.torn == (caught.value.tensor,)
    assert loader.budget.bytes_used == 0


async def test_a_nan_is_the_same_as_itself_and_a_zero_differs_from_its_negative(write, weight):
    weight[0, 0] = np.nan
    await ShardedStateLoader().load_weights(write({EMBED: weight, HEAD: weight}), shared(weight.shape))
    zeros = np.zeros((2, 2), np.float32)
    with pytest.raises(DestinationError, match="differ"):
        await ShardedStateLoader().load_weights(write({EMBED: zeros, HEAD: -zeros}), shared(zeros.shape))


@pytest.mark.parametrize("dtype", [np.float64, np.float16, ml_dtypes.bfloat16, np.int32])
@pytest.mark.parametrize("chunk_size", [None, 1024])
async def test_converted_copies_are_compared_as_they_are_stored(write, weight, dtype, chunk_size):
    state = shared(weight.shape, dtype)
    loader = ShardedStateLoader(memory_budget_mb=1, chunk_size=chunk_size)
    await loader.load_weights(write({EMBED: weight, HEAD: weight}), state, cast=True)
    assert np.array_equal(state[EMBED], weight.astype(dtype))
    with pytest.raises(DestinationError, match="differ"):
        await loader.load_weights(write({EMBED: weight, HEAD: weight + 1}), state, cast=True)


async def test_second_copies_in_strided_and_larger_destinations_are_compared(write, weight):
    strided = np.zeros((96, 64), np.float32)[::2].T
    larger = np.zeros((80, 48), np.float32)
    for target, filled in ((strided, strided), (larger, larger[:64])):
        state = {EMBED: target, HEAD: target}
        await ShardedStateLoader(chunk_size=1024).load_weights(write({EMBED: weight, HEAD: weight}), state)
        assert np.array_equal(filled, weight)
        with pytest.raises(DestinationError, match="differ"):
            await ShardedStateLoader(chunk_size=1024).load_weights(write({EMBED: weight, HEAD: -weight}), state)


async def test_other_overlaps_are_refused_beside_second_copies(write, weight):
    memory = np.zeros((65, 48), np.float32)
    tensors = {EMBED: weight, HEAD: weight, "other": weight}
    for other in (memory[1:], memory[:64][::-1]):
        with pytest.raises(DestinationError, match="share memory"):
            await ShardedStateLoader().load_weights(
                write(tensors), {EMBED: memory[:64], HEAD: memory[:64], "other": other}
            )
    assert not memory.any()


@pytest.mark.parametrize("other", [np.zeros((48, 64), np.float32), np.zeros((64, 48), np.int32)])
async def test_tensors_that_are_not_alike_are_no_copies(write, weight, other):
    memory = np.zeros(weight.shape, np.float32)
    state = {EMBED: memory, HEAD: memory.reshape(other.shape).view(other.dtype)}
    with pytest.raises(DestinationError, match="share memory"):
        await ShardedStateLoader().load_weights(write({EMBED: weight, HEAD: other}), state)
    assert not memory.any()


async def test_many_groups_of_copies_are_taken(write):
    random = np.random.default_rng(1)
    arrays = [random.random(16, np.float32) for _ in range(200)]
    tensors = {f"{copy}.{number}": array for copy in "abc" for number, array in enumerate(arrays)}
    memories = [np.zeros(16, np.float32) for _ in arrays]
    state = {f"{copy}.{number}": memory for copy in "abc" for number, memory in enumerate(memories)}
    loader = ShardedStateLoader(memory_budget_mb=1)
    await loader.load_weights(write(tensors), state)
    assert all(map(np.array_equal, memories, arrays))
    with pytest.raises(DestinationError, match=r"'a\.7' and 'c\.7' are one destination"):
        await loader.load_weights(write({**tensors, "c.7": arrays[8]}), state)


@pytest.mark.parametrize(("rank", "placement"), [(0, Shard(0)), (1, Shard(0)), (1, Shard(1))])
async def test_slices_are_compared(write, weight, checkpoints, rank, placement):
    plan = {"model.embed_tokens": placement, "lm_head": placement}
    rows = np.split(weight, 2, axis=placement.dim)[rank]
    loader = ShardedStateLoader(rank=rank, world_size=2, tp_plan=plan, chunk_size=1024)
    for other in (weight, -weight):
        store = MemoryStore({"model.safetensors": checkpoints.shard({EMBED: weight, HEAD: other})})
        state = shared(rows.shape)
        if other is weight:
            await loader.load_weights(store, state)
            assert np.array_equal(state[HEAD], rows)
        else:
            with pytest.raises(DestinationError, match="differ"):
                await loader.load_weights(store, state)


# Digests


async def test_equal_digests_spare_the_second_read_and_others_are_told_before_a_byte_is_written(tmp_path, weight):
    await save_sharded_state({EMBED: weight, HEAD: weight.copy()}, tmp_path, rank=0, digests=True)
    state = shared(weight.shape)
    statistics = await AsyncShardLoader().stream(tmp_path, state).drain()
    assert statistics.bytes_total == weight.nbytes
    assert np.array_equal(state[HEAD], weight)
    state[HEAD][:] = 0
    await save_sharded_state({EMBED: weight, HEAD: -weight}, tmp_path, rank=0, digests=True)
    with pytest.raises(DestinationError, match=r"differ: .*Nothing was written"):
        await AsyncShardLoader().stream(tmp_path, state).drain()
    assert not state[HEAD].any()


async def test_malformed_digests_count_as_no_digests(checkpoints, weight):
    data = checkpoints.shard({EMBED: weight, HEAD: weight}, metadata={"asyncshard.xxh3_128": "no digests"})
    state = shared(weight.shape)
    statistics = await AsyncShardLoader().stream(MemoryStore({"model.safetensors": data}), state).drain()
    assert statistics.bytes_total == 2 * weight.nbytes


# Refresh


@pytest.mark.parametrize("stage", [True, False])
@pytest.mark.parametrize("digests", [True, False])
@pytest.mark.parametrize("is_split", [True, False])
async def test_a_refresh_takes_either_copy(tmp_path, weight, stage, digests, is_split):
    size = weight.nbytes if is_split else None

    async def save(embed, head):
        await save_sharded_state({EMBED: embed, HEAD: head}, tmp_path, rank=0, digests=digests, max_shard_size=size)

    await save(weight, weight.copy())
    state = shared(weight.shape)
    loader = ShardedStateLoader(memory_budget_mb=1)
    await loader.load_weights(tmp_path, state)
    version = loader.last_report.version
    await save(weight + 1, weight + 1)
    update = await loader.prepare_refresh(tmp_path, state, since=version, stage=stage)
    await update.apply()
    await update.aclose()
    assert np.array_equal(state[HEAD], weight + 1)
    await save(weight + 2, weight + 3)
    with pytest.raises(DestinationError, match="differ"):
        await loader.prepare_refresh(tmp_path, state, since=update.version, stage=stage)
    if stage:
        assert np.array_equal(state[HEAD], weight + 1)
    del update
    assert loader.budget.bytes_used == 0


@pytest.mark.parametrize("stage", [True, False])
@pytest.mark.parametrize("changed", [EMBED, HEAD])
async def test_an_unchanged_copy_is_read_if_the_other_one_has_changed(write, weight, stage, changed):
    store = write({EMBED: weight}, {HEAD: weight})
    state = shared(weight.shape)
    loader = ShardedStateLoader(memory_budget_mb=1)
    await loader.load_weights(store, state)
    later = write({EMBED: -weight if changed == EMBED else weight}, {HEAD: -weight if changed == HEAD else weight})
    with pytest.raises(DestinationError, match="differ"):
        await loader.prepare_refresh(later, state, since=loader.last_report.version, stage=stage)
    async with await loader.prepare_refresh(store, state, stage=stage) as update:
        assert set(update.changed) == {EMBED, HEAD}
    assert loader.budget.bytes_used == 0


# Failures and cancellation


async def test_a_second_copy_that_was_read_first_waits_for_the_first_copy(write, weight):
    store = GatedStore(write({EMBED: weight}, {HEAD: weight}))
    state = shared(weight.shape)
    loader = AsyncShardLoader(memory_budget_mb=1)
    load = asyncio.ensure_future(loader.stream(store, state).drain())
    first, second = await store.waiting(2)
    second.open()
    for _ in range(20):
        await asyncio.sleep(0)
    assert not load.done()
    assert not state[EMBED].any()
    first.open()
    assert (await load).tensors_done == 2
    assert np.array_equal(state[HEAD], weight)


@pytest.mark.parametrize("number", [0, 1])
async def test_a_read_that_fails_ends_the_wait(write, weight, number):
    store = FaultyStore(write({EMBED: weight}, {HEAD: weight}), {number: Fault(error=StoreError("broken"))})
    loader = AsyncShardLoader(memory_budget_mb=1)
    state = shared(weight.shape)
    with pytest.raises(StoreError, match="broken"):
        await loader.stream(store, state).drain()
    assert loader.budget.bytes_used == 0


async def test_a_cancelled_load_leaves_nothing_and_the_next_one_is_right(write, weight):
    store = GatedStore(write({EMBED: weight}, {HEAD: weight}))
    state = shared(weight.shape)
    loader = AsyncShardLoader(memory_budget_mb=1)
    load = asyncio.ensure_future(loader.stream(store, state).drain())
    _, second = await store.waiting(2)
    second.open()
    for _ in range(20):
        await asyncio.sleep(0)
    load.cancel()
    with pytest.raises(asyncio.CancelledError):
        await load
    assert loader.budget.bytes_used == 0
    store.open_all()
    await loader.stream(store, state).drain()
    assert np.array_equal(state[HEAD], weight)


# What is said where a destination does not fit


@pytest.mark.parametrize(
    ("target", "reason"), [(np.zeros((64, 48), np.int8), "dtype"), (np.zeros((64, 40), np.float32), "shape")]
)
async def test_a_name_in_memory_that_does_not_fit_is_not_called_missing(write, weight, target, reason):
    with pytest.raises(DestinationError, match=rf"'{EMBED}' has {reason}"):
        await ShardedStateLoader().load_weights(write({EMBED: weight}), {EMBED: target, HEAD: target})
    with pytest.raises(NamesError, match=rf"'{EMBED}' has {reason}") as caught:
        await ShardedStateLoader().load_weights(
            write({EMBED: weight}), {EMBED: target, HEAD: target, "norm": np.zeros(3, np.float32)}
        )
    assert caught.value.missing == ("norm",)


# Where destinations meet


MEMORY = np.zeros(64, np.uint32)
VIEWS = st.tuples(st.integers(0, 20), st.integers(1, 12), st.sampled_from([1, 1, 1, 2, 3]))


def view(start, size, step):
    return MEMORY[start : start + size * step : step]


def covering(views):
    covered = CoveredMemory()
    for number, each in enumerate(views):
        covered.add((number, 7), *span(each), each)
    covered.sort()
    return covered


@given(st.lists(VIEWS, max_size=8))
def test_every_overlap_is_found_and_the_first_of_the_same_memory_stands_for_it(shapes):
    views = [view(*shape) for shape in shapes]
    # A view of one element is contiguous, whatever its step.
    same = [(start, size, step if size > 1 else 1) for start, size, step in shapes]
    overlaps = list(covering(views).overlaps(lambda one, other: True))
    meeting = {
        number
        for number in range(len(views))
        for other in range(len(views))
        if other != number and np.shares_memory(views[number], views[other])
    }
    assert bool(overlaps) == bool(meeting)
    for (first, _), (second, _), is_exact in overlaps:
        assert np.shares_memory(views[first], views[second])
        if is_exact:
            assert same[first] == same[second]
            assert first == same.index(same[first]) < second
    exact = {second for _, (second, _), is_exact in overlaps if is_exact}
    others = any(not is_exact for *_, is_exact in overlaps)
    twice = {number for number, each in enumerate(same) if each in same[:number]}
    assert others or exact == twice


def test_tensors_that_are_not_alike_are_not_the_same():
    ((first, second, is_exact),) = covering([view(0, 4, 1), view(0, 4, 1)]).overlaps(lambda one, other: False)
    assert (first, second, is_exact) == ((0, 7), (1, 7), False)


@pytest.mark.parametrize(("start", "stop", "is_inside"), [(2, 6, True), (0, 8, True), (0, 9, False), (30, 31, False)])
def test_a_contiguous_destination_covers_what_lies_inside(start, stop, is_inside):
    low, high = span(MEMORY[start:stop])
    assert covering([MEMORY[:8]]).has_inside(low, high) is is_inside


def test_no_destinations_cover_no_address():
    covered = covering([])
    assert list(covered.overlaps(lambda one, other: True)) == []
    assert not covered.has_inside(0, 1)
