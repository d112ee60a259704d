"""The checkpoint that is resharded: its files, its tensors, and how they are divided among its ranks.

A Hugging Face checkpoint counts as one rank, which has every tensor whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from asyncshard._typing import Int64Array
from asyncshard.errors import CheckpointError, FormatError
from asyncshard.format.digests import DIGESTS_KEY
from asyncshard.format.pattern import ShardPattern
from asyncshard.format.save_id import SAVE_KEY
from asyncshard.pipeline.checkpoint.checkpoint import Checkpoint, Selection, open_checkpoint
from asyncshard.pipeline.checkpoint.opened_file import OpenedFile
from asyncshard.pipeline.memory.budget import Account
from asyncshard.pipeline.writing.reshard.divider import Divider, PlaceTensor
from asyncshard.pipeline.writing.reshard.written_placements import refuse_single_rank_file, written_placements
from asyncshard.plan.division.blocks import TensorMap
from asyncshard.plan.division.divisions import Shape
from asyncshard.plan.division.placement_text import PLACEMENT_KEY, WORLD_SIZE_KEY
from asyncshard.plan.division.placements import Placement
from asyncshard.plan.files.survey import Survey
from asyncshard.plan.text import Problems
from asyncshard.stores.base import Store
from asyncshard.tasks.bounded import run_bounded
from asyncshard.tasks.threads import DaemonThreads
from asyncshard.tasks.yielding import yielding_gil

_RANKS_AT_ONCE = 4
_OUR_KEYS = (DIGESTS_KEY, PLACEMENT_KEY, WORLD_SIZE_KEY, SAVE_KEY)


class Tensors(NamedTuple):
    """All tensors, in the order of the first rank's files."""

    shards: tuple[OpenedFile, ...]
    """The first rank's."""
    files: Int64Array
    """The index of each tensor's shard."""
    rows: Int64Array
    """Its row there."""

    def name(self, tensor: int) -> str:
        name: str = self.shards[self.files[tensor]].header.table.name(int(self.rows[tensor]))
        return name


class Source(NamedTuple):
    """An opened checkpoint that makes up a whole."""

    shards: tuple[OpenedFile, ...]
    """The files of all ranks; `side` counts them."""
    tensors: Tensors
    side: TensorMap
    placements: tuple[Placement, ...]
    """The placement of each division of `side`."""
    shapes: tuple[Shape, ...]
    """The shape of the whole tensor, for each division."""
    codes: tuple[int, ...]
    """The dtype, for each division."""
    metadata: dict[str, str]
    """The metadata that all files have in common, without this library's own keys."""
    is_ranks: bool
    """Whether the checkpoint consists of rank shards, even those of one rank."""
    rank_rows: Int64Array
    """For each rank, the row of each tensor in its shard."""

    @property
    def sizes(self) -> Int64Array:
        """Bytes of each whole tensor."""
        sizes = [
            sum(piece.nbytes for rank, piece in enumerate(division.slices) if rank in division.first_ranks)
            for division in self.side.divisions
        ]
        return np.array(sizes, np.int64)[self.side.division_of]


async def open_source(
    store: Store, survey: Survey, pattern: ShardPattern | None, threads: DaemonThreads, account: Account
) -> list[Checkpoint]:
    """Open the files of all ranks, or those of a Hugging Face checkpoint, as of one rank.

    Raises
    ------
    CheckpointError
        Ranks or parts are missing: all of them are named.
    """
    if survey.kind != "ranks":
        return [await open_checkpoint(store, Selection(), threads, account)]
    faults = Problems(store.url)
    for text in survey.problems:
        faults.add(text)
    if len({group.pp_rank for group in survey.groups}) > 1:
        faults.add("it has pipeline stages: reshard each of them by itself, with a pattern that names its pp_rank")
    faults.require_none()
    world_size = len(survey.groups)
    found: dict[int, Checkpoint] = {}

    async def open_rank(rank: int) -> None:
        selection = Selection(pattern=pattern, rank=rank, world_size=world_size, pp_rank=survey.groups[0].pp_rank)
        try:
            found[rank] = await open_checkpoint(store, selection, threads, account)
        except (CheckpointError, FormatError) as error:
            faults.add(str(error))

    await run_bounded(_RANKS_AT_ONCE, (open_rank(rank) for rank in range(world_size)), on_failure="finish")
    faults.require_none()
    return [found[rank] for rank in range(world_size)]


def join_source(checkpoints: Sequence[Checkpoint], place: PlaceTensor | None, *, path: str, is_ranks: bool) -> Source:
    """Match the ranks' tensors and check that they add up. Slow: not for the event loop.

    Parameters
    ----------
    place : function, optional
        How the source is divided; None where its files say so.

    Raises
    ------
    CheckpointError
        All that is wrong, in one error.
    """
    faults = Problems(path)
    shards = tuple(shard for checkpoint in checkpoints for shard in checkpoint.shards)
    tensors = _list_tensors(checkpoints[0])
    written: dict[str, Placement] | None = None
    if is_ranks:
        written = written_placements(checkpoints, faults)
    else:
        refuse_single_rank_file(shards, faults)
    files, rows = _match(checkpoints, tensors, faults)
    faults.require_none()
    if is_ranks and written is None and place is None:
        raise CheckpointError(
            f"{path}: its files do not say how the tensors are divided (the metadata {PLACEMENT_KEY!r}, which reshard "
            "writes): pass the tp_plan that they were written with",
            path=path,
        )
    divider = Divider(shards, files, rows, written, place, faults)
    count = len(tensors.rows)
    division_of = np.fromiter((divider.find(each, tensors.name(each)) for each in yielding_gil(range(count))), np.int32)
    faults.require_none()
    tables = [shard.header.table for shard in shards]
    starts = np.empty(files.shape, np.int64)
    for number, table in enumerate(tables):
        chosen = files == number
        starts[chosen] = table.starts[rows[chosen]]
    side = TensorMap(divider.divisions, division_of, files, starts)
    return Source(
        shards,
        tensors,
        side,
        tuple(divider.placements),
        tuple(divider.shapes),
        tuple(divider.codes),
        _merged_metadata(shards),
        is_ranks,
        rows,
    )


def _list_tensors(checkpoint: Checkpoint) -> Tensors:
    counts = [len(shard.header) for shard in checkpoint.shards]
    files = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
    rows = np.concatenate([np.arange(count, dtype=np.int64) for count in counts])
    return Tensors(checkpoint.shards, files, rows)


def _match(checkpoints: Sequence[Checkpoint], tensors: Tensors, faults: Problems) -> tuple[Int64Array, Int64Array]:
    """Find every tensor with every rank; return the files, counted over all ranks, and the rows in them."""
    count = len(tensors.rows)
    files = np.zeros((len(checkpoints), count), np.int64)
    rows = np.zeros((len(checkpoints), count), np.int64)
    files[0], rows[0] = tensors.files, tensors.rows
    before = len(checkpoints[0].shards)
    for rank, checkpoint in enumerate(checkpoints[1:], 1):
        tables = [shard.header.table for shard in checkpoint.shards]
        number = 0
        missing = 0
        for tensor in yielding_gil(range(count)):
            name = tensors.name(tensor)
            row = tables[number].find(name)  # most are in the file that the one before them was in
            if row < 0:
                places = [place for place, table in enumerate(tables) if table.find(name) >= 0]
                if not places:
                    faults.add(f"rank {rank} lacks tensor {name!r}, which rank 0 has")
                    missing += 1
                    continue
                number = places[0]
                row = tables[number].find(name)
            files[rank, tensor], rows[rank, tensor] = before + number, row
        if sum(map(len, tables)) != count - missing:
            own = [shard.header.table for shard in tensors.shards]
            for name in _names(checkpoint):
                if all(table.find(name) < 0 for table in own):
                    faults.add(f"rank 0 lacks tensor {name!r}, which rank {rank} has")
        before += len(tables)
    return files, rows


def _names(checkpoint: Checkpoint) -> Iterator[str]:
    for shard in checkpoint.shards:
        yield from shard.header


def _merged_metadata(shards: Iterable[OpenedFile]) -> dict[str, str]:
    """Return what the files say; where they contradict each other, what the first does."""
    merged: dict[str, str] = {}
    for shard in shards:
        for key, value in shard.header.metadata.items():
            if key not in _OUR_KEYS:
                merged.setdefault(key, value)
    return merged
