"""A checkpoint is opened as a rank's part of it. Whole loads of slices are in ``tests/loaders/test_slices.py``."""

import json

import numpy as np
import pytest

from asyncshard.errors import CheckpointError, NamesError, ObjectNotFoundError
from asyncshard.pipeline.checkpoint.checkpoint import Selection
from asyncshard.pipeline.checkpoint.slicing import covers_gaps, find_plan, open_sliced, slice_shard
from asyncshard.plan.division.placements import Shard
from asyncshard.plan.tensor_filter import TensorFilter
from asyncshard.plan.tp.plan import TpPlan
from asyncshard.stores.base import Pacing
from asyncshard.testing import MemoryStore

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ONE = {EMBED: np.zeros((8, 4), "<f4"), "q.weight": np.zeros((6, 4), "u1")}
OTHER = {"o.weight": np.zeros((4, 6), "u1"), "norm": np.zeros(3, "u1")}
PLAN = TpPlan({"q.weight": Shard(0), "o.weight": Shard(1)})
TIED = {"config.json": b'{"tie_word_embeddings": true}'}


@pytest.fixture
def files(checkpoints):
    return checkpoints.hugging_face_files(ONE, OTHER)


@pytest.fixture
def open_rank(threads, account):
    async def open_rank(files, *, max_gap=0, **selection):
        store = MemoryStore(files)
        store.pacing = Pacing(max_gap_bytes=max_gap)
        return await open_sliced(store, Selection(**selection), threads, account, chunk_size=1 << 14)

    return open_rank


def shapes(checkpoint):
    return {name: info.shape for shard in checkpoint.shards for name, info in shard.header.items()}


@pytest.mark.parametrize("rank", [0, 1])
async def test_shards_are_a_rank_s_part_of_the_files(open_rank, files, rank):
    checkpoint = await open_rank(files, tp_plan=PLAN, rank=rank, world_size=2)
    assert shapes(checkpoint) == {EMBED: (8, 4), "q.weight": (3, 4), "o.weight": (4, 3), "norm": (3,)}


async def test_files_of_which_nothing_is_wanted_are_left_out(open_rank, checkpoints):
    checkpoint = await open_rank(checkpoints.rank_files(ONE, OTHER), tensor_filter=TensorFilter(["norm"]))
    assert shapes(checkpoint) == {"norm": (3,)}
    assert len(checkpoint.shards) == 1


async def test_a_filter_may_not_name_what_no_file_has(open_rank, checkpoints):
    with pytest.raises(NamesError, match="'nothing'"):
        await open_rank({"model.safetensors": checkpoints.shard(ONE)}, tensor_filter=TensorFilter(["nothing", EMBED]))


async def test_a_rule_that_matches_no_tensor_is_refused(open_rank, files):
    with pytest.raises(NamesError, match="v_proj"):
        await open_rank(files, tp_plan=TpPlan({"v_proj": Shard(0)}), world_size=2)


async def test_a_tied_tensor_with_a_rule_of_its_own_is_a_shard_beside_the_others(open_rank, files):
    plan = TpPlan({HEAD: Shard(0)})
    checkpoint = await open_rank({**files, **TIED}, tp_plan=plan, rank=1, world_size=2)
    (tied,) = checkpoint.tied
    assert (tied.name, tied.stored_name, tied.stored_nbytes) == (HEAD, EMBED, 128)
    assert tied.shard.header[HEAD].shape == (4, 4)
    assert checkpoint.ties == ((HEAD, EMBED),)


async def test_scratch_is_charged_only_where_gaps_are_read_too(open_rank, files, account):
    for max_gap, is_covering in ((0, False), (1 << 10, True)):
        before = account.header_bytes
        checkpoint = await open_rank(files, tp_plan=PLAN, world_size=2, max_gap=max_gap)
        assert covers_gaps(checkpoint, max_gap) == (checkpoint.scratch_bytes > 0) == is_covering
        held = sum(file.nbytes for file in checkpoint.with_tied().shards)
        assert account.header_bytes - before == held + checkpoint.scratch_bytes


async def test_a_shard_of_which_the_rank_has_all_is_the_file_itself(open_file):
    _, file = await open_file(OTHER)
    assert slice_shard(file, Selection(world_size=2), TpPlan({"norm": "replicate"})) is file


async def test_a_shard_that_cannot_be_divided_so_is_refused_by_its_path(open_file):
    _, file = await open_file(OTHER)
    with pytest.raises(CheckpointError, match=r"memory://checkpoint/model\.safetensors.*'norm'"):
        slice_shard(file, Selection(world_size=2), TpPlan({"norm": Shard(1)}))


async def test_a_plan_of_the_users_own_needs_no_config(threads):
    for plan in (None, PLAN):
        assert await find_plan(MemoryStore({}), Selection(tp_plan=plan), threads) is plan


async def test_auto_takes_the_plan_of_the_model_that_the_config_names(threads):
    config = {"model_type": "llama", "num_attention_heads": 8, "num_key_value_heads": 8, "hidden_size": 64}
    store = MemoryStore({"config.json": json.dumps(config).encode()})
    plan = await find_plan(store, Selection(tp_plan="auto", world_size=2), threads)
    name, shape = "model.layers.0.self_attn.q_proj.weight", (64, 64)
    assert plan.placement_of(name, shape).dim in (0, -2)


async def test_auto_without_a_config_says_what_is_missing_and_what_helps(threads):
    with pytest.raises(ObjectNotFoundError, match=r'tp_plan="auto" needs it.*or pass a tp_plan') as caught:
        await find_plan(MemoryStore({}), Selection(tp_plan="auto"), threads)
    assert caught.value.path == "memory://checkpoint/config.json"
