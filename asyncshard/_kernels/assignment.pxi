# The assignment of parameters to ranks, and the check of shard shapes.

from libc.stdint cimport INT64_MAX, int64_t, uint8_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset

cdef struct SizedParam:
    int64_t size
    Py_ssize_t index


cdef struct RankLoad:
    int64_t load
    int64_t rank


cdef enum:
    RADIX_BITS = 11
    RADIX = 1 << RADIX_BITS


cdef SizedParam* _sort_largest_first(
    SizedParam* params, SizedParam* spare, Py_ssize_t count, int64_t largest
) noexcept nogil:
    # A radix sort: stable, which keeps equal sizes in order of index, and without a pass for digits all zero.
    cdef Py_ssize_t positions[RADIX]
    cdef Py_ssize_t i, digit, total, next_total
    cdef int shift = 0
    while shift < 63 and largest >> shift:
        memset(positions, 0, sizeof(positions))
        for i in range(count):
            positions[((largest - params[i].size) >> shift) & (RADIX - 1)] += 1
        total = 0
        for digit in range(RADIX):
            next_total = total + positions[digit]
            positions[digit] = total
            total = next_total
        for i in range(count):
            digit = ((largest - params[i].size) >> shift) & (RADIX - 1)
            spare[positions[digit]] = params[i]
            positions[digit] += 1
        params, spare = spare, params
        shift += RADIX_BITS
    return params


cdef inline bint _is_less_loaded(RankLoad a, RankLoad b) noexcept nogil:
    return a.load < b.load or (a.load == b.load and a.rank < b.rank)


cdef void _sink_root(RankLoad* heap, Py_ssize_t count) noexcept nogil:
    cdef RankLoad root = heap[0]
    cdef Py_ssize_t hole = 0
    cdef Py_ssize_t child = 1
    while child < count:
        if child + 1 < count and _is_less_loaded(heap[child + 1], heap[child]):
            child += 1
        if not _is_less_loaded(heap[child], root):
            break
        heap[hole] = heap[child]
        hole = child
        child = 2 * hole + 1
    heap[hole] = root


cdef void _assign_in_order(
    const SizedParam* params, Py_ssize_t count, RankLoad* heap, Py_ssize_t num_heaped, int64_t[::1] out
) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(num_heaped):
        heap[i].load = 0
        heap[i].rank = i  # equal loads in order of rank are a heap already
    for i in range(count):
        out[params[i].index] = heap[0].rank
        heap[0].load += params[i].size
        _sink_root(heap, num_heaped)


def assign_shards(const int64_t[::1] sizes, int64_t num_ranks, int64_t[::1] out):
    """Assign each parameter a rank: the largest parameter first, each to the rank with the least load, in O(n log k).

    Parameters
    ----------
    sizes : n × int64
        The sizes of the parameters, not negative; their sum fits int64.
    num_ranks : int
        The number of ranks, at least 1.
    out : n × int64
        Receives the rank of each parameter. Of equal sizes the lower index is first, of equal loads the lower rank.

    Raises
    ------
    ValueError
        An argument is out of its bounds; ``out`` is unchanged.
    """
    cdef Py_ssize_t count = sizes.shape[0]
    cdef Py_ssize_t i
    cdef Py_ssize_t num_heaped
    cdef int64_t total = 0
    cdef int64_t largest = 0
    cdef SizedParam* params = NULL
    cdef RankLoad* heap = NULL
    if out.shape[0] != count:
        raise ValueError(f"out has room for {out.shape[0]} ranks, there are {count} parameters")
    if num_ranks < 1:
        raise ValueError(f"num_ranks must be at least 1, got {num_ranks}")
    if count == 0:
        return
    # Each parameter opens at most one more rank, the lowest idle one: ranks from n on stay idle.
    num_heaped = <Py_ssize_t> min(num_ranks, <int64_t> count)
    try:
        params = <SizedParam*> malloc(2 * count * sizeof(SizedParam))
        heap = <RankLoad*> malloc(num_heaped * sizeof(RankLoad))
        if params == NULL or heap == NULL:
            raise MemoryError(f"no memory to sort {count} parameters")
        for i in range(count):
            if sizes[i] < 0:
                raise ValueError(f"the size of parameter {i} is negative: {sizes[i]}")
            if sizes[i] > INT64_MAX - total:
                raise ValueError(f"the sizes up to parameter {i} add up to more than 2**63 - 1")
            total += sizes[i]
            largest = max(largest, sizes[i])
            params[i].size = sizes[i]
            params[i].index = i
        with nogil:
            _assign_in_order(
                _sort_largest_first(params, params + count, count, largest), count, heap, num_heaped, out
            )
    finally:
        free(params)
        free(heap)


cdef inline int64_t _chunk_extent(int64_t size, int64_t num_chunks, int64_t index) noexcept nogil:
    # torch.chunk's rule. Neither the rounding up nor index × chunk may overflow.
    cdef int64_t chunk = size // num_chunks + (size % num_chunks != 0)
    if chunk == 0 or index > size // chunk:
        return 0
    return min(chunk, size - index * chunk)


cdef uint8_t _shape_faults(
    const int64_t* shape, int64_t ndim, const int64_t* local, int64_t local_ndim,
    int64_t shard_dim, int64_t num_shards, int64_t rank, int64_t world_size,
) noexcept nogil:
    cdef int64_t dim
    cdef int64_t expected
    cdef uint8_t faults = 0
    if num_shards < 1 or (num_shards != 1 and world_size > 0 and num_shards != world_size):
        faults |= 1
    if ndim == 0:
        if num_shards != 1 or shard_dim < -1 or shard_dim > 0:
            faults |= 2
    elif shard_dim < -ndim or shard_dim >= ndim:
        faults |= 2
    if faults or local_ndim < 0 or (num_shards > 1 and (rank < 0 or rank >= num_shards)):
        return faults
    if local_ndim != ndim:
        return 4
    if shard_dim < 0:
        shard_dim += ndim
    for dim in range(ndim):
        expected = shape[dim]
        if dim == shard_dim and num_shards > 1:
            expected = _chunk_extent(shape[dim], num_shards, rank)
        if local[dim] != expected:
            return 4
    return 0


def check_shard_shapes(
    const int64_t[::1] dims,
    const int64_t[::1] shape_offsets,
    const int64_t[::1] shape_ndims,
    const int64_t[::1] local_offsets,
    const int64_t[::1] local_ndims,
    const int64_t[::1] shard_dims,
    const int64_t[::1] num_shards,
    int64_t rank,
    int64_t world_size,
    uint8_t[::1] faults,
):
    """Check n shards against the world and against ``torch.chunk``'s rule.

    Parameters
    ----------
    dims : int64
        The dimensions of all shapes, not negative. Shape ``i`` is ``dims[shape_offsets[i]:][:shape_ndims[i]]``. Its
        local shape is given in the same way by ``local_offsets`` and ``local_ndims``; -1 means no local shape.
    shard_dims, num_shards : n × int64
        The dimension along which each tensor is cut, and the number of its shards.
    rank, world_size : int
        The rank and the number of ranks; -1 if unknown, and then rules that need the number are not checked.
    faults : n × uint8
        Receives a sum for each shard: 1 for a wrong number of shards, 2 for a shard dimension out of range, 4 for a
        local shape that is not this rank's. The local shape is only checked if the other rules hold.

    Raises
    ------
    ValueError
        The lengths differ, a shape lies outside ``dims``, or a dimension is negative.
    """
    cdef Py_ssize_t count = faults.shape[0]
    cdef Py_ssize_t num_dims = dims.shape[0]
    cdef Py_ssize_t i
    cdef const int64_t* base = NULL
    if not (
        shape_offsets.shape[0] == count
        and shape_ndims.shape[0] == count
        and local_offsets.shape[0] == count
        and local_ndims.shape[0] == count
        and shard_dims.shape[0] == count
        and num_shards.shape[0] == count
    ):
        raise ValueError("offsets, ndims, shard_dims, num_shards and faults must have one length")
    if num_dims:
        base = &dims[0]
    for i in range(num_dims):
        if dims[i] < 0:
            raise ValueError(f"dimension {i} is negative: {dims[i]}")
    for i in range(count):
        if not (0 <= shape_offsets[i] <= num_dims and 0 <= shape_ndims[i] <= num_dims - shape_offsets[i]):
            raise ValueError(f"shape {i} lies outside dims")
        if not (0 <= local_offsets[i] <= num_dims and -1 <= local_ndims[i] <= num_dims - local_offsets[i]):
            raise ValueError(f"local shape {i} lies outside dims")
    with nogil:
        for i in range(count):
            faults[i] = _shape_faults(
                base + shape_offsets[i], shape_ndims[i], base + local_offsets[i], local_ndims[i],
                shard_dims[i], num_shards[i], rank, world_size,
            )
