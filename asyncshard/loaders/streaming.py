"""The loader that streams a checkpoint and reads ahead of the consumer."""

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
    """Streams the tensors of a checkpoint, and reads ahead of the consumer within a memory budget.

    Parameters
    ----------
    base_loader : loader, optional
        A loader whose selection of files, options and memory budget this loader takes over. Options that are passed
        here replace those of the other loader. By default the loader is built on a `ShardedStateLoader` for rank 0
        of 1.
    prefetch_count : int
        The number of read items that are read ahead of the consumer. A read item is a large tensor, or several smaller
        tensors of together at most `chunk_size` bytes.
    max_workers : int
        The number of reads in flight.
    **tuning
        Further options: see `Options`.

    Raises
    ------
    ValueError, TypeError
        An option is out of range or does not exist.
    """

    def __init__(
        self,
        base_loader: Loader | None = None,
        prefetch_count: int | None = None,
        max_workers: int | None = None,
        **tuning: Unpack[KeywordTuning],
    ) -> None:
        keywords = {"prefetch_count": prefetch_count, "max_workers": max_workers, **tuning}
        super().__init__(*inherited(base_loader, keywords))

    def stream(
        self, path: ModelPath, into: Mapping[str, Any] | None = None, *, strict: bool = True, cast: bool = False
    ) -> Stream:
        """Return a stream over a checkpoint: an awaitable, an async context manager and an async iterator.

        Parameters
        ----------
        path : str, path or Store
            A local path or URL, or a store of your own, which stays open.
        into : mapping of str to array, tensor or Sink, optional
            Destinations of the tensors. The stream then yields ``(name, destination)`` when a destination is filled.
            Views of one fused parameter, strided views and sinks are allowed.
        strict, cast : bool
            With `into`: as for `ShardedStateLoader.load_weights`.

        Raises
        ------
        NamesError, DestinationError, CheckpointError, FormatError, BudgetError, StoreError
            They are raised when the stream is awaited or entered. A read error is raised when the tensor that could not
            be read is due.
        """
        delivery = ToBuffers() if into is None else ToDestinations(into, strict=strict, cast=cast)
        return Stream(self._load(path), delivery)

    async def load_weights_async(self, path: ModelPath) -> dict[str, Any]:
        """Return a dict of new tensors, which the caller owns and which does not count against the budget."""
        return await self._load_new(path)
