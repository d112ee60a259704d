"""Whatever is wrong with the cache, the bytes are right, and one warning says so."""

import asyncio
import errno
import os
import stat
import threading

import filelock
import pytest

from asyncshard._core import StopFlag
from asyncshard.stores.disk_cache import entry as entry_module
from asyncshard.stores.disk_cache.entry import Layout
from asyncshard.stores.disk_cache.eviction import make_room
from asyncshard.stores.disk_cache.store import CachedStore
from asyncshard.stores.disk_cache.verification import verify
from asyncshard.testing import GatedStore

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


async def test_locks_that_fail_leave_the_load_as_it_is(load, data, monkeypatch, warnings_of):
    acquire = filelock.FileLock.acquire

    def fail(self, *args, **more):
        if self.lock_file.endswith("eviction"):
            return acquire(self, *args, **more)
        raise NotImplementedError("no flock here")

    monkeypatch.setattr(filelock.FileLock, "acquire", fail)
    result, _ = await load()
    assert result == data
    (warning,) = warnings_of()
    assert "no flock here" in warning


@pytest.mark.skipif(os.geteuid() != 0, reason="takes on another user")
@pytest.mark.parametrize("is_filled", [False, True])
async def test_a_directory_of_another_user_that_is_read_only(is_filled, load, tmp_path, data, warnings_of):
    (tmp_path / "cache").mkdir(0o755)
    if is_filled:
        await load()
        for path in (tmp_path / "cache").rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
    opened = [path for path in tmp_path.parents if not path.stat().st_mode & 0o001]
    modes = {path: path.stat().st_mode for path in (tmp_path, *opened)}
    for path, mode in modes.items():
        path.chmod(mode | 0o011)
    os.seteuid(65534)
    try:
        result, store = await load()
    finally:
        os.seteuid(0)
        for path, mode in modes.items():
            path.chmod(mode)
    assert result == data
    assert store.nbytes == (0 if is_filled else len(data))
    assert len(warnings_of()) == (0 if is_filled else 1)


async def test_a_directory_where_others_may_write_is_not_used(load, tmp_path, data, warnings_of):
    await load()
    (tmp_path / "cache" / "entries").chmod(0o777)
    result, store = await load()
    assert result == data
    assert store.nbytes == len(data)
    assert "others may write" in warnings_of()[0]


async def test_a_file_where_the_directory_should_be(load, tmp_path, data, warnings_of):
    (tmp_path / "cache").write_bytes(b"")
    assert (await load())[0] == data
    assert len(warnings_of()) == 1


async def test_a_wrong_entry_that_cannot_be_removed_is_read_no_more(make_cache, load, entries, data, monkeypatch):
    await load()
    entries()[0].write_bytes(b"not an entry")

    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "unlink", refuse)
    cache = make_cache()
    for _ in range(2):
        result, store = await load(cache)
        assert result == data
        assert store.nbytes >= len(data)


MAKE = {
    "FIFO": os.mkfifo,
    "socket": lambda path: os.mknod(path, stat.S_IFSOCK | 0o600),
    "link": lambda path: path.symlink_to("/dev/zero"),
    "link to nothing": lambda path: path.symlink_to("nothing"),
}


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


async def test_locks_that_are_held_for_ever_are_waited_for_once(make_cache, load, tmp_path, data, warnings_of):
    (tmp_path / "cache" / "locks").mkdir(0o700, parents=True)
    locks = [filelock.FileLock(tmp_path / "cache" / "locks" / f"{number:02x}") for number in range(256)]
    for lock in locks:
        lock.acquire(blocking=False)
    try:
        result, store = await load(make_cache(lock_timeout_s=0.1), step=len(data))
    finally:
        for lock in locks:
            lock.release()
    assert result == data
    assert store.nbytes == len(data)
    (warning,) = warnings_of()
    assert "got nowhere" in warning


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
