"""What all loaders share: their options, their budget and cache, and how a path becomes a stream."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from asyncshard.errors import NotRegularFileError
from asyncshard.format.header import Header
from asyncshard.loaders.cache import make_cache, with_cache
from asyncshard.loaders.options import Options
from asyncshard.pipeline.budget import Account, MemoryBudget
from asyncshard.pipeline.checkpoint import Checkpoint, Selection, find_shards, open_checkpoint, read_header_of
from asyncshard.pipeline.destinations import Placement, new_destinations
from asyncshard.pipeline.free_memory import default_budget_mb
from asyncshard.pipeline.matching import match_destinations
from asyncshard.pipeline.placed import PlacedTransfer
from asyncshard.pipeline.staged import StagedTransfer
from asyncshard.pipeline.stream import Stream
from asyncshard.pipeline.supervisor import Supervisor
from asyncshard.pipeline.transfer import Pacing, Transfer
from asyncshard.stores import Store, from_url
from asyncshard.stores.threads import DaemonThreads, finish

if TYPE_CHECKING:
    from asyncshard.stores.cached.directory import DiskCache

logger = logging.getLogger("asyncshard")

ModelPath = str | os.PathLike[str] | Store
"""A local path or URL; or a store of one's own, which a load leaves open."""


@dataclass(frozen=True, slots=True)
class Request:
    """What one load was asked for."""

    path: ModelPath
    into: Mapping[str, Any] | None = None
    """Destinations by name; None for buffers of the budget."""
    is_new: bool = False
    """Whether every tensor gets a new array instead."""
    strict: bool = True
    cast: bool = False


@dataclass(frozen=True, slots=True)
class LoadReport:
    """How the names of a load matched."""

    missing: tuple[str, ...]
    """Asked for, not in the checkpoint."""
    unexpected: tuple[str, ...]
    """In the checkpoint, not asked for, and not read."""
    narrowed: tuple[str, ...]
    """Destinations larger than their tensor, which filled their first corner."""


class Loader:
    """Options, a selection of files, and a budget. It holds nothing open, belongs to no event loop, and pickles."""

    def __init__(
        self,
        selection: Selection,
        options: Options,
        budget: MemoryBudget | None = None,
        cache: DiskCache | None = None,
    ) -> None:
        self._selection = selection
        self._options = options
        if cache is None and options.cache_dir is not None:
            cache = make_cache(options.cache_dir, options.cache_max_gb)
        self._cache = cache
        self._budget = budget or options.budget or MemoryBudget(options.memory_budget_mb or default_budget_mb())
        self.last_report: LoadReport | None = None
        """How the names of the load that ended last matched; None before the first."""

    def __getstate__(self) -> tuple[Selection, Options]:
        return self._selection, self._options

    def __setstate__(self, state: tuple[Selection, Options]) -> None:
        Loader.__init__(self, *state)

    @property
    def options(self) -> Options:
        """The tuning options in effect."""
        return self._options

    @property
    def selection(self) -> Selection:
        """Which files it loads."""
        return self._selection

    @property
    def budget(self) -> MemoryBudget:
        """The memory budget that its loads share."""
        return self._budget

    def cache_for(self, options: Options) -> DiskCache | None:
        """Return this loader's cache if it is the one that the options ask for."""
        is_same = (options.cache_dir, options.cache_max_gb) == (self._options.cache_dir, self._options.cache_max_gb)
        return self._cache if is_same else None

    def _stream(self, request: Request) -> Stream:
        def opener(account: Account, threads: DaemonThreads) -> Any:
            return self._open(request, account, threads)

        def start() -> Supervisor:
            return Supervisor(
                opener,
                self._budget,
                is_strict=self._options.strict_budget,
                is_ordered=self._options.order == "plan",
            )

        return Stream(start)

    async def _load_new(self, path: ModelPath) -> dict[str, Any]:
        """Load into new arrays."""
        async with self._stream(Request(path, is_new=True)) as stream:
            return {name: tensor async for name, tensor in stream}

    async def _fill(self, request: Request) -> None:
        """Run a stream into destinations to its end."""
        stream = self._stream(request)
        try:
            await stream.drain()
        finally:
            if stream.is_open:
                transfer = stream.statistics()
                self.last_report = LoadReport(transfer.missing, transfer.unexpected, stream.narrowed)

    @asynccontextmanager
    async def _open(self, request: Request, account: Account, threads: DaemonThreads) -> AsyncIterator[Transfer]:
        """Open the checkpoint and plan its transfer; the store is open until the end."""
        store = open_store(request.path, self._options)
        if self._cache is not None:
            store = with_cache(store, self._cache, closes_store=store is not request.path)
        try:
            checkpoint = await open_checkpoint(store, self._selection, threads, account)
            yield await self._plan(request, store, checkpoint, threads)
        finally:
            if store is not request.path:
                await finish(asyncio.ensure_future(store.aclose()))

    async def _plan(self, request: Request, store: Store, checkpoint: Checkpoint, threads: DaemonThreads) -> Transfer:
        pacing = Pacing(
            self._options.chunk_size or store.chunk_size,
            self._options.prefetch_count or store.prefetch_count,
            store.max_gap_bytes,
        )
        library = await threads.run(self._options.library, request.into)
        if request.into is None and not request.is_new:
            staged = StagedTransfer(checkpoint, store, pacing, library, threads)
            await threads.run(lambda: staged.plan(self._budget, is_strict=self._options.strict_budget))
            return staged
        if request.into is None:
            placement = await new_destinations(checkpoint, library)
        else:
            placement = await match_destinations(
                checkpoint, request.into, library, threads, strict=request.strict, cast=request.cast, path=store.url
            )
            _warn(store.url, placement)
        placed = PlacedTransfer(checkpoint, store, pacing, placement, threads)
        await threads.run(placed.plan, self._budget)
        return placed


def open_store(path: ModelPath, options: Options) -> Store:
    """Return the store for a path, or the one that was given."""
    if isinstance(path, Store):
        return path
    return from_url(path, max_workers=options.max_workers, page_cache=options.page_cache, **options.storage_options)


async def discover(path: ModelPath, selection: Selection, options: Options) -> list[str]:
    """Return the full paths of the files to load, in delivery order."""
    store = open_store(path, options)
    threads = DaemonThreads(1, "asyncshard-work")
    try:
        return [store.path_of(name) for name in await find_shards(store, selection, threads)]
    finally:
        await threads.aclose()
        if store is not path:
            await finish(asyncio.ensure_future(store.aclose()))


async def read_header(
    path: str | os.PathLike[str],
    *,
    max_header_bytes: int | None = None,
    max_tensors: int | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Header:
    """Read and validate the header of one file, off the event loop.

    Parameters
    ----------
    path : str or path
        A local path or URL of one ``.safetensors`` file.
    max_header_bytes, max_tensors : int, optional
        Refuse a larger header, before it is read or parsed.
    storage_options : mapping, optional
        The store's constructor arguments.

    Raises
    ------
    FormatError
        The header breaks a rule of the format; the message says which, and where.
    ObjectNotFoundError, AccessDeniedError, NotRegularFileError, StoreError
    """
    store = from_url(path, **(storage_options or {}))
    threads = DaemonThreads(1, "asyncshard-work")
    try:
        listing = await store.list()
        if not listing.is_file:
            raise NotRegularFileError(f"{store.url}: this is a directory; name one file", path=store.url)
        shard = await read_header_of(
            store, listing.names[0], threads, max_header_bytes=max_header_bytes, max_tensors=max_tensors
        )
        return shard.header
    finally:
        await threads.aclose()
        await finish(asyncio.ensure_future(store.aclose()))


_LISTED = 20


def _warn(path: str, placement: Placement) -> None:
    for names, what in (
        (placement.missing, "are missing from the checkpoint and keep their values"),
        (placement.unexpected, "are in the checkpoint and were not asked for"),
        (placement.narrowed, "are smaller than their destinations and fill their first corner"),
    ):
        if names:
            more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
            logger.warning("%s: %d tensors %s: %s%s", path, len(names), what, ", ".join(names[:_LISTED]), more)
