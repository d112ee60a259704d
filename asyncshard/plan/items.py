"""Read items: which byte range of which shard is read in one go, and which tensors it fills.

Neighbouring tensors are read together, up to a limit; a larger tensor is an item of its own, or, where it goes straight
to its destination, several. Items come in delivery order: shards in turn, tensors by file offset.
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
"""Parts of a split tensor are multiples of this many bytes, so that no element is cut."""


TensorKey = tuple[int, int]
"""The index of a shard in its checkpoint, and the index of a tensor in that shard."""


class ReadItem(NamedTuple):
    """One byte range of a shard."""

    shard: int
    """Index of the shard."""
    start: int
    """First byte, an offset in the file."""
    stop: int
    """Byte after the last."""
    first: int
    """Index in the shard, by file offset, of the first tensor that it touches."""
    last: int
    """Index after the last one's."""

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


def whole_tensors(
    shard: int, starts: Int64Array, stops: Int64Array, *, limit: int, max_tensors: int
) -> Iterator[ReadItem]:
    """Yield items of at most `limit` bytes that hold whole tensors; a tensor above it is alone in its item.

    Parameters
    ----------
    starts, stops : arrays of int64
        Byte ranges of the shard's tensors, ascending and without holes between them.
    limit : int
        Bytes.
    max_tensors : int
        How many tensors an item holds at most.
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
    """Yield items for the wanted tensors; one above `limit` bytes is split into parts of at most that.

    Parameters
    ----------
    starts, stops : arrays of int64
        Byte ranges of the shard's tensors, ascending and without holes between them.
    is_wanted : array of bool
        Tensors to be read.
    is_alone : array of bool
        Tensors that do not share an item with others.
    limit : int
        Bytes; at least `GRAIN`.
    max_tensors : int
        How many tensors an item touches at most.
    max_gap : int
        Bytes. As many that nobody wants, between two wanted tensors of one item, are read with them. An item begins and
        ends with wanted ones all the same.
    """
    part = limit // GRAIN * GRAIN
    is_joined = is_wanted & ~is_alone
    is_read = is_joined | _gaps(starts, stops, is_wanted, is_joined, max_gap)
    # A run goes on as long as a tensor and the one before it may share an item.
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
    """Mark the unwanted tensors between two joined ones that are at most `max_gap` bytes apart."""
    marks = np.zeros(len(starts) + 1, np.int64)
    wanted = np.flatnonzero(is_wanted)
    if max_gap and len(wanted):
        left, right = wanted[:-1], wanted[1:]
        is_near = (starts[right] - stops[left] <= max_gap) & is_joined[left] & is_joined[right]
        np.add.at(marks, left[is_near] + 1, 1)
        np.add.at(marks, right[is_near], -1)
    return np.cumsum(marks)[:-1] > 0
