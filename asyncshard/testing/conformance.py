"""A conformance suite: tests of the behaviour that every store must have."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from abc import abstractmethod
from collections.abc import Awaitable, Mapping

import numpy as np

from asyncshard.errors import AsyncShardError, FormatError, ObjectChangedError, ObjectNotFoundError, TruncatedError
from asyncshard.stores.base import Store


class StoreTests:
    """Tests that every store must pass; pytest with pytest-asyncio in automatic mode runs the tests of a subclass.


    Each test makes a store of its own with `make_store`.
    """

    @abstractmethod
    async def make_store(self, files: Mapping[str, bytes]) -> Store:
        """Return a new store whose root holds these files."""

    @abstractmethod
    async def replace(self, store: Store, name: str, data: bytes) -> None:
        """Replace the object `name` of the store by another one with the bytes `data`."""

    @abstractmethod
    async def remove(self, store: Store, name: str) -> None:
        """Remove the object `name` from the store."""

    files: Mapping[str, bytes] = {
        "a.bin": bytes(range(256)) * 1024,
        "b.bin": bytes(reversed(range(256))) * 3,
        "empty.bin": b"",
    }
    """The files that the tests put into a store."""

    async def test_a_store_lists_the_files_of_its_root(self) -> None:
        async with await self.make_store(self.files) as store:
            listing = await store.list()
        assert (sorted(listing.names), listing.is_file) == (sorted(self.files), False)

    async def test_open_returns_the_size_and_the_first_bytes(self) -> None:
        async with await self.make_store(self.files) as store:
            for name, data in self.files.items():
                for nbytes in (0, 1, 100, len(data), len(data) + 1):
                    meta, head = await store.open(name, nbytes)
                    assert (meta.name, meta.size, bytes(head)) == (name, len(data), data[:nbytes])

    async def test_reads_fill_their_buffers_in_turn_and_nothing_else(self) -> None:
        data = self.files["a.bin"]
        async with await self.make_store(self.files) as store:
            meta, _ = await store.open("a.bin", 0)
            for start, sizes in (
                (0, [0, 10, 0, 1, 300, 0]),
                (255, [70_000]),
                (len(data) - 3, [1, 2]),
                (7, []),
                (7, [0]),
            ):
                memory = bytearray(b"\xaa" * (sum(sizes) + 2))
                at, buffers = 1, []
                for size in sizes:
                    buffers.append(memoryview(memory)[at : at + size])
                    at += size
                await store.read_into(meta, start, buffers)
                assert memory == b"\xaa" + data[start : start + sum(sizes)] + b"\xaa"

    async def test_ranges_fill_their_buffers_in_turn_and_nothing_else(self) -> None:
        data = self.files["a.bin"]
        ranges = [(3, 5), (10, 1), (11, 300), (5_000, 70_000), (75_001, 2), *((80_000 + 40 * i, 7) for i in range(200))]
        expected = b"".join(data[start : start + nbytes] for start, nbytes in ranges)
        offsets, lengths = (np.array(column, np.int64) for column in zip(*ranges, strict=True))
        async with await self.make_store(self.files) as store:
            meta, _ = await store.open("a.bin", 0)
            for max_gap in (0, 50, 1 << 20, None):
                memory = bytearray(b"\xaa" * (len(expected) + 2))
                cuts = [1, 1, 4, 9, 40_000, len(expected) - 1_000, len(expected) + 1]
                buffers = [memoryview(memory)[start:stop] for start, stop in itertools.pairwise(cuts)]
                await store.read_ranges(meta, offsets, lengths, buffers, max_gap=max_gap)
                assert memory == b"\xaa" + expected + b"\xaa"
            await store.read_ranges(meta, offsets[:0], lengths[:0], [])

    async def test_a_range_past_the_end_is_an_error_that_names_the_object(self) -> None:
        size = len(self.files["b.bin"])
        async with await self.make_store(self.files) as store:
            meta, _ = await store.open("b.bin", 0)
            for start in (10, size):
                offsets, lengths = np.array([0, start], np.int64), np.array([4, size], np.int64)
                for max_gap in (0, size):
                    buffer = memoryview(bytearray(4 + size))
                    error = await _error_of(store.read_ranges(meta, offsets, lengths, [buffer], max_gap=max_gap))
                    assert isinstance(error, TruncatedError)
                    assert "b.bin" in str(error)

    async def test_concurrent_reads_do_not_disturb_each_other(self) -> None:
        data = self.files["a.bin"]
        memory = bytearray(len(data))
        async with await self.make_store(self.files) as store:
            meta, _ = await store.open("a.bin", 0)
            ranges = [(start, memoryview(memory)[start : start + 5_000]) for start in range(0, len(data), 5_000)]
            await asyncio.gather(*(store.read_into(meta, start, [buffer]) for start, buffer in ranges))
        assert memory == data

    async def test_small_and_large_objects_are_read_whole(self) -> None:
        async with await self.make_store(self.files) as store:
            assert {name: await store.read(name) for name in self.files} == dict(self.files)

    async def test_reading_an_object_of_more_than_max_bytes_is_an_error(self) -> None:
        size = len(self.files["b.bin"])
        async with await self.make_store(self.files) as store:
            assert await store.read("b.bin", max_bytes=size) == self.files["b.bin"]
            error = await _error_of(store.read("b.bin", max_bytes=size - 1))
            assert isinstance(error, FormatError)
            assert "b.bin" in str(error)

    async def test_a_missing_object_is_an_error_that_names_it(self) -> None:
        async with await self.make_store(self.files) as store:
            for call in (store.open("absent.bin", 8), store.read("absent.bin")):
                error = await _error_of(call)
                assert isinstance(error, ObjectNotFoundError)
                assert "absent.bin" in str(error)

    async def test_a_read_past_the_end_is_an_error_that_names_the_object(self) -> None:
        size = len(self.files["b.bin"])
        async with await self.make_store(self.files) as store:
            meta, _ = await store.open("b.bin", 0)
            for start, nbytes in ((0, size + 1), (size, 1), (size + 10, 1)):
                error = await _error_of(store.read_into(meta, start, [memoryview(bytearray(nbytes))]))
                assert isinstance(error, TruncatedError)
                assert "b.bin" in str(error)

    async def test_a_replaced_object_is_an_error_and_can_be_opened_again(self) -> None:
        other = bytes(len(self.files["b.bin"]))
        async with await self.make_store(self.files) as store:
            meta, _ = await store.open("b.bin", 0)
            await self.replace(store, "b.bin", other)
            error = await _error_of(store.read_into(meta, 0, [memoryview(bytearray(8))]))
            assert isinstance(error, ObjectChangedError)
            assert "b.bin" in str(error)
            assert await store.read("b.bin") == other

    async def test_a_fingerprint_lasts_until_the_object_is_replaced(self) -> None:
        async with await self.make_store(self.files) as store:
            prints = [store.fingerprint((await store.open("a.bin", 0))[0]) for _ in range(2)]
            assert prints[0] == prints[1]
            await self.replace(store, "a.bin", b"another object")
            meta, _ = await store.open("a.bin", 0)
            assert prints[0] is None or prints[0] != store.fingerprint(meta)

    async def test_a_removed_object_is_an_error(self) -> None:
        async with await self.make_store(self.files) as store:
            meta, _ = await store.open("b.bin", 0)
            await self.remove(store, "b.bin")
            error = await _error_of(store.read_into(meta, 0, [memoryview(bytearray(8))]))
            assert isinstance(error, ObjectChangedError | ObjectNotFoundError)

    async def test_a_cancelled_read_leaves_the_buffer_alone_once_it_has_returned(self) -> None:
        nbytes = len(self.files["a.bin"])
        async with await self.make_store(self.files) as store:
            meta, _ = await store.open("a.bin", 0)
            for turns in range(6):
                memory = bytearray(nbytes)
                read = asyncio.ensure_future(store.read_into(meta, 0, [memoryview(memory)]))
                for _ in range(turns):
                    await asyncio.sleep(0)
                read.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await read
                memory[:] = bytes(nbytes)
                again = bytearray(nbytes)
                await store.read_into(meta, 0, [memoryview(again)])
                assert memory == bytes(nbytes)
                assert again == self.files["a.bin"]

    async def test_a_store_can_be_closed_twice(self) -> None:
        store = await self.make_store(self.files)
        await store.open("a.bin", 8)
        await store.aclose()
        await store.aclose()


async def _error_of(call: Awaitable[object]) -> AsyncShardError:
    try:
        await call
    except AsyncShardError as error:
        return error
    raise AssertionError("the store answered, where it had to raise")
