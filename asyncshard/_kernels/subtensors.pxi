# Address intervals that lie inside another interval, which is contiguous.

from libc.stdint cimport int64_t, uint8_t, uint64_t
from libc.stdlib cimport free, malloc, qsort

cdef struct Interval:
    uint64_t start
    uint64_t stop
    int64_t group
    int64_t name_rank
    Py_ssize_t index
    uint8_t contiguous


cdef int _compare_intervals(const void* left, const void* right) noexcept nogil:
    # In this order each interval comes after everything that may cover it, so that one look back decides.
    cdef const Interval* a = <const Interval*> left
    cdef const Interval* b = <const Interval*> right
    if a.group != b.group:
        return -1 if a.group < b.group else 1
    if a.start != b.start:
        return -1 if a.start < b.start else 1
    if a.stop != b.stop:
        return -1 if a.stop > b.stop else 1
    if a.contiguous != b.contiguous:
        return -1 if a.contiguous else 1
    if a.name_rank != b.name_rank:
        return -1 if a.name_rank < b.name_rank else 1
    return -1 if a.index < b.index else 1


cdef void _sweep_intervals(Interval* intervals, Py_ssize_t count, uint8_t[::1] keep) noexcept nogil:
    cdef Py_ssize_t i
    cdef Interval* interval
    cdef int64_t group = 0
    cdef uint64_t covered_to = 0
    cdef bint has_cover = False
    qsort(intervals, count, sizeof(Interval), _compare_intervals)
    for i in range(count):
        interval = &intervals[i]
        if i == 0 or interval.group != group:
            group = interval.group
            has_cover = False
        # The starts only grow, so the contiguous interval that reaches furthest covers this one or none does.
        keep[interval.index] = not (has_cover and interval.stop <= covered_to)
        if interval.contiguous and (not has_cover or interval.stop > covered_to):
            has_cover = True
            covered_to = interval.stop


def find_uncovered(
    const uint64_t[::1] starts,
    const uint64_t[::1] stops,
    const uint8_t[::1] contiguous,
    const int64_t[::1] groups,
    const int64_t[::1] name_ranks,
    uint8_t[::1] keep,
):
    """Mark the intervals that no other contiguous interval of their group covers, in O(n log n).

    Parameters
    ----------
    starts, stops : n × uint64
        Addresses ``[start, stop)``.
    contiguous : n × uint8
        Whether the interval may cover others.
    groups : n × int64
        Intervals of different groups never meet.
    name_ranks : n × int64
        Which of two equal contiguous intervals stays: the lower rank.
    keep : n × uint8
        Written: 1 where the interval stays, else 0.

    Raises
    ------
    ValueError
        The lengths differ, or an interval ends before it starts.
    """
    cdef Py_ssize_t count = starts.shape[0]
    cdef Py_ssize_t i
    cdef Interval* intervals
    if not (
        stops.shape[0] == count
        and contiguous.shape[0] == count
        and groups.shape[0] == count
        and name_ranks.shape[0] == count
        and keep.shape[0] == count
    ):
        raise ValueError("starts, stops, contiguous, groups, name_ranks and keep must have one length")
    if count == 0:
        return
    intervals = <Interval*> malloc(count * sizeof(Interval))
    if intervals == NULL:
        raise MemoryError(f"no memory to sort {count} intervals")
    try:
        for i in range(count):
            if stops[i] < starts[i]:
                raise ValueError(f"interval {i} ends at {stops[i]}, before its start {starts[i]}")
            intervals[i].start = starts[i]
            intervals[i].stop = stops[i]
            intervals[i].contiguous = contiguous[i] != 0
            intervals[i].group = groups[i]
            intervals[i].name_rank = name_ranks[i]
            intervals[i].index = i
        with nogil:
            _sweep_intervals(intervals, count, keep)
    finally:
        free(intervals)
