"""What a cached store reads where, and what it leaves on the disk."""

import asyncio
import contextlib
import stat

import pytest

from asyncshard.errors import ObjectChangedError, StoreError
from asyncshard.stores.base import Pacing
from asyncshard.stores.disk_cache.directory import key_of
from asyncshard.stores.disk_cache.entry import ABSENT, BLOCK_BYTES, Entry
from asyncshard.stores.disk_cache.store import CachedStore
from asyncshard.testing import Fault, FaultyStore, GatedStore, MemoryStore, StoreTests

MIB = 1 << 20
HEADER = 128


class TestCachedStore(StoreTests):
    @pytest.fixture(autouse=True)
    def _cache(self, make_cache):
        self.make_cache = make_cache

    async def make_store(self, files):
        return CachedStore(MemoryStore(files), self.make_cache())

    async def replace(self, store, name, data):
        store.store.replace(name, data)

    async def remove(self, store, name):
        store.store.remove(name)

    async def test_a_removed_object_is_an_error(self):
        """Once nothing of it has been read: blocks that are there are still those of the object that was opened."""
        await super().test_a_removed_object_is_an_error()


class TestFullCache(TestCachedStore):
    """All that is read comes from the disk."""

    async def make_store(self, files):
        cache = self.make_cache()
        async with CachedStore(MemoryStore(files), cache) as store:
            for name in files:
                if name != "b.bin":  # which the suite replaces, and expects to be asked for
                    meta, _ = await store.open(name, 0)
                    await store.read_into(meta, 0, [memoryview(bytearray(meta.size))])
        return CachedStore(MemoryStore(files), cache)


async def test_a_second_load_reads_nothing_from_the_other_store(load, data):
    first, _ = await load()
    second, store = await load()
    assert first == second == data
    assert store.ranges == []


@pytest.mark.parametrize("step", [1000 * 1000, BLOCK_BYTES, 3 * BLOCK_BYTES + 5, 10 * MIB])
async def test_each_byte_is_fetched_once_however_it_is_read(step, load, data):
    result, store = await load(step=step)
    assert result == data
    assert store.nbytes == len(data)


async def test_many_small_buffers_are_filled(make_cache, origin, data):
    for _ in range(2):
        async with CachedStore(origin(), make_cache()) as store:
            meta, _ = await store.open("a", 0)
            memory = memoryview(bytearray(2 * MIB))
            buffers = [memory[at : at + 999] for at in range(0, len(memory), 999)]
            await store.read_into(meta, MIB // 2, buffers)
            assert memory == data[MIB // 2 : MIB // 2 + len(memory)]


async def test_a_part_that_is_read_caches_its_blocks_and_no_more(make_cache, origin, entries, data):
    store = origin()
    async with CachedStore(store, make_cache()) as cached:
        meta, _ = await cached.open("a", 0)
        memory = memoryview(bytearray(MIB))
        await cached.read_into(meta, 3 * MIB // 2, [memory])
        assert memory == data[3 * MIB // 2 : 5 * MIB // 2]
    assert store.ranges == [(MIB, 3 * MIB)]
    (path,) = entries()
    assert 2 * MIB <= path.stat().st_blocks * 512 < 3 * MIB <= path.stat().st_size
    with Entry.open_any(str(path)) as entry:
        assert [digest != ABSENT for digest in entry.digests(range(6))] == [False, True, True, False, False, False]


async def test_a_block_that_is_there_is_not_fetched_with_its_neighbours(make_cache, origin, read_all, data):
    store = origin()
    async with CachedStore(store, make_cache()) as cached:
        meta, _ = await cached.open("a", 0)
        await cached.read_into(meta, 2 * MIB, [memoryview(bytearray(MIB))])
    del store.ranges[:]
    async with CachedStore(store, make_cache()) as cached:
        assert await read_all(cached, step=len(data)) == data
    assert store.ranges == [(0, 2 * MIB), (3 * MIB, len(data))]


async def test_reads_of_the_same_blocks_at_once_fetch_them_once(make_cache, origin, data):
    gated = GatedStore(origin())
    async with CachedStore(gated, make_cache()) as cached:
        meta, _ = await cached.open("a", 0)
        memories = [memoryview(bytearray(len(data))) for _ in range(4)]
        reads = [asyncio.ensure_future(cached.read_into(meta, 0, [memory])) for memory in memories]
        await gated.waiting(1)
        gated.open_all()
        await asyncio.gather(*reads)
    assert all(memory == data for memory in memories)
    assert gated.store.nbytes == len(data)


async def test_two_loads_of_one_process_at_once_fetch_each_block_once(make_cache, origin, load, data):
    cache = make_cache()
    results = await asyncio.gather(*(load(cache) for _ in range(3)))
    assert all(result == data for result, _ in results)
    assert sum(store.nbytes for _, store in results) == len(data)


async def test_a_changed_object_is_fetched_anew(make_cache, read_all, origin, entries, data):
    cache, store = make_cache(), origin()
    for content in (data, data[::-1], data[: len(data) // 2]):
        store.store.replace("a", content)
        async with CachedStore(store, cache) as cached:
            assert await read_all(cached) == content
    assert len(entries()) == 3


async def test_an_object_replaced_within_a_load_is_an_error_where_it_is_fetched(make_cache, origin, data):
    store = origin()
    async with CachedStore(store, make_cache()) as cached:
        meta, _ = await cached.open("a", 0)
        memory = memoryview(bytearray(MIB))
        await cached.read_into(meta, 0, [memory])
        store.store.replace("a", bytes(len(data)))
        with pytest.raises(ObjectChangedError):
            await cached.read_into(meta, MIB, [memory])


async def test_objects_without_an_identity_are_not_kept(origin, load, entries, data, monkeypatch):
    monkeypatch.setattr(MemoryStore, "identity", lambda self, meta: None)
    result, store = await load()
    assert result == data
    assert store.nbytes == len(data)
    assert entries() == []


async def test_an_error_of_the_other_store_passes_unchanged_and_leaves_no_block(
    make_cache, origin, load, entries, data
):
    error = StoreError("broken")
    faulty = FaultyStore(origin(), reads={0: Fault(error=error, after=2 * MIB)})
    async with CachedStore(faulty, make_cache()) as cached:
        meta, _ = await cached.open("a", 0)
        memory = memoryview(bytearray(len(data)))
        with pytest.raises(StoreError) as caught:
            await cached.read_into(meta, 0, [memory])
        assert caught.value is error
        assert entries() == []
        await cached.read_into(meta, 0, [memory])
        assert memory == data
    assert (await load())[1].ranges == []


async def test_the_other_store_is_closed_only_where_that_is_asked_for(make_cache, origin):
    closed = []

    class Closing(MemoryStore):
        async def aclose(self):
            closed.append(self)

    for closes in (True, False):
        store = Closing({"a": b""})
        await CachedStore(store, make_cache(), closes_store=closes).aclose()
        assert (store in closed) == closes


async def test_a_cached_store_has_the_pacing_of_the_other_store_with_the_chunks_of_a_disk_at_least(make_cache, origin):
    store = origin()
    for chunk_size, expected in ((1 << 25, 1 << 25), (1 << 20, 16 << 20)):
        store.pacing = Pacing(chunk_size, 5, 7)
        async with CachedStore(store, make_cache()) as cached:
            assert cached.pacing == Pacing(expected, 5, 7)


async def test_the_directory_is_private_and_nothing_of_a_name_is_in_a_path(tmp_path, origin, load, data):
    name = "../../up/a\n.safetensors"
    result, _ = await load(store=origin(name), name=name)
    assert result == data
    (top,) = tmp_path.iterdir()
    for path in (top, *top.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    (entry,) = (top / "entries").iterdir()
    assert len(entry.stem) == 64
    assert set(entry.stem) <= set("0123456789abcdef")
    assert all(len(path.name) == 2 or path.name == "eviction" for path in (top / "locks").iterdir())


def test_keys_of_different_objects_differ():
    assert len({key_of(text) for text in ("a", "b", '["a", 1]', '["a", "1"]')}) == 4


async def test_an_object_of_all_zeros_and_an_empty_one_are_cached(origin, load, entries):
    for content in (bytes(2 * MIB), b"", b"x"):
        for _ in range(2):
            result, store = await load(store=origin(content=content))
            assert result == content
        assert store.ranges == []


@pytest.mark.parametrize("turns", [0, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233])
async def test_a_cancel_at_any_point_leaves_the_buffer_alone_and_the_cache_right(
    turns, make_cache, origin, load, entries, data
):
    cache = make_cache()
    async with CachedStore(origin(), cache) as cached:
        meta, _ = await cached.open("a", 0)
        await cached.read_into(meta, 2 * MIB, [memoryview(bytearray(10))])
        memory = bytearray(len(data) - 200)
        read = asyncio.ensure_future(cached.read_into(meta, 100, [memoryview(memory)]))
        for _ in range(turns):
            await asyncio.sleep(0)
        read.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await read
        memory[:] = bytes(len(memory))
        again = bytearray(len(data))
        await cached.read_into(meta, 0, [memoryview(again)])
        assert again == data
        assert memory == bytes(len(memory))
    result, store = await load()
    assert result == data
    assert store.ranges == []


async def test_a_cancelled_fetch_lets_those_who_wait_for_it_fetch(make_cache, origin, data):
    gated = GatedStore(origin())
    async with CachedStore(gated, make_cache()) as cached:
        meta, _ = await cached.open("a", 0)
        memories = [memoryview(bytearray(len(data))) for _ in range(2)]
        reads = [asyncio.ensure_future(cached.read_into(meta, 0, [memory])) for memory in memories]
        await gated.waiting(1)
        reads[0].cancel()
        reads[1].cancel()
        await asyncio.wait(reads)
        gated.open_all()
        await cached.read_into(meta, 0, [memories[0]])
    assert memories[0] == data
    assert gated.store.nbytes == len(data)
