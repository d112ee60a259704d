"""Stream a checkpoint with prefetch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

from asyncshard.loaders.loader import Loader, ModelPath, Request
from asyncshard.loaders.options import KeywordTuning
from asyncshard.loaders.sharded_state import ShardedStateLoader
from asyncshard.pipeline.stream import Stream


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
        base = ShardedStateLoader() if base_loader is None else base_loader
        if not isinstance(base, Loader):
            raise TypeError(f"base_loader must be one of asyncshard's loaders, not {base_loader!r}")
        given = {"prefetch_count": prefetch_count, "max_workers": max_workers, **tuning}
        options = base.options.override(given)
        has_own_budget = given.get("memory_budget_mb") is not None or given.get("budget") is not None
        selection = base.selection._replace(max_header_bytes=options.max_header_bytes, max_tensors=options.max_tensors)
        super().__init__(selection, options, None if has_own_budget else base.budget, base.cache_for(options))

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
        return self._stream(Request(path, into=into, strict=strict, cast=cast))

    async def load_weights_async(self, path: ModelPath) -> dict[str, Any]:
        """Return a dict of new tensors, which the caller owns and which does not count against the budget."""
        return await self._load_new(path)
