"""File slices: the bytes of a file that belong to one rank, as a virtual file.

The virtual file has its own header, with the shapes of the rank's tensors, in the order of the real file. Columns with
one row for each tensor map its bytes to the real file. Tensors of the same dtype, shape and placement share a pattern
of runs (:mod:`asyncshard.plan.division.slices`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from asyncshard._typing import Int64Array
from asyncshard.format.header import Header
from asyncshard.plan.division.slices import Slice
from asyncshard.plan.ranges import merge_ranges


class Ranges(NamedTuple):
    """Byte ranges of the real file, which ascend and are separated by gaps."""

    offsets: Int64Array
    lengths: Int64Array


class Patterns(NamedTuple):
    """The distinct slices of tensors as columns. The columns `run_*` have an element for each run of all slices."""

    outer: Int64Array
    """The number of rows of each slice."""
    strides: Int64Array
    """The number of bytes of a row of the whole tensor."""
    row_bytes: Int64Array
    """The number of bytes of a row of the rank's tensor."""
    first_runs: Int64Array
    """Index of the first run of each slice, and at the end the number of all runs."""
    run_offsets: Int64Array
    """Offset of each run in a row of the whole tensor."""
    run_locals: Int64Array
    """Offset of each run in a row of the rank's tensor."""
    run_lengths: Int64Array
    """Length of each run in bytes."""

    @classmethod
    def of(cls, slices: Iterable[Slice]) -> Patterns:
        """Return slices as columns."""
        slices = list(slices)
        runs = [run for piece in slices for run in piece.runs]
        local = [at for piece in slices for at in [0, *accumulate(length for _, length in piece.runs)][:-1]]
        columns = (
            [piece.outer for piece in slices],
            [piece.stride for piece in slices],
            [piece.row_bytes for piece in slices],
            [0, *accumulate(len(piece.runs) for piece in slices)],
            [offset for offset, _ in runs],
            local,
            [length for _, length in runs],
        )
        return cls(*(np.array(column, np.int64) for column in columns))

    @property
    def runs_in_row(self) -> Int64Array:
        """The number of runs in a row of each slice."""
        return np.diff(self.first_runs)

    def gaps(self, max_gap: int) -> Int64Array:
        """Return for each slice the sum of the gaps between its runs, without gaps longer than `max_gap` bytes."""
        of = np.repeat(np.arange(len(self.outer)), self.runs_in_row)
        ends = self.run_offsets + self.run_lengths
        begins, times = np.append(self.run_offsets[1:], 0), self.outer[of]
        # The last run of a row is followed by the first run of the next row, except in the last row.
        held = np.flatnonzero(self.runs_in_row)
        last = self.first_runs[held + 1] - 1
        begins[last] = self.strides[held] + self.run_offsets[self.first_runs[held]]
        times[last] -= 1
        found = np.zeros(len(self.outer), np.int64)
        np.add.at(found, of, np.where(begins - ends <= max_gap, begins - ends, 0) * times)
        return found


@dataclass(frozen=True, slots=True, eq=False)
class FileSlice:
    """The bytes of one file that belong to one rank, as a virtual file."""

    header: Header
    """The header of the virtual file, with the shapes of the rank's tensors."""
    starts: Int64Array
    """Offset in the real file of each whole tensor."""
    kinds: NDArray[np.int32]
    """The row in `patterns` of each tensor."""
    patterns: Patterns
    """The distinct slices of the tensors."""
    runs_before: Int64Array
    """The number of runs of all tensors before each tensor, and at the end the number of all runs."""
    digest: str
    """A text that identifies the tensors and their slices; two slices of one file with the same digest are equal."""

    def __eq__(self, other: object) -> bool:
        return self.digest == other.digest if isinstance(other, FileSlice) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.digest)

    @property
    def nbytes(self) -> int:
        """The number of bytes of memory that the slice takes, its header included."""
        return self.header.nbytes + self.starts.nbytes + self.kinds.nbytes + self.runs_before.nbytes

    @property
    def bytes_needed(self) -> int:
        """The number of bytes of the rank's tensors."""
        return self.header.file_size - self.header.size

    def bytes_read(self, max_gap: int) -> int:
        """Return the most bytes that are read for the rank's tensors if gaps of up to `max_gap` bytes are read too."""
        patterns, table = self.patterns, self.header.table
        inside = int(patterns.gaps(max_gap)[self.kinds].sum())
        held = np.flatnonzero(table.stops > table.starts)
        kinds = self.kinds[held]
        last_runs = patterns.first_runs[kinds + 1] - 1
        last_ends = patterns.run_offsets[last_runs] + patterns.run_lengths[last_runs]
        ends = self.starts[held] + (patterns.outer[kinds] - 1) * patterns.strides[kinds] + last_ends
        begins = self.starts[held] + patterns.run_offsets[patterns.first_runs[kinds]]
        between = begins[1:] - ends[:-1]
        return self.bytes_needed + inside + int(between[between <= max_gap].sum())

    def count(self, start: int, stop: int) -> int:
        """Return an upper estimate of the number of ranges of the real file for the virtual bytes [start, stop)."""
        return self._run_at(stop) - self._run_at(start) + 1 if stop > start else 0

    def batches(self, start: int, stop: int, max_ranges: int) -> Iterator[tuple[int, int]]:
        """Yield virtual byte ranges that make up [start, stop), each of about `max_ranges` ranges of the real file."""
        while start < stop:
            end = max(self._begin_of(self._run_at(start) + max_ranges), start + 1)
            yield start, min(end, stop)
            start = end

    def ranges(self, start: int, stop: int) -> Ranges:
        """Return the ranges of the real file for the bytes [start, stop) of the virtual file, in order."""
        table, patterns = self.header.table, self.patterns
        first = int(np.searchsorted(table.stops, start, side="right"))
        last = int(np.searchsorted(table.starts, stop, side="left"))
        if stop <= start or last <= first:
            return Ranges(np.empty(0, np.int64), np.empty(0, np.int64))
        kinds = self.kinds[first:last]
        rows = patterns.row_bytes[kinds]
        first_rows = np.zeros(last - first, np.int64)
        last_rows = patterns.outer[kinds]
        if rows[-1]:
            last_rows[-1] = -(-(stop - table.starts[last - 1]) // rows[-1])
            last_rows[-1] = min(last_rows[-1], patterns.outer[kinds[-1]])
        if rows[0]:
            first_rows[0] = (start - table.starts[first]) // rows[0]
        runs = patterns.runs_in_row[kinds]
        counts = (last_rows - first_rows) * runs
        # One element for each run: the index of its tensor, and the number of the run in that tensor.
        of = np.repeat(np.arange(last - first), counts)
        number = np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts, counts)
        row = number // runs[of] + first_rows[of]
        run = number % runs[of] + patterns.first_runs[kinds][of]
        real = self.starts[first:last][of] + row * patterns.strides[kinds][of] + patterns.run_offsets[run]
        local = table.starts[first:last][of] + row * rows[of] + patterns.run_locals[run]
        return _joined(*_clipped(real, local, patterns.run_lengths[run], start, stop))

    def _run_at(self, position: int) -> int:
        """Return the number of the first run in the row that holds a byte of the virtual file."""
        table = self.header.table
        index = int(np.searchsorted(table.stops, position, side="right"))
        if index >= len(self.kinds):
            return int(self.runs_before[-1])
        kind = self.kinds[index]
        row = max(position - int(table.starts[index]), 0) // max(int(self.patterns.row_bytes[kind]), 1)
        return int(self.runs_before[index]) + row * int(self.patterns.runs_in_row[kind])

    def _begin_of(self, run: int) -> int:
        """Return the offset in the virtual file of the row that holds a run; after the last run, the file's end."""
        index = int(np.searchsorted(self.runs_before, run, side="right")) - 1
        if index >= len(self.kinds):
            return self.header.file_size
        kind = self.kinds[index]
        row = (run - int(self.runs_before[index])) // max(int(self.patterns.runs_in_row[kind]), 1)
        return int(self.header.table.starts[index]) + row * int(self.patterns.row_bytes[kind])


def _clipped(
    real: Int64Array, local: Int64Array, lengths: Int64Array, start: int, stop: int
) -> tuple[Int64Array, Int64Array]:
    cut = np.maximum(start - local, 0)
    left = np.minimum(lengths, stop - local) - cut
    kept = left > 0
    return (real + cut)[kept], left[kept]


def _joined(offsets: Int64Array, lengths: Int64Array) -> Ranges:
    """Return ranges in which neighbours without a gap are joined."""
    if len(offsets) < 2:
        return Ranges(offsets, lengths)
    bounds = merge_ranges(offsets, lengths, max_gap=0, max_bytes=sys.maxsize, max_count=sys.maxsize)
    begins = bounds[:-1]
    return Ranges(offsets[begins], np.add.reduceat(lengths, begins))
