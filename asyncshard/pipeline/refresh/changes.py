"""Tensors that have changed: where they wait, and how they get to where they go."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from asyncshard._core import Lease
from asyncshard._typing import Int64Array
from asyncshard.arrays.base import ArrayLibrary, make_view
from asyncshard.arrays.memory import is_sink
from asyncshard.format.dtypes import DTYPES, Dtype
from asyncshard.pipeline.checkpoint.checkpoint import Checkpoint
from asyncshard.pipeline.transfer.destinations import ShardDestinations, StridedTarget
from asyncshard.pipeline.transfer.matching import fit
from asyncshard.tasks.yielding import yielding_gil

_SPLIT_BYTES = 2 << 20
"""A tensor of so many takes much more time to copy than to look up."""


class StagingLayout(NamedTuple):
    """Where tensors are staged."""

    nbytes: int
    offsets: list[Int64Array]
    """For each shard, of each tensor; of no meaning for one that has not changed."""


class ChangedTensor(NamedTuple):
    """A tensor that has changed."""

    path: str
    name: str
    dtype: Dtype
    shape: tuple[int, ...]
    offset: int
    """Where it is in the staged memory."""
    nbytes: int
    target: Any
    """Its destination."""


class CopyJob:
    """What one thread copies. In two lists: a tuple for each tensor would set off the garbage collector."""

    def __init__(self) -> None:
        self.nbytes = 0
        self._targets: list[NDArray[Any] | StridedTarget] = []
        self._sources: list[NDArray[np.uint8]] = []

    def add(self, target: NDArray[Any] | StridedTarget, source: NDArray[np.uint8]) -> None:
        """Append a copy of bytes into flat memory, or of elements into a strided view."""
        self.nbytes += len(source)
        self._targets.append(target)
        self._sources.append(source)

    def run(self) -> None:
        """Copy without the GIL, and forget everything."""
        for target, source in yielding_gil(zip(self._targets, self._sources, strict=True)):
            if isinstance(target, StridedTarget):
                target.store(0, source.data)
            else:
                np.copyto(target, source)
        self.clear()

    def clear(self) -> None:
        """Forget everything; slow for very many tensors."""
        self.nbytes = 0
        self._targets.clear()
        self._sources.clear()


class ChangedTensors:
    """The tensors that have changed, where they are staged, and where they go."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        destinations: list[ShardDestinations],
        library: ArrayLibrary,
        chunk_size: int,
        *,
        cast: bool,
    ) -> None:
        self._checkpoint = checkpoint
        self._destinations = destinations
        self._wanted = [shard.is_wanted() for shard in destinations]
        self.library = library
        self.chunk_size = chunk_size
        self.cast = cast
        self.lease: Lease | None = None
        self.offsets: list[Int64Array] = [np.zeros(len(mask), np.int64) for mask in self._wanted]

    def lay_out(self, spacing: int) -> StagingLayout:
        """Place the tensors one after the other, each at a multiple of `spacing` bytes."""
        offsets, end = [], 0
        for shard, wanted in zip(self._checkpoint.shards, self._wanted, strict=True):
            sizes = np.where(wanted, shard.header.table.stops - shard.header.table.starts, 0)
            spaced = -(-sizes // spacing) * spacing
            offsets.append(end + np.cumsum(spaced) - spaced)
            end += int(spaced.sum())
        return StagingLayout(end, offsets)

    def names(self) -> tuple[str, ...]:
        """Return the names in plan order."""
        return tuple(row.name for row in self.rows())

    def rows(self) -> Iterator[ChangedTensor]:
        """Yield the tensors in plan order."""
        for shard, destinations, wanted, offsets in zip(
            self._checkpoint.shards, self._destinations, self._wanted, self.offsets, strict=True
        ):
            for index in yielding_gil(np.flatnonzero(wanted).tolist()):
                name, code, shape, start, stop = shard.header.table.row(index)
                yield ChangedTensor(
                    shard.path,
                    name,
                    DTYPES[code],
                    shape,
                    int(offsets[index]),
                    stop - start,
                    destinations.targets[index],
                )

    def view(self, row: ChangedTensor) -> Any:
        """Return a tensor as a view of the staged memory."""
        return make_view(
            self.library, self.lease, row.offset, row.dtype, row.shape, row.nbytes, name=row.name, path=row.path
        )

    def share(self, shares: Sequence[CopyJob]) -> list[ChangedTensor]:
        """Append what has to be copied: a part of each large contiguous array to every share, others to the first.

        Returns the tensors that go to sinks. The arrays' memory is looked up anew: it may have moved since.

        Raises
        ------
        DestinationError
            A destination does not fit any more.
        """
        sinks = []
        for row in self.rows():
            if is_sink(row.target):
                sinks.append(row)
            else:
                self._share_one(row, shares)
        return sinks

    def _share_one(self, row: ChangedTensor, shares: Sequence[CopyJob]) -> None:
        shape = self.library.shape_of(row.dtype, row.shape, row.nbytes)
        memory, strided, _ = fit(self.library, row.name, row.dtype, shape, row.target, cast=self.cast)
        if not row.nbytes:
            return
        # Not before the destination fits: an error refers to this frame, and would keep the memory alive.
        staged: Any = self.lease
        source = np.ndarray((row.nbytes,), np.uint8, staged, row.offset)
        if strided is not None:
            shares[0].add(strided, source)
        elif row.nbytes < _SPLIT_BYTES:
            # Two threads that take turns with the GIL at small copies would leave none of it to the event loop.
            shares[0].add(_flat(memory), source)
        else:
            targets, sources = np.array_split(_flat(memory), len(shares)), np.array_split(source, len(shares))
            for share, target, part in zip(shares, targets, sources, strict=True):
                share.add(target, part)

    def bytes_of(self, row: ChangedTensor, start: int, stop: int) -> memoryview:
        """Return staged bytes of a tensor."""
        assert self.lease is not None
        return memoryview(self.lease)[row.offset + start : row.offset + stop]


def _flat(memory: NDArray[Any]) -> NDArray[np.uint8]:
    return memory.reshape(-1).view(np.uint8)
