"""Changed tensors: where they are staged, and how they are copied to their destinations."""

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
"""A tensor of 2 MiB or more is copied in parts by all threads: copying it takes much longer than looking it up."""


class StagingLayout(NamedTuple):
    """The positions of changed tensors in the memory where they are staged."""

    nbytes: int
    """The bytes of that memory."""
    offsets: list[Int64Array]
    """For each shard, the offset of each tensor. The offset of a tensor that has not changed means nothing."""


class ChangedTensor(NamedTuple):
    """A tensor that has changed."""

    path: str
    """The path of the file that holds the tensor."""
    name: str
    dtype: Dtype
    shape: tuple[int, ...]
    offset: int
    """Offset of the tensor in the memory where it is staged."""
    nbytes: int
    target: Any
    """The destination of the tensor."""


class CopyJob:
    """The copies that one thread makes. They are in two lists: a tuple for each would trigger the garbage collector."""

    def __init__(self) -> None:
        self.nbytes = 0
        """The bytes that the job copies."""
        self._targets: list[NDArray[Any] | StridedTarget] = []
        self._sources: list[NDArray[np.uint8]] = []

    def add(self, target: NDArray[Any] | StridedTarget, source: NDArray[np.uint8]) -> None:
        """Append a copy: of bytes into an array of bytes, or of elements into a strided target."""
        self.nbytes += len(source)
        self._targets.append(target)
        self._sources.append(source)

    def run(self) -> None:
        """Make all copies, without the GIL, and drop them."""
        for target, source in yielding_gil(zip(self._targets, self._sources, strict=True)):
            if isinstance(target, StridedTarget):
                target.store(0, source.data)
            else:
                np.copyto(target, source)
        self.clear()

    def clear(self) -> None:
        """Drop all copies. This is slow for very many tensors."""
        self.nbytes = 0
        self._targets.clear()
        self._sources.clear()


class ChangedTensors:
    """The tensors that have changed, the memory where they are staged, and their destinations."""

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
        """The memory where the tensors are staged; None if they are not staged, or no longer."""
        self.offsets: list[Int64Array] = [np.zeros(len(mask), np.int64) for mask in self._wanted]
        """For each shard, the offset of each tensor in the lease."""

    def lay_out(self, spacing: int) -> StagingLayout:
        """Return a layout with one tensor after the other, each at a multiple of `spacing` bytes."""
        offsets, end = [], 0
        for shard, wanted in zip(self._checkpoint.shards, self._wanted, strict=True):
            sizes = np.where(wanted, shard.header.table.stops - shard.header.table.starts, 0)
            spaced = -(-sizes // spacing) * spacing
            offsets.append(end + np.cumsum(spaced) - spaced)
            end += int(spaced.sum())
        return StagingLayout(end, offsets)

    def names(self) -> tuple[str, ...]:
        """Return the names of the tensors in plan order."""
        return tuple(tensor.name for tensor in self.tensors())

    def tensors(self) -> Iterator[ChangedTensor]:
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

    def view(self, tensor: ChangedTensor) -> Any:
        """Return a staged tensor as an array of the library, which is a view of the lease."""
        return make_view(
            self.library,
            self.lease,
            tensor.offset,
            tensor.dtype,
            tensor.shape,
            tensor.nbytes,
            name=tensor.name,
            path=tensor.path,
        )

    def add_copies(self, jobs: Sequence[CopyJob]) -> list[ChangedTensor]:
        """Add the copies of all tensors to jobs; return the tensors whose destinations are sinks.

        A large contiguous array is divided among all jobs; other arrays are copied by the first job. The memory of each
        destination is looked up again, since it may have moved.

        Raises
        ------
        DestinationError
            A destination no longer fits its tensor.
        """
        sinks = []
        for tensor in self.tensors():
            if is_sink(tensor.target):
                sinks.append(tensor)
            else:
                self._add_copy(tensor, jobs)
        return sinks

    def _add_copy(self, tensor: ChangedTensor, jobs: Sequence[CopyJob]) -> None:
        shape = self.library.shape_of(tensor.dtype, tensor.shape, tensor.nbytes)
        memory, strided, _ = fit(self.library, tensor.name, tensor.dtype, shape, tensor.target, cast=self.cast)
        if not tensor.nbytes:
            return
        # Not before the destination fits: an error refers to this frame, and would keep the memory alive.
        staged: Any = self.lease
        source = np.ndarray((tensor.nbytes,), np.uint8, staged, tensor.offset)
        if strided is not None:
            jobs[0].add(strided, source)
        elif tensor.nbytes < _SPLIT_BYTES:
            # Two threads that took turns with the GIL for small copies would leave none of it to the event loop.
            jobs[0].add(_flat(memory), source)
        else:
            targets, sources = np.array_split(_flat(memory), len(jobs)), np.array_split(source, len(jobs))
            for job, target, part in zip(jobs, targets, sources, strict=True):
                job.add(target, part)

    def bytes_of(self, tensor: ChangedTensor, start: int, stop: int) -> memoryview:
        """Return the bytes [start, stop) of a staged tensor."""
        assert self.lease is not None
        return memoryview(self.lease)[tensor.offset + start : tensor.offset + stop]


def _flat(memory: NDArray[Any]) -> NDArray[np.uint8]:
    return memory.reshape(-1).view(np.uint8)
