"""Transfer through buffers of the budget, except for shards in the shard cache, which are delivered from there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from asyncshard._core import Lease
from asyncshard.arrays.base import ArrayLibrary
from asyncshard.pipeline.shard_cache.cache import ShardCache
from asyncshard.pipeline.shard_cache.tensors import ShardTensors, frozen
from asyncshard.pipeline.transfer.buffered import BufferedTransfer, ToBuffers
from asyncshard.pipeline.transfer.transfer import Reading
from asyncshard.plan.items import ReadItem


class ThroughCache(ToBuffers):
    """Delivers tensors in buffers of the budget, and the tensors of cached shards from the cache."""

    def __init__(self, cache: ShardCache) -> None:
        self._cache = cache

    def _transfer(self, reading: Reading, library: ArrayLibrary) -> BufferedTransfer:
        return CachedTransfer(reading, library, self._cache)


class CachedTransfer(BufferedTransfer):
    """Delivers tensors of cached shards from memory, and reads the others without caching them.

    The cache is asked when the read of an item is to begin. A shard counts as cached only if it is the same version of
    the file. The cached tensors are kept alive until the item is delivered.
    """

    def __init__(self, reading: Reading, library: ArrayLibrary, cache: ShardCache) -> None:
        super().__init__(reading, library)
        self._cache = cache
        self._cached_tensors: dict[ReadItem, ShardTensors] = {}
        """The cached tensors of items that are to be delivered from memory."""

    def prepare(self, item: ReadItem) -> int:
        shard = self.checkpoint.shards[item.shard]
        file = self._cache.peek(shard.path)
        if file is None or file.tensors is None or not file.shard.is_same(shard):
            self._cached_tensors.pop(item, None)
            return super().prepare(item)
        self._cached_tensors[item] = file.tensors
        return 0

    def deliver(self, item: ReadItem, lease: Lease | None) -> Iterator[tuple[str, Any, int]]:
        cached = self._cached_tensors.pop(item, None)
        if cached is None:
            for name, tensor, nbytes in super().deliver(item, lease):
                yield name, frozen(tensor), nbytes
            return
        self._cache.hits += item.first == 0
        row = self.checkpoint.shards[item.shard].header.table.row
        for index in range(item.first, item.last):
            name, _, _, start, stop = row(index)
            yield name, cached[name], stop - start
