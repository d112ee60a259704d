"""Destinations of tensors: arrays and parameters of the caller, views of fused parameters, sinks, and new arrays."""

from __future__ import annotations

import math
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asyncshard._core import Lease, Region, ReturnList, Span
from asyncshard.arrays.base import ArrayLibrary, make_view
from asyncshard.arrays.memory import Sink
from asyncshard.format.dtypes import DTYPES
from asyncshard.pipeline.checkpoint.checkpoint import Checkpoint
from asyncshard.pipeline.checkpoint.opened_file import OpenedFile
from asyncshard.plan.items import TensorKey
from asyncshard.tasks.yielding import yielding_gil

_CAST_ELEMENTS = 1 << 17
"""At most 131,072 elements are converted at once: NumPy holds the GIL while it converts the dtypes of `ml_dtypes`."""
_COMPARED_BYTES = 1 << 20
"""At most 1 MiB is compared at once: NumPy allocates one truth value for each byte."""
_SPACING = 64
"""New arrays begin at multiples of 64 bytes, a cache line."""


@dataclass(slots=True, frozen=True)
class StridedTarget:
    """A destination that cannot take the file's bytes as they are: a strided view, or an array of another dtype."""

    target: NDArray[Any]
    """The array into which elements are copied."""
    source: np.dtype[Any]
    """The dtype of the file's elements."""

    def store(self, first: int, data: memoryview) -> None:
        """Copy the elements in `data` into the array. This is slow: call it off the event loop.

        The element at index `first`, in C order, is the first that is written.
        """
        elements = np.frombuffer(data, self.source)
        is_cast = elements.dtype != self.target.dtype
        for box, part in self._parts(first, elements, _CAST_ELEMENTS if is_cast else len(elements)):
            with np.errstate(all="ignore"):  # a conversion that overflows gives inf, without a warning
                box[...] = part
            if is_cast:
                time.sleep(0)  # another thread may take the GIL

    def holds(self, first: int, data: memoryview) -> bool:
        """Return whether the array has these elements already. This is slow: call it off the event loop."""
        unsigned = f"u{self.target.itemsize}"
        for box, part in self._parts(first, np.frombuffer(data, self.source), _CAST_ELEMENTS):
            with np.errstate(all="ignore"):
                expected = part.astype(box.dtype)
            if not np.array_equal(box.view(unsigned), expected.view(unsigned)):  # bits: a NaN equals itself
                return False
            time.sleep(0)
        return True

    def _parts(self, first: int, elements: NDArray[Any], step: int) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
        """Yield boxes of the target, each with the elements that belong into it, at most `step` elements at a time."""
        for begin in range(0, len(elements), step):
            piece = elements[begin : begin + step]
            at = first + begin
            for index, low, high in boxes(self.target.shape, at, at + len(piece)):
                box = self.target[index]
                yield box, piece[low - at : high - at].reshape(box.shape)


@dataclass(slots=True, frozen=True)
class SecondCopy:
    """A destination that another tensor fills. The bytes that are read for it are compared with that tensor."""

    first: TensorKey
    """The tensor that fills the destination."""
    first_name: str
    """The name of the tensor that fills the destination."""
    target: StridedTarget | NDArray[np.uint8]
    """The destination. It is an array of bytes if it has the file's bytes as they are."""

    def holds(self, start: int, data: memoryview) -> bool:
        """Return whether the destination has the bytes `data` at offset `start`. Slow: call it off the event loop."""
        if isinstance(self.target, StridedTarget):
            return self.target.holds(start // self.target.source.itemsize, data)
        return are_equal(self.target[start : start + data.nbytes].data, data)


def are_equal(one: memoryview, other: memoryview) -> bool:
    """Return whether two buffers have the same bytes. This is slow for large buffers: call it off the event loop."""
    ours, theirs = np.frombuffer(one, np.uint8), np.frombuffer(other, np.uint8)
    return len(ours) == len(theirs) and all(
        np.array_equal(ours[start : start + _COMPARED_BYTES], theirs[start : start + _COMPARED_BYTES])
        for start in range(0, len(ours), _COMPARED_BYTES)
    )


def boxes(shape: tuple[int, ...], first: int, last: int) -> Iterator[tuple[tuple[Any, ...], int, int]]:
    """Yield boxes that together have the elements [first, last) of an array, counted in C order.

    A box is given as an index, with which an array returns a view, and as the range of its elements.
    """
    if first >= last:
        return
    if not shape:
        yield (...,), first, last
        return
    inner = math.prod(shape[1:])
    row, skipped = divmod(first, inner)
    end_row, tail = divmod(last, inner)
    base = row * inner
    if row == end_row:
        for index, low, high in boxes(shape[1:], skipped, tail):
            yield (row, *index), base + low, base + high
        return
    if skipped:
        for index, low, high in boxes(shape[1:], skipped, inner):
            yield (row, *index), base + low, base + high
        row += 1
    if row < end_row:
        yield (slice(row, end_row), ...), row * inner, end_row * inner
    for index, low, high in boxes(shape[1:], 0, tail):
        yield (end_row, *index), end_row * inner + low, end_row * inner + high


@dataclass(slots=True)
class ShardDestinations:
    """The destinations of one shard's tensors, in columns: one object a tensor would trigger the garbage collector."""

    targets: list[Any]
    """For each tensor, the caller's object, which is delivered when it is filled; None if nobody wants the tensor."""
    addresses: array[int]
    """For each tensor, the address of memory that takes the file's bytes as they are; 0 if there is no such memory."""
    indirect: dict[int, StridedTarget | Sink | SecondCopy]
    """The destinations that get their tensor through a buffer, by the tensor's index."""
    firsts: dict[int, TensorKey] = field(default_factory=dict)
    """For each second copy, by its index, the first copy: the tensor that must have the same bytes."""

    @classmethod
    def empty(cls) -> ShardDestinations:
        """Return the destinations of no tensors, to which `add` appends."""
        return cls([], array("Q"), {})

    def add(self, target: Any, address: int = 0, indirect: StridedTarget | Sink | None = None) -> None:
        """Append the destination of the next tensor."""
        if indirect is not None:
            self.indirect[len(self.targets)] = indirect
        self.targets.append(target)
        self.addresses.append(address)

    def is_wanted(self) -> NDArray[np.bool_]:
        """Return for each tensor whether somebody wants it."""
        return np.fromiter((target is not None for target in self.targets), np.bool_, len(self.targets))

    def is_indirect(self) -> NDArray[np.bool_]:
        """Return for each tensor whether its destination gets it through a buffer."""
        mask = np.zeros(len(self.targets), np.bool_)
        mask[list(self.indirect)] = True
        return mask

    def keep(self, mask: NDArray[np.bool_]) -> None:
        """Drop the destinations for which `mask` is false, as if nobody wanted these tensors."""
        for index in np.flatnonzero(~mask).tolist():
            self.drop(index)

    def drop(self, index: int) -> None:
        """Drop the destination of one tensor, as if nobody wanted it."""
        self.targets[index] = None
        self.addresses[index] = 0
        self.indirect.pop(index, None)
        self.firsts.pop(index, None)

    def compare_with_first(self, index: int, second: SecondCopy) -> None:
        """Make a tensor a second copy: it is compared with the tensor that fills its destination, and not stored."""
        self.addresses[index] = 0
        self.indirect[index] = second
        self.firsts[index] = second.first

    def memory(self, index: int, start: int, nbytes: int) -> memoryview:
        """Return the bytes [start, start + nbytes) of a contiguous destination."""
        return memoryview(Span(self.addresses[index] + start, nbytes, self.targets[index]))


@dataclass(slots=True)
class MatchedDestinations:
    """The destinations of all tensors of a checkpoint, and the names that did not match."""

    shards: list[ShardDestinations] = field(default_factory=list)
    missing: tuple[str, ...] = ()
    """Names of destinations for which the checkpoint has no tensor."""
    unexpected: tuple[str, ...] = ()
    """Names of tensors that have no destination."""
    narrowed: tuple[str, ...] = ()
    """Names of destinations that are larger than their tensor, which fills their first corner."""

    def keep(self, masks: list[NDArray[np.bool_]]) -> None:
        """Drop the destinations for which the mask of their shard is false. Of two copies, both are kept or none."""
        for mask, shard in zip(masks, self.shards, strict=True):
            for index, (first_shard, first_index) in shard.firsts.items():
                mask[index] = masks[first_shard][first_index] = mask[index] or masks[first_shard][first_index]
        for mask, shard in zip(masks, self.shards, strict=True):
            shard.keep(mask)


def new_destinations(checkpoint: Checkpoint, library: ArrayLibrary) -> MatchedDestinations:
    """Return new arrays for all tensors. Each array gives its memory back when it dies. Call it in a thread."""
    matched = MatchedDestinations()
    region = Region(max(sum(map(_spaced_size, checkpoint.shards)), 1))
    returns = ReturnList()
    returns.discards = True
    at = 0
    for shard in checkpoint.shards:
        row = shard.header.table.row
        destinations = ShardDestinations.empty()
        for index in yielding_gil(range(len(shard.header))):
            name, code, shape, start, stop = row(index)
            lease = Lease(region, at, stop - start, returns, 0)
            new = make_view(library, lease, 0, DTYPES[code], shape, stop - start, name=name, path=shard.path)
            destinations.add(new, lease.address)
            at += -(-(stop - start) // _SPACING) * _SPACING
        matched.shards.append(destinations)
    return matched


def _spaced_size(shard: OpenedFile) -> int:
    sizes = shard.header.table.stops - shard.header.table.starts
    return int((-(-sizes // _SPACING) * _SPACING).sum())
