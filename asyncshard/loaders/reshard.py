"""Write a checkpoint anew for another number of ranks."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote, urlsplit

from asyncshard.format.pattern import ShardPattern
from asyncshard.loaders.options import Options, require_int
from asyncshard.pipeline.checkpoint.opening import Opening
from asyncshard.pipeline.memory.budget import MemoryBudget
from asyncshard.pipeline.memory.free_memory import default_budget_mb
from asyncshard.pipeline.writing.reshard.reshard import WRITERS, Reshard, ReshardReport, ReshardRequest
from asyncshard.pipeline.writing.reshard.target import Target
from asyncshard.plan.tp.plan import TpPlan, plan_of
from asyncshard.stores.opening import ModelPath
from asyncshard.tasks.threads import wait_to_end

DEFAULT_MAX_SHARD_SIZE = 5 * 10**9
"""A written file has at most 5,000,000,000 bytes of tensors, unless the caller chooses another limit."""


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
    """Write a checkpoint anew for another number of ranks, off the event loop and within a memory budget.

    The source is a Hugging Face checkpoint or the rank shards of n ranks. The target is a Hugging Face checkpoint or
    the rank shards of m ranks. Each byte is read once, and written once for each rank that holds it. Tensors keep the
    names that they have in the source. vLLM's ``sharded_state`` needs its own fused names, so it reads the target only
    if the source has these names.

    Every error that can be found before anything is written is raised, all together in one error: missing ranks and
    parts, names and dtypes on which ranks disagree, shapes that do not add up, and replicas that differ between ranks.
    Replicas are read for this, unless their files have digests.

    The files get their names when all of them are complete and on the disk; the index gets its name last. Until then,
    and if the process is killed, the file ``asyncshard.incomplete`` stands in the target, and loaders refuse the
    directory. A run that fails or is cancelled removes everything that it has written. A cancelled run waits for the
    writes in flight. Once the files begin to get their names, a cancel does not interrupt the run.

    Files beside the source's weights that end in ``.json``, ``.txt``, ``.model`` or ``.jinja`` are copied. The metadata
    of the source's files is kept, including ties; digests are not kept.

    Parameters
    ----------
    source : str, path or Store
        A local path or URL, or a store of your own, which stays open.
    target : str or path
        A local directory other than the source. It is made if it does not exist.
    world_size : int
        Number of ranks of the target.
    tp_plan : mapping, TpPlan or "auto", optional
        How the target is divided. A source of rank shards is taken to be divided by the same plan, unless its files say
        how they are divided (in the metadata ``asyncshard.placement``, which `reshard` writes). None divides the target
        like the source; a Hugging Face checkpoint needs a plan to become several ranks. "auto" takes the plan for the
        model in the source's ``config.json``.
    layout : {"auto", "hf", "ranks"}
        What is written: rank shards, or a Hugging Face checkpoint, with an index if it has several files. "auto" is
        "hf" for one rank, and "ranks" for more.
    max_shard_size : int
        The largest number of bytes of tensors in a file. A larger tensor has a file of its own.
    memory_budget_mb : float, optional
        MiB for headers, and for data that was read and not written yet; by default 2048, or a quarter of the free
        memory if that is less.
    budget : MemoryBudget, optional
        A budget that is shared with loaders, instead of `memory_budget_mb`.
    overwrite : bool
        Replace the weights in the target. If it is False, the target must be empty, or left by a run that was killed.
    pattern : str or ShardPattern, optional
        Names of rank shards in the target, and in the source if it has rank shards.
    max_workers, storage_options
        As for `ShardedStateLoader`.
    chunk_size : int, optional
        The largest number of bytes that are moved at once.

    Raises
    ------
    CheckpointError
        The source is not complete, cannot be divided by the plan, or is the target.
    TargetExistsError
        The target is not empty, and `overwrite` is False.
    BudgetError
        The headers leave no room in the budget for data.
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
    values = {
        "memory_budget_mb": memory_budget_mb,
        "budget": budget,
        "max_workers": max_workers,
        "chunk_size": chunk_size,
        "storage_options": storage_options,
    }
    options = Options().override(values)
    names = ShardPattern(pattern) if isinstance(pattern, str) else pattern
    is_ranks = layout == "ranks" or (layout == "auto" and world_size > 1)
    request = ReshardRequest(world_size, max_shard_size, is_ranks, names, plan_of(tp_plan), chunk_size)
    directory = _local_directory(target)
    budget = budget or MemoryBudget(memory_budget_mb or default_budget_mb())
    output = Target(directory, names, overwrite=overwrite)
    async with Opening.of(source, options.access(), budget, threads=WRITERS) as opening:
        try:
            await opening.threads.run(output.require_other_than, opening.store.url)
            await opening.threads.run(output.check)
            return await Reshard(opening, output, request).run()
        finally:
            await wait_to_end(asyncio.ensure_future(opening.threads.run(output.clean_up)))


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
