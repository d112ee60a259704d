"""Tied tensors: a checkpoint holds them under one of their names.

The files' metadata tells the others, ``{"lm_head.weight": "model.embed_tokens.weight"}``, as safetensors' own writers
put it there; or ``config.json`` says ``tie_word_embeddings``. A destination of its own under such a name is filled with
a second read of the same bytes, as if they stood in a further file. Where a plan has a rule for the name, these are the
rank's bytes by that rule, with a destination or without.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from asyncshard._core import HeaderTable, WeightMap
from asyncshard.arrays.base import ArrayLibrary
from asyncshard.arrays.memory import is_sink, span
from asyncshard.errors import CheckpointError, DestinationError, FormatError, ObjectNotFoundError
from asyncshard.pipeline.checkpoint.checkpoint import Checkpoint, CheckpointInfo, Selection, TiedShard, ties_of
from asyncshard.pipeline.checkpoint.config import read_config
from asyncshard.pipeline.checkpoint.opened_file import OpenedFile
from asyncshard.pipeline.checkpoint.slice_reader import SliceReader
from asyncshard.plan.check.file_facts import EMBEDDING, OUTPUT, output_names
from asyncshard.plan.file_slices.planner import alias_slice, alias_slice_by_plan
from asyncshard.plan.tp.models import ties_embeddings
from asyncshard.plan.tp.plan import TpPlan
from asyncshard.stores.base import Store
from asyncshard.stores.ranges import Scratch
from asyncshard.tasks.pace import yielding_gil
from asyncshard.tasks.threads import DaemonThreads

_OUTPUT_MODULE = OUTPUT.rpartition(".")[0]


async def add_ties(
    checkpoint: Checkpoint,
    destinations: Mapping[str, Any],
    library: ArrayLibrary,
    threads: DaemonThreads,
) -> Checkpoint:
    """Add the tied tensors that have a destination of their own.

    A destination that shares the memory of the tensor that is there needs nothing. ``config.json`` is only read where
    the output layer is missing; one that cannot be read ties nothing.

    Raises
    ------
    StoreError
    """
    reader = checkpoint.reader
    ties = await threads.run(ties_of, checkpoint)
    lost = await threads.run(_lost_output, checkpoint, destinations)
    if lost is not None and lost[0] not in ties and await _ties_embeddings(reader.store, threads):
        ties.update([lost])
    ties.update({tied.name: tied.kept for tied in checkpoint.tied})
    tied = {each.name: each for each in checkpoint.tied}
    info = CheckpointInfo(checkpoint)

    def is_there(name: str, kept: str) -> bool:
        inner = _within(library, destinations[name], destinations.get(kept))
        return inner is not None and (name not in tied or _is_right(inner, tied[name], info))

    own = {name: kept for name, kept in ties.items() if name in destinations and not is_there(name, kept)}
    if not own:
        return checkpoint
    shards = tuple(tied[name].shard for name in tied if own.pop(name, None) is not None)
    shards += await threads.run(lambda: tuple(_tied_shards(checkpoint, own)))
    if not isinstance(reader, SliceReader):
        reader = SliceReader(reader.store, threads, Scratch(threads, reader.store.pacing.chunk_size, 1))
    return checkpoint._replace(shards=checkpoint.shards + shards, reader=reader, tied=())


async def ties_with_rules(
    store: Store,
    checkpoint: Checkpoint,
    tables: Sequence[HeaderTable | WeightMap],
    plan: TpPlan,
    threads: DaemonThreads,
) -> dict[str, str]:
    """Return the tied names that rules of a plan match, each with that of the tensor that is there.

    `tables` have the names of the whole checkpoint. ``config.json`` is only read where there is a rule for an output
    layer, and no such tensor. Where a filter left the file of the embedding unopened, and with it the metadata, the
    rule is taken at its word.

    Raises
    ------
    StoreError
    """
    ties = await threads.run(ties_of, checkpoint)
    lost = await threads.run(_output_with_rule, tables, plan)
    if lost is not None and lost[0] not in ties:
        is_opened = any(lost[1] in shard.header for shard in checkpoint.shards)
        if not is_opened or await _ties_embeddings(store, threads):
            ties.update([lost])
    return {name: kept for name, kept in ties.items() if plan.has_rule(name)}


def place_ties(
    checkpoint: Checkpoint, ties: Mapping[str, str], selection: Selection, plan: TpPlan
) -> Iterator[TiedShard]:
    """Yield the wanted tied tensors that do not come with those to which they are tied.

    Those are divided otherwise, or not wanted. The checkpoint's shards are whole.

    Raises
    ------
    CheckpointError
        One cannot be divided so.
    """
    is_wanted = selection.tensor_filter or (lambda _: True)
    for shard in checkpoint.shards:
        for name, kept in ties.items():
            if kept in shard.header and is_wanted(name):
                part, is_alike = alias_slice_by_plan(
                    shard.header,
                    kept,
                    name,
                    plan,
                    rank=selection.rank,
                    world_size=selection.world_size,
                    path=shard.path,
                )
                if not is_alike or not is_wanted(kept):
                    alone = shard._replace(header=part.header, slice=part)
                    yield TiedShard(name, kept, shard.header[kept].nbytes, alone)


def _output_with_rule(tables: Sequence[HeaderTable | WeightMap], plan: TpPlan) -> tuple[str, str] | None:
    """Return the output layer that is in no table and has a rule, and the one embedding beside which it would be."""
    if not any(_OUTPUT_MODULE in key for key in plan.rules):
        return None
    embedding = _only_embedding(tables)
    if embedding is None:
        return None
    for name in output_names(embedding):
        if plan.has_rule(name) and all(table.find(name) < 0 for table in tables):
            return name, embedding
    return None


def _lost_output(checkpoint: Checkpoint, destinations: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the one output layer that has a destination and no tensor, and the one embedding that has a tensor."""
    info = CheckpointInfo(checkpoint)
    outputs = [name for name in yielding_gil(destinations) if name.endswith(OUTPUT) and name not in info]
    if len(outputs) != 1 or not checkpoint.is_wanted(outputs[0]):
        return None
    embedding = _only_embedding([shard.header.table for shard in checkpoint.shards])
    return None if embedding is None else (outputs[0], embedding)


def _only_embedding(tables: Iterable[HeaderTable | WeightMap]) -> str | None:
    names = (table.name(index) for table in tables for index in yielding_gil(range(len(table))))
    embeddings = [name for name in names if name.endswith(EMBEDDING)]
    return embeddings[0] if len(embeddings) == 1 else None


async def _ties_embeddings(store: Store, threads: DaemonThreads) -> bool:
    """Return whether config.json says that the output layer is the embedding."""
    try:
        return ties_embeddings(await read_config(store, threads))
    except (ObjectNotFoundError, FormatError, CheckpointError):
        return False


class _Within(NamedTuple):
    """Which bytes of another destination's memory one covers."""

    start: int
    stop: int
    nbytes: int
    """Of the other."""


def _within(library: ArrayLibrary, given: Any, other: Any) -> _Within | None:
    """Return where a destination lies in the memory of another one, if it does."""
    if other is None or is_sink(given) or is_sink(other):
        return None
    try:
        low, high = span(library.memory_of("", given).array)
        other_low, other_high = span(library.memory_of("", other).array)
    except DestinationError:  # whoever matches them says what is wrong
        return None
    if other_low <= low and high <= other_high:
        return _Within(low - other_low, high - other_low, other_high - other_low)
    return None


def _is_right(inner: _Within, tied: TiedShard, info: CheckpointInfo) -> bool:
    """Return whether memory of the tensor that is there has what a rank needs: all of it, or just the rank's bytes."""
    if tied.kept not in info or not info[tied.kept].nbytes == tied.kept_nbytes == inner.nbytes:
        return False
    part = tied.shard.slice
    assert part is not None
    offsets, lengths = part.ranges(part.header.size, part.header.file_size)
    ranges = [(0, inner.nbytes), *zip(offsets - part.starts[0], offsets - part.starts[0] + lengths, strict=True)]
    return len(ranges) <= 2 and (inner.start, inner.stop) in ranges


def _tied_shards(checkpoint: Checkpoint, ties: Mapping[str, str]) -> Iterator[OpenedFile]:
    """Yield what is read once more: for each tied name the tensor to which it is tied, under this name.

    Each alone: two names may be tied to one tensor, and what is read of a file at once must not overlap.
    """
    for shard in checkpoint.shards:
        for name, kept in ties.items():
            if kept in shard.header:
                part = alias_slice(shard.header, shard.slice, kept, name)
                yield shard._replace(header=part.header, slice=part)
