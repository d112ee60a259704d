"""Objects of several blocks, stores that count what is read of them, and reads of them whole."""

import asyncio
import logging
import random

import pytest

from asyncshard.stores.disk_cache.directory import DiskCache
from asyncshard.stores.disk_cache.store import CachedStore
from asyncshard.stores.wrapper import WrapperStore
from asyncshard.testing import MemoryStore

MIB = 1 << 20


class CountingStore(WrapperStore):
    """Notes the ranges that are read."""

    def __init__(self, store):
        super().__init__(store)
        self.ranges = []

    @property
    def nbytes(self):
        return sum(stop - start for start, stop in self.ranges)

    async def read_into(self, meta, start, buffers):
        buffers = list(buffers)
        self.ranges.append((start, start + sum(buffer.nbytes for buffer in buffers)))
        await super().read_into(meta, start, buffers)


@pytest.fixture
def data():
    """An object of six blocks, the last one short."""
    return random.Random(0).randbytes(5 * MIB + 12_345)


@pytest.fixture
def make_cache(tmp_path):
    """Make another process's view of one directory."""

    def make(max_bytes=1 << 30, **options):
        return DiskCache(tmp_path / "cache", max_bytes=max_bytes, **options)

    return make


@pytest.fixture
def origin(data):
    """Return a store, new each time, of the same objects, which counts its reads."""

    def make(name="a", content=data):
        return CountingStore(MemoryStore({name: content}))

    return make


@pytest.fixture
def read_all():
    """Read an object in steps, all at once, and return its bytes."""

    async def read(store, name="a", step=700_000):
        meta, _ = await store.open(name, 0)
        memory = bytearray(meta.size)
        view = memoryview(memory)
        await asyncio.gather(
            *(store.read_into(meta, start, [view[start : start + step]]) for start in range(0, meta.size, step))
        )
        return bytes(memory)

    return read


@pytest.fixture
def load(make_cache, origin, read_all):
    """Load an object through a cache, new each time; return its bytes and the store that was asked."""

    async def load(cache=None, store=None, **options):
        store = store or origin()
        async with CachedStore(store, cache or make_cache()) as cached:
            return await read_all(cached, **options), store

    return load


@pytest.fixture
def entries(tmp_path):
    """List the cache's entries."""
    return lambda: sorted((tmp_path / "cache" / "entries").glob("*"))


@pytest.fixture
def warnings_of(caplog):
    """List what was logged by now."""
    caplog.set_level(logging.WARNING, "asyncshard")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "asyncshard"]
