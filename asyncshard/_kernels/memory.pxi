# Memory that is leased and returned: the one exception to the rule that kernels are leaves.
#
# A Region is reserved address space. A Lease is a part of it that knows when its last view has died: NumPy arrays and
# torch tensors made from it keep it alive through slices, detach() and Parameter, which no weak reference to the first
# array could follow. Its __dealloc__ may run anywhere (in the cyclic collector, in any thread, after the loop has
# closed), so it takes no lock: it pushes its token on a list under the GIL, and whoever next touches the budget
# collects the list.

cimport cython
from cpython.buffer cimport PyBuffer_FillInfo
from libc.errno cimport errno
from libc.stdint cimport int64_t, uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memmove

cdef extern from * nogil:
    """
    #include <sys/mman.h>
    #ifndef MAP_NORESERVE
    #define MAP_NORESERVE 0
    #endif
    #ifdef MADV_HUGEPAGE
    #define asyncshard_advise_huge(address, size) madvise((address), (size), MADV_HUGEPAGE)
    #else
    #define asyncshard_advise_huge(address, size) 0
    #endif
    #define ASYNCSHARD_MAP_FLAGS (MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE)
    """
    int PROT_READ, PROT_WRITE, MADV_DONTNEED
    int ASYNCSHARD_MAP_FLAGS
    void* MAP_FAILED
    void* mmap(void* address, size_t size, int protection, int flags, int fd, long offset)
    int munmap(void* address, size_t size)
    int madvise(void* address, size_t size, int advice)
    int asyncshard_advise_huge(void* address, size_t size)

cdef enum:
    PAGE = 4096
    HUGE_PAGE = 2 << 20


@cython.final
@cython.no_gc
cdef class Region:
    """Reserve `nbytes` of address space, aligned to 2 MiB; a page takes memory when it is first written.

    Raises OSError (ENOMEM) where the system refuses to reserve as much. Unmapped when the last reference, a Lease's
    included, is gone.
    """

    cdef void* _mapping
    cdef size_t _mapped
    cdef char* _base
    cdef readonly size_t nbytes

    def __cinit__(self, size_t nbytes):
        if nbytes == 0 or nbytes > (<size_t>1 << 56):
            raise ValueError(f"a region of {nbytes} bytes cannot be reserved")
        self._mapping = NULL
        self._mapped = nbytes + HUGE_PAGE
        cdef void* mapping = mmap(NULL, self._mapped, PROT_READ | PROT_WRITE, ASYNCSHARD_MAP_FLAGS, -1, 0)
        if mapping == MAP_FAILED:
            raise OSError(errno, f"cannot reserve {nbytes} bytes of address space")
        self._mapping = mapping
        self._base = <char*>((<uintptr_t>mapping + HUGE_PAGE - 1) & ~<uintptr_t>(HUGE_PAGE - 1))
        self.nbytes = nbytes
        asyncshard_advise_huge(self._base, nbytes)  # advice: a refusal costs speed, nothing else

    def __dealloc__(self):
        if self._mapping != NULL:
            with nogil:
                munmap(self._mapping, self._mapped)

    cdef void _discard(self, size_t start, size_t stop) noexcept nogil:
        # Only whole pages: the bytes beside them may belong to a neighbour.
        start = (start + PAGE - 1) & ~<size_t>(PAGE - 1)
        stop = stop & ~<size_t>(PAGE - 1)
        if stop > start:
            madvise(self._base + start, stop - start, MADV_DONTNEED)

    def discard(self, size_t start, size_t stop):
        """Give the whole pages in [start, stop) back to the system; they read as zeros when touched again."""
        if start > stop or stop > self.nbytes:
            raise ValueError(f"[{start}, {stop}) is outside a region of {self.nbytes} bytes")
        with nogil:
            self._discard(start, stop)


cdef struct Return:
    int64_t token
    Return* following


@cython.final
cdef class ReturnList:
    """Tokens of the leases that have died, newest first, until `collect` takes them.

    Attributes
    ----------
    wake : callable or None
        Called without arguments from a dying lease while `is_awaited` is set. It may run in any thread and inside the
        garbage collector: it must take no lock.
    is_awaited : bool
        Whether a dying lease calls `wake`.
    discards : bool
        Whether a dying lease also gives its pages back to the system.
    """

    cdef Return* _first
    cdef public object wake
    cdef public bint is_awaited
    cdef public bint discards

    def collect(self):
        """Take all tokens."""
        cdef Return* entry = self._first
        cdef Return* following
        self._first = NULL
        tokens = []
        while entry != NULL:
            following = entry.following
            tokens.append(entry.token)
            free(entry)
            entry = following
        return tokens

    def __dealloc__(self):
        cdef Return* following
        while self._first != NULL:
            following = self._first.following
            free(self._first)
            self._first = following


@cython.final
@cython.no_gc
cdef class Lease:
    """The bytes [start, start + nbytes) of a region, writable, for as long as anything refers to them.

    Exports the buffer protocol (one dimension, unsigned bytes). When the last array, slice or tensor made from it dies,
    `token` is pushed on `returns`.
    """

    cdef Region _region
    cdef ReturnList _returns
    cdef Return* _entry
    cdef readonly size_t start
    cdef readonly size_t nbytes

    def __cinit__(self, Region region not None, size_t start, size_t nbytes, ReturnList returns not None, int64_t token):
        self._entry = NULL
        if start > region.nbytes or nbytes > region.nbytes - start:
            raise ValueError(f"[{start}, {start} + {nbytes}) is outside a region of {region.nbytes} bytes")
        self._region = region
        self._returns = returns
        self.start = start
        self.nbytes = nbytes
        # Made now, so that dying needs no memory.
        self._entry = <Return*>malloc(sizeof(Return))
        if self._entry == NULL:
            raise MemoryError
        self._entry.token = token

    def __len__(self):
        return self.nbytes

    @property
    def address(self):
        """The address of the first byte."""
        return <uintptr_t>(self._region._base + self.start)

    def __getbuffer__(self, Py_buffer* view, int flags):
        PyBuffer_FillInfo(view, self, self._region._base + self.start, self.nbytes, 0, flags)

    def __dealloc__(self):
        if self._entry == NULL:
            return
        if self._returns.discards:
            with nogil:
                self._region._discard(self.start, self.start + self.nbytes)
        self._entry.following = self._returns._first
        self._returns._first = self._entry
        if self._returns.is_awaited and self._returns.wake is not None:
            try:
                self._returns.wake()
            except Exception:  # a loop that has closed: its waiters are gone as well
                pass


@cython.final
@cython.no_gc
cdef class Span:
    """Borrowed memory: `nbytes` at `address`, writable, which `owner` keeps alive. Exports the buffer protocol."""

    cdef object _owner
    cdef char* _address
    cdef readonly size_t nbytes

    def __cinit__(self, uintptr_t address, size_t nbytes, owner):
        if address == 0 and nbytes > 0:
            raise ValueError("a span cannot begin at address 0")
        self._owner = owner
        self._address = <char*>address
        self.nbytes = nbytes

    def __len__(self):
        return self.nbytes

    def __getbuffer__(self, Py_buffer* view, int flags):
        PyBuffer_FillInfo(view, self, self._address, self.nbytes, 0, flags)


def spread(unsigned char[::1] buffer, const int64_t[::1] sources, const int64_t[::1] targets, const int64_t[::1] lengths):
    """Move the pieces [source, source + length) of `buffer` to their targets, each at or after its source.

    Sources and targets ascend and no piece overlaps the next, so moving the last piece first overwrites nothing that
    is still needed. Raises ValueError for arrays that break this or reach outside the buffer.
    """
    cdef Py_ssize_t count = sources.shape[0]
    cdef Py_ssize_t i
    cdef int64_t source_end = 0, target_end = 0
    if targets.shape[0] != count or lengths.shape[0] != count:
        raise ValueError("sources, targets and lengths differ in length")
    for i in range(count):
        if sources[i] < source_end or targets[i] < target_end or lengths[i] < 0 or targets[i] < sources[i]:
            raise ValueError(f"piece {i} overlaps the one before it or moves backwards")
        if lengths[i] > buffer.shape[0] or targets[i] > buffer.shape[0] - lengths[i]:
            raise ValueError(f"piece {i} ends outside the buffer")
        source_end = sources[i] + lengths[i]
        target_end = targets[i] + lengths[i]
    with nogil:
        for i in range(count - 1, -1, -1):
            if lengths[i] > 0:
                memmove(&buffer[0] + targets[i], &buffer[0] + sources[i], lengths[i])
