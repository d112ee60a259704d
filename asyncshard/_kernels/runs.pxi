# Runs of bytes that lie apart in one file or buffer and together in another: slices of tensors.
#
# Short ranges near each other are read together with the gaps between them, into scratch memory that stays in a core's
# cache. The wanted bytes are copied out of it.

from libc.string cimport memcpy

cdef extern from * nogil:
    """
    #define asyncshard_prefetch(address) __builtin_prefetch((address), 0, 0)
    """
    void asyncshard_prefetch(const void* address)

cdef enum:
    SCRATCH_BYTES = 1 << 18
    CACHE_LINE = 64
    LINES_AHEAD = 8
    CALLS_PER_TURN = 64


def copy_runs(
    const unsigned char[::1] source,
    unsigned char[::1] target,
    const int64_t[::1] source_offsets,
    const int64_t[::1] target_offsets,
    const int64_t[::1] lengths,
):
    """Copy pieces of a buffer to places in another one, without the GIL: to gather them, or to scatter them.

    Raises ValueError for arrays of different lengths, a piece outside a buffer, or buffers that share memory.
    """
    cdef Py_ssize_t count = lengths.shape[0]
    cdef Py_ssize_t i, fault
    if source_offsets.shape[0] != count or target_offsets.shape[0] != count:
        raise ValueError("source_offsets, target_offsets and lengths differ in length")
    if count == 0:
        return
    with nogil:
        fault = _first_outside(&source_offsets[0], &lengths[0], count, source.shape[0])
        if fault < 0:
            fault = _first_outside(&target_offsets[0], &lengths[0], count, target.shape[0])
    if fault >= 0:
        raise ValueError(f"run {fault} lies outside its buffer")
    if source.shape[0] == 0 or target.shape[0] == 0:
        return
    cdef const char* taken = <const char*>&source[0]
    cdef char* given = <char*>&target[0]
    if taken < given + target.shape[0] and given < taken + source.shape[0]:
        raise ValueError("source and target share memory")
    with nogil:
        for i in range(count):
            if i + 1 < count:
                _prefetch(taken + source_offsets[i + 1], lengths[i + 1])
            memcpy(given + target_offsets[i], taken + source_offsets[i], lengths[i])


cdef inline void _prefetch(const char* run, int64_t nbytes) noexcept nogil:
    """Have the beginning of the next run on its way while this one is copied: hardware sees only what goes on."""
    cdef int64_t at = 0
    while at < nbytes and at < LINES_AHEAD * CACHE_LINE:
        asyncshard_prefetch(run + at)
        at += CACHE_LINE


cdef Py_ssize_t _first_outside(
    const int64_t* offsets, const int64_t* lengths, Py_ssize_t count, int64_t nbytes
) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(count):
        if lengths[i] < 0 or offsets[i] < 0 or lengths[i] > nbytes or offsets[i] > nbytes - lengths[i]:
            return i
    return -1


cdef inline void _put(Cursor* cursor, const char* source, size_t nbytes) noexcept nogil:
    """Copy to where the cursor stands, and move it on."""
    cdef size_t taken
    while nbytes > 0:
        _skip_full(cursor)
        taken = cursor.buffers[cursor.current].iov_len - cursor.filled
        if taken > nbytes:
            taken = nbytes
        memcpy(<char*>cursor.buffers[cursor.current].iov_base + cursor.filled, source, taken)
        cursor.filled += taken
        source += taken
        nbytes -= taken


def gather_runs(const unsigned char[::1] source, const int64_t[::1] offsets, const int64_t[::1] lengths, buffers):
    """Fill writable `buffers`, one after the other, with pieces of `source`, without the GIL.

    Raises ValueError for a piece outside the source, pieces that do not add up to the buffers, or shared memory.
    """
    cdef Py_ssize_t count = lengths.shape[0]
    cdef Py_ssize_t i
    cdef _Views views = _Views(buffers)
    cdef Cursor cursor = Cursor(views.vectors, views.count, 0, 0)
    cdef int64_t total = 0
    if offsets.shape[0] != count:
        raise ValueError("offsets and lengths differ in length")
    if count > 0:
        i = _first_outside(&offsets[0], &lengths[0], count, source.shape[0])
        if i >= 0:
            raise ValueError(f"run {i} lies outside its buffer")
    for i in range(count):
        total += lengths[i]
    if total != views.nbytes:
        raise ValueError(f"the runs have {total} bytes and the buffers {views.nbytes}")
    if total == 0:
        return
    cdef const char* taken = <const char*>&source[0]
    for i in range(views.count):
        if taken < <char*>views.vectors[i].iov_base + views.vectors[i].iov_len and (
            <char*>views.vectors[i].iov_base < taken + source.shape[0]
        ):
            raise ValueError("source and buffers share memory")
    with nogil:
        for i in range(count):
            _put(&cursor, taken + offsets[i], lengths[i])


cdef int64_t _read_ranges(
    int fd,
    const int64_t* offsets,
    const int64_t* lengths,
    Py_ssize_t count,
    Cursor* cursor,
    int64_t max_gap,
    char* scratch,
    const volatile int* is_stopped,
    int* error,
) noexcept nogil:
    cdef Py_ssize_t first = 0, last, i
    cdef int64_t total = 0, got, end
    cdef int64_t since_turn = 0
    cdef int calls = 0
    cdef iovec cover
    cdef Cursor inside
    while first < count:
        if is_stopped[0]:
            return total
        end = offsets[first] + lengths[first]
        last = first + 1
        while (
            last < count
            and offsets[last] - end <= max_gap
            and offsets[last] + lengths[last] - offsets[first] <= SCRATCH_BYTES
        ):
            end = offsets[last] + lengths[last]
            last += 1
        if last == first + 1:
            got = _read_range(fd, offsets[first], lengths[first], cursor, is_stopped, error)
            total += got
            if got < lengths[first]:
                return total
        else:
            cover.iov_base = scratch
            cover.iov_len = end - offsets[first]
            inside = Cursor(&cover, 1, 0, 0)
            got = _read_range(fd, offsets[first], cover.iov_len, &inside, is_stopped, error)
            if got < <int64_t>cover.iov_len:
                return total
            for i in range(first, last):
                _put(cursor, scratch + (offsets[i] - offsets[first]), lengths[i])
                total += lengths[i]
        since_turn += end - offsets[first]
        calls += 1
        if since_turn >= READ_STEP or calls >= CALLS_PER_TURN:
            sched_yield()
            since_turn = 0
            calls = 0
        first = last
    return total


def read_ranges(
    int fd, const int64_t[::1] offsets, const int64_t[::1] lengths, buffers, int64_t max_gap, StopFlag stop not None
):
    """Read ranges of a file, one after the other, into writable `buffers`, one after the other, without the GIL.

    The ranges ascend and do not overlap. Those at most `max_gap` bytes apart are read together while they fit a
    scratch of 256 KiB; a longer one, or one alone, is read straight into place. Returns the bytes read and an errno
    as `read_vectors` does; bytes of the ranges alone are counted. Raises ValueError for ranges that break this, or do
    not add up to the buffers.
    """
    cdef Py_ssize_t count = lengths.shape[0]
    cdef Py_ssize_t i
    cdef _Views views = _Views(buffers)
    cdef Cursor cursor = Cursor(views.vectors, views.count, 0, 0)
    cdef int error = 0
    cdef int64_t total = 0, end = 0
    if offsets.shape[0] != count:
        raise ValueError("offsets and lengths differ in length")
    for i in range(count):
        if lengths[i] < 0 or offsets[i] < end or lengths[i] > (<int64_t>1 << 62) - offsets[i]:
            raise ValueError(f"range {i} is out of order, or has no length")
        end = offsets[i] + lengths[i]
        total += lengths[i]
    if total != views.nbytes:
        raise ValueError(f"the ranges have {total} bytes and the buffers {views.nbytes}")
    if count == 0:
        return 0, 0
    cdef char* scratch = <char*>malloc(SCRATCH_BYTES)
    if scratch == NULL:
        raise MemoryError
    try:
        with nogil:
            total = _read_ranges(
                fd, &offsets[0], &lengths[0], count, &cursor, max_gap, scratch, &stop._is_set, &error
            )
    finally:
        free(scratch)
    return total, error
