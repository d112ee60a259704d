"""Destinations in columns, new arrays, and arrays whose elements are copied in."""

import gc
import itertools

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncshard.arrays.frameworks import load_library
from asyncshard.format.header import HeaderLimits
from asyncshard.pipeline.checkpoint.checkpoint import Checkpoint
from asyncshard.pipeline.checkpoint.opened_file import FileReader, read_header_of
from asyncshard.pipeline.transfer.destinations import (
    MatchedDestinations,
    SecondCopy,
    ShardDestinations,
    StridedTarget,
    are_equal,
    boxes,
    new_destinations,
)
from asyncshard.tasks.threads import DaemonThreads
from asyncshard.testing import MemoryStore


def address(array):
    return array.__array_interface__["data"][0]


def mask(*values):
    return np.array(values, np.bool_)


@given(st.lists(st.integers(0, 5), max_size=4), st.data())
def test_boxes_cover_each_element_once_in_order(shape, data):
    size = int(np.prod(shape, dtype=int))
    first = data.draw(st.integers(0, size))
    last = data.draw(st.integers(first, size))
    array = np.zeros(shape, int)
    at = first
    for index, low, high in boxes(tuple(shape), first, last):
        assert low == at
        box = array[index]
        assert box.base is array or box is array
        box[...] = np.arange(low, high).reshape(box.shape)
        at = high
    assert at == max(last, first)
    expected = np.arange(size)
    assert np.array_equal(array.reshape(-1)[first:last], expected[first:last])


def test_each_tensor_has_a_target_and_an_address_or_something_indirect():
    array, strided = np.zeros(4, "<f4"), StridedTarget(np.zeros(8, "<f4")[::2], np.dtype("<f4"))
    destinations = ShardDestinations.empty()
    destinations.add(array, address(array))
    destinations.add(None)
    destinations.add(strided.target, indirect=strided)
    assert destinations.is_wanted().tolist() == [True, False, True]
    assert destinations.is_indirect().tolist() == [False, False, True]
    destinations.memory(0, 4, 8)[:] = np.array([5, 6], "<f4").view("u1").data
    assert array.tolist() == [0, 5, 6, 0]


def test_destinations_that_are_not_kept_are_as_if_nobody_wanted_their_tensors():
    array, strided = np.zeros(4, "<f4"), StridedTarget(np.zeros(8, "<f4")[::2], np.dtype("<f4"))
    destinations = ShardDestinations.empty()
    destinations.add(array, address(array))
    destinations.add(strided.target, indirect=strided)
    destinations.keep(mask(False, False))
    assert destinations.targets == [None, None]
    assert (list(destinations.addresses), destinations.indirect) == ([0, 0], {})


@pytest.mark.parametrize(("first", "second"), [(True, False), (False, True), (True, True), (False, False)])
def test_of_two_copies_both_are_kept_or_none(first, second):
    array = np.zeros(4, "<f4")
    shards = [ShardDestinations.empty(), ShardDestinations.empty()]
    for shard in shards:
        shard.add(array, address(array))
    shards[1].compare_with_first(0, SecondCopy((0, 0), "a", array.view("u1")))
    MatchedDestinations(shards).keep([mask(first), mask(second)])
    assert [shard.targets[0] is not None for shard in shards] == [first or second] * 2


def test_elements_are_stored_from_any_index_on_into_a_strided_array():
    base = np.zeros((3, 8), "<i4")
    target = StridedTarget(base[:, ::2], np.dtype("<i4"))
    target.store(5, np.arange(5, 10, dtype="<i4").data.cast("B"))
    assert target.target.reshape(-1).tolist() == [0, 0, 0, 0, 0, 5, 6, 7, 8, 9, 0, 0]
    assert not base[:, 1::2].any()


def test_a_target_holds_what_was_stored_and_nothing_else():
    target = StridedTarget(np.zeros(8, ml_dtypes.bfloat16)[::2], np.dtype("<f4"))
    data = np.array([1.5, np.nan, 1e30, -2], "<f4")
    assert not target.holds(0, data.data.cast("B"))
    target.store(0, data.data.cast("B"))
    assert target.holds(0, data.data.cast("B"))
    assert target.holds(2, data[2:].data.cast("B"))
    assert not target.holds(1, data[2:].data.cast("B"))


def test_a_second_copy_is_compared_at_its_offset():
    bytes_there = np.arange(10, dtype="u1")
    second = SecondCopy((0, 0), "first", bytes_there)
    assert second.holds(4, memoryview(bytes(range(4, 8))))
    assert not second.holds(3, memoryview(bytes(range(4, 8))))
    converted = SecondCopy((0, 0), "first", StridedTarget(np.arange(6.0), np.dtype("<f4")))
    assert converted.holds(8, np.arange(2, 5, dtype="<f4").data.cast("B"))
    assert not converted.holds(4, np.arange(2, 5, dtype="<f4").data.cast("B"))


@given(st.binary(max_size=50), st.binary(max_size=50))
def test_buffers_are_equal_if_all_their_bytes_are(one, other):
    assert are_equal(memoryview(one), memoryview(other)) == (one == other)
    assert are_equal(memoryview(one), memoryview(bytearray(one)))


async def test_new_arrays_are_apart_and_give_their_memory_back_one_by_one(checkpoints):
    tensors = {
        "a": np.arange(5, dtype="u1"),
        "scalar": np.array(2.0),
        "none": np.zeros((0, 3), "<f4"),
        "b": np.ones(99),
    }
    store = MemoryStore({"x.safetensors": checkpoints.shard(tensors)})
    threads = DaemonThreads(1, "asyncshard-test")
    shard = await read_header_of(store, "x.safetensors", threads, HeaderLimits(), None)
    await threads.aclose()
    (new,) = new_destinations(Checkpoint((shard,), FileReader(store)), load_library("np")).shards
    assert [(array.shape, array.dtype) for array in new.targets] == [
        (tensors[name].shape, tensors[name].dtype) for name in shard.header
    ]
    spans = sorted((start, start + array.nbytes) for start, array in zip(new.addresses, new.targets, strict=True))
    assert all(start % 64 == 0 for start, _ in spans)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))
    last = new.targets[-1]
    last[...] = 7
    del new
    gc.collect()
    assert (last == 7).all()
