"""Replicas: tensors that several ranks hold must be equal, which is checked before a reshard writes anything.

Digests are compared where the files have them, else the bytes, each copy with the one of the first rank that has it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from asyncshard._typing import Int64Array
from asyncshard.format.digests import digests_of
from asyncshard.pipeline.writing.reshard.block_reader import BlockBuffers, BlockReader, Bytes
from asyncshard.pipeline.writing.reshard.source import Source
from asyncshard.plan.division.blocks import Block, TensorMap, cut_blocks
from asyncshard.plan.division.divisions import Division
from asyncshard.plan.division.slices import Slice
from asyncshard.plan.text import Problems
from asyncshard.tasks.bounded import run_bounded
from asyncshard.tasks.threads import DaemonThreads

_STEP = 1 << 20


class Copies:
    """The tensors of one rank that a rank before it has too."""

    def __init__(self, source: Source, rank: int) -> None:
        side = source.side
        firsts = np.full(len(side.divisions), -1, np.int64)
        sizes = np.zeros(len(side.divisions), np.int64)
        for number, division in enumerate(side.divisions):
            if rank not in division.first_ranks and division.slices[rank].nbytes:
                firsts[number] = max(first for first in division.first_ranks if first < rank)
                sizes[number] = division.slices[rank].nbytes
        self.source = source
        self.rank = rank
        self.tensors: Int64Array = np.flatnonzero(firsts[side.division_of] >= 0)
        self.first_ranks: Int64Array = firsts[side.division_of][self.tensors]
        self.sizes: Int64Array = sizes[side.division_of][self.tensors]

    def keep(self, chosen: NDArray[np.bool_]) -> None:
        """Leave out those that are not chosen."""
        self.tensors, self.first_ranks, self.sizes = (
            self.tensors[chosen],
            self.first_ranks[chosen],
            self.sizes[chosen],
        )

    def fault(self, index: int) -> str:
        """Say that one of them differs."""
        name = self.source.tensors.name(int(self.tensors[index]))
        return f"rank {self.first_ranks[index]} and rank {self.rank} hold other bytes of tensor {name!r}"

    def both(self) -> TensorMap:
        """Return where they are: on two ranks, that of the first copy and that of the second."""
        side = self.source.side
        distinct, division_of = np.unique(self.sizes, return_inverse=True)
        slices = [Slice((size,), 1, size, ((0, size),)) for size in distinct.tolist()]
        divisions = [Division((piece, piece), frozenset((0,))) for piece in slices]
        ranks = np.stack([self.first_ranks, np.full(len(self.tensors), self.rank)])
        return TensorMap(
            divisions, division_of.astype(np.int32), side.files[ranks, self.tensors], side.starts[ranks, self.tensors]
        )


def compare_digests(source: Source, faults: Problems) -> list[Copies]:
    """Compare all copies whose files have digests, and return the others. Slow: not for the event loop.

    Raises
    ------
    FormatError
        A file's digests cannot be read.
    """
    digests = [digests_of(shard.header, path=shard.path) for shard in source.shards]
    left = []
    for rank in range(1, source.side.world_size):
        copies = Copies(source, rank)
        is_open = np.ones(len(copies.tensors), np.bool_)
        for index, (tensor, first) in enumerate(zip(copies.tensors.tolist(), copies.first_ranks.tolist(), strict=True)):
            one, other = (_digest(source, digests, owner, tensor) for owner in (first, rank))
            if one is not None and other is not None:
                is_open[index] = False
                if one != other:
                    faults.add(copies.fault(index))
        copies.keep(is_open)
        if len(copies.tensors):
            left.append(copies)
    return left


def _digest(source: Source, digests: Sequence[NDArray[np.uint8] | None], rank: int, tensor: int) -> bytes | None:
    rows = digests[source.side.files[rank, tensor]]
    return None if rows is None else rows[source.rank_rows[rank, tensor]].tobytes()


class Comparison:
    """Reads copies block by block, and notes those that differ."""

    def __init__(self, reader: BlockReader, threads: DaemonThreads, faults: Problems) -> None:
        self._reader = reader
        self._threads = threads
        self._faults = faults
        self.bytes_compared = 0

    async def run(self, copies: Copies, rooms: Sequence[BlockBuffers]) -> None:
        """Compare the copies of one rank."""
        side = await self._threads.run(copies.both)
        runs = np.ones(len(copies.sizes), np.int64)
        blocks = cut_blocks(copies.sizes, runs, len(rooms[0].memory))
        differing: set[int] = set()
        planning = DaemonThreads(1, "asyncshard-work")
        try:
            jobs = (self._work(copies, side, blocks, room, planning, differing) for room in rooms)
            await run_bounded(len(rooms), jobs, on_failure="finish")
        finally:
            await planning.aclose()
        for index in sorted(differing):
            self._faults.add(copies.fault(index))

    async def _work(
        self,
        copies: Copies,
        side: TensorMap,
        blocks: Iterator[Block],
        room: BlockBuffers,
        planning: DaemonThreads,
        differing: set[int],
    ) -> None:
        while (block := await planning.run(next, blocks, None)) is not None:
            for rank, memory in enumerate(room):
                moves = await planning.run(
                    lambda block, rank: side.rank_runs(block, copies.sizes, rank, is_read=False), block, rank
                )
                await self._reader.read([moves], memory, None)
            self.bytes_compared += 2 * block.nbytes
            differing |= await self._threads.run(_differing, copies.sizes, block, room)


def _differing(sizes: Int64Array, block: Block, room: BlockBuffers) -> set[int]:
    """Return the tensors of a block whose copies differ."""
    one, other = room.memory[: block.nbytes], room.staging[: block.nbytes]
    if _is_same(one, other):
        return set()
    if block.last == block.first + 1:
        return {block.first}
    bounds = [0, *np.cumsum(sizes[block.first : block.last]).tolist()]
    return {
        block.first + index
        for index, (start, stop) in enumerate(pairwise(bounds))
        if not _is_same(one[start:stop], other[start:stop])
    }


def _is_same(one: Bytes, other: Bytes) -> bool:
    return all(
        np.array_equal(one[start : start + _STEP], other[start : start + _STEP]) for start in range(0, len(one), _STEP)
    )
