"""The locations of checkpoints' files and tensors, which `get_tensor` needs for a directory."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import NamedTuple

from asyncshard._core import WeightMap
from asyncshard.loaders.sources import ShardFile, Sources
from asyncshard.pipeline.checkpoint.checkpoint import Checkpoint, Selection, choose_files
from asyncshard.pipeline.checkpoint.opened_file import FileReader, OpenedFile
from asyncshard.pipeline.checkpoint.opening import Opening
from asyncshard.pipeline.checkpoint.tied_tensor import embedding_beside, possible_tie
from asyncshard.pipeline.memory.budget import Account
from asyncshard.pipeline.shard_cache.cache import ShardCache
from asyncshard.stores.opening import StoreAccess

_INDEX_FACTOR = 2
"""A weight map takes about 2 bytes of memory for each byte of its index."""


class Location(NamedTuple):
    """The files of one checkpoint."""

    paths: dict[str, str]
    """The full path of each file by its name, in plan order."""
    weight_map: WeightMap | None
    """The map of tensors to files, if the checkpoint has an index."""
    account: Account
    """The account of the budget for the memory of the weight map."""
    tied: dict[str, str]
    """For names that no file holds: the path of the file with the tensor to which the name may be tied."""

    def file_of(self, name: str) -> str | None:
        """Return the path of the file that holds a tensor by the index; None if the index does not have the name."""
        index = -1 if self.weight_map is None else self.weight_map.find(name)
        return None if self.weight_map is None or index < 0 else self.paths.get(self.weight_map.files[index])


class Locations:
    """The files of several checkpoints, each remembered until `forget` or `clear`."""

    def __init__(self, access: StoreAccess, selection: Selection, cache: ShardCache) -> None:
        self._access = access
        self._selection = selection
        self._cache = cache
        self._locations: dict[str, Location] = {}

    def find(self, key: str) -> Location | None:
        """Return the location of a checkpoint; None if it is not known."""
        return self._locations.get(key)

    async def locate(self, key: str, path: ShardFile) -> Location:
        """List a checkpoint's files, read its index where it has one, and remember both.

        Raises
        ------
        ObjectNotFoundError, CheckpointError, FormatError, NamesError, BudgetError, StoreError
        """
        account = self._cache.open_account()
        try:
            async with Opening.of(path, self._access, self._cache.budget) as opening:
                found = await choose_files(opening.store, self._selection, opening.threads)
                paths = {name: opening.store.path_of(name) for name in found.files}
            account.charge_headers(_INDEX_FACTOR * found.index_bytes, key)
        except BaseException:
            self._cache.discard(account)
            raise
        self.forget(key)
        self._locations[key] = location = Location(paths, found.weight_map, account, {})
        self._cache.budget.reclaim_for_waiters()
        return location

    def forget(self, key: str) -> bool:
        """Forget a checkpoint's files; return whether they were known."""
        location = self._locations.pop(key, None)
        if location is not None:
            self._cache.discard(location.account)
        return location is not None

    def clear(self) -> None:
        """Forget the files of all checkpoints."""
        for key in list(self._locations):
            self.forget(key)


async def file_with(
    location: Location, name: str, shard_at: Callable[[str], Awaitable[OpenedFile]], sources: Sources
) -> str | None:
    """Return the path of the file that holds a tensor, or the tensor to which its name may be tied; None for no file.

    Parameters
    ----------
    location : Location
        The files of the checkpoint.
    name : str
        Name of the tensor.
    shard_at : callable
        Function that opens the file at a path.
    sources : Sources
        The open folders.
    """
    file = location.file_of(name) or location.tied.get(name)
    if file is None and location.weight_map is None:
        for path in location.paths.values():
            if name in (await shard_at(path)).header:
                return path
    if file is None:
        file = await _file_of_tied(location, name, shard_at, sources)
        if file is not None:
            location.tied[name] = file
    return file


async def _file_of_tied(
    location: Location, name: str, shard_at: Callable[[str], Awaitable[OpenedFile]], sources: Sources
) -> str | None:
    paths = location.paths.values()
    async with sources.opened(next(iter(paths))) as opened:
        if location.weight_map is not None:
            embedding = await opened.threads.run(embedding_beside, location.weight_map, name)
            file = None if embedding is None else location.file_of(embedding)
            if file is not None:
                return file
        shards = [await shard_at(path) for path in paths]
        checkpoint = Checkpoint(tuple(shards), FileReader(opened.store))
        tie = await opened.threads.run(possible_tie, checkpoint, name)
    if tie is None:
        return None
    return next(path for path, shard in zip(paths, shards, strict=True) if tie.stored_name in shard.header)
