"""A load opens its checkpoint, plans a transfer, and closes everything at the end. Whole loads: see test_stream.py."""

import asyncio

import numpy as np
import pytest

from asyncshard import MemoryBudget
from asyncshard.errors import NamesError, ObjectNotFoundError
from asyncshard.events import Retried
from asyncshard.pipeline.checkpoint.checkpoint import Selection
from asyncshard.pipeline.transfer.buffered import ToBuffers
from asyncshard.pipeline.transfer.load import Load, open_transfer
from asyncshard.pipeline.transfer.placed import ToDestinations
from asyncshard.plan.tensor_filter import TensorFilter
from asyncshard.stores.opening import StoreAccess
from asyncshard.testing import MemoryStore

RETRIED = Retried("memory://checkpoint/a", "the server failed", 0.1, 1, 503, "id")


@pytest.fixture
def store(checkpoints):
    return MemoryStore(checkpoints.rank_files(checkpoints.tensors(2), checkpoints.tensors(2, prefix="head")))


def load_of(path, *, selection=None, chunk_size=None, prefetch_count=None):
    return Load(
        path,
        StoreAccess(),
        selection or Selection(),
        MemoryBudget(1),
        chunk_size=chunk_size,
        prefetch_count=prefetch_count,
        framework="np",
        is_strict=False,
        is_ordered=True,
    )


async def test_the_url_of_a_load_is_that_of_its_store_or_path(store, tmp_path):
    assert load_of(store).url == "memory://checkpoint"
    assert load_of(tmp_path).url == str(tmp_path)


async def test_a_transfer_is_planned_over_all_shards(store):
    async with open_transfer(load_of(store), load_of(store).open(), ToBuffers(), print) as transfer:
        assert (transfer.tensors_total, transfer.bytes_total) == (4, 4 * 4096)
        assert [item.shard for item in transfer.items] == [0, 1]


async def test_the_pacing_is_the_stores_unless_the_load_has_its_own(store):
    for load in (load_of(store), load_of(store, chunk_size=1 << 20, prefetch_count=3)):
        async with load.open() as opening:
            _, reading = await load.open_checkpoint(opening)
            assert reading.pacing.chunk_size == (load.chunk_size or store.pacing.chunk_size)
            assert reading.pacing.prefetch_count == (load.prefetch_count or store.pacing.prefetch_count)


async def test_a_selection_leaves_tensors_out(store):
    load = load_of(store, selection=Selection(tensor_filter=TensorFilter("head.*")))
    async with open_transfer(load, load.open(), ToBuffers(), print) as transfer:
        assert transfer.tensors_total == 2


async def test_the_stores_events_are_heard_until_the_transfer_is_closed(store):
    heard = []
    load = load_of(store)
    async with open_transfer(load, load.open(), ToBuffers(), heard.append):
        store.report(RETRIED)
    store.report(RETRIED)
    assert heard == [RETRIED]


async def test_a_transfer_that_cannot_be_planned_leaves_nothing_open(store):
    into = {"absent": np.zeros(1, "<f4")}
    for path, error in ((store, NamesError), (MemoryStore({}), ObjectNotFoundError)):
        load = load_of(path)
        with pytest.raises(error):
            async with open_transfer(load, load.open(), ToDestinations(into, strict=True, cast=False), print):
                pass
        assert load.budget.bytes_used == 0
        assert not load.budget._accounts
        assert asyncio.all_tasks() == {asyncio.current_task()}
