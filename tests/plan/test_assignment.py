import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncshard import _core
from asyncshard.plan.assignment import compute_shard_assignment


def assign_by_scanning(sizes, num_ranks):
    loads = [0] * num_ranks
    ranks = [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda index: (-sizes[index], index)):
        rank = loads.index(min(loads))
        ranks[index] = rank
        loads[rank] += sizes[index]
    return ranks


@given(st.lists(st.integers(0, 5) | st.integers(0, 10**6) | st.integers(0, 2**55), max_size=60), st.integers(1, 70))
def test_same_as_a_scan_for_the_least_loaded_rank(sizes, num_ranks):
    assert compute_shard_assignment(len(sizes), num_ranks, sizes) == assign_by_scanning(sizes, num_ranks)


def test_ties_go_to_the_lower_index_and_the_lower_rank():
    assert compute_shard_assignment(5, 3, [7, 7, 7, 7, 9]) == [1, 2, 1, 2, 0]
    assert compute_shard_assignment(3, 2, [0, 0, 0]) == [0, 0, 0]


def test_one_size_near_the_limit_sorts_right():
    sizes = [1, 2**63 - 4, 2]
    assert compute_shard_assignment(3, 2, sizes) == assign_by_scanning(sizes, 2)


def test_no_parameters_and_more_ranks_than_parameters():
    assert compute_shard_assignment(0, 4, []) == []
    assert compute_shard_assignment(0, 4, np.empty(0, np.int64)) == []
    assert compute_shard_assignment(2, 10**30, [1, 2]) == [1, 0]


@pytest.mark.parametrize(
    "sizes",
    [
        (3, 1, 2),
        range(1, 4),
        [np.int64(3), 1, np.uint8(2)],
        np.array([3, 1, 2], np.uint64),
        np.array([3, 1, 2], np.int8),
        np.array([3, 0, 1, 0, 2, 0], ">i4")[::2],
    ],
)
def test_every_kind_of_integers_is_taken(sizes):
    assert compute_shard_assignment(3, 2, sizes) == assign_by_scanning([int(size) for size in sizes], 2)


def test_the_caller_array_is_left_alone():
    sizes = np.array([1, 5, 3])
    sizes.flags.writeable = False
    assert compute_shard_assignment(3, 2, sizes) == [1, 0, 1]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((2, 1, [1]), "has 1 entries, num_params is 2"),
        ((1, 1, [1, 2]), "has 2 entries, num_params is 1"),
        ((-1, 1, []), "num_params must be at least 0"),
        ((1, 0, [1]), "num_ranks must be at least 1"),
        ((1, 1.0, [1]), "num_ranks must be a whole number"),
        (("1", 1, [1]), "num_params must be a whole number"),
        ((True, 1, [1]), "num_params must be a whole number"),
        ((2, 1, [1, -2]), "parameter 1 is negative: -2"),
        ((2, 1, np.array([1, -2])), "parameter 1 is negative"),
        ((2, 1, [1, 2.0]), "found a float"),
        ((2, 1, [1, True]), "found a bool"),
        ((2, 1, [1, "2"]), "found a str"),
        ((2, 1, [1, None]), "found a NoneType"),
        ((2, 1, [[1], [2]]), "found a list"),
        ((2, 1, "12"), "found a str"),
        ((2, 1, np.array([1.0, 2.0])), "one row of integers"),
        ((2, 1, np.array([True, False])), "one row of integers"),
        ((1, 1, np.array([[1, 2]])), "one row of integers"),
        ((1, 1, [2**63]), "beyond 63 bits"),
        ((1, 1, [-(2**70)]), "beyond 63 bits"),
        ((1, 1, np.array([2**63], np.uint64)), "above 2**63 - 1"),
        ((2, 2, [2**62, 2**62]), "add up to more than 2**63 - 1"),
    ],
)
def test_bad_arguments_are_value_errors(arguments, complaint):
    with pytest.raises(ValueError) as caught:
        compute_shard_assignment(*arguments)
    assert complaint in str(caught.value)


def test_sizes_may_add_up_to_the_limit():
    assert compute_shard_assignment(2, 2, [2**62, 2**62 - 1]) == [0, 1]


def test_kernel_leaves_out_untouched_when_it_refuses():
    out = np.full(2, 7)
    for sizes, num_ranks in (([1, -1], 1), ([1, 1], 0), ([2**62, 2**62], 1)):
        with pytest.raises(ValueError):
            _core.assign_shards(np.array(sizes), num_ranks, out)
    with pytest.raises(ValueError):
        _core.assign_shards(np.array([1]), 1, out)
    assert out.tolist() == [7, 7]


@pytest.mark.parametrize("seed", range(3))
def test_a_million_random_sizes_over_1024_ranks_balance_within_one_percent(seed):
    sizes = np.random.default_rng(seed).integers(0, 10**9, 1_000_000)
    start = time.perf_counter()
    ranks = compute_shard_assignment(len(sizes), 1024, sizes)
    assert time.perf_counter() - start < 5  # takes about 0.15 s; a quadratic one takes minutes
    loads = np.bincount(ranks, weights=sizes, minlength=1024)
    assert loads.max() <= 1.01 * loads.mean()
