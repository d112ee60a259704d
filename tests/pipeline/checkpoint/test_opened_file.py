"""One file is opened: its header is read and validated, and its tensors are read by their offsets in the header."""

import numpy as np
import pytest

from asyncshard.errors import BudgetError, FormatError
from asyncshard.format.header import HeaderLimits
from asyncshard.pipeline.checkpoint.opened_file import FileReader, open_header, parse_opened, read_header_of
from asyncshard.testing import FaultyStore, MemoryStore

NAME = "model.safetensors"


@pytest.fixture
def tensors():
    return {"a": np.arange(12, dtype="<i4").reshape(3, 4), "b": np.arange(5, dtype="u1"), "empty": np.zeros((0, 2))}


async def test_an_opened_file_has_the_facts_of_its_tensors(open_file, tensors):
    store, file = await open_file(tensors, metadata={"format": "pt"})
    facts = {name: (info.dtype, info.shape) for name, info in file.header.items()}
    assert facts == {"a": ("I32", (3, 4)), "b": ("U8", (5,)), "empty": ("F64", (0, 2))}
    assert file.header.metadata == {"format": "pt"}
    assert (file.path, file.meta.name) == (store.path_of(NAME), NAME)
    assert file.data_bytes == 12 * 4 + 5
    assert file.nbytes == file.header.nbytes


async def test_a_short_header_comes_with_the_opening_and_a_long_one_takes_a_read_more(checkpoints, threads):
    for count, reads in ((10, 0), (5000, 1)):
        tensors = {f"layer.{number}": np.zeros(0, "u1") for number in range(count)}
        store = FaultyStore(MemoryStore({NAME: checkpoints.shard(tensors)}))
        file = await read_header_of(store, NAME, threads, HeaderLimits(), None)
        assert list(file.header) == list(tensors)
        assert store.reads_begun == reads


async def test_a_tensor_is_read_at_its_offset_into_any_number_of_buffers(open_file, tensors):
    store, file = await open_file(tensors)
    info = file.header["a"]
    memory = bytearray(info.nbytes)
    view = memoryview(memory)
    await FileReader(store).read_into(file, info.start, [view[:1], view[1:1], view[1:]])
    assert memory == tensors["a"].tobytes()


async def test_the_account_is_charged_for_what_the_header_takes(checkpoints, threads, account, tensors):
    store = MemoryStore({NAME: checkpoints.shard(tensors)})
    file = await read_header_of(store, NAME, threads, HeaderLimits(), account)
    assert account.header_bytes == file.header.nbytes


async def test_a_header_that_the_budget_has_no_room_for_is_refused_before_it_is_read(checkpoints, threads, account):
    tensors = {f"layer.{number:0200}": np.zeros(0, "u1") for number in range(2500)}
    store = FaultyStore(MemoryStore({NAME: checkpoints.shard(tensors)}))
    with pytest.raises(BudgetError, match=NAME):
        await read_header_of(store, NAME, threads, HeaderLimits(), account)
    assert store.reads_begun == 0


@pytest.mark.parametrize("limits", [HeaderLimits(max_tensors=2), HeaderLimits(max_header_bytes=64)], ids=str)
async def test_a_header_beyond_the_limits_is_refused(checkpoints, threads, tensors, limits):
    store = MemoryStore({NAME: checkpoints.shard(tensors)})
    with pytest.raises(FormatError, match=NAME):
        await read_header_of(store, NAME, threads, limits, None)


async def test_a_file_shorter_than_its_header_says_is_refused(checkpoints, threads, tensors):
    store = MemoryStore({NAME: checkpoints.shard(tensors)[:-1]})
    with pytest.raises(FormatError, match=NAME):
        await read_header_of(store, NAME, threads, HeaderLimits(), None)


async def test_what_is_made_of_a_header_is_made_in_its_thread(checkpoints, threads, tensors):
    store = MemoryStore({NAME: checkpoints.shard(tensors)})
    opened = await open_header(store, NAME, HeaderLimits())
    assert opened.parse_bytes > opened.size
    assert await parse_opened(store, opened, threads, len, HeaderLimits()) == 3


async def test_a_replaced_object_is_another_file(checkpoints, threads, tensors):
    store = MemoryStore({NAME: checkpoints.shard(tensors)})
    first, again = [await read_header_of(store, NAME, threads, HeaderLimits(), None) for _ in range(2)]
    before = FileReader(store).fingerprint(first)
    assert first.is_same(again)
    store.replace(NAME, checkpoints.shard({**tensors, "b": tensors["b"] + 1}))
    other = await read_header_of(store, NAME, threads, HeaderLimits(), None)
    assert not first.is_same(other)
    assert FileReader(store).fingerprint(other) not in (before, None)
