"""A store whose objects are kept on a disk of this machine as they are read."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

from asyncshard.stores.base import ObjectMeta, Store
from asyncshard.stores.disk_cache.buffers import BlockBuffers
from asyncshard.stores.disk_cache.directory import DiskCache, key_of
from asyncshard.stores.disk_cache.entry import BLOCK_BYTES, CorruptEntryError, Layout
from asyncshard.stores.disk_cache.locks import BlockLocks
from asyncshard.stores.disk_cache.read import CachedRead
from asyncshard.stores.wrapper import WrapperStore
from asyncshard.tasks.threads import DaemonThreads, wait_to_end

READ_THREADS = 2
_WRITE_THREADS = 1
"""Writes to one file take turns in the kernel anyway."""
MIN_STAGED_BLOCKS = 2
"""Both ends of one read."""
MAX_STAGED_BLOCKS = 32


class CachedStore(WrapperStore):
    """Reads through a cache: what it has comes from its disk, what it lacks from the other store, and is kept.

    Objects are opened, and with that pinned, at the other store every time; small ones that are read whole are not
    kept. Whatever goes wrong with the cache, the load goes on with the other store. It belongs to one event loop.

    Parameters
    ----------
    store : Store
        The other store; objects without an `identity` are read from it alone.
    cache : DiskCache
        Used for this load and others.
    closes_store : bool
        Whether `aclose` closes the other store.
    write_buffer_bytes : int, optional
        Of the blocks on their way to the disk, about: between `MIN_STAGED_BLOCKS` and `MAX_STAGED_BLOCKS` of them.
    """

    def __init__(
        self, store: Store, cache: DiskCache, *, closes_store: bool = True, write_buffer_bytes: int | None = None
    ) -> None:
        super().__init__(store)
        self.cache = cache
        self.threads = DaemonThreads(READ_THREADS, "asyncshard-cache-read")
        staged = MAX_STAGED_BLOCKS if write_buffer_bytes is None else write_buffer_bytes // BLOCK_BYTES
        self._staged_blocks = min(max(staged, MIN_STAGED_BLOCKS), MAX_STAGED_BLOCKS)
        self.buffers = BlockBuffers(self._staged_blocks)
        self.locks = BlockLocks(cache.locks, self.threads)
        self.can_read = True
        """Whether entries are looked at."""
        self.can_write = True
        """Whether blocks are kept, and those that others fetch waited for."""
        self.can_wait = True
        """Whether blocks are waited for that others fetch; where not, they are fetched here too."""
        self.turn = asyncio.Lock()
        """Whose read looks whether the blocks have come that it waits for."""
        self._write_threads = DaemonThreads(_WRITE_THREADS, "asyncshard-cache-write")
        self._writes: set[asyncio.Task[None]] = set()
        self._keys: list[bytes] = []
        self._prepared = False
        self._preparing = threading.Lock()
        self._closes_store = closes_store
        self._is_closed = False

    def __repr__(self) -> str:
        return f"CachedStore({self.store!r})"

    @property
    def chunk_size(self) -> int:  # type: ignore[override]
        """What suits a disk, or more: a load for which the cache is there reads most from it."""
        return max(Store.chunk_size, self.store.chunk_size)

    @property
    def held_bytes(self) -> int:  # type: ignore[override]
        """The blocks on their way to the disk, and what the other store takes."""
        return self._staged_blocks * BLOCK_BYTES + self.store.held_bytes

    async def aclose(self) -> None:
        """Wait until what was read is kept, then close."""
        if not self._is_closed:
            self._is_closed = True
            await wait_to_end(asyncio.ensure_future(self._close()))

    async def _close(self) -> None:
        try:
            while self._writes:
                await asyncio.wait(self._writes)
            self.cache.end_use(self._keys)
            await self._write_threads.aclose()
            await self.threads.aclose()
        finally:
            if self._closes_store:
                await self.store.aclose()

    async def open(self, name: str, nbytes: int) -> tuple[ObjectMeta, bytes]:
        meta, head = await self.store.open(name, nbytes)
        identity = self.store.identity(meta)
        if identity is not None and self.can_read:
            await self.threads.run(self._begin_use, key_of(identity))
        return meta, head

    def _begin_use(self, key: bytes) -> None:
        try:
            with self._preparing:
                if not self._prepared:
                    self._prepared = True
                    self.cache.prepare()
            self.cache.begin_use(key)
            self._keys.append(key)
        except (OSError, NotImplementedError) as error:
            self.fail(error, can_read=False)

    def fail(self, reason: object, *, can_read: bool = True) -> None:
        """Keep nothing more in this load, with a warning; where `can_read` is false, do not look at entries either."""
        self.can_write = False
        self.can_read = self.can_read and can_read
        self.cache.warn_once(reason)

    def stop_waiting(self, reason: object) -> None:
        """Fetch here too, from now on in this load, what others are fetching, with a warning."""
        self.can_wait = False
        self.cache.warn_once(reason)

    async def read_into(self, meta: ObjectMeta, start: int, buffers: Sequence[memoryview]) -> None:
        identity = self.store.identity(meta) if self.can_read else None
        stop = start + sum(buffer.nbytes for buffer in buffers)
        key = None if identity is None else key_of(identity)
        if key is None or not self.cache.can_keep(key) or start == stop or stop > meta.size:
            await self.store.read_into(meta, start, buffers)
            return
        await CachedRead(self, meta, key, start, stop).fill(buffers)

    def begin_write(self, meta: ObjectMeta, key: bytes, blocks: list[tuple[int, memoryview]]) -> None:
        """Write blocks that this store has claimed, then give back their buffers and their claims."""
        task = asyncio.ensure_future(self._write(meta, key, blocks))
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)

    async def _write(self, meta: ObjectMeta, key: bytes, blocks: list[tuple[int, memoryview]]) -> None:
        try:
            if self.can_write and self.cache.can_keep(key):
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
            self.cache.drop(key, self.path_of(meta.name), error)
        except (OSError, NotImplementedError) as error:
            self.fail(error)
