"""The README's Python blocks work as they stand, and its tables leave nothing out."""

from __future__ import annotations

import ast
import inspect
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from asyncshard import errors
from asyncshard.loaders.options import Options
from asyncshard.stores.s3.options import S3Options
from asyncshard.testing import S3Server

README = (Path(__file__).parents[1] / "README.md").read_text()
EXAMPLE, SHARED, *_ = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
RECIPES = dict(
    re.findall(r"^\*\*([^*]+?)\.\*\*[^`]*(?:`[^`]+`[^`]*)*?^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
)


@pytest.fixture(autouse=True)
def _checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the files that the README names, in the working directory."""
    random = np.random.default_rng(0)
    linear = {"weight": random.random((64, 64), np.float32), "bias": random.random(64, np.float32)}
    save_file(linear, tmp_path / "model.safetensors")
    save_file(linear, tmp_path / "linear.safetensors")
    save_file({name: random.random((64, 64), np.float32) for name in "qkv"}, tmp_path / "attention.safetensors")
    _write_llama(tmp_path / "llama", random)
    _write_llama(tmp_path / "fused-llama", random, is_fused=True)
    monkeypatch.chdir(tmp_path)


def _write_llama(path: Path, random: np.random.Generator, *, is_fused: bool = False) -> None:
    attention = {"qkv_proj": (128, 64)} if is_fused else {"q_proj": (64, 64), "k_proj": (32, 64), "v_proj": (32, 64)}
    shapes = {f"self_attn.{name}": shape for name, shape in attention.items()}
    shapes |= {"self_attn.o_proj": (64, 64), "mlp.up_proj": (128, 64), "mlp.down_proj": (64, 128)}
    shapes |= {} if is_fused else {"mlp.gate_proj": (128, 64)}
    tensors = {
        f"model.layers.{number}.{name}.weight": random.random(shape, np.float32)
        for number in range(4)
        for name, shape in shapes.items()
    }
    tensors |= {"model.embed_tokens.weight": random.random((256, 64), np.float32), "model.norm.weight": np.ones(64)}
    config = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "tie_word_embeddings": True}
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config | {"num_attention_heads": 4, "num_key_value_heads": 2}))


async def run(title: str) -> dict[str, Any]:
    """Run a recipe as the body of a coroutine; return its variables."""
    variables: dict[str, Any] = {}
    for block in (SHARED, RECIPES[title]):
        if "import torch" in block:
            pytest.importorskip("torch")
        result = eval(compile(block, title, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), variables)
        if inspect.isawaitable(result):
            await result
    return variables


def test_the_first_example_is_a_program(capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(EXAMPLE, "README.md", "exec"), {})
    assert sorted(capsys.readouterr().out.splitlines()) == ["bias float32 (64,)", "weight float32 (64, 64)"]


@pytest.mark.parametrize("title", ["Stream into a model", "Load into a state dict, in place"])
async def test_a_model_gets_its_weights(title: str) -> None:
    model = (await run(title))["model"]
    for name, expected in load_file("linear.safetensors").items():
        np.testing.assert_array_equal(model.get_parameter(name).detach().numpy(), expected)


async def test_views_of_a_fused_parameter_are_filled() -> None:
    qkv = (await run("Fill views of one fused parameter"))["qkv"]
    parts = load_file("attention.safetensors")
    np.testing.assert_array_equal(qkv, np.concatenate([parts["q"], parts["k"], parts["v"]]))


async def test_a_rank_gets_its_slices() -> None:
    weights = (await run("Load one rank's part of any checkpoint"))["weights"]
    whole = load_file("fused-llama/model.safetensors")
    name = "model.layers.3.self_attn.qkv_proj.weight"
    q, k, v = np.split(whole[name], [64, 96])
    np.testing.assert_array_equal(weights[name], np.concatenate([q[16:32], k[8:16], v[8:16]]))
    name = "model.layers.0.mlp.down_proj.weight"
    np.testing.assert_array_equal(weights[name], whole[name][:, 32:64])
    assert set(weights) == {*whole, "lm_head.weight"}  # which config.json ties


async def test_some_tensors_are_loaded_alone() -> None:
    variables = await run("Load some tensors alone")
    assert len(variables["stage"]) == 2 * 7 + 1
    assert len(variables["projections"]) == 8


async def test_a_checkpoint_is_resharded_and_back() -> None:
    rank = (await run("Change the number of ranks"))["rank"]
    whole, again = load_file("llama/model.safetensors"), load_file("llama-again/model.safetensors")
    assert set(again) == set(whole)
    for name, tensor in whole.items():
        np.testing.assert_array_equal(again[name], tensor)
    name = "model.layers.1.mlp.gate_proj.weight"
    np.testing.assert_array_equal(rank[name], whole[name][:64])


async def test_a_checkpoint_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    await run("Ask whether a checkpoint is whole")
    assert "complete" in capsys.readouterr().out


async def test_sinks_get_the_bytes() -> None:
    sinks = (await run("Pass chunks on to a device"))["sinks"]
    expected = {name: tensor.tobytes() for name, tensor in load_file("linear.safetensors").items()}
    assert {name: bytes(sink.target) for name, sink in sinks.items()} == expected


async def test_a_model_comes_from_a_server_with_an_authority_of_its_own(
    tls: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with S3Server(tls=tls.server_context) as server:
        shard = Path("linear.safetensors").read_bytes()
        server.put("models", "llama-70b/model-rank-0-part-0.safetensors", shard)
        block = RECIPES["Load from S3"]
        for shown, here in (
            ("https://minio.internal:9000", server.endpoint_url),
            ("/etc/ssl/minio-ca.pem", str(tls.ca_path)),
        ):
            assert shown in block
            block = block.replace(shown, here)
        monkeypatch.setitem(RECIPES, "Load from S3", block)
        weights = (await run("Load from S3"))["weights"]
    assert set(weights) == {"weight", "bias"}


async def test_a_second_load_comes_from_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    title = "Cache remote weights on the node's disk"
    async with S3Server() as server:
        shard = Path("linear.safetensors").read_bytes()
        server.put("models", "llama-70b/model-rank-0-part-0.safetensors", shard)
        monkeypatch.setitem(RECIPES, title, RECIPES[title].replace("https://minio.internal:9000", server.endpoint_url))
        variables = await run(title)
    assert set(variables["weights"]) == {"weight", "bias"}
    assert variables["report"].dropped == ()


async def test_loaders_share_a_budget() -> None:
    variables = await run("Share a budget between loaders")
    assert variables["draft"].result() == 64 * 65 * 4
    assert variables["target"].result() == 3 * 64 * 64 * 4
    assert variables["budget"].bytes_used == 0


async def test_a_rank_gets_its_own_shards() -> None:
    weights = (await run("Write and read the shards of a rank"))["weights"]
    np.testing.assert_array_equal(weights["weight"], np.full((4, 64), 1, np.float32))


async def test_weights_are_refreshed(capsys: pytest.CaptureFixture[str]) -> None:
    variables = await run("Refresh weights under a running server")
    assert capsys.readouterr().out == "('head',) 16384\n"
    assert (variables["state"]["head"] == 1).all()
    assert (variables["state"]["body"] == 0).all()


async def test_progress_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    await run("Show progress")
    assert "16,640 of 16,640 bytes, 0.0 s to go" in capsys.readouterr().out


@pytest.mark.parametrize("name", [*Options.__dataclass_fields__, *S3Options.__dataclass_fields__])
def test_the_table_of_options_has_each(name: str) -> None:
    assert re.search(rf"^\|[^|]*`{name}`", README, re.MULTILINE)


@pytest.mark.parametrize(
    "name", [name for name, value in vars(errors).items() if str(value).startswith("<class 'asyncshard.")]
)
def test_the_table_of_errors_has_each(name: str) -> None:
    assert re.search(rf"^\|[^|]*`{name}`", README, re.MULTILINE)
