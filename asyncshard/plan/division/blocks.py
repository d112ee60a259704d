"""Blocks: what of the tensors is moved at once, and where its bytes are in the files of each rank.

A block is several whole tensors, or a byte range of one; its bytes lie in memory one after the other. Each rank has
some runs of them, which are in its files in other places, and neighbours there as often as not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from asyncshard._typing import Int64Array
from asyncshard.plan.division.divisions import Division
from asyncshard.plan.division.slices import Overlap

MAX_RUNS = 16384
"""Runs that a rank may have of a block: the arrays that say where they are take 1 MiB or so."""
_MAX_TENSORS = 4096
_GRAIN = 4096
_LONG_RUN = 32 << 10
"""Runs of so many bytes on the average are moved without a copy in between: a system call costs as much as copying
that many."""
_SHORT_RUNS = 64
_TABLE_RUNS = 1 << 19
"""Of all ranks: 12 MiB at most, where every tensor is divided differently; a few hundred runs as models are."""


class Block(NamedTuple):
    """A byte range of one tensor, or several whole ones."""

    first: int
    """The first tensor."""
    last: int
    """The one after the last."""
    start: int
    """First byte in it, where it is one tensor."""
    stop: int
    """Byte after the last."""
    nbytes: int


class Extent(NamedTuple):
    """Neighbours in a file."""

    file: int
    """Index of the file."""
    start: int
    """First byte, an offset in the file."""
    first: int
    """The first of its runs."""
    last: int
    """The one after the last."""


class RankRuns(NamedTuple):
    """What a rank has of a block, in the order of its files."""

    extents: list[Extent]
    offsets: Int64Array
    """Of each run, in the block."""
    lengths: Int64Array
    """Of each run, in bytes."""
    nbytes: int

    @property
    def is_direct(self) -> bool:
        """Whether runs are moved one by one; else they are gathered first, or scattered afterwards."""
        return len(self.lengths) == len(self.extents) or self.nbytes >= _LONG_RUN * len(self.lengths)


class TensorMap:
    """Where all tensors are in one checkpoint, the one that is read or the one that is written."""

    def __init__(
        self, divisions: Sequence[Division], which: NDArray[np.int32], files: Int64Array, starts: Int64Array
    ) -> None:
        self.divisions = divisions
        """The distinct ones."""
        self.which = which
        """The one of each tensor."""
        self.files = files
        """For each rank, the index of the file that each tensor is in."""
        self.starts = starts
        """For each rank, the offset of each tensor in its file."""
        self._tables: dict[int, _RunTable] = {}

    @property
    def world_size(self) -> int:
        return len(self.files)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the arrays take."""
        return self.which.nbytes + self.files.nbytes + self.starts.nbytes

    def most_runs(self) -> Int64Array:
        """Return the runs of each tensor, of the rank that has most."""
        return np.array([division.most_runs for division in self.divisions], np.int64)[self.which]

    def moves(self, block: Block, sizes: Int64Array, rank: int, *, is_read: bool) -> RankRuns:
        """Return what a rank has of a block; where `is_read`, without what a rank before it has too.

        `sizes` are the bytes of all tensors. Slow for many: not for the event loop.
        """
        if block.last == block.first + 1:
            picked = [block.first] if not is_read or rank in self._division(block.first).first_ranks else []
            found = [self._overlap(tensor, rank, block.start, block.stop) for tensor in picked]
            tensors, counts, bases = np.array(picked, np.int64), _counts(found), np.full(len(picked), -block.start)
        else:
            tensors, counts, bases, found = self._whole(block, sizes, rank, is_read=is_read)
        if not counts.sum():
            return RankRuns([], np.empty(0, np.int64), np.empty(0, np.int64), 0)
        return _ordered(
            np.repeat(self.files[rank, tensors], counts),
            np.repeat(self.starts[rank, tensors], counts) + np.concatenate([overlap.local for overlap in found]),
            np.repeat(bases, counts) + np.concatenate([overlap.whole for overlap in found]),
            np.concatenate([overlap.lengths for overlap in found]),
        )

    def _division(self, tensor: int) -> Division:
        return self.divisions[int(self.which[tensor])]

    def _overlap(self, tensor: int, rank: int, start: int, stop: int) -> Overlap:
        return self._division(tensor).slices[rank].within_whole(start, stop)

    def _whole(
        self, block: Block, sizes: Int64Array, rank: int, *, is_read: bool
    ) -> tuple[Int64Array, Int64Array, Int64Array, list[Overlap]]:
        """Return the tensors of a block that a rank has, the runs of each, where each begins in the block, all runs."""
        table = self._table(rank)
        which = self.which[block.first : block.last]
        inside = np.cumsum(sizes[block.first : block.last]) - sizes[block.first : block.last]
        is_wanted = table.is_first[which] if is_read else np.ones(len(which), np.bool_)
        short = np.flatnonzero(is_wanted & (table.counts[which] >= 0))
        long = np.flatnonzero(is_wanted & (table.counts[which] < 0))
        counts = table.counts[which[short]]
        rows = np.repeat(table.begins[which[short]] - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
        found = [Overlap(table.runs.whole[rows], table.runs.local[rows], table.runs.lengths[rows])]
        found += [self._overlap(block.first + at, rank, 0, int(sizes[block.first + at])) for at in long.tolist()]
        picked = np.concatenate((short, long))
        return block.first + picked, np.concatenate((counts, _counts(found[1:]))), inside[picked], found

    def _table(self, rank: int) -> _RunTable:
        if rank not in self._tables:
            self._tables[rank] = _tabulate(self.divisions, rank, _TABLE_RUNS // self.world_size)
        return self._tables[rank]


class _RunTable(NamedTuple):
    """A rank's runs of whole tensors, for the divisions where they are few."""

    begins: Int64Array
    """The first run of each division."""
    counts: Int64Array
    """How many it has; -1 where they are not in the table."""
    runs: Overlap
    is_first: NDArray[np.bool_]
    """Whether the rank is one of the first ranks of each division."""


def _tabulate(divisions: Sequence[Division], rank: int, limit: int) -> _RunTable:
    counts = np.full(len(divisions), -1, np.int64)
    found = [Overlap(*(np.empty(0, np.int64),) * 3)]
    total = 0
    for number, division in enumerate(divisions):
        piece = division.slices[rank]
        count = piece.outer * len(piece.runs)
        if count <= _SHORT_RUNS and total + count <= limit:
            found.append(piece.within_whole(0, piece.outer * piece.stride))
            counts[number] = count
            total += count
    begins = np.cumsum(np.maximum(counts, 0)) - np.maximum(counts, 0)
    is_first = np.array([rank in division.first_ranks for division in divisions], np.bool_)
    return _RunTable(begins, counts, Overlap(*map(np.concatenate, zip(*found, strict=True))), is_first)


def _counts(overlaps: Sequence[Overlap]) -> Int64Array:
    return np.array([len(overlap.lengths) for overlap in overlaps], np.int64)


def cut_blocks(sizes: Int64Array, most_runs: Int64Array, limit: int) -> Iterator[Block]:
    """Yield blocks of at most `limit` bytes, in order. Empty tensors take no part.

    Parameters
    ----------
    sizes : array of int64
        Bytes of each tensor.
    most_runs : array of int64
        Runs of each, of the rank that has most, on whichever side.
    """
    bytes_before = np.concatenate(([0], np.cumsum(sizes)))
    runs_before = np.concatenate(([0], np.cumsum(most_runs)))
    count = len(sizes)
    first = 0
    while first < count:
        last = min(
            int(np.searchsorted(bytes_before, bytes_before[first] + limit, side="right")) - 1,
            int(np.searchsorted(runs_before, runs_before[first] + MAX_RUNS, side="right")) - 1,
            first + _MAX_TENSORS,
        )
        if last > first:
            nbytes = int(bytes_before[last] - bytes_before[first])
            if nbytes:
                yield Block(first, last, 0, nbytes, nbytes)
            first = last
            continue
        size = int(sizes[first])
        step = max(min(limit, size * MAX_RUNS // max(int(most_runs[first]), 1)), 1)
        step = step // _GRAIN * _GRAIN or step
        for start in range(0, size, step):
            stop = min(start + step, size)
            yield Block(first, first + 1, start, stop, stop - start)
        first += 1


def _ordered(files: Int64Array, places: Int64Array, offsets: Int64Array, lengths: Int64Array) -> RankRuns:
    """Put runs in the order of the files, and join those that are neighbours both there and in the block."""
    order = np.lexsort((places, files))
    files, places, offsets, lengths = files[order], places[order], offsets[order], lengths[order]
    is_apart = (files[1:] != files[:-1]) | (places[1:] != places[:-1] + lengths[:-1])
    begins = np.flatnonzero(np.concatenate(([True], is_apart | (offsets[1:] != offsets[:-1] + lengths[:-1]))))
    joined = np.add.reduceat(lengths, begins)
    files, places, offsets = files[begins], places[begins], offsets[begins]
    is_apart = (files[1:] != files[:-1]) | (places[1:] != places[:-1] + joined[:-1])
    firsts = np.flatnonzero(np.concatenate(([True], is_apart)))
    lasts = [*firsts[1:].tolist(), len(files)]
    extents = [
        Extent(file, start, first, last)
        for file, start, first, last in zip(
            files[firsts].tolist(), places[firsts].tolist(), firsts.tolist(), lasts, strict=True
        )
    ]
    return RankRuns(extents, offsets, joined, int(joined.sum()))
