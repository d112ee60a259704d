"""NumPy arrays: the tensors of ``framework="np"``, and NumPy destinations."""

from __future__ import annotations

from typing import Any

import numpy as np

from asyncshard._core import Lease
from asyncshard.arrays.base import RawArray
from asyncshard.errors import DestinationError
from asyncshard.format.dtypes import Dtype, from_numpy


class NumpyArrays:
    """The array library of ``framework="np"``: `ml_dtypes` adds types that NumPy lacks; F4 and F6 are raw bytes."""

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


library = NumpyArrays()
