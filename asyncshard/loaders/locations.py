"""Where the files of checkpoints are: what `get_tensor` of a directory has to know of it."""

from __future__ import annotations

from typing import NamedTuple

from asyncshard._core import WeightMap
from asyncshard.loaders.sources import ShardFile
from asyncshard.pipeline.checkpoint.checkpoint import Selection, choose_files
from asyncshard.pipeline.checkpoint.opening import Opening
from asyncshard.pipeline.memory.budget import Account
from asyncshard.pipeline.shard_cache.cache import ShardCache
from asyncshard.stores.opening import StoreAccess

_INDEX_FACTOR = 2
"""Bytes of memory that a weight map takes for each byte of its index, about 2."""


class Location(NamedTuple):
    """The files of one checkpoint."""

    paths: dict[str, str]
    """The full path of each file by its name, in plan order."""
    weight_map: WeightMap | None
    """Which file each tensor is in, where an index tells."""
    account: Account
    """The count of the memory that the weight map takes."""

    def file_of(self, name: str) -> str | None:
        """Return the path of the file in which the index places a tensor; None where it places it in none."""
        assert self.weight_map is not None
        index = self.weight_map.find(name)
        return None if index < 0 else self.paths.get(self.weight_map.files[index])


class Locations:
    """The files of the checkpoints that were asked about, remembered until they are forgotten."""

    def __init__(self, access: StoreAccess, selection: Selection, cache: ShardCache) -> None:
        self._access = access
        self._selection = selection
        self._cache = cache
        self._locations: dict[str, Location] = {}

    def find(self, key: str) -> Location | None:
        """Return what is known of a checkpoint."""
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
        self._locations[key] = location = Location(paths, found.weight_map, account)
        self._cache.budget.reclaim_for_waiters()
        return location

    def forget(self, key: str) -> bool:
        """Forget a checkpoint's files; return whether they were known."""
        location = self._locations.pop(key, None)
        if location is not None:
            self._cache.discard(location.account)
        return location is not None

    def clear(self) -> None:
        """Forget all."""
        for key in list(self._locations):
            self.forget(key)
