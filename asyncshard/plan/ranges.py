"""Byte ranges that are read together: those that lie near each other, up to a limit."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from asyncshard._typing import Int64Array

_MOST = np.iinfo(np.int64).max


def merge_ranges(
    offsets: Int64Array, lengths: Int64Array, *, max_gap: int, max_bytes: int, max_count: int
) -> Int64Array:
    """Return the bounds of groups: group `i` is of the ranges from ``bounds[i]`` up to ``bounds[i + 1]``.

    Each group takes as many ranges as the limits allow; a range above `max_bytes` is a group by itself. Of no ranges
    the bounds are those of no group, ``[0]``.

    Parameters
    ----------
    offsets, lengths : arrays of int64
        The ranges, ascending; no two overlap. They may be empty.
    max_gap : int
        Bytes between two neighbours of a group at most.
    max_bytes : int
        Bytes from a group's beginning to its end at most, with the gaps.
    max_count : int
        Ranges in a group at most; at least 1.
    """
    count = len(offsets)
    if not count:
        return np.zeros(1, np.int64)
    ends = offsets + lengths
    bounds = np.concatenate(([0], np.flatnonzero(offsets[1:] - ends[:-1] > max_gap) + 1, [count]))
    firsts, lasts = bounds[:-1], bounds[1:]
    is_cut = (ends[lasts - 1] - offsets[firsts] > max_bytes) | (lasts - firsts > max_count)
    # One by one, but only where there is something to cut: ranges alone may be very many.
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
    """Yield where new groups begin in the ranges from `first` up to `last`, no two of which are too far apart."""
    while True:
        reach = min(int(offsets[first]) + max_bytes, _MOST)
        fitting = int(np.searchsorted(ends[first : min(first + max_count, last)], reach, side="right"))
        first += max(fitting, 1)
        if first >= last:
            return
        yield first
