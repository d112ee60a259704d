"""One store's use of a cache: what all reads of that store share."""

from __future__ import annotations

import asyncio
import threading

from asyncshard.stores.base import ObjectMeta, Store
from asyncshard.stores.disk_cache.buffers import BlockBuffers
from asyncshard.stores.disk_cache.directory import DiskCache
from asyncshard.stores.disk_cache.entry import CorruptEntryError, Layout
from asyncshard.stores.disk_cache.locks import BlockLocks
from asyncshard.tasks.threads import DaemonThreads

READ_THREADS = 2
_WRITE_THREADS = 1
"""Writes to one file take turns in the kernel anyway."""


class CacheSession:
    """Threads, buffers, claims on blocks and writes in progress. It belongs to one event loop.

    Parameters
    ----------
    origin : Store
        The store whose objects are cached. The session does not close it.
    cache : DiskCache
    buffer_count : int
        Blocks that may be on their way to the disk at once.
    """

    def __init__(self, origin: Store, cache: DiskCache, buffer_count: int) -> None:
        self.origin = origin
        self.cache = cache
        self.threads = DaemonThreads(READ_THREADS, "asyncshard-cache-read")
        self.buffers = BlockBuffers(buffer_count)
        self.locks = BlockLocks(cache.locks, self.threads)
        self.can_read = True
        """Whether reads look at the cache's entries."""
        self.can_write = True
        """Whether blocks are kept, and waited for where others fetch them."""
        self.can_wait = True
        """Whether reads wait for blocks that others fetch. If not, those blocks are fetched here too."""
        self.wait_turn = asyncio.Lock()
        """Held by the one read that looks whether the blocks have come that it waits for."""
        self._write_threads = DaemonThreads(_WRITE_THREADS, "asyncshard-cache-write")
        self._writes: set[asyncio.Task[None]] = set()
        self._keys: list[bytes] = []
        """Keys of the objects in use, which are not evicted until `aclose`."""
        self._is_prepared = False
        self._preparing = threading.Lock()

    @property
    def writes_in_progress(self) -> int:
        """How many runs of blocks are on their way to the disk."""
        return len(self._writes)

    async def aclose(self) -> None:
        """Wait until everything that is to be kept is written, then end the threads."""
        while self._writes:
            await asyncio.wait(self._writes)
        self.cache.end_use(self._keys)
        await self._write_threads.aclose()
        await self.threads.aclose()

    async def begin_use(self, key: bytes) -> None:
        """Keep an object's entry from being evicted until `aclose`."""
        if self.can_read:
            await self.threads.run(self._begin_use, key)

    def _begin_use(self, key: bytes) -> None:
        try:
            with self._preparing:
                if not self._is_prepared:
                    self._is_prepared = True
                    self.cache.prepare()
            self.cache.begin_use(key)
            self._keys.append(key)
        except (OSError, NotImplementedError) as error:
            self.fail(error, can_read=False)

    def can_keep(self, key: bytes) -> bool:
        """Return whether blocks of an object are kept."""
        return self.can_write and self.cache.can_keep(key)

    def fail(self, reason: object, *, can_read: bool = True) -> None:
        """Keep nothing more in this session, with a warning. Where `can_read` is false, look at no entry any more."""
        self.can_write = False
        self.can_read = self.can_read and can_read
        self.cache.warn_once(reason)

    def stop_waiting(self, reason: object) -> None:
        """From now on fetch blocks that others are fetching too, with a warning."""
        self.can_wait = False
        self.cache.warn_once(reason)

    def begin_write(self, meta: ObjectMeta, key: bytes, blocks: list[tuple[int, memoryview]]) -> None:
        """Write blocks that this session has claimed, then give back their buffers and their claims."""
        task = asyncio.ensure_future(self._write(meta, key, blocks))
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)

    async def _write(self, meta: ObjectMeta, key: bytes, blocks: list[tuple[int, memoryview]]) -> None:
        try:
            if self.can_keep(key):
                await self._write_threads.run(self._write_blocks, meta, key, blocks)
        finally:
            self.buffers.give([image for _, image in blocks])
            self.locks.release(key, [block for block, _ in blocks])

    def _write_blocks(self, meta: ObjectMeta, key: bytes, blocks: list[tuple[int, memoryview]]) -> None:
        layout = Layout(meta.size)
        spans = {block: layout.span(block) for block, _ in blocks}
        try:
            if not self.cache.has_room_for(sum(stop - start for start, stop in spans.values())):
                self.fail("the objects of this load are larger than cache_max_gb; raise it to keep them all")
                return
            with self.cache.open_or_create(key, meta.size) as entry:
                for block, image in blocks:
                    start, stop = spans[block]
                    entry.write(block, image[: stop - start])
        except CorruptEntryError as error:
            self.cache.drop(key, self.origin.path_of(meta.name), error)
        except (OSError, NotImplementedError) as error:
            self.fail(error)
