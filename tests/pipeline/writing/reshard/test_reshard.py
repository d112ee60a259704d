"""A reshard as a whole: it checks before it writes, and reports what it did.

All that a reshard must do with files is tested in ``tests/loaders/test_reshard.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asyncshard import MemoryBudget
from asyncshard.errors import CheckpointError
from asyncshard.pipeline.checkpoint.opening import Opening
from asyncshard.pipeline.writing.reshard.reshard import WRITERS, Reshard, ReshardReport, ReshardRequest
from asyncshard.pipeline.writing.reshard.target import Target
from asyncshard.plan.division.placements import Shard
from asyncshard.plan.tp.plan import TpPlan
from asyncshard.testing import MemoryStore

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TENSORS = {EMBED: np.arange(16, dtype="u1").reshape(4, 4), "norm": np.arange(3, dtype="u1")}
PLAN = TpPlan({EMBED: Shard(0)})


async def run(files: Mapping[str, bytes], folder: str, world_size: int, tp_plan: Any = None) -> ReshardReport:
    request = ReshardRequest(world_size, 1 << 20, world_size > 1, None, tp_plan, None)
    target = Target(folder, None, overwrite=False)
    async with Opening(MemoryStore(files), MemoryBudget(1), threads=WRITERS) as opening:
        try:
            return await Reshard(opening, target, request).run()
        finally:
            target.clean_up()


async def test_the_report_counts_what_was_read_compared_and_written(checkpoints: Any, folder: str) -> None:
    files = {"model.safetensors": checkpoints.shard(TENSORS), "config.json": b"{}"}
    report = await run(files, folder, 2, PLAN)
    names = [f"model-rank-{rank}-part-0.safetensors" for rank in (0, 1)]
    assert report == ReshardReport(tuple(f"{folder}/{name}" for name in names), 2, 19, 22, 0)
    assert {path.name for path in Path(folder).iterdir()} == {*names, "config.json"}
    ranks = {name: (Path(folder) / name).read_bytes() for name in names}
    back = await run(ranks, f"{folder}-2", 1)
    assert back == ReshardReport((f"{folder}-2/model.safetensors",), 2, 19, 19, 2 * 3)


async def test_nothing_is_written_where_the_division_is_not_known(checkpoints: Any, folder: str) -> None:
    with pytest.raises(CheckpointError, match="among 2 ranks is not known: pass a tp_plan"):
        await run({"model.safetensors": checkpoints.shard(TENSORS)}, folder, 2)
    assert not Path(folder).exists()


async def test_nothing_is_written_where_copies_differ(checkpoints: Any, folder: str, placed: Any) -> None:
    other = {**TENSORS, "norm": TENSORS["norm"] + 1}
    files = {
        f"model-rank-{rank}-part-0.safetensors": checkpoints.shard(tensors, metadata=placed())
        for rank, tensors in enumerate((TENSORS, other))
    }
    with pytest.raises(CheckpointError, match="hold other bytes of tensor 'norm'"):
        await run(files, folder, 1)
    assert not Path(folder).exists()


async def test_tied_tensors_may_not_be_divided_differently(checkpoints: Any, folder: str) -> None:
    files = {"model.safetensors": checkpoints.shard(TENSORS, metadata={HEAD: EMBED})}
    with pytest.raises(
        CheckpointError, match=f"'{HEAD}' is tied to '{EMBED}', and the tp_plan divides them differently"
    ):
        await run(files, folder, 2, TpPlan({EMBED: Shard(0), HEAD: Shard(1)}))
    assert not Path(folder).exists()
    assert (await run(files, folder, 2, TpPlan({EMBED: Shard(0), HEAD: Shard(0)}))).tensors == 2
