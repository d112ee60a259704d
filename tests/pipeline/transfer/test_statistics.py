"""Statistics are counted from events. What they say of whole loads is tested in tests/loaders/test_streaming.py."""

import asyncio
import sys
import threading

import pytest

from asyncshard import AsyncShardLoader
from asyncshard.events import (
    Closed,
    Delivered,
    Opened,
    ReadEnded,
    ReadStarted,
    Retried,
    Unverified,
    Verified,
)
from asyncshard.pipeline.transfer.statistics import Counters
from asyncshard.testing import MemoryStore, WrapperStore

RETRIED = Retried("s3://b/a", "the server failed", 0.1, 1, 503, "id")


def counted(*events):
    counters = Counters()
    for event in events:
        counters.take(event)
    return counters.statistics(bytes_held=0, budget_wait_s=0.0)


def test_nothing_is_known_before_the_checkpoint_is_open():
    statistics = counted()
    assert (statistics.tensors_total, statistics.eta_s, statistics.missing) == (0, None, ())
    assert statistics.elapsed_s > 0


def test_an_opened_checkpoint_says_how_much_is_to_come():
    statistics = counted(Opened(3, 300, ("m",), ("u",)))
    assert (statistics.tensors_total, statistics.bytes_total) == (3, 300)
    assert (statistics.missing, statistics.unexpected) == (("m",), ("u",))
    assert statistics.eta_s is None


def test_bytes_are_in_flight_between_the_start_and_the_end_of_their_read():
    begun = [ReadStarted("a", 0, 100), ReadStarted("b", 50, 60)]
    assert counted(*begun).bytes_in_flight == 110
    assert counted(*begun, ReadEnded("a", 0, 100)).bytes_in_flight == 10


def test_delivered_tensors_add_up_and_tell_when_the_load_will_end():
    opened = Opened(3, 300, (), ())
    halfway = counted(opened, Delivered(1, 50), Delivered(1, 100))
    assert (halfway.tensors_done, halfway.bytes_done) == (2, 150)
    assert halfway.eta_s == halfway.elapsed_s
    assert counted(opened, Delivered(3, 300)).eta_s == 0.0


def test_the_time_ends_when_the_reads_have_stopped():
    counters = Counters()
    counters.take(Closed())
    first = counters.statistics(bytes_held=7, budget_wait_s=2.0)
    assert first == counters.statistics(bytes_held=7, budget_wait_s=2.0)
    assert (first.bytes_held, first.budget_wait_s) == (7, 2.0)


def test_an_object_is_unverified_until_it_matches_and_again_when_it_no_longer_does():
    events = [Unverified("b"), Unverified("a"), Verified("a"), Verified("b"), Unverified("a")]
    assert [(counted(*events[:n]).verified, counted(*events[:n]).unverified) for n in range(1, 6)] == [
        ((), ("b",)),
        ((), ("b", "a")),
        (("a",), ("b",)),
        (("b", "a"), ()),
        (("b",), ("a",)),
    ]


def test_events_from_several_threads_are_all_counted():
    counters = Counters()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=lambda: [counters.take(RETRIED) for _ in range(5000)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert counters.statistics(bytes_held=0, budget_wait_s=0.0).retries == 20_000


class Reporting(WrapperStore):
    """Reports a retry at each opening of an object."""

    async def open(self, name, nbytes):
        self.report(RETRIED)
        return await super().open(name, nbytes)


@pytest.fixture
def store(checkpoints):
    return Reporting(MemoryStore({"model.safetensors": checkpoints.shard(checkpoints.tensors(3))}))


async def test_a_load_counts_the_events_of_the_users_own_store_during_the_load(store):
    for _ in range(2):
        async with AsyncShardLoader().stream(store) as weights:
            assert weights.statistics().retries == 1
            assert len([name async for name, _ in weights]) == 3
    store.report(RETRIED)
    assert weights.statistics().retries == 1


async def test_two_loads_from_one_store_both_count_its_events(store):
    streams = [AsyncShardLoader().stream(store) for _ in range(2)]
    await asyncio.gather(*streams)
    store.report(RETRIED)
    counts = [stream.statistics().retries for stream in streams]
    assert min(counts) >= 2
    await asyncio.gather(*(stream.aclose() for stream in streams))


async def test_statistics_are_right_after_every_tensor(store):
    async with AsyncShardLoader().stream(store) as weights:
        done = nbytes = 0
        async for _, tensor in weights:
            done, nbytes = done + 1, nbytes + tensor.nbytes
            statistics = weights.statistics()
            assert (statistics.tensors_done, statistics.bytes_done) == (done, nbytes)
    assert weights.statistics().tensors_done == 3


async def test_a_stream_that_is_closed_early_counts_the_tensors_that_were_taken(store):
    async with AsyncShardLoader().stream(store) as weights:
        async for _ in weights:
            break
    assert weights.statistics().tensors_done == 1
