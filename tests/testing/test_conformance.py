"""The conformance suite finds stores that are wrong. Stores that pass it: tests/stores, and test_fakes.py."""

import pytest

from asyncshard.errors import ObjectChangedError
from asyncshard.stores.base import ObjectMeta
from asyncshard.testing import MemoryStore, StoreTests, WrapperStore


class Suite(StoreTests):
    """The suite for one class of wrappers round a store in memory; pytest does not collect it by this name."""

    def __init__(self, wrapper):
        self._wrapper = wrapper

    async def make_store(self, files):
        return self._wrapper(MemoryStore(files))

    async def replace(self, store, name, data):
        store.store.replace(name, data)

    async def remove(self, store, name):
        store.store.remove(name)


class Hides(WrapperStore):
    """Leaves files out of its listing."""

    async def list(self):
        listing = await super().list()
        return listing._replace(names=listing.names[1:])


class Overwrites(WrapperStore):
    """Writes where it was not asked to."""

    async def read_into(self, meta, start, buffers):
        await super().read_into(meta, start, buffers)
        for buffer in buffers:
            if buffer.nbytes > 1:
                buffer[0], buffer[1] = buffer[1], buffer[0]


class Forgets(WrapperStore):
    """Reads a replaced object as if it were the one that was opened."""

    async def read_into(self, meta, start, buffers):
        try:
            await super().read_into(meta, start, buffers)
        except ObjectChangedError:
            meta, _ = await self.store.open(meta.name, 0)
            await super().read_into(meta, start, buffers)


class Lies(WrapperStore):
    """Says of every object that it is a byte longer than it is."""

    async def open(self, name, nbytes):
        meta, head = await super().open(name, nbytes)
        return ObjectMeta(meta.name, meta.size + 1, meta.version), head


@pytest.mark.parametrize(
    ("wrapper", "test"),
    [
        (Hides, "test_a_store_lists_the_files_of_its_root"),
        (Overwrites, "test_reads_fill_their_buffers_in_turn_and_nothing_else"),
        (Forgets, "test_a_replaced_object_is_an_error_and_can_be_opened_again"),
        (Lies, "test_open_returns_the_size_and_the_first_bytes"),
    ],
)
async def test_a_store_that_is_wrong_fails(wrapper, test):
    with pytest.raises(AssertionError):
        await getattr(Suite(wrapper), test)()
    await getattr(Suite(WrapperStore), test)()
