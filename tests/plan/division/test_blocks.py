"""Blocks, and what ranks have of them: against plain Python."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncshard.errors import CheckpointError
from asyncshard.plan.division import blocks
from asyncshard.plan.division.blocks import TensorMap, cut_blocks
from asyncshard.plan.division.divisions import divide, fitted, whole_shape
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
    which = np.array(draw(st.lists(st.integers(0, 2), min_size=1, max_size=9)), np.int32)
    whole = [sum(division.slices[rank].nbytes for rank in division.first_ranks) for division in divisions]
    starts = np.zeros((world_size, len(which)), np.int64)
    for rank in range(world_size):
        place = 0
        for tensor, number in enumerate(which):
            place += draw(st.integers(0, 1))
            starts[rank, tensor] = place
            place += divisions[number].slices[rank].nbytes
    files = np.repeat(np.arange(world_size)[:, None], len(which), axis=1)
    return TensorMap(divisions, which, files, starts), np.array(whole, np.int64)[which]


@given(given=sides(), limit=st.integers(1, 5000), is_read=st.booleans())
def test_moves_bring_each_byte_of_a_rank_to_its_place(given: Any, limit: int, is_read: bool) -> None:
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
            moves = side.rank_runs(block, sizes, rank, is_read=is_read)
            assert moves.nbytes == moves.lengths.sum()
            for extent in moves.extents:
                place = extent.start
                assert extent.file == rank
                for run in range(extent.first, extent.last):
                    offset, length = int(moves.offsets[run]), int(moves.lengths[run])
                    got[rank][place : place + length] = memory[offset : offset + length]
                    read += memory[offset : offset + length].tolist()
                    place += length
            places = [(extent.file, extent.start) for extent in moves.extents]
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
        moves = side.rank_runs(block, sizes, 1, is_read=True)
        assert moves.is_direct == is_direct
        assert len(moves.extents) == 1


def test_placements_fit_worlds_of_other_sizes() -> None:
    assert fitted(Shard(0, pieces=4), 8) == Shard(0, pieces=4)
    assert fitted(Shard(0, pieces=4), 2) == Shard(0)
    assert fitted(Shard(0), 3) == Shard(0)
    assert fitted(Replicate(), 3) == Replicate()
    with pytest.raises(ValueError, match="4 pieces cannot be shared out among 3 ranks"):
        fitted(Shard(0, pieces=4), 3)


def test_whole_shapes_are_added_up_from_pieces() -> None:
    assert whole_shape("t", ((3, 2), (3, 2), (1, 2)), Shard(0)) == (7, 2)
    assert whole_shape("t", ((3, 2), (3, 2), (4, 2), (4, 2)), Shard(-2, pieces=2)) == (7, 2)
    assert whole_shape("t", ((3, 2), (3, 2)), PackedShard(1, (2, 2))) == (3, 4)
    assert whole_shape("t", ((3,), (3,)), Replicate()) == (3,)
    with pytest.raises(CheckpointError, match="no dimension 1"):
        whole_shape("t", ((3,), (3,)), Shard(1))
