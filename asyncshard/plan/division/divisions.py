"""What all ranks have of a tensor: a `Slice` for each, and who reads what several of them hold."""

from __future__ import annotations

from typing import NamedTuple

from asyncshard.errors import CheckpointError
from asyncshard.plan.division.placements import PackedShard, Placement, Replicate, Shard
from asyncshard.plan.division.slices import Slice, slice_tensor

Shape = tuple[int, ...]


class Division(NamedTuple):
    """One tensor among the ranks of a world."""

    slices: tuple[Slice, ...]
    """What each rank has."""
    first_ranks: frozenset[int]
    """Ranks that hold something which none before them does. Together they have each byte once."""

    @property
    def most_runs(self) -> int:
        """Ranges of bytes that the rank with most of them has."""
        return max(piece.outer * len(piece.runs) for piece in self.slices)


def divide(name: str, shape: Shape, bits: int, placement: Placement, world_size: int) -> Division:
    """Divide a tensor of whole `shape` among `world_size` ranks.

    Raises
    ------
    CheckpointError
        The tensor cannot be divided so.
    """
    if isinstance(placement, Replicate):
        slices = (slice_tensor(name, shape, bits, placement, rank=0, world_size=1),) * world_size
    else:
        slices = tuple(
            slice_tensor(name, shape, bits, placement, rank=rank, world_size=world_size) for rank in range(world_size)
        )
    # Ranks that hold the same piece are neighbours.
    first = frozenset(rank for rank, piece in enumerate(slices) if rank == 0 or piece != slices[rank - 1])
    return Division(slices, first)


def fitted(placement: Placement, world_size: int) -> Placement:
    """Return a placement for a world of another size: no more pieces than ranks.

    Raises
    ------
    ValueError
        The ranks are no multiple of the pieces, nor the pieces of the ranks.
    """
    if not isinstance(placement, Shard) or placement.pieces is None or world_size % placement.pieces == 0:
        return placement
    if placement.pieces % world_size:
        raise ValueError(f"{placement.pieces} pieces cannot be shared out among {world_size} ranks")
    return Shard(placement.dim)


def whole_shape(name: str, local_shapes: tuple[Shape, ...], placement: Placement) -> Shape:
    """Return the shape of the tensor whose pieces have these shapes; that they are the right ones is not checked.

    Raises
    ------
    CheckpointError
        They have no such dimension.
    """
    shape = local_shapes[0]
    if isinstance(placement, Replicate):
        return shape
    dim = placement.dim + len(shape) if placement.dim < 0 else placement.dim
    if not 0 <= dim < len(shape) or any(len(local) != len(shape) for local in local_shapes):
        shown = ", ".join(sorted({str(local) for local in local_shapes}))
        raise CheckpointError(
            f"tensor {name!r} has the shapes {shown}, which have no dimension {placement.dim} to join", tensor=name
        )
    if isinstance(placement, PackedShard):
        size = sum(placement.sizes)
    else:
        step = len(local_shapes) // (placement.pieces or len(local_shapes))
        size = sum(local[dim] for local in local_shapes[:: max(step, 1)])
    return (*shape[:dim], size, *shape[dim + 1 :])
