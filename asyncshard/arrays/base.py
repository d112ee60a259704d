"""How tensors look to an array library: the interface, and NumPy's side of it.

PyTorch's is `asyncshard.arrays.torch`, found by name when asked for, so that nothing here imports a framework.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from asyncshard._core import Lease
from asyncshard.errors import DestinationError, UnsupportedTensorError
from asyncshard.format.dtypes import Dtype, from_numpy


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


class NumpyArrays:
    """NumPy arrays, with `ml_dtypes` for the types that NumPy lacks; F4 and F6 are raw bytes."""

    def view(self, lease: Lease | None, offset: int, dtype: Dtype, shape: tuple[int, ...], nbytes: int) -> Any:
        buffer: Any = lease
        if dtype.numpy is None:
            return np.ndarray((nbytes,), np.uint8, buffer, offset)
        return np.ndarray(shape, dtype.numpy, buffer, offset)

    def memory_of(self, name: str, destination: Any) -> RawArray:
        if not isinstance(destination, np.ndarray):
            raise DestinationError(
                f"the destination of {name!r} is a {type(destination).__name__}; a NumPy array, a torch tensor or a "
                "Sink (an object with `async def write(offset, buffer)`) is needed",
                tensor=name,
            )
        if not destination.flags.writeable:
            raise DestinationError(f"the destination of {name!r} is read-only", tensor=name)
        dtype = from_numpy(destination.dtype)
        if destination.dtype.hasobject or destination.dtype.itemsize not in (1, 2, 4, 8):
            raise DestinationError(
                f"the destination of {name!r} has dtype {destination.dtype}, which no tensor has", tensor=name
            )
        return RawArray(destination.view(np.ndarray).view(f"u{destination.dtype.itemsize}"), dtype)

    def shape_of(self, dtype: Dtype, shape: tuple[int, ...], nbytes: int) -> tuple[int, ...]:
        return (nbytes,) if dtype.numpy is None else shape


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
