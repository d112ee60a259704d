"""Plan a rank's part of a file: which of its tensors are wanted, how each is divided, and what the part's header is."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from asyncshard._typing import Int64Array
from asyncshard.errors import CheckpointError
from asyncshard.format.digests import DIGESTS_KEY, DIGITS
from asyncshard.format.dtypes import DTYPES
from asyncshard.format.header import Header
from asyncshard.plan.division.placements import Placement
from asyncshard.plan.division.slices import Slice, slice_tensor, whole_tensor
from asyncshard.plan.file_slices.file_slice import FileSlice, Patterns
from asyncshard.plan.tp.plan import TpPlan, YieldingGil


def make_file_slice(
    header: Header,
    plan: TpPlan | None,
    is_wanted: Callable[[str], bool] | None,
    *,
    rank: int,
    world_size: int,
    path: str,
    yielding_gil: YieldingGil = iter,
) -> FileSlice | None:
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
    table = header.table
    if is_wanted is None:
        rows = np.arange(len(header), dtype=np.int64)
    else:
        rows = np.fromiter((row for row in yielding_gil(range(len(header))) if is_wanted(table.name(row))), np.int64)
    alike = table.kinds("")[0] if plan is None else plan.kinds(table)
    firsts, numbers = _numbered(alike[rows])
    planner = _Planner(plan, rank, world_size)
    try:
        found = [planner.kind_of(*table.row(row)[:3]) for row in yielding_gil(rows[firsts].tolist())]
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}", path=path, tensor=error.tensor) from None
    if len(rows) == len(header) and planner.are_whole:
        return None
    kinds = np.array(found, np.int32)[numbers]
    shapes = [piece.shape for piece in planner.slices]
    virtual = header.take(rows, shapes, kinds, metadata=_metadata(header, rows, are_whole=planner.are_whole))
    facts = _digest_of(shapes, rows)
    return _finish(virtual, facts, table.starts[rows], kinds, Patterns.of(planner.slices))


def alias_slice(header: Header, part: FileSlice | None, name: str, other: str) -> FileSlice:
    """Return one tensor of a file, or of a rank's part of it, alone and under another name."""
    index = header.table.find(name)
    _, code, shape, _, _ = header.table.row(index)
    if part is None:
        return _alone(header, index, other, whole_tensor(shape, DTYPES[code].bits))
    one = slice(index, index + 1)
    virtual = _header_of_one(header, index, other, shape)
    return _finish(virtual, _digest_of([shape], other), part.starts[one], part.kinds[one], part.patterns)


def alias_slice_by_plan(
    header: Header, name: str, other: str, plan: TpPlan, *, rank: int, world_size: int, path: str
) -> tuple[FileSlice, bool]:
    """Return one tensor of a file, alone and under another name, divided as the plan says for that.

    Also whether every rank has the same of it under its own name.

    Raises
    ------
    CheckpointError
        It cannot be divided so.
    """
    index = header.table.find(name)
    _, code, shape, _, _ = header.table.row(index)

    def pieces_of(each: str) -> list[Slice]:
        placement, bits = plan.placement_of(each, shape), DTYPES[code].bits
        return [slice_tensor(each, shape, bits, placement, rank=at, world_size=world_size) for at in range(world_size)]

    try:
        pieces, own = pieces_of(other), pieces_of(name)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}", path=path, tensor=error.tensor) from None
    return _alone(header, index, other, pieces[rank]), pieces == own


def _alone(header: Header, index: int, other: str, piece: Slice) -> FileSlice:
    virtual = _header_of_one(header, index, other, piece.shape)
    starts = header.table.starts[index : index + 1]
    facts = _digest_of([piece.shape], other)
    return _finish(virtual, facts, starts, np.zeros(1, np.int32), Patterns.of([piece]))


def _header_of_one(header: Header, index: int, name: str, shape: tuple[int, ...]) -> Header:
    return header.take(np.array([index], np.int64), [shape], np.zeros(1, np.int32), names=[name])


def _numbered(values: NDArray[np.int32]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return where each value is first, in this order, and for each place the number of its value among these."""
    _, firsts, numbers = np.unique(values, return_index=True, return_inverse=True)
    order = np.argsort(firsts)
    return firsts[order], np.argsort(order)[numbers]


def _digest_of(shapes: Sequence[tuple[int, ...]], named: Int64Array | str) -> hashlib.blake2b:
    """Begin a slice's digest with its distinct shapes, and its rows in the file or the one name that it has instead."""
    digest = hashlib.blake2b(digest_size=16)
    for shape in shapes:
        digest.update(repr(shape).encode("ascii"))
    digest.update(f"name {named}".encode() if isinstance(named, str) else named.tobytes())
    return digest


def _finish(
    virtual: Header, digest: hashlib.blake2b, starts: Int64Array, kinds: NDArray[np.int32], patterns: Patterns
) -> FileSlice:
    counts = (patterns.outer * patterns.runs_in_row)[kinds] if len(kinds) else np.empty(0, np.int64)
    for column in (virtual.table.dtype_codes, starts, kinds, *patterns):
        digest.update(column.tobytes())
    runs_before = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return FileSlice(virtual, starts, kinds, patterns, runs_before, digest.hexdigest())


def _metadata(header: Header, rows: Int64Array, *, are_whole: bool) -> dict[str, str]:
    metadata = header.metadata
    digests = metadata.pop(DIGESTS_KEY, None)
    if digests is None or not are_whole:
        return metadata
    if digests.isascii() and len(digests) == DIGITS * len(header):
        digits = np.frombuffer(digests.encode("ascii"), np.uint8).reshape(-1, DIGITS)
        digests = digits[rows].tobytes().decode("ascii")
    return {**metadata, DIGESTS_KEY: digests}  # malformed ones as they are: whoever reads them says so


class _Planner:
    """Slices, made once for all tensors of the same dtype, shape and placement."""

    def __init__(self, plan: TpPlan | None, rank: int, world_size: int) -> None:
        self._plan = plan
        self._rank = rank
        self._world_size = world_size
        self._kinds: dict[tuple[int, tuple[int, ...], Placement | None], int] = {}
        self.slices: list[Slice] = []
        self.are_whole = True

    def kind_of(self, name: str, code: int, shape: tuple[int, ...]) -> int:
        """Return the place in `slices` of a tensor's."""
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
        return kind
