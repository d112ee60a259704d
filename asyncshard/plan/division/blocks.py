"""Blocks: the portions in which `reshard` moves tensors, and where the bytes of a block lie in the files of each rank.

A block is several whole tensors, or a byte range of one tensor. In memory its bytes lie one after the other. In the
files of a rank they are runs, some of which lie next to each other.
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
"""A rank has at most 16,384 runs of a block: the arrays that describe them take about 1 MiB."""
_MAX_TENSORS = 4096
"""A block has at most 4,096 tensors."""
_GRAIN = 4096
"""A block of one tensor is a multiple of 4,096 bytes long, if the limits allow such a length."""
_LONG_RUN = 32 << 10
"""Runs of 32 KiB or more on average are moved one by one: a system call takes about as long as copying 32 KiB."""
_SHORT_RUNS = 64
"""A table of runs contains the divisions of which its rank has at most 64 runs."""
_TABLE_RUNS = 1 << 19
"""The tables of all ranks together have at most 524,288 runs: 12 MiB, reached if every tensor is divided differently.
For real models they have a few hundred runs."""


class Block(NamedTuple):
    """Several whole tensors, or a byte range of one tensor."""

    first: int
    """Index of the first tensor."""
    last: int
    """Index after that of the last tensor."""
    start: int
    """Offset in the tensor of the block's first byte; 0 for whole tensors."""
    stop: int
    """Offset in the tensor after the block's last byte; `nbytes` for whole tensors."""
    nbytes: int
    """The number of bytes of the block."""


class Extent(NamedTuple):
    """Runs of a block that lie one after the other in a file."""

    file: int
    """Index of the file."""
    start: int
    """Offset in the file of the first run."""
    first: int
    """Index of the first run."""
    last: int
    """Index after that of the last run."""


class RankRuns(NamedTuple):
    """The runs that a rank has of a block, in the order of its files."""

    extents: list[Extent]
    """The same runs, grouped by extents of the files."""
    offsets: Int64Array
    """Offset of each run in the block."""
    lengths: Int64Array
    """Length of each run in bytes."""
    nbytes: int
    """The sum of the lengths."""

    @property
    def is_direct(self) -> bool:
        """Whether runs are moved one by one. Otherwise they are gathered before a write, or scattered after a read."""
        return len(self.lengths) == len(self.extents) or self.nbytes >= _LONG_RUN * len(self.lengths)


class TensorMap:
    """Where every tensor lies in one checkpoint: the one that is read, or the one that is written."""

    def __init__(
        self, divisions: Sequence[Division], division_of: NDArray[np.int32], files: Int64Array, starts: Int64Array
    ) -> None:
        self.divisions = divisions
        """The distinct divisions of the tensors."""
        self.division_of = division_of
        """For each tensor, the index of its division."""
        self.files = files
        """For each rank, the index of the file that holds each tensor."""
        self.starts = starts
        """For each rank, the offset of each tensor in its file."""
        self._tables: dict[int, _RunTable] = {}

    @property
    def world_size(self) -> int:
        return len(self.files)

    @property
    def nbytes(self) -> int:
        """The number of bytes of memory that the arrays take."""
        return self.division_of.nbytes + self.files.nbytes + self.starts.nbytes

    def most_runs(self) -> Int64Array:
        """Return for each tensor the number of runs of the rank that has the most runs of it."""
        return np.array([division.most_runs for division in self.divisions], np.int64)[self.division_of]

    def rank_runs(self, block: Block, sizes: Int64Array, rank: int, *, is_read: bool) -> RankRuns:
        """Return the runs that a rank has of a block.

        With `is_read`, tensors are left out of which a lower rank holds the same bytes. `sizes` are the bytes of all
        tensors. This is slow for many tensors: call it off the event loop.
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
        return self.divisions[int(self.division_of[tensor])]

    def _overlap(self, tensor: int, rank: int, start: int, stop: int) -> Overlap:
        return self._division(tensor).slices[rank].within_whole(start, stop)

    def _whole(
        self, block: Block, sizes: Int64Array, rank: int, *, is_read: bool
    ) -> tuple[Int64Array, Int64Array, Int64Array, list[Overlap]]:
        """Return the tensors of a block that a rank has: indexes, numbers of runs, offsets in the block, and runs."""
        table = self._table(rank)
        divisions = self.division_of[block.first : block.last]
        inside = np.cumsum(sizes[block.first : block.last]) - sizes[block.first : block.last]
        is_wanted = table.is_first[divisions] if is_read else np.ones(len(divisions), np.bool_)
        short = np.flatnonzero(is_wanted & (table.counts[divisions] >= 0))
        long = np.flatnonzero(is_wanted & (table.counts[divisions] < 0))
        counts = table.counts[divisions[short]]
        begins = table.begins[divisions[short]] - (np.cumsum(counts) - counts)
        rows = np.repeat(begins, counts) + np.arange(counts.sum())
        found = [Overlap(table.runs.whole[rows], table.runs.local[rows], table.runs.lengths[rows])]
        found += [self._overlap(tensor, rank, 0, int(sizes[tensor])) for tensor in (block.first + long).tolist()]
        picked = np.concatenate((short, long))
        return block.first + picked, np.concatenate((counts, _counts(found[1:]))), inside[picked], found

    def _table(self, rank: int) -> _RunTable:
        if rank not in self._tables:
            self._tables[rank] = _tabulate(self.divisions, rank, _TABLE_RUNS // self.world_size)
        return self._tables[rank]


class _RunTable(NamedTuple):
    """The runs that a rank has of whole tensors, for the divisions that give it few runs."""

    begins: Int64Array
    """Index in `runs` of the first run of each division."""
    counts: Int64Array
    """The number of runs of each division; -1 for a division that is not in the table."""
    runs: Overlap
    """The runs of all divisions in the table."""
    is_first: NDArray[np.bool_]
    """Whether the rank is one of the `first_ranks` of each division."""


def _tabulate(divisions: Sequence[Division], rank: int, limit: int) -> _RunTable:
    """Return the table of a rank, with at most `limit` runs."""
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
    """Yield the blocks of all tensors in order, each of at most `limit` bytes. No block is made of empty tensors alone.

    Parameters
    ----------
    sizes : array of int64
        The number of bytes of each tensor.
    most_runs : array of int64
        For each tensor, the number of runs of the rank that has the most runs, in the old or the new checkpoint.
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


def _ordered(files: Int64Array, starts: Int64Array, offsets: Int64Array, lengths: Int64Array) -> RankRuns:
    """Sort runs by file and by `starts`, their offsets there, and join runs that are neighbours in file and block."""
    order = np.lexsort((starts, files))
    files, starts, offsets, lengths = files[order], starts[order], offsets[order], lengths[order]
    is_apart = (files[1:] != files[:-1]) | (starts[1:] != starts[:-1] + lengths[:-1])
    begins = np.flatnonzero(np.concatenate(([True], is_apart | (offsets[1:] != offsets[:-1] + lengths[:-1]))))
    joined = np.add.reduceat(lengths, begins)
    files, starts, offsets = files[begins], starts[begins], offsets[begins]
    is_apart = (files[1:] != files[:-1]) | (starts[1:] != starts[:-1] + joined[:-1])
    firsts = np.flatnonzero(np.concatenate(([True], is_apart)))
    lasts = [*firsts[1:].tolist(), len(files)]
    extents = [
        Extent(file, start, first, last)
        for file, start, first, last in zip(
            files[firsts].tolist(), starts[firsts].tolist(), firsts.tolist(), lasts, strict=True
        )
    ]
    return RankRuns(extents, offsets, joined, int(joined.sum()))
