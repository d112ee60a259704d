"""NumPy arrays as tensors and as destinations."""

import gc

import ml_dtypes
import numpy as np
import pytest

from asyncshard._core import Lease, Region, ReturnList
from asyncshard.arrays.numpy import NumpyArrays, library
from asyncshard.errors import DestinationError
from asyncshard.format.dtypes import DTYPES, by_name


@pytest.fixture
def returns():
    return ReturnList()


@pytest.fixture
def lease(returns):
    lease = Lease(Region(4096), 0, 4096, returns, 7)
    memoryview(lease)[:] = bytes(range(256)) * 16
    return lease


def test_the_library_of_the_module_handles_numpy_arrays():
    assert isinstance(library, NumpyArrays)


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype.numpy is not None], ids=lambda dtype: dtype.name)
def test_a_view_has_the_dtype_shape_and_bytes_of_its_tensor(dtype, lease):
    nbytes = 6 * dtype.bits // 8
    view = library.view(lease, 8, dtype, (2, 3), nbytes)
    assert (view.dtype, view.shape) == (dtype.numpy, (2, 3))
    assert view.tobytes() == bytes(range(8, 8 + nbytes))
    assert library.shape_of(dtype, (2, 3), nbytes) == view.shape


@pytest.mark.parametrize("name", ["F4", "F6_E2M3", "F6_E3M2"])
def test_a_tensor_of_packed_elements_is_raw_bytes(name, lease):
    dtype = by_name[name]
    nbytes = 8 * dtype.bits // 8
    view = library.view(lease, 16, dtype, (2, 4), nbytes)
    assert (view.dtype, view.shape) == (np.uint8, (nbytes,))
    assert library.shape_of(dtype, (2, 4), nbytes) == (nbytes,)


def test_an_empty_tensor_needs_no_lease():
    assert library.view(None, 0, by_name["BF16"], (0, 4), 0).shape == (0, 4)


def test_a_view_keeps_its_lease_alive(returns):
    view = library.view(Lease(Region(64), 0, 64, returns, 7), 0, by_name["F32"], (16,), 64)
    part = view[3:].T
    del view
    gc.collect()
    assert returns.collect() == []
    del part
    gc.collect()
    assert returns.collect() == [7]


@pytest.mark.parametrize("dtype", [np.bool_, np.int8, np.float16, ml_dtypes.bfloat16, np.float32, np.complex64])
def test_the_memory_of_a_destination_is_its_own_as_unsigned_integers(dtype):
    destination = np.zeros((3, 4), dtype)[:, ::2]
    memory = library.memory_of("w", destination)
    assert (memory.array.dtype.kind, memory.array.dtype.itemsize) == ("u", destination.dtype.itemsize)
    assert memory.dtype is not None
    assert memory.dtype.numpy == destination.dtype
    memory.array[:] = 1
    assert destination.view(f"u{destination.dtype.itemsize}").tolist() == [[1, 1]] * 3


def test_a_destination_of_a_type_that_the_format_lacks_has_memory_and_no_dtype():
    assert library.memory_of("w", np.zeros(3, ">f4")).dtype is None


def test_the_memory_of_a_subclass_is_a_plain_array():
    assert type(library.memory_of("w", np.zeros(3).view(np.recarray)).array) is np.ndarray


def test_a_destination_that_is_no_array_is_refused_by_name():
    with pytest.raises(DestinationError, match=r"'w' is a list; a NumPy array, a torch tensor or a Sink") as caught:
        library.memory_of("w", [1, 2])
    assert caught.value.tensor == "w"


def test_a_read_only_destination_is_refused():
    destination = np.zeros(3)
    destination.flags.writeable = False
    with pytest.raises(DestinationError, match="'w' is read-only"):
        library.memory_of("w", destination)


@pytest.mark.parametrize("destination", [np.zeros(2, object), np.zeros(2, np.complex128), np.zeros(2, "V3")])
def test_a_destination_whose_elements_no_tensor_can_have_is_refused(destination):
    with pytest.raises(DestinationError, match="which no tensor has"):
        library.memory_of("w", destination)
