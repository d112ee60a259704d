"""Memory for blocks on their way to the disk: bounded, and warm from one block to the next."""

from __future__ import annotations

import asyncio
import time
from collections import deque

import numpy as np

from asyncshard.stores.disk_cache.entry import BLOCK_BYTES


class BlockBuffers:
    """Lends buffers of one block each. It belongs to one event loop.

    If none is free, a borrower may wait for the disk. All waits together last at most one second and a fifth of the
    time since the first request: the load must not become as slow as the disk.

    Parameters
    ----------
    count : int
        The largest number of buffers; each is made when it is first needed.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._made = 0
        self._free: list[memoryview] = []
        self._waiting: deque[tuple[int, asyncio.Future[list[memoryview]]]] = deque()
        self._first: float | None = None
        """Time of the first request."""
        self._since = 0.0
        """Time at which the present wait began."""
        self._waited_s = 0.0
        """Seconds in which at least one borrower waited."""

    @property
    def free_count(self) -> int:
        """Buffers that could be lent at once."""
        return len(self._free) + self._count - self._made

    async def take(self, count: int) -> list[memoryview] | None:
        """Return this many buffers, which are the caller's until `give`; None if the wait would be too long."""
        assert 0 < count <= self._count
        now = time.monotonic()
        if self._first is None:
            self._first = now
        if not self._waiting and self.free_count >= count:
            return self._lend(count)
        allowed_s = _GRACE_S + (now - self._first) / 5 - self._waited_s - (now - self._since if self._waiting else 0.0)
        if allowed_s <= 0:
            return None
        waiter: asyncio.Future[list[memoryview]] = asyncio.get_running_loop().create_future()
        if not self._waiting:
            self._since = now
        request = (count, waiter)
        self._waiting.append(request)
        try:
            await asyncio.wait([waiter], timeout=allowed_s)
        except asyncio.CancelledError:
            if waiter.done():
                self.give(waiter.result())
            raise
        finally:
            if request in self._waiting:
                self._waiting.remove(request)
            self._lend_to_waiting()  # a large request may have stood before smaller ones
            if not self._waiting:
                self._waited_s += time.monotonic() - self._since
                self._since = time.monotonic()
        return waiter.result() if waiter.done() else None

    def give(self, buffers: list[memoryview]) -> None:
        """Take back buffers that were lent."""
        self._free.extend(buffers)
        self._lend_to_waiting()

    def _lend_to_waiting(self) -> None:
        while self._waiting and self.free_count >= self._waiting[0][0]:
            count, waiter = self._waiting.popleft()
            waiter.set_result(self._lend(count))

    def _lend(self, count: int) -> list[memoryview]:
        while len(self._free) < count:
            # Not a bytearray: that would be filled with zeros, on the event loop.
            self._free.append(np.empty(BLOCK_BYTES, np.uint8).data)
            self._made += 1
        lent = self._free[-count:]
        del self._free[-count:]
        return lent


_GRACE_S = 1.0
"""Borrowers wait for one second in all, however short the load."""
