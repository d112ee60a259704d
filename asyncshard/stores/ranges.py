"""Many byte ranges of an object, read through any store that reads one.

Ranges that lie near each other are read together, with what lies between them. Short ones are read into scratch memory,
and what is wanted is copied out of it; a long one, or one alone, is read straight to where it belongs.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import NamedTuple

from asyncshard._core import gather_runs
from asyncshard._typing import Int64Array
from asyncshard.plan.ranges import merge_ranges
from asyncshard.tasks.bounded import run_bounded
from asyncshard.tasks.threads import DaemonThreads

ReadInto = Callable[[int, Sequence[memoryview]], Awaitable[None]]
"""Fills buffers from an offset of the object on."""

_GROUPS_AT_ONCE = 32
_SLAB_BYTES = 4 << 20
_SLABS = 4
_LONG_RANGE = 64 << 10
"""Ranges of this many bytes on average are read into place, with the gaps into scratch memory, rather than copied."""
_LARGE_COPY = 1 << 18
"""From as many bytes on a copy is a thread's work."""


class Scratch:
    """Slabs of memory for reads that cover several ranges. It belongs to the event loop in which it is first used.

    Parameters
    ----------
    threads : DaemonThreads
        In which what is wanted is copied out of them.
    slab_bytes : int
        Of one slab, and so of one such read at most.
    slabs : int
        How many there are; whoever finds none free waits for one.
    """

    def __init__(self, threads: DaemonThreads, slab_bytes: int = _SLAB_BYTES, slabs: int = _SLABS) -> None:
        self.slab_bytes = slab_bytes
        self.nbytes = slab_bytes * slabs
        """Bytes of all slabs; each is taken from the system when it is first lent."""
        self._threads = threads
        self._free: list[bytearray] = []
        self._semaphore = asyncio.Semaphore(slabs)

    @asynccontextmanager
    async def slab(self) -> AsyncIterator[memoryview]:
        """Lend a slab. A borrower waits for nobody else who waits for one."""
        async with self._semaphore:
            slab = self._free.pop() if self._free else bytearray(self.slab_bytes)
            try:
                yield memoryview(slab)
            finally:
                self._free.append(slab)

    async def gather(
        self, source: memoryview, offsets: Int64Array, lengths: Int64Array, buffers: Sequence[memoryview]
    ) -> None:
        """Fill buffers with pieces of a slab."""
        if source.nbytes < _LARGE_COPY:
            gather_runs(source, offsets, lengths, buffers)
        else:
            await self._threads.run(gather_runs, source, offsets, lengths, buffers)


class _Group(NamedTuple):
    """Ranges that are read together, and where they go."""

    first: int
    last: int
    buffers: list[memoryview]


async def read_ranges(
    read_into: ReadInto,
    offsets: Int64Array,
    lengths: Int64Array,
    buffers: Sequence[memoryview],
    *,
    max_gap: int,
    scratch: Scratch,
) -> None:
    """Fill `buffers`, one after the other, with ranges of an object, several reads in flight at once.

    All or an error; nothing writes into the buffers after this has returned or raised.
    """
    bounds = merge_ranges(offsets, lengths, max_gap=max_gap, max_bytes=scratch.slab_bytes, max_count=sys.maxsize)
    groups = _groups(bounds, lengths, buffers)
    reads = (_read_group(read_into, offsets[group.first : group.last], lengths, group, scratch) for group in groups)
    if len(bounds) == 2:  # no task for a single read
        await next(reads)
    else:
        await run_bounded(min(_GROUPS_AT_ONCE, len(bounds) - 1), reads, on_failure="cancel")


async def _read_group(
    read_into: ReadInto, offsets: Int64Array, lengths: Int64Array, group: _Group, scratch: Scratch
) -> None:
    start = int(offsets[0])
    if len(offsets) == 1:
        await read_into(start, group.buffers)
        return
    stop = int(offsets[-1] + lengths[group.last - 1])
    async with scratch.slab() as slab:
        sizes = lengths[group.first : group.last]
        if sizes.sum() >= _LONG_RANGE * len(sizes):
            await read_into(start, _with_gaps(offsets, sizes, group.buffers, slab))
            return
        cover = slab[: stop - start]
        await read_into(start, [cover])
        await scratch.gather(cover, offsets - start, sizes, group.buffers)


def _with_gaps(
    offsets: Int64Array, lengths: Int64Array, buffers: Sequence[memoryview], unwanted: memoryview
) -> list[memoryview]:
    """Return the memory of ranges and of the gaps between them, which all share `unwanted`."""
    cut = cutter(buffers)
    views = next(cut)
    for length, gap in zip(lengths.tolist(), [*(offsets[1:] - offsets[:-1] - lengths[:-1]).tolist(), 0], strict=True):
        views += cut.send(length)
        if gap:
            views.append(unwanted[:gap])
    return views


def _groups(bounds: Int64Array, lengths: Int64Array, buffers: Sequence[memoryview]) -> Iterator[_Group]:
    """Yield the groups between `bounds`, with their share of the buffers."""
    cut = cutter(buffers)
    next(cut)
    for first, last in itertools.pairwise(bounds.tolist()):
        yield _Group(first, last, cut.send(int(lengths[first:last].sum())))


def cutter(buffers: Sequence[memoryview]) -> Generator[list[memoryview], int, None]:
    """Return a generator that is sent numbers, and gives the memory of as many next bytes; call `next` on it first."""
    nbytes = yield []
    pieces: list[memoryview] = []
    for buffer in buffers:
        octets = buffer.cast("B")
        while len(octets) >= nbytes:
            pieces.append(octets[:nbytes])
            octets = octets[nbytes:]
            nbytes = yield pieces
            pieces = []
        if len(octets):
            pieces.append(octets)
            nbytes -= len(octets)
