"""`examples/demo.py`, as ``make demo`` runs it."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from safetensors.numpy import load_file

import asyncshard

DEMO = Path(__file__).parents[2] / "examples" / "demo.py"


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", DEMO)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_demo_finds_every_tensor_identical() -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(asyncshard.__file__).parents[1])}
    command = [sys.executable, DEMO, "--no-progress"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("104 tensors against safetensors: all identical") == 2
    assert done.stdout.count("loading p50") == 2
    assert done.stdout.index("From the local disk") < done.stdout.index("From S3")


def test_the_demo_tells_what_differs(demo: ModuleType) -> None:
    source = demo.find_weights()
    arrays = {}
    for name, tensor in load_file(source).items():
        for rank in range(demo.WORLD_SIZE if tensor.ndim < 2 else 1):
            arrays[name, rank] = tensor.copy()
    assert demo.compare(source, arrays) == []
    bias = "pooler.dense.bias"
    arrays[bias, 1].view("u1")[7] ^= 1
    del arrays["embeddings.position_ids", 0]
    arrays["pooler.dense.weight", 0] = arrays["pooler.dense.weight", 0][:192]
    assert demo.compare(source, arrays) == [
        "embeddings.position_ids: not delivered by rank 0",
        f"{bias}: the bytes differ",
        "pooler.dense.weight: float32(192, 384) instead of float32(384, 384)",
    ]
