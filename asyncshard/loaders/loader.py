"""What all loaders share: a selection of files, options, a budget and a cache on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from asyncshard.loaders.options import Options
from asyncshard.pipeline.checkpoint.checkpoint import Selection
from asyncshard.pipeline.checkpoint.load_plan import LoadPlan
from asyncshard.pipeline.checkpoint.version import CheckpointVersion
from asyncshard.pipeline.memory.budget import MemoryBudget
from asyncshard.pipeline.memory.free_memory import default_budget_mb
from asyncshard.pipeline.refresh.refresh import Refresh
from asyncshard.pipeline.refresh.update import Update
from asyncshard.pipeline.transfer.load import Delivery, Load
from asyncshard.pipeline.transfer.placed import ToNewArrays
from asyncshard.pipeline.transfer.stream import Stream
from asyncshard.stores.opening import ModelPath, StoreAccess, make_cache

if TYPE_CHECKING:
    from asyncshard.stores.disk_cache.directory import DiskCache


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
        self._access = options.access(disk_cache, self._budget.nbytes // _CACHE_SHARE)
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
    def access(self) -> StoreAccess:
        """How it opens stores: with its options, and through its cache on disk."""
        return self._access

    def disk_cache_for(self, options: Options) -> DiskCache | None:
        """Return this loader's cache on disk if it is the one that the options ask for."""
        is_same = (options.cache_dir, options.cache_max_gb) == (self._options.cache_dir, self._options.cache_max_gb)
        return self._disk_cache if is_same else None

    def _load(self, path: ModelPath) -> Load:
        options = self._options
        return Load(
            path,
            self._access,
            self._selection,
            self._budget,
            chunk_size=options.chunk_size,
            prefetch_count=options.prefetch_count,
            framework=options.framework,
            is_strict=options.strict_budget,
            is_ordered=options.order == "plan",
        )

    async def _load_new(self, path: ModelPath) -> dict[str, Any]:
        """Load into new arrays."""
        async with Stream(self._load(path), ToNewArrays()) as stream:
            weights = {name: tensor async for name, tensor in stream}
            weights.update({name: weights[stored_name] for name, stored_name in stream.ties.items()})
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
        refresh = Refresh(since, state_dict, strict=strict, cast=cast, is_staged=stage)
        try:
            await self._fill(path, refresh, is_final=not stage)
        except BaseException:
            await refresh.abandon()
            raise
        return refresh.finish()

    async def _fill(self, path: ModelPath, delivery: Delivery, *, is_final: bool = True) -> None:
        """Run a stream into destinations to its end, after which they hold its version if that `is_final`."""
        stream = Stream(self._load(path), delivery)
        version: CheckpointVersion | None = None
        try:
            await stream.drain()
            version = stream.version if is_final else None
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
        load = self._load(path)
        async with load.open() as opening:
            _, reading = await load.open_checkpoint(opening)
            checkpoint = reading.checkpoint.with_tied()
            return await opening.threads.run(LoadPlan.of, checkpoint, reading.pacing.max_gap_bytes)


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
        selection._replace(limits=options.header_limits),
        options,
        None if base_loader is None or has_own_budget else base_loader.budget,
        None if base_loader is None else base_loader.disk_cache_for(options),
    )


_CACHE_SHARE = 8
"""An eighth of the budget may be taken by blocks on their way to a cache's disk."""
