"""Slices: which bytes of a tensor belong to a rank.

A tensor is stored row-major. It has a row of bytes for each index of the dimensions before the divided one, and a rank
has the same few runs of bytes in each row:

    whole tensor      |....AAAA....BB..|....AAAA....BB..|     outer = 2 rows, stride = 16 bytes, runs = (4, 4), (12, 2)
    rank's tensor     |AAAABB|AAAABB|

If the tensor is divided along dimension 0 there is a single row, and each run is one byte range of the tensor.
"""

from __future__ import annotations

import math
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from asyncshard._typing import Int64Array
from asyncshard.errors import CheckpointError
from asyncshard.plan.division.chunks import chunk_bounds
from asyncshard.plan.division.placements import PackedShard, Placement, Replicate, Shard


class Overlap(NamedTuple):
    """Runs of bytes, and where they lie in the whole tensor and in the rank's tensor."""

    whole: Int64Array
    """Offset of each run in the whole tensor."""
    local: Int64Array
    """Offset of each run in the rank's tensor."""
    lengths: Int64Array
    """Length of each run in bytes."""


class Slice(NamedTuple):
    """The bytes of one tensor that belong to a rank."""

    shape: tuple[int, ...]
    """Shape of the rank's tensor."""
    outer: int
    """The number of rows."""
    stride: int
    """The number of bytes of a row of the whole tensor."""
    runs: tuple[tuple[int, int], ...]
    """Offset in a row and length of each run, in bytes, in ascending order."""

    @property
    def row_bytes(self) -> int:
        """The number of bytes of a row of the rank's tensor."""
        return sum(length for _, length in self.runs)

    @property
    def nbytes(self) -> int:
        """The number of bytes of the rank's tensor."""
        return self.outer * self.row_bytes

    def within_whole(self, start: int, stop: int) -> Overlap:
        """Return the runs of the slice within the bytes [start, stop) of the whole tensor, in ascending order.

        In the rank's tensor these runs lie one after the other.
        """
        first, last = (start // self.stride, -(-stop // self.stride)) if self.stride and stop > start else (0, 0)
        rows = np.arange(first, min(last, self.outer), dtype=np.int64)[:, None]
        offsets, lengths = np.array(self.runs, np.int64).reshape(-1, 2).T
        in_row = np.array([0, *accumulate(lengths.tolist())][:-1], np.int64)
        whole, local = (rows * self.stride + offsets).ravel(), (rows * self.row_bytes + in_row).ravel()
        cut = np.maximum(start - whole, 0)
        left = np.minimum(np.tile(lengths, len(rows)), stop - whole) - cut
        is_inside = left > 0
        return Overlap((whole + cut)[is_inside], (local + cut)[is_inside], left[is_inside])


def slice_tensor(
    name: str, shape: tuple[int, ...], bits: int, placement: Placement, *, rank: int, world_size: int
) -> Slice:
    """Return the slice of a tensor that belongs to a rank.

    Parameters
    ----------
    name : str
        The tensor's name, for messages.
    shape : tuple of int
        The shape of the whole tensor, in elements.
    bits : int
        The number of bits of one element.

    Raises
    ------
    CheckpointError
        The tensor cannot be divided by this placement: it does not have the dimension, the sizes of a `PackedShard` do
        not add up, the number of ranks is no multiple of the number of pieces, or a piece of elements of 4 or 6 bits
        would begin within a byte.
    """
    if isinstance(placement, Replicate):
        return whole_tensor(shape, bits)
    dim = placement.dim + len(shape) if placement.dim < 0 else placement.dim
    if not 0 <= dim < len(shape):
        raise _cannot(name, shape, placement, "there is no such dimension")
    pieces, index = _piece(name, shape, placement, rank, world_size)
    if pieces == 1 and isinstance(placement, Shard):
        return whole_tensor(shape, bits)
    sizes = placement.sizes if isinstance(placement, PackedShard) else (shape[dim],)
    if sum(sizes) != shape[dim]:
        raise _cannot(name, shape, placement, f"the sizes add up to {sum(sizes)}, not {shape[dim]}")
    outer, inner = math.prod(shape[:dim]), math.prod(shape[dim + 1 :]) * bits
    starts = [0, *accumulate(sizes)]
    cuts = {
        start + bound for start, size in zip(starts, sizes, strict=False) for bound in chunk_bounds(size, pieces, 0)
    }
    if outer and inner and any(cut * inner % 8 for cut in cuts | {shape[dim]}):
        raise _cannot(name, shape, placement, f"a piece would begin within a byte, with elements of {bits} bits")
    bounds = [
        (start + first, start + last)
        for start, size in zip(starts, sizes, strict=False)
        for first, last in [chunk_bounds(size, pieces, index)]
    ]
    local = (*shape[:dim], sum(last - first for first, last in bounds), *shape[dim + 1 :])
    if not math.prod(local):
        return Slice(local, 0, 0, ())
    if local == shape:  # one run, instead of one for each row
        return whole_tensor(shape, bits)
    runs = tuple((first * inner // 8, (last - first) * inner // 8) for first, last in bounds if last > first)
    return Slice(local, outer, shape[dim] * inner // 8, runs)


def whole_tensor(shape: tuple[int, ...], bits: int) -> Slice:
    """Return the slice that is the whole tensor."""
    nbytes = math.prod(shape) * bits // 8
    return Slice(shape, 1, nbytes, ((0, nbytes),)) if nbytes else Slice(shape, 0, 0, ())


def _piece(
    name: str, shape: tuple[int, ...], placement: Shard | PackedShard, rank: int, world_size: int
) -> tuple[int, int]:
    """Return the number of pieces of a tensor, and the index of the rank's piece."""
    pieces = placement.pieces if isinstance(placement, Shard) and placement.pieces is not None else world_size
    if world_size % pieces:
        raise _cannot(name, shape, placement, f"{world_size} ranks are no multiple of {pieces} pieces")
    return pieces, rank // (world_size // pieces)


def _cannot(name: str, shape: tuple[int, ...], placement: Placement, reason: str) -> CheckpointError:
    return CheckpointError(
        f"tensor {name!r} of shape {shape} cannot be placed by {placement}: {reason}; mend the tp_plan", tensor=name
    )
