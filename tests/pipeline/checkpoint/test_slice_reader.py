"""A reader of slices gives the bytes that NumPy cuts out of the whole tensors."""

import itertools

import numpy as np
import pytest

from asyncshard.pipeline.checkpoint import slice_reader
from asyncshard.pipeline.checkpoint.checkpoint import Selection
from asyncshard.pipeline.checkpoint.opened_file import FileReader
from asyncshard.pipeline.checkpoint.slice_reader import SliceReader
from asyncshard.pipeline.checkpoint.slicing import slice_shard
from asyncshard.plan.division.placements import Shard
from asyncshard.plan.tp.plan import TpPlan
from asyncshard.stores.ranges import Scratch

TENSORS = {
    "columns": np.arange(60, dtype="<i2").reshape(6, 10),
    "rows": np.arange(24, dtype="<i4").reshape(4, 6),
    "whole": np.arange(7, dtype="u1"),
}
PLAN = TpPlan({"columns": Shard(1), "rows": Shard(0)})


def expected(rank):
    """Return the bytes of a rank's slice: its half of the first two tensors, and the third one."""
    columns, rows, whole = TENSORS.values()
    halves = (columns[:, 5 * rank : 5 * rank + 5], rows[2 * rank : 2 * rank + 2], whole)
    return b"".join(half.tobytes() for half in halves)


@pytest.fixture
async def opened(open_file):
    return await open_file(TENSORS)


def sliced(file, rank):
    return slice_shard(file, Selection(rank=rank, world_size=2), PLAN)


async def read(reader, file, start, stop, *, cuts=()):
    """Read bytes of a file's data into buffers that end at `cuts`."""
    memory = bytearray(stop - start)
    bounds = [0, *cuts, stop - start]
    views = [memoryview(memory)[begin:end] for begin, end in itertools.pairwise(bounds)]
    await reader.read_into(file, file.header.size + start, views)
    return bytes(memory)


@pytest.mark.parametrize("rank", [0, 1])
async def test_every_byte_range_of_a_slice_is_that_of_the_rank_s_tensors(opened, threads, rank):
    store, file = opened
    reader, part = SliceReader(store, threads, Scratch(threads)), sliced(file, rank)
    data = expected(rank)
    assert part.data_bytes == len(data)
    for start in range(0, len(data), 13):
        for stop in range(start + 1, len(data) + 1, 7):
            assert await read(reader, part, start, stop) == data[start:stop]


async def test_buffers_may_end_anywhere(opened, threads):
    store, file = opened
    reader, part = SliceReader(store, threads, Scratch(threads)), sliced(file, 1)
    data = expected(1)
    assert await read(reader, part, 0, len(data), cuts=(1, 1, 12, 50)) == data


async def test_long_lists_of_ranges_are_made_in_portions_by_a_thread(opened, threads, monkeypatch):
    monkeypatch.setattr(slice_reader, "_MAX_RANGES", 3)
    monkeypatch.setattr(slice_reader, "_FEW_RANGES", 1)
    store, file = opened
    part, data = sliced(file, 0), expected(0)
    assert await read(SliceReader(store, threads, Scratch(threads)), part, 0, len(data)) == data


async def test_a_file_without_a_slice_is_read_as_it_is(opened, threads):
    store, file = opened
    reader = SliceReader(store, threads, Scratch(threads))
    whole = b"".join(tensor.tobytes() for tensor in TENSORS.values())
    assert await read(reader, file, 3, 50) == whole[3:50]
    assert reader.fingerprint(file) == FileReader(store).fingerprint(file)


async def test_slices_of_one_file_have_fingerprints_of_their_own(opened, threads):
    store, file = opened
    reader = SliceReader(store, threads, Scratch(threads))
    prints = [reader.fingerprint(each) for each in (file, sliced(file, 0), sliced(file, 1))]
    assert len(set(prints)) == 3
    assert reader.fingerprint(sliced(file, 0)) == prints[1]


async def test_a_replaced_file_has_no_fingerprint_and_neither_has_its_slice(opened, threads):
    store, file = opened
    store.replace(file.meta.name, b"other")
    assert SliceReader(store, threads, Scratch(threads)).fingerprint(sliced(file, 0)) is None
