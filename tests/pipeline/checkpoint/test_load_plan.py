"""The plan of a load says, file by file, what is wanted and what is read."""

import numpy as np

from asyncshard.pipeline.checkpoint.checkpoint import Checkpoint, Selection
from asyncshard.pipeline.checkpoint.load_plan import FilePlan, LoadPlan
from asyncshard.pipeline.checkpoint.opened_file import FileReader
from asyncshard.pipeline.checkpoint.slicing import slice_shard
from asyncshard.plan.division.placements import Shard
from asyncshard.plan.tp.plan import TpPlan

TENSORS = {"a": np.zeros((4, 8), "u1"), "b": np.zeros(3, "u1"), "empty": np.zeros(0, "u1")}


async def test_whole_files_are_read_as_they_are_needed(open_file):
    store, file = await open_file(TENSORS)
    plan = LoadPlan.of(Checkpoint((file,), FileReader(store)), 1 << 20)
    assert plan.files == (FilePlan(file.path, 3, 35, 35),)


async def test_gaps_between_slices_count_as_read_where_they_are_read_too(open_file):
    store, file = await open_file(TENSORS)
    half = slice_shard(file, Selection(rank=0, world_size=2), TpPlan({"a": Shard(1)}))
    checkpoint = Checkpoint((half,), FileReader(store))
    # Of each row of 8 bytes the first 4: three gaps of 4 bytes between the rows, and one before the next tensor.
    assert LoadPlan.of(checkpoint, 3).files == (FilePlan(file.path, 3, 16 + 3, 16 + 3),)
    assert LoadPlan.of(checkpoint, 4).files == (FilePlan(file.path, 3, 16 + 3, 32 + 3),)


async def test_a_tied_tensor_adds_to_the_file_that_it_is_read_from(open_file):
    store, file = await open_file(TENSORS)
    _, other = await open_file(TENSORS, "other.safetensors")
    plan = LoadPlan.of(Checkpoint((file, other, file), FileReader(store)), 0)
    assert plan.files == (FilePlan(file.path, 6, 70, 70), FilePlan(other.path, 3, 35, 35))
    assert (plan.tensors, plan.bytes_needed, plan.bytes_read) == (9, 105, 105)


async def test_a_checkpoint_of_no_files_has_an_empty_plan(open_file):
    store, _ = await open_file({})
    plan = LoadPlan.of(Checkpoint((), FileReader(store)), 0)
    assert (plan.files, plan.tensors, plan.bytes_needed, plan.bytes_read) == ((), 0, 0, 0)
