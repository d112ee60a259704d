"""Divisions of tensors among ranks, and placements for worlds of other sizes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncshard.errors import CheckpointError
from asyncshard.plan.division.divisions import divide, fitted, whole_shape
from asyncshard.plan.division.placements import PackedShard, Placement, Replicate, Shard

PLACEMENTS = st.sampled_from(
    [Replicate(), Shard(0), Shard(1), Shard(-1), Shard(0, pieces=2), PackedShard(1, (3, 5)), PackedShard(-2, (1, 4))]
)


@given(PLACEMENTS, st.sampled_from([2, 4, 6]))
def test_the_first_ranks_have_every_byte_of_a_tensor_once(placement: Placement, world_size: int) -> None:
    division = divide("t", (5, 8), 16, placement, world_size)
    seen = np.zeros(5 * 8 * 2, np.int64)
    for rank in division.first_ranks:
        runs = division.slices[rank].within_whole(0, len(seen))
        for start, length in zip(runs.whole.tolist(), runs.lengths.tolist(), strict=True):
            seen[start : start + length] += 1
    assert seen.tolist() == [1] * len(seen)


@given(PLACEMENTS, st.sampled_from([2, 4, 6]))
def test_a_rank_that_is_not_first_has_the_slice_of_the_rank_below(placement: Placement, world_size: int) -> None:
    division = divide("t", (5, 8), 16, placement, world_size)
    assert len(division.slices) == world_size
    assert 0 in division.first_ranks
    for rank in set(range(world_size)) - division.first_ranks:
        assert division.slices[rank] == division.slices[rank - 1]


def test_a_replicated_tensor_is_read_from_the_first_rank() -> None:
    division = divide("t", (5, 8), 8, Replicate(), 3)
    assert division.first_ranks == {0}
    assert {piece.shape for piece in division.slices} == {(5, 8)}


def test_the_most_runs_are_those_of_the_rank_with_the_most() -> None:
    assert divide("t", (5, 8), 8, Replicate(), 2).most_runs == 1
    assert divide("t", (5, 8), 8, Shard(1), 2).most_runs == 5
    assert divide("t", (5, 8), 8, PackedShard(1, (4, 4)), 2).most_runs == 10
    assert divide("t", (3, 8), 8, Shard(0), 8).most_runs == 1


def test_a_tensor_that_its_placement_cannot_divide_is_named() -> None:
    with pytest.raises(CheckpointError, match="there is no such dimension") as caught:
        divide("t", (5,), 8, Shard(1), 2)
    assert caught.value.tensor == "t"


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
