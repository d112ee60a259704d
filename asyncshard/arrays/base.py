"""The interface between the pipeline and an array library, such as NumPy or torch."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from asyncshard._core import Lease
from asyncshard.errors import UnsupportedTensorError
from asyncshard.format.dtypes import Dtype


class RawArray(NamedTuple):
    """The memory of an array of any library, as a writable NumPy array."""

    array: NDArray[np.unsignedinteger[Any]]
    """Unsigned integers as wide as the elements of the original array, in its shape."""
    dtype: Dtype | None
    """The element type of the original array; None if the format has no such type."""


class ArrayLibrary(Protocol):
    """The operations that the pipeline needs from an array library."""

    def view(self, lease: Lease | None, offset: int, dtype: Dtype, shape: tuple[int, ...], nbytes: int) -> Any:
        """Return a tensor that is a view of the bytes of `lease` from `offset` on, and keeps the lease alive.

        An element type that the library does not have becomes raw bytes: ``uint8`` of shape ``(nbytes,)``. For an empty
        tensor `lease` is None.

        Raises
        ------
        ValueError
            The library cannot represent a tensor of this shape.
        """

    def memory_of(self, name: str, destination: Any) -> RawArray:
        """Return the memory of the destination that takes tensor `name`.

        Raises
        ------
        DestinationError
            The destination has no memory that the CPU can write.
        """

    def shape_of(self, dtype: Dtype, shape: tuple[int, ...], nbytes: int) -> tuple[int, ...]:
        """Return the shape of the tensor that `view` returns for this dtype, shape and number of bytes."""


def make_view(
    library: ArrayLibrary,
    lease: Lease | None,
    offset: int,
    dtype: Dtype,
    shape: tuple[int, ...],
    nbytes: int,
    *,
    name: str,
    path: str,
) -> Any:
    """Return ``library.view(...)``.

    Raises
    ------
    UnsupportedTensorError
        The library cannot represent the tensor; the message names the tensor and its file.
    """
    try:
        return library.view(lease if nbytes else None, offset if nbytes else 0, dtype, shape, nbytes)
    except (ValueError, OverflowError, RuntimeError, TypeError, MemoryError) as error:
        raise UnsupportedTensorError(
            f"{path}: tensor {name!r} of dtype {dtype.name} and shape {list(shape)} cannot be represented: {error}",
            path=path,
            tensor=name,
        ) from error
