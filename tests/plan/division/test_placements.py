"""Placements: values that take whole numbers alone."""

import pickle

import numpy as np
import pytest

from asyncshard.plan.division.placements import PackedShard, Replicate, Shard


@pytest.mark.parametrize("arguments", [(1.5,), (True,), ("0",), (0, 0), (0, -1), (0, 2.0), (None,)])
def test_a_shard_takes_whole_numbers_alone(arguments):
    with pytest.raises(ValueError):
        Shard(*arguments)


@pytest.mark.parametrize("arguments", [(0, ()), (0, (1, -1)), (0, (1.5,)), (False, (1,))])
def test_a_packed_shard_takes_at_least_one_size_and_whole_numbers_alone(arguments):
    with pytest.raises(ValueError):
        PackedShard(*arguments)


def test_placements_are_values():
    for placement in (Shard(-2), Shard(0, 4), Replicate(), PackedShard(0, (3, 1))):
        assert pickle.loads(pickle.dumps(placement)) == placement
        assert hash(pickle.loads(pickle.dumps(placement))) == hash(placement)
    assert PackedShard(0, [3, 1]) == PackedShard(0, (3, 1))
    assert Shard(np.int64(1)) == Shard(1)


@pytest.mark.parametrize("placement", [Shard(0), PackedShard(0, (1,))])
def test_a_placement_cannot_be_changed(placement):
    with pytest.raises(AttributeError):
        placement.dim = 1


def test_placements_of_other_kinds_or_numbers_differ():
    assert len({Shard(0), Shard(1), Shard(0, 2), Replicate(), PackedShard(0, (2,)), PackedShard(0, (1, 1))}) == 6
