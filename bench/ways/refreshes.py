"""Ways that refresh live weights."""

from __future__ import annotations

import asyncio
import shutil
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from asyncshard import CheckpointVersion, ShardedStateLoader, save_sharded_state
from asyncshard.arrays.frameworks import load_library
from bench.ways.base import Case, Run, Way, octets

_BUDGET_MB = 2048
_SHARE = 0.01
_TIMES = 6
"""Weights are refreshed 6 times: an even number, so that at the end they are what they were at first."""


def _refresh(case: Case) -> Run:
    """Prepare and apply, several times, an update in which one hundredth of the bytes has changed."""
    return _refreshing(case, _SHARE)


def _refresh_all(case: Case) -> Run:
    """Prepare and apply, several times, an update in which every tensor has changed."""
    return _refreshing(case, 1.0)


def _refreshing(case: Case, share: float) -> Run:
    state = case.destinations()
    loader = ShardedStateLoader(framework="pt", memory_budget_mb=_BUDGET_MB)
    load_library(loader.options.framework)
    before, after, total = asyncio.run(_two_versions(case, state, share))
    # What a copy is compared with: memory that is as little in the processor's caches as what an update holds.
    # By NumPy, which calls memcpy: torch copies in several threads.
    source, target = ({name: octets(tensor.clone()) for name, tensor in state.items()} for _ in range(2))

    async def run() -> Mapping[str, float]:
        await loader.load_weights(before, state)
        assert loader.last_report is not None
        versions = (loader.last_report.version, await _version(after))
        prepare, apply, copy, read = [], [], [], 0
        for number in range(_TIMES):
            path = before if number % 2 else after
            began = time.perf_counter()
            update = await loader.prepare_refresh(path, state, since=versions[number % 2])
            prepare.append(time.perf_counter() - began)
            read, changed = update.bytes_read, update.changed
            began = time.perf_counter()
            await update.apply()
            apply.append(time.perf_counter() - began)
            began = time.perf_counter()
            for name in changed:
                np.copyto(target[name], source[name])
            copy.append(time.perf_counter() - began)
        if not changed or read != sum(state[name].nbytes for name in changed):
            raise AssertionError(f"{read} bytes were read for {len(changed)} tensors")
        return {
            "prepare_seconds": statistics.median(prepare),
            "apply_seconds": statistics.median(apply),
            "memcpy_seconds": statistics.median(copy),
            "apply_over_memcpy": statistics.median(a / c for a, c in zip(apply, copy, strict=True)),
            "read_share": read / total,
        }

    return run


async def _two_versions(case: Case, state: Mapping[str, Any], share: float) -> tuple[Path, Path, int]:
    """Write the rank twice, with digests. In the second checkpoint about `share` of the bytes is different."""
    await ShardedStateLoader(framework="pt", rank=0, world_size=2).load_weights(case.data.rank, state)
    folder = case.data.folder / "refresh"
    shutil.rmtree(folder, ignore_errors=True)
    before, after = folder / "before", folder / "after"
    await save_sharded_state(state, before, rank=0, digests=True)
    total = sum(tensor.nbytes for tensor in state.values())
    left = share * total
    for tensor in sorted(state.values(), key=lambda tensor: tensor.nbytes, reverse=True):
        if tensor.nbytes <= left:
            octets(tensor)[0] ^= 1
            left -= tensor.nbytes
    await save_sharded_state(state, after, rank=0, digests=True)
    return before, after, total


async def _version(path: Path) -> CheckpointVersion:
    stream = ShardedStateLoader().iterate_weights(path)
    async with stream:
        assert stream.version is not None
        return stream.version


_NEEDS = ("torch", "xxhash")

REFRESHES = {"refresh": Way(_refresh, _NEEDS), "refresh-all": Way(_refresh_all, _NEEDS)}
