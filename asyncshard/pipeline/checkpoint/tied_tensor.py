"""A single tensor that is asked for by a name that its file does not hold: the one that it is tied to."""

from __future__ import annotations

from typing import NamedTuple

from asyncshard._core import HeaderTable, WeightMap
from asyncshard.pipeline.checkpoint.checkpoint import Checkpoint, Selection
from asyncshard.pipeline.checkpoint.opened_file import FileReader, OpenedFile
from asyncshard.pipeline.checkpoint.ties import (
    config_ties_embeddings,
    missing_output_of,
    names_in,
    place_tie,
    ties_of,
)
from asyncshard.plan.ties import OUTPUT, only_embedding
from asyncshard.plan.tp.plan import TpPlan
from asyncshard.stores.base import Store
from asyncshard.tasks.threads import DaemonThreads


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
    if tie is None or not (tie.is_told or (is_whole_model and await config_ties_embeddings(store, threads))):
        return None
    plan = selection.tp_plan
    if isinstance(plan, TpPlan) and plan.has_rule(name):
        alone, _ = await threads.run(place_tie, whole, name, tie.stored_name, selection, plan)
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
    missing_output = missing_output_of(checkpoint, {name: None})
    return None if missing_output is None else PossibleTie(missing_output[1], is_told=False)


def embedding_beside(table: HeaderTable | WeightMap, output: str) -> str | None:
    """Return the one embedding of a table, if the name is that of an output layer. Slow for many tensors."""
    return only_embedding(names_in([table])) if output.endswith(OUTPUT) else None


def ties_of_file(checkpoint: Checkpoint, selection: Selection) -> dict[str, str]:
    """Return the ties that a file's metadata tells, but for names that the plan divides by themselves. For a thread."""
    ties = ties_of(checkpoint._replace(tensor_filter=selection.tensor_filter))
    plan = selection.tp_plan
    if isinstance(plan, TpPlan):
        return {name: stored_name for name, stored_name in ties.items() if not plan.has_rule(name)}
    return ties
