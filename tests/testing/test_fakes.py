import asyncio

import pytest

from asyncshard.errors import StoreError
from asyncshard.testing import Fault, FaultyStore, GatedStore, LatencyStore, MemoryStore, StoreTests

FILES = {"a.bin": bytes(range(100)), "folder/b.bin": b"below"}


class TestMemoryStore(StoreTests):
    async def make_store(self, files):
        return MemoryStore(files)

    async def replace(self, store, name, data):
        store.replace(name, data)

    async def remove(self, store, name):
        store.remove(name)


class TestWrappedStore(TestMemoryStore):
    async def make_store(self, files):
        return LatencyStore(FaultyStore(MemoryStore(files)), delay_s=0)

    async def replace(self, store, name, data):
        store.store.store.replace(name, data)

    async def remove(self, store, name):
        store.store.store.remove(name)


async def test_a_listing_leaves_out_files_in_folders():
    assert (await MemoryStore(FILES).list()).names == ("a.bin",)
    assert await MemoryStore(FILES).read("folder/b.bin") == b"below"


async def test_reads_wait_at_their_gates_in_order():
    store = GatedStore(MemoryStore(FILES))
    meta, _ = await store.open("a.bin", 0)
    buffers = [memoryview(bytearray(10)) for _ in range(3)]
    reads = [asyncio.ensure_future(store.read_into(meta, 10 * at, [buffer])) for at, buffer in enumerate(buffers)]
    gates = await store.waiting(3)
    assert [(gate.name, gate.start, gate.nbytes) for gate in gates] == [("a.bin", 10 * at, 10) for at in range(3)]
    gates[1].open()
    await reads[1]
    assert [bytes(buffer) for buffer in buffers] == [bytes(10), FILES["a.bin"][10:20], bytes(10)]
    store.open_all()
    await asyncio.gather(*reads)
    await store.read_into(meta, 50, [buffers[0]])
    assert bytes(buffers[0]) == FILES["a.bin"][50:60]
    assert store.gates == []


async def test_a_cancelled_read_leaves_its_gate_unless_the_store_is_stubborn():
    for is_stubborn in (False, True):
        store = GatedStore(MemoryStore(FILES), is_stubborn=is_stubborn)
        meta, _ = await store.open("a.bin", 0)
        buffer = memoryview(bytearray(10))
        read = asyncio.ensure_future(store.read_into(meta, 0, [buffer]))
        (gate,) = await store.waiting(1)
        read.cancel()
        for _ in range(5):
            await asyncio.sleep(0)
        assert read.done() is not is_stubborn
        gate.open()
        with pytest.raises(asyncio.CancelledError):
            await read
        assert bytes(buffer) == (FILES["a.bin"][:10] if is_stubborn else bytes(10))


async def test_faults_strike_the_read_that_the_script_names():
    released = asyncio.Event()
    error = StoreError("broken")
    store = FaultyStore(MemoryStore(FILES), {1: Fault(error=error, after=7), 2: Fault(hang=released)})
    meta, _ = await store.open("a.bin", 0)
    buffers = [memoryview(bytearray(5)), memoryview(bytearray(5))]
    await store.read_into(meta, 0, buffers)
    assert b"".join(buffers) == FILES["a.bin"][:10]
    with pytest.raises(StoreError, match="broken"):
        await store.read_into(meta, 10, buffers)
    assert b"".join(buffers) == FILES["a.bin"][10:17] + FILES["a.bin"][7:10]
    read = asyncio.ensure_future(store.read_into(meta, 20, buffers))
    await asyncio.sleep(0)
    assert not read.done()
    released.set()
    await read
    assert b"".join(buffers) == FILES["a.bin"][20:30]
    assert store.reads_begun == 3


async def test_faults_strike_the_object_that_the_script_names():
    store = FaultyStore(MemoryStore(FILES), opens={"a.bin": Fault(error=StoreError("broken"))})
    with pytest.raises(StoreError, match="broken"):
        await store.open("a.bin", 10)
    assert (await store.open("folder/b.bin", 10))[1] == b"below"
