"""The checkpoint that is resharded: its files, its tensors, and how they are divided among its ranks.

A Hugging Face checkpoint counts as one rank, which has every tensor whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from asyncshard.errors import CheckpointError, FormatError
from asyncshard.format.digests import DIGESTS_KEY
from asyncshard.format.dtypes import DTYPES
from asyncshard.format.pattern import ShardPattern
from asyncshard.pipeline.budget import Account
from asyncshard.pipeline.checkpoint import Checkpoint, Selection, Shard, open_checkpoint
from asyncshard.pipeline.pace import without_hold
from asyncshard.pipeline.reshard_jobs import run_all
from asyncshard.plan.blocks import Side
from asyncshard.plan.divisions import Division, Shape, divide, fitted, whole_shape
from asyncshard.plan.placement_text import PLACEMENT_KEY, WORLD_SIZE_KEY, parse_placements, parse_world_size
from asyncshard.plan.placements import PackedShard, Placement, Replicate
from asyncshard.plan.placements import Shard as ShardPlacement
from asyncshard.plan.sharding import validate_shard_shapes
from asyncshard.plan.survey import Survey
from asyncshard.stores.base import Store
from asyncshard.stores.threads import DaemonThreads

Numbers = NDArray[np.int64]
PlaceTensor = Callable[[str, Shape], Placement]
"""The placement of a tensor, by its name and the shape of the whole."""

_RANKS_AT_ONCE = 4
_LISTED = 20
_OUR_KEYS = (DIGESTS_KEY, PLACEMENT_KEY, WORLD_SIZE_KEY)


class Tensors(NamedTuple):
    """All tensors, in the order of the first rank's files."""

    shards: tuple[Shard, ...]
    """The first rank's."""
    files: Numbers
    """The index of each tensor's shard."""
    rows: Numbers
    """Its row there."""

    def name(self, tensor: int) -> str:
        name: str = self.shards[self.files[tensor]].header.table.name(int(self.rows[tensor]))
        return name


class Source(NamedTuple):
    """An opened checkpoint that makes up a whole."""

    shards: tuple[Shard, ...]
    """Of all ranks; `side` counts them."""
    tensors: Tensors
    side: Side
    placements: tuple[Placement, ...]
    """Of each division of `side`."""
    shapes: tuple[Shape, ...]
    """Of the whole tensor, for each division."""
    codes: tuple[int, ...]
    """The dtype, for each division."""
    metadata: dict[str, str]
    """What all files say, but for the keys that are ours."""
    is_ranks: bool
    """Whether it is of rank shards, be it of one rank."""
    rank_rows: Numbers
    """For each rank, the row of each tensor in its shard."""

    @property
    def sizes(self) -> Numbers:
        """Bytes of each whole tensor."""
        sizes = [
            sum(piece.nbytes for rank, piece in enumerate(division.slices) if rank in division.first_ranks)
            for division in self.side.divisions
        ]
        return np.array(sizes, np.int64)[self.side.which]


class Faults:
    """What is wrong with a checkpoint, said in one error."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._texts: list[str] = []
        self._count = 0

    def add(self, text: str) -> None:
        self._count += 1
        if len(self._texts) < _LISTED:
            self._texts.append(text)

    def require_none(self) -> None:
        """Raise CheckpointError if there are any."""
        if self._count:
            more = f"\n  and {self._count - len(self._texts)} more" if self._count > len(self._texts) else ""
            listed = "".join(f"\n  {text}" for text in self._texts)
            raise CheckpointError(
                f"{self._path}: the checkpoint cannot be resharded, and nothing was written:{listed}{more}",
                path=self._path,
            )


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
    faults = Faults(store.url)
    for text in survey.faults:
        faults.add(text)
    if survey.has_pp_ranks and len({group.pp_rank for group in survey.groups}) > 1:
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

    await run_all(_RANKS_AT_ONCE, (open_rank(rank) for rank in range(world_size)))
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
    faults = Faults(path)
    shards = tuple(shard for checkpoint in checkpoints for shard in checkpoint.shards)
    tensors = _list_tensors(checkpoints[0])
    written: dict[str, Placement] | None = None
    if is_ranks:
        written = _written_placements(checkpoints, faults)
    else:
        _require_whole(shards, faults)
    files, rows = _match(checkpoints, tensors, faults)
    faults.require_none()
    if is_ranks and written is None and place is None:
        raise CheckpointError(
            f"{path}: its files do not say how the tensors are divided (the metadata {PLACEMENT_KEY!r}, which reshard "
            "writes): pass the tp_plan that they were written with",
            path=path,
        )
    divider = _Divider(shards, files, rows, written, place, faults)
    count = len(tensors.rows)
    which = np.fromiter((divider.find(each, tensors.name(each)) for each in without_hold(range(count))), np.int32)
    faults.require_none()
    tables = [shard.header.table for shard in shards]
    starts = np.empty(files.shape, np.int64)
    for number, table in enumerate(tables):
        chosen = files == number
        starts[chosen] = table.starts[rows[chosen]]
    side = Side(divider.divisions, which, files, starts)
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


def has_placements(checkpoint: Checkpoint) -> bool:
    """Return whether a rank's files say how they are divided."""
    return any(PLACEMENT_KEY in shard.header.metadata for shard in checkpoint.shards)


def _list_tensors(checkpoint: Checkpoint) -> Tensors:
    counts = [len(shard.header) for shard in checkpoint.shards]
    files = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
    rows = np.concatenate([np.arange(count, dtype=np.int64) for count in counts])
    return Tensors(checkpoint.shards, files, rows)


def _match(checkpoints: Sequence[Checkpoint], tensors: Tensors, faults: Faults) -> tuple[Numbers, Numbers]:
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
        for tensor in without_hold(range(count)):
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


def _written_placements(checkpoints: Sequence[Checkpoint], faults: Faults) -> dict[str, Placement] | None:
    """Return what the files say, or None where they say nothing."""
    shards = [shard for checkpoint in checkpoints for shard in checkpoint.shards]
    silent = [shard.path for shard in shards if PLACEMENT_KEY not in shard.header.metadata]
    if len(silent) == len(shards):
        return None
    for path in silent:
        faults.add(f"{path} has no metadata {PLACEMENT_KEY!r}, and other files of the checkpoint have it")
    first: dict[str, Placement] = {}
    worlds: set[int] = set()
    for rank, checkpoint in enumerate(checkpoints):
        own: dict[str, Placement] = {}
        for shard in checkpoint.shards:
            metadata = shard.header.metadata
            try:
                own.update(parse_placements(metadata.get(PLACEMENT_KEY, "{}"), path=shard.path))
                world_size = parse_world_size(metadata, path=shard.path)
            except FormatError as error:
                faults.add(str(error))
                continue
            if world_size is not None:
                worlds.add(world_size)
        if rank == 0:
            first = own
        for name in sorted(own.keys() | first.keys()) if own != first else ():
            if own.get(name) != first.get(name):
                faults.add(
                    f"tensor {name!r} is placed by {first.get(name, Replicate())} on rank 0 and by "
                    f"{own.get(name, Replicate())} on rank {rank}"
                )
    if len(worlds) > 1:
        faults.add(f"its files are of worlds of {' and of '.join(map(str, sorted(worlds)))} ranks")
    elif worlds and worlds != {len(checkpoints)}:
        faults.add(f"it is of a world of {worlds.pop()} ranks, and holds the files of {len(checkpoints)}")
    return first


def _require_whole(shards: Sequence[Shard], faults: Faults) -> None:
    """Add a fault for a file that is a rank's, though it is not named like one."""
    for shard in shards:
        world_size = parse_world_size(shard.header.metadata, path=shard.path)
        if world_size not in (None, 1):
            faults.add(
                f"{shard.path} holds a rank's part of a world of {world_size}: pass the directory with all of them, "
                "and the pattern of their names"
            )


class _Divider:
    """Find the divisions of a source's tensors; those that are alike share one."""

    def __init__(
        self,
        shards: Sequence[Shard],
        files: Numbers,
        rows: Numbers,
        written: dict[str, Placement] | None,
        place: PlaceTensor | None,
        faults: Faults,
    ) -> None:
        self._tables = [shard.header.table for shard in shards]
        self._files = files
        self._rows = rows
        self._written = written
        self._place = place
        self._faults = faults
        self._known: dict[tuple[tuple[Shape, ...], int, Placement], int] = {}
        self.divisions: list[Division] = []
        self.placements: list[Placement] = []
        self.shapes: list[Shape] = []
        self.codes: list[int] = []

    def find(self, tensor: int, name: str) -> int:
        """Return the index of a tensor's division."""
        found = [
            self._tables[file].row(row)
            for file, row in zip(self._files[:, tensor].tolist(), self._rows[:, tensor].tolist(), strict=True)
        ]
        codes = [row[1] for row in found]
        locals_ = tuple(row[2] for row in found)
        if len(set(codes)) > 1:
            listed = ", ".join(f"{DTYPES[code].name} on rank {rank}" for rank, code in enumerate(codes[:_LISTED]))
            self._faults.add(f"the ranks disagree on the dtype of tensor {name!r}: {listed}")
            return -1
        try:
            placement = self._placement(name, locals_)
            key = (locals_, codes[0], placement)
            if key not in self._known:
                self._known[key] = self._add(name, locals_, codes[0], placement)
            return self._known[key]
        except (CheckpointError, ValueError) as error:
            self._faults.add(str(error))
            return -1

    def _placement(self, name: str, locals_: tuple[Shape, ...]) -> Placement:
        if self._written is not None or self._place is None:
            return (self._written or {}).get(name, Replicate())
        placement = self._place(name, locals_[0])
        if isinstance(placement, PackedShard):
            # Of a word: its sizes are those of the shape, which is known only now that it is to be joined here.
            joined = whole_shape(name, locals_, ShardPlacement(placement.dim))
            placement = self._place(name, joined)
        return placement

    def _add(self, name: str, locals_: tuple[Shape, ...], code: int, placement: Placement) -> int:
        world_size = len(locals_)
        try:
            fit = fitted(placement, world_size)
        except ValueError as error:
            raise CheckpointError(f"tensor {name!r} cannot be joined by {placement}: {error}", tensor=name) from None
        shape = whole_shape(name, locals_, fit)
        division = divide(name, shape, DTYPES[code].bits, fit, world_size)
        wrong = [rank for rank, piece in enumerate(division.slices) if piece.shape != locals_[rank]]
        if wrong:
            for rank in wrong:
                self._faults.add(f"rank {rank}: {_complaint(name, shape, locals_, fit, rank, division)}")
            return -1
        self.divisions.append(division)
        self.placements.append(placement)
        self.shapes.append(shape)
        self.codes.append(code)
        return len(self.divisions) - 1


def _complaint(
    name: str, shape: Shape, locals_: tuple[Shape, ...], placement: Placement, rank: int, division: Division
) -> str:
    """Say what is wrong with a rank's shape."""
    if isinstance(placement, Replicate) or (isinstance(placement, ShardPlacement) and placement.pieces is None):
        dim, pieces = (0, 1) if isinstance(placement, Replicate) else (placement.dim, len(locals_))
        spec = {"name": name, "shape": shape, "shard_dim": dim, "num_shards": pieces, "local_shape": locals_[rank]}
        sentences = validate_shard_shapes([spec], rank, len(locals_))
        if sentences:
            return " ".join(sentences).replace("Spec 0 (", "tensor ", 1).replace("): ", ": ", 1)
    return f"tensor {name!r} has shape {locals_[rank]}, must be {division.slices[rank].shape} by {placement}"


def _merged_metadata(shards: Iterable[Shard]) -> dict[str, str]:
    """Return what the files say; where they contradict each other, what the first does."""
    merged: dict[str, str] = {}
    for shard in shards:
        for key, value in shard.header.metadata.items():
            if key not in _OUR_KEYS:
                merged.setdefault(key, value)
    return merged
