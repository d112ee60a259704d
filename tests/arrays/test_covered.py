"""Memory that destinations cover, against a plain comparison of every two."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncshard.arrays.covered import CoveredMemory
from asyncshard.arrays.memory import span

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


def test_nothing_covers_nothing():
    covered = covering([])
    assert list(covered.overlaps(lambda one, other: True)) == []
    assert not covered.has_inside(0, 1)
