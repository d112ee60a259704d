"""Placements: how a tensor is divided among ranks.

The names are those of ``torch.distributed.tensor``; the sizes of the pieces follow ``torch.chunk``
(:mod:`asyncshard.plan.division.chunks`).
"""

from __future__ import annotations

from dataclasses import dataclass

from asyncshard.plan.division.chunks import whole_number


@dataclass(frozen=True, slots=True)
class Shard:
    """The placement of a tensor that is cut along one dimension, with a piece for each rank.

    Raises
    ------
    ValueError
        `dim` or `pieces` is not a whole number, or `pieces` is below 1.
    """

    dim: int
    """The dimension that is cut; a negative one counts from the last dimension."""
    pieces: int | None = None
    """The number of pieces; None for one piece for each rank. The number of ranks must be a multiple of it. If there
    are fewer pieces than ranks, neighbouring ranks hold the same piece, as for models with fewer key and value heads
    than ranks."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "dim", whole_number(self.dim, "dim"))
        if self.pieces is not None:
            object.__setattr__(self, "pieces", whole_number(self.pieces, "pieces", minimum=1))


@dataclass(frozen=True, slots=True)
class Replicate:
    """The placement of a tensor that every rank holds whole."""


@dataclass(frozen=True, slots=True)
class PackedShard:
    """The placement of several tensors that are fused along one dimension, each of them cut into a piece for each rank.

    A rank holds its piece of the first tensor, then its piece of the second, and so on. The rows of a ``qkv_proj`` may
    have ``PackedShard(0, (4096, 1024, 1024))``.

    Raises
    ------
    ValueError
        `sizes` is empty, or a number is not a whole number, or a size is negative.
    """

    dim: int
    """The dimension along which the tensors are fused and cut; a negative one counts from the last dimension."""
    sizes: tuple[int, ...]
    """The sizes of the fused tensors along the dimension; they add up to the size of the dimension."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "dim", whole_number(self.dim, "dim"))
        sizes = tuple(whole_number(size, "sizes", minimum=0) for size in self.sizes)
        if not sizes:
            raise ValueError("sizes must name at least one size")
        object.__setattr__(self, "sizes", sizes)


Placement = Shard | Replicate | PackedShard
"""Any placement."""
