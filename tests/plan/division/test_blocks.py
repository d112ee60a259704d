"""Blocks, and what ranks have of them: against plain Python."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from asyncshard.plan.division import blocks
from asyncshard.plan.division.blocks import TensorMap, cut_blocks
from asyncshard.plan.division.divisions import divide
from asyncshard.plan.division.placements import PackedShard, Replicate, Shard


@st.composite
def sides(draw: st.DrawFn) -> tuple[TensorMap, np.ndarray[Any, np.dtype[np.int64]]]:
    """Tensors of a few divisions, each rank's in one file one after the other, with gaps."""
    world_size = draw(st.sampled_from([1, 2, 4]))
    placements = [Replicate(), Shard(0), Shard(1), Shard(1, pieces=2 if world_size > 1 else 1), PackedShard(1, (3, 5))]
    shapes = [(4, 8), (3, 8), (0, 8), (200, 8)]
    divisions = [
        divide("t", draw(st.sampled_from(shapes)), 8, draw(st.sampled_from(placements)), world_size) for _ in range(3)
    ]
    division_of = np.array(draw(st.lists(st.integers(0, 2), min_size=1, max_size=9)), np.int32)
    whole = [sum(division.slices[rank].nbytes for rank in division.first_ranks) for division in divisions]
    starts = np.zeros((world_size, len(division_of)), np.int64)
    for rank in range(world_size):
        start = 0
        for tensor, number in enumerate(division_of):
            start += draw(st.integers(0, 1))
            starts[rank, tensor] = start
            start += divisions[number].slices[rank].nbytes
    files = np.repeat(np.arange(world_size)[:, None], len(division_of), axis=1)
    return TensorMap(divisions, division_of, files, starts), np.array(whole, np.int64)[division_of]


@given(given=sides(), limit=st.integers(1, 5000), is_read=st.booleans())
def test_rank_runs_bring_each_byte_of_a_rank_to_its_offset(given: Any, limit: int, is_read: bool) -> None:
    side, sizes = given
    most_runs = side.most_runs()
    tensors = [np.arange(size, dtype=np.int64) + 10000 * number for number, size in enumerate(sizes.tolist())]
    got = [np.full(100_000, -1, np.int64) for _ in range(side.world_size)]
    read: list[int] = []
    for block in cut_blocks(sizes, most_runs, limit):
        assert 0 < block.nbytes <= limit
        memory = np.concatenate(tensors[block.first : block.last])[block.start : block.stop]
        assert len(memory) == block.nbytes
        for rank in range(side.world_size):
            runs = side.rank_runs(block, sizes, rank, is_read=is_read)
            assert runs.nbytes == runs.lengths.sum()
            for extent in runs.extents:
                place = extent.start
                assert extent.file == rank
                for run in range(extent.first, extent.last):
                    offset, length = int(runs.offsets[run]), int(runs.lengths[run])
                    got[rank][place : place + length] = memory[offset : offset + length]
                    read += memory[offset : offset + length].tolist()
                    place += length
            places = [(extent.file, extent.start) for extent in runs.extents]
            assert places == sorted(places)
    if is_read:
        assert sorted(read) == sorted(np.concatenate(tensors).tolist())  # each byte once
        return
    for rank in range(side.world_size):
        expected = np.full(100_000, -1, np.int64)
        for tensor, values in enumerate(tensors):
            piece = side.divisions[side.division_of[tensor]].slices[rank]
            place = int(side.starts[rank, tensor])
            for row in range(piece.outer):
                for offset, length in piece.runs:
                    at = row * piece.stride + offset
                    expected[place : place + length] = values[at : at + length]
                    place += length
        np.testing.assert_array_equal(got[rank], expected)


def test_tensors_of_many_runs_are_cut_so_that_a_block_has_few() -> None:
    division = divide("t", (1 << 20, 4), 16, Shard(1), 4)
    sizes = np.array([8 << 20], np.int64)
    side = TensorMap([division], np.zeros(1, np.int32), np.zeros((4, 1), np.int64), np.zeros((4, 1), np.int64))
    cut = list(cut_blocks(sizes, side.most_runs(), 8 << 20))
    assert sum(block.nbytes for block in cut) == 8 << 20
    for block in cut:
        assert len(side.rank_runs(block, sizes, 3, is_read=False).lengths) <= blocks.MAX_RUNS


def test_long_runs_are_moved_one_by_one_and_short_ones_together() -> None:
    for columns, is_direct in ((1 << 18, True), (64, False)):
        division = divide("t", (4, columns), 8, Shard(1), 2)
        sizes = np.array([4 * columns], np.int64)
        side = TensorMap([division], np.zeros(1, np.int32), np.zeros((2, 1), np.int64), np.zeros((2, 1), np.int64))
        (block,) = cut_blocks(sizes, side.most_runs(), 1 << 30)
        runs = side.rank_runs(block, sizes, 1, is_read=True)
        assert runs.is_direct == is_direct
        assert len(runs.extents) == 1
