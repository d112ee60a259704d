"""Buffers for blocks on their way to the disk, and what happens when there are none left."""

import asyncio
import os
import threading

import pytest

from asyncshard.stores.disk_cache.buffers import BlockBuffers
from asyncshard.stores.disk_cache.entry import BLOCK_BYTES
from asyncshard.stores.disk_cache.store import CachedStore

MIB = 1 << 20


async def test_more_than_the_buffers_hold_goes_on_without_them(make_cache, origin, monkeypatch, read_all):
    from asyncshard.stores.disk_cache import buffers

    monkeypatch.setattr(buffers, "_GRACE_S", 0.05)
    pwrite, goes_on = os.pwrite, threading.Event()

    def hang(*args):
        goes_on.wait()
        return pwrite(*args)

    monkeypatch.setattr(os, "pwrite", hang)
    content = bytes(range(256)) * (50 * MIB // 256)
    inner = origin(content=content)
    store = CachedStore(inner, make_cache())
    try:
        assert await read_all(store, step=4 * MIB) == content
        assert store.session.buffers.free_count == 0
    finally:
        goes_on.set()
        await store.aclose()
    assert inner.nbytes == len(content)


async def test_buffers_are_lent_once_each_and_used_again():
    buffers = BlockBuffers(3)
    first = await buffers.take(2)
    assert [buffer.nbytes for buffer in first] == [BLOCK_BYTES] * 2
    assert buffers.free_count == 1
    buffers.give(first)
    second = await buffers.take(3)
    assert {id(buffer) for buffer in first} <= {id(buffer) for buffer in second}
    assert buffers.free_count == 0


async def test_borrowers_wait_in_turn_and_a_small_request_does_not_overtake():
    buffers = BlockBuffers(2)
    lent = await buffers.take(2)
    large, small = (asyncio.ensure_future(buffers.take(count)) for count in (2, 1))
    await asyncio.sleep(0)
    buffers.give(lent[:1])
    await asyncio.sleep(0)
    assert not large.done()
    assert not small.done()
    buffers.give(lent[1:])
    lent = await large
    assert not small.done()
    buffers.give(lent)
    assert len(await small) == 1


async def test_a_cancelled_borrower_leaves_the_buffers_to_the_next():
    buffers = BlockBuffers(2)
    lent = await buffers.take(2)
    large, small = (asyncio.ensure_future(buffers.take(count)) for count in (2, 1))
    await asyncio.sleep(0)
    buffers.give(lent[:1])
    large.cancel()
    with pytest.raises(asyncio.CancelledError):
        await large
    assert len(await small) == 1


async def test_a_borrower_that_is_cancelled_as_it_is_served_gives_its_buffers_back():
    buffers = BlockBuffers(1)
    lent = await buffers.take(1)
    waiting = asyncio.ensure_future(buffers.take(1))
    await asyncio.sleep(0)
    buffers.give(lent)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert buffers.free_count == 1


async def test_waits_end_once_they_have_taken_too_long_in_all(monkeypatch):
    monkeypatch.setattr("asyncshard.stores.disk_cache.buffers._GRACE_S", -1.0)
    buffers = BlockBuffers(1)
    assert len(await buffers.take(1)) == 1
    assert await buffers.take(1) is None
