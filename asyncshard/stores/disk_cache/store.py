"""A store whose objects are kept on a disk of this machine as they are read."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from asyncshard.stores.base import ObjectMeta, Pacing, State, Store
from asyncshard.stores.disk_cache.directory import DiskCache, key_of
from asyncshard.stores.disk_cache.entry import BLOCK_BYTES
from asyncshard.stores.disk_cache.read import CachedRead
from asyncshard.stores.disk_cache.session import CacheSession
from asyncshard.stores.wrapper import WrapperStore
from asyncshard.tasks.threads import wait_to_end

MIN_BUFFERS = 2
"""Both ends of one read."""
MAX_BUFFERS = 32


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
        Memory for blocks on their way to the disk, about: between `MIN_BUFFERS` and `MAX_BUFFERS` of them.
    """

    def __init__(
        self, store: Store, cache: DiskCache, *, closes_store: bool = True, write_buffer_bytes: int | None = None
    ) -> None:
        super().__init__(store)
        buffers = MAX_BUFFERS if write_buffer_bytes is None else write_buffer_bytes // BLOCK_BYTES
        buffers = min(max(buffers, MIN_BUFFERS), MAX_BUFFERS)
        self.session = CacheSession(store, cache, buffers)
        # A load for which the cache is there reads most of its bytes from the disk.
        self.pacing = store.pacing._replace(chunk_size=max(Pacing().chunk_size, store.pacing.chunk_size))
        self.held_bytes = buffers * BLOCK_BYTES + store.held_bytes
        self._closes_store = closes_store
        self._state = State.OPEN

    def _facts(self) -> tuple[str, ...]:
        return self._state.value, f"{self.session.writes_in_progress} writes in progress"

    async def aclose(self) -> None:
        """Wait until what was read is kept, then close."""
        if self._state is State.OPEN:
            self._state = State.CLOSING
            await wait_to_end(asyncio.ensure_future(self._close()))

    async def _close(self) -> None:
        try:
            await self.session.aclose()
        finally:
            if self._closes_store:
                await self.store.aclose()
            self._state = State.CLOSED

    async def open(self, name: str, nbytes: int) -> tuple[ObjectMeta, bytes]:
        meta, head = await self.store.open(name, nbytes)
        identity = self.store.identity(meta)
        if identity is not None:
            await self.session.begin_use(key_of(identity))
        return meta, head

    async def read_into(self, meta: ObjectMeta, start: int, buffers: Sequence[memoryview]) -> None:
        session = self.session
        identity = self.store.identity(meta) if session.can_read else None
        stop = start + sum(buffer.nbytes for buffer in buffers)
        key = None if identity is None else key_of(identity)
        if key is None or not session.cache.can_keep(key) or start == stop or stop > meta.size:
            await self.store.read_into(meta, start, buffers)
            return
        await CachedRead(session, meta, key, start, stop).fill(buffers)
