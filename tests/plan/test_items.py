import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from asyncshard.plan.items import GRAIN, ReadItem, placed_tensors, whole_tensors

SIZES = st.lists(st.one_of(st.just(0), st.integers(1, 50), st.integers(1, 2000)), max_size=40)


def ranges(sizes, begin):
    stops = np.cumsum(np.array(sizes, np.int64), dtype=np.int64) + begin
    return stops - np.array(sizes, np.int64), stops


@given(SIZES, st.integers(0, 1000), st.integers(1, 500), st.integers(1, 6))
def test_whole_tensors_covers_each_tensor_once_in_order_within_the_limits(sizes, begin, limit, most):
    starts, stops = ranges(sizes, begin)
    items = list(whole_tensors(3, starts, stops, limit=limit, max_tensors=most))
    assert [index for item in items for index in range(item.first, item.last)] == list(range(len(sizes)))
    for item in items:
        assert (item.shard, item.start, item.stop) == (3, starts[item.first], stops[item.last - 1])
        assert item.nbytes <= limit or item.last - item.first == 1
        assert item.last - item.first <= most
    # As many in an item as fit.
    for item, following in itertools.pairwise(items):
        assert stops[following.first] - item.start > limit or item.last - item.first == most


@given(SIZES, st.integers(0, 1000), st.integers(GRAIN, 500), st.integers(1, 6), st.data())
def test_placed_tensors_covers_each_wanted_byte_once_in_order_within_the_limits(sizes, begin, limit, most, data):
    starts, stops = ranges(sizes, begin)
    flags = st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes))
    wanted, alone = (np.array(data.draw(flags), np.bool_) for _ in range(2))
    items = list(
        placed_tensors(1, starts, stops, is_wanted=wanted, is_alone=alone, limit=limit, max_tensors=most, max_gap=0)
    )
    covered = [(item.start, item.stop) for item in items if item.nbytes]
    assert all(one[1] <= other[0] for one, other in itertools.pairwise(covered))
    reads = np.concatenate([np.arange(*part) for part in covered] or [np.zeros(0, int)])
    expected = [np.arange(starts[index], stops[index]) for index in np.flatnonzero(wanted)]
    assert np.array_equal(reads, np.concatenate(expected or [np.zeros(0, int)]))
    touched = []
    for item in items:
        assert item.shard == 1
        assert item.nbytes <= limit
        assert 1 <= item.last - item.first <= most
        if item.last - item.first > 1:
            assert wanted[item.first : item.last].all()
            assert not alone[item.first : item.last].any()
            assert (item.start, item.stop) == (starts[item.first], stops[item.last - 1])
        else:
            assert (item.start - starts[item.first]) % GRAIN == 0
            assert starts[item.first] <= item.start <= item.stop <= stops[item.first]
        touched += range(item.first, item.last)
    # Empty tensors have an item too: each wanted one is delivered.
    assert sorted(set(touched)) == np.flatnonzero(wanted).tolist()
    assert touched == sorted(touched)
    assert len(items) == len(set(items))


def test_a_large_tensor_is_split_into_parts_of_whole_grains():
    starts, stops = ranges([1000], 8)
    flags = {"is_wanted": np.ones(1, np.bool_), "is_alone": np.zeros(1, np.bool_)}
    items = list(placed_tensors(0, starts, stops, limit=300, max_tensors=9, max_gap=0, **flags))
    assert items == [ReadItem(0, 8 + at, min(8 + at + 256, 1008), 0, 1) for at in range(0, 1000, 256)]


def test_no_tensors_make_no_items():
    none, flags = np.zeros(0, np.int64), np.zeros(0, np.bool_)
    assert list(whole_tensors(0, none, none, limit=1, max_tensors=1)) == []
    assert (
        list(placed_tensors(0, none, none, is_wanted=flags, is_alone=flags, limit=GRAIN, max_tensors=1, max_gap=0))
        == []
    )


@given(SIZES, st.integers(0, 1000), st.integers(GRAIN, 500), st.integers(1, 6), st.integers(1, 400), st.data())
def test_gaps_are_read_with_what_is_wanted_where_they_are_small(sizes, begin, limit, most, max_gap, data):
    starts, stops = ranges(sizes, begin)
    flags = st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes))
    wanted, alone = (np.array(data.draw(flags), np.bool_) for _ in range(2))
    given_flags = {"is_wanted": wanted, "is_alone": alone, "limit": limit, "max_tensors": most}
    items = list(placed_tensors(1, starts, stops, **given_flags, max_gap=max_gap))
    touched = []
    for item in items:
        inside = range(item.first, item.last)
        assert item.nbytes <= limit
        assert len(inside) <= most
        assert wanted[item.first]
        assert wanted[item.last - 1]
        if len(inside) > 1:
            assert (item.start, item.stop) == (starts[item.first], stops[item.last - 1])
            assert not (wanted & alone)[item.first : item.last].any()
            between = [index for index in inside if wanted[index]]
            assert all(starts[right] - stops[left] <= max_gap for left, right in itertools.pairwise(between))
        touched += [index for index in inside if wanted[index]]
    assert sorted(set(touched)) == np.flatnonzero(wanted).tolist()
    assert touched == sorted(touched)
    covered = [(item.start, item.stop) for item in items if item.nbytes]
    assert all(one[1] <= other[0] for one, other in itertools.pairwise(covered))
    without = list(placed_tensors(1, starts, stops, **given_flags, max_gap=0))
    assert len(items) <= len(without)


def test_two_wanted_tensors_with_a_small_gap_between_are_one_item():
    starts, stops = ranges([100, 60, 100, 70, 100], 8)
    flags = {"is_wanted": np.array([1, 0, 1, 0, 1], np.bool_), "is_alone": np.zeros(5, np.bool_)}
    items = list(placed_tensors(0, starts, stops, limit=1000, max_tensors=9, max_gap=64, **flags))
    assert items == [ReadItem(0, 8, 268, 0, 3), ReadItem(0, 338, 438, 4, 5)]
