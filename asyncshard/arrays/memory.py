"""The memory behind arrays and tensors, and sinks: destinations that have no memory of their own."""

from __future__ import annotations

import sys
from collections.abc import Hashable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray


@runtime_checkable
class Sink(Protocol):
    """A destination that takes its tensor chunk by chunk, such as one larger than the budget or bound for a device."""

    async def write(self, offset: int, buffer: memoryview) -> None:
        """Take the chunk of the tensor's bytes that begins at `offset`.

        Chunks come in order and without gaps. `buffer` is valid until `write` returns.
        """


def is_sink(target: Any) -> bool:
    """Return whether a destination is a `Sink` rather than an array."""
    return not hasattr(target, "shape") and callable(getattr(target, "write", None))


def span(memory: NDArray[Any]) -> tuple[int, int]:
    """Return the addresses of the first byte of an array and of the byte after its last."""
    low: int = memory.__array_interface__["data"][0]
    if memory.flags.c_contiguous:
        return low, low + memory.nbytes
    high = low + memory.itemsize
    for stride, size in zip(memory.strides, memory.shape, strict=True):
        reach = stride * (size - 1)
        low, high = low + min(reach, 0), high + max(reach, 0)
    return low, high


class Within(NamedTuple):
    """The bytes of another array's memory that an array spans."""

    start: int
    """Offset in the other array of the first byte."""
    stop: int
    """Offset in the other array after the last byte."""
    nbytes: int
    """The number of bytes that the other array spans."""


def within(memory: NDArray[Any], other: NDArray[Any]) -> Within | None:
    """Return the bytes of the memory of `other` that an array spans; None if it lies partly or wholly outside."""
    low, high = span(memory)
    other_low, other_high = span(other)
    if other_low <= low and high <= other_high:
        return Within(low - other_low, high - other_low, other_high - other_low)
    return None


class MemoryBounds(NamedTuple):
    """The address range that the elements of a tensor span."""

    space: Hashable
    """Identifies all NumPy memory, or one torch storage on one device. Only addresses in the same space compare."""
    start: int
    """Address of the lowest byte of all elements."""
    stop: int
    """Address after the highest byte of all elements."""
    is_contiguous: bool
    """Whether the elements fill the address range, in C order."""


def memory_bounds(tensor: Any) -> MemoryBounds | None:
    """Return the address range that a NumPy array or torch tensor spans, whatever its strides.

    Returns
    -------
    MemoryBounds or None
        None for a torch tensor without strided memory of its own: meta, fake, sparse, nested, or freed.

    Raises
    ------
    TypeError
        `tensor` is neither a NumPy array nor a torch tensor.
    """
    if isinstance(tensor, np.ndarray):
        start: int = tensor.__array_interface__["data"][0]
        if tensor.flags.c_contiguous:
            return MemoryBounds("numpy", start, start + tensor.nbytes, True)
        return MemoryBounds("numpy", *_strided_bounds(start, tensor.shape, tensor.strides, tensor.itemsize), False)
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(tensor, torch.Tensor):
        raise TypeError(f"neither a numpy array nor a torch tensor: {type(tensor).__name__}")
    if tensor.layout is not torch.strided:
        return None
    try:
        storage = tensor.untyped_storage()
        # Not tensor.is_meta: a fake tensor reports a real device, and only its storage says "meta".
        if storage.device.type == "meta":
            return None
        address = storage.data_ptr()
        start = tensor.data_ptr()
    except RuntimeError:  # a wrapper around other tensors has no address
        return None
    if not address and tensor.numel():
        return None
    space = (tensor.device, address)
    itemsize = tensor.element_size()
    if tensor.is_contiguous():
        return MemoryBounds(space, start, start + tensor.numel() * itemsize, True)
    strides = [stride * itemsize for stride in tensor.stride()]
    return MemoryBounds(space, *_strided_bounds(start, tensor.shape, strides, itemsize), False)


def _strided_bounds(start: int, shape: Any, strides: Any, itemsize: int) -> tuple[int, int]:
    """Return the address range of elements, the first of them at ``start``; strides in bytes may be negative or 0."""
    stop = start + itemsize
    for size, stride in zip(shape, strides, strict=True):
        if size == 0:
            return start, start
        if stride < 0:
            start += (size - 1) * stride
        else:
            stop += (size - 1) * stride
    return start, stop
