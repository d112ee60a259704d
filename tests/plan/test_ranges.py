"""`merge_ranges`, against the rule in plain Python."""

import itertools
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncshard.plan.ranges import merge_ranges

GAPS_AND_LENGTHS = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=40)


def ranges_of(gaps_and_lengths):
    ends = np.cumsum([gap + length for gap, length in gaps_and_lengths], dtype=np.int64)
    lengths = np.array([length for _, length in gaps_and_lengths], np.int64)
    return ends - lengths, lengths


def merged(gaps_and_lengths, max_gap, max_bytes, max_count=sys.maxsize):
    bounds = merge_ranges(*ranges_of(gaps_and_lengths), max_gap=max_gap, max_bytes=max_bytes, max_count=max_count)
    return bounds.tolist()


def by_the_rule(gaps_and_lengths, max_gap, max_bytes, max_count):
    bounds, begin, end, at = [0], None, None, 0
    for index, (gap, length) in enumerate(gaps_and_lengths):
        at += gap
        is_full = begin is not None and (at + length - begin > max_bytes or index - bounds[-1] == max_count)
        if end is not None and (is_full or at - end > max_gap):
            bounds.append(index)
            begin = None
        begin = at if begin is None else begin
        at = end = at + length
    return [*bounds, len(gaps_and_lengths)] if gaps_and_lengths else bounds


@given(GAPS_AND_LENGTHS, st.integers(0, 12), st.integers(1, 60), st.integers(1, 8))
def test_each_group_takes_as_many_ranges_as_the_limits_allow(gaps_and_lengths, max_gap, max_bytes, max_count):
    expected = by_the_rule(gaps_and_lengths, max_gap, max_bytes, max_count)
    assert merged(gaps_and_lengths, max_gap, max_bytes, max_count) == expected


@given(GAPS_AND_LENGTHS, st.integers(0, 12))
def test_without_limits_only_gaps_divide_ranges(gaps_and_lengths, max_gap):
    expected = by_the_rule(gaps_and_lengths, max_gap, sys.maxsize, sys.maxsize)
    assert merged(gaps_and_lengths, max_gap, sys.maxsize) == expected


def test_a_gap_of_the_limit_is_read_and_a_longer_one_is_not():
    assert merged([(5, 10), (4, 10), (5, 10)], 4, 100) == [0, 2, 3]


def test_a_range_above_the_limit_is_alone():
    assert merged([(0, 10), (0, 200), (0, 10), (0, 10)], 0, 100) == [0, 1, 2, 4]


def test_no_ranges_make_no_groups():
    assert merged([], 0, 1) == [0]


@pytest.mark.parametrize("max_count", [3, sys.maxsize])
def test_limits_and_offsets_may_be_as_large_as_integers_get(max_count):
    offsets = np.array([0, 1, 2, 3, 2**62, 2**63 - 2], np.int64)
    bounds = merge_ranges(
        offsets, np.ones(6, np.int64), max_gap=sys.maxsize, max_bytes=sys.maxsize, max_count=max_count
    )
    assert bounds.tolist() == ([0, 3, 6] if max_count == 3 else [0, 6])


def test_ranges_far_apart_are_found_without_a_look_at_each():
    class Counting(np.ndarray):
        looks = 0

        def __getitem__(self, key):
            Counting.looks += 1
            return super().__getitem__(key)

    offsets = (np.arange(10_000, dtype=np.int64) * 100).view(Counting)
    bounds = merge_ranges(offsets, np.full(10_000, 10), max_gap=5, max_bytes=5, max_count=1)
    assert bounds.tolist() == list(range(10_001))
    assert Counting.looks < 10


def test_groups_cover_all_ranges_in_order():
    bounds = merged([(0, 3)] * 100, 0, 10)
    assert (bounds[0], bounds[-1]) == (0, 100)
    assert {last - first for first, last in itertools.pairwise(bounds)} == {3, 1}
