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
from asyncshard.pipeline.checkpoint.checkpoint import Checkpoint, CheckpointInfo, Selection, TiedShard, names_at_ends
from asyncshard.pipeline.checkpoint.config import CONFIG_NAME, read_config
from asyncshard.pipeline.checkpoint.opened_file import OpenedFile
from asyncshard.pipeline.checkpoint.slice_reader import SliceReader
from asyncshard.plan.file_slices.planner import alias_slice, alias_slice_by_plan
from asyncshard.plan.ties import OUTPUT, config_tie, only_embedding, output_names, ties_embeddings, told_ties
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
    names = checkpoint.ends if checkpoint.ends is not None else await threads.run(names_at_ends, checkpoint.shards)
    if config_tie({"tie_word_embeddings": True}, names) is None:
        return checkpoint
    store = checkpoint.reader.store
    try:
        tie = config_tie(await read_config(store, threads), names, path=store.path_of(CONFIG_NAME))
    except (ObjectNotFoundError, AccessDeniedError, FormatError, CheckpointError):
        return checkpoint
    return checkpoint if tie is None else checkpoint._replace(ties=(*checkpoint.ties, tie))


class AskedTies(NamedTuple):
    """The ties of a checkpoint whose missing names have a destination."""

    ties: dict[str, str]
    """The stored name of each missing name, by what the files' metadata and the plan say."""
    missing_output: tuple[str, str] | None
    """The output layer that is tied to an embedding if ``config.json`` says so, and that embedding."""


def asked_ties(checkpoint: Checkpoint, destinations: Mapping[str, Any]) -> AskedTies:
    """Return the ties that destinations ask for. Slow for many tensors: not for the event loop."""
    ties = ties_of(checkpoint, destinations.__contains__)
    missing_output = missing_output_of(checkpoint, destinations)
    if missing_output is not None and missing_output[0] in ties:
        missing_output = None
    return AskedTies(ties, missing_output)


def with_asked_ties(
    checkpoint: Checkpoint,
    asked: AskedTies,
    destinations: Mapping[str, Any],
    library: ArrayLibrary,
    threads: DaemonThreads,
) -> Checkpoint:
    """Return the checkpoint with the missing tensors that have a destination of their own. For a thread.

    A destination that shares the memory of the stored tensor's needs nothing. `asked.missing_output` is tied: the
    caller has read ``config.json`` for it.
    """
    ties = asked.ties
    if asked.missing_output is not None:
        ties = {**ties, asked.missing_output[0]: asked.missing_output[1]}
        checkpoint = checkpoint._replace(ties=(*checkpoint.ties, asked.missing_output))
    tied = {each.name: each for each in checkpoint.tied}
    ties = {**ties, **{name: each.stored_name for name, each in tied.items()}}
    info = CheckpointInfo(checkpoint)

    def is_there(name: str, stored_name: str) -> bool:
        inner = _within(library, destinations[name], destinations.get(stored_name))
        return inner is not None and (name not in tied or _is_right(inner, tied[name], info))

    wanted = {name: stored_name for name, stored_name in ties.items() if name in destinations}
    to_read = {name: stored_name for name, stored_name in wanted.items() if not is_there(name, stored_name)}
    if not to_read:
        return checkpoint
    shards = tuple(tied[name].shard for name in tied if to_read.pop(name, None) is not None)
    shards += tuple(_tied_shards(checkpoint, to_read))
    reader = checkpoint.reader
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
    ties, missing_output = await threads.run(
        lambda: (ties_of(checkpoint, plan.has_rule), _output_with_rule(tables, plan))
    )
    if missing_output is not None and missing_output[0] not in ties:
        is_opened = any(missing_output[1] in shard.header for shard in checkpoint.shards)
        if not is_opened or await config_ties_embeddings(store, threads):
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
                alone, is_alike = place_tie(shard, name, stored_name, selection, plan)
                if not is_alike or not is_wanted(stored_name):
                    yield TiedShard(name, stored_name, shard.header[stored_name].nbytes, alone)


def place_tie(
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
    embedding = only_embedding(names_in(tables))
    if embedding is None:
        return None
    for name in output_names(embedding):
        if plan.has_rule(name) and all(table.find(name) < 0 for table in tables):
            return name, embedding
    return None


def missing_output_of(checkpoint: Checkpoint, destinations: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the one output layer that has a destination and no tensor, and the one embedding that is stored."""
    info = CheckpointInfo(checkpoint)
    outputs = [name for name in yielding_gil(destinations) if name.endswith(OUTPUT) and name not in info]
    if len(outputs) != 1 or not checkpoint.is_wanted(outputs[0]):
        return None
    names = names_at_ends(checkpoint.shards) if checkpoint.ends is None else checkpoint.ends
    embedding = only_embedding(names)
    return None if embedding is None else (outputs[0], embedding)


def names_in(tables: Tables) -> Iterator[str]:
    return (table.name(index) for table in tables for index in yielding_gil(range(len(table))))


async def config_ties_embeddings(store: Store, threads: DaemonThreads) -> bool:
    """Return whether ``config.json`` says that the output layer, which somebody asks for, is the embedding.

    A config that is not there, or is no JSON, does not.

    Raises
    ------
    AccessDeniedError, StoreError
    """
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
