"""The files that a reshard writes: the tensors of each, its header, and their offsets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from asyncshard._typing import Int64Array
from asyncshard.errors import CheckpointError
from asyncshard.format.dtypes import DTYPES
from asyncshard.format.header import format_header
from asyncshard.format.pattern import ShardPattern
from asyncshard.pipeline.writing.reshard.divider import PlaceTensor
from asyncshard.pipeline.writing.reshard.source import Source
from asyncshard.plan.division.blocks import TensorMap
from asyncshard.plan.division.divisions import Division, divide, fitted
from asyncshard.plan.division.placement_text import PLACEMENT_KEY, WORLD_SIZE_KEY, format_placements
from asyncshard.plan.division.placements import Placement, Replicate
from asyncshard.plan.files.target_files import TargetFiles, lay_out
from asyncshard.plan.text import Problems
from asyncshard.tasks.yielding import yielding_gil

_ELEMENT_BYTES = np.array([max(dtype.bits // 8, 1) for dtype in DTYPES], np.int64)


class TargetPlan(NamedTuple):
    """The files to be written."""

    source: Source
    files: TargetFiles
    divisions: tuple[Division, ...]
    """The divisions of the tensors among the target's ranks."""
    placements: tuple[Placement, ...]
    """The placement of each division."""
    codes: tuple[int, ...]
    """The code of the dtype of each division."""
    division_of: NDArray[np.int32]
    """The division of each tensor."""
    is_ranks: bool

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the arrays take."""
        return 2 * self.files.offsets.nbytes + 2 * self.files.file_of.nbytes + self.division_of.nbytes

    def header(self, number: int) -> bytearray:
        """Return the header of a file. Slow for many tensors: not for the event loop."""
        file = self.files.files[number]
        metadata = {"format": "pt"} | self.source.metadata
        if self.is_ranks:
            tensors = yielding_gil(file.tensors.tolist())
            metadata[PLACEMENT_KEY] = format_placements(
                (self.source.tensors.name(tensor), self.placements[self.division_of[tensor]]) for tensor in tensors
            )
            metadata[WORLD_SIZE_KEY] = str(len(self.files.offsets))
        return format_header(self._entries(file.rank, file.tensors), metadata)

    def _entries(self, rank: int, tensors: Int64Array) -> Iterator[tuple[str, str, tuple[int, ...], int]]:
        for tensor in yielding_gil(tensors.tolist()):
            index = self.division_of[tensor]
            piece = self.divisions[index].slices[rank]
            yield self.source.tensors.name(tensor), DTYPES[self.codes[index]].name, piece.shape, piece.nbytes

    def weight_map(self) -> Iterator[tuple[str, str]]:
        """Yield the file of each tensor, of the first rank."""
        for tensor, place in enumerate(self.files.file_of[0].tolist()):
            yield self.source.tensors.name(tensor), self.files.files[place].name

    def side(self, header_sizes: Int64Array) -> TensorMap:
        """Return where the tensors go, when the size of each file's header is known."""
        starts = self.files.offsets + header_sizes[self.files.file_of]
        return TensorMap(self.divisions, self.division_of, self.files.file_of, starts)


def plan_target(
    source: Source,
    place: PlaceTensor | None,
    *,
    world_size: int,
    max_shard_size: int,
    pattern: ShardPattern | None,
    path: str,
) -> TargetPlan:
    """Divide the tensors among the target's ranks. Slow: not for the event loop.

    Parameters
    ----------
    place : function, optional
        How; None for as the source is.
    pattern : ShardPattern, optional
        Names of rank shards; None for a Hugging Face checkpoint.

    Raises
    ------
    CheckpointError
        Tensors cannot be divided so: all of them, in one error.
    """
    faults = Problems(path)
    known: dict[tuple[int, Placement], int] = {}
    divisions: list[Division] = []
    placements: list[Placement] = []
    codes: list[int] = []
    division_of = np.empty(len(source.side.division_of), np.int32)
    for tensor, old in enumerate(yielding_gil(source.side.division_of.tolist())):
        name = source.tensors.name(tensor)
        try:
            if pattern is None:
                placement: Placement = Replicate()
            else:
                placement = source.placements[old] if place is None else place(name, source.shapes[old])
            key = (old, placement)
            if key not in known:
                fit = _fit(name, placement, world_size)
                divisions.append(divide(name, source.shapes[old], DTYPES[source.codes[old]].bits, fit, world_size))
                placements.append(placement)
                codes.append(source.codes[old])
                known[key] = len(divisions) - 1
            division_of[tensor] = known[key]
        except CheckpointError as error:
            faults.add(str(error))
    faults.require_none()
    sizes = np.array([[piece.nbytes for piece in division.slices] for division in divisions], np.int64)
    sizes = sizes.reshape(-1, world_size).T[:, division_of]
    element_bytes = _ELEMENT_BYTES[np.array(codes, np.int64)[division_of]] if codes else np.empty(0, np.int64)
    files = lay_out(sizes, element_bytes, max_shard_size=max_shard_size, pattern=pattern)
    return TargetPlan(
        source, files, tuple(divisions), tuple(placements), tuple(codes), division_of, pattern is not None
    )


def _fit(name: str, placement: Placement, world_size: int) -> Placement:
    try:
        return fitted(placement, world_size)
    except ValueError as error:
        raise CheckpointError(
            f"tensor {name!r} cannot be cut by {placement}: {error}; pass a tp_plan for {world_size} ranks", tensor=name
        ) from None
