"""The interface to an array library: what the pipeline needs of NumPy, of torch, or of another one."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from asyncshard._core import Lease
from asyncshard.errors import UnsupportedTensorError
from asyncshard.format.dtypes import Dtype


class RawArray(NamedTuple):
    """Memory of an array of any library, as a writable NumPy array of unsigned integers as wide as its elements."""

    array: NDArray[np.unsignedinteger[Any]]
    dtype: Dtype | None
    """None for a type that the format does not have, or for plain bytes."""


class ArrayLibrary(Protocol):
    """What the pipeline needs of an array library."""

    def view(self, lease: Lease | None, offset: int, dtype: Dtype, shape: tuple[int, ...], nbytes: int) -> Any:
        """Return the tensor that begins at `offset` of a buffer; raise ValueError where it cannot be represented.

        Where the library has no such type it is the raw bytes, ``uint8`` of shape ``(nbytes,)``. The tensor keeps the
        lease alive. `lease` is None for an empty tensor.
        """

    def memory_of(self, name: str, destination: Any) -> RawArray:
        """Return a destination's own memory; raise DestinationError where it cannot be written from here."""

    def shape_of(self, dtype: Dtype, shape: tuple[int, ...], nbytes: int) -> tuple[int, ...]:
        """Return the shape that this library gives such a tensor."""


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
    """Call ``library.view``; a tensor that it cannot represent is an UnsupportedTensorError that names it."""
    try:
        return library.view(lease if nbytes else None, offset if nbytes else 0, dtype, shape, nbytes)
    except (ValueError, OverflowError, RuntimeError, TypeError, MemoryError) as error:
        raise UnsupportedTensorError(
            f"{path}: tensor {name!r} of dtype {dtype.name} and shape {list(shape)} cannot be represented: {error}",
            path=path,
            tensor=name,
        ) from error
