"""Open a checkpoint that was not cut for ranks as if it had been: each shard is the rank's part of it."""

from __future__ import annotations

from asyncshard.errors import ObjectNotFoundError
from asyncshard.pipeline.checkpoint.checkpoint import (
    Checkpoint,
    Selection,
    TiedShard,
    choose_files,
    names_at_ends,
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
    tables = [file.header.table for file in whole.shards] if found.weight_map is None else [found.weight_map]
    has_own_plan = plan is not None and selection.tp_plan != "auto"
    if plan is not None and has_own_plan:
        ties = await ties_with_rules(store, whole, tables, plan, threads)

    def cut() -> tuple[Checkpoint, bool]:
        tied: tuple[TiedShard, ...] = ()
        if plan is not None and has_own_plan:
            plan.check(tables, ties, path=store.url, yielding_gil=yielding_gil)
            tied = tuple(place_ties(whole, ties, selection, plan))
        files = [slice_shard(file, selection, plan) for file in whole.shards]
        if selection.tensor_filter is not None and found.weight_map is None:
            wanted = selection.tensor_filter.names
            missing = [name for name in wanted if not any(name in file.header for file in whole.shards)]
            require_wanted(sum(len(file.header) for file in files), missing, store.url)
        needed = tuple(file for file in files if len(file.header) or file.slice is None)
        checkpoint = whole._replace(
            shards=needed,
            tied=tied,
            ties=tuple(ties.items()),
            tensor_filter=selection.tensor_filter,
            ends=names_at_ends(needed),
        )
        return checkpoint, covers_gaps(checkpoint, store.pacing.max_gap_bytes)

    checkpoint, is_covering = await threads.run(cut)
    before, after = (sum(file.nbytes for file in each.with_tied().shards) for each in (whole, checkpoint))
    account.charge_headers(after - before, store.url)
    return with_slice_reader(checkpoint, threads, account, chunk_size=chunk_size, is_covering=is_covering)


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


def with_slice_reader(
    checkpoint: Checkpoint, threads: DaemonThreads, account: Account, *, chunk_size: int, is_covering: bool
) -> Checkpoint:
    """Return the checkpoint with a reader of slices, whose scratch is charged like headers, which never wait.

    Parameters
    ----------
    is_covering : bool
        Whether unwanted bytes are read too (`covers_gaps`), for which the reader needs scratch memory.

    Raises
    ------
    BudgetError
    """
    store = checkpoint.reader.store
    if store.has_own_scratch or not is_covering:
        return checkpoint._replace(reader=SliceReader(store, threads, Scratch(threads, chunk_size, 1)))
    scratch = charge_scratch(account, threads, chunk_size=chunk_size, path=store.url)
    return checkpoint._replace(reader=SliceReader(store, threads, scratch), scratch_bytes=scratch.nbytes)


def covers_gaps(checkpoint: Checkpoint, max_gap: int) -> bool:
    """Return whether gaps between slices are read too. Slow for many tensors."""
    slices = (file.slice for file in checkpoint.with_tied().shards)
    return any(each.bytes_read(max_gap) > each.bytes_needed for each in slices if each is not None)
