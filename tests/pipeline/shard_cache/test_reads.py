"""Whole files and single tensors are read once, within the budget, into the account of their file."""

import numpy as np
import pytest

from asyncshard.errors import BudgetError, NamesError, StoreError
from asyncshard.plan.ties import TIE_PREFIX
from asyncshard.testing import Fault, FaultyStore


async def test_a_whole_file_is_read_once(make_folder, tensors, checkpoints):
    folder = await make_folder()
    with folder.cache.pinned("a", folder.shard) as file:
        one = await folder.reader.read_file(folder.opened, file)
        begun = folder.reads
        assert await folder.reader.read_file(folder.opened, file) is one
    assert folder.reads == begun
    assert checkpoints.same(dict(one), tensors)


async def test_one_tensor_is_read_by_itself_and_dropped_when_the_file_is_read(make_folder, tensors):
    folder = await make_folder()
    with folder.cache.pinned("a", folder.shard) as file:
        single = await folder.reader.read_tensor(folder.opened, file, "b", is_whole_model=False)
        assert (list(single), list(file.single_tensors)) == (["b"], ["b"])
        assert np.array_equal(single["b"], tensors["b"])
        assert file.with_name("b") is single
        assert file.with_name("a") is None
        await folder.reader.read_file(folder.opened, file)
        assert file.single_tensors == {}
        assert file.with_name("a") is file.with_name("b") is file.tensors


async def test_what_is_read_counts_on_the_account_of_the_file(make_folder):
    folder = await make_folder()
    with folder.cache.pinned("a", folder.shard) as file:
        assert file.account.used == 0
        kept = await folder.reader.read_tensor(folder.opened, file, "a", is_whole_model=False)
        assert file.account.used == 2 * 4096
        assert file.account.header_bytes == folder.shard.header.nbytes
        del kept


async def test_a_name_that_the_file_lacks_is_an_error_that_names_both(make_folder):
    folder = await make_folder()
    with folder.cache.pinned("a", folder.shard) as file, pytest.raises(NamesError, match="absent") as caught:
        await folder.reader.read_tensor(folder.opened, file, "absent", is_whole_model=False)
    assert (caught.value.missing, caught.value.path) == (("absent",), "memory://checkpoint/model.safetensors")


async def test_a_file_larger_than_the_budget_is_an_error_and_its_tensors_are_not(make_folder):
    folder = await make_folder(pages=4)
    with folder.cache.pinned("a", folder.shard) as file:
        with pytest.raises(BudgetError, match="raise memory_budget_mb"):
            await folder.reader.read_file(folder.opened, file)
        assert len(await folder.reader.read_tensor(folder.opened, file, "a", is_whole_model=False)) == 1


async def test_a_read_that_fails_is_not_remembered(make_folder):
    folder = await make_folder()
    store = FaultyStore(folder.memory, reads={0: Fault(error=StoreError("broken"))})
    opened = folder.opened._replace(store=store)
    with folder.cache.pinned("a", folder.shard) as file:
        with pytest.raises(StoreError, match="broken"):
            await folder.reader.read_file(opened, file)
        assert file.tensors is None
        assert len(await folder.reader.read_file(opened, file)) == 3


async def test_a_tied_name_is_the_stored_tensor_in_the_same_memory(make_folder, tensors):
    folder = await make_folder(metadata={f"{TIE_PREFIX}head": "b"})
    with folder.cache.pinned("a", folder.shard) as file:
        single = await folder.reader.read_tensor(folder.opened, file, "head", is_whole_model=False)
        assert np.array_equal(single["head"], tensors["b"])
        assert np.shares_memory(single["head"], file.with_name("b")["b"])
        whole = await folder.reader.read_file(folder.opened, file)
        assert list(whole) == [*tensors, "head"]
