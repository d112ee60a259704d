"""Bytes as they come, into buffers in turn."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncshard.stores.scatter import SMALL, Scatter

SIZES = st.lists(st.integers(0, 3 * SMALL), max_size=6)


def memory_of(sizes):
    memory = bytearray(b"\xaa" * (sum(sizes) + 2))
    at, buffers = 1, []
    for size in sizes:
        buffers.append(memoryview(memory)[at : at + size])
        at += size
    return memory, buffers


@given(sizes=SIZES, draw=st.data())
def test_windows_and_writes_fill_all_and_nothing_else(sizes, draw):
    memory, buffers = memory_of(sizes)
    data = np.random.default_rng(1).bytes(sum(sizes))
    scatter = Scatter(buffers)
    staging = memoryview(bytearray(4 * SMALL))
    while scatter.filled < scatter.nbytes:
        if draw.draw(st.booleans()):
            window = scatter.window(staging)
            assert 0 < len(window) <= scatter.nbytes - scatter.filled
            count = draw.draw(st.integers(1, len(window)))
            window[:count] = data[scatter.filled : scatter.filled + count]
            scatter.advance(count)
        else:
            count = draw.draw(st.integers(0, scatter.nbytes - scatter.filled))
            scatter.write(memoryview(data)[scatter.filled : scatter.filled + count])
    assert memory == b"\xaa" + data + b"\xaa"


def test_large_buffers_are_received_into_and_small_ones_are_staged():
    large, small = bytearray(SMALL), [bytearray(10) for _ in range(10)]
    scatter = Scatter([memoryview(large), *map(memoryview, small)])
    staging = memoryview(bytearray(SMALL))
    assert scatter.window(staging).obj is large
    scatter.advance(SMALL)
    assert scatter.window(staging).obj is staging.obj
    scatter.advance(95)
    assert scatter.window(staging).obj is small[-1]


def test_elements_of_any_type_are_bytes():
    array = np.zeros((2, 3), "<u4")
    scatter = Scatter([array.data])
    scatter.write(memoryview(np.arange(6, dtype="<u4").tobytes()))
    assert array.tolist() == [[0, 1, 2], [3, 4, 5]]


@given(sizes=SIZES, draw=st.data())
def test_views_are_the_memory_of_a_range(sizes, draw):
    memory, buffers = memory_of(sizes)
    memory[:] = np.random.default_rng(1).bytes(len(memory))
    start = draw.draw(st.integers(0, sum(sizes)))
    stop = draw.draw(st.integers(start, sum(sizes)))
    views = Scatter(buffers).views(start, stop)
    assert b"".join(views) == memory[1 + start : 1 + stop]
    assert all(len(view) for view in views)


def test_it_can_begin_again():
    memory, buffers = memory_of([3, 4])
    scatter = Scatter(buffers)
    scatter.write(memoryview(b"abcdef"))
    scatter.rewind()
    scatter.write(memoryview(b"1234567"))
    assert (memory[1:8], scatter.filled) == (b"1234567", 7)


def test_what_is_not_contiguous_is_refused():
    with pytest.raises(TypeError):
        Scatter([np.zeros((4, 4), np.uint8)[:, 1].data])
