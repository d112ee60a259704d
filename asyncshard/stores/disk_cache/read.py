"""One read through the cache: of blocks that it has, that are to be fetched, or that others are fetching."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np

from asyncshard._core import StopFlag
from asyncshard.stores.base import ObjectMeta
from asyncshard.stores.disk_cache.entry import ABSENT, CorruptEntryError, Entry, Layout, digest_of
from asyncshard.stores.disk_cache.session import CacheSession
from asyncshard.stores.scatter import Scatter


class _Run(NamedTuple):
    """Neighbouring blocks that are fetched in one read."""

    blocks: range
    images: dict[int, memoryview]
    """Buffers for the first and the last block where only a part is wanted: they are fetched whole, to be kept."""
    keeps_ends: bool
    """Whether such blocks are kept; not if there was no buffer for them."""


class CachedRead:
    """Fill a caller's buffers with the bytes [start, stop) of an object."""

    def __init__(self, session: CacheSession, meta: ObjectMeta, key: bytes, start: int, stop: int) -> None:
        self._session = session
        self._meta = meta
        self._key = key
        self._start = start
        self._stop = stop
        self._layout = Layout(meta.size)
        self._scatter: Scatter

    async def fill(self, buffers: Sequence[memoryview]) -> None:
        """Fill the buffers; nothing writes into them once this has returned or raised."""
        session = self._session
        self._scatter = await session.threads.run(Scatter, buffers)  # not on the loop: there may be thousands
        missing = await self._serve(list(self._layout.blocks_of(self._start, self._stop)))
        while missing:
            claimed = await self._claim(missing) if self._can_keep else []
            if not claimed and self._can_keep and session.can_wait:
                missing, claimed = await self._wait(missing)
            if claimed:
                await self._keep(claimed)
                missing = await self._serve(sorted(set(missing) - set(claimed)))
            elif not (self._can_keep and session.can_wait):
                for run in _runs(missing):
                    await self._fetch(_Run(run, {}, False))
                return

    @property
    def _can_keep(self) -> bool:
        return self._session.can_keep(self._key)

    async def _claim(self, blocks: list[int]) -> list[int]:
        try:
            return await self._session.locks.claim(self._key, blocks)
        except (OSError, NotImplementedError) as error:
            self._session.fail(error)
            return []

    async def _wait(self, missing: list[int]) -> tuple[list[int], list[int]]:
        """Wait for blocks that others are fetching, until some have come or can be claimed.

        Return the blocks that are still missing, and those of them that are now claimed.

        One read of a session looks at a time. The others wait behind it: all together they would take from whoever
        fetches the cores that it needs.
        """
        session = self._session
        async with session.wait_turn:
            since, turn = time.monotonic(), 0
            changed_ns = await self._changed_ns()
            while self._can_keep and session.can_wait:
                left = await self._serve(missing)
                claimed = await self._claim(left) if left else []
                if claimed or len(left) < len(missing):
                    return left, claimed
                if session.locks.stalled_s(since) > session.cache.lock_timeout_s:
                    before, changed_ns, since = changed_ns, await self._changed_ns(), time.monotonic()
                    if changed_ns == before:
                        session.stop_waiting(
                            f"{session.origin.path_of(self._meta.name)} is being fetched by another process, "
                            f"which has got nowhere for {session.cache.lock_timeout_s:g} s"
                        )
                await session.locks.wait(self._key, missing, turn)
                turn += 1
        return missing, []

    async def _changed_ns(self) -> int:
        try:
            return await self._session.threads.run(self._session.cache.changed_ns, self._key)
        except OSError:
            return 0

    # --- blocks that the cache has

    async def _serve(self, blocks: list[int]) -> list[int]:
        """Copy the blocks that the entry has; return the blocks that it lacks."""
        if not blocks or not self._session.can_read:
            return blocks
        stop = StopFlag()
        return await self._session.threads.run(self._copy_present, blocks, stop, on_cancel=stop.set)

    def _copy_present(self, blocks: list[int], stop: StopFlag) -> list[int]:
        cache = self._session.cache
        try:
            entry = cache.open(self._key, self._meta.size)
            if entry is None:
                return blocks
            with entry:
                digests = dict(enumerate(entry.digests(range(blocks[0], blocks[-1] + 1)), start=blocks[0]))
                present = {block: digests[block] for block in blocks if digests[block] != ABSENT}
                try:
                    self._copy(entry, present, stop)
                except OSError as error:
                    if error.errno != errno.EIO:
                        raise
                    raise entry.corrupt(f"the disk cannot read it: {error}") from error
                return [block for block in blocks if block not in present]
        except CorruptEntryError as error:
            cache.drop(self._key, self._session.origin.path_of(self._meta.name), error)
        except OSError as error:
            self._session.fail(error, can_read=False)
        return blocks

    def _copy(self, entry: Entry, present: dict[int, bytes], stop: StopFlag) -> None:
        flags = self._session.cache.checked(self._key, entry)
        checked = [block for block in present if flags[block]]  # once: other threads set flags too
        for run in _runs(checked):
            start, end = self._wanted(run)
            entry.read(start, self._views(start, end), stop)
        for block in sorted(set(present) - set(checked)):
            views = self._copy_whole(entry, block, stop)
            if stop.is_set():
                return
            if digest_of(block, views) != present[block]:
                raise entry.corrupt(f"block {block:,} does not match its digest")
            flags[block] = 1

    def _copy_whole(self, entry: Entry, block: int, stop: StopFlag) -> list[memoryview]:
        """Copy the wanted part of a block; return the memory of all its bytes, to be compared with its digest."""
        span = self._layout.span(block)
        start, end = self._wanted(range(block, block + 1))
        views = self._views(start, end)
        if (start, end) != span:
            before, after = (np.empty(nbytes, np.uint8).data for nbytes in (start - span[0], span[1] - end))
            views = [before, *views, after]
        entry.read(span[0], views, stop)
        return views

    # --- blocks that are fetched

    async def _keep(self, claimed: list[int]) -> None:
        """Fetch claimed blocks and keep them. Each claim is released at once, or when its block is written."""
        open_claims = set(claimed)
        try:
            # Again, now that nobody else can be writing them.
            missing = await self._serve(claimed)
            self._release(open_claims, set(claimed) - set(missing))
            for run in _runs(missing):
                await self._fetch_and_keep(run, open_claims)
        finally:
            self._release(open_claims, set(open_claims))

    def _release(self, open_claims: set[int], blocks: set[int]) -> None:
        self._session.locks.release(self._key, blocks)
        open_claims -= blocks

    async def _fetch_and_keep(self, blocks: range, open_claims: set[int]) -> None:
        ends = [block for block in {blocks[0], blocks[-1]} if self._is_partial(block)]
        images = await self._session.buffers.take(len(ends)) if ends else []
        run = _Run(blocks, dict(zip(ends, images or [], strict=False)), images is not None)
        lent = dict(run.images)
        try:
            await self._fetch(run)
            if lent:
                await self._session.threads.run(self._copy_out, lent)
                self._hand_over(lent, open_claims)
            inner = [block for block in blocks if block not in ends]
            while inner and self._session.can_write:
                count = max(min(self._session.buffers.free_count, len(inner)), 1)
                taken = await self._session.buffers.take(count)
                if taken is None:
                    return
                lent.update(zip(inner, taken, strict=False))
                await self._session.threads.run(self._copy_out, lent)
                self._hand_over(lent, open_claims)
                del inner[:count]
        finally:
            if lent:
                self._session.buffers.give(list(lent.values()))

    def _hand_over(self, lent: dict[int, memoryview], open_claims: set[int]) -> None:
        """Let the session write blocks. It gives back their buffers and claims."""
        open_claims.difference_update(lent)
        self._session.begin_write(self._meta, self._key, list(lent.items()))
        lent.clear()

    async def _fetch(self, run: _Run) -> None:
        """Read blocks from the other store, straight into the caller's buffers where possible."""
        start, end = self._wanted(run.blocks)
        views = self._views(start, end)
        first, last = self._layout.span(run.blocks[0]), self._layout.span(run.blocks[-1])
        if run.keeps_ends and first[0] < start:
            views.insert(0, run.images[run.blocks[0]][: start - first[0]])
            start = first[0]
        if run.keeps_ends and end < last[1]:
            views.append(run.images[run.blocks[-1]][end - last[0] : last[1] - last[0]])
        await self._session.origin.read_into(self._meta, start, views)

    def _copy_out(self, images: dict[int, memoryview]) -> None:
        """Copy the wanted part of blocks into their images, to be written. NumPy copies without the GIL."""
        for block, image in images.items():
            target = np.frombuffer(image, np.uint8)
            start, end = self._wanted(range(block, block + 1))
            at = start - self._layout.span(block)[0]
            for view in self._views(start, end):
                target[at : at + len(view)] = np.frombuffer(view, np.uint8)
                at += len(view)

    # --- ranges

    def _is_partial(self, block: int) -> bool:
        return self._wanted(range(block, block + 1)) != self._layout.span(block)

    def _wanted(self, blocks: range) -> tuple[int, int]:
        """Return the byte range of some neighbouring blocks that the caller wants."""
        return max(self._layout.span(blocks[0])[0], self._start), min(self._layout.span(blocks[-1])[1], self._stop)

    def _views(self, start: int, stop: int) -> list[memoryview]:
        """Return the caller's memory for a byte range of the object."""
        return self._scatter.views(start - self._start, stop - self._start)


def _runs(blocks: Sequence[int]) -> Iterator[range]:
    """Return the ranges of numbers side by side."""
    for _, group in groupby(enumerate(blocks), lambda pair: pair[1] - pair[0]):
        numbers = [number for _, number in group]
        yield range(numbers[0], numbers[-1] + 1)
