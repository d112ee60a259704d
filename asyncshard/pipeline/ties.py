"""Tied tensors: a checkpoint holds them under one of their names.

The files' metadata tells the others, ``{"lm_head.weight": "model.embed_tokens.weight"}``, as safetensors' own writers
put it there; or ``config.json`` says ``tie_word_embeddings``. A destination of its own under such a name is filled with
a second read of the same bytes, as if they stood in a further file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from asyncshard._core import HeaderTable, WeightMap
from asyncshard.errors import CheckpointError, DestinationError, FormatError, ObjectNotFoundError
from asyncshard.pipeline.arrays import ArrayLibrary
from asyncshard.pipeline.checkpoint import Checkpoint, CheckpointInfo, Selection, TiedShard, ties_of
from asyncshard.pipeline.config import read_config
from asyncshard.pipeline.matching import is_sink, span
from asyncshard.pipeline.pace import without_hold
from asyncshard.pipeline.shards import Shard
from asyncshard.plan.file_facts import EMBEDDING, OUTPUT
from asyncshard.plan.part_planner import place_tied, rename
from asyncshard.plan.tp_models import ties_embeddings
from asyncshard.plan.tp_plan import TpPlan
from asyncshard.stores.base import Store
from asyncshard.stores.ranges import Scratch
from asyncshard.stores.sliced import SlicedStore, part_meta
from asyncshard.stores.threads import DaemonThreads


async def add_ties(
    store: Store,
    checkpoint: Checkpoint,
    destinations: Mapping[str, Any],
    library: ArrayLibrary,
    threads: DaemonThreads,
) -> tuple[Store, Checkpoint]:
    """Add the tied tensors that have a destination of their own; return the store to read them from, too.

    A destination that shares the memory of the tensor that is there needs nothing. ``config.json`` is only read where
    the output layer is missing; one that cannot be read ties nothing.

    Raises
    ------
    StoreError
    """
    ties = await threads.run(ties_of, checkpoint)
    lost = await threads.run(_lost_output, checkpoint, destinations)
    if lost is not None and lost[0] not in ties and await _ties_embeddings(store, threads):
        ties.update([lost])
    ties.update({tied.name: tied.kept for tied in checkpoint.tied})
    own = {
        name: kept
        for name, kept in ties.items()
        if name in destinations and not _is_same(library, destinations[name], destinations.get(kept))
    }
    if not own:
        return store, checkpoint
    shards = tuple(tied.shard for tied in checkpoint.tied if own.pop(tied.name, None) is not None)
    shards += await threads.run(lambda: tuple(_tied_shards(checkpoint, own)))
    if not isinstance(store, SlicedStore):
        store = SlicedStore(store, threads, Scratch(threads, store.chunk_size, 1))
    return store, checkpoint._replace(shards=checkpoint.shards + shards, tied=())


async def ties_with_rules(
    store: Store,
    checkpoint: Checkpoint,
    tables: Sequence[HeaderTable | WeightMap],
    plan: TpPlan,
    threads: DaemonThreads,
) -> dict[str, str]:
    """Return the tied names that rules of a plan match, each with that of the tensor that is there.

    `tables` have the names of the whole checkpoint. ``config.json`` is only read where there is a rule for the output
    layer, and no such tensor.

    Raises
    ------
    StoreError
    """
    ties = await threads.run(ties_of, checkpoint)
    if OUTPUT not in ties and plan.has_rule(OUTPUT) and all(table.find(OUTPUT) < 0 for table in tables):
        names = (table.name(index) for table in tables for index in without_hold(range(len(table))))
        embeddings = await threads.run(lambda: [name for name in names if name.endswith(EMBEDDING)])
        if len(embeddings) == 1 and await _ties_embeddings(store, threads):
            ties[OUTPUT] = embeddings[0]
    return {name: kept for name, kept in ties.items() if plan.has_rule(name)}


def place_ties(
    checkpoint: Checkpoint, ties: Mapping[str, str], selection: Selection, plan: TpPlan
) -> Iterator[TiedShard]:
    """Yield the wanted tied tensors that the plan divides otherwise than the tensors to which they are tied.

    The checkpoint's shards are whole.

    Raises
    ------
    CheckpointError
        One cannot be divided so.
    """
    for shard in checkpoint.shards:
        for name, kept in ties.items():
            if kept in shard.header and (selection.tensor_filter is None or selection.tensor_filter(name)):
                rank, world_size, path = selection.rank, selection.world_size, shard.path
                part = place_tied(shard.header, kept, name, plan, rank=rank, world_size=world_size, path=path)
                if part is not None:
                    yield TiedShard(name, kept, Shard(part_meta(shard.meta, part), path, part.header, part))


def _lost_output(checkpoint: Checkpoint, destinations: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the one output layer that has a destination and no tensor, and the one embedding that has a tensor."""
    info = CheckpointInfo(checkpoint)
    outputs = [name for name in without_hold(destinations) if name.endswith(OUTPUT) and name not in info]
    if len(outputs) != 1 or not checkpoint.is_wanted(outputs[0]):
        return None
    names = (name for shard in checkpoint.shards for name in without_hold(shard.header))
    embeddings = [name for name in names if name.endswith(EMBEDDING)]
    return (outputs[0], embeddings[0]) if len(embeddings) == 1 else None


async def _ties_embeddings(store: Store, threads: DaemonThreads) -> bool:
    """Return whether config.json says that the output layer is the embedding."""
    try:
        return ties_embeddings(await read_config(store, threads))
    except (ObjectNotFoundError, FormatError, CheckpointError):
        return False


def _is_same(library: ArrayLibrary, given: Any, other: Any) -> bool:
    """Return whether a destination lies in the memory of another one."""
    if other is None or is_sink(given) or is_sink(other):
        return False
    try:
        low, high = span(library.memory_of("", given).array)
        other_low, other_high = span(library.memory_of("", other).array)
    except DestinationError:  # whoever matches them says what is wrong
        return False
    return other_low <= low and high <= other_high


def _tied_shards(checkpoint: Checkpoint, ties: Mapping[str, str]) -> Iterator[Shard]:
    """Yield what is read once more: for each tied name the tensor to which it is tied, under this name.

    Each alone: two names may be tied to one tensor, and what is read of a file at once must not overlap.
    """
    for shard in checkpoint.shards:
        whole = shard.meta.version.whole if shard.part is not None else shard.meta
        for name, kept in ties.items():
            if kept in shard.header:
                part = rename(shard.header, shard.part, kept, name)
                yield Shard(part_meta(whole, part), shard.path, part.header, part)
