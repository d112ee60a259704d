"""Open a checkpoint that was not cut for ranks as if it had been: each shard is the rank's part of it."""

from __future__ import annotations

from asyncshard.errors import ObjectNotFoundError
from asyncshard.pipeline.checkpoint.checkpoint import (
    Checkpoint,
    Selection,
    TiedShard,
    choose_files,
    open_files,
    require_wanted,
)
from asyncshard.pipeline.checkpoint.config import CONFIG_NAME, read_config
from asyncshard.pipeline.checkpoint.opened_file import OpenedFile
from asyncshard.pipeline.checkpoint.slice_reader import SliceReader
from asyncshard.pipeline.checkpoint.ties import place_ties, ties_with_rules
from asyncshard.pipeline.memory.budget import Account
from asyncshard.pipeline.memory.scratch import charge_scratch
from asyncshard.plan.file_slices.planner import make_file_slice
from asyncshard.plan.tp.models import auto_plan, require_known
from asyncshard.plan.tp.plan import TpPlan
from asyncshard.stores.base import Store
from asyncshard.stores.ranges import Scratch
from asyncshard.tasks.threads import DaemonThreads
from asyncshard.tasks.yielding import yielding_gil


async def open_sliced(
    store: Store, selection: Selection, threads: DaemonThreads, account: Account, *, chunk_size: int
) -> Checkpoint:
    """Do what `open_checkpoint` does, and leave of every shard what is this rank's and wanted.

    Raises
    ------
    NamesError
        A rule of the plan matches no tensor, or the filter none.
    ObjectNotFoundError, CheckpointError, FormatError, BudgetError, StoreError
    """
    found = await choose_files(store, selection, threads)
    plan = await find_plan(store, selection, threads)
    whole = await open_files(store, found, selection, threads, account)
    ties: dict[str, str] = {}
    tied: tuple[TiedShard, ...] = ()
    if plan is not None and selection.tp_plan != "auto":
        tables = [shard.header.table for shard in whole.shards] if found.weight_map is None else [found.weight_map]
        ties = await ties_with_rules(store, whole, tables, plan, threads)
        await threads.run(lambda: plan.check(tables, ties, path=store.url, yielding_gil=yielding_gil))
        tied = tuple(await threads.run(lambda: list(place_ties(whole, ties, selection, plan))))
    shards = [await threads.run(slice_shard, shard, selection, plan) for shard in whole.shards]
    if selection.tensor_filter is not None and found.weight_map is None:
        wanted = selection.tensor_filter.names
        missing = [name for name in wanted if not any(name in shard.header for shard in whole.shards)]
        require_wanted(sum(len(shard.header) for shard in shards), missing, store.url)
    kept = tuple(shard for shard in shards if len(shard.header) or shard.slice is None)
    checkpoint = whole._replace(shards=kept, tied=tied, ties=tuple(ties.items()), tensor_filter=selection.tensor_filter)
    before, after = (sum(shard.nbytes for shard in each.with_tied().shards) for each in (whole, checkpoint))
    account.charge_headers(after - before, store.url)
    return await with_slice_reader(checkpoint, threads, account, chunk_size=chunk_size)


async def find_plan(store: Store, selection: Selection, threads: DaemonThreads) -> TpPlan | None:
    """Return the plan of a selection: for "auto" the one for the model that config.json describes.

    Raises
    ------
    CheckpointError
        That is not JSON, or there is no plan for such a model.
    ObjectNotFoundError
        There is no config.json.
    AccessDeniedError, StoreError
    """
    if selection.tp_plan != "auto":
        return selection.tp_plan
    path = store.path_of(CONFIG_NAME)
    try:
        config = await read_config(store, threads)
    except ObjectNotFoundError as error:
        raise ObjectNotFoundError(
            f'{error}; tp_plan="auto" needs it, to know the model: put it beside the shards, or pass a tp_plan of your '
            "own",
            path=path,
        ) from error
    return auto_plan(config, selection.world_size, path=path)


def slice_shard(shard: OpenedFile, selection: Selection, plan: TpPlan | None) -> OpenedFile:
    """Return a rank's part of a shard, or the shard where that is all of it. Slow: not for the event loop.

    Raises
    ------
    CheckpointError
        A tensor cannot be divided so, or, with a plan of ours, we do not know how.
    """
    if plan is not None and selection.tp_plan == "auto":
        if selection.tensor_filter is None:
            wanted = plan.samples([shard.header.table], yielding_gil)
        else:
            wanted = filter(selection.tensor_filter, yielding_gil(shard.header))
        require_known(plan, wanted, path=shard.path)
    part = make_file_slice(
        shard.header,
        plan,
        selection.tensor_filter,
        rank=selection.rank,
        world_size=selection.world_size,
        path=shard.path,
        yielding_gil=yielding_gil,
    )
    return shard if part is None else shard._replace(header=part.header, slice=part)


async def with_slice_reader(
    checkpoint: Checkpoint, threads: DaemonThreads, account: Account, *, chunk_size: int
) -> Checkpoint:
    """Return the checkpoint with a reader of slices, whose scratch is charged like headers, which never wait.

    Raises
    ------
    BudgetError
    """
    store = checkpoint.reader.store
    if store.has_own_scratch or not await threads.run(_is_covering, checkpoint, store.pacing.max_gap_bytes):
        return checkpoint._replace(reader=SliceReader(store, threads, Scratch(threads, chunk_size, 1)))
    scratch = charge_scratch(account, threads, chunk_size=chunk_size, path=store.url)
    return checkpoint._replace(reader=SliceReader(store, threads, scratch), scratch_bytes=scratch.nbytes)


def _is_covering(checkpoint: Checkpoint, max_gap: int) -> bool:
    """Return whether something is read that is not wanted."""
    slices = (shard.slice for shard in checkpoint.with_tied().shards)
    return any(each.bytes_read(max_gap) > each.bytes_needed for each in slices if each is not None)
