"""Move a checkpoint to another number of ranks."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np

from asyncshard._core import StopFlag
from asyncshard.errors import CheckpointError
from asyncshard.format.pattern import ShardPattern
from asyncshard.loaders.files import ModelPath, open_store
from asyncshard.loaders.options import Options, require_int
from asyncshard.pipeline.budget import Account, MemoryBudget
from asyncshard.pipeline.checkpoint import Selection
from asyncshard.pipeline.free_memory import default_budget_mb
from asyncshard.pipeline.reshard import Copy
from asyncshard.pipeline.reshard_plan import TargetPlan, plan_target
from asyncshard.pipeline.reshard_source import PlaceTensor, Source, join_source, open_source
from asyncshard.pipeline.reshard_target import Target, index_text
from asyncshard.plan.layout import INDEX_NAME, SINGLE_NAME, rank_shards
from asyncshard.plan.placements import Placement, Replicate
from asyncshard.stores import Store
from asyncshard.stores.threads import DaemonThreads, finish

DEFAULT_MAX_SHARD_SIZE = 5 * 10**9
_WRITERS = 3


@dataclass(frozen=True, slots=True)
class ReshardReport:
    """What a reshard has done."""

    files: tuple[str, ...]
    """Full paths of the weights' files, and of the index where there is one, in order of rank and part."""
    tensors: int
    """Tensors of the checkpoint; each rank has all or a part of each."""
    bytes_read: int
    """Of tensor data."""
    bytes_written: int
    """Of tensor data."""


async def reshard(
    source: ModelPath,
    target: str | os.PathLike[str],
    *,
    world_size: int,
    tp_plan: Any = None,
    layout: str = "auto",
    max_shard_size: int = DEFAULT_MAX_SHARD_SIZE,
    memory_budget_mb: float | None = None,
    budget: MemoryBudget | None = None,
    overwrite: bool = False,
    pattern: str | ShardPattern | None = None,
    max_workers: int | None = None,
    chunk_size: int | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> ReshardReport:
    """Write a checkpoint anew."""
    require_int("world_size", world_size, 1)
    require_int("max_shard_size", max_shard_size, 1)
    if layout not in ("auto", "hf", "ranks"):
        raise ValueError(f"layout must be 'auto', 'hf' or 'ranks', not {layout!r}")
    if layout == "hf" and world_size != 1:
        raise ValueError(f"layout='hf' is of one rank: pass world_size=1, not {world_size}")
    given = {
        "memory_budget_mb": memory_budget_mb,
        "budget": budget,
        "max_workers": max_workers,
        "chunk_size": chunk_size,
        "storage_options": storage_options,
    }
    options = Options().override(given)
    names = ShardPattern(pattern) if isinstance(pattern, str) else pattern
    is_ranks = layout == "ranks" or (layout == "auto" and world_size > 1)
    wanted = _Wanted(world_size, max_shard_size, is_ranks, names, tp_plan)
    directory = _local_directory(target)
    shared = options.budget or MemoryBudget(options.memory_budget_mb or default_budget_mb())
    store = open_store(source, options)
    threads = DaemonThreads(_WRITERS, "asyncshard-write")
    account = shared.open_account()
    output = Target(directory, names, overwrite=overwrite)
    try:
        await threads.run(output.require_other_than, store.url)
        await threads.run(output.check)
        run = _Run(store, output, wanted, options, threads, account)
        return await run.run()
    finally:
        await finish(asyncio.ensure_future(_close(output, threads, account)))
        if store is not source:
            await finish(asyncio.ensure_future(store.aclose()))


async def _close(output: Target, threads: DaemonThreads, account: Account) -> None:
    try:
        await threads.run(output.clean_up)
    finally:
        await threads.aclose()
        await account.aclose()


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What was asked for."""

    world_size: int
    max_shard_size: int
    is_ranks: bool
    pattern: ShardPattern | None
    tp_plan: Any


class _Run:
    """The steps of one reshard."""

    def __init__(
        self,
        store: Store,
        target: Target,
        wanted: _Wanted,
        options: Options,
        threads: DaemonThreads,
        account: Account,
    ) -> None:
        self._store = store
        self._target = target
        self._wanted = wanted
        self._options = options
        self._threads = threads
        self._account = account

    async def run(self) -> ReshardReport:
        source = await self._open()
        plan = await self._threads.run(self._plan, source)
        self._account.charge_headers(source.side.nbytes + plan.nbytes, self._store.url)
        await self._threads.run(self._target.begin)
        stop = StopFlag()
        sizes = await self._threads.run(self._write_headers, plan, stop, on_cancel=stop.set)
        side = await self._threads.run(plan.side, sizes)
        chunk_size = self._options.chunk_size or min(self._store.chunk_size, 8 << 20)
        copy = Copy(self._store, source, self._target, side, plan.files, self._threads, chunk_size)
        await copy.run(self._account)
        names = [file.name for file in plan.files.files]
        if not plan.is_ranks and names != [SINGLE_NAME]:
            total = int(source.sizes.sum())
            await self._threads.run(
                lambda: self._target.write_text(INDEX_NAME, index_text(total, plan.weight_map()))
            )
            names.append(INDEX_NAME)
        for name in names:
            await self._threads.run(self._target.flush, name)
        await self._threads.run(self._target.commit, names)
        return ReshardReport(
            tuple(os.path.join(self._target.directory, name) for name in names),
            len(source.tensors.rows),
            copy.bytes_read,
            copy.bytes_written,
        )

    async def _open(self) -> Source:
        listing = await self._store.list()
        found = None
        if not listing.is_file:
            found = await self._threads.run(rank_shards, listing.names, self._store.url, self._wanted.pattern)
        world_size = None if found is None else 1 + max(shard.rank for shard in found[1].values())
        pattern = None if found is None else found[0]
        checkpoints = await open_source(
            self._store, pattern, world_size, Selection(), self._threads, self._account
        )
        return await self._threads.run(
            lambda: join_source(checkpoints, self._place(world_size), path=self._store.url, is_ranks=found is not None)
        )

    def _place(self, world_size: int | None) -> PlaceTensor | None:
        return None

    def _plan(self, source: Source) -> TargetPlan:
        wanted = self._wanted
        pattern = (wanted.pattern or ShardPattern()) if wanted.is_ranks else None
        return plan_target(
            source,
            self._place_target(),
            world_size=wanted.world_size,
            max_shard_size=wanted.max_shard_size,
            pattern=pattern,
            path=self._store.url,
        )

    def _place_target(self) -> PlaceTensor | None:
        if self._wanted.tp_plan is None:
            return None
        return lambda name, shape: self._wanted.tp_plan.get(name, Replicate())

    def _write_headers(self, plan: TargetPlan, stop: StopFlag) -> np.ndarray[Any, np.dtype[np.int64]]:
        sizes = np.zeros(len(plan.files.files), np.int64)
        for number, file in enumerate(plan.files.files):
            header = plan.header(number)
            self._target.write(file.name, 0, [memoryview(header)], stop)
            sizes[number] = len(header)
            if stop.is_set():
                break
        return sizes


def _local_directory(target: str | os.PathLike[str]) -> str:
    path = os.fspath(target)
    if not isinstance(path, str):
        raise TypeError(f"a target is a str or a path of str, not {path!r}")
    match = re.match("([A-Za-z][A-Za-z0-9+.-]*)://", path)
    if match is None:
        return path
    if match[1].lower() != "file":
        raise ValueError(f"{path}: reshard writes to a local directory; write there, and copy it to the URL afterwards")
    return unquote(urlsplit(path).path)
