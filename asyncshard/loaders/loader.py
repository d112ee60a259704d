"""What all loaders share: their options, their budget and cache, and how a path becomes a stream."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from asyncshard.loaders.cache import Caching, make_cache
from asyncshard.loaders.files import ModelPath, open_store
from asyncshard.loaders.options import Options
from asyncshard.pipeline.checkpoint.checkpoint import Checkpoint, Selection, open_checkpoint
from asyncshard.pipeline.checkpoint.load_plan import LoadPlan
from asyncshard.pipeline.checkpoint.slicing import open_sliced
from asyncshard.pipeline.checkpoint.ties import add_ties, find_ties
from asyncshard.pipeline.checkpoint.version import CheckpointVersion
from asyncshard.pipeline.memory.budget import Account, MemoryBudget
from asyncshard.pipeline.memory.free_memory import default_budget_mb
from asyncshard.pipeline.refresh.refresh import Refresh
from asyncshard.pipeline.refresh.update import Update
from asyncshard.pipeline.transfer.buffered import BufferedTransfer
from asyncshard.pipeline.transfer.destinations import MatchedDestinations, new_destinations
from asyncshard.pipeline.transfer.matching import match_destinations
from asyncshard.pipeline.transfer.placed import PlacedTransfer
from asyncshard.pipeline.transfer.stream import Stream
from asyncshard.pipeline.transfer.supervisor import Supervisor
from asyncshard.pipeline.transfer.transfer import Pacing, Transfer
from asyncshard.stores import Store
from asyncshard.tasks.threads import DaemonThreads, wait_to_end

if TYPE_CHECKING:
    from asyncshard.stores.disk_cache.directory import DiskCache

logger = logging.getLogger("asyncshard")


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
    refresh: Refresh | None = None
    """Reads only what has changed."""


@dataclass(frozen=True, slots=True)
class LoadReport:
    """How the names of a load matched."""

    missing: tuple[str, ...]
    """Asked for, not in the checkpoint."""
    unexpected: tuple[str, ...]
    """In the checkpoint, not asked for, and not read."""
    narrowed: tuple[str, ...]
    """Destinations larger than their tensor, which filled their first corner."""
    version: CheckpointVersion | None = field(default=None, compare=False)
    """What the checkpoint was, to be compared with later; None if the load failed, or waits to be applied."""


class Loader:
    """Options, a selection of files, and a budget. It holds nothing open, belongs to no event loop, and pickles."""

    def __init__(
        self,
        selection: Selection,
        options: Options,
        budget: MemoryBudget | None = None,
        disk_cache: DiskCache | None = None,
    ) -> None:
        self._selection = selection
        self._options = options
        if disk_cache is None and options.cache_dir is not None:
            disk_cache = make_cache(options.cache_dir, options.cache_max_gb)
        self._disk_cache = disk_cache
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

    @property
    def caching(self) -> Caching | None:
        """How stores are read through the cache on disk; None without one."""
        return None if self._disk_cache is None else Caching(self._disk_cache, self._budget.nbytes // _CACHE_SHARE)

    def disk_cache_for(self, options: Options) -> DiskCache | None:
        """Return this loader's cache on disk if it is the one that the options ask for."""
        is_same = (options.cache_dir, options.cache_max_gb) == (self._options.cache_dir, self._options.cache_max_gb)
        return self._disk_cache if is_same else None

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
            weights = {name: tensor async for name, tensor in stream}
            weights.update({name: weights[kept] for name, kept in stream.ties.items()})
            self.last_report = LoadReport((), (), (), stream.version)
            return weights

    async def prepare_refresh(
        self,
        path: ModelPath,
        state_dict: Mapping[str, Any],
        since: CheckpointVersion | None = None,
        *,
        stage: bool = True,
        strict: bool = True,
        cast: bool = False,
    ) -> Update:
        """Read what differs between the weights that are loaded and a checkpoint, and touch nothing live.

        Tensors with digests (`save_sharded_state` writes them, with ``digests=True``) are compared one by one, and what
        is read is checked against them; without digests a shard is read whole unless its ETag and size, or its times
        and size, are the same. What is read waits in memory of the budget, all of it at once, until it is applied or
        closed; this waits for that memory where others have it. An error or a cancel leaves the live weights as they
        were.

        Parameters
        ----------
        path : str, path or Store
            A local path or URL, of the same checkpoint or another one.
        state_dict : mapping of str to array, tensor or Sink
            What was loaded, as for `ShardedStateLoader.load_weights`.
        since : CheckpointVersion, optional
            What it holds: `Update.version` of the last update applied, ``last_report.version`` or `Stream.version` of a
            load. Without it everything is read.
        stage : bool
            False reads straight into `state_dict`, without memory of the budget, for who has paused anyway. An error or
            a cancel then leaves it partly written, and says so (``filled``, ``torn``); a strided destination, one of
            another dtype, and a sink are not checked against digests.
        strict, cast : bool
            As for `ShardedStateLoader.load_weights`.

        Returns
        -------
        Update
            To be applied, iterated over, or closed.

        Raises
        ------
        BudgetError
            What has changed exceeds the budget.
        ChecksumError
            A tensor does not match its digest.
        ImportError
            There are digests, and the extra ``cache`` is not installed.
        NamesError, DestinationError, CheckpointError, FormatError, StoreError
        """
        if not isinstance(since, CheckpointVersion | None):
            raise TypeError(f"since must be a CheckpointVersion (see CheckpointVersion.parse), not {since!r}")
        refresh = Refresh(since, self._budget, is_staged=stage, cast=cast)
        try:
            await self._fill(Request(path, into=state_dict, strict=strict, cast=cast, refresh=refresh))
        except BaseException:
            await refresh.abandon()
            raise
        return refresh.finish()

    async def _fill(self, request: Request) -> None:
        """Run a stream into destinations to its end."""
        stream = self._stream(request)
        version: CheckpointVersion | None = None
        try:
            await stream.drain()
            version = stream.version if request.refresh is None or not request.refresh.is_staged else None
        finally:
            if stream.is_open:
                transfer = stream.statistics()
                self.last_report = LoadReport(transfer.missing, transfer.unexpected, stream.narrowed, version)

    async def plan_weights(self, path: ModelPath) -> LoadPlan:
        """Open a checkpoint and plan its load, and read no tensor: which bytes of which files.

        Raises
        ------
        NamesError, CheckpointError, FormatError, BudgetError, StoreError
        """
        account = self._budget.open_account()
        threads = DaemonThreads(1, "asyncshard-work")
        try:
            async with self._opened(path, account, threads) as (store, checkpoint):
                return await threads.run(LoadPlan.of, checkpoint.with_tied(), store.max_gap_bytes)
        finally:
            account.close()
            await threads.aclose()

    @asynccontextmanager
    async def _open(self, request: Request, account: Account, threads: DaemonThreads) -> AsyncIterator[Transfer]:
        """Open the checkpoint and plan its transfer; the store is open until the end."""
        async with self._opened(request.path, account, threads) as (store, checkpoint):
            yield await self._plan(request, store, checkpoint, threads)

    @asynccontextmanager
    async def _opened(
        self, path: ModelPath, account: Account, threads: DaemonThreads
    ) -> AsyncIterator[tuple[Store, Checkpoint]]:
        store = open_store(path, self._options, self.caching)
        try:
            account.charge_headers(store.held_bytes, store.url)
            if self._selection.is_sliced:
                chunk_size = self._options.chunk_size or store.chunk_size
                yield await open_sliced(store, self._selection, threads, account, chunk_size=chunk_size)
            else:
                yield store, await open_checkpoint(store, self._selection, threads, account)
        finally:
            if store is not path:
                await wait_to_end(asyncio.ensure_future(store.aclose()))

    def _pacing(self, store: Store) -> Pacing:
        return Pacing(
            self._options.chunk_size or store.chunk_size,
            self._options.prefetch_count or store.prefetch_count,
            store.max_gap_bytes,
        )

    def _staged_transfer(self, *args: Any) -> BufferedTransfer:
        return BufferedTransfer(*args)

    async def _plan(self, request: Request, store: Store, checkpoint: Checkpoint, threads: DaemonThreads) -> Transfer:
        pacing = self._pacing(store)
        library = await threads.run(self._options.library, request.into)
        if request.into is None:
            checkpoint = await find_ties(store, checkpoint, threads)
        if request.into is None and not request.is_new:

            def stage() -> Transfer:
                staged = self._staged_transfer(checkpoint.with_tied(), store, pacing, library, threads)
                staged.plan(self._budget, is_strict=self._options.strict_budget)
                return staged

            return await threads.run(stage)
        if request.into is None:
            checkpoint = checkpoint.with_tied()
            placement = await new_destinations(checkpoint, library)
        else:
            store, checkpoint = await add_ties(store, checkpoint, request.into, library, threads)
            placement = await match_destinations(
                checkpoint, request.into, library, threads, strict=request.strict, cast=request.cast, path=store.url
            )
            _warn(store.url, placement)
        if request.refresh is not None:
            return await request.refresh.plan(checkpoint, store, pacing, placement, library, threads)

        def place() -> Transfer:
            placed = PlacedTransfer(checkpoint, store, pacing, placement, threads)
            placed.plan(self._budget)
            return placed

        return await threads.run(place)


class Inherited(NamedTuple):
    """What a loader built on another has of it: the arguments of `Loader`."""

    selection: Selection
    options: Options
    budget: MemoryBudget | None
    disk_cache: DiskCache | None


def inherited(base_loader: Loader | None, given: Mapping[str, Any]) -> Inherited:
    """Return what a loader built on another has: its files, its options where none are given, its budget and cache.

    Raises
    ------
    TypeError
        `base_loader` is no loader, or an option does not exist.
    ValueError
        An option is out of range.
    """
    if base_loader is not None and not isinstance(base_loader, Loader):
        raise TypeError(f"base_loader must be one of asyncshard's loaders, not {base_loader!r}")
    options = (Options() if base_loader is None else base_loader.options).override(given)
    selection = Selection() if base_loader is None else base_loader.selection
    has_own_budget = given.get("memory_budget_mb") is not None or given.get("budget") is not None
    return Inherited(
        selection._replace(max_header_bytes=options.max_header_bytes, max_tensors=options.max_tensors),
        options,
        None if base_loader is None or has_own_budget else base_loader.budget,
        None if base_loader is None else base_loader.disk_cache_for(options),
    )


_LISTED = 20
_CACHE_SHARE = 8
"""The part of the budget that blocks on their way to a cache's disk may take."""


def _warn(path: str, placement: MatchedDestinations) -> None:
    for names, what in (
        (placement.missing, "are missing from the checkpoint and keep their values"),
        (placement.unexpected, "are in the checkpoint and were not asked for"),
        (placement.narrowed, "are smaller than their destinations and fill their first corner"),
    ):
        if names:
            more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
            logger.warning("%s: %d tensors %s: %s%s", path, len(names), what, ", ".join(names[:_LISTED]), more)
