"""Files on a local or mounted disk.

Reads are positional, in threads of the store's own, in steps of 1 MiB without the GIL. There is no memory map: a file
that shrinks would end the process with SIGBUS. Every read checks, before and after, that the file is still the one that
was opened.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Sequence
from typing import NoReturn

import aiofiles
import numpy as np

from asyncshard._core import StopFlag, read_ranges, read_vectors
from asyncshard._typing import Int64Array
from asyncshard.errors import TruncatedError
from asyncshard.stores.base import Listing, ObjectMeta, Pacing, State, Store, require_small
from asyncshard.stores.local import files
from asyncshard.stores.ranges import Scratch
from asyncshard.tasks.threads import DaemonThreads, wait_to_end

DEFAULT_MAX_WORKERS = 2
DEFAULT_MAX_GAP_BYTES = 8 << 10
_MAX_OPEN_FILES = 8


class LocalStore(Store):
    """A directory of files, or one file.

    Parameters
    ----------
    path : str
        The directory or file; it may be a symbolic link, since the user named it.
    max_workers : int, optional
        Reads in flight at most, each in a thread; 2 saturate memory bandwidth on most machines.
    page_cache : {"keep", "drop"}
        Whether the kernel keeps files in its page cache after they were read. "drop" suits weights larger than memory.
    allow_symlinks : bool
        Whether links among the files may lead outside the directory.
    max_gap_bytes : int
        Gaps up to this many bytes between wanted byte ranges are read too. The default is what can be copied out of
        the page cache in the time of a system call.
    """

    has_own_scratch = True

    def __init__(
        self,
        path: str,
        *,
        max_workers: int | None = None,
        page_cache: str = "keep",
        allow_symlinks: bool = False,
        max_gap_bytes: int = DEFAULT_MAX_GAP_BYTES,
    ) -> None:
        if page_cache not in ("keep", "drop"):
            raise ValueError(f'page_cache must be "keep" or "drop", not {page_cache!r}')
        if page_cache == "drop" and not hasattr(os, "posix_fadvise"):
            raise ValueError('page_cache="drop" needs posix_fadvise, which this system does not have')
        if max_gap_bytes < 0:
            raise ValueError(f"max_gap_bytes must be 0 or more, not {max_gap_bytes}")
        self.pacing = Pacing(max_gap_bytes=max_gap_bytes)
        self.url = os.path.abspath(path)
        self._root = self.url
        self._drops_cache = page_cache == "drop"
        self._allow_symlinks = allow_symlinks
        self.max_workers = max_workers or DEFAULT_MAX_WORKERS
        self._threads = DaemonThreads(self.max_workers, "asyncshard-read")
        self._files = files.OpenFiles(_MAX_OPEN_FILES)
        self._state = State.OPEN
        self._reads_in_flight = 0

    def _facts(self) -> tuple[str, ...]:
        return self._state.value, f"{self.max_workers} workers", f"{self._reads_in_flight} reads in flight"

    def path_of(self, name: str) -> str:
        return os.path.join(self._root, name)

    def fingerprint(self, meta: ObjectMeta) -> str | None:
        # Without device and inode, which a file system over a network numbers anew at each mount. With the time of
        # the inode's change, since tools that copy files give them any other time they like.
        version: files.FileVersion = meta.version
        return f"file:{version.modified_ns} {version.changed_ns} {version.size}"

    async def aclose(self) -> None:
        if self._state is not State.OPEN:
            return
        self._state = State.CLOSING
        try:
            await self._threads.run_to_end(self._files.close)
        finally:
            await self._threads.aclose()
            self._state = State.CLOSED

    async def list(self) -> Listing:
        listing = await self._threads.run(self._list)
        if listing.is_file:
            self._root = os.path.dirname(self.url)
        return listing

    def _list(self) -> Listing:
        with files.translated(self.url):
            status = os.stat(self.url)
            if os.path.isdir(self.url):
                return Listing(tuple(sorted(os.listdir(self.url))), is_file=False)
        files.require_regular(status, self.url)
        return Listing((os.path.basename(self.url),), is_file=True)

    def _resolve(self, name: str) -> str:
        path = self.path_of(name)
        if path == self.url:  # the file that the user named
            return path
        return files.confine(self._root, name, allow_symlinks=self._allow_symlinks)

    async def open(self, name: str, nbytes: int) -> tuple[ObjectMeta, bytes]:
        return await self._threads.run(self._open, name, nbytes)

    def _open(self, name: str, nbytes: int) -> tuple[ObjectMeta, bytes]:
        path = self._resolve(name)
        fd = files.open_regular(path)
        try:
            with files.translated(path):
                status = os.fstat(fd)
                version = files.version_of(status)
                head = bytearray(min(nbytes, status.st_size))
            self._fill(fd, path, 0, [memoryview(head)], StopFlag())
            files.require_unchanged(fd, path, version)
        except BaseException:
            os.close(fd)
            raise
        self._files.keep(fd, path, version)
        return ObjectMeta(name, status.st_size, version), bytes(head)

    async def read_into(self, meta: ObjectMeta, start: int, buffers: Sequence[memoryview]) -> None:
        stop = StopFlag()
        self._reads_in_flight += 1
        try:
            await self._threads.run(self._read, meta, start, buffers, stop, on_cancel=stop.set)
        finally:
            self._reads_in_flight -= 1

    def _read(self, meta: ObjectMeta, start: int, buffers: Sequence[memoryview], stop: StopFlag) -> None:
        path = self.path_of(meta.name)
        with self._files.borrow(path, meta.version) as fd:
            count = self._fill(fd, path, start, buffers, stop)
            files.require_unchanged(fd, path, meta.version)
            if self._drops_cache:
                os.posix_fadvise(fd, start, count, os.POSIX_FADV_DONTNEED)

    async def read_ranges(
        self,
        meta: ObjectMeta,
        offsets: Int64Array,
        lengths: Int64Array,
        buffers: Sequence[memoryview],
        *,
        max_gap: int | None = None,
        scratch: Scratch | None = None,
    ) -> None:
        if not len(offsets):
            return
        stop = StopFlag()
        gap = self.pacing.max_gap_bytes if max_gap is None else max_gap
        self._reads_in_flight += 1
        try:
            await self._threads.run(self._read_ranges, meta, offsets, lengths, buffers, gap, stop, on_cancel=stop.set)
        finally:
            self._reads_in_flight -= 1

    def _read_ranges(
        self,
        meta: ObjectMeta,
        offsets: Int64Array,
        lengths: Int64Array,
        buffers: Sequence[memoryview],
        max_gap: int,
        stop: StopFlag,
    ) -> None:
        path = self.path_of(meta.name)
        with self._files.borrow(path, meta.version) as fd:
            count, number = read_ranges(fd, offsets, lengths, buffers, max_gap, stop)
            if number or (count < lengths.sum() and not stop.is_set()):
                done = np.cumsum(lengths)
                index = int(np.searchsorted(done, count, side="right"))
                start, end = int(offsets[index]), int(offsets[index] + lengths[index])
                _raise_short(path, start, end, count - int(done[index] - lengths[index]), number)
            files.require_unchanged(fd, path, meta.version)
            if self._drops_cache:
                first = int(offsets[0])
                os.posix_fadvise(fd, first, int(offsets[-1] + lengths[-1]) - first, os.POSIX_FADV_DONTNEED)

    @staticmethod
    def _fill(fd: int, path: str, start: int, buffers: Sequence[memoryview], stop: StopFlag) -> int:
        wanted = sum(buffer.nbytes for buffer in buffers)
        count, number = read_vectors(fd, start, buffers, stop)
        if number or (count < wanted and not stop.is_set()):
            _raise_short(path, start, start + wanted, count, number)
        return count

    async def read(self, name: str, *, max_bytes: int | None = None) -> bytes:
        # Finished even when cancelled: a file that opens after its caller has gone would stay open.
        return await wait_to_end(asyncio.ensure_future(self._read_small(name, max_bytes)))

    async def _read_small(self, name: str, max_bytes: int | None) -> bytes:
        path = await self._threads.run(self._resolve, name)
        with files.translated(path):
            # Not `async with`: that closes in the loop's default executor, whichever one was given.
            file = await aiofiles.open(path, "rb", opener=_open_regular, executor=self._threads)
            try:
                status = await self._threads.run(os.fstat, file.fileno())
                require_small(status.st_size, max_bytes, path)
                return await file.read()
            finally:
                await file.close()


def _open_regular(path: str, flags: int) -> int:
    return files.open_regular(path)


def _raise_short(path: str, start: int, stop: int, count: int, number: int) -> NoReturn:
    """Raise the error for a range of which `count` bytes were read, and then came an errno, or the file's end."""
    if number:
        raise files.translate(OSError(number, os.strerror(number)), path, start=start + count, stop=stop)
    raise TruncatedError(
        f"{path}: the file ends at byte {start + count:,}, {stop - start - count:,} bytes before the end of the "
        f"range {start:,}-{stop:,}; it was truncated while it was being loaded",
        path=path,
        start=start,
        stop=stop,
        errno=errno.ENODATA,
    )
