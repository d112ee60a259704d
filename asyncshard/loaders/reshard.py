"""Move a checkpoint to another number of ranks."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

import numpy as np

from asyncshard._core import StopFlag
from asyncshard.errors import CheckpointError
from asyncshard.format.pattern import ShardPattern
from asyncshard.loaders.files import ModelPath, open_store
from asyncshard.loaders.options import Options, require_int
from asyncshard.pipeline.budget import Account, MemoryBudget
from asyncshard.pipeline.checkpoint import Checkpoint, Selection
from asyncshard.pipeline.free_memory import default_budget_mb
from asyncshard.pipeline.pace import without_hold
from asyncshard.pipeline.reshard import Copy
from asyncshard.pipeline.reshard_beside import beside, copy_beside
from asyncshard.pipeline.reshard_copies import Comparison, compare_digests
from asyncshard.pipeline.reshard_jobs import run_all
from asyncshard.pipeline.reshard_plan import TargetPlan, plan_target
from asyncshard.pipeline.reshard_reads import BlockReader, Room, take_rooms
from asyncshard.pipeline.reshard_source import Faults, PlaceTensor, Source, has_placements, join_source, open_source
from asyncshard.pipeline.reshard_target import Target, index_text
from asyncshard.pipeline.slicing import find_plan
from asyncshard.plan.layout import INDEX_NAME, SINGLE_NAME
from asyncshard.plan.survey import Survey, survey_names
from asyncshard.plan.tp_plan import TpPlan
from asyncshard.stores import Store
from asyncshard.stores.threads import DaemonThreads, finish

DEFAULT_MAX_SHARD_SIZE = 5 * 10**9
_WRITERS = 3
_BLOCK_BYTES = 8 << 20


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
    bytes_compared: int
    """Read before that, of tensors which several ranks hold, to see that they are alike."""


async def reshard(
    source: ModelPath,
    target: str | os.PathLike[str],
    *,
    world_size: int,
    tp_plan: Mapping[str, Any] | TpPlan | str | None = None,
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
    """Write a checkpoint anew, for another number of ranks, in a stream and off the event loop.

    A Hugging Face checkpoint, or the rank shards of n ranks, become the shards of m ranks or a Hugging Face checkpoint.
    Each byte is read once and written once, to each rank that is to have it. Tensors keep their names, which are the
    checkpoint's: vLLM's ``sharded_state`` looks its own fused names up, and reads what comes out only where the source
    had these.

    All that can be known to be wrong is raised, in one error, before anything is written: missing ranks and parts,
    names and dtypes on which ranks disagree, shapes that do not add up, and tensors of which several ranks hold
    copies that are not alike (these are read for it, unless their files have digests).

    Files get their names when all are complete and on the disk, the index last; until then, and where a run is killed,
    ``asyncshard.incomplete`` stands in the target, and loaders refuse it. A failed or cancelled run removes what it has
    written. When cancelled it ends the writes that are under way; from the moment when files get their names it goes on
    to the end.

    Parameters
    ----------
    source : str, path or Store
        A local path or URL. A store of one's own is left open.
    target : str or path
        A local directory other than the source; made if it does not exist.
    world_size : int
        Ranks of the target.
    tp_plan : mapping, TpPlan or "auto", optional
        How the target is divided. Rank shards whose files do not say how they are divided (the metadata
        ``asyncshard.placement``, which is written here) are taken to be divided by it too. None divides the target as
        the source is; a Hugging Face checkpoint needs a plan to become several ranks. With "auto" the source's
        ``config.json`` chooses.
    layout : {"auto", "hf", "ranks"}
        What is written: rank shards, or a Hugging Face checkpoint, with an index if it has several files. "auto" is
        "hf" for one rank.
    max_shard_size : int
        Bytes of tensors in a file at most, of each rank; a larger tensor has a file of its own.
    memory_budget_mb : float, optional
        MiB for headers and for what is read and not yet written; by default the smaller of 2048 and a quarter of the
        free memory.
    budget : MemoryBudget, optional
        One that is shared with loaders, instead.
    overwrite : bool
        Replace the weights in the target. Otherwise it must be empty, or left by a run that was killed.
    pattern : str or ShardPattern, optional
        Names of rank shards, in the source where it has such names, and in the target.
    max_workers, storage_options
        As for `ShardedStateLoader`.
    chunk_size : int, optional
        Bytes that are moved at once, at most.

    Files of the source beside its weights that end in ``.json``, ``.txt``, ``.model`` or ``.jinja`` are copied. The
    metadata of its files is kept, among it what ties a tensor to another one; digests are not.

    Raises
    ------
    CheckpointError
        The source is not whole, cannot be divided so, or is the target.
    TargetExistsError
        The target is not empty, and `overwrite` is False.
    BudgetError
        The headers leave no room to copy anything.
    NamesError
        A rule of the plan matches no tensor.
    ValueError, TypeError
        An argument is out of range, or the target is a URL.
    FormatError, ObjectNotFoundError, AccessDeniedError, StoreError
    """
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
    wanted = _Wanted(world_size, max_shard_size, is_ranks, names, _plan_of(tp_plan), chunk_size)
    directory = _local_directory(target)
    store = open_store(source, options)
    threads = DaemonThreads(_WRITERS, "asyncshard-write")
    output = Target(directory, names, overwrite=overwrite)
    account: Account | None = None
    try:
        await threads.run(output.require_other_than, store.url)
        await threads.run(output.check)
        if budget is None:
            default_mb = await threads.run(default_budget_mb)
            budget = MemoryBudget(default_mb if memory_budget_mb is None else memory_budget_mb)
        account = budget.open_account()
        return await _Run(store, output, wanted, threads, account).run()
    finally:
        await finish(asyncio.ensure_future(_close(output, threads, account)))
        if store is not source:
            await finish(asyncio.ensure_future(store.aclose()))


async def _close(output: Target, threads: DaemonThreads, account: Account | None) -> None:
    try:
        await threads.run(output.clean_up)
    finally:
        await threads.aclose()
        if account is not None:
            await account.aclose()


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What was asked for."""

    world_size: int
    max_shard_size: int
    is_ranks: bool
    pattern: ShardPattern | None
    tp_plan: TpPlan | Literal["auto"] | None
    chunk_size: int | None


class _Run:
    """The steps of one reshard: look, check, copy, put in place."""

    def __init__(self, store: Store, target: Target, wanted: _Wanted, threads: DaemonThreads, account: Account) -> None:
        self._store = store
        self._target = target
        self._wanted = wanted
        self._threads = threads
        self._account = account

    async def run(self) -> ReshardReport:
        names, source = await self._open()
        plan = await self._plan(source)
        self._account.charge_headers(source.side.nbytes + plan.nbytes, self._store.url)
        rooms = await take_rooms(self._account, self._wanted.chunk_size or min(self._store.chunk_size, _BLOCK_BYTES))
        reader = BlockReader(self._store, source.shards, self._threads)
        bytes_compared = await self._compare(source, reader, rooms)
        await self._threads.run(self._target.begin)
        copy = await self._copy(source, plan, reader, rooms)
        others = await copy_beside(self._store, beside(names), self._target, rooms[0].memory, self._threads)
        files = [file.name for file in plan.files.files]
        if not plan.is_ranks and files != [SINGLE_NAME]:
            await self._threads.run(self._write_index, source, plan)
            files.append(INDEX_NAME)
        await run_all(_WRITERS, (self._threads.run(self._target.flush, name) for name in [*others, *files]))
        await self._threads.run(self._target.commit, [*others, *files])
        return ReshardReport(
            tuple(os.path.join(self._target.directory, name) for name in files),
            len(source.tensors.rows),
            copy.bytes_read,
            copy.bytes_written,
            bytes_compared,
        )

    async def _open(self) -> tuple[Sequence[str], Source]:
        """Return the names beside the weights too."""
        url, pattern = self._store.url, self._wanted.pattern
        listing = await self._store.list()

        def look() -> tuple[Survey, ShardPattern | None]:
            survey = survey_names(listing.names, path=url, is_file=listing.is_file, pattern=pattern)
            if pattern is None or survey.kind == "ranks":
                return survey, pattern
            return survey_names(listing.names, path=url, is_file=listing.is_file), None  # the pattern is the target's

        survey, found = await self._threads.run(look)
        checkpoints = await open_source(self._store, survey, found, self._threads, self._account)
        source = await self._join(checkpoints, is_ranks=survey.kind == "ranks")
        return (() if listing.is_file else listing.names), source

    async def _join(self, checkpoints: Sequence[Checkpoint], *, is_ranks: bool) -> Source:
        url, plan = self._store.url, self._wanted.tp_plan
        if isinstance(plan, TpPlan):
            names = without_hold([name for shard in checkpoints[0].shards for name in shard.header])
            await self._threads.run(lambda: plan.check(names, path=url))
        place = None
        if is_ranks and not has_placements(checkpoints[0]):
            place = await self._find_plan(len(checkpoints))
        return await self._threads.run(lambda: join_source(checkpoints, place, path=url, is_ranks=is_ranks))

    async def _plan(self, source: Source) -> TargetPlan:
        wanted, url = self._wanted, self._store.url
        place = await self._find_plan(wanted.world_size) if wanted.is_ranks else None
        if place is None and wanted.world_size > 1 and not source.is_ranks:
            raise CheckpointError(
                f"{url}: how its tensors are to be divided among {wanted.world_size} ranks is not known: pass a "
                "tp_plan, or tp_plan='auto' for the models that it knows",
                path=url,
            )
        return await self._threads.run(
            lambda: plan_target(
                source,
                place,
                world_size=wanted.world_size,
                max_shard_size=wanted.max_shard_size,
                pattern=(wanted.pattern or ShardPattern()) if wanted.is_ranks else None,
                path=url,
            )
        )

    async def _find_plan(self, world_size: int) -> PlaceTensor | None:
        selection = Selection(tp_plan=self._wanted.tp_plan, world_size=world_size)
        plan = await find_plan(self._store, selection, self._threads)
        return None if plan is None else plan.placement_of

    async def _compare(self, source: Source, reader: BlockReader, rooms: Sequence[Room]) -> int:
        """Check that what several ranks hold alike is alike; return the bytes that were read for it."""
        faults = Faults(self._store.url)
        comparison = Comparison(reader, self._threads, faults)
        for copies in await self._threads.run(compare_digests, source, faults):
            await comparison.run(copies, rooms)
        faults.require_none()
        return comparison.bytes_compared

    async def _copy(self, source: Source, plan: TargetPlan, reader: BlockReader, rooms: Sequence[Room]) -> Copy:
        stop = StopFlag()
        sizes = await self._threads.run(self._write_headers, plan, stop, on_cancel=stop.set)
        side = await self._threads.run(plan.side, sizes)
        copy = Copy(reader, source, self._target, side, plan.files, self._threads)
        await copy.run(rooms)
        return copy

    def _write_headers(self, plan: TargetPlan, stop: StopFlag) -> np.ndarray[Any, np.dtype[np.int64]]:
        sizes = np.zeros(len(plan.files.files), np.int64)
        for number, file in enumerate(plan.files.files):
            header = plan.header(number)
            self._target.write(file.name, 0, [memoryview(header)], stop)
            sizes[number] = len(header)
            if stop.is_set():
                break
        return sizes

    def _write_index(self, source: Source, plan: TargetPlan) -> None:
        self._target.write_text(INDEX_NAME, index_text(int(source.sizes.sum()), plan.weight_map()))


def _plan_of(tp_plan: object) -> TpPlan | Literal["auto"] | None:
    if tp_plan is None or isinstance(tp_plan, TpPlan):
        return tp_plan
    if isinstance(tp_plan, Mapping):
        return TpPlan(tp_plan)
    if tp_plan == "auto":
        return "auto"
    raise TypeError(f"tp_plan must be a mapping of rules, a TpPlan, 'auto' or None, not {tp_plan!r}")


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
