"""Tensors through buffers of the budget, but for shards that are in memory already."""

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
    """Deliver tensors in buffers of the budget, and those of cached shards from the cache's memory."""

    def __init__(self, cache: ShardCache) -> None:
        self._cache = cache

    def _transfer(self, reading: Reading, library: ArrayLibrary) -> BufferedTransfer:
        return CachedTransfer(reading, library, self._cache)


class CachedTransfer(BufferedTransfer):
    """Deliver tensors of a cached shard from memory, where it is the same object still; read the others past the cache.

    What is cached is looked up when an item's turn comes, and kept alive until the item is delivered.
    """

    def __init__(self, reading: Reading, library: ArrayLibrary, cache: ShardCache) -> None:
        super().__init__(reading, library)
        self._cache = cache
        self._found: dict[ReadItem, ShardTensors] = {}

    def prepare(self, item: ReadItem) -> int:
        shard = self.checkpoint.shards[item.shard]
        file = self._cache.peek(shard.path)
        if file is None or file.tensors is None or not file.shard.is_same(shard):
            self._found.pop(item, None)
            return super().prepare(item)
        self._found[item] = file.tensors
        return 0

    def deliver(self, item: ReadItem, lease: Lease | None) -> Iterator[tuple[str, Any, int]]:
        cached = self._found.pop(item, None)
        if cached is None:
            for name, tensor, nbytes in super().deliver(item, lease):
                yield name, frozen(tensor), nbytes
            return
        self._cache.hits += item.first == 0
        row = self.checkpoint.shards[item.shard].header.table.row
        for index in range(item.first, item.last):
            name, _, _, start, stop = row(index)
            yield name, cached[name], stop - start
