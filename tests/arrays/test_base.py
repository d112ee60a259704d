"""Views made through an array library, and the error for a tensor that it cannot represent."""

import numpy as np
import pytest

from asyncshard._core import Lease, Region, ReturnList
from asyncshard.arrays.base import make_view
from asyncshard.arrays.numpy import NumpyArrays
from asyncshard.errors import UnsupportedTensorError
from asyncshard.format.dtypes import by_name


class RecordingLibrary:
    """An array library that notes how it is called."""

    def __init__(self, error=None):
        self.calls = []
        self._error = error

    def view(self, *args):
        self.calls.append(args)
        if self._error is not None:
            raise self._error
        return "the view"


def make(library, lease, offset, shape, nbytes):
    return make_view(library, lease, offset, by_name["F32"], shape, nbytes, name="w", path="model.safetensors")


def test_a_view_is_made_at_its_offset_of_the_lease():
    lease = Lease(Region(64), 16, 32, ReturnList(), 0)
    memoryview(lease)[:] = np.arange(8, dtype="<f4").tobytes()
    assert make(NumpyArrays(), lease, 8, (2, 2), 16).tolist() == [[2, 3], [4, 5]]


def test_the_view_of_an_empty_tensor_is_made_without_a_lease():
    library = RecordingLibrary()
    lease = Lease(Region(64), 0, 64, ReturnList(), 0)
    assert make(library, lease, 32, (0, 3), 0) == "the view"
    assert library.calls == [(None, 0, by_name["F32"], (0, 3), 0)]


@pytest.mark.parametrize("kind", [ValueError, OverflowError, RuntimeError, TypeError, MemoryError])
def test_a_tensor_that_the_library_cannot_represent_is_named_with_its_file(kind):
    with pytest.raises(UnsupportedTensorError, match="too many dimensions") as caught:
        make(RecordingLibrary(kind("too many dimensions")), None, 0, (1,) * 65, 4)
    assert (caught.value.tensor, caught.value.path) == ("w", "model.safetensors")
    assert "model.safetensors: tensor 'w' of dtype F32" in str(caught.value)


def test_numpy_refuses_a_tensor_of_65_dimensions():
    lease = Lease(Region(64), 0, 64, ReturnList(), 0)
    with pytest.raises(UnsupportedTensorError, match="cannot be represented"):
        make(NumpyArrays(), lease, 0, (1,) * 65, 4)
