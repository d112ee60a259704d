"""The one task of a stream: its states, and how it ends. What a consumer sees of it: test_stream*.py."""

import asyncio

import numpy as np
import pytest

from asyncshard import MemoryBudget
from asyncshard.errors import ObjectNotFoundError, StoreError, StreamClosedError
from asyncshard.pipeline.checkpoint.checkpoint import Selection
from asyncshard.pipeline.memory.budget import Reclaimable
from asyncshard.pipeline.transfer.buffered import ToBuffers
from asyncshard.pipeline.transfer.load import Load
from asyncshard.pipeline.transfer.placed import ToDestinations
from asyncshard.pipeline.transfer.supervisor import State, Supervisor
from asyncshard.stores.opening import StoreAccess
from asyncshard.testing import Fault, FaultyStore, GatedStore, MemoryStore


@pytest.fixture
def store(checkpoints):
    return MemoryStore(checkpoints.rank_files(checkpoints.tensors(4)))


def supervise(store, delivery=None, *, prefetch_count=None):
    load = Load(
        store,
        StoreAccess(),
        Selection(),
        MemoryBudget(1),
        chunk_size=4096,
        prefetch_count=prefetch_count,
        framework="np",
        is_strict=False,
        is_ordered=True,
    )
    return Supervisor(load, delivery or ToBuffers())


async def test_a_supervisor_goes_through_its_states_to_the_end(store):
    supervisor = supervise(store)
    assert supervisor.state is State.OPENING
    await supervisor.opened()
    assert supervisor.state is State.OPEN
    slots = []
    while (slot := await supervisor.next_slot()) is not None:
        assert supervisor.state is State.READING
        slots.append(slot.item.first)
    await supervisor.join()
    assert (slots, supervisor.state) == ([0, 1, 2, 3], State.ENDED)
    assert await supervisor.next_slot() is None
    assert supervisor.account.bytes_held() == 0


async def test_closing_before_the_end_is_told(store):
    supervisor = supervise(store)
    await supervisor.opened()
    closing = asyncio.ensure_future(supervisor.aclose())
    await asyncio.sleep(0)
    assert supervisor.state is State.CLOSING
    await closing
    assert supervisor.state is State.CLOSED
    assert repr(supervisor).startswith("<Supervisor closed, 0 items ahead, <Account of 1 MiB")
    with pytest.raises(StreamClosedError):
        await supervisor.next_slot()


async def test_a_checkpoint_that_cannot_be_opened_is_told_to_all_who_wait():
    supervisor = supervise(MemoryStore({}))
    results = await asyncio.gather(supervisor.opened(), supervisor.opened(), return_exceptions=True)
    assert [type(error) for error in results] == [ObjectNotFoundError] * 2
    await supervisor.aclose()
    assert supervisor.state is State.FAILED
    with pytest.raises(ObjectNotFoundError):
        await supervisor.next_slot()


async def test_closing_while_the_checkpoint_is_being_opened_is_an_error_for_who_waits(store):
    held = asyncio.Event()
    supervisor = supervise(FaultyStore(store, opens={"model-rank-0-part-0.safetensors": Fault(hang=held)}))
    waiting = asyncio.ensure_future(supervisor.opened())
    await asyncio.sleep(0)
    await supervisor.aclose()
    with pytest.raises(StreamClosedError):
        await waiting


async def test_a_read_that_fails_comes_in_its_turn_and_the_state_says_so(store):
    supervisor = supervise(FaultyStore(store, reads={1: Fault(error=StoreError("broken"))}))
    slots = [await supervisor.next_slot(), await supervisor.next_slot()]
    assert [str(slot.error) for slot in slots] == ["None", "broken"]
    await supervisor.aclose()
    assert supervisor.state is State.FAILED


async def test_reads_that_were_halted_begin_again_when_the_consumer_asks(store, checkpoints):
    gated = GatedStore(store)
    into = {name: np.zeros(1024, "<f4") for name in checkpoints.tensors(4)}
    supervisor = supervise(gated, ToDestinations(into, strict=True, cast=False), prefetch_count=2)
    asking = asyncio.ensure_future(supervisor.next_slot())
    await gated.waiting(2)
    asking.cancel()
    await asyncio.wait([asking])
    await supervisor.halt()
    assert gated.gates == []
    gated.open_all()
    items = [await supervisor.next_slot() for _ in range(4)]
    assert [slot.item.first for slot in items] == [0, 1, 2, 3]
    await supervisor.aclose()


async def test_an_item_read_ahead_is_given_back_while_the_consumer_is_busy(store):
    supervisor = supervise(store, prefetch_count=4)
    slot = await supervisor.next_slot()
    for _ in range(100):
        await asyncio.sleep(0)
    assert "3 items ahead" in repr(supervisor)
    assert not supervisor.reclaim(Reclaimable.CACHED)
    used = supervisor.account.bytes_alive()
    assert supervisor.reclaim(Reclaimable.READ_AHEAD)
    assert supervisor.account.bytes_alive() == used - 4096
    del slot
    assert [(await supervisor.next_slot()).item.first for _ in range(3)] == [1, 2, 3]
    await supervisor.aclose()


async def test_an_abandoned_supervisor_cleans_up_by_itself(store):
    supervisor = supervise(store)
    await supervisor.opened()
    supervisor.abandon()
    await supervisor.join()
    assert supervisor.state is State.CLOSED
