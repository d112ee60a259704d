"""Ranks that load their slices of a checkpoint that was not cut for them."""

import asyncio
import json
import threading

import numpy as np
import pytest

import asyncshard
from asyncshard import AsyncShardLoader, IncrementalShardLoader, ShardedStateLoader
from asyncshard.errors import (
    CheckpointError,
    NamesError,
    ObjectChangedError,
    ObjectNotFoundError,
    StoreError,
    TruncatedError,
)
from asyncshard.format.digests import DIGESTS_KEY
from asyncshard.plan.division.placements import PackedShard, Replicate, Shard
from asyncshard.plan.file_slices.file_slice import FileSlice
from asyncshard.testing import Fault, FaultyStore, GatedStore, MemoryStore, WrapperStore

MIB = 1 << 20
WORLD = 8
PLAN = {
    "layers.*.q": Shard(0),
    "layers.*.o": Shard(1),
    "layers.*.gate_up": PackedShard(0, (24, 40)),
    "layers.*.fused_columns": PackedShard(-1, (5, 16)),
    "layers.*.kv": Shard(0, 2),
    "layers.*.norm": Replicate(),
    "layers.*.experts": Shard(1),
}


def layer(number):
    random = np.random.default_rng(number)
    shapes = {
        "q.weight": (32, 60),
        "o.weight": (60, 48),
        "gate_up.weight": (64, 30),
        "fused_columns.weight": (40, 21),
        "kv.weight": (8, 60),
        "norm.weight": (60,),
        "experts.weight": (3, 10, 90),
        "odd.weight": (7,),
    }
    dtypes = ["<f4", "<f2", "<i8", "u1", "<f2", "<f8", "<i2", "u1"]
    return {
        f"layers.{number}.{name}": random.integers(0, 100, shape).astype(dtype)
        for (name, shape), dtype in zip(shapes.items(), dtypes, strict=True)
    }


SHARDS = [layer(0), {**layer(1), "embed.weight": np.arange(64, dtype="<f4").reshape(16, 4)}, layer(2)]
WHOLE = {name: array for shard in SHARDS for name, array in shard.items()}
DIMS = {"q": 0, "o": 1, "gate_up": 0, "fused_columns": 1, "kv": 0, "experts": 1}


def local(name, array, rank):
    kind = name.split(".")[2] if name.startswith("layers") else ""
    if kind not in DIMS:
        return array
    dim = DIMS[kind]
    if kind == "kv":
        return np.split(array, 2, dim)[rank // (WORLD // 2)]
    cuts = {"gate_up": [24], "fused_columns": [5]}.get(kind, [])
    pieces = []
    for block in np.split(array, cuts, dim):
        step = -(-block.shape[dim] // WORLD)
        pieces.append(
            np.take(block, range(min(rank * step, block.shape[dim]), min(rank * step + step, block.shape[dim])), dim)
        )
    return np.concatenate(pieces, dim)


def expected_of(rank, names=None):
    return {
        name: np.ascontiguousarray(local(name, array, rank))
        for name, array in WHOLE.items()
        if names is None or name in names
    }


@pytest.fixture(scope="module")
def files(checkpoints):
    return checkpoints.hugging_face_files(*SHARDS)


@pytest.fixture
def model(tmp_path, checkpoints):
    return checkpoints.write_hugging_face(tmp_path / "model", *SHARDS)


def loader_of(rank, **options):
    return ShardedStateLoader(rank=rank, world_size=WORLD, tp_plan=PLAN, **options)


def same(got, rank, checkpoints):
    expected = expected_of(rank)
    assert {name: tuple(array.shape) for name, array in got.items()} == {n: a.shape for n, a in expected.items()}
    return checkpoints.same(got, expected)


WAYS = {}


def way(function):
    WAYS[function.__name__] = function
    return function


@way
async def load_new(loader, path, rank):
    return await loader.load_weights(path)


@way
async def load_into(loader, path, rank):
    state = {name: np.zeros(a.shape, a.dtype) for name, a in expected_of(rank).items()}
    assert await loader.load_weights(path, state) is state
    return state


@way
async def load_into_strided(loader, path, rank):
    state = {name: np.zeros(a.shape[::-1], a.dtype).T for name, a in expected_of(rank).items()}
    return await loader.load_weights(path, state)


@way
async def stream(loader, path, rank):
    async with AsyncShardLoader(loader).stream(path) as weights:
        return {name: np.array(tensor) async for name, tensor in weights}


@way
async def stream_into(loader, path, rank):
    state = {name: np.zeros(a.shape, a.dtype) for name, a in expected_of(rank).items()}
    async with AsyncShardLoader(loader).stream(path, into=state) as weights:
        return {name: tensor async for name, tensor in weights}


@way
async def incremental(loader, path, rank):
    got = {}
    await IncrementalShardLoader(loader).load_weights_incremental(path, lambda n, t: got.__setitem__(n, np.array(t)))
    return got


@pytest.mark.parametrize("chunk_size", [64, 1000, None])
@pytest.mark.parametrize("load", WAYS.values(), ids=WAYS)
async def test_each_rank_gets_its_slices(model, checkpoints, load, chunk_size):
    for rank in (0, 3, 7):
        loader = loader_of(rank, chunk_size=chunk_size, memory_budget_mb=2)
        assert same(await load(loader, model, rank), rank, checkpoints)
        assert loader.budget.bytes_used == 0


@pytest.mark.parametrize("max_gap", [0, 40, MIB])
@pytest.mark.parametrize("load", WAYS.values(), ids=WAYS)
async def test_a_store_that_reads_one_range_at_a_time_delivers_the_same_slices(files, checkpoints, load, max_gap):
    for rank in (1, 6):
        store = MemoryStore(files)
        store.pacing = store.pacing._replace(max_gap_bytes=max_gap)
        loader = loader_of(rank, chunk_size=5000, memory_budget_mb=1)
        assert same(await load(loader, store, rank), rank, checkpoints)
        assert loader.budget.bytes_used == 0


async def test_the_slices_of_all_ranks_make_up_the_tensors_that_safetensors_loads(model, checkpoints):
    from safetensors.numpy import load_file

    whole = {name: array for path in sorted(model.glob("*.safetensors")) for name, array in load_file(path).items()}
    plan = {"layers.*.q": Shard(0), "layers.*.o": Shard(1), "layers.*.experts": Shard(2), "layers.*.norm": Shard(0)}
    dims = {"q": 0, "o": 1, "experts": 2, "norm": 0}
    ranks = [
        await ShardedStateLoader(rank=rank, world_size=WORLD, tp_plan=plan).load_weights(model) for rank in range(WORLD)
    ]
    assert any(0 in part["layers.0.norm.weight"].shape for part in ranks) is False
    for name, array in whole.items():
        kind = name.split(".")[2] if name.startswith("layers") else ""
        if kind in dims:
            array_of_ranks = np.concatenate([part[name] for part in ranks], dims[kind])
            assert checkpoints.bytes_of(array_of_ranks) == checkpoints.bytes_of(array)
        else:
            assert all(checkpoints.bytes_of(part[name]) == checkpoints.bytes_of(array) for part in ranks)


async def test_torch_tensors_and_views_of_one_fused_parameter_take_slices(model, checkpoints):
    torch = pytest.importorskip("torch")
    rank = 2
    got = await loader_of(rank, framework="pt").load_weights(model)
    assert isinstance(got["embed.weight"], torch.Tensor)
    assert checkpoints.same(got, expected_of(rank))
    names = {"layers.0.o.weight", "layers.0.kv.weight"}
    loader = loader_of(rank, tensor_filter=names)
    # Rows of one parameter, and columns of another.
    fused = torch.zeros(70, 60, dtype=torch.float16)
    await loader.load_weights(model, {"layers.0.o.weight": fused[:60, 7:13], "layers.0.kv.weight": fused[60:64]})
    expected = expected_of(rank)
    assert np.array_equal(fused[:60, 7:13].numpy(), expected["layers.0.o.weight"])
    assert np.array_equal(fused[60:64].numpy(), expected["layers.0.kv.weight"])
    assert int((fused != 0).sum()) == sum(int((expected[name] != 0).sum()) for name in names)


async def test_a_rank_without_rows_gets_an_empty_tensor(tmp_path, checkpoints):
    path = checkpoints.write_file(tmp_path / "x.safetensors", {"a": np.arange(15).reshape(5, 3), "b": np.arange(4)})
    got = await ShardedStateLoader(rank=7, world_size=8, tp_plan={"a": Shard(0), "b": Shard(0)}).load_weights(path)
    assert (got["a"].shape, got["b"].shape) == ((0, 3), (0,))


async def test_elements_below_a_byte_are_cut_where_a_byte_begins(tmp_path, checkpoints):
    tensors = checkpoints.every_dtype(elements=32)
    path = checkpoints.write_file(tmp_path / "x.safetensors", tensors)
    for rank in range(4):
        got = await ShardedStateLoader(rank=rank, world_size=4, tp_plan=dict.fromkeys(tensors, Shard(0))).load_weights(
            path
        )
        for name, raw in tensors.items():
            size = len(raw.data) // 4
            assert checkpoints.bytes_of(got[name]) == raw.data[rank * size : rank * size + size]
    with pytest.raises(CheckpointError, match="within a byte"):
        await ShardedStateLoader(rank=0, world_size=32, tp_plan={"F4": Shard(0)}).load_weights(path)


# --- what is read


class CountingStore(WrapperStore):
    """Counts what is opened, and the bytes that are read."""

    def __init__(self, store):
        super().__init__(store)
        self.opened = []
        self.bytes_read = 0

    async def open(self, name, nbytes):
        self.opened.append(name)
        return await super().open(name, nbytes)

    async def read_into(self, meta, start, buffers):
        self.bytes_read += sum(buffer.nbytes for buffer in buffers)
        await super().read_into(meta, start, buffers)


@pytest.mark.parametrize("max_gap", [0, 30, 500, MIB])
async def test_the_plan_of_a_load_has_the_bytes_that_are_read(files, max_gap):
    memory = MemoryStore(files)
    memory.pacing = memory.pacing._replace(max_gap_bytes=max_gap)
    store = CountingStore(memory)
    loader = loader_of(5)
    plan = await loader.plan_weights(store)
    assert store.bytes_read == 0
    assert loader.budget.bytes_used == 0
    got = await loader.load_weights(store)
    assert plan.bytes_needed == sum(array.nbytes for array in got.values())
    assert plan.tensors == len(WHOLE)
    assert [file.path for file in plan.files] == [store.path_of(name) for name in sorted(files) if "of" in name]
    assert store.bytes_read == plan.bytes_read == sum(file.bytes_read for file in plan.files)
    assert (plan.bytes_read == plan.bytes_needed) is (max_gap == 0)


async def test_a_stream_has_the_plan_of_its_load(model):
    async with AsyncShardLoader(loader_of(0)).stream(model) as weights:
        assert weights.plan == await loader_of(0).plan_weights(model)
        assert weights.statistics().bytes_total == weights.plan.bytes_needed
        assert weights.info["layers.0.q.weight"].shape == (4, 60)
    plan = await ShardedStateLoader().plan_weights(model)
    assert plan.bytes_read == plan.bytes_needed == sum(array.nbytes for array in WHOLE.values())


@pytest.mark.parametrize(
    ("wanted", "opened"),
    [
        ("embed.weight", [2]),
        ("layers.[02].*", [1, 3]),
        (["layers.0.q.weight", "layers.1.*"], [1, 2]),
        (lambda name: name.endswith("odd.weight"), [1, 2, 3]),
    ],
)
async def test_shards_without_a_wanted_tensor_are_not_opened(files, checkpoints, wanted, opened):
    store = CountingStore(MemoryStore(files))
    loader = ShardedStateLoader(tensor_filter=wanted)
    got = await loader.load_weights(store)
    names = [f"model-{number:05}-of-00003.safetensors" for number in opened]
    assert [name for name in store.opened if name in names] == names
    assert len([name for name in store.opened if "-of-" in name]) == len(names)
    is_wanted = loader.selection.tensor_filter
    assert checkpoints.same(got, {name: array for name, array in WHOLE.items() if is_wanted(name)})
    assert await loader.discover_shards(store) == [store.path_of(name) for name in names]


async def test_a_filter_and_a_plan_go_together(model, checkpoints):
    loader = loader_of(3, tensor_filter="*.o.weight")
    names = {name for name in WHOLE if name.endswith(".o.weight")}
    got = await loader.load_weights(model)
    assert checkpoints.same(got, expected_of(3, names))


@pytest.mark.parametrize("is_indexed", [True, False])
async def test_a_filter_that_finds_nothing_is_an_error(tmp_path, checkpoints, is_indexed):
    path = tmp_path / "x.safetensors"
    if is_indexed:
        path = checkpoints.write_hugging_face(tmp_path / "m", {"a": np.ones(3)}, {"b": np.ones(3)})
    else:
        checkpoints.write_file(path, {"a": np.ones(3), "b": np.ones(3)})
    with pytest.raises(NamesError, match="matches no tensor"):
        await ShardedStateLoader(tensor_filter="x*").load_weights(path)
    with pytest.raises(NamesError, match="names tensors that are not there: 'c'") as caught:
        await ShardedStateLoader(tensor_filter=["a", "c"]).load_weights(path)
    assert caught.value.missing == ("c",)
    assert list(await ShardedStateLoader(tensor_filter=["b"]).load_weights(path)) == ["b"]


async def test_a_filter_works_on_rank_shards_and_a_plan_does_not(tmp_path, checkpoints):
    path = checkpoints.write_ranks(tmp_path / "m", {"a": np.ones(4)}, {"b": np.ones(3)})
    assert list(await ShardedStateLoader(tensor_filter="b").load_weights(path)) == ["b"]
    with pytest.raises(CheckpointError, match="cut already; leave tp_plan out"):
        await ShardedStateLoader(world_size=2, tp_plan={"a": Shard(0)}).load_weights(path)
    loader = ShardedStateLoader(world_size=2, tp_plan={"a": Shard(0)})
    shard = path / "model-rank-0-part-0.safetensors"
    with pytest.raises(CheckpointError, match="cut already"):
        await loader.load_weights(shard)
    with pytest.raises(CheckpointError, match="cut already"):
        await IncrementalShardLoader(loader).load_shard(shard)
    assert list(await ShardedStateLoader(tp_plan={"a": Shard(0)}).load_weights(path)) == ["a", "b"]


# --- plans


async def test_a_rule_that_matches_nothing_is_an_error(model, tmp_path, checkpoints):
    with pytest.raises(NamesError, match="typo"):
        await ShardedStateLoader(world_size=2, tp_plan={"layers.*.typo": Shard(0)}).load_weights(model)
    # Also where the filter leaves out what it matches: then it does match.
    loader = ShardedStateLoader(world_size=2, tp_plan={"layers.*.q": Shard(0)}, tensor_filter="embed*")
    assert list(await loader.load_weights(model)) == ["embed.weight"]
    with pytest.raises(NamesError):
        await ShardedStateLoader(world_size=2, tp_plan={"layers.*.q": Shard(0)}, unmatched="error").load_weights(model)


async def test_words_of_transformers_place_tensors(tmp_path, checkpoints):
    tensors = {"a.weight": np.arange(32).reshape(8, 4), "a.bias": np.arange(8), "b.weight": np.arange(32).reshape(4, 8)}
    path = checkpoints.write_file(tmp_path / "x.safetensors", tensors)
    got = await asyncshard.load(path, rank=1, world_size=2, tp_plan={"a": "colwise", "b": "rowwise"})
    assert checkpoints.same(
        got,
        {"a.weight": tensors["a.weight"][4:], "a.bias": tensors["a.bias"][4:], "b.weight": tensors["b.weight"][:, 4:]},
    )


@pytest.mark.parametrize("is_file", [False, True])
async def test_the_plan_of_a_model_is_found_by_its_config(tmp_path, checkpoints, is_file):
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "vocab_size": 8,
    }
    layer = "model.layers.0"
    whole = np.arange(512).reshape(32, 16)
    rows = [f"self_attn.{name}_proj" for name in "qkv"] + [f"mlp.{name}_proj" for name in ("gate", "up")]
    columns = ["self_attn.o_proj", "mlp.down_proj"]
    tensors = {f"{layer}.{name}.weight": whole for name in rows} | {
        f"{layer}.{name}.weight": whole.T for name in columns
    }
    path = tmp_path / "model.safetensors"
    checkpoints.write_file(path, tensors)
    (tmp_path / "config.json").write_text(json.dumps(config))
    loader = ShardedStateLoader(rank=1, world_size=2, tp_plan="auto")
    got = await loader.load_weights(path if is_file else tmp_path)
    expected = {name: whole[16:] if tensor is whole else whole.T[:, 16:] for name, tensor in tensors.items()}
    assert checkpoints.same(got, expected)
    shard = await IncrementalShardLoader(loader).load_shard(path)
    assert checkpoints.same(shard, got)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        await loader.load_weights(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ObjectNotFoundError, match=r'config\.json: .*; tp_plan="auto" needs it'):
        await loader.load_weights(tmp_path)


@pytest.mark.parametrize(
    "options", [{"tp_plan": "colwise"}, {"unmatched": "error"}, {"tp_plan": "auto", "unmatched": "error"}]
)
def test_options_that_make_no_plan_are_an_error(options):
    with pytest.raises(ValueError, match="tp_plan"):
        ShardedStateLoader(world_size=2, **options)


def test_loaders_built_on_a_slicing_loader_slice_and_pickle():
    import pickle

    base = loader_of(1, tensor_filter="a*")
    for loader in (base, AsyncShardLoader(base), IncrementalShardLoader(base)):
        copy = pickle.loads(pickle.dumps(loader))
        assert copy.selection.tp_plan == loader.selection.tp_plan == base.selection.tp_plan
        assert copy.selection.tensor_filter("ab")


# --- single shards


@pytest.mark.parametrize("chunk_size", [64, None])
async def test_single_shards_and_tensors_are_the_ranks_slices(model, checkpoints, chunk_size):
    expected = expected_of(4)
    async with IncrementalShardLoader(loader_of(4, chunk_size=chunk_size), memory_budget_mb=4) as loader:
        assert np.array_equal(await loader.get_tensor(model, "layers.1.o.weight"), expected["layers.1.o.weight"])
        shard = await loader.load_shard(model / "model-00002-of-00003.safetensors")
        assert checkpoints.same(shard, {name: array for name, array in expected.items() if name in SHARDS[1]})
        before = loader.statistics()
        got = {}
        await loader.load_weights_incremental(model, lambda name, tensor: got.__setitem__(name, np.array(tensor)))
        assert same(got, 4, checkpoints)
        assert loader.statistics().hits == before.hits + 1
        del shard
    assert loader.budget.bytes_used == 0


async def test_a_tensor_that_is_filtered_out_is_unknown(model):
    loader = IncrementalShardLoader(ShardedStateLoader(tensor_filter=["embed.weight"]))
    assert (await loader.get_tensor(model, "embed.weight")).shape == (16, 4)
    for name in ("layers.1.q.weight", "layers.0.q.weight"):
        with pytest.raises(NamesError, match="no tensor"):
            await loader.get_tensor(model, name)


# --- versions


async def test_versions_of_different_slices_differ_and_an_unchanged_slice_is_not_read(model):
    versions = []
    for rank in (0, 1):
        loader = loader_of(rank)
        state = await loader.load_weights(model)
        versions.append(loader.last_report.version)
        async with await loader.prepare_refresh(model, state, since=versions[-1]) as update:
            assert update.changed == ()
    assert versions[0] != versions[1]
    assert asyncshard.CheckpointVersion.parse(str(versions[0])) == versions[0]
    state = {name: np.zeros(a.shape, a.dtype) for name, a in expected_of(0).items()}
    async with await loader_of(0).prepare_refresh(model, state, since=versions[1]) as update:
        assert len(update.changed) == len(WHOLE)


async def test_digests_of_whole_tensors_are_dropped_with_the_slices(tmp_path, checkpoints):
    metadata = {DIGESTS_KEY: "0" * 32}
    path = checkpoints.write_file(tmp_path / "x.safetensors", {"a": np.arange(16).reshape(4, 4)}, metadata=metadata)
    loader = ShardedStateLoader(rank=1, world_size=2, tp_plan={"a": Shard(1)})
    state = {"a": np.zeros((4, 2), np.int64)}
    async with await loader.prepare_refresh(path, state) as update:
        await update.apply()
    assert np.array_equal(state["a"], np.arange(16).reshape(4, 4)[:, 2:])


# --- errors and cancelling


async def test_a_file_that_is_cut_short_or_replaced_is_an_error_that_names_it(model):
    path = model / "model-00003-of-00003.safetensors"
    async with AsyncShardLoader(loader_of(1)).stream(model) as weights:
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - 3000)
        with pytest.raises((ObjectChangedError, TruncatedError), match=r"model-00003-of-00003\.safetensors") as caught:
            async for _ in weights:
                pass
    assert caught.value.path == str(path)


@pytest.mark.parametrize("failing", [0, 5, 20])
async def test_a_read_that_fails_fails_the_load(files, failing):
    memory = MemoryStore(files)
    memory.pacing = memory.pacing._replace(max_gap_bytes=100)
    store = FaultyStore(memory, reads={failing: Fault(after=3, error=StoreError("broken", path="p"))})
    loader = loader_of(1, memory_budget_mb=1)
    state = {name: np.zeros(a.shape, a.dtype) for name, a in expected_of(1).items()}
    with pytest.raises(StoreError, match="broken") as caught:
        await loader.load_weights(store, state)
    assert set(caught.value.filled) <= set(state)
    assert loader.budget.bytes_used == 0


async def test_nothing_is_written_after_a_cancelled_load_has_returned(files):
    memory = MemoryStore(files)
    memory.pacing = memory.pacing._replace(max_gap_bytes=100)
    store = GatedStore(memory, is_stubborn=True)
    loader = loader_of(1, memory_budget_mb=1)
    state = {name: np.zeros(a.shape, a.dtype) for name, a in expected_of(1).items()}
    task = asyncio.ensure_future(loader.load_weights(store, state))
    await store.waiting(2)
    task.cancel()
    await asyncio.sleep(0)
    assert not task.done()
    store.open_all()
    with pytest.raises(asyncio.CancelledError):
        await task
    before = {name: array.copy() for name, array in state.items()}
    for _ in range(5):
        await asyncio.sleep(0)
    assert all(np.array_equal(before[name], array) for name, array in state.items())
    assert loader.budget.bytes_used == 0


async def test_scratch_counts_against_the_budget_and_stays_a_share_of_it(files):
    class Watched(WrapperStore):
        largest = 0
        used = 0

        async def read_into(self, meta, start, buffers):
            self.largest = max(self.largest, sum(buffer.nbytes for buffer in buffers))
            self.used = max(self.used, loader.budget.bytes_used)
            await super().read_into(meta, start, buffers)

    store = Watched(MemoryStore(files))
    store.pacing = store.pacing._replace(max_gap_bytes=MIB)
    loader = loader_of(1, memory_budget_mb=0.25)
    async with AsyncShardLoader(loader).stream(store) as weights:
        opened = loader.budget.bytes_used
        async for name, tensor in weights:
            del name, tensor
    assert opened > MIB // 4 // 8
    assert store.largest <= MIB // 4 // 8
    assert store.used <= MIB // 4
    assert loader.budget.bytes_used == 0


async def test_the_bytes_of_a_plan_are_added_up_in_a_thread(files, monkeypatch):
    threads = set()
    add_up = FileSlice.bytes_read

    def watched(part, max_gap):
        threads.add(threading.current_thread())
        return add_up(part, max_gap)

    monkeypatch.setattr(FileSlice, "bytes_read", watched)
    await loader_of(1).load_weights(MemoryStore(files))
    assert threads
    assert threading.main_thread() not in threads


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "{"])
async def test_a_config_that_is_no_object_is_an_error_that_names_it(tmp_path, text):
    from safetensors.numpy import save_file

    save_file({"model.layers.0.self_attn.q_proj.weight": np.ones((4, 4), np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        await ShardedStateLoader(world_size=2, tp_plan="auto").load_weights(tmp_path)


async def test_a_model_in_an_unknown_form_is_refused_by_every_loader(tmp_path):
    from safetensors.numpy import save_file

    name = "model.layers.0.self_attn.qkv_proj.weight"
    save_file({name: np.ones((12, 4), np.float32)}, tmp_path / "model.safetensors")
    config = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    base = ShardedStateLoader(world_size=2, tp_plan="auto")
    for load in (
        base.load_weights(tmp_path),
        IncrementalShardLoader(base).load_shard(tmp_path / "model.safetensors"),
        asyncshard.reshard(tmp_path, tmp_path / "out", world_size=2, tp_plan="auto"),
    ):
        with pytest.raises(CheckpointError, match=rf"{name} are divided"):
            await load
