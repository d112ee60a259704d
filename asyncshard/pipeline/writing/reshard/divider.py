"""How the tensors of rank shards make up whole ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from asyncshard._typing import Int64Array
from asyncshard.errors import CheckpointError
from asyncshard.format.dtypes import DTYPES
from asyncshard.pipeline.checkpoint.opened_file import OpenedFile
from asyncshard.plan.division.divisions import Division, Shape, divide, fitted, whole_shape
from asyncshard.plan.division.placements import PackedShard, Placement, Replicate, Shard
from asyncshard.plan.text import LISTED, Problems

PlaceTensor = Callable[[str, Shape], Placement]
"""The placement of a tensor, by its name and the shape of the whole."""


class Divider:
    """Find the divisions of a source's tensors; those that are alike share one."""

    def __init__(
        self,
        shards: Sequence[OpenedFile],
        files: Int64Array,
        rows: Int64Array,
        written: dict[str, Placement] | None,
        place: PlaceTensor | None,
        faults: Problems,
    ) -> None:
        self._tables = [shard.header.table for shard in shards]
        self._files = files
        self._rows = rows
        self._written = written
        self._place = place
        self._faults = faults
        self._known: dict[tuple[tuple[Shape, ...], int, Placement], int] = {}
        self.divisions: list[Division] = []
        self.placements: list[Placement] = []
        self.shapes: list[Shape] = []
        self.codes: list[int] = []

    def find(self, tensor: int, name: str) -> int:
        """Return the index of a tensor's division."""
        found = [
            self._tables[file].row(row)
            for file, row in zip(self._files[:, tensor].tolist(), self._rows[:, tensor].tolist(), strict=True)
        ]
        codes = [row[1] for row in found]
        locals_ = tuple(row[2] for row in found)
        if len(set(codes)) > 1:
            listed = ", ".join(f"{DTYPES[code].name} on rank {rank}" for rank, code in enumerate(codes[:LISTED]))
            self._faults.add(f"the ranks disagree on the dtype of tensor {name!r}: {listed}")
            return -1
        try:
            placement = self._placement(name, locals_)
            key = (locals_, codes[0], placement)
            if key not in self._known:
                self._known[key] = self._add(name, locals_, codes[0], placement)
            return self._known[key]
        except (CheckpointError, ValueError) as error:
            self._faults.add(str(error))
            return -1

    def _placement(self, name: str, locals_: tuple[Shape, ...]) -> Placement:
        if self._written is not None or self._place is None:
            return (self._written or {}).get(name, Replicate())
        placement = self._place(name, locals_[0])
        if isinstance(placement, PackedShard):
            # Of a word: its sizes are those of the shape, which is known only now that it is to be joined here.
            joined = whole_shape(name, locals_, Shard(placement.dim))
            placement = self._place(name, joined)
        return placement

    def _add(self, name: str, locals_: tuple[Shape, ...], code: int, placement: Placement) -> int:
        world_size = len(locals_)
        try:
            fit = fitted(placement, world_size)
        except ValueError as error:
            raise CheckpointError(f"tensor {name!r} cannot be joined by {placement}: {error}", tensor=name) from None
        shape = whole_shape(name, locals_, fit)
        division = divide(name, shape, DTYPES[code].bits, fit, world_size)
        wrong = [rank for rank, piece in enumerate(division.slices) if piece.shape != locals_[rank]]
        if wrong:
            for rank in wrong:
                self._faults.add(
                    f"rank {rank}: tensor {name!r} has shape {locals_[rank]}, must be {division.slices[rank].shape}: "
                    f"its piece of {shape} by {fit}"
                )
            return -1
        self.divisions.append(division)
        self.placements.append(placement)
        self.shapes.append(shape)
        self.codes.append(code)
        return len(self.divisions) - 1
