"""A store around another one has its pacing, its memory and its listeners."""

from asyncshard.events import Unverified
from asyncshard.stores import Pacing
from asyncshard.testing import MemoryStore, WrapperStore


def make_origin():
    store = MemoryStore({"a": b"abc"})
    store.pacing = Pacing(1 << 20, 3, 17)
    store.held_bytes = 99
    return store


def test_a_wrapper_has_what_suits_the_store_within():
    wrapper = WrapperStore(WrapperStore(make_origin()))
    assert (wrapper.pacing, wrapper.held_bytes) == (Pacing(1 << 20, 3, 17), 99)
    assert wrapper.url == "memory://checkpoint"


def test_whoever_listens_to_a_wrapper_hears_the_store_within_and_the_other_way_round():
    origin = make_origin()
    wrapper = WrapperStore(WrapperStore(origin))
    outside, within = [], []
    with wrapper.reporting_to(outside.append), origin.reporting_to(within.append):
        origin.report(Unverified("of the store"))
        wrapper.report(Unverified("of the wrapper"))
    origin.report(Unverified("later"))
    assert outside == within == [Unverified("of the store"), Unverified("of the wrapper")]


async def test_a_wrapper_passes_every_call_on_and_closes_the_store_within():
    closed = []

    class Closing(MemoryStore):
        async def aclose(self):
            closed.append(self)

    origin = Closing({"a": b"abc"})
    async with WrapperStore(origin) as wrapper:
        assert (await wrapper.list()).names == ("a",)
        meta, first = await wrapper.open("a", 2)
        assert (meta.size, first) == (3, b"ab")
        memory = bytearray(2)
        await wrapper.read_into(meta, 1, [memoryview(memory)])
        assert memory == b"bc"
        assert await wrapper.read("a") == b"abc"
        assert wrapper.path_of("a") == origin.path_of("a")
        assert wrapper.fingerprint(meta) == origin.fingerprint(meta)
        assert wrapper.identity(meta) == origin.identity(meta)
    assert closed == [origin]
