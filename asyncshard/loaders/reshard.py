"""Move a checkpoint to another number of ranks."""

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
    wanted = ReshardRequest(world_size, max_shard_size, is_ranks, names, plan_of(tp_plan), chunk_size)
    directory = _local_directory(target)
    budget = budget or MemoryBudget(memory_budget_mb or default_budget_mb())
    output = Target(directory, names, overwrite=overwrite)
    async with Opening.of(source, options.access(), budget, threads=WRITERS) as opening:
        try:
            await opening.threads.run(output.require_other_than, opening.store.url)
            await opening.threads.run(output.check)
            return await Reshard(opening, output, wanted).run()
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
