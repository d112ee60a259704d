"""Copy a checkpoint's tensors into the files of another number of ranks, block by block.

A block is read once, from whichever ranks have its bytes, and written to all that are to have them. A few blocks are in
flight, each in memory of its own, which is taken once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from asyncshard._core import StopFlag, copy_runs
from asyncshard.pipeline.writing.reshard.block_reader import BlockBuffers, BlockReader, local_offsets, views_of
from asyncshard.pipeline.writing.reshard.source import Source
from asyncshard.pipeline.writing.reshard.target import Target
from asyncshard.plan.division.blocks import Block, RankRuns, TensorMap, cut_blocks
from asyncshard.plan.files.target_files import TargetFiles
from asyncshard.tasks.bounded import run_bounded
from asyncshard.tasks.threads import DaemonThreads


class Copy:
    """One run over all blocks.

    Parameters
    ----------
    side : TensorMap
        Where the tensors go, in `files`.
    threads : DaemonThreads
        For gathering and writing.
    """

    def __init__(
        self,
        reader: BlockReader,
        source: Source,
        target: Target,
        side: TensorMap,
        files: TargetFiles,
        threads: DaemonThreads,
    ) -> None:
        self._reader = reader
        self._source = source.side
        self._target = target
        self._side = side
        self._names = [file.name for file in files.files]
        self._threads = threads
        self._sizes = source.sizes
        self.bytes_read = 0
        self.bytes_written = 0

    async def run(self, rooms: Sequence[BlockBuffers]) -> None:
        """Copy everything, a block in each room at a time."""
        most_runs = await self._threads.run(lambda: np.maximum(self._source.most_runs(), self._side.most_runs()))
        blocks = cut_blocks(self._sizes, most_runs, len(rooms[0].memory))
        planning = DaemonThreads(1, "asyncshard-work")  # one, since a generator runs in one thread at a time
        try:
            jobs = (self._work(blocks, room, planning) for room in rooms)
            await run_bounded(len(rooms), jobs, on_failure="finish")
        finally:
            await planning.aclose()

    async def _work(self, blocks: Iterator[Block], room: BlockBuffers, planning: DaemonThreads) -> None:
        stop = StopFlag()
        while (block := await planning.run(next, blocks, None)) is not None:
            await self._reader.read(await planning.run(self._reads, block), room.memory, room.staging)
            self.bytes_read += block.nbytes
            written = await self._threads.run(self._write, block, room, stop, on_cancel=stop.set)
            self.bytes_written += written

    def _reads(self, block: Block) -> list[RankRuns]:
        side = self._source
        ranks = (side.rank_runs(block, self._sizes, rank, is_read=True) for rank in range(side.world_size))
        return [moves for moves in ranks if moves.nbytes]

    def _write(self, block: Block, room: BlockBuffers, stop: StopFlag) -> int:
        written = 0
        for rank in range(self._side.world_size):
            moves = self._side.rank_runs(block, self._sizes, rank, is_read=False)
            gathered = None if moves.is_direct else room.staging
            if gathered is not None:
                copy_runs(room.memory.data, gathered.data, moves.offsets, local_offsets(moves), moves.lengths)
            for extent, views in views_of(moves, room.memory, gathered):
                if stop.is_set():
                    return written
                written += self._target.write(self._names[extent.file], extent.start, views, stop)
        return written
