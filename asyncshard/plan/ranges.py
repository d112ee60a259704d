"""Groups of byte ranges that are read together, because they lie near each other."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from asyncshard._typing import Int64Array

_MOST = np.iinfo(np.int64).max


def merge_ranges(
    offsets: Int64Array, lengths: Int64Array, *, max_gap: int, max_bytes: int, max_count: int
) -> Int64Array:
    """Merge ranges into groups, and return the bounds: group `i` is the ranges ``bounds[i]`` to ``bounds[i + 1] - 1``.

    Each group takes as many ranges as the limits allow. A range longer than `max_bytes` is a group by itself. Without
    ranges there is no group, and the bounds are ``[0]``.

    Parameters
    ----------
    offsets, lengths : arrays of int64
        The ranges, ascending and without overlaps. A range may be empty.
    max_gap : int
        The most bytes between two neighbouring ranges of a group.
    max_bytes : int
        The most bytes from the beginning of a group to its end, including the gaps.
    max_count : int
        The most ranges in a group; at least 1.
    """
    count = len(offsets)
    if not count:
        return np.zeros(1, np.int64)
    ends = offsets + lengths
    bounds = np.concatenate(([0], np.flatnonzero(offsets[1:] - ends[:-1] > max_gap) + 1, [count]))
    firsts, lasts = bounds[:-1], bounds[1:]
    is_cut = (ends[lasts - 1] - offsets[firsts] > max_bytes) | (lasts - firsts > max_count)
    # The loop visits only groups that must be cut, because there may be very many groups of one range.
    is_cut &= lasts - firsts > 1
    if not is_cut.any():
        return bounds
    cuts = [
        cut
        for number in np.flatnonzero(is_cut).tolist()
        for cut in _cuts(offsets, ends, int(firsts[number]), int(lasts[number]), max_bytes, max_count)
    ]
    return np.sort(np.concatenate((bounds, np.array(cuts, np.int64))))


def _cuts(
    offsets: Int64Array, ends: Int64Array, first: int, last: int, max_bytes: int, max_count: int
) -> Iterator[int]:
    """Yield the first range of each further group among the ranges from `first` to `last`, whose gaps are all small."""
    while True:
        reach = min(int(offsets[first]) + max_bytes, _MOST)
        fitting = int(np.searchsorted(ends[first : min(first + max_count, last)], reach, side="right"))
        first += max(fitting, 1)
        if first >= last:
            return
        yield first
