"""The tensors of a shard are a read-only mapping: a new view of the same memory for each look-up."""

import gc

import numpy as np
import pytest
import torch

from asyncshard.pipeline.shard_cache.tensors import frozen


@pytest.fixture
async def shard(make_folder):
    folder = await make_folder()
    with folder.cache.pinned("a", folder.shard) as file:
        return await folder.reader.read_file(folder.opened, file)


async def test_names_come_in_the_order_of_their_bytes(shard, tensors):
    assert list(shard) == list(tensors)
    assert (len(shard), "a" in shard, "absent" in shard, 7 in shard) == (3, True, False, False)
    assert repr(shard) == "<3 tensors of memory://checkpoint/model.safetensors>"
    with pytest.raises(KeyError, match="absent"):
        shard["absent"]


async def test_each_look_up_is_a_read_only_view_of_the_same_memory(shard):
    one, other = shard["a"], shard["a"]
    assert one is not other
    assert np.shares_memory(one, other)
    with pytest.raises(ValueError, match="read-only"):
        one[0] = 1


async def test_further_names_come_last_and_share_memory(shard):
    tied = shard.with_ties({"head": "b"})
    assert list(tied) == ["a", "b", "c", "head"]
    assert np.shares_memory(tied["head"], shard["b"])
    assert (len(tied), "head" in tied, "head" in shard) == (4, True, False)


async def test_a_mapping_of_one_tensor_has_no_other(make_folder):
    folder = await make_folder()
    with folder.cache.pinned("a", folder.shard) as file:
        single = await folder.reader.read_tensor(folder.opened, file, "b", is_whole_model=False)
    assert (list(single), "a" in single) == (["b"], False)
    with pytest.raises(KeyError):
        single["a"]


async def test_a_tensor_keeps_its_memory_alive(shard, tensors):
    last = shard["b"]
    del shard
    gc.collect()
    assert np.array_equal(last, tensors["b"])


def test_torch_tensors_stay_writable():
    tensor = torch.zeros(2)
    assert frozen(tensor) is tensor
    tensor[0] = 1
