"""Checkpoints for the tests of the loaders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

Weights = dict[str, Any]


@pytest.fixture
def write_ranks(tmp_path: Path) -> Callable[..., Path]:
    """Write a directory of rank shards from ``{(rank, part): {name: array}}``."""

    def write(shards: dict[tuple[int, int], Weights], template: str = "model-rank-{}-part-{}.safetensors") -> Path:
        directory = tmp_path / "ranks"
        directory.mkdir(exist_ok=True)
        for (rank, part), weights in shards.items():
            save_file(weights, directory / template.format(rank, part))
        return directory

    return write


@pytest.fixture
def weights() -> Weights:
    """A few tensors of different types and shapes, an empty one and a scalar among them."""
    rng = np.random.default_rng(1)
    return {
        "a.weight": rng.standard_normal((64, 48)).astype(np.float32),
        "a.bias": rng.standard_normal(64).astype(np.float16),
        "b.count": np.array(7, np.int64),
        "b.empty": np.zeros((0, 5), np.float32),
        "b.mask": rng.integers(0, 2, 33).astype(np.bool_),
        "c.weight": rng.integers(-100, 100, (3, 5, 7)).astype(np.int8),
    }
