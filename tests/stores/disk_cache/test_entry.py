"""Whatever is wrong with an entry, the bytes are right, and one warning says so."""

import asyncio
import os
import stat

import pytest

from asyncshard._core import StopFlag
from asyncshard.stores.disk_cache.entry import Layout
from asyncshard.stores.disk_cache.eviction import make_room
from asyncshard.stores.disk_cache.store import CachedStore
from asyncshard.stores.disk_cache.verification import verify

MIB = 1 << 20

PLACES = {
    "magic": 0,
    "version": 8,
    "size of blocks": 12,
    "size": 16,
    "key": 30,
    "serial": 60,
    "digest of the header": 75,
    "map": 128 + 16 * 2 + 3,
    "first byte of the data": 4096,
    "a byte of the middle": 4096 + 3 * MIB + 77,
    "last byte of the data": -1,
}

MAKE = {
    "FIFO": os.mkfifo,
    "socket": lambda path: os.mknod(path, stat.S_IFSOCK | 0o600),
    "link": lambda path: path.symlink_to("/dev/zero"),
    "link to nothing": lambda path: path.symlink_to("nothing"),
}


@pytest.mark.parametrize("place", PLACES)
async def test_a_corrupt_byte_is_noticed_whatever_it_belongs_to(place, load, entries, data, warnings_of):
    await load()
    (path,) = entries()
    with path.open("r+b") as file:
        file.seek(PLACES[place], 0 if PLACES[place] >= 0 else 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 0x40]))
    result, store = await load()
    assert result == data
    assert 0 < store.nbytes <= len(data)
    (warning,) = warnings_of()
    assert "memory://checkpoint/a" in warning
    assert str(path) in warning
    assert (await load())[0] == data  # which also fetches what was taken from the entry before it was dropped
    assert (await load())[1].ranges == []
    assert len(warnings_of()) == 1


@pytest.mark.parametrize("nbytes", [0, 1, 100, 4096, 4096 + MIB, -1])
async def test_a_truncated_entry_is_noticed(nbytes, load, entries, data, warnings_of):
    await load()
    (path,) = entries()
    os.truncate(path, nbytes % path.stat().st_size)
    assert (await load())[0] == data
    assert len(warnings_of()) == 1
    assert (await load())[1].ranges == []


async def test_an_entry_of_another_object_is_noticed(origin, load, entries, data, warnings_of):
    await load()
    await load(store=origin(content=data[::-1] + b"x"))
    one, other = entries()
    one.write_bytes(other.read_bytes())
    assert (await load())[0] == data
    assert (await load(store=origin(content=data[::-1] + b"x")))[0] == data[::-1] + b"x"
    assert len(warnings_of()) == 1


async def test_an_entry_truncated_while_it_is_read_is_noticed(make_cache, origin, read_all, load, entries, data):
    await load()
    cache = make_cache()
    async with CachedStore(origin(), cache) as cached:
        assert await read_all(cached) == data
        (path,) = entries()
        path.unlink()
        assert await read_all(cached) == data
        with entries()[0].open("r+b") as file:
            file.truncate(2 * MIB)
            file.truncate(Layout(len(data)).blocks_start + len(data))  # its map is whole, its blocks are zeros
        assert await CachedStore.aclose(cached) is None
    assert (await load())[0] == data


@pytest.mark.parametrize("kind", MAKE)
async def test_an_entry_that_is_no_regular_file_is_dropped(kind, make_cache, load, entries, data, warnings_of):
    await load()
    (path,) = entries()
    path.unlink()
    MAKE[kind](path)
    assert (await load())[0] == data
    (warning,) = warnings_of()
    assert "no regular file" in warning
    await load()
    assert (await load())[1].ranges == []
    path.unlink()
    MAKE[kind](path)
    report = await asyncio.to_thread(verify, make_cache(), StopFlag())
    assert report.dropped == (str(path),)


async def test_a_folder_in_place_of_an_entry_is_left_alone(make_cache, load, entries, data, warnings_of):
    await load()
    (path,) = entries()
    path.unlink()
    path.mkdir()
    for _ in range(2):
        cache = make_cache()
        for _ in range(2):
            result, store = await load(cache)
            assert result == data
            assert store.nbytes == len(data)
    assert [("cannot be removed" in warning, str(path) in warning) for warning in warnings_of()] == [(True, True)] * 2
    assert (await asyncio.to_thread(verify, make_cache(), StopFlag())).dropped == ()
    assert make_room(make_cache().entries, 0, ()) == 0
    assert path.is_dir()
