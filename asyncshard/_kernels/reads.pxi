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


cdef int64_t _read_vectors(
    int fd, int64_t offset, const iovec* buffers, Py_ssize_t count, const volatile int* is_stopped, int* error
) noexcept nogil:
    """Fill the buffers in turn from `offset` on; return the bytes read, fewer at the end of the file or when stopped."""
    cdef iovec step[VECTORS]
    cdef Py_ssize_t current = 0
    cdef size_t filled = 0  # of the current buffer
    cdef size_t wanted, taken
    cdef ssize_t got
    cdef int64_t total = 0
    cdef Py_ssize_t i
    cdef int vectors
    while True:
        while current < count and filled == buffers[current].iov_len:
            current += 1
            filled = 0
        if current == count or is_stopped[0]:
            return total
        vectors = 0
        wanted = 0
        i = current
        while i < count and vectors < VECTORS and wanted < READ_STEP:
            taken = buffers[i].iov_len - (filled if i == current else 0)
            if taken > READ_STEP - wanted:
                taken = READ_STEP - wanted
            step[vectors].iov_base = <char*>buffers[i].iov_base + (filled if i == current else 0)
            step[vectors].iov_len = taken
            wanted += taken
            vectors += 1
            i += 1
        got = preadv(fd, step, vectors, offset + total)
        if got < 0:
            if errno == EINTR:
                continue
            error[0] = errno
            return total
        if got == 0:
            return total
        total += got
        while got > 0:
            taken = buffers[current].iov_len - filled
            if <size_t>got < taken:
                filled += got
                break
            got -= taken
            current += 1
            filled = 0
        sched_yield()


def read_vectors(int fd, int64_t offset, buffers, StopFlag stop not None):
    """Read from `offset` of a file into writable `buffers`, one after the other, without the GIL.

    Continues after short reads and EINTR. Returns the number of bytes read and an errno: (n, 0) with n less than the
    buffers' total means the end of the file, or `stop`; with another errno the read failed after n bytes.
    """
    cdef Py_ssize_t count = len(buffers)
    cdef Py_ssize_t held = 0
    cdef Py_ssize_t i
    cdef int error = 0
    cdef int64_t total
    cdef Py_buffer* views = <Py_buffer*>malloc((count + 1) * sizeof(Py_buffer))
    cdef iovec* vectors = <iovec*>malloc((count + 1) * sizeof(iovec))
    try:
        if views == NULL or vectors == NULL:
            raise MemoryError
        for buffer in buffers:
            PyObject_GetBuffer(buffer, &views[held], PyBUF_WRITABLE)
            vectors[held].iov_base = views[held].buf
            vectors[held].iov_len = views[held].len
            held += 1
        with nogil:
            total = _read_vectors(fd, offset, vectors, count, &stop._is_set, &error)
        return total, error
    finally:
        for i in range(held):
            PyBuffer_Release(&views[i])
        free(vectors)
        free(views)
