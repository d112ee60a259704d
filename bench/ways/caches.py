"""Ways that use the shard cache in memory."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from asyncshard import IncrementalShardLoader, ShardedStateLoader
from asyncshard.arrays.frameworks import load_library
from bench.checkpoint import RANK, WORLD_SIZE
from bench.ways.base import Case, Run, Way

_HITS = 20_000


def _hit(case: Case) -> Run:
    """Get a shard that is cached in memory; for comparison, do a look-up in a dict and an `await`."""
    path = str(case.data.layers_only.absolute())

    async def run() -> Mapping[str, float]:
        async with IncrementalShardLoader(memory_budget_mb=2 * case.data.layers_only.stat().st_size / 2**20) as loader:
            known = {path: await loader.load_shard(path)}

            async def look_up(name: str) -> Any:
                return known[name]

            hit, floor = [await _microseconds(call, path) for call in (loader.load_shard, look_up)]
        return {"hit_us": hit, "floor_us": floor, "over_floor_us": hit - floor}

    return run


async def _microseconds(call: Callable[[str], Awaitable[Any]], path: str) -> float:
    began = time.perf_counter()
    for _ in range(_HITS):
        await call(path)
    return (time.perf_counter() - began) / _HITS * 1e6


def _incremental(case: Case) -> Run:
    """Call `load_weights_incremental` for a checkpoint that is larger than the budget."""
    case.nbytes = case.data.rank_bytes
    base = ShardedStateLoader(rank=RANK, world_size=WORLD_SIZE, framework="pt", memory_budget_mb=case.budget_mb)
    load_library(base.options.framework)

    async def run() -> Mapping[str, float]:
        names = []
        async with IncrementalShardLoader(base) as loader:
            await loader.load_weights_incremental(case.data.rank, lambda name, tensor: names.append(name))
        return {"tensors": len(names)}

    return run


CACHES = {
    "incremental-hit": Way(_hit),
    "incremental-load": Way(_incremental, ("torch",)),
}
