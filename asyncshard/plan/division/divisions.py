"""How a tensor is divided among all ranks: the slice of each rank, and which ranks read bytes that several hold."""

from __future__ import annotations

from typing import NamedTuple

from asyncshard.errors import CheckpointError
from asyncshard.plan.division.placements import PackedShard, Placement, Replicate, Shard
from asyncshard.plan.division.slices import Slice, slice_tensor

Shape = tuple[int, ...]


class Division(NamedTuple):
    """How one tensor is divided among all ranks of a world."""

    slices: tuple[Slice, ...]
    """The slice of each rank."""
    first_ranks: frozenset[int]
    """The ranks whose piece no lower rank holds. Together their pieces have every byte of the tensor once."""

    @property
    def most_runs(self) -> int:
        """The number of runs of the rank that has the most runs."""
        return max(piece.outer * len(piece.runs) for piece in self.slices)


def divide(name: str, shape: Shape, bits: int, placement: Placement, world_size: int) -> Division:
    """Divide a tensor, whose whole shape is `shape`, among `world_size` ranks.

    Raises
    ------
    CheckpointError
        The tensor cannot be divided by this placement.
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
    """Return `placement` for a world of `world_size` ranks, with no more pieces than ranks.

    Raises
    ------
    ValueError
        Neither is the number of ranks a multiple of the number of pieces, nor the other way round.
    """
    if not isinstance(placement, Shard) or placement.pieces is None or world_size % placement.pieces == 0:
        return placement
    if placement.pieces % world_size:
        raise ValueError(f"{placement.pieces} pieces cannot be shared out among {world_size} ranks")
    return Shard(placement.dim)


def whole_shape(name: str, local_shapes: tuple[Shape, ...], placement: Placement) -> Shape:
    """Return the shape of the whole tensor, given the shape of the piece that each rank holds.

    Whether the pieces have the shapes that `placement` gives them is not checked.

    Raises
    ------
    CheckpointError
        The pieces do not have the dimension of the placement.
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
