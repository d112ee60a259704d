"""Stream a checkpoint with prefetch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

from asyncshard.loaders.loader import Loader, inherited
from asyncshard.loaders.options import KeywordTuning
from asyncshard.pipeline.transfer.buffered import ToBuffers
from asyncshard.pipeline.transfer.placed import ToDestinations
from asyncshard.pipeline.transfer.stream import Stream
from asyncshard.stores.opening import ModelPath


class AsyncShardLoader(Loader):
    """Stream the tensors of a checkpoint, reading ahead of the consumer within a memory budget.

    Parameters
    ----------
    base_loader : loader, optional
        Which files, and the options that are not given here; the budget is shared with it. By default a
        `ShardedStateLoader` for rank 0 of 1.
    prefetch_count : int
        Read items ahead of the consumer. A read item is a large tensor, or smaller ones of `chunk_size` in sum.
    max_workers : int
        Reads in flight.
    **tuning
        See `Options`.

    Raises
    ------
    ValueError, TypeError
        An option out of range, or one that does not exist.
    """

    def __init__(
        self,
        base_loader: Loader | None = None,
        prefetch_count: int | None = None,
        max_workers: int | None = None,
        **tuning: Unpack[KeywordTuning],
    ) -> None:
        given = {"prefetch_count": prefetch_count, "max_workers": max_workers, **tuning}
        super().__init__(*inherited(base_loader, given))

    def stream(
        self, path: ModelPath, into: Mapping[str, Any] | None = None, *, strict: bool = True, cast: bool = False
    ) -> Stream:
        """Return the stream over a checkpoint: awaitable, an async context manager and an async iterator.

        Parameters
        ----------
        path : str, path or Store
            A local path or URL.
        into : mapping of str to array, tensor or Sink, optional
            Destinations. The stream then yields ``(name, destination)`` as each is filled; views of one fused
            parameter, strided ones and sinks may be among them.
        strict, cast : bool
            With `into`: as for `ShardedStateLoader.load_weights`.

        Raises
        ------
        NamesError, DestinationError, CheckpointError, FormatError, BudgetError, StoreError
            When the stream is awaited or entered, or, for read errors, at the tensor that could not be read.
        """
        delivery = ToBuffers() if into is None else ToDestinations(into, strict=strict, cast=cast)
        return Stream(self._load(path), delivery)

    async def load_weights_async(self, path: ModelPath) -> dict[str, Any]:
        """Return a dict of new tensors, which the caller owns and which does not count against the budget."""
        return await self._load_new(path)
