# Positional reads into memory, in small steps without the GIL.
#
# A step of 1 MiB bounds how long a core is busy in one system call (the event loop's thread wants it too) and how long
# a cancelled read may go on.

from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.errno cimport EINTR

cdef extern from "<sys/uio.h>" nogil:
    cdef struct iovec:
        void* iov_base
        size_t iov_len
    ssize_t preadv(int fd, const iovec* vectors, int count, int64_t offset)

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef enum:
    READ_STEP = 1 << 20
    VECTORS = 256


@cython.final
cdef class StopFlag:
    """Tells a read in another thread to end after the step it is in."""

    cdef volatile int _is_set

    def set(self):
        self._is_set = 1

    def is_set(self):
        return self._is_set != 0


cdef struct Cursor:
    # The target of the next byte: buffers that are filled one after the other.
    const iovec* buffers
    Py_ssize_t count
    Py_ssize_t current
    size_t filled  # of the current buffer


cdef inline void _skip_full(Cursor* cursor) noexcept nogil:
    while cursor.current < cursor.count and cursor.filled == cursor.buffers[cursor.current].iov_len:
        cursor.current += 1
        cursor.filled = 0


cdef inline int _vectors_ahead(const Cursor* cursor, size_t limit, iovec* vectors) noexcept nogil:
    """List the memory that the next `limit` bytes at most go to; return in how many vectors."""
    cdef Py_ssize_t i = cursor.current
    cdef size_t skipped = cursor.filled
    cdef size_t taken
    cdef int count = 0
    while i < cursor.count and count < VECTORS and limit > 0:
        taken = cursor.buffers[i].iov_len - skipped
        if taken > limit:
            taken = limit
        vectors[count].iov_base = <char*>cursor.buffers[i].iov_base + skipped
        vectors[count].iov_len = taken
        limit -= taken
        count += 1
        i += 1
        skipped = 0
    return count


cdef inline void _advance(Cursor* cursor, size_t nbytes) noexcept nogil:
    cdef size_t taken
    while nbytes > 0:
        taken = cursor.buffers[cursor.current].iov_len - cursor.filled
        if nbytes < taken:
            cursor.filled += nbytes
            return
        nbytes -= taken
        cursor.current += 1
        cursor.filled = 0


cdef int64_t _read_range(
    int fd, int64_t offset, int64_t nbytes, Cursor* cursor, const volatile int* is_stopped, int* error
) noexcept nogil:
    """Read `nbytes` from `offset` on; return the bytes read, fewer at the end of the file or when stopped."""
    cdef iovec step[VECTORS]
    cdef ssize_t got
    cdef int64_t total = 0
    cdef int vectors
    while True:
        _skip_full(cursor)
        if total == nbytes or is_stopped[0]:
            return total
        vectors = _vectors_ahead(cursor, READ_STEP if nbytes - total > READ_STEP else nbytes - total, step)
        got = preadv(fd, step, vectors, offset + total)
        if got < 0:
            if errno == EINTR:
                continue
            error[0] = errno
            return total
        if got == 0:
            return total
        total += got
        _advance(cursor, got)
        if nbytes > READ_STEP:
            sched_yield()


cdef class _Views:
    """Writable buffers, held for as long as this lives."""

    cdef Py_buffer* _views
    cdef iovec* vectors
    cdef Py_ssize_t count
    cdef int64_t nbytes

    def __cinit__(self, buffers):
        cdef Py_ssize_t length = len(buffers)
        self.count = 0
        self.nbytes = 0
        self._views = <Py_buffer*>malloc((length + 1) * sizeof(Py_buffer))
        self.vectors = <iovec*>malloc((length + 1) * sizeof(iovec))
        if self._views == NULL or self.vectors == NULL:
            raise MemoryError
        for buffer in buffers:
            PyObject_GetBuffer(buffer, &self._views[self.count], PyBUF_WRITABLE)
            self.vectors[self.count].iov_base = self._views[self.count].buf
            self.vectors[self.count].iov_len = self._views[self.count].len
            self.nbytes += self._views[self.count].len
            self.count += 1
            if self.count == length:  # whatever has been appended meanwhile
                break

    def __dealloc__(self):
        cdef Py_ssize_t i
        for i in range(self.count):
            PyBuffer_Release(&self._views[i])
        free(self._views)
        free(self.vectors)


def read_vectors(int fd, int64_t offset, buffers, StopFlag stop not None):
    """Read from `offset` of a file into writable `buffers`, one after the other, without the GIL.

    Continues after short reads and EINTR. Returns the number of bytes read and an errno: (n, 0) with n less than the
    buffers' total means the end of the file, or `stop`; with another errno the read failed after n bytes.
    """
    cdef _Views views = _Views(buffers)
    cdef Cursor cursor = Cursor(views.vectors, views.count, 0, 0)
    cdef int error = 0
    cdef int64_t total
    with nogil:
        total = _read_range(fd, offset, views.nbytes, &cursor, &stop._is_set, &error)
    return total, error
