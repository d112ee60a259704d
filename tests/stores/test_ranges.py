"""Byte ranges read through a store that reads one: which reads are made, and into which memory."""

import numpy as np
import pytest

from asyncshard.stores.ranges import Scratch, read_ranges
from asyncshard.tasks.threads import DaemonThreads

DATA = bytes(np.random.default_rng(0).integers(0, 256, 2_000_000, np.uint8))


async def read(ranges, buffers, **options):
    """Return the reads that are made: where each begins, and the sizes of its buffers."""
    made = []

    async def read_into(start, memory):
        made.append((start, [len(view) for view in memory]))
        for view in memory:
            view[:] = DATA[start : start + len(view)]
            start += len(view)

    offsets, lengths = (np.array(column, np.int64) for column in zip(*ranges, strict=True))
    threads = DaemonThreads(1, "gather")
    try:
        await read_ranges(read_into, offsets, lengths, buffers, scratch=Scratch(threads, 1 << 20, 2), **options)
    finally:
        await threads.aclose()
    return sorted(made)


@pytest.mark.parametrize(
    ("ranges", "expected"),
    [
        ([(5, 10), (20, 10), (500, 10)], [(5, [25]), (500, [10])]),  # short ones by way of the scratch
        ([(0, 100_000), (100_050, 80_000)], [(0, [100_000, 50, 80_000])]),  # long ones straight into place
        ([(0, 300_000), (300_000, 10), (300_030, 5)], [(0, [300_000, 10, 20, 5])]),
        ([(0, 600_000), (600_010, 600_000)], [(0, [600_000]), (600_010, [600_000])]),  # over the limit together
    ],
)
async def test_ranges_near_each_other_are_one_read(ranges, expected):
    total = sum(nbytes for _, nbytes in ranges)
    memory = bytearray(total)
    assert await read(ranges, [memoryview(memory)], max_gap=50) == expected
    assert memory == b"".join(DATA[start : start + nbytes] for start, nbytes in ranges)


async def test_a_long_range_fills_several_buffers_in_one_read():
    memory = bytearray(180_000)
    buffers = [memoryview(memory)[:30_000], memoryview(memory)[30_000:110_000], memoryview(memory)[110_000:]]
    made = await read([(7, 100_000), (100_057, 80_000)], buffers, max_gap=50)
    assert made == [(7, [30_000, 70_000, 50, 10_000, 70_000])]
    assert memory == DATA[7:100_007] + DATA[100_057:180_057]
