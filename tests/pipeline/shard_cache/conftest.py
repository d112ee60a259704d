"""A folder of one file in memory, and caches with readers of it."""

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass

import numpy as np
import pytest

from asyncshard import MemoryBudget
from asyncshard.arrays.frameworks import load_library
from asyncshard.pipeline.checkpoint.checkpoint import Selection
from asyncshard.pipeline.checkpoint.opened_file import OpenedFile
from asyncshard.pipeline.shard_cache.cache import ShardCache
from asyncshard.pipeline.shard_cache.shard_reader import OpenedFolder, ShardReader
from asyncshard.tasks.threads import DaemonThreads
from asyncshard.testing import FaultyStore, MemoryStore

NAME = "model.safetensors"


@dataclass
class Folder:
    """A file that is open, and a cache into which it is read."""

    opened: OpenedFolder
    memory: MemoryStore
    cache: ShardCache
    reader: ShardReader
    shard: OpenedFile

    @property
    def reads(self):
        return self.opened.store.reads_begun


@pytest.fixture
def tensors():
    return {"a": np.arange(2048, dtype="<i4"), "b": np.arange(2048, dtype="<i4") + 5, "c": np.arange(3, dtype="u1")}


@pytest.fixture
async def make_folder(checkpoints, tensors):
    """Open a file; budgets are in pages of 4 KiB."""
    async with AsyncExitStack() as stack:

        async def make(*, pages=256, max_shards=None, is_strict=False, selection=None, chunk_size=None, metadata=None):
            memory = MemoryStore({NAME: checkpoints.shard(tensors, metadata=metadata)})
            threads = DaemonThreads(1, "asyncshard-test")
            stack.push_async_callback(threads.aclose)
            opened = OpenedFolder(FaultyStore(memory), NAME, threads, load_library("np"))
            cache = ShardCache(MemoryBudget(pages / 256), max_shards, is_strict=is_strict)
            stack.callback(cache.release)
            reader = ShardReader(cache, selection or Selection(), chunk_size=chunk_size, prefetch_count=None)
            return Folder(opened, memory, cache, reader, await reader.read_header(opened))

        yield make
    await asyncio.sleep(0)
