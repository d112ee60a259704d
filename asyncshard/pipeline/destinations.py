"""Where tensors go when the caller says where: arrays, parameters, views of fused ones, sinks, or new arrays.

All that can be known to be wrong is raised before a byte is written.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from asyncshard._core import Lease, Region, ReturnList
from asyncshard.errors import DestinationError, NamesError
from asyncshard.format.dtypes import DTYPES, Dtype
from asyncshard.pipeline.arrays import ArrayLibrary, RawArray, make_view
from asyncshard.pipeline.checkpoint import Checkpoint
from asyncshard.pipeline.pace import Pace

_LISTED = 20
_CAST_ELEMENTS = 1 << 17
"""Elements converted at once: NumPy converts the types of `ml_dtypes` with the GIL held."""
_OVERLAP_WORK = 100_000


@runtime_checkable
class Sink(Protocol):
    """Takes a tensor chunk by chunk: one larger than the budget, or one bound for a device."""

    async def write(self, offset: int, buffer: memoryview) -> None:
        """Take the tensor's bytes from `offset` on. They ascend without gaps; `buffer` is valid until this returns."""


@dataclass(slots=True, frozen=True)
class Destination:
    """Where one tensor goes. Just one of `buffer`, `target` and `sink` is there."""

    given: Any
    """What the caller gave and gets back when it is filled."""
    buffer: memoryview | None = None
    """Its memory, where the file's bytes can be read straight into it."""
    target: NDArray[Any] | None = None
    """Where elements have to be copied: a strided view, or one of another dtype."""
    source: np.dtype[Any] | None = None
    """With `target`: the dtype of the staged bytes."""
    sink: Sink | None = None

    def store(self, first: int, data: memoryview) -> None:
        """Copy the elements from index `first` on into `target`, in the file's order."""
        assert self.target is not None
        elements = np.frombuffer(data, self.source)
        is_cast = elements.dtype != self.target.dtype
        step = _CAST_ELEMENTS if is_cast else len(elements)
        for begin in range(0, len(elements), step):
            piece = elements[begin : begin + step]
            for index, low, high in boxes(self.target.shape, first + begin, first + begin + len(piece)):
                box = self.target[index]
                with np.errstate(all="ignore"):  # a conversion that overflows gives what the dtype gives: inf
                    box[...] = piece[low - first - begin : high - first - begin].reshape(box.shape)
            if is_cast:
                time.sleep(0)  # lets go of the GIL


def boxes(shape: tuple[int, ...], first: int, last: int) -> Iterator[tuple[tuple[Any, ...], int, int]]:
    """Cut the elements [first, last), counted in C order, into boxes of an array.

    Yields the index of each box, which keeps it a view, and the range of elements in it.
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
class Placement:
    """The destinations of a checkpoint's tensors, and what did not match."""

    destinations: list[list[Destination | None]]
    """For each shard, for each tensor in the file's order; None for what nobody wants."""
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    narrowed: list[str] = field(default_factory=list)
    """Names of destinations that are larger than their tensor, which fills their first corner."""


class _Memory(NamedTuple):
    """What a destination covers, for the check that no two overlap."""

    name: str
    array: NDArray[Any]


async def match_destinations(
    checkpoint: Checkpoint, mapping: Mapping[str, Any], library: ArrayLibrary, *, strict: bool, cast: bool, path: str
) -> Placement:
    """Find the destination of every tensor that is wanted.

    Raises
    ------
    NamesError
        With `strict`: names are missing or unexpected. A name is not missing if its memory is covered by a destination
        that is filled (tied weights), or if it has no elements.
    DestinationError
        Shape, dtype or layout do not fit, or two destinations share memory.
    """
    pace = Pace()
    placement = Placement([])
    covered: list[_Memory] = []
    faults: list[str] = []
    matched: set[str] = set()
    unexpected: list[str] = []
    for shard in checkpoint.shards:
        row = shard.header.table.row
        row_of: list[Destination | None] = []
        for index in range(len(shard.header)):
            if pace.is_due():
                await pace.give_way()
            name, code, shape, start, stop = row(index)
            if name not in mapping:
                unexpected.append(name)
                row_of.append(None)
                continue
            matched.add(name)
            fitting = _Fitting(name, DTYPES[code], shape, stop - start, library, cast=cast)
            try:
                row_of.append(fitting.fit(mapping[name]))
            except DestinationError as error:
                faults.append(str(error))
                row_of.append(None)
                continue
            if fitting.is_narrowed:
                placement.narrowed.append(name)
            if fitting.memory is not None:
                covered.append(_Memory(name, fitting.memory))
        placement.destinations.append(row_of)
    bounds = _Bounds(covered)
    missing = [name for name in mapping if name not in matched]
    missing = [name for name in missing if not _is_covered(name, mapping[name], library, bounds)]
    placement.missing, placement.unexpected = tuple(missing), tuple(unexpected)
    if strict and (missing or unexpected):
        raise _names_error(path, placement)
    faults.extend(bounds.overlaps())
    if faults:
        more = f" (and {len(faults) - _LISTED} more)" if len(faults) > _LISTED else ""
        raise DestinationError(f"{path}: {'; '.join(faults[:_LISTED])}{more}. Nothing was written.", path=path)
    return placement


class _Fitting:
    """One tensor and its destination: do they fit, and how do the bytes get there?"""

    def __init__(
        self, name: str, dtype: Dtype, shape: tuple[int, ...], nbytes: int, library: ArrayLibrary, *, cast: bool
    ) -> None:
        self._name = name
        self._dtype = dtype
        self._shape = library.shape_of(dtype, shape, nbytes)
        self._library = library
        self._cast = cast
        self.is_narrowed = False
        self.memory: NDArray[Any] | None = None
        """What is written, where it has bytes."""

    def fit(self, given: Any) -> Destination:
        if is_sink(given):
            return Destination(given, sink=given)
        raw = self._library.memory_of(self._name, given)
        array = self._narrow(raw.array)
        is_cast = self._is_cast(raw)
        _require_no_self_overlap(self._name, array)
        if array.size:
            self.memory = array
        if array.flags.c_contiguous and not is_cast:
            return Destination(given, buffer=array.reshape(-1).view(np.uint8).data)
        if is_cast:
            assert raw.dtype is not None
            assert raw.dtype.numpy is not None
            return Destination(given, target=array.view(raw.dtype.numpy), source=self._dtype.numpy)
        return Destination(given, target=array, source=array.dtype)

    def _narrow(self, array: NDArray[Any]) -> NDArray[Any]:
        shape = self._shape
        if array.shape == shape:
            return array
        if len(shape) != array.ndim or any(here > there for here, there in zip(shape, array.shape, strict=True)):
            raise DestinationError(
                f"tensor {self._name!r} has shape {list(shape)}, its destination {list(array.shape)}",
                tensor=self._name,
            )
        self.is_narrowed = True
        return array[tuple(slice(0, size) for size in shape)]

    def _is_cast(self, raw: RawArray) -> bool:
        ours, theirs = self._dtype, raw.dtype
        if theirs is not None and (ours.name == theirs.name or (ours.numpy is None and theirs.name == "U8")):
            return False
        known = "a dtype the format does not have" if theirs is None else theirs.name
        if not self._cast:
            raise DestinationError(
                f"tensor {self._name!r} has dtype {ours.name}, its destination {known}; pass cast=True to convert",
                tensor=self._name,
            )
        if theirs is None or ours.numpy is None or theirs.numpy is None or (ours.name == "C64"):
            raise DestinationError(
                f"tensor {self._name!r} of dtype {ours.name} cannot be converted to {known}", tensor=self._name
            )
        return True


def is_sink(given: Any) -> bool:
    """Return whether a destination is a `Sink`, rather than an array."""
    return not hasattr(given, "shape") and callable(getattr(given, "write", None))


def _require_no_self_overlap(name: str, array: NDArray[Any]) -> None:
    """Refuse a view whose elements may share memory (stride 0, or a hand-made one)."""
    reach = array.itemsize
    for stride, size in sorted((abs(stride), size) for stride, size in zip(array.strides, array.shape, strict=True)):
        if size > 1 and array.size:
            if stride < reach:
                raise DestinationError(
                    f"the destination of {name!r} is a view whose elements share memory (strides {array.strides})",
                    tensor=name,
                )
            reach = stride * (size - 1) + reach
    # Each stride clears all that the smaller ones span: no two elements meet.


class _Bounds:
    """The memory that destinations cover, by address."""

    def __init__(self, covered: list[_Memory]) -> None:
        spans = [_span(memory.array) for memory in covered]
        self._lows = np.array([low for low, _ in spans], np.uint64)
        self._highs = np.array([high for _, high in spans], np.uint64)
        order = np.lexsort((self._highs, self._lows))
        self._lows, self._highs = self._lows[order], self._highs[order]
        self._covered = [covered[index] for index in order.tolist()]
        self._reach = np.maximum.accumulate(self._highs) if len(order) else self._highs
        whole = [memory.array.flags.c_contiguous for memory in self._covered]
        self._whole_reach = np.maximum.accumulate(np.where(whole, self._highs, 0)) if whole else self._highs

    def has_inside(self, low: int, high: int) -> bool:
        """Return whether one contiguous destination covers [low, high)."""
        place = int(np.searchsorted(self._lows, low, side="right"))
        return place > 0 and int(self._whole_reach[place - 1]) >= high

    def overlaps(self) -> Iterator[str]:
        """Yield a sentence for each pair, next to each other by address, that shares memory."""
        if not len(self._lows):
            return
        suspects = np.flatnonzero(self._lows[1:] < self._reach[:-1]) + 1
        for index in suspects.tolist():
            low = self._lows[index]
            for other in range(index - 1, -1, -1):
                if self._reach[other] <= low:
                    break
                if self._highs[other] > low and _share_memory(self._covered[index].array, self._covered[other].array):
                    names = sorted((self._covered[other].name, self._covered[index].name))
                    yield f"the destinations of {names[0]!r} and {names[1]!r} share memory"
                    break


def _span(array: NDArray[Any]) -> tuple[int, int]:
    """Return the addresses of the first byte of an array and of the byte after its last."""
    low = high = array.__array_interface__["data"][0]
    if array.flags.c_contiguous:
        return low, high + array.nbytes
    for stride, size in zip(array.strides, array.shape, strict=True):
        reach = stride * (size - 1)
        low, high = low + min(reach, 0), high + max(reach, 0)
    return low, high + array.itemsize


def _share_memory(one: NDArray[Any], other: NDArray[Any]) -> bool:
    if one.flags.c_contiguous and other.flags.c_contiguous:
        return True  # asked only where their spans overlap
    try:
        return np.shares_memory(one, other, max_work=_OVERLAP_WORK)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def _is_covered(name: str, given: Any, library: ArrayLibrary, bounds: _Bounds) -> bool:
    """Return whether a destination without a tensor is filled all the same, or has nothing to fill."""
    if is_sink(given):
        return False
    try:
        array = library.memory_of(name, given).array
    except DestinationError:
        return False
    return array.size == 0 or bounds.has_inside(*_span(array))


def _names_error(path: str, placement: Placement) -> NamesError:
    parts = []
    if placement.missing:
        parts.append(f"missing from the checkpoint: {_listed(placement.missing)}")
    if placement.unexpected:
        parts.append(f"in the checkpoint but not in the state dict: {_listed(placement.unexpected)}")
    return NamesError(
        f"{path}: the names do not match: {'; '.join(parts)}. Nothing was written; strict=False loads what matches.",
        path=path,
        missing=placement.missing,
        unexpected=placement.unexpected,
    )


def _listed(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(map(repr, names[:_LISTED])) + more


async def new_destinations(checkpoint: Checkpoint, library: ArrayLibrary) -> Placement:
    """Make an array for every tensor, in fresh memory that each gives back when it dies."""
    pace = Pace()
    placement = Placement([])
    size = sum(int(np.sum(-(-_sizes(shard) // _SPACING) * _SPACING)) for shard in checkpoint.shards)
    region = Region(max(size, 1))
    returns = ReturnList()
    returns.discards = True
    at = 0
    for shard in checkpoint.shards:
        row = shard.header.table.row
        row_of: list[Destination | None] = []
        for index in range(len(shard.header)):
            if pace.is_due():
                await pace.give_way()
            name, code, shape, start, stop = row(index)
            lease = Lease(region, at, stop - start, returns, 0)
            array = make_view(library, lease, 0, DTYPES[code], shape, stop - start, name=name, path=shard.path)
            row_of.append(Destination(array, buffer=memoryview(lease)))
            at += -(-(stop - start) // _SPACING) * _SPACING
        placement.destinations.append(row_of)
    return placement


_SPACING = 64
"""New arrays begin at multiples of this, a cache line."""


def _sizes(shard: Any) -> NDArray[np.int64]:
    table = shard.header.table
    sizes: NDArray[np.int64] = table.stops - table.starts
    return sizes
