"""The address ranges that arrays and tensors span, and which destinations are sinks.

`test_subtensors` checks the address ranges of torch tensors without strided memory.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from asyncshard.arrays.memory import MemoryBounds, Sink, is_sink, memory_bounds, span

torch = pytest.importorskip("torch")


class Writer:
    """The least that makes a sink."""

    async def write(self, offset, buffer):
        """Take nothing."""


class ArrayWithWrite(np.ndarray):
    def write(self, offset, buffer):
        raise NotImplementedError


def test_an_object_with_write_is_a_sink():
    assert is_sink(Writer())
    assert isinstance(Writer(), Sink)


@pytest.mark.parametrize("other", [np.zeros(2), torch.zeros(2), np.zeros(2).view(ArrayWithWrite), None, [1], "w"])
def test_an_array_or_an_object_without_write_is_no_sink(other):
    assert not is_sink(other)


def addresses(array):
    """Return the address of every byte of every element, one element at a time."""
    start = array.__array_interface__["data"][0]
    for index in np.ndindex(*array.shape):
        first = start + sum(stride * at for stride, at in zip(array.strides, index, strict=True))
        yield from range(first, first + array.itemsize)


@st.composite
def views(draw):
    whole = np.zeros(draw(arrays.array_shapes(max_dims=3, max_side=5)), draw(st.sampled_from(["u1", "<u4"])))
    slices = tuple(
        slice(None, None, draw(st.sampled_from([1, 2, -1, -2])))
        if draw(st.booleans())
        else slice(*sorted(draw(st.lists(st.integers(0, size - 1), min_size=2, max_size=2))))
        for size in whole.shape
    )
    return whole[slices].transpose(draw(st.permutations(range(whole.ndim))))


@given(views())
def test_the_bounds_of_a_numpy_view_are_those_of_its_elements(view):
    bounds = memory_bounds(view)
    octets = list(addresses(view))
    assert bounds.space == "numpy"
    assert bounds.is_contiguous == view.flags.c_contiguous
    if octets:
        assert (bounds.start, bounds.stop) == (min(octets), max(octets) + 1) == span(view)
    else:
        assert bounds.start == bounds.stop


@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.data())
def test_the_bounds_of_a_torch_view_are_those_of_its_elements(shape, data):
    whole = torch.zeros(*shape, dtype=torch.int32)
    view = whole.permute(*data.draw(st.permutations(range(len(shape)))))
    view = view[data.draw(st.integers(0, view.shape[0] - 1)) :]
    bounds = memory_bounds(view)
    octets = list(addresses(view.numpy()))
    assert (bounds.start, bounds.stop) == (min(octets), max(octets) + 1)
    assert bounds.is_contiguous == view.is_contiguous()


def test_all_numpy_arrays_are_in_one_space_and_each_torch_storage_is_in_its_own():
    one, other = torch.zeros(4), torch.zeros(4)
    assert memory_bounds(one).space == memory_bounds(one[2:]).space != memory_bounds(other).space
    assert memory_bounds(np.zeros(3)).space == memory_bounds(np.zeros(3)).space != memory_bounds(one).space


@pytest.mark.parametrize("tensor", [torch.zeros(3, device="meta"), torch.zeros(3).to_sparse()])
def test_a_torch_tensor_without_memory_has_no_bounds(tensor):
    assert memory_bounds(tensor) is None


def test_bounds_are_a_value_with_space_start_stop_and_whether_the_elements_fill_it():
    array = np.zeros(4, np.int32)
    start = array.ctypes.data
    assert memory_bounds(array) == MemoryBounds("numpy", start, start + 16, is_contiguous=True)


def test_an_object_that_is_no_array_has_no_bounds():
    with pytest.raises(TypeError, match="neither a numpy array nor a torch tensor: list"):
        memory_bounds([1, 2])
