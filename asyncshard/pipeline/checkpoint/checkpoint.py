"""Open a checkpoint: find its shards, read and validate every header, check that they make up a whole.

No tensor data is read here. All that can be known to be wrong without it is raised here, in the order of the shards.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from asyncshard._core import WeightMap, duplicate_names
from asyncshard.errors import CheckpointError, NamesError, ObjectNotFoundError
from asyncshard.format.header import HeaderLimits, TensorInfo
from asyncshard.format.index import MAX_INDEX_BYTES, parse_index
from asyncshard.format.pattern import ShardPattern
from asyncshard.pipeline.checkpoint.opened_file import FileReader, OpenedFile, read_header_of
from asyncshard.pipeline.checkpoint.rank_files import error_of_replaced, require_one_save
from asyncshard.pipeline.memory.budget import Account
from asyncshard.plan.check.judgement import index_disagreement
from asyncshard.plan.files.layout import choose_layout, index_files, is_rank_shard, is_whole_model
from asyncshard.plan.tensor_filter import TensorFilter
from asyncshard.plan.text import LISTED, enumerate_names
from asyncshard.plan.ties import EMBEDDING, OUTPUT, may_need
from asyncshard.plan.tp.plan import TpPlan
from asyncshard.stores.base import Store
from asyncshard.tasks.bounded import run_bounded
from asyncshard.tasks.threads import DaemonThreads
from asyncshard.tasks.yielding import yielding_gil

_HEADERS_AT_ONCE = 8


class Selection(NamedTuple):
    """Which files of a checkpoint are wanted, and how large their headers may be."""

    pattern: ShardPattern | None = None
    """Names of rank shards; None for the default ones."""
    rank: int = 0
    world_size: int = 1
    pp_rank: int = 0
    limits: HeaderLimits = HeaderLimits()
    """Of each file's header."""
    tp_plan: TpPlan | Literal["auto"] | None = None
    """How tensors are divided among the ranks; None where the files are the rank's already."""
    tensor_filter: TensorFilter | None = None
    """Which tensors are wanted; None for all."""

    @property
    def is_sliced(self) -> bool:
        """Whether less than the files' tensors may be wanted of them."""
        return self.tp_plan is not None or self.tensor_filter is not None


class TiedShard(NamedTuple):
    """A tied tensor that the plan divides by a rule of its own."""

    name: str
    stored_name: str
    """The name under which the files hold it."""
    stored_nbytes: int
    """Bytes of that tensor, whole."""
    shard: OpenedFile
    """Of this tensor alone."""


class Checkpoint(NamedTuple):
    """The shards of one rank, in delivery order."""

    shards: tuple[OpenedFile, ...]
    reader: FileReader
    """By which the shards are read, those of tied tensors too."""
    tied: tuple[TiedShard, ...] = ()
    """What stands in no shard; whoever has a destination for it, or takes everything, reads it too."""
    ties: tuple[tuple[str, str], ...] = ()
    """Ties beside those that the files' metadata tells: each the missing name, and the stored one."""
    scratch_bytes: int = 0
    """Of the memory through which slices are read."""
    tensor_filter: TensorFilter | None = None
    """Which names are wanted, of tied tensors too; None for all."""
    is_whole: bool = False
    """Whether its tensors are all that the model has on this rank: neither one file of several nor one stage's."""

    ends: tuple[str, ...] | None = None
    """The names that are an embedding's or an output layer's (`names_at_ends`); None where nobody has looked."""

    def with_tied(self) -> Checkpoint:
        """Return the same with the tied tensors as shards after the others."""
        return self._replace(shards=self.shards + tuple(tied.shard for tied in self.tied), tied=())

    @property
    def tensors_total(self) -> int:
        return sum(len(shard.header) for shard in self.shards)

    @property
    def bytes_total(self) -> int:
        """Bytes of tensor data."""
        return sum(shard.data_bytes for shard in self.shards)

    def is_wanted(self, name: str) -> bool:
        """Return whether a tensor of this name is wanted, if there is one."""
        return self.tensor_filter is None or self.tensor_filter(name)


class CheckpointInfo(Mapping[str, TensorInfo]):
    """The facts of every tensor of a checkpoint, by name, in delivery order."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._shards = checkpoint.shards
        self._count = checkpoint.tensors_total

    def __getitem__(self, name: str) -> TensorInfo:
        for shard in self._shards:
            if name in shard.header:
                return shard.header[name]
        raise KeyError(name)

    def __contains__(self, name: object) -> bool:
        return any(name in shard.header for shard in self._shards)

    def __iter__(self) -> Iterator[str]:
        for shard in self._shards:
            yield from shard.header

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        return f"<{self._count} tensors in {len(self._shards)} shards>"


class ShardNames(NamedTuple):
    """What a path holds, as far as names tell."""

    files: tuple[str, ...]
    """The files to load, in delivery order."""
    weight_map: WeightMap | None
    """Which of them each tensor is in, where an index tells; its own `files` are in another order."""
    index_bytes: int
    """Bytes of the index file."""
    is_whole: bool = False
    """Whether they make up a model: neither one file of several nor those of one pipeline stage."""
    are_of_rank: bool = False
    """Whether the files are rank shards."""


async def choose_files(store: Store, selection: Selection, threads: DaemonThreads) -> ShardNames:
    """List a path and choose the files to load: of those in an index, the ones that hold a wanted tensor.

    Raises
    ------
    NamesError
        No tensor of the index is wanted, or one that is wanted by its name is not there.
    ObjectNotFoundError, CheckpointError, FormatError
    """
    listing = await store.list()
    # In a thread: a prefix may hold 100,000 objects.
    layout = await threads.run(
        lambda: choose_layout(
            listing.names,
            is_file=listing.is_file,
            pattern=selection.pattern,
            rank=selection.rank,
            world_size=selection.world_size,
            pp_rank=selection.pp_rank,
            path=store.url,
        )
    )
    if any(is_rank_shard(name, selection.pattern) for name in layout.files):
        refuse_second_cut(selection, store.url)
    if layout.kind != "index":
        is_whole = is_whole_model(layout, is_file=listing.is_file, pattern=selection.pattern)
        return ShardNames(layout.files, None, 0, is_whole=is_whole, are_of_rank=layout.kind == "ranks")
    (index_name,) = layout.files
    path = store.path_of(index_name)
    data = await store.read(index_name, max_bytes=MAX_INDEX_BYTES)

    def choose() -> ShardNames:
        weight_map = parse_index(data, path=path)
        files = weight_map.files
        if selection.tensor_filter is not None:
            files = wanted_files(weight_map, selection.tensor_filter, path)
        return ShardNames(tuple(index_files(files, listing.names, path)), weight_map, len(data), is_whole=True)

    return await threads.run(choose)


async def open_checkpoint(store: Store, selection: Selection, threads: DaemonThreads, account: Account) -> Checkpoint:
    """List, read and validate; the headers' bytes are charged to `account`.

    Raises
    ------
    ObjectChangedError
        A rank's files come from two saves, or one of them went away meanwhile.
    ObjectNotFoundError, CheckpointError, FormatError, BudgetError, StoreError
    """
    return await open_files(store, await choose_files(store, selection, threads), selection, threads, account)


async def open_files(
    store: Store, found: ShardNames, selection: Selection, threads: DaemonThreads, account: Account
) -> Checkpoint:
    """Open files that have been chosen; their tensors are whole. Errors are those of `open_checkpoint`."""
    files = await _open_shards(store, found, selection, threads, account)

    def complete() -> Checkpoint:
        if found.are_of_rank:
            require_one_save(files, store.url)
        _check_names(files, found, store.url)
        return Checkpoint(tuple(files), FileReader(store), is_whole=found.is_whole, ends=names_at_ends(files))

    return await threads.run(complete)


def names_at_ends(files: Iterable[OpenedFile]) -> tuple[str, ...]:
    """Return the names of files' tensors that are an embedding's or an output layer's. Slow for many tensors."""
    tables = (file.header.table for file in files)
    names = (table.name(index) for table in tables for index in yielding_gil(range(len(table))))
    return tuple(name for name in names if name.endswith((EMBEDDING, OUTPUT)))


def _check_names(shards: Sequence[OpenedFile], found: ShardNames, path: str) -> None:
    """Raise CheckpointError where a tensor stands in two shards, or where the index is wrong. Slow for many tensors."""
    twice = duplicate_names([shard.header.table for shard in shards], limit=LISTED)
    if twice:
        files = found.files
        listed = "; ".join(f"{name!r} in {files[one]} and {files[other]}" for name, one, other in twice)
        raise CheckpointError(f"{path}: the same tensor stands in two shards: {listed}", path=path)
    if found.weight_map is not None:
        numbers = {name: number for number, name in enumerate(found.weight_map.files)}
        for shard in shards:
            names = found.weight_map.compare(numbers[shard.meta.name], shard.header.table, limit=LISTED)
            disagreement = index_disagreement(shard.path, *names)
            if disagreement is not None:
                raise disagreement


def refuse_second_cut(selection: Selection, path: str) -> None:
    """Raise CheckpointError for rank shards that are to be cut for ranks once more."""
    if selection.tp_plan is not None and selection.world_size > 1:
        raise CheckpointError(
            f"{path}: the tensors of rank shards are cut already; leave tp_plan out to load them as they are", path=path
        )


def wanted_files(weight_map: WeightMap, is_wanted: TensorFilter, path: str) -> tuple[str, ...]:
    """Return the files of an index that hold a wanted tensor. Slow for many tensors: not for the event loop."""
    opened: set[int] = set()
    count = 0
    for index in yielding_gil(range(len(weight_map))):
        name, file = weight_map.entry(index)
        if is_wanted(name):
            opened.add(file)
            count += 1
        elif may_need(name, is_wanted, lambda output: weight_map.find(output) >= 0):
            opened.add(file)
    require_wanted(count, [name for name in is_wanted.names if weight_map.find(name) < 0], path)
    return tuple(name for file, name in enumerate(weight_map.files) if file in opened)


def require_wanted(count: int, missing: Sequence[str], path: str) -> None:
    """Raise NamesError where a filter finds no tensor, or lacks some that it names."""
    if missing:
        names = tuple(sorted(missing))
        raise NamesError(
            f"{path}: the tensor_filter names tensors that are not there: {enumerate_names(names, is_quoted=True)}",
            path=path,
            missing=names,
        )
    if not count:
        raise NamesError(f"{path}: the tensor_filter matches no tensor of the checkpoint", path=path)


async def _open_shards(
    store: Store, found: ShardNames, selection: Selection, threads: DaemonThreads, account: Account
) -> list[OpenedFile]:
    """Open files, a few at a time; of several failures raise that of the first file."""

    async def open_one(name: str) -> OpenedFile:
        try:
            return await read_header_of(store, name, threads, selection.limits, account)
        except ObjectNotFoundError as error:
            other = await error_of_replaced(store, name) if found.are_of_rank else None
            if other is None:
                raise
            raise other from error

    return await run_bounded(min(_HEADERS_AT_ONCE, len(found.files)), map(open_one, found.files), on_failure="finish")
