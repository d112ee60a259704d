"""Reads through the cache: what is fetched, what is compared, and by whom."""

import asyncio

from asyncshard.stores.disk_cache import entry as entry_module
from asyncshard.stores.disk_cache.store import CachedStore
from asyncshard.testing import GatedStore

MIB = 1 << 20


async def test_a_process_compares_each_block_once(load, make_cache, entries, data, monkeypatch):
    compared = []
    digest_of = entry_module.digest_of
    await load()
    import asyncshard.stores.disk_cache.read as read_module

    monkeypatch.setattr(
        read_module, "digest_of", lambda block, views: compared.append(block) or digest_of(block, views)
    )
    cache = make_cache()
    for _ in range(2):
        assert (await load(cache, step=len(data)))[0] == data
        assert sorted(compared) == list(range(6))
    (path,) = entries()
    path.unlink()
    for _ in range(2):
        await load(cache, step=len(data))
    assert len(compared) > 6, "another entry was not compared with what was known of the first"


async def test_a_fetch_that_hangs_does_not_hold_what_is_there(make_cache, origin, read_all, data):
    async with CachedStore(origin(), make_cache()) as store:
        meta, _ = await store.open("a", 0)
        await store.read_into(meta, 0, [memoryview(bytearray(MIB))])
    gated = GatedStore(origin())
    async with CachedStore(gated, make_cache()) as store:
        meta, _ = await store.open("a", 0)
        memory = memoryview(bytearray(len(data)))
        fetch = asyncio.ensure_future(store.read_into(meta, MIB, [memory[MIB:]]))
        await gated.waiting(1)
        await store.read_into(meta, 0, [memory[:MIB]])
        assert memory[:MIB] == data[:MIB]
        gated.open_all()
        await fetch
        assert memory == data
