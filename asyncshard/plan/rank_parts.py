"""A rank's part of a file: the file that it would have if the checkpoint had been cut for it.

Such a part has a header of its own, with the shapes of the rank's tensors, in the order of the real file. What is read
of it is found in the real file by columns, one row for each tensor; tensors of the same dtype, shape and placement
share a pattern of runs (:mod:`asyncshard.plan.slices`).
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from asyncshard.errors import CheckpointError
from asyncshard.format.digests import DIGESTS_KEY, DIGITS
from asyncshard.format.dtypes import DTYPES
from asyncshard.format.header import Header, format_header, parse_header
from asyncshard.plan.placements import Placement
from asyncshard.plan.slices import Slice, slice_tensor, whole_tensor
from asyncshard.plan.tp_plan import TpPlan

Offsets = NDArray[np.int64]
Paced = Callable[[Iterable[int]], Iterable[int]]
"""Passes numbers on, and lets others have their turn now and then."""


class Ranges(NamedTuple):
    """Byte ranges of the real file, which ascend and do not touch."""

    offsets: Offsets
    lengths: Offsets


class Patterns(NamedTuple):
    """Slices as columns, a row for each; the runs of all stand in columns of their own."""

    outer: Offsets
    """Rows."""
    strides: Offsets
    """Bytes of a row of the whole tensor."""
    row_bytes: Offsets
    """Bytes of a row of the rank's."""
    first_runs: Offsets
    """Index of the first run of a row; one more than there are patterns."""
    run_offsets: Offsets
    """In a row of the whole tensor."""
    run_locals: Offsets
    """In a row of the rank's."""
    run_lengths: Offsets

    @classmethod
    def of(cls, slices: Iterable[Slice]) -> Patterns:
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
    def runs_in_row(self) -> Offsets:
        return np.diff(self.first_runs)

    def gaps(self, max_gap: int) -> Offsets:
        """Return for each pattern the bytes between its runs, of the gaps that are no longer than `max_gap`."""
        of = np.repeat(np.arange(len(self.outer)), self.runs_in_row)
        ends = self.run_offsets + self.run_lengths
        begins, times = np.append(self.run_offsets[1:], 0), self.outer[of]
        # After the last run of a row comes the first of the next row, once less than there are rows.
        held = np.flatnonzero(self.runs_in_row)
        last = self.first_runs[held + 1] - 1
        begins[last] = self.strides[held] + self.run_offsets[self.first_runs[held]]
        times[last] -= 1
        found = np.zeros(len(self.outer), np.int64)
        np.add.at(found, of, np.where(begins - ends <= max_gap, begins - ends, 0) * times)
        return found


@dataclass(frozen=True, slots=True, eq=False)
class RankPart:
    """What one rank has of one file."""

    header: Header
    """Of the part: names, and shapes of the rank's tensors."""
    starts: Offsets
    """Where each tensor, whole, begins in the real file."""
    kinds: NDArray[np.int32]
    """The row in `patterns` of each."""
    patterns: Patterns
    runs_before: Offsets
    """How many runs the tensors before each one have; one more than there are tensors."""
    digest: str
    """Of all this: parts of equal digests are the same slices."""

    def __eq__(self, other: object) -> bool:
        return self.digest == other.digest if isinstance(other, RankPart) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.digest)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it holds, its header included."""
        return self.header.nbytes + self.starts.nbytes + self.kinds.nbytes + self.runs_before.nbytes

    @property
    def bytes_needed(self) -> int:
        """Bytes of the rank's tensors."""
        return self.header.file_size - self.header.size

    def bytes_read(self, max_gap: int) -> int:
        """Return how many bytes are read for them at most, where ranges `max_gap` apart are read together."""
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
        """Return about how many ranges the bytes [start, stop) of the part are, at most."""
        return self._run_at(stop) - self._run_at(start) + 1 if stop > start else 0

    def batches(self, start: int, stop: int, max_ranges: int) -> Iterator[tuple[int, int]]:
        """Cut [start, stop) of the part into ranges of it that are about `max_ranges` of the real file each at most."""
        while start < stop:
            end = max(self._begin_of(self._run_at(start) + max_ranges), start + 1)
            yield start, min(end, stop)
            start = end

    def ranges(self, start: int, stop: int) -> Ranges:
        """Return where the bytes [start, stop) of the part are in the real file, in their order."""
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
        # A row for each run: which tensor it is of, and its number there.
        of = np.repeat(np.arange(last - first), counts)
        number = np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts, counts)
        row = number // runs[of] + first_rows[of]
        run = number % runs[of] + patterns.first_runs[kinds][of]
        real = self.starts[first:last][of] + row * patterns.strides[kinds][of] + patterns.run_offsets[run]
        local = table.starts[first:last][of] + row * rows[of] + patterns.run_locals[run]
        return _joined(*_clipped(real, local, patterns.run_lengths[run], start, stop))

    def _run_at(self, position: int) -> int:
        """Return the number of the first run of the row in which a byte of the part is."""
        table = self.header.table
        index = int(np.searchsorted(table.stops, position, side="right"))
        if index >= len(self.kinds):
            return int(self.runs_before[-1])
        kind = self.kinds[index]
        row = max(position - int(table.starts[index]), 0) // max(int(self.patterns.row_bytes[kind]), 1)
        return int(self.runs_before[index]) + row * int(self.patterns.runs_in_row[kind])

    def _begin_of(self, run: int) -> int:
        """Return where in the part the row of a run begins; its end for one after the last."""
        index = int(np.searchsorted(self.runs_before, run, side="right")) - 1
        if index >= len(self.kinds):
            return self.header.file_size
        kind = self.kinds[index]
        row = (run - int(self.runs_before[index])) // max(int(self.patterns.runs_in_row[kind]), 1)
        return int(self.header.table.starts[index]) + row * int(self.patterns.row_bytes[kind])


def _clipped(real: Offsets, local: Offsets, lengths: Offsets, start: int, stop: int) -> tuple[Offsets, Offsets]:
    cut = np.maximum(start - local, 0)
    left = np.minimum(lengths, stop - local) - cut
    kept = left > 0
    return (real + cut)[kept], left[kept]


def _joined(offsets: Offsets, lengths: Offsets) -> Ranges:
    """Make one range of those that touch."""
    if len(offsets) < 2:
        return Ranges(offsets, lengths)
    begins = np.flatnonzero(np.concatenate([[True], offsets[1:] != offsets[:-1] + lengths[:-1]]))
    return Ranges(offsets[begins], np.add.reduceat(lengths, begins))


def make_rank_part(
    header: Header,
    plan: TpPlan | None,
    is_wanted: Callable[[str], bool] | None,
    *,
    rank: int,
    world_size: int,
    path: str,
    paced: Paced = iter,
) -> RankPart | None:
    """Plan what a rank has of a file; None if that is all of it.

    Metadata is kept. Digests of tensors are kept while every tensor of the part is whole. Slow for many tensors: call
    it in a thread.

    Parameters
    ----------
    header : Header
        Of the real file.
    plan : TpPlan, optional
        Where tensors are placed; None leaves them whole.
    is_wanted : callable, optional
        Whether a tensor of this name is in the part; None for all.
    path : str
        For messages.

    Raises
    ------
    CheckpointError
        A tensor cannot be divided as its placement says.
    """
    planner = _Planner(plan, rank, world_size)
    row, name_of = header.table.row, header.table.name
    starts, kinds, kept = array("q"), array("i"), array("q")
    try:
        for index in paced(range(len(header))):
            name, code, shape, start, _ = row(index)
            if is_wanted is None or is_wanted(name):
                kinds.append(planner.kind_of(name, code, shape))
                starts.append(start)
                kept.append(index)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}", path=path, tensor=error.tensor) from None
    if len(kept) == len(header) and planner.are_whole:
        return None

    def tensors() -> Iterator[tuple[str, str, tuple[int, ...], int]]:
        # In a second pass: a list of them would set off the garbage collector.
        for number in paced(range(len(kept))):
            kind = kinds[number]
            yield name_of(kept[number]), planner.dtypes[kind], planner.slices[kind].shape, sizes[kind]

    sizes = [piece.nbytes for piece in planner.slices]
    text = format_header(tensors(), _metadata(header, np.array(kept, np.int64), are_whole=planner.are_whole))
    virtual = parse_header(text, len(text) + sum(map(sizes.__getitem__, kinds)), path=path)
    return _finish(virtual, text, np.array(starts, np.int64), np.array(kinds, np.int32), Patterns.of(planner.slices))


def rename(header: Header, part: RankPart | None, name: str, other: str) -> RankPart:
    """Return one tensor of a file, or of a rank's part of it, alone and under another name."""
    index = header.table.find(name)
    one = slice(index, index + 1)
    _, code, shape, start, stop = header.table.row(index)
    dtype = DTYPES[code]
    text = format_header([(other, dtype.name, shape, stop - start)])
    virtual = parse_header(text, len(text) + stop - start)
    if part is not None:
        return _finish(virtual, text, part.starts[one], part.kinds[one], part.patterns)
    whole = Patterns.of([whole_tensor(shape, dtype.bits)])
    return _finish(virtual, text, header.table.starts[one], np.zeros(1, np.int32), whole)


def _finish(
    virtual: Header, text: bytearray, starts: Offsets, kinds: NDArray[np.int32], patterns: Patterns
) -> RankPart:
    counts = (patterns.outer * patterns.runs_in_row)[kinds] if len(kinds) else np.empty(0, np.int64)
    digest = hashlib.blake2b(text, digest_size=16)
    for column in (starts, kinds, *patterns):
        digest.update(column.tobytes())
    runs_before = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return RankPart(virtual, starts, kinds, patterns, runs_before, digest.hexdigest())


def _metadata(header: Header, kept: Offsets, *, are_whole: bool) -> dict[str, str]:
    metadata = header.metadata
    digests = metadata.pop(DIGESTS_KEY, None)
    if digests is None or not are_whole:
        return metadata
    if digests.isascii() and len(digests) == DIGITS * len(header):
        rows = np.frombuffer(digests.encode("ascii"), np.uint8).reshape(-1, DIGITS)
        digests = rows[kept].tobytes().decode("ascii")
    return {**metadata, DIGESTS_KEY: digests}  # malformed ones as they are: whoever reads them says so


class _Planner:
    """Slices, made once for all tensors of the same dtype, shape and placement."""

    def __init__(self, plan: TpPlan | None, rank: int, world_size: int) -> None:
        self._plan = plan
        self._rank = rank
        self._world_size = world_size
        self._kinds: dict[tuple[int, tuple[int, ...], Placement | None], int] = {}
        self._kinds_of_groups: dict[tuple[int, tuple[int, ...], str], int] = {}
        self.slices: list[Slice] = []
        self.dtypes: list[str] = []
        """Of the tensors of each slice."""
        self.are_whole = True

    def kind_of(self, name: str, code: int, shape: tuple[int, ...]) -> int:
        """Return the place in `slices` of a tensor's."""
        key = code, shape, "" if self._plan is None else self._plan.group_of(name)
        kind = self._kinds_of_groups.get(key)
        if kind is None:
            kind = self._kinds_of_groups[key] = self._find(name, code, shape)
        return kind

    def _find(self, name: str, code: int, shape: tuple[int, ...]) -> int:
        placement = None if self._plan is None else self._plan.placement_of(name, shape)
        kind = self._kinds.get((code, shape, placement))
        if kind is None:
            if placement is None:
                made = whole_tensor(shape, DTYPES[code].bits)
            else:
                made = slice_tensor(
                    name, shape, DTYPES[code].bits, placement, rank=self._rank, world_size=self._world_size
                )
            self.are_whole = self.are_whole and made.shape == shape
            kind = self._kinds[code, shape, placement] = len(self.slices)
            self.slices.append(made)
            self.dtypes.append(DTYPES[code].name)
        return kind
