"""Placements: how a tensor is divided among ranks.

The words are those of ``torch.distributed.tensor``; the sizes follow ``torch.chunk``
(:mod:`asyncshard.plan.division.chunks`).
"""

from __future__ import annotations

from dataclasses import dataclass

from asyncshard.plan.division.chunks import whole_number


@dataclass(frozen=True, slots=True)
class Shard:
    """Cut along one dimension, a piece for each rank.

    Raises
    ------
    ValueError
        Not a whole number, or fewer than one piece.
    """

    dim: int
    """The dimension; negative ones count from the last."""
    pieces: int | None = None
    """Into how many; by default as many as there are ranks, which must be a multiple of it. With fewer, neighbouring
    ranks hold the same piece, as key and value heads are held where there are fewer of them than ranks."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "dim", whole_number(self.dim, "dim"))
        if self.pieces is not None:
            object.__setattr__(self, "pieces", whole_number(self.pieces, "pieces", minimum=1))


@dataclass(frozen=True, slots=True)
class Replicate:
    """Whole on every rank."""


@dataclass(frozen=True, slots=True)
class PackedShard:
    """Several tensors fused along one dimension, each of which is cut into a piece for each rank.

    A rank holds its piece of the first, then its piece of the second, and so on: ``PackedShard(0, (4096, 1024, 1024))``
    for the rows of a ``qkv_proj``.

    Raises
    ------
    ValueError
        No sizes, or something other than whole numbers.
    """

    dim: int
    """The dimension; negative ones count from the last."""
    sizes: tuple[int, ...]
    """Of the fused tensors along it; they add up to its size."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "dim", whole_number(self.dim, "dim"))
        sizes = tuple(whole_number(size, "sizes", minimum=0) for size in self.sizes)
        if not sizes:
            raise ValueError("sizes must name at least one size")
        object.__setattr__(self, "sizes", sizes)


Placement = Shard | Replicate | PackedShard
