"""The base class of all loaders: a selection of files, options, a memory budget, and a disk cache."""

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
    """The names that matched and did not match in a load, and the version of its checkpoint."""

    missing: tuple[str, ...]
    """Names of destinations for which the checkpoint has no tensor."""
    unexpected: tuple[str, ...]
    """Names of tensors that have no destination, and were not read."""
    narrowed: tuple[str, ...]
    """Names of destinations that are larger than their tensor, which filled their first corner."""
    version: CheckpointVersion | None = field(default=None, compare=False)
    """The version of the checkpoint, for `prepare_refresh`; None if the load failed, or its update is not applied."""


class Loader:
    """The base class of the loaders. A loader holds nothing open, belongs to no event loop, and can be pickled."""

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
        """The report of the load that ended last; None before the first load."""

    def __repr__(self) -> str:
        facts = ", ".join(self._facts())
        return f"<{type(self).__name__} {facts}>"

    def _facts(self) -> tuple[str, ...]:
        """Return what the repr says: which files, and the state of the budget."""
        rank, world_size = self._selection.rank, self._selection.world_size
        budget = self._budget
        return f"rank={rank}", f"world_size={world_size}", f"{budget.bytes_used / 1e6:.1f} MB of {budget!r} used"

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
        """The selection of files and tensors that the loader loads."""
        return self._selection

    @property
    def budget(self) -> MemoryBudget:
        """The memory budget that all loads of the loader share."""
        return self._budget

    @property
    def access(self) -> StoreAccess:
        """How the loader opens stores: with its options, and through its disk cache."""
        return self._access

    def disk_cache_for(self, options: Options) -> DiskCache | None:
        """Return the disk cache of this loader if it is the cache that `options` ask for; otherwise None."""
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
        """Load a checkpoint into new arrays; return them by name, with tied names."""
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
        """Read the tensors of a checkpoint that differ from the loaded weights; the loaded weights are not changed.

        Tensors that have digests (`save_sharded_state` writes them with ``digests=True``) are compared one by one, and
        the tensors that are read are checked against their digests. A shard without digests is read as a whole, unless
        its ETag and size, or its times and size, are unchanged. All changed tensors are staged together in memory of
        the budget until the update is applied or closed. If other loads use that memory, this call waits for it. An
        error or a cancel leaves the loaded weights unchanged.

        Parameters
        ----------
        path : str, path or Store
            A local path or URL of the same checkpoint, or of another one.
        state_dict : mapping of str to array, tensor or Sink
            The loaded weights, as for `ShardedStateLoader.load_weights`.
        since : CheckpointVersion, optional
            The version that `state_dict` holds: `Update.version` of the last update that was applied, or
            ``last_report.version`` or `Stream.version` of a load. Without it every tensor is read.
        stage : bool
            False reads straight into `state_dict`, without memory of the budget: use it if nothing reads the weights
            meanwhile. An error or a cancel then leaves the weights partly written, and its attributes ``filled`` and
            ``torn`` name the tensors. A strided destination, one of another dtype, and a sink are not checked against
            digests.
        strict, cast : bool
            As for `ShardedStateLoader.load_weights`.

        Returns
        -------
        Update
            The changed tensors, to be applied, iterated over, or closed.

        Raises
        ------
        BudgetError
            The changed tensors exceed the budget.
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
        """Run a stream into destinations to its end, and set `last_report`.

        With `is_final` the destinations then hold the stream's version, which the report has.
        """
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
        """Open a checkpoint and return the plan of its load: how many bytes of which files. No tensor data is read.

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
    """The arguments of `Loader` for a loader that is built on another one."""

    selection: Selection
    options: Options
    budget: MemoryBudget | None
    disk_cache: DiskCache | None


def inherited(base_loader: Loader | None, keywords: Mapping[str, Any]) -> Inherited:
    """Return the arguments of a loader that is built on another one.

    The selection is that of the base loader. The options are those of `keywords` that are not None, and otherwise those
    of the base loader. The budget and the disk cache are shared with it, unless `keywords` ask for others.

    Raises
    ------
    TypeError
        `base_loader` is no loader, or an option does not exist.
    ValueError
        An option is out of range.
    """
    if base_loader is not None and not isinstance(base_loader, Loader):
        raise TypeError(f"base_loader must be one of asyncshard's loaders, not {base_loader!r}")
    options = (Options() if base_loader is None else base_loader.options).override(keywords)
    selection = Selection() if base_loader is None else base_loader.selection
    has_own_budget = keywords.get("memory_budget_mb") is not None or keywords.get("budget") is not None
    return Inherited(
        selection._replace(limits=options.header_limits),
        options,
        None if base_loader is None or has_own_budget else base_loader.budget,
        None if base_loader is None else base_loader.disk_cache_for(options),
    )


_CACHE_SHARE = 8
"""Blocks that wait to be written to a disk cache take at most 1/8 of the budget."""
