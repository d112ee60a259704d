"""The reader of shards takes of a file what its selection wants. Whole files and tensors: test_reads.py."""

import numpy as np
import pytest

from asyncshard.errors import CheckpointError, NamesError, ObjectChangedError
from asyncshard.pipeline.checkpoint.checkpoint import Selection
from asyncshard.plan.division.placements import Shard
from asyncshard.plan.tensor_filter import TensorFilter
from asyncshard.plan.tp.plan import plan_of


def sliced(**rules):
    return Selection(rank=1, world_size=2, tp_plan=plan_of(rules))


async def test_a_header_is_that_of_the_ranks_slice(make_folder, tensors):
    folder = await make_folder(selection=sliced(a=Shard(0)))
    assert folder.shard.header["a"].shape == (1024,)
    assert folder.shard.header["b"].shape == (2048,)
    with folder.cache.pinned("a", folder.shard) as file:
        whole = await folder.reader.read_file(folder.opened, file)
        assert np.array_equal(whole["a"], tensors["a"][1024:])


async def test_a_filter_leaves_other_tensors_out(make_folder):
    folder = await make_folder(selection=Selection(tensor_filter=TensorFilter(["a", "c"])))
    assert sorted(folder.shard.header) == ["a", "c"]
    with folder.cache.pinned("a", folder.shard) as file, pytest.raises(NamesError):
        await folder.reader.read_tensor(folder.opened, file, "b", is_whole_model=False)


async def test_a_rank_shard_is_not_cut_again(make_folder):
    folder = await make_folder(selection=sliced(a=Shard(0)))
    opened = folder.opened._replace(name="model-rank-1-part-0.safetensors")
    with pytest.raises(CheckpointError, match="cut already"):
        await folder.reader.read_header(opened)


async def test_parsing_a_header_leaves_no_memory_charged(make_folder):
    folder = await make_folder()
    assert folder.cache.budget.bytes_used == 0


async def test_a_file_that_was_replaced_is_an_error(make_folder, checkpoints, tensors):
    folder = await make_folder(selection=sliced(a=Shard(0)))
    folder.memory.replace(folder.opened.name, checkpoints.shard(tensors))
    with folder.cache.pinned("a", folder.shard) as file:
        for name in ("a", "head"):
            with pytest.raises(ObjectChangedError):
                await folder.reader.read_tensor(folder.opened, file, name, is_whole_model=False)
    assert folder.cache.statistics(0).bytes_held == 0


async def test_chunks_are_as_large_as_asked_for(make_folder):
    folder = await make_folder(chunk_size=4096)
    with folder.cache.pinned("a", folder.shard) as file:
        begun = folder.reads
        await folder.reader.read_tensor(folder.opened, file, "a", is_whole_model=False)
    assert folder.reads - begun == 2
