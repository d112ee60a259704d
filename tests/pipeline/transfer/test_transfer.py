"""What all transfers share: ranges are read in chunks, ties are found, nothing is in progress by default."""

import asyncio
import json

import numpy as np
import pytest

from asyncshard.errors import StoreError
from asyncshard.format.header import HeaderLimits
from asyncshard.pipeline.checkpoint.checkpoint import Checkpoint
from asyncshard.pipeline.checkpoint.opened_file import FileReader, read_header_of
from asyncshard.pipeline.transfer.transfer import Reading, Transfer
from asyncshard.plan.items import ReadItem
from asyncshard.stores.base import Pacing
from asyncshard.tasks.threads import DaemonThreads
from asyncshard.testing import Fault, FaultyStore, GatedStore, MemoryStore

NAME = "model.safetensors"


class Whole(Transfer):
    """Reads items into buffers of the test."""

    is_in_place = False

    def buffer_bytes(self, item):
        return item.nbytes

    async def read(self, item, lease):
        await self._read_range(item, memoryview(lease))

    def deliver(self, item, lease):
        return iter(())


@pytest.fixture
async def threads():
    threads = DaemonThreads(1, "asyncshard-test")
    yield threads
    await threads.aclose()


async def transfer_of(store, threads, *, chunk_size=1 << 20):
    shard = await read_header_of(store, NAME, threads, HeaderLimits(), None)
    return Whole(Reading(Checkpoint((shard,), FileReader(store)), Pacing(chunk_size), threads))


def item_of(transfer):
    header = transfer.checkpoint.shards[0].header
    return ReadItem(0, header.size, header.file_size, 0, len(header))


@pytest.mark.parametrize(("chunk_size", "reads"), [(1 << 20, 1), (4096, 1), (1000, 5), (4095, 2)])
async def test_an_item_is_read_in_chunks(checkpoints, threads, chunk_size, reads):
    tensors = checkpoints.tensors(1)
    store = FaultyStore(MemoryStore({NAME: checkpoints.shard(tensors)}))
    transfer = await transfer_of(store, threads, chunk_size=chunk_size)
    begun, buffer = store.reads_begun, bytearray(4096)
    await transfer.read(item_of(transfer), buffer)
    assert (bytes(buffer), store.reads_begun - begun) == (tensors["layer.0"].tobytes(), reads)


async def test_the_chunks_of_an_item_are_in_flight_together(checkpoints, threads):
    store = GatedStore(MemoryStore({NAME: checkpoints.shard(checkpoints.tensors(1))}))
    transfer = await transfer_of(store, threads, chunk_size=1024)
    reading = asyncio.ensure_future(transfer.read(item_of(transfer), bytearray(4096)))
    assert len(await store.waiting(4)) == 4
    store.open_all()
    await reading


async def test_a_chunk_that_fails_stops_the_others(checkpoints, threads):
    memory = MemoryStore({NAME: checkpoints.shard(checkpoints.tensors(1))})
    store = GatedStore(FaultyStore(memory, reads={0: Fault(error=StoreError("broken"))}))
    transfer = await transfer_of(store, threads, chunk_size=1024)
    reading = asyncio.ensure_future(transfer.read(item_of(transfer), bytearray(4096)))
    (await store.waiting(4))[0].open()
    with pytest.raises(StoreError, match="broken"):
        await reading
    assert store.gates == []


async def test_an_item_without_bytes_reads_nothing(checkpoints, threads):
    store = FaultyStore(MemoryStore({NAME: checkpoints.shard({"empty": np.zeros(0, "<f4")})}))
    transfer = await transfer_of(store, threads)
    begun = store.reads_begun
    await transfer.read(item_of(transfer), bytearray())
    assert store.reads_begun == begun


async def test_a_transfer_knows_the_version_and_the_ties_of_its_checkpoint(checkpoints, threads):
    data = checkpoints.shard({"embed": np.arange(4.0)}, metadata={"head": "embed"})
    transfer = await transfer_of(MemoryStore({NAME: data}), threads)
    assert [shard.path for shard in transfer.version.shards] == [f"memory://checkpoint/{NAME}"]
    assert transfer.progress() == ((), ())
    assert transfer.prepare(item_of(transfer)) == 32


@pytest.mark.parametrize("is_tied", [True, False])
async def test_a_reading_with_ties_has_those_of_config_json(checkpoints, threads, is_tied):
    embedding = "model.embed_tokens.weight"
    config = json.dumps({"tie_word_embeddings": is_tied}).encode()
    store = MemoryStore({NAME: checkpoints.shard({embedding: np.arange(4.0)}), "config.json": config})
    shard = await read_header_of(store, NAME, threads, HeaderLimits(), None)
    reading = Reading(Checkpoint((shard,), FileReader(store), is_whole=True), Pacing(), threads)
    found = (await reading.with_ties()).checkpoint.ties
    assert dict(found) == ({"lm_head.weight": embedding} if is_tied else {})
