"""Whatever goes wrong with the disk, a load goes on, and one warning says so."""

import asyncio
import errno
import os
import threading

import pytest

from asyncshard.stores.disk_cache.session import CacheSession
from asyncshard.stores.disk_cache.store import CachedStore


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("calls", [0, 1, 2, 5])
async def test_a_full_disk_leaves_the_load_as_it_is(number, calls, load, data, monkeypatch, warnings_of):
    pwrite, count = os.pwrite, iter(range(1000))

    def limited(fd, view, offset):
        if next(count) < calls:
            return pwrite(fd, view, offset)
        if len(view) > 16:  # digests are written whole or not at all
            pwrite(fd, view[: len(view) // 2], offset)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pwrite", limited)
    result, store = await load(step=len(data))
    assert result == data
    assert store.nbytes == len(data)
    (warning,) = warnings_of()
    assert os.strerror(number) in warning
    monkeypatch.undo()
    assert (await load())[0] == data
    assert (await load())[1].ranges == []


async def test_a_warning_is_given_once_for_all_loads(make_cache, load, data, monkeypatch, warnings_of):
    def full(*_):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "pwrite", full)
    cache = make_cache()
    for _ in range(3):
        assert (await load(cache))[0] == data
    assert len(warnings_of()) == 1


@pytest.mark.parametrize("call", ["mkdir", "link", "ftruncate", "utime", "makedirs", "scandir"])
async def test_a_call_that_is_refused_leaves_the_load_as_it_is(call, load, data, monkeypatch, warnings_of):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, call, refuse)
    result, store = await load(step=len(data))
    monkeypatch.undo()
    assert result == data
    assert store.nbytes == len(data)
    assert len(warnings_of()) == 1
    assert (await load())[0] == data


async def test_a_disk_that_hangs_holds_the_load_only_until_it_is_closed(
    make_cache, origin, read_all, data, monkeypatch
):
    pwrite, goes_on = os.pwrite, threading.Event()

    def hang(*args):
        goes_on.wait()
        return pwrite(*args)

    monkeypatch.setattr(os, "pwrite", hang)
    store = CachedStore(origin(), make_cache())
    try:
        assert await read_all(store, step=len(data)) == data
    finally:
        goes_on.set()
        await store.aclose()


async def test_a_session_that_has_failed_keeps_nothing_and_looks_at_entries_unless_they_failed(
    make_cache, origin, warnings_of
):
    session = CacheSession(origin(), make_cache(), 2)
    key = bytes(32)
    assert session.can_keep(key)
    session.fail("the disk is full")
    assert not session.can_keep(key)
    assert session.can_read
    session.fail("the disk is broken", can_read=False)
    assert not session.can_read
    assert len(warnings_of()) == 1
    await session.aclose()


async def test_closing_a_session_waits_for_the_blocks_that_are_being_written(make_cache, origin, entries):
    store = origin()
    session = CacheSession(store, make_cache(), 2)
    meta, _ = await store.open("a", 0)
    key = bytes(32)
    await session.begin_use(key)
    (block,) = await session.locks.claim(key, [0])
    (image,) = await session.buffers.take(1)
    session.begin_write(meta, key, [(block, image)])
    assert session.writes_in_progress == 1
    await asyncio.gather(session.aclose())
    assert session.writes_in_progress == 0
    assert len(entries()) == 1
    assert session.buffers.free_count == 2
