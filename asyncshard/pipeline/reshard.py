"""Copy a checkpoint's tensors into the files of another number of ranks, block by block.

A block is read once, from whichever ranks have its bytes, and written to all that are to have them. A few blocks are in
flight, each with its own memory, which is taken once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from asyncshard._core import StopFlag, copy_runs
from asyncshard.errors import BudgetError
from asyncshard.pipeline.budget import Account
from asyncshard.pipeline.reshard_jobs import run_all
from asyncshard.pipeline.reshard_source import Source
from asyncshard.pipeline.reshard_target import Target
from asyncshard.plan.blocks import Block, Extent, Moves, Side, cut_blocks
from asyncshard.plan.target_files import TargetFiles
from asyncshard.stores.base import Store
from asyncshard.stores.threads import DaemonThreads

Bytes = NDArray[np.uint8]

_IN_FLIGHT = 3
"""Blocks, each with memory for itself and for as much gathered from it."""
_PAGE = 4096
_READS_AT_ONCE = 8


class Copy:
    """One run over all blocks.

    Parameters
    ----------
    side : Side
        Of the target.
    """

    def __init__(
        self,
        store: Store,
        source: Source,
        target: Target,
        side: Side,
        files: TargetFiles,
        threads: DaemonThreads,
        chunk_size: int,
    ) -> None:
        self._store = store
        self._source = source
        self._target = target
        self._side = side
        self._files = files
        self._threads = threads
        self._chunk_size = chunk_size
        self._sizes = source.sizes
        self.bytes_read = 0
        self.bytes_written = 0

    async def run(self, account: Account) -> None:
        """Copy everything.

        Raises
        ------
        BudgetError
            Not even the smallest block fits.
        """
        limit, count = block_bytes(account, self._chunk_size)
        most_runs = await self._threads.run(lambda: np.maximum(self._source.side.most_runs(), self._side.most_runs()))
        blocks = cut_blocks(self._sizes, most_runs, limit)
        planning = DaemonThreads(1, "asyncshard-work")
        await account.set_floor(2 * count * limit)
        try:
            leases = [(await account.allocate(limit), await account.allocate(limit)) for _ in range(count)]
            buffers = [tuple(np.frombuffer(lease, np.uint8) for lease in pair) for pair in leases]
            del leases
            await run_all(count, (self._work(blocks, block, staging, planning) for block, staging in buffers))
        finally:
            await planning.aclose()

    async def _work(self, blocks: Iterator[Block], memory: Bytes, staging: Bytes, planning: DaemonThreads) -> None:
        stop = StopFlag()
        while (block := await planning.run(next, blocks, None)) is not None:
            await self._read(block, memory, staging)
            self.bytes_written += await self._threads.run(
                self._write, block, memory, staging, stop, on_cancel=stop.set
            )

    async def _read(self, block: Block, memory: Bytes, staging: Bytes) -> None:
        ranks = await self._threads.run(self._plan_reads, block)
        reads: list[tuple[int, int, list[memoryview]]] = []
        scattered: list[tuple[Moves, Bytes]] = []
        used = 0
        for moves in ranks:
            own = staging[used : used + moves.nbytes]
            if not moves.is_direct:
                used += moves.nbytes
                scattered.append((moves, own))
            at = 0
            for extent in moves.extents:
                views, at = _views(moves, extent, memory, own, at)
                reads.append((extent.file, extent.start, views))
        shards = self._source.shards
        await run_all(
            _READS_AT_ONCE, (self._store.read_into(shards[file].meta, start, views) for file, start, views in reads)
        )
        if scattered:
            await self._threads.run(_scatter, scattered, memory)
        self.bytes_read += block.nbytes

    def _plan_reads(self, block: Block) -> list[Moves]:
        side = self._source.side
        ranks = (side.moves(block, self._sizes, rank, is_read=True) for rank in range(side.world_size))
        return [moves for moves in ranks if moves.nbytes]

    def _write(self, block: Block, memory: Bytes, staging: Bytes, stop: StopFlag) -> int:
        written = 0
        for rank in range(self._side.world_size):
            moves = self._side.moves(block, self._sizes, rank, is_read=False)
            if not moves.is_direct:
                copy_runs(memory, staging, moves.offsets, _local_offsets(moves), moves.lengths)
            at = 0
            for extent in moves.extents:
                if stop.is_set():
                    return written
                views, at = _views(moves, extent, memory, staging, at)
                written += self._target.write(self._files.files[extent.file].name, extent.start, views, stop)
        return written


def block_bytes(account: Account, chunk_size: int) -> tuple[int, int]:
    """Return how large a block may be, and how many there are at once.

    Raises
    ------
    BudgetError
        There is no room for one of a page.
    """
    room = account.budget.nbytes - account.header_bytes
    count = max(min(_IN_FLIGHT, room // (2 * _PAGE)), 1)
    limit = min(chunk_size, room // (2 * count)) // _PAGE * _PAGE
    if limit < _PAGE:
        needed = account.header_bytes + 2 * _PAGE
        raise BudgetError(
            f"a memory budget of {account.budget.nbytes:,} bytes has no room for a block beside "
            f"{account.header_bytes:,} bytes of headers; raise memory_budget_mb",
            needed_bytes=needed,
            budget_bytes=account.budget.nbytes,
        )
    return limit, count


def _views(moves: Moves, extent: Extent, memory: Bytes, staging: Bytes, at: int) -> tuple[list[memoryview], int]:
    """Return the memory of an extent's bytes, and where in `staging` the next one begins."""
    lengths = moves.lengths[extent.first : extent.last]
    if not moves.is_direct:
        end = at + int(lengths.sum())
        return [staging[at:end].data], end
    offsets = moves.offsets[extent.first : extent.last]
    pairs = zip(offsets.tolist(), lengths.tolist(), strict=True)
    return [memory[offset : offset + length].data for offset, length in pairs], at


def _scatter(scattered: Sequence[tuple[Moves, Bytes]], memory: Bytes) -> None:
    for moves, staging in scattered:
        copy_runs(staging, memory, _local_offsets(moves), moves.offsets, moves.lengths)


def _local_offsets(moves: Moves) -> NDArray[np.int64]:
    ends = np.cumsum(moves.lengths)
    return ends - moves.lengths
