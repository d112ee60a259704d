"""A single name that a file does not hold is found under the name that it is tied to.

``get_tensor`` by such names is tested with the other ties, in ``test_ties.py``.
"""

import numpy as np
import pytest

from asyncshard.pipeline.checkpoint.checkpoint import Checkpoint, Selection
from asyncshard.pipeline.checkpoint.opened_file import FileReader
from asyncshard.pipeline.checkpoint.tied_tensor import embedding_beside, find_tied, possible_tie, ties_of_file
from asyncshard.plan.division.placements import Shard
from asyncshard.plan.tensor_filter import TensorFilter
from asyncshard.plan.tp.plan import TpPlan

EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "norm.weight"
TENSORS = {EMBED: np.zeros((8, 4), "u1"), NORM: np.zeros(3, "u1")}
PLAN = TpPlan({HEAD: Shard(0)})


@pytest.fixture
def find(open_file, threads):
    """Look for a name in a file of these metadata and config."""

    async def find(name, *, metadata=None, config=None, is_whole_model=True, **selection):
        store, file = await open_file(TENSORS, metadata=metadata)
        if config is not None:
            store.replace("config.json", config)
        return await find_tied(store, file, name, Selection(**selection), threads, is_whole_model=is_whole_model)

    return find


@pytest.fixture
async def told(open_file):
    """A checkpoint of one file, whose metadata tells a tie."""
    store, file = await open_file(TENSORS, metadata={HEAD: EMBED})
    return Checkpoint((file,), FileReader(store))


async def test_the_metadata_tells_a_tie_of_any_file(find):
    tied = await find(HEAD, metadata={HEAD: EMBED}, is_whole_model=False)
    assert (tied.stored_name, tied.alone) == (EMBED, None)


async def test_a_config_tells_it_of_a_whole_model_alone(find):
    config = b'{"tie_word_embeddings": true}'
    assert (await find(HEAD, config=config)).stored_name == EMBED
    assert await find(HEAD, config=config, is_whole_model=False) is None


@pytest.mark.parametrize("config", [None, b'{"tie_word_embeddings": false}'])
async def test_without_a_word_of_either_there_is_no_tie(find, config):
    assert await find(HEAD, config=config) is None


async def test_a_name_that_is_no_output_layer_s_has_no_tie_by_the_config(find):
    assert await find("other.weight", config=b'{"tie_word_embeddings": true}') is None


async def test_a_rule_for_the_name_has_a_part_of_its_own_read(find):
    tied = await find(HEAD, metadata={HEAD: EMBED}, tp_plan=PLAN, rank=1, world_size=2)
    assert tied.stored_name == EMBED
    assert {name: info.shape for name, info in tied.alone.header.items()} == {HEAD: (4, 4)}


async def test_what_the_filter_leaves_out_is_not_found_by_another_name(find):
    metadata = {HEAD: EMBED}
    assert await find(HEAD, metadata=metadata, tensor_filter=TensorFilter([NORM])) is None
    assert await find(HEAD, metadata=metadata, tensor_filter=TensorFilter([EMBED])) is None
    assert await find(HEAD, metadata=metadata, tensor_filter=TensorFilter([EMBED, HEAD])) is not None


async def test_a_possible_tie_says_whether_it_was_told(told, open_file):
    assert possible_tie(told, HEAD) == (EMBED, True)
    store, file = await open_file(TENSORS)
    silent = Checkpoint((file,), FileReader(store))
    assert possible_tie(silent, HEAD) == (EMBED, False)
    assert possible_tie(silent, "other.weight") is None


async def test_an_output_layer_stands_beside_the_one_embedding_of_a_table(open_file):
    _, file = await open_file(TENSORS)
    assert embedding_beside(file.header.table, HEAD) == EMBED
    assert embedding_beside(file.header.table, NORM) is None
    _, two = await open_file({**TENSORS, "other.embed_tokens.weight": TENSORS[EMBED]})
    assert embedding_beside(two.header.table, HEAD) is None


async def test_ties_of_a_file_leave_out_names_with_a_rule_of_their_own(told):
    assert ties_of_file(told, Selection()) == {HEAD: EMBED}
    assert ties_of_file(told, Selection(tp_plan=TpPlan({EMBED: Shard(0)}))) == {HEAD: EMBED}
    assert ties_of_file(told, Selection(tp_plan=PLAN)) == {}
