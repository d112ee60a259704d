"""Claims on blocks: between the reads of a store, and between stores and processes."""

import asyncio

import filelock
import pytest

from asyncshard.stores.disk_cache.locks import BlockLocks
from asyncshard.tasks.threads import DaemonThreads

KEY = bytes(32)


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


@pytest.fixture
async def make_locks(tmp_path):
    """Make the claims of another store each time."""
    threads = DaemonThreads(1, "asyncshard-test")
    yield lambda: BlockLocks(str(tmp_path / "locks"), threads)
    await threads.aclose()


async def test_a_block_that_is_claimed_is_refused_to_other_reads_and_to_other_stores(make_locks):
    one, other = make_locks(), make_locks()
    assert await one.claim(KEY, [0, 1, 20]) == [0, 1, 20]
    assert await one.claim(KEY, [1, 2, 20]) == [2]
    assert await other.claim(KEY, [0, 1, 20]) == []
    assert await other.claim(KEY, [40]) == [40]
    one.release(KEY, [0, 1, 2, 20])
    other.release(KEY, [40])
    assert await other.claim(KEY, [0, 20]) == [0, 20]
    other.release(KEY, [0, 20])


async def test_a_segment_stays_locked_until_its_last_block_is_released(make_locks):
    one, other = make_locks(), make_locks()
    await one.claim(KEY, [0, 1])
    one.release(KEY, [0])
    assert await other.claim(KEY, [0]) == []
    one.release(KEY, [1])
    assert await other.claim(KEY, [0]) == [0]
    other.release(KEY, [0])


async def test_a_wait_ends_when_a_block_is_released(make_locks, monkeypatch):
    monkeypatch.setattr("asyncshard.stores.disk_cache.locks._PAUSES_S", (60.0, 60.0))
    locks = make_locks()
    await locks.claim(KEY, [0, 1])
    waiting = asyncio.ensure_future(locks.wait(KEY, [0, 1], 0))
    await asyncio.sleep(0)
    assert not waiting.done()
    locks.release(KEY, [1])
    await waiting
    locks.release(KEY, [0])


async def test_claims_that_fail_claim_nothing(make_locks, tmp_path):
    locks = make_locks()
    (tmp_path / "locks").write_bytes(b"")
    with pytest.raises(OSError, match="locks"):
        await locks.claim(KEY, [0])
    (tmp_path / "locks").unlink()
    assert await locks.claim(KEY, [0]) == [0]
    locks.release(KEY, [0])
