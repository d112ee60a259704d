"""Tensors that have changed: where they wait, and how they get to where they go."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from asyncshard._core import Lease
from asyncshard.format.dtypes import DTYPES, Dtype
from asyncshard.pipeline.arrays import ArrayLibrary, make_view
from asyncshard.pipeline.checkpoint import Checkpoint
from asyncshard.pipeline.destinations import ShardDestinations
from asyncshard.pipeline.matching import fit, is_sink

_PIECE = 16 << 20
"""Bytes copied in one go: large tensors are shared between the threads."""
_BLOCK = 256
"""Tensors between two moments without the GIL."""


class Layout(NamedTuple):
    """Where tensors are staged."""

    nbytes: int
    offsets: list[NDArray[np.int64]]
    """For each shard, of each tensor; of no meaning for one that has not changed."""


class Row(NamedTuple):
    """A tensor that has changed."""

    path: str
    name: str
    dtype: Dtype
    shape: tuple[int, ...]
    offset: int
    """Where it is in the staged memory."""
    nbytes: int
    given: Any
    """Its destination."""


class Copy(NamedTuple):
    """A call that copies without the GIL."""

    nbytes: int
    function: Callable[..., object]
    arguments: tuple[Any, ...]


class Contents:
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
        self.offsets: list[NDArray[np.int64]] = [np.zeros(len(mask), np.int64) for mask in self._wanted]

    def lay_out(self, spacing: int) -> Layout:
        """Place the tensors one after the other, each at a multiple of `spacing` bytes."""
        offsets, end = [], 0
        for shard, wanted in zip(self._checkpoint.shards, self._wanted, strict=True):
            sizes = np.where(wanted, shard.header.table.stops - shard.header.table.starts, 0)
            spaced = -(-sizes // spacing) * spacing
            offsets.append(end + np.cumsum(spaced) - spaced)
            end += int(spaced.sum())
        return Layout(end, offsets)

    def names(self) -> tuple[str, ...]:
        """Return the names in plan order."""
        return tuple(row.name for row in self.rows())

    def rows(self) -> Iterator[Row]:
        """Yield the tensors in plan order."""
        for shard, destinations, wanted, offsets in zip(
            self._checkpoint.shards, self._destinations, self._wanted, self.offsets, strict=True
        ):
            for number, index in enumerate(np.flatnonzero(wanted).tolist()):
                if number % _BLOCK == 0:
                    time.sleep(0)  # lets go of the GIL
                name, code, shape, start, stop = shard.header.table.row(index)
                yield Row(
                    shard.path, name, DTYPES[code], shape, int(offsets[index]), stop - start, destinations.given[index]
                )

    def view(self, row: Row) -> Any:
        """Return a tensor as a view of the staged memory."""
        return make_view(
            self.library, self.lease, row.offset, row.dtype, row.shape, row.nbytes, name=row.name, path=row.path
        )

    def copies(self) -> list[Copy]:
        """Return what has to be copied into arrays, looking their memory up anew: they may have moved since.

        Raises
        ------
        DestinationError
            A destination does not fit any more.
        """
        found = []
        for row in self.rows():
            if is_sink(row.given):
                continue
            shape = self.library.shape_of(row.dtype, row.shape, row.nbytes)
            memory, strided, _ = fit(self.library, row.name, row.dtype, shape, row.given, cast=self.cast)
            if not row.nbytes:
                continue
            source = self.bytes_of(row, 0, row.nbytes)
            if strided is not None:
                found.append(Copy(row.nbytes, strided.store, (0, source)))
                continue
            target = memory.reshape(-1).view(np.uint8)
            array = np.frombuffer(source, np.uint8)
            for start in range(0, row.nbytes, _PIECE):
                piece = slice(start, start + _PIECE)
                found.append(Copy(len(array[piece]), np.copyto, (target[piece], array[piece])))
        return found

    def bytes_of(self, row: Row, start: int, stop: int) -> memoryview:
        """Return staged bytes of a tensor."""
        assert self.lease is not None
        return memoryview(self.lease)[row.offset + start : row.offset + stop]


def share(copies: list[Copy], count: int) -> list[list[Copy]]:
    """Give each thread about as many bytes."""
    shares: list[list[Copy]] = [[] for _ in range(count)]
    loads = [0] * count
    for copy in copies:
        lightest = loads.index(min(loads))
        shares[lightest].append(copy)
        loads[lightest] += copy.nbytes
    return shares


def run_copies(share: list[Copy]) -> None:
    """Make the calls of one thread."""
    for number, (_, function, arguments) in enumerate(share):
        function(*arguments)
        if number % _BLOCK == 0:
            time.sleep(0)
