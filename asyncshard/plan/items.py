"""Read items: byte ranges of shards, each read by one call, and the tensors that each of them fills.

Neighbouring tensors are read together, up to a limit. A larger tensor has an item of its own; if it is read straight
into its destination, it may have several items. Items come in delivery order: shard by shard, tensors by file offset.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from asyncshard._typing import Int64Array
from asyncshard.plan.ranges import merge_ranges

GRAIN = 64
"""A large tensor is split into items at multiples of 64 bytes, so that no element is cut."""


TensorKey = tuple[int, int]
"""The index of a shard in its checkpoint, and the index of a tensor in that shard."""


class ReadItem(NamedTuple):
    """One byte range of a shard, and the tensors in it."""

    shard: int
    """Index of the shard."""
    start: int
    """Offset in the file of the first byte."""
    stop: int
    """Offset in the file after the last byte."""
    first: int
    """Index of the first tensor that the range touches; tensors are counted in the order of their file offsets."""
    last: int
    """Index after that of the last tensor that the range touches."""

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


def whole_tensors(
    shard: int, starts: Int64Array, stops: Int64Array, *, limit: int, max_tensors: int
) -> Iterator[ReadItem]:
    """Yield items that hold whole tensors.

    Parameters
    ----------
    starts, stops : arrays of int64
        The byte ranges of the shard's tensors, ascending and without holes between them.
    limit : int
        The most bytes of an item; a larger tensor has an item of its own.
    max_tensors : int
        The most tensors of an item.
    """
    bounds = merge_ranges(starts, stops - starts, max_gap=0, max_bytes=limit, max_count=max_tensors)
    for first, last in itertools.pairwise(bounds.tolist()):
        yield ReadItem(shard, int(starts[first]), int(stops[last - 1]), first, last)


def placed_tensors(
    shard: int,
    starts: Int64Array,
    stops: Int64Array,
    *,
    is_wanted: NDArray[np.bool_],
    is_alone: NDArray[np.bool_],
    limit: int,
    max_tensors: int,
    max_gap: int,
) -> Iterator[ReadItem]:
    """Yield items for the wanted tensors; a tensor larger than `limit` is split into several items.

    Parameters
    ----------
    starts, stops : arrays of int64
        The byte ranges of the shard's tensors, ascending and without holes between them.
    is_wanted : array of bool
        Whether each tensor is to be read.
    is_alone : array of bool
        Whether each tensor must not share an item with others.
    limit : int
        The most bytes of an item; at least `GRAIN`.
    max_tensors : int
        The most tensors that an item touches.
    max_gap : int
        Gaps of up to this many bytes between two wanted tensors are read too, to save an item. An item still begins and
        ends with a wanted tensor.
    """
    part = limit // GRAIN * GRAIN
    is_joined = is_wanted & ~is_alone
    is_read = is_joined | _gaps(starts, stops, is_wanted, is_joined, max_gap)
    # A run continues as long as a tensor may share an item with the tensor before it.
    breaks = np.flatnonzero(~(is_read[1:] & is_read[:-1])) + 1
    bounds = [0, *breaks.tolist(), len(starts)]
    for run_first, run_last in itertools.pairwise(bounds):
        if run_first == run_last or not is_wanted[run_first]:
            continue
        first = run_first
        while first < run_last:
            start = int(starts[first])
            last = int(np.searchsorted(stops[first:run_last], start + limit, side="right")) + first
            last = max(min(last, first + max_tensors), first + 1)
            end = last
            while not is_wanted[last - 1]:
                last -= 1
            stop = int(stops[last - 1])
            step = part if last == first + 1 and stop - start > limit else max(stop - start, 1)
            for begin in range(start, max(stop, start + 1), step):
                yield ReadItem(shard, begin, min(begin + step, stop), first, last)
            first = end
            while first < run_last and not is_wanted[first]:
                first += 1


def _gaps(
    starts: Int64Array,
    stops: Int64Array,
    is_wanted: NDArray[np.bool_],
    is_joined: NDArray[np.bool_],
    max_gap: int,
) -> NDArray[np.bool_]:
    """Return for each tensor whether it lies in a gap of at most `max_gap` bytes between two joined tensors."""
    marks = np.zeros(len(starts) + 1, np.int64)
    wanted = np.flatnonzero(is_wanted)
    if max_gap and len(wanted):
        left, right = wanted[:-1], wanted[1:]
        is_near = (starts[right] - stops[left] <= max_gap) & is_joined[left] & is_joined[right]
        np.add.at(marks, left[is_near] + 1, 1)
        np.add.at(marks, right[is_near], -1)
    return np.cumsum(marks)[:-1] > 0
