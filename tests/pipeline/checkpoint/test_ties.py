"""Tied tensors: written once, and restored under each of their names."""

import json
from unittest.mock import ANY

import numpy as np
import pytest
import torch

import asyncshard
from asyncshard import AsyncShardLoader, IncrementalShardLoader, ShardedStateLoader
from asyncshard.errors import AccessDeniedError, CheckpointError, DestinationError, NamesError
from asyncshard.format.save_id import SAVE_KEY
from asyncshard.plan.division.placements import Shard
from asyncshard.plan.tp.plan import TpPlan
from asyncshard.testing import MemoryStore

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def tensors():
    random = np.random.default_rng(0)
    return {
        EMBED: random.random((64, 16), np.float32),
        "model.norm.weight": random.random(16, np.float32),
        "model.q.weight": random.random((16, 16), np.float32),
    }


@pytest.fixture
def state(tensors):
    return {name: np.zeros_like(tensor) for name, tensor in {**tensors, HEAD: tensors[EMBED]}.items()}


@pytest.fixture(params=["metadata", "config"])
def tied(request, tmp_path, tensors):
    """A checkpoint without its output layer, which says that it is the embedding."""
    from safetensors.numpy import save_file

    metadata = {"format": "pt", **({HEAD: EMBED} if request.param == "metadata" else {})}
    save_file(tensors, tmp_path / "model.safetensors", metadata=metadata)
    if request.param == "config":
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": True}))
    return tmp_path


async def test_a_tied_tensor_with_memory_of_its_own_is_filled(tied, tensors, state):
    loader = ShardedStateLoader()
    await loader.load_weights(tied, state)
    assert np.array_equal(state[HEAD], tensors[EMBED])
    assert all(np.array_equal(state[name], tensor) for name, tensor in tensors.items())
    assert loader.last_report.missing == ()


async def test_a_tied_tensor_in_the_same_memory_is_read_once(tied, tensors, state):
    state[HEAD] = state[EMBED]
    stream = AsyncShardLoader().stream(tied, state)
    statistics = await stream.drain()
    assert statistics.tensors_done == len(tensors)
    assert np.array_equal(state[HEAD], tensors[EMBED])


async def test_a_tied_destination_is_filled_by_streams_by_torch_and_with_another_dtype(tied, tensors, state):
    into = {name: torch.zeros(tensor.shape, dtype=torch.float64) for name, tensor in state.items()}
    names = {name async for name, _ in AsyncShardLoader().stream(tied, into, cast=True)}
    assert names == set(state)
    assert np.array_equal(into[HEAD].numpy(), tensors[EMBED].astype(np.float64))


@pytest.mark.parametrize("rank", range(3))
async def test_a_tied_tensor_is_the_ranks_slice_of_the_stored_one(tied, tensors, rank):
    plan = {"model.q": Shard(0), "model.embed_tokens": Shard(0)}
    whole = tensors[EMBED]
    rows = whole[22 * rank : 22 * (rank + 1)]
    state = {name: np.zeros_like(tensor) for name, tensor in tensors.items()}
    state["model.q.weight"] = np.zeros_like(tensors["model.q.weight"][6 * rank : 6 * (rank + 1)])
    state[EMBED], state[HEAD] = np.zeros_like(rows), np.zeros_like(rows)
    await ShardedStateLoader(rank=rank, world_size=3, tp_plan=plan).load_weights(tied, state)
    assert np.array_equal(state[HEAD], rows)
    assert np.array_equal(state[EMBED], rows)


async def test_a_refresh_changes_the_tied_tensor(tied, tensors, state):
    from safetensors.numpy import save_file

    loader = ShardedStateLoader()
    await loader.load_weights(tied, state)
    tensors[EMBED] = tensors[EMBED] + 1
    save_file(tensors, tied / "model.safetensors", metadata={HEAD: EMBED})
    update = await loader.prepare_refresh(tied, state, since=loader.last_report.version)
    await update.apply()
    assert np.array_equal(state[HEAD], tensors[EMBED])
    assert np.array_equal(state[EMBED], tensors[EMBED])


async def test_an_output_layer_that_nothing_ties_is_missing(tmp_path, tensors, state):
    from safetensors.numpy import save_file

    save_file(tensors, tmp_path / "model.safetensors")
    for config in (None, "{}", '{"tie_word_embeddings": false}', "[", '{"tie_word_embeddings": 3}'):
        if config is not None:
            (tmp_path / "config.json").write_text(config)
        with pytest.raises(NamesError, match=HEAD):
            await ShardedStateLoader().load_weights(tmp_path, state)


async def test_a_config_is_asked_for_only_where_the_output_layer_is_missing(checkpoints, tensors):
    files = {**checkpoints.rank_files(tensors), "config.json": b'{"tie_word_embeddings": true}'}
    asked = []

    class Store(MemoryStore):
        async def read(self, name, *, max_bytes=None):
            asked.append(name)
            return await super().read(name, max_bytes=max_bytes)

    state = {name: np.zeros_like(tensor) for name, tensor in tensors.items()}
    await ShardedStateLoader().load_weights(Store(files), state)
    assert asked == []
    await ShardedStateLoader().load_weights(Store(files), {**state, HEAD: np.zeros_like(tensors[EMBED])})
    assert asked == ["config.json"]


@pytest.mark.parametrize("library", ["np", "pt"])
async def test_tied_tensors_are_written_once_and_come_back_as_one(tmp_path, tensors, library):
    made = tensors if library == "np" else {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}
    await asyncshard.save_sharded_state({**made, HEAD: made[EMBED]}, tmp_path, rank=0, metadata={"step": "3"})
    (header,) = [await asyncshard.read_header(path) for path in tmp_path.iterdir()]
    assert set(header) == set(tensors) - {EMBED} | {HEAD}  # the smaller name stays
    assert header.metadata == {"step": "3", EMBED: HEAD, f"asyncshard.tie.{EMBED}": HEAD, SAVE_KEY: ANY}
    weights = await asyncshard.load(tmp_path, framework=library)
    assert weights[HEAD] is weights[EMBED]
    assert np.array_equal(np.asarray(weights[EMBED]), tensors[EMBED])
    assert set(weights) == {*tensors, HEAD}
    async with AsyncShardLoader().stream(tmp_path) as stream:
        assert stream.ties == {EMBED: HEAD}
        await stream.drain()


async def test_views_of_a_written_tensor_are_no_ties(tmp_path, tensors):
    views = {"rows": tensors[EMBED][:8], "flat": tensors[EMBED].reshape(-1)}
    await asyncshard.save_sharded_state({**tensors, **views}, tmp_path, rank=0)
    (header,) = [await asyncshard.read_header(path) for path in tmp_path.iterdir()]
    assert header.metadata == {SAVE_KEY: ANY}


@pytest.mark.parametrize("max_gap", [None, 0, 1 << 20])
@pytest.mark.parametrize("placement", [None, Shard(0), Shard(1)])
async def test_several_names_may_be_tied_to_one_tensor(tmp_path, tensors, placement, max_gap):
    from safetensors.numpy import save

    whole = tensors[EMBED]
    ties = {HEAD: EMBED, "encoder.embed.weight": EMBED, "decoder.embed.weight": EMBED, "r.weight": "model.q.weight"}
    files = {"model.safetensors": save(tensors, metadata=ties)}
    (tmp_path / "model.safetensors").write_bytes(files["model.safetensors"])
    path = tmp_path
    if max_gap is not None:
        path = MemoryStore(files)
        path.pacing = path.pacing._replace(max_gap_bytes=max_gap)
    cut = {None: whole, Shard(0): whole[32:], Shard(1): whole[:, 8:]}[placement]
    expected = {**tensors, EMBED: cut} | {name: cut if kept == EMBED else tensors[kept] for name, kept in ties.items()}
    state = {name: np.zeros_like(tensor) for name, tensor in expected.items()}
    plan = None if placement is None else {"model.embed_tokens": placement}
    loader = ShardedStateLoader(rank=1, world_size=2, tp_plan=plan, memory_budget_mb=1)
    await loader.load_weights(path, state)
    assert all(np.array_equal(state[name], tensor) for name, tensor in expected.items())
    assert loader.budget.bytes_used == 0


@pytest.mark.parametrize("says", ["metadata", "config"])
async def test_a_tied_tensor_that_the_filter_leaves_out_is_not_restored(says, tensors):
    from safetensors.numpy import save

    # The file has an output layer of its own, whatever is said of it.
    tensors = {**tensors, HEAD: tensors[EMBED] + 1}
    files = {"model.safetensors": save(tensors, metadata={HEAD: EMBED} if says == "metadata" else None)}
    if says == "config":
        files["config.json"] = b'{"tie_word_embeddings": true}'
    loader = ShardedStateLoader(tensor_filter="model.*")
    assert set(await loader.load_weights(MemoryStore(files))) == set(tensors) - {HEAD}
    with pytest.raises(NamesError) as caught:
        await loader.load_weights(MemoryStore(files), {name: np.zeros_like(each) for name, each in tensors.items()})
    assert caught.value.missing == (HEAD,)


# A plan with a rule for the tied name


@pytest.mark.parametrize("plan", [{"lm_head": "colwise_gather_output"}, {"lm_head": Shard(0), "model.q": Shard(1)}])
async def test_a_tied_name_with_a_rule_is_divided_by_it(tied, tensors, plan):
    loader = ShardedStateLoader(rank=1, world_size=4, tp_plan=plan)
    whole, rows = tensors[EMBED], tensors[EMBED][16:32]
    state = {EMBED: np.zeros_like(whole), HEAD: np.zeros_like(rows)}
    await loader.load_weights(tied, state, strict=False)
    assert np.array_equal(state[EMBED], whole)
    assert np.array_equal(state[HEAD], rows)
    weights = await AsyncShardLoader(loader).load_weights_async(tied)
    assert np.array_equal(weights[EMBED], whole)
    assert np.array_equal(weights[HEAD], rows)
    streamed = {name: tensor async for name, tensor in loader.iterate_weights(tied)}
    assert np.array_equal(streamed[HEAD], rows)


async def test_a_tied_name_without_a_destination_or_with_the_same_memory_needs_no_read(tied, tensors):
    loader = ShardedStateLoader(rank=1, world_size=4, tp_plan={"lm_head": "colwise"})
    state = {name: np.zeros_like(tensor) for name, tensor in tensors.items()}
    await loader.load_weights(tied, state)
    assert np.array_equal(state[EMBED], tensors[EMBED])
    state[HEAD] = state[EMBED]
    await loader.load_weights(tied, state)
    assert np.array_equal(state[HEAD], tensors[EMBED])


async def test_a_tied_tensor_that_is_divided_like_the_stored_one_shares_its_memory(tied, tensors):
    plan = {"lm_head": "colwise", "model.embed_tokens": Shard(0)}
    weights = await ShardedStateLoader(rank=1, world_size=4, tp_plan=plan).load_weights(tied)
    assert np.array_equal(weights[EMBED], tensors[EMBED][16:32])
    assert HEAD not in weights or weights[HEAD] is weights[EMBED]


async def test_a_filter_leaves_a_tied_tensor_out(tied, tensors):
    loader = ShardedStateLoader(rank=1, world_size=4, tp_plan={"lm_head": "colwise"}, tensor_filter=["model.*"])
    assert set(await loader.load_weights(tied)) == set(tensors)


async def test_a_rule_for_a_tied_name_without_a_tie_matches_nothing(tmp_path, tensors):
    from safetensors.numpy import save_file

    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(NamesError, match="'lm_head'"):
        await ShardedStateLoader(world_size=4, tp_plan={"lm_head": "colwise"}).load_weights(tmp_path)


async def test_a_tied_tensor_that_its_rule_cannot_divide_is_an_error(tied):
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight'"):
        await ShardedStateLoader(world_size=4, tp_plan={"lm_head": Shard(3)}).load_weights(tied)


async def test_a_refresh_divides_the_tied_tensor_by_its_rule(tied, tensors):
    from safetensors.numpy import save_file

    loader = ShardedStateLoader(rank=1, world_size=4, tp_plan={"lm_head": "colwise"})
    state = {name: np.zeros_like(tensor) for name, tensor in tensors.items()}
    state[HEAD] = np.zeros_like(tensors[EMBED][16:32])
    await loader.load_weights(tied, state)
    tensors[EMBED] = tensors[EMBED] + 1
    save_file(tensors, tied / "model.safetensors", metadata={HEAD: EMBED})
    update = await loader.prepare_refresh(tied, state, since=loader.last_report.version)
    await update.apply()
    assert np.array_equal(state[HEAD], tensors[EMBED][16:32])


@pytest.mark.parametrize("rank", range(4))
async def test_memory_of_the_stored_tensor_serves_only_if_it_has_the_ranks_bytes(tied, tensors, rank):
    loader = ShardedStateLoader(rank=rank, world_size=4, tp_plan={"lm_head": Shard(0)})
    state = {name: np.zeros_like(tensor) for name, tensor in tensors.items()}
    await loader.load_weights(tied, {**state, HEAD: state[EMBED][16 * rank : 16 * (rank + 1)]})
    assert np.array_equal(state[EMBED], tensors[EMBED])
    other = (rank + 1) % 4
    with pytest.raises(DestinationError, match="share memory"):
        await loader.load_weights(tied, {**state, HEAD: state[EMBED][16 * other : 16 * (other + 1)]})


async def test_memory_of_another_slice_does_not_serve(tied, tensors):
    plan = {"lm_head": Shard(1), "model.embed_tokens": Shard(0)}
    state = {name: np.zeros_like(tensor) for name, tensor in tensors.items()}
    state[EMBED] = np.zeros_like(tensors[EMBED][16:32])
    state[HEAD] = state[EMBED].reshape(64, 4)
    with pytest.raises(DestinationError, match="share memory"):
        await ShardedStateLoader(rank=1, world_size=4, tp_plan=plan).load_weights(tied, state)


@pytest.mark.parametrize("world_size", [1, 4])
@pytest.mark.parametrize(
    "embedding", [{}, {"model.embed_tokens": Shard(0, pieces=2)}, {"model.embed_tokens": Shard(0)}]
)
async def test_every_rank_of_every_world_has_the_same_names(tied, tensors, world_size, embedding):
    if world_size == 1 and embedding.get("model.embed_tokens", Shard(0)).pieces:
        return
    for rank in range(world_size):
        plan = {"lm_head": "colwise", **embedding}
        weights = await ShardedStateLoader(rank=rank, world_size=world_size, tp_plan=plan).load_weights(tied)
        assert set(weights) == {*tensors, HEAD}
        assert np.array_equal(weights[HEAD], np.array_split(tensors[EMBED], world_size)[rank])


async def test_names_without_a_rule_are_listed_though_a_tied_one_has_one(tied):
    plan = {"lm_head": "colwise", "model.embed_tokens": Shard(0), "model.q": "replicate"}
    with pytest.raises(NamesError, match=r"no rule of the tp_plan matches 'model\.norm\.weight'") as caught:
        await ShardedStateLoader(world_size=4, tp_plan=TpPlan(plan, unmatched="error")).load_weights(tied)
    assert caught.value.unexpected == ("model.norm.weight",)


async def test_the_plan_of_a_load_counts_a_tied_tensor(tied, tensors):
    loader = ShardedStateLoader(rank=1, world_size=4, tp_plan={"lm_head": "colwise"})
    plan = await loader.plan_weights(tied)
    (file,) = plan.files
    assert file.tensors == len(tensors) + 1
    assert plan.bytes_needed == sum(tensor.nbytes for tensor in tensors.values()) + tensors[EMBED].nbytes // 4
    async with AsyncShardLoader(loader).stream(tied) as stream:
        assert stream.plan == plan
        await stream.drain()


async def test_an_output_layer_within_a_submodule_is_divided_by_its_rule(tmp_path, tensors):
    from safetensors.numpy import save_file

    embedding, head = f"language_model.{EMBED}", f"language_model.{HEAD}"
    save_file({embedding: tensors[EMBED]}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"tie_word_embeddings": True}))
    loader = ShardedStateLoader(rank=1, world_size=4, tp_plan={"language_model.lm_head": "colwise"})
    weights = await loader.load_weights(tmp_path)
    assert np.array_equal(weights[head], tensors[EMBED][16:32])


@pytest.fixture(params=["metadata", "config"])
def tied_index(request, tmp_path, tensors):
    """The same in two files, with an index."""
    from safetensors.numpy import save_file

    folder = tmp_path / "index"
    folder.mkdir()
    weight_map = {EMBED: "a.safetensors", **{name: "b.safetensors" for name in tensors if name != EMBED}}
    metadata = {HEAD: EMBED} if request.param == "metadata" else None
    for file in ("a.safetensors", "b.safetensors"):
        held = {name: tensors[name] for name in tensors if weight_map[name] == file}
        save_file(held, folder / file, metadata=metadata if EMBED in held else None)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"tie_word_embeddings": request.param == "config"}))
    return folder


@pytest.mark.parametrize("embedding", [{}, {"model.embed_tokens": Shard(0)}])
async def test_a_filter_may_want_the_tied_tensor_without_the_stored_one(tied, tied_index, embedding, tensors):
    def is_wanted(name):
        return name in (HEAD, "model.norm.weight")

    plan = {"lm_head": "colwise", **embedding}
    loader = ShardedStateLoader(rank=1, world_size=4, tp_plan=plan, tensor_filter=is_wanted)
    for path in (tied, tied_index):
        weights = await loader.load_weights(path)
        assert set(weights) == {HEAD, "model.norm.weight"}
        assert np.array_equal(weights[HEAD], tensors[EMBED][16:32])


async def test_a_rule_for_a_tied_name_is_used_though_the_file_of_its_embedding_is_not_opened(tied_index, tensors):
    loader = ShardedStateLoader(rank=1, world_size=4, tp_plan={"lm_head": "colwise"}, tensor_filter="model.norm.*")
    assert set(await loader.load_weights(tied_index)) == {"model.norm.weight"}


async def test_resharding_keeps_them_one_and_needs_them_divided_alike(tied, tensors, tmp_path):
    from asyncshard import reshard

    alike = {"lm_head": "colwise", "model.embed_tokens": Shard(0)}
    await reshard(tied, tmp_path / "ranks", world_size=4, tp_plan=alike)
    state = {name: np.zeros_like(tensor) for name, tensor in tensors.items()}
    state[EMBED], state[HEAD] = np.zeros_like(tensors[EMBED][:16]), np.zeros_like(tensors[EMBED][:16])
    await ShardedStateLoader(rank=2, world_size=4).load_weights(tmp_path / "ranks", state)
    assert np.array_equal(state[HEAD], tensors[EMBED][32:48])
    assert np.array_equal(state[EMBED], tensors[EMBED][32:48])
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight' is tied to 'model\.embed_tokens\.weight'"):
        await reshard(tied, tmp_path / "others", world_size=4, tp_plan={"lm_head": "colwise"})
    assert not (tmp_path / "others").exists()
    await reshard(tied, tmp_path / "whole", world_size=1, tp_plan={"lm_head": "colwise"})
    assert np.array_equal((await asyncshard.load(tmp_path / "whole"))[EMBED], tensors[EMBED])


# Where everything is taken, and nobody asks for a name


CONFIGS = [
    {"model_type": "llama", "tie_word_embeddings": True},
    {"model_type": "gemma2"},
    {"model_type": "llava", "text_config": {"model_type": "qwen2", "tie_word_embeddings": True}},
    {"model_type": "llava", "text_config": {"model_type": "gemma"}},
    {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": {}},
]
SILENT = [
    {"model_type": "llama"},
    {"model_type": "gemma2", "tie_word_embeddings": False},
    {"model_type": "gemma3", "text_config": {"tie_word_embeddings": False}},
    {"model_type": "gemma2", "architectures": ["Gemma2ForSequenceClassification"]},
    {"tie_word_embeddings": "yes"},
]


@pytest.fixture
def write_config(tmp_path, tensors):
    """Write a checkpoint without an output layer, and its config."""
    from safetensors.numpy import save_file

    def write(config, name="model.safetensors", tensors=tensors):
        save_file(tensors, tmp_path / name)
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return write


@pytest.mark.parametrize("config", CONFIGS)
async def test_a_dict_a_stream_and_a_check_know_what_the_config_ties(write_config, tensors, state, config):
    path = write_config(config)
    weights = await asyncshard.load(path)
    assert set(weights) == {*tensors, HEAD}
    assert weights[HEAD] is weights[EMBED]
    async with AsyncShardLoader().stream(path) as stream:
        assert stream.ties == {HEAD: EMBED}
        assert {name async for name, _ in stream} == set(tensors)
    report = await asyncshard.check_checkpoint(path)
    assert report.ties == ((HEAD, EMBED),)
    assert report.is_ok
    await ShardedStateLoader().load_weights(path, state)
    assert np.array_equal(state[HEAD], tensors[EMBED])
    state[HEAD] = state[EMBED]
    async with AsyncShardLoader().stream(path, state) as stream:
        assert stream.ties == {HEAD: EMBED}


@pytest.mark.parametrize("config", SILENT)
async def test_nothing_is_made_up_where_the_config_ties_nothing(write_config, tensors, config):
    path = write_config(config)
    assert set(await asyncshard.load(path)) == set(tensors)
    assert (await asyncshard.check_checkpoint(path)).ties == ()


async def test_a_dict_of_ranks_has_the_slice_of_the_embedding(write_config, tensors):
    path = write_config(CONFIGS[1])
    loader = ShardedStateLoader(rank=1, world_size=4, tp_plan={"model.embed_tokens": Shard(0)})
    weights = await loader.load_weights(path)
    assert weights[HEAD] is weights[EMBED]
    assert np.array_equal(weights[HEAD], tensors[EMBED][16:32])


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "model-rank-0-part-0.safetensors"])
async def test_one_file_of_several_is_no_model(write_config, tensors, name):
    path = write_config(CONFIGS[0], name) / name
    assert set(await asyncshard.load(path)) == set(tensors)
    with pytest.raises(NamesError, match=r"there is no tensor 'lm_head\.weight'"):
        await IncrementalShardLoader().get_tensor(path, HEAD)


async def test_a_pipeline_stage_is_no_model(write_config, tensors):
    path = write_config(CONFIGS[0], "model-pp-0-tp-0-part-0.safetensors")
    write_config(CONFIGS[0], "model-pp-1-tp-0-part-0.safetensors", {HEAD: tensors[EMBED] + 1})
    assert set(await asyncshard.load(path)) == set(tensors)
    assert (await asyncshard.check_checkpoint(path)).ties == ()


async def test_a_config_that_may_not_be_read_ties_nothing_that_nobody_asked_for(checkpoints, tensors, state):
    class Store(MemoryStore):
        async def read(self, name, *, max_bytes=None):
            raise AccessDeniedError(f"{name} may not be read")

    store = Store(checkpoints.rank_files(tensors))
    assert set(await ShardedStateLoader().load_weights(store)) == set(tensors)
    with pytest.raises(AccessDeniedError):
        await ShardedStateLoader().load_weights(store, state)


async def test_text_of_the_metadata_is_no_tensor(tmp_path, tensors):
    from safetensors.numpy import save_file

    save_file(
        tensors, tmp_path / "model.safetensors", metadata={"format": "np", "type": EMBED, "a": "model.norm.weight"}
    )
    assert set(await asyncshard.load(tmp_path)) == set(tensors)
    state = {name: np.zeros_like(tensor) for name, tensor in tensors.items()}
    state["type"] = np.zeros_like(tensors[EMBED])
    await ShardedStateLoader().load_weights(tmp_path, state)
    assert np.array_equal(state["type"], tensors[EMBED])


async def test_what_save_model_writes_is_restored(tmp_path):
    from safetensors.torch import save_model

    model = torch.nn.Module()
    model.embed, model.head = torch.nn.Embedding(6, 4), torch.nn.Linear(4, 6, bias=False)
    model.head.weight = model.embed.weight
    save_model(model, str(tmp_path / "model.safetensors"))
    weights = await asyncshard.load(tmp_path, framework="pt")
    assert set(weights) == set(model.state_dict())
    assert torch.equal(weights["head.weight"], model.embed.weight)


# One tensor, or one file


async def get(path, name, **options):
    loader = IncrementalShardLoader(ShardedStateLoader(**options))
    async with loader:
        tensor = await loader.get_tensor(path, name)
        assert np.array_equal(await loader.get_tensor(path, name), tensor)
        assert loader.statistics().hits >= 1
    assert loader.budget.bytes_used == 0
    return tensor


@pytest.mark.parametrize("is_file", [True, False])
async def test_get_tensor_knows_the_ties_of_metadata_and_of_the_config(tied, tensors, is_file):
    path = tied / "model.safetensors" if is_file else tied
    assert np.array_equal(await get(path, HEAD), tensors[EMBED])
    async with IncrementalShardLoader() as loader:
        embedding = await loader.get_tensor(path, EMBED)
        used = loader.budget.bytes_used
        assert np.shares_memory(await loader.get_tensor(path, HEAD), embedding)
        assert loader.budget.bytes_used == used
        with pytest.raises(NamesError, match="there is no tensor 'other'"):
            await loader.get_tensor(path, "other")


@pytest.mark.parametrize("config", CONFIGS)
async def test_get_tensor_reads_the_config_as_a_load_does(write_config, tensors, config):
    assert np.array_equal(await get(write_config(config), HEAD), tensors[EMBED])


async def test_get_tensor_finds_a_tied_tensor_by_an_index(tied_index, tensors):
    assert np.array_equal(await get(tied_index, HEAD), tensors[EMBED])


async def test_get_tensor_takes_any_pair_of_the_metadata_for_the_asked_name(tmp_path, tensors):
    from safetensors.numpy import save_file

    files = {f"model-rank-0-part-{part}.safetensors": {name: tensors[name]} for part, name in enumerate(tensors)}
    for file, held in files.items():
        save_file(held, tmp_path / file, metadata={"a": "model.norm.weight"})
    assert np.array_equal(await get(tmp_path, "a"), tensors["model.norm.weight"])


@pytest.mark.parametrize("tensor_filter", [None, HEAD, [HEAD, "model.norm.weight"]])
async def test_get_tensor_divides_a_tied_tensor_by_its_own_rule(tied, tied_index, tensors, tensor_filter):
    options = {} if tensor_filter is None else {"tensor_filter": lambda name: name in tensor_filter}
    options |= {"rank": 1, "world_size": 4, "tp_plan": {"lm_head": "colwise"}}
    for path in (tied / "model.safetensors", tied_index / "a.safetensors"):
        assert np.array_equal(await get(path, HEAD, **options), tensors[EMBED][16:32])
    if tensor_filter is None:
        assert np.array_equal(await get(tied, HEAD, **options), tensors[EMBED][16:32])


async def test_get_tensor_returns_the_ranks_slice_of_the_stored_tensor_unless_a_filter_leaves_it_out(tied, tensors):
    plan = {"model.embed_tokens": Shard(0)}
    sliced = await get(tied, HEAD, rank=1, world_size=4, tp_plan=plan)
    assert np.array_equal(sliced, tensors[EMBED][16:32])
    with pytest.raises(NamesError):
        await get(tied, HEAD, tensor_filter="model.*")


async def test_a_shard_has_the_names_that_its_metadata_ties_except_those_with_a_rule(tmp_path, tensors):
    await asyncshard.save_sharded_state({**tensors, HEAD: tensors[EMBED]}, tmp_path / "whole", rank=0)
    (path,) = (tmp_path / "whole").iterdir()
    async with IncrementalShardLoader() as loader:
        shard = await loader.load_shard(path)
        assert set(shard) == {*tensors, HEAD}
        assert len(shard) == len(list(shard)) == len(tensors) + 1
        assert np.shares_memory(shard[HEAD], shard[EMBED])
        assert np.array_equal(await loader.get_tensor(path, EMBED), tensors[EMBED])
        assert loader.statistics().hits == 1
    plan = ShardedStateLoader(tp_plan={"model.embed_tokens": Shard(0)})
    async with IncrementalShardLoader(plan) as loader:
        assert EMBED not in await loader.load_shard(path)  # the smaller name is stored
        assert np.array_equal(await loader.get_tensor(path, EMBED), tensors[EMBED])
