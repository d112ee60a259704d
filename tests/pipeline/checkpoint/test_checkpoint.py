"""A checkpoint is opened: its files are chosen by name, their headers read, and what makes up no whole is refused."""

import json

import numpy as np
import pytest

from asyncshard.errors import CheckpointError, FormatError, NamesError, ObjectNotFoundError
from asyncshard.pipeline.checkpoint.checkpoint import (
    CheckpointInfo,
    Selection,
    TiedShard,
    choose_files,
    names_at_ends,
    open_checkpoint,
    require_wanted,
)
from asyncshard.plan.tensor_filter import TensorFilter
from asyncshard.plan.tp.plan import TpPlan
from asyncshard.testing import MemoryStore

INDEX = "model.safetensors.index.json"
ONE = {"embed_tokens.weight": np.zeros((4, 2), "<f4"), "a": np.zeros(3, "u1")}
OTHER = {"b": np.zeros(5, "u1"), "lm_head.weight": np.zeros((4, 2), "<f4")}


@pytest.fixture
def indexed(checkpoints):
    return checkpoints.hugging_face_files(ONE, OTHER)


@pytest.fixture
def open_files(threads, account):
    async def open_files(files, **selection):
        return await open_checkpoint(MemoryStore(files), Selection(**selection), threads, account)

    return open_files


async def test_an_index_chooses_files_and_makes_a_whole_model(indexed, threads):
    store = MemoryStore({**indexed, "other.safetensors": b""})
    found = await choose_files(store, Selection(), threads)
    assert found.files == ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    assert (found.is_whole, found.are_of_rank, found.index_bytes) == (True, False, len(indexed[INDEX]))


async def test_only_files_with_a_wanted_tensor_are_chosen_of_an_index(indexed, threads):
    found = await choose_files(MemoryStore(indexed), Selection(tensor_filter=TensorFilter("b")), threads)
    assert found.files == ("model-00002-of-00002.safetensors",)


async def test_a_rank_has_its_own_files_and_no_whole_model_by_itself(checkpoints, threads):
    files = {name: data for rank in (0, 1) for name, data in checkpoints.rank_files(ONE, OTHER, rank=rank).items()}
    found = await choose_files(MemoryStore(files), Selection(rank=1, world_size=2), threads)
    assert found.files == ("model-rank-1-part-0.safetensors", "model-rank-1-part-1.safetensors")
    assert (found.are_of_rank, found.weight_map) == (True, None)


async def test_rank_shards_are_not_cut_a_second_time(checkpoints, threads):
    store = MemoryStore(checkpoints.rank_files(ONE))
    plan = TpPlan({"a": "replicate"})
    with pytest.raises(CheckpointError, match="the tensors of rank shards are cut already"):
        await choose_files(store, Selection(tp_plan=plan, world_size=2), threads)
    assert (await choose_files(store, Selection(tp_plan=plan), threads)).are_of_rank


async def test_nothing_to_load_is_not_found(open_files):
    with pytest.raises(ObjectNotFoundError, match="memory://checkpoint"):
        await open_files({"readme.md": b""})


async def test_tensors_keep_the_order_of_the_files(open_files, indexed, account):
    checkpoint = await open_files(indexed)
    assert list(CheckpointInfo(checkpoint)) == [*ONE, *OTHER]
    assert (checkpoint.tensors_total, checkpoint.bytes_total) == (4, 32 + 3 + 5 + 32)
    assert account.header_bytes == sum(shard.nbytes for shard in checkpoint.shards)


async def test_facts_of_tensors_are_a_mapping_by_name(open_files, indexed):
    info = CheckpointInfo(await open_files(indexed))
    assert (info["b"].dtype, info["b"].shape) == ("U8", (5,))
    assert ("a" in info, "c" in info, len(info)) == (True, False, 4)
    assert repr(info) == "<4 tensors in 2 shards>"
    with pytest.raises(KeyError, match="c"):
        info["c"]


async def test_names_of_an_embedding_and_an_output_layer_are_kept_with_the_checkpoint(open_files, indexed):
    checkpoint = await open_files(indexed)
    assert checkpoint.ends == names_at_ends(checkpoint.shards) == ("embed_tokens.weight", "lm_head.weight")


async def test_a_tensor_in_two_shards_is_refused_with_both_files(open_files, checkpoints):
    with pytest.raises(CheckpointError, match=r"'a' in model-rank-0-part-0\.\w+ and model-rank-0-part-1\.\w+"):
        await open_files(checkpoints.rank_files(ONE, {"a": ONE["a"]}))


async def test_an_index_that_names_a_tensor_of_another_file_is_refused(open_files, indexed):
    index = json.loads(indexed[INDEX])
    index["weight_map"]["a"] = "model-00002-of-00002.safetensors"
    with pytest.raises(CheckpointError, match="'a'"):
        await open_files({**indexed, INDEX: json.dumps(index).encode()})


async def test_of_several_faulty_files_the_first_is_named(open_files, checkpoints):
    files = dict.fromkeys(checkpoints.rank_files(ONE, OTHER), b"")
    with pytest.raises(FormatError, match="model-rank-0-part-0"):
        await open_files(files)


async def test_tied_tensors_are_counted_once_they_are_shards(open_files, indexed):
    checkpoint = await open_files(indexed)
    shard = checkpoint.shards[1]
    tied = checkpoint._replace(shards=checkpoint.shards[:1], tied=(TiedShard("x", "b", 5, shard),))
    assert tied.tensors_total == 2
    assert tied.with_tied().shards == checkpoint.shards
    assert tied.with_tied().tied == ()


async def test_a_name_is_wanted_unless_a_filter_leaves_it_out(open_files, indexed):
    checkpoint = await open_files(indexed)
    assert checkpoint.is_wanted("anything")
    assert not checkpoint._replace(tensor_filter=TensorFilter("a")).is_wanted("b")


def test_a_selection_slices_if_a_plan_or_a_filter_may_leave_something_out():
    assert not Selection(rank=1, world_size=2).is_sliced
    assert Selection(tp_plan="auto").is_sliced
    assert Selection(tensor_filter=TensorFilter("a")).is_sliced


def test_a_filter_that_names_absent_tensors_or_finds_none_is_refused():
    require_wanted(1, [], "path")
    with pytest.raises(
        NamesError, match="path: the tensor_filter names tensors that are not there: 'a', 'b'"
    ) as caught:
        require_wanted(1, ["b", "a"], "path")
    assert caught.value.missing == ("a", "b")
    with pytest.raises(NamesError, match="path: the tensor_filter matches no tensor"):
        require_wanted(0, [], "path")
