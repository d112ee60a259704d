"""What every store does that is not made otherwise: its events, its repr, ranges and small objects."""

import numpy as np
import pytest

from asyncshard.errors import FormatError
from asyncshard.events import Unverified
from asyncshard.stores import LocalStore, Pacing, Store
from asyncshard.stores.disk_cache.directory import DiskCache
from asyncshard.stores.disk_cache.store import CachedStore
from asyncshard.stores.s3 import S3Store
from asyncshard.testing import FaultyStore, GatedStore, MemoryStore

DATA = bytes(range(256)) * 1024


def test_listeners_hear_what_a_store_reports_while_they_listen():
    store = MemoryStore({})
    first, second = [], []
    store.report(Unverified("too early"))
    with store.reporting_to(first.append):
        store.report(Unverified("one"))
        with store.reporting_to(second.append):
            store.report(Unverified("two"))
    store.report(Unverified("too late"))
    assert first == [Unverified("one"), Unverified("two")]
    assert second == [Unverified("two")]


def test_a_listener_is_let_go_of_when_its_context_fails():
    store = MemoryStore({})
    heard = []
    with pytest.raises(ValueError, match="failed"), store.reporting_to(heard.append):
        raise ValueError("failed")
    store.report(Unverified("too late"))
    assert heard == []


async def test_the_repr_of_a_store_shows_its_url_its_state_and_its_reads(tmp_path):
    (tmp_path / "a").write_bytes(DATA)
    store = LocalStore(str(tmp_path), max_workers=3)
    assert repr(store) == f"<LocalStore {str(tmp_path)!r} open, 3 workers, 0 reads in flight>"
    await store.aclose()
    assert repr(store) == f"<LocalStore {str(tmp_path)!r} closed, 3 workers, 0 reads in flight>"


async def test_the_repr_of_a_store_of_s3_shows_no_secret():
    store = S3Store("s3://bucket/model", aws_access_key_id="AKID", aws_secret_access_key="SECRET")
    assert repr(store) == "<S3Store 's3://bucket/model' open, 16 workers, 0 reads in flight>"
    await store.aclose()
    assert repr(store) == "<S3Store 's3://bucket/model' closed, 16 workers, 0 reads in flight>"


async def test_the_repr_of_a_wrapper_shows_the_store_within(tmp_path):
    memory = MemoryStore({})
    assert repr(memory) == "<MemoryStore 'memory://checkpoint'>"
    assert repr(FaultyStore(memory)) == "<FaultyStore around <MemoryStore 'memory://checkpoint'>>"
    cached = CachedStore(memory, DiskCache(tmp_path, max_bytes=1 << 30))
    assert repr(cached) == "<CachedStore open, 0 writes in progress, around <MemoryStore 'memory://checkpoint'>>"
    await cached.aclose()
    assert repr(cached) == "<CachedStore closed, 0 writes in progress, around <MemoryStore 'memory://checkpoint'>>"


class CountingStore(MemoryStore):
    """Notes the ranges that are read."""

    def __init__(self, files):
        super().__init__(files)
        self.ranges = []

    async def read_into(self, meta, start, buffers):
        self.ranges.append((start, start + sum(buffer.nbytes for buffer in buffers)))
        await super().read_into(meta, start, buffers)


@pytest.mark.parametrize("max_gap", [None, 0])
async def test_ranges_are_read_over_the_gaps_of_the_stores_pacing_unless_told_otherwise(max_gap):
    store = CountingStore({"a": DATA})
    store.pacing = Pacing(max_gap_bytes=10)
    meta, _ = await store.open("a", 0)
    memory = bytearray(60)
    starts, lengths = np.array([0, 30, 1000], np.int64), np.array([20, 20, 20], np.int64)
    await store.read_ranges(meta, starts, lengths, [memoryview(memory)], max_gap=max_gap)
    assert memory == DATA[:20] + DATA[30:50] + DATA[1000:1020]
    together = [(0, 50)] if max_gap is None else [(0, 20), (30, 50)]
    assert sorted(store.ranges) == [*together, (1000, 1020)]


async def test_a_small_object_is_read_whole_and_a_larger_one_refused_before_it_is_read():
    store = CountingStore({"a": DATA})
    assert await store.read("a") == DATA
    store.ranges.clear()
    with pytest.raises(FormatError, match="over the limit of 1,000"):
        await store.read("a", max_bytes=1000)
    assert store.ranges == []


async def test_a_store_without_names_for_versions_tells_none():
    class Plain(Store):
        url = "plain://"

        async def list(self): ...

        async def open(self, name, nbytes): ...

        async def read_into(self, meta, start, buffers): ...

    store = Plain()
    assert (store.fingerprint(None), store.identity(None)) == (None, None)
    assert store.path_of("a/b") == "plain:/a/b"


async def test_reads_in_flight_are_counted_through_a_wrapper(tmp_path):
    (tmp_path / "a").write_bytes(DATA)
    async with GatedStore(LocalStore(str(tmp_path))) as store:
        meta, _ = await store.open("a", 0)
        store.open_all()
        await store.read_into(meta, 0, [memoryview(bytearray(10))])
        assert "0 reads in flight" in repr(store)
