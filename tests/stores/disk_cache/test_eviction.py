"""The directory keeps within its bytes."""

import os
import random

from asyncshard.stores.disk_cache.directory import key_of
from asyncshard.stores.disk_cache.entry import name_of
from asyncshard.stores.disk_cache.eviction import make_room
from asyncshard.stores.disk_cache.store import CachedStore

MIB = 1 << 20


def test_the_entries_used_longest_ago_go_first_until_the_rest_fits(tmp_path):
    for number, used in enumerate([30, 10, 20, 40]):
        (tmp_path / f"{number}.blocks").write_bytes(b"x" * 100_000)
        os.utime(tmp_path / f"{number}.blocks", (used, used))
    sizes = {path.name: path.stat().st_blocks * 512 for path in tmp_path.iterdir()}
    one = max(sizes.values())
    assert make_room(str(tmp_path), 4 * one, ()) == 4 * one
    assert make_room(str(tmp_path), 2 * one, {"1.blocks"}) == 2 * one
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.blocks", "3.blocks"]
    assert make_room(str(tmp_path), 0, {"1.blocks", "3.blocks"}) == 2 * one
    assert make_room(str(tmp_path), 0, ()) == 0


def test_what_is_counted_is_the_room_on_the_disk(tmp_path):
    with (tmp_path / "sparse.blocks").open("wb") as file:
        file.truncate(1 << 40)
    assert make_room(str(tmp_path), 1 << 20, ()) < 1 << 20
    assert len(list(tmp_path.iterdir())) == 1


def test_temporary_files_that_were_left_behind_are_removed_once_they_are_old(tmp_path):
    for name in ("new-1", "new-2"):
        (tmp_path / name).write_bytes(b"")
    os.utime(tmp_path / "new-1", (1, 1))
    make_room(str(tmp_path), 1 << 20, ())
    assert [path.name for path in tmp_path.iterdir()] == ["new-2"]


async def test_old_objects_give_way_to_new_ones(make_cache, origin, load, entries):
    cache = make_cache(max_bytes=8 * MIB)
    contents = {name: random.Random(name).randbytes(3 * MIB) for name in "abcd"}
    for number, (name, content) in enumerate(contents.items()):
        assert (await load(cache, origin(name, content), name=name))[0] == content
        for path in entries():
            if path.name == name_of(key_of(f'["memory://checkpoint", "{name}", 0, 3145728]')):
                os.utime(path, (number, number))
        assert sum(path.stat().st_blocks * 512 for path in entries()) <= 8 * MIB
    assert (await load(cache, origin("d", contents["d"]), name="d"))[1].ranges == []
    assert (await load(cache, origin("a", contents["a"]), name="a"))[1].nbytes == 3 * MIB


async def test_an_object_that_is_used_again_is_not_the_oldest(make_cache, origin, load, entries):
    cache = make_cache(max_bytes=8 * MIB)
    contents = {name: random.Random(name).randbytes(3 * MIB) for name in "abc"}
    for name in "ab":
        await load(cache, origin(name, contents[name]), name=name)
        for path in entries():
            os.utime(path, (path.stat().st_mtime - 1000,) * 2)
    for name in "ac":
        await load(cache, origin(name, contents[name]), name=name)
    assert (await load(cache, origin("a", contents["a"]), name="a"))[1].ranges == []


async def test_an_object_larger_than_the_cache_is_kept_in_part(make_cache, load, entries, data, warnings_of):
    for _ in range(2):
        result, store = await load(make_cache(max_bytes=3 * MIB), step=MIB)
        assert result == data
        assert MIB <= sum(path.stat().st_blocks * 512 for path in entries()) <= 3 * MIB
    assert store.nbytes < len(data)
    assert "cache_max_gb" in warnings_of()[0]


async def test_an_entry_that_is_evicted_while_it_is_used_is_fetched_again(make_cache, origin, read_all, entries, data):
    store = origin()
    async with CachedStore(store, make_cache()) as cached:
        assert await read_all(cached) == data
    async with CachedStore(store, make_cache()) as cached:
        assert await read_all(cached) == data
        for path in entries():
            path.unlink()
        assert await read_all(cached) == data
    assert store.nbytes == 2 * len(data)
