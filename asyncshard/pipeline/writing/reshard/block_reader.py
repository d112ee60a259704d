"""Blocks of a checkpoint read into memory: from one rank or several, straight into place or by way of a scatter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, groupby
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from asyncshard._core import Lease, copy_runs
from asyncshard._typing import Int64Array
from asyncshard.errors import BudgetError
from asyncshard.pipeline.checkpoint.opened_file import OpenedFile
from asyncshard.pipeline.memory.budget import Account
from asyncshard.plan.division.blocks import Extent, RankRuns
from asyncshard.stores.base import Store
from asyncshard.stores.ranges import Scratch
from asyncshard.tasks.bounded import run_bounded
from asyncshard.tasks.threads import DaemonThreads

Bytes = NDArray[np.uint8]

_IN_FLIGHT = 6
"""Blocks that are read or written at once, 6."""
_PAGE = 4096
_READS_AT_ONCE = 8
"""Reads of one block that are in flight at once, 8 at most."""


class BlockBuffers(NamedTuple):
    """Memory for one block in flight."""

    memory: Bytes
    """For the block."""
    staging: Bytes
    """For as much that is gathered from it, or to be scattered into it."""


async def take_block_buffers(account: Account, chunk_size: int) -> list[BlockBuffers]:
    """Take memory for all blocks in flight, as far as the budget goes; blocks are as large as it is.

    Raises
    ------
    BudgetError
        Not even a block of one page fits.
    """
    left = account.budget.nbytes - account.header_bytes
    count = max(min(_IN_FLIGHT, left // (2 * chunk_size)), min(2, left // (2 * _PAGE)), 1)
    limit = min(chunk_size // _PAGE * _PAGE or _PAGE, left // (2 * count) // _PAGE * _PAGE)
    if limit < _PAGE:
        raise BudgetError(
            f"a memory budget of {account.budget.nbytes:,} bytes has no room to copy anything beside "
            f"{account.header_bytes:,} bytes of headers; raise memory_budget_mb",
            needed_bytes=account.header_bytes + 2 * _PAGE,
            budget_bytes=account.budget.nbytes,
        )
    await account.set_floor(2 * count * limit)
    leases = [(await account.allocate(limit), await account.allocate(limit)) for _ in range(count)]
    return [BlockBuffers(_array(first), _array(second)) for first, second in leases]


def _array(lease: Lease) -> Bytes:
    return np.frombuffer(memoryview(lease), np.uint8)


class BlockReader:
    """Reads what ranks have of a block.

    Parameters
    ----------
    scratch : Scratch
        For reads that cover several extents.
    """

    def __init__(self, store: Store, shards: Sequence[OpenedFile], threads: DaemonThreads, scratch: Scratch) -> None:
        self._store = store
        self._shards = shards
        self._threads = threads
        self._scratch = scratch

    async def read(self, ranks: Sequence[RankRuns], memory: Bytes, staging: Bytes | None) -> None:
        """Fill the memory of a block; without `staging`, each run is read into its place."""
        reads: list[_Read] = []
        scattered: list[tuple[RankRuns, Bytes]] = []
        used = 0
        for moves in ranks:
            own: Bytes | None = None
            if staging is not None and not moves.is_direct:
                own = staging[used : used + moves.nbytes]
                used += moves.nbytes
                scattered.append((moves, own))
            reads += _reads_of(moves, memory, own)
        jobs = (self._read(each) for each in reads)
        await run_bounded(min(_READS_AT_ONCE, len(reads)), jobs, on_failure="finish")
        if scattered:
            await self._threads.run(_scatter, scattered, memory)

    async def _read(self, what: _Read) -> None:
        meta = self._shards[what.file].meta
        await self._store.read_ranges(meta, what.offsets, what.lengths, what.buffers, scratch=self._scratch)


class _Read(NamedTuple):
    """The byte ranges of one file that a block needs."""

    file: int
    offsets: Int64Array
    lengths: Int64Array
    buffers: list[memoryview]


def _reads_of(moves: RankRuns, memory: Bytes, gathered: Bytes | None) -> Iterator[_Read]:
    for file, pairs in groupby(views_of(moves, memory, gathered), lambda pair: pair[0].file):
        extents, views = zip(*pairs, strict=True)
        offsets = np.array([extent.start for extent in extents], np.int64)
        lengths = np.array([sum(map(len, each)) for each in views], np.int64)
        yield _Read(file, offsets, lengths, list(chain.from_iterable(views)))


def views_of(moves: RankRuns, memory: Bytes, gathered: Bytes | None) -> list[tuple[Extent, list[memoryview]]]:
    """Return the memory of each extent: its runs in the block's memory, or one range where they are gathered."""
    if gathered is None:
        ends = (moves.offsets + moves.lengths).tolist()
        views = [memory[start:end].data for start, end in zip(moves.offsets.tolist(), ends, strict=True)]
        return [(extent, views[extent.first : extent.last]) for extent in moves.extents]
    local = [*local_offsets(moves).tolist(), moves.nbytes]
    return [(extent, [gathered[local[extent.first] : local[extent.last]].data]) for extent in moves.extents]


def local_offsets(moves: RankRuns) -> Int64Array:
    """Return where the runs begin when they lie one after the other."""
    return np.cumsum(moves.lengths) - moves.lengths


def _scatter(scattered: Sequence[tuple[RankRuns, Bytes]], memory: Bytes) -> None:
    for moves, staging in scattered:
        copy_runs(staging.data, memory.data, local_offsets(moves), moves.offsets, moves.lengths)
