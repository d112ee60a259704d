"""The planning of file slices: which tensors of a file a rank wants, and how each of them is divided."""

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
    """Return the slice of a file that belongs to a rank; None if that is the whole file.

    The slice has the metadata of the file. It has the digests of the tensors only if all its tensors are whole. This is
    slow for many tensors: call it in a thread.

    Parameters
    ----------
    header : Header
        The header of the real file.
    plan : TpPlan, optional
        The placements of the tensors; None leaves all tensors whole.
    is_wanted : callable, optional
        Returns whether the slice has the tensor of a given name; None if it has all tensors.
    path : str
        The path of the file, for messages.

    Raises
    ------
    CheckpointError
        A tensor cannot be divided by its placement.
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
    return _assemble(virtual, facts, table.starts[rows], kinds, Patterns.of(planner.slices))


def alias_slice(header: Header, file_slice: FileSlice | None, stored_name: str, alias: str) -> FileSlice:
    """Return a slice with a single tensor of a file, or of a slice of the file, under another name."""
    index = header.table.find(stored_name)
    _, code, shape, _, _ = header.table.row(index)
    if file_slice is None:
        return _slice_of_one(header, index, alias, whole_tensor(shape, DTYPES[code].bits))
    one = slice(index, index + 1)
    virtual = _header_of_one(header, index, alias, shape)
    digest = _digest_of([shape], alias)
    return _assemble(virtual, digest, file_slice.starts[one], file_slice.kinds[one], file_slice.patterns)


def alias_slice_by_plan(
    header: Header, stored_name: str, alias: str, plan: TpPlan, *, rank: int, world_size: int, path: str
) -> tuple[FileSlice, bool]:
    """Return a slice with a single tensor of a file under another name, divided as the plan says for that name.

    Also returns whether the plan divides the tensor in the same way under both names.

    Raises
    ------
    CheckpointError
        The tensor cannot be divided by a placement of the plan.
    """
    index = header.table.find(stored_name)
    _, code, shape, _, _ = header.table.row(index)

    def pieces_of(each: str) -> list[Slice]:
        placement, bits = plan.placement_of(each, shape), DTYPES[code].bits
        return [slice_tensor(each, shape, bits, placement, rank=at, world_size=world_size) for at in range(world_size)]

    try:
        pieces, stored_pieces = pieces_of(alias), pieces_of(stored_name)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}", path=path, tensor=error.tensor) from None
    return _slice_of_one(header, index, alias, pieces[rank]), pieces == stored_pieces


def _slice_of_one(header: Header, index: int, name: str, piece: Slice) -> FileSlice:
    """Return a slice with one tensor of a file, under a name of its own."""
    virtual = _header_of_one(header, index, name, piece.shape)
    starts = header.table.starts[index : index + 1]
    facts = _digest_of([piece.shape], name)
    return _assemble(virtual, facts, starts, np.zeros(1, np.int32), Patterns.of([piece]))


def _header_of_one(header: Header, index: int, name: str, shape: tuple[int, ...]) -> Header:
    return header.take(np.array([index], np.int64), [shape], np.zeros(1, np.int32), names=[name])


def _numbered(values: NDArray[np.int32]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Number values in order of first occurrence; return the index of each first one, and the number of each value."""
    _, firsts, numbers = np.unique(values, return_index=True, return_inverse=True)
    order = np.argsort(firsts)
    return firsts[order], np.argsort(order)[numbers]


def _digest_of(shapes: Sequence[tuple[int, ...]], named: Int64Array | str) -> hashlib.blake2b:
    """Return the digest of a slice's distinct shapes, and of its rows in the file or the new name of its one tensor."""
    digest = hashlib.blake2b(digest_size=16)
    for shape in shapes:
        digest.update(repr(shape).encode("ascii"))
    digest.update(f"name {named}".encode() if isinstance(named, str) else named.tobytes())
    return digest


def _assemble(
    virtual: Header, digest: hashlib.blake2b, starts: Int64Array, kinds: NDArray[np.int32], patterns: Patterns
) -> FileSlice:
    """Return the slice of these columns, after counting its runs and completing its digest."""
    counts = (patterns.outer * patterns.runs_in_row)[kinds] if len(kinds) else np.empty(0, np.int64)
    for column in (virtual.table.dtype_codes, starts, kinds, *patterns):
        digest.update(column.tobytes())
    runs_before = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return FileSlice(virtual, starts, kinds, patterns, runs_before, digest.hexdigest())


def _metadata(header: Header, rows: Int64Array, *, are_whole: bool) -> dict[str, str]:
    """Return the metadata of a slice, with the digests of its tensors if they are whole."""
    metadata = header.metadata
    digests = metadata.pop(DIGESTS_KEY, None)
    if digests is None or not are_whole:
        return metadata
    if digests.isascii() and len(digests) == DIGITS * len(header):
        digits = np.frombuffer(digests.encode("ascii"), np.uint8).reshape(-1, DIGITS)
        digests = digits[rows].tobytes().decode("ascii")
    return {**metadata, DIGESTS_KEY: digests}  # malformed digests are copied: reading them raises the error


class _Planner:
    """Makes the slices of tensors, each once for all tensors of the same dtype, shape and placement."""

    def __init__(self, plan: TpPlan | None, rank: int, world_size: int) -> None:
        self._plan = plan
        self._rank = rank
        self._world_size = world_size
        self._kinds: dict[tuple[int, tuple[int, ...], Placement | None], int] = {}
        self.slices: list[Slice] = []
        """The distinct slices."""
        self.are_whole = True
        """Whether each slice is the whole tensor."""

    def kind_of(self, name: str, code: int, shape: tuple[int, ...]) -> int:
        """Return the index in `slices` of a tensor's slice."""
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
