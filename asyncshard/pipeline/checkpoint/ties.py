"""What is read for ties: the rule itself is :mod:`asyncshard.plan.ties`.

A destination of its own under a missing name is filled with a second read of the stored tensor's bytes, as if they
stood in a further file. Where a plan has a rule for the missing name, these are the rank's bytes by that rule, with a
destination or without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

from asyncshard._core import HeaderTable, WeightMap
from asyncshard.arrays.base import ArrayLibrary
from asyncshard.arrays.memory import Within, is_sink, within
from asyncshard.errors import AccessDeniedError, CheckpointError, DestinationError, FormatError, ObjectNotFoundError
from asyncshard.pipeline.checkpoint.checkpoint import Checkpoint, CheckpointInfo, Selection, TiedShard
from asyncshard.pipeline.checkpoint.config import CONFIG_NAME, read_config
from asyncshard.pipeline.checkpoint.opened_file import FileReader, OpenedFile
from asyncshard.pipeline.checkpoint.slice_reader import SliceReader
from asyncshard.plan.file_slices.planner import alias_slice, alias_slice_by_plan
from asyncshard.plan.ties import EMBEDDING, OUTPUT, config_tie, only_embedding, output_names, ties_embeddings, told_ties
from asyncshard.plan.tp.plan import TpPlan
from asyncshard.stores.base import Store
from asyncshard.stores.ranges import Scratch
from asyncshard.tasks.threads import DaemonThreads
from asyncshard.tasks.yielding import yielding_gil

Tables = Sequence[HeaderTable | WeightMap]
_OUTPUT_MODULE = OUTPUT.rpartition(".")[0]


def ties_of(checkpoint: Checkpoint, is_asked: Callable[[str], bool] | None = None) -> dict[str, str]:
    """Return the ties of a checkpoint: wanted names that are missing, each with the stored one. Slow for many.

    `is_asked` says whether somebody asks for a name; None where everything is taken that is there.
    """
    info = CheckpointInfo(checkpoint)
    told = (told_ties(shard.header.metadata, info.__contains__, is_asked) for shard in checkpoint.shards)
    found = ((name, stored_name) for name, stored_name in checkpoint.ties if stored_name in info and name not in info)
    return {name: stored_name for name, stored_name in chain(*told, found) if checkpoint.is_wanted(name)}


async def find_ties(checkpoint: Checkpoint, threads: DaemonThreads) -> Checkpoint:
    """Return a checkpoint that is taken as a whole, and in it the tie that its ``config.json`` tells.

    That is only read where there is an embedding and no output layer, in files that hold a whole model; one that cannot
    be read tells nothing.

    Raises
    ------
    StoreError
    """
    if not checkpoint.is_whole:
        return checkpoint
    names = await threads.run(_names_at_ends, checkpoint)
    if config_tie({"tie_word_embeddings": True}, names) is None:
        return checkpoint
    store = checkpoint.reader.store
    try:
        tie = config_tie(await read_config(store, threads), names, path=store.path_of(CONFIG_NAME))
    except (ObjectNotFoundError, AccessDeniedError, FormatError, CheckpointError):
        return checkpoint
    return checkpoint if tie is None else checkpoint._replace(ties=(*checkpoint.ties, tie))


async def add_ties(
    checkpoint: Checkpoint,
    destinations: Mapping[str, Any],
    library: ArrayLibrary,
    threads: DaemonThreads,
) -> Checkpoint:
    """Add the missing tensors that have a destination of their own.

    A destination that shares the memory of the stored tensor's needs nothing. ``config.json`` is only read where the
    output layer is missing; one that cannot be read ties nothing.

    Raises
    ------
    StoreError
    """
    reader = checkpoint.reader
    ties = await threads.run(ties_of, checkpoint, destinations.__contains__)
    missing_output = await threads.run(_missing_output, checkpoint, destinations)
    if missing_output is not None and missing_output[0] not in ties and await _ties_embeddings(reader.store, threads):
        ties.update([missing_output])
        checkpoint = checkpoint._replace(ties=(*checkpoint.ties, missing_output))
    ties.update({tied.name: tied.stored_name for tied in checkpoint.tied})
    tied = {each.name: each for each in checkpoint.tied}
    info = CheckpointInfo(checkpoint)

    def is_there(name: str, stored_name: str) -> bool:
        inner = _within(library, destinations[name], destinations.get(stored_name))
        return inner is not None and (name not in tied or _is_right(inner, tied[name], info))

    asked = {name: stored_name for name, stored_name in ties.items() if name in destinations}
    to_read = {name: stored_name for name, stored_name in asked.items() if not is_there(name, stored_name)}
    if not to_read:
        return checkpoint
    shards = tuple(tied[name].shard for name in tied if to_read.pop(name, None) is not None)
    shards += await threads.run(lambda: tuple(_tied_shards(checkpoint, to_read)))
    if not isinstance(reader, SliceReader):
        reader = SliceReader(reader.store, threads, Scratch(threads, reader.store.pacing.chunk_size, 1))
    return checkpoint._replace(shards=checkpoint.shards + shards, reader=reader, tied=())


async def ties_with_rules(
    store: Store, checkpoint: Checkpoint, tables: Tables, plan: TpPlan, threads: DaemonThreads
) -> dict[str, str]:
    """Return the ties whose missing name a rule of a plan matches, each with the stored name.

    `tables` have the names of the whole checkpoint. ``config.json`` is only read where there is a rule for an output
    layer, and no such tensor. Where a filter left the file of the embedding unopened, and with it the metadata, the
    rule is taken at its word.

    Raises
    ------
    StoreError
    """
    ties = await threads.run(ties_of, checkpoint, plan.has_rule)
    missing_output = await threads.run(_output_with_rule, tables, plan)
    if missing_output is not None and missing_output[0] not in ties:
        is_opened = any(missing_output[1] in shard.header for shard in checkpoint.shards)
        if not is_opened or await _ties_embeddings(store, threads):
            ties.update([missing_output])
    return {name: stored_name for name, stored_name in ties.items() if plan.has_rule(name)}


def place_ties(
    checkpoint: Checkpoint, ties: Mapping[str, str], selection: Selection, plan: TpPlan
) -> Iterator[TiedShard]:
    """Yield the wanted missing tensors that do not come with the stored ones.

    Those are divided otherwise, or not wanted. The checkpoint's shards are whole.

    Raises
    ------
    CheckpointError
        One cannot be divided so.
    """
    is_wanted = selection.tensor_filter or (lambda _: True)
    for shard in checkpoint.shards:
        for name, stored_name in ties.items():
            if stored_name in shard.header and is_wanted(name):
                alone, is_alike = _place_tie(shard, name, stored_name, selection, plan)
                if not is_alike or not is_wanted(stored_name):
                    yield TiedShard(name, stored_name, shard.header[stored_name].nbytes, alone)


class TiedTensor(NamedTuple):
    """A tensor of one file that somebody asks for by a name that the file does not hold."""

    stored_name: str
    alone: OpenedFile | None
    """What is read of the file for it; None where that is what is read of the stored tensor."""


async def find_tied(
    store: Store, whole: OpenedFile, name: str, selection: Selection, threads: DaemonThreads, *, is_whole_model: bool
) -> TiedTensor | None:
    """Return the tensor of a file that a missing name is tied to, by its metadata or by ``config.json``.

    `whole` has all tensors of the file; the plan and the filter of the selection say how it is read. ``config.json`` is
    asked if the file `is_whole_model`, or the caller knows that no other file holds the name.

    Raises
    ------
    CheckpointError
        It cannot be divided as the rule of the plan says.
    StoreError
    """
    checkpoint = Checkpoint((whole,), FileReader(store), tensor_filter=selection.tensor_filter)
    tie = await threads.run(possible_tie, checkpoint, name)
    if tie is None or not (tie.is_told or (is_whole_model and await _ties_embeddings(store, threads))):
        return None
    plan = selection.tp_plan
    if isinstance(plan, TpPlan) and plan.has_rule(name):
        alone, _ = await threads.run(_place_tie, whole, name, tie.stored_name, selection, plan)
        return TiedTensor(tie.stored_name, alone)
    return TiedTensor(tie.stored_name, None) if checkpoint.is_wanted(tie.stored_name) else None


class PossibleTie(NamedTuple):
    """What a missing name may be tied to."""

    stored_name: str
    is_told: bool
    """Whether the metadata says so; otherwise ``config.json`` may."""


def possible_tie(checkpoint: Checkpoint, name: str) -> PossibleTie | None:
    """Return what a missing name may be tied to, if somebody asks for it. Slow for many tensors."""
    stored_name = ties_of(checkpoint, name.__eq__).get(name)
    if stored_name is not None:
        return PossibleTie(stored_name, is_told=True)
    missing_output = _missing_output(checkpoint, {name: None})
    return None if missing_output is None else PossibleTie(missing_output[1], is_told=False)


def embedding_beside(table: HeaderTable | WeightMap, output: str) -> str | None:
    """Return the one embedding of a table, if the name is that of an output layer. Slow for many tensors."""
    return only_embedding(_names_in([table])) if output.endswith(OUTPUT) else None


def ties_of_file(checkpoint: Checkpoint, selection: Selection) -> dict[str, str]:
    """Return the ties that a file's metadata tells, but for names that the plan divides by themselves. For a thread."""
    ties = ties_of(checkpoint._replace(tensor_filter=selection.tensor_filter))
    plan = selection.tp_plan
    if isinstance(plan, TpPlan):
        return {name: stored_name for name, stored_name in ties.items() if not plan.has_rule(name)}
    return ties


def _place_tie(
    shard: OpenedFile, name: str, stored_name: str, selection: Selection, plan: TpPlan
) -> tuple[OpenedFile, bool]:
    """Return a stored tensor, alone and under a missing name, divided by the rule for that.

    Also whether every rank has the same of it under the stored name.
    """
    rank, world_size = selection.rank, selection.world_size
    part, is_alike = alias_slice_by_plan(
        shard.header, stored_name, name, plan, rank=rank, world_size=world_size, path=shard.path
    )
    return shard._replace(header=part.header, slice=part), is_alike


def _output_with_rule(tables: Tables, plan: TpPlan) -> tuple[str, str] | None:
    """Return the output layer that is in no table and has a rule, and the one embedding beside which it would be."""
    if not any(_OUTPUT_MODULE in key for key in plan.rules):
        return None
    embedding = only_embedding(_names_in(tables))
    if embedding is None:
        return None
    for name in output_names(embedding):
        if plan.has_rule(name) and all(table.find(name) < 0 for table in tables):
            return name, embedding
    return None


def _missing_output(checkpoint: Checkpoint, destinations: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the one output layer that has a destination and no tensor, and the one embedding that is stored."""
    info = CheckpointInfo(checkpoint)
    outputs = [name for name in yielding_gil(destinations) if name.endswith(OUTPUT) and name not in info]
    if len(outputs) != 1 or not checkpoint.is_wanted(outputs[0]):
        return None
    embedding = only_embedding(_names_in([shard.header.table for shard in checkpoint.shards]))
    return None if embedding is None else (outputs[0], embedding)


def _names_at_ends(checkpoint: Checkpoint) -> list[str]:
    """Return the names of a checkpoint that are an embedding's or an output layer's. Slow for many tensors."""
    names = _names_in([shard.header.table for shard in checkpoint.shards])
    return [name for name in names if name.endswith((EMBEDDING, OUTPUT))]


def _names_in(tables: Tables) -> Iterator[str]:
    return (table.name(index) for table in tables for index in yielding_gil(range(len(table))))


async def _ties_embeddings(store: Store, threads: DaemonThreads) -> bool:
    """Return whether config.json says that the output layer is the embedding."""
    try:
        return ties_embeddings(await read_config(store, threads))
    except (ObjectNotFoundError, FormatError, CheckpointError):
        return False


def _within(library: ArrayLibrary, target: Any, other: Any) -> Within | None:
    """Return where a destination lies in the memory of another one, if it does."""
    if other is None or is_sink(target) or is_sink(other):
        return None
    try:
        return within(library.memory_of("", target).array, library.memory_of("", other).array)
    except DestinationError:  # whoever matches them says what is wrong
        return None


def _is_right(inner: Within, tied: TiedShard, info: CheckpointInfo) -> bool:
    """Return whether memory of the tensor that is there has what a rank needs: all of it, or just the rank's bytes."""
    if tied.stored_name not in info or not info[tied.stored_name].nbytes == tied.stored_nbytes == inner.nbytes:
        return False
    part = tied.shard.slice
    assert part is not None
    offsets, lengths = part.ranges(part.header.size, part.header.file_size)
    ranges = [(0, inner.nbytes), *zip(offsets - part.starts[0], offsets - part.starts[0] + lengths, strict=True)]
    return len(ranges) <= 2 and (inner.start, inner.stop) in ranges


def _tied_shards(checkpoint: Checkpoint, ties: Mapping[str, str]) -> Iterator[OpenedFile]:
    """Yield what is read once more: for each missing name the stored tensor, under the missing name.

    Each stands alone: two names may be tied to one tensor, and what is read of a file at once must not overlap.
    """
    for shard in checkpoint.shards:
        for name, stored_name in ties.items():
            if stored_name in shard.header:
                part = alias_slice(shard.header, shard.slice, stored_name, name)
                yield shard._replace(header=part.header, slice=part)
