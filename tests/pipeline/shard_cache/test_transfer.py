"""Streams deliver cached shards from memory, and read the others past the cache."""

import numpy as np
import pytest

from asyncshard.pipeline.checkpoint.checkpoint import Checkpoint
from asyncshard.pipeline.checkpoint.opened_file import FileReader
from asyncshard.pipeline.shard_cache.transfer import CachedTransfer
from asyncshard.pipeline.transfer.transfer import Reading
from asyncshard.stores.base import Pacing


@pytest.fixture
async def folder(make_folder):
    return await make_folder()


@pytest.fixture
def transfer(folder):
    checkpoint = Checkpoint((folder.shard,), FileReader(folder.opened.store))
    reading = Reading(checkpoint, Pacing(8192), folder.opened.threads)
    transfer = CachedTransfer(reading, folder.opened.library, folder.cache)
    transfer.plan(folder.cache.budget, is_strict=False)
    return transfer


async def cache(folder):
    with folder.cache.pinned(folder.shard.path, folder.shard) as file:
        return await folder.reader.read_file(folder.opened, file)


async def test_a_cached_shard_needs_no_buffer_and_no_read(folder, transfer, tensors):
    cached = await cache(folder)
    begun = folder.reads
    for item in transfer.items:
        assert transfer.prepare(item) == 0
        await transfer.read(item, None)
        for name, tensor, nbytes in transfer.deliver(item, None):
            assert np.shares_memory(tensor, cached[name])
            assert nbytes == tensors[name].nbytes
    assert folder.reads == begun
    assert folder.cache.hits == 1


async def test_a_shard_that_is_not_cached_is_read_and_not_kept(folder, transfer, tensors):
    account = folder.cache.open_account()
    for item in transfer.items:
        lease = await account.allocate(transfer.prepare(item))
        await transfer.read(item, lease)
        for name, tensor, _ in transfer.deliver(item, lease):
            assert np.array_equal(tensor, tensors[name])
            assert not tensor.flags.writeable
        del tensor, lease
    folder.cache.discard(account)
    assert folder.cache.peek(folder.shard.path) is None


async def test_a_cached_shard_of_another_version_is_read_again(folder, transfer, checkpoints, tensors):
    folder.memory.replace(folder.opened.name, checkpoints.shard(tensors))
    changed = await folder.reader.read_header(folder.opened)
    with folder.cache.pinned(folder.shard.path, changed) as file:
        await folder.reader.read_file(folder.opened, file)
    assert [transfer.prepare(item) for item in transfer.items] == [item.nbytes for item in transfer.items]


async def test_cached_tensors_live_until_they_are_delivered(folder, transfer):
    await cache(folder)
    item = transfer.items[0]
    assert transfer.prepare(item) == 0
    folder.cache.clear()
    assert [name for name, _, _ in transfer.deliver(item, None)] == ["a"]
